"""The tables of the search index, and how rows get into them fast.

Lives here: the schema (SQLAlchemy Core), the two databases' ways of words and bulk inserts, one
transaction per batch. Not here: what is indexed when, and what is asked (`audit.index`).

SQLite keeps words in FTS5 without content or positions; PostgreSQL in a `tsvector` with GIN. The
index can be thrown away, so SQLite syncs only at checkpoints: after a power cut it is older, never
torn (sqlite.org/wal.html).
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Index,
    Integer,
    MetaData,
    Select,
    String,
    Table,
    text,
)
from sqlalchemy.exc import SQLAlchemyError

from audit.criteria import WORD_MARKS
from audit.errors import AuditConfigurationError, IndexUnavailableError
from keys import sql

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Raised when the tables change: an index of another format is thrown away.
FORMAT = 1
_TERMS = sql.Terms(
    setting="[audit] index_url",
    what="the search index",
    wrong=AuditConfigurationError,
    failed=IndexUnavailableError,
    busy_timeout_s=30,
    pragmas={"synchronous": "NORMAL", "cache_size": -65_536},
)

metadata = MetaData()
entries = Table(
    "audit_entries",
    metadata,
    Column(
        "log_index",
        BigInteger().with_variant(Integer, "sqlite"),
        primary_key=True,
        autoincrement=False,
    ),
    Column("time", BigInteger, nullable=False),
    Column("stage", String, nullable=False),
    Column("request", String, nullable=False),
    Column("tenant", String, nullable=False),
    Column("actor_key", String),
    Column("service", String),
    Column("action", String, nullable=False),
    Column("decision", String),
    Column("outcome", String),
)
Index("audit_entries_request", entries.c.request)
Index("audit_entries_time", entries.c.time)
Index("audit_entries_actor", entries.c.actor_key, entries.c.log_index)
Index("audit_entries_action", entries.c.action, entries.c.log_index)
# What is looked for and rare; what is allowed and succeeds is neither.
_DENIED = entries.c.decision == "deny"
_FAILED = entries.c.outcome.in_(["denied", "failed", "aborted"])
Index("audit_entries_denied", entries.c.log_index, sqlite_where=_DENIED, postgresql_where=_DENIED)
Index("audit_entries_failed", entries.c.log_index, sqlite_where=_FAILED, postgresql_where=_FAILED)


def _list_table(name: str, column: str) -> Table:
    return Table(
        name,
        metadata,
        Column(column, String, primary_key=True),
        Column("log_index", BigInteger, primary_key=True, autoincrement=False),
        sqlite_with_rowid=False,
    )


patients = _list_table("audit_patients", "key_id")
labels = _list_table("audit_labels", "label")
rules = _list_table("audit_rules", "rule")
state = Table(
    "audit_index_state",
    metadata,
    Column("format", Integer, primary_key=True, autoincrement=False),
    Column("origin", String, nullable=False),
    Column("first", BigInteger, nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("last_leaf", String, nullable=False),
)

_SQLITE_WORDS = (
    "CREATE VIRTUAL TABLE IF NOT EXISTS audit_words USING fts5(words, content='', detail=none, "
    f"columnsize=0, tokenize=\"unicode61 tokenchars '{WORD_MARKS}'\")"
)
_POSTGRES_TABLE = (
    "CREATE TABLE IF NOT EXISTS audit_words (log_index bigint PRIMARY KEY, words tsvector NOT NULL)"
)
_POSTGRES_WORDS = (
    _POSTGRES_TABLE,
    "CREATE INDEX IF NOT EXISTS audit_words_gin ON audit_words USING gin (words)",
)
# For queries only; each database makes this table in its own way.
_words = Table(
    "audit_words", MetaData(), Column("rowid", BigInteger), Column("log_index", BigInteger)
)
_COLUMNS = {table.name: len(table.c) for table in (entries, patients, labels, rules)}
#: Rows in one SQLite statement: each costs less than in a statement of its own.
_ROWS_AT_ONCE = 64


class Rows:
    """What one batch adds. Lists of tuples in the order of the tables' columns."""

    __slots__ = ("entries", "labels", "patients", "rules", "words")

    def __init__(self) -> None:
        self.entries: list[tuple[Any, ...]] = []
        self.patients: list[tuple[str, int]] = []
        self.labels: list[tuple[str, int]] = []
        self.rules: list[tuple[str, int]] = []
        #: Words of an entry, separated by spaces, in any case.
        self.words: list[tuple[int, str]] = []

    def __len__(self) -> int:
        """How much memory and work the batch is, in rows."""
        return len(self.entries) + len(self.patients) + len(self.labels) + len(self.rules)

    def lists(self) -> Iterator[tuple[str, Sequence[tuple[Any, ...]]]]:
        """Table name and rows. Patients are sorted: their keys are random, and pages are not."""
        yield "audit_entries", self.entries
        yield "audit_patients", sorted(set(self.patients))
        yield "audit_labels", list(dict.fromkeys(self.labels))
        yield "audit_rules", list(dict.fromkeys(self.rules))


