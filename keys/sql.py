"""How every SQL database is opened: SQLite by default, PostgreSQL by URL.

Here are connection settings, transactions, file modes, migrations and the translation of library
errors. It stands in the lowest package, and knows none of the tables: what is stored, and in which
words a failure is told, is the business of whoever owns the database (`Terms`).

SQLite: WAL, `synchronous=FULL` unless said otherwise, file mode 0600. Sources:
sqlite.org/pragma.html, sqlite.org/wal.html.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

#: How long a statement waits for another writer, in seconds, unless `Terms` say otherwise.
BUSY_TIMEOUT_S: Final = 10
_CONNECT_TIMEOUT_S: Final = 5
_LOOK_AGAIN_S: Final = 0.01
_WRITES: Final = "havengate_writes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is special about one database.

    `setting` is the configuration's name of its URL, `what` its name in a sentence ("the key
    table"), `advice` what a failure's message ends with. `wrong` makes the error of a URL or file
    that cannot be used, `failed` that of a database that does not answer. `pragmas` are set on each
    SQLite connection, after WAL. `busy_timeout_s` is how long a writer waits for another.
    """

    setting: str
    what: str
    wrong: Callable[[str], Exception]
    failed: Callable[[str], Exception]
    advice: str = "then repeat the call"
    busy_timeout_s: float = BUSY_TIMEOUT_S
    pragmas: Mapping[str, str | int] = MappingProxyType({"synchronous": "FULL"})


class SqlDatabase:
    """One pool of connections. Thread-safe; several processes may share the database.

    Every failure is one of the two errors that `Terms` name.
    """

    def __init__(self, url: str, terms: Terms) -> None:
        self._terms = terms
        self._url = parse_url(url, terms)
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            prepare_file(self._url, terms)
        self.engine = make_engine(self._url, terms)
        self._writer = self.engine.execution_options(**{_WRITES: True})

    def close(self) -> None:
        """Close all connections. The database may be opened again."""
        self.engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads."""
        with self.translated(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes: durable once the block is left, undone if the block raises."""
        with self.translated(), self._writer.begin() as connection:
            yield connection

    def take_turns(self, connection: Connection, lock: int) -> None:
        """Let no other process hold `lock` until the transaction ends; SQLite's writers never do.

        `lock` is any number that no other program on a shared PostgreSQL server locks.
        """
        if not self.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": lock})

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn the library's errors into `Terms.failed`. Their text may quote rows: it is left."""
        try:
            yield
        except (SQLAlchemyError, sqlite3.Error) as error:  # the second: the driver used bare
            raise self._terms.failed(
                f"expected {self._terms.what} to answer, got {type(error).__name__}; check that "
                f"its database runs, has room and may be written, {self._terms.advice}"
            ) from error


def migrate(
    connection: Connection, table: str, migrations: Sequence[Sequence[str]]
) -> tuple[int, int]:
    """Run the migrations that are missing, within the caller's transaction, which must be alone.

    `table` keeps the versions that were reached. Returns the version found and the version known:
    where the first is larger nothing was changed, and the caller refuses the database.
    """
    connection.execute(
        text(f"CREATE TABLE IF NOT EXISTS {table} (version BIGINT NOT NULL PRIMARY KEY)")
    )
    newest = text(f"SELECT max(version) FROM {table}")  # noqa: S608 - our own name
    insert = text(f"INSERT INTO {table} (version) VALUES (:v)")  # noqa: S608 - our own name
    found = connection.execute(newest).scalar() or 0
    for version in range(found + 1, len(migrations) + 1):
        for statement in migrations[version - 1]:
            connection.execute(text(statement))
        connection.execute(insert, {"v": version})
    return found, len(migrations)


def parse_url(url: str, terms: Terms) -> URL:
    """Return a URL that can be used, or raise `Terms.wrong`, which does not repeat it."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise terms.wrong(_url_message(terms)) from error
    if parsed.drivername == "postgresql+psycopg":
        return parsed
    if parsed.drivername == "sqlite" and parsed.database not in {None, "", ":memory:"}:
        return parsed
    raise terms.wrong(_url_message(terms))


def prepare_file(url: URL, terms: Terms) -> None:
    """Make SQLite's file with mode 0600, or close it to others. Raises `Terms.wrong`."""
    path = Path(url.database or "")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite gives its -wal and -shm files the mode of the database file.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        path.chmod(0o600)
    except OSError as error:
        raise terms.wrong(
            f"expected to create or own the file of {terms.what} with mode 0600, got "
            f"{error.strerror}; check {terms.setting} and the owner of its directory"
        ) from error


def make_engine(url: URL, terms: Terms) -> Engine:
    """Return a pool whose every connection is set up."""
    if url.get_backend_name() != "sqlite":
        return create_engine(
            url,
            hide_parameters=True,
            pool_pre_ping=True,
            connect_args=_postgres_limits(url, terms),
        )
    engine = create_engine(
        url, hide_parameters=True, connect_args={"timeout": terms.busy_timeout_s}
    )

    def configure(connection: Any, _record: Any) -> None:
        _configure_sqlite(connection, terms)

    event.listen(engine, "connect", configure)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _url_message(terms: Terms) -> str:
    # The URL may hold a password: it is not repeated.
    return (
        f"expected {terms.setting} as sqlite:///path/to/file or "
        "postgresql+psycopg://user@host/database, got something else; correct it in the "
        "configuration file"
    )


def _postgres_limits(url: URL, terms: Terms) -> dict[str, str | int]:
    """Return what keeps a call from waiting for ever on a lock or on a network that is gone."""
    given = url.query.get("options", "")
    options = given if isinstance(given, str) else " ".join(given)
    wait_ms = int(terms.busy_timeout_s * 1000)
    return {
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "tcp_user_timeout": wait_ms,
        "keepalives_idle": BUSY_TIMEOUT_S,
        "keepalives_interval": 1,
        "options": f"{options} -c lock_timeout={wait_ms}".strip(),
    }


def _configure_sqlite(connection: Any, terms: Terms) -> None:
    # The driver's own implicit transactions are off: `_begin_sqlite` says how each begins.
    connection.isolation_level = None
    cursor = connection.cursor()
    _use_wal(cursor, terms.busy_timeout_s)
    for name, value in terms.pragmas.items():
        cursor.execute(f"PRAGMA {name}={value}")
    cursor.close()


def _use_wal(cursor: sqlite3.Cursor, patience_s: float) -> None:
    # To change the mode SQLite wants the file for itself, and where two processes open a new file
    # at once it fails with "busy" at once, without the wait that any other statement would grant.
    until = time.monotonic() + patience_s
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            # The low byte is the primary code (sqlite.org/rescode.html).
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() >= until:
                raise
            time.sleep(_LOOK_AGAIN_S)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and then writes would fail with "busy" instead of waiting its
    # turn.
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