class Store:
    """One database that holds an index. Thread-safe; failures are `IndexUnavailableError`."""

    def __init__(self, url: str) -> None:
        self._url = sql.parse_url(url, _TERMS)
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            sql.prepare_file(self._url, _TERMS)
        self.engine = sql.make_engine(self._url, _TERMS)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def create(self) -> None:
        """Make the tables that are missing."""
        with self.translated():
            metadata.create_all(self.engine)
            statements = [_SQLITE_WORDS] if self.is_sqlite else _POSTGRES_WORDS
            with self.engine.begin() as connection:
                for statement in statements:
                    connection.execute(text(statement))

    def discard(self) -> None:
        """Throw the whole index away, damaged or not."""
        if self.is_sqlite:
            self.engine.dispose()
            for suffix in ("", "-wal", "-shm"):
                Path(f"{self._url.database}{suffix}").unlink(missing_ok=True)
            sql.prepare_file(self._url, _TERMS)
            return
        with self.translated(), self.engine.begin() as connection:
            metadata.drop_all(connection)
            connection.execute(text("DROP TABLE IF EXISTS audit_words"))

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn the database's errors into ours. Their text may quote rows, so it is not shown."""
        database_error: type[Exception] = self.engine.dialect.loaded_dbapi.Error
        try:
            yield
        except (SQLAlchemyError, database_error, OSError) as error:
            raise IndexUnavailableError(
                f"The search index failed with {type(error).__name__}. Look at the database of "
                "[audit] index_url, or make the index anew: havengate audit rebuild-index."
            ) from error

    @contextmanager
    def writing(self) -> Iterator[Any]:
        """A cursor in one transaction that no other writer shares; undone if the block raises."""
        with self.translated():
            connection = self.engine.raw_connection()
            try:
                cursor: Any = connection.cursor()
                try:
                    cursor.execute("BEGIN IMMEDIATE" if self.is_sqlite else "BEGIN")
                    if not self.is_sqlite:
                        cursor.execute("LOCK TABLE audit_index_state IN EXCLUSIVE MODE")
                    yield cursor
                    cursor.execute("COMMIT")
                except BaseException:
                    connection.rollback()
                    raise
                finally:
                    cursor.close()
            finally:
                connection.close()

    def empty(self, cursor: Any) -> None:
        """Remove all rows within `writing`; others that use the index see none of it before."""
        for table in metadata.sorted_tables:
            cursor.execute(f"DELETE FROM {table.name}")  # noqa: S608 - our own names
        if self.is_sqlite:
            # How FTS5 without content is emptied (sqlite.org/fts5.html, "delete-all").
            cursor.execute("INSERT INTO audit_words (audit_words) VALUES ('delete-all')")
        else:
            cursor.execute("DELETE FROM audit_words")

    def insert(self, cursor: Any, rows: Rows) -> None:
        """Add a batch within `writing`."""
        if self.is_sqlite:
            for table, values in rows.lists():
                _insert_many(cursor, table, "", _COLUMNS[table], values)
            _insert_many(cursor, "audit_words", "(rowid, words)", 2, rows.words)
            return
        for table, values in rows.lists():
            with cursor.copy(f"COPY {table} FROM STDIN") as copy:
                for row in values:
                    copy.write_row(row)
        with cursor.copy("COPY audit_words FROM STDIN") as copy:
            for index, words in rows.words:
                # The words hold none of the characters that a tsvector's text form would escape.
                lexemes = sorted(set(words.lower().split()))
                copy.write_row((index, " ".join(f"'{lexeme}'" for lexeme in lexemes)))

    def with_words(
        self, query: Select[tuple[int]], words: Sequence[str]
    ) -> tuple[Select[tuple[int]], ColumnElement[int]]:
        """Ask that every one of `words` is a word of the entry, or begins one if it ends in `*`.

        Returns the query, and the column by whose order the database goes through what it finds.
        """
        if self.is_sqlite:
            column = _words.c.rowid
            condition = "audit_words MATCH :words"
            wanted = " AND ".join(_quoted(word, '"', "*") for word in words)
        else:
            column = _words.c.log_index
            condition = "audit_words.words @@ CAST(:words AS tsquery)"
            wanted = " & ".join(_quoted(word, "'", ":*") for word in words)
        matching = text(condition).bindparams(words=wanted)
        joined = query.join(_words, column == entries.c.log_index)
        return joined.where(matching), column


def _quoted(word: str, quote: str, ending: str) -> str:
    """Return a word as both query languages take it: `parse_words` let no quote through."""
    whole = word.removesuffix("*")
    return f"{quote}{whole}{quote}{ending if whole != word else ''}"


def _insert_many(
    cursor: Any, table: str, names: str, columns: int, rows: Sequence[tuple[Any, ...]]
) -> None:
    """Insert into SQLite, many rows with each statement and the rest one by one."""
    row = f"({','.join('?' * columns)})"
    statement = f"INSERT INTO {table} {names} VALUES "  # noqa: S608 - our own names
    whole = len(rows) // _ROWS_AT_ONCE * _ROWS_AT_ONCE
    chunks = (
        list(chain.from_iterable(rows[start : start + _ROWS_AT_ONCE]))
        for start in range(0, whole, _ROWS_AT_ONCE)
    )
    cursor.executemany(statement + ",".join([row] * _ROWS_AT_ONCE), chunks)
    cursor.executemany(statement + row, rows[whole:])
