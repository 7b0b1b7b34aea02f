"""The coordinator's database: SQLite by default, PostgreSQL by URL.

Here are connections, transactions, file modes, migrations and the translation of library errors.
What is stored is the business of `federated.ledger` and `federated.study_store`. Writers take turns
over the whole database, so that what one has read stays true until it has written.

SQLite: WAL, `synchronous=FULL`, file mode 0600 (sqlite.org/pragma.html, sqlite.org/wal.html).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from federated.errors import LedgerError
from federated.schema import MIGRATIONS

#: Writers wait for each other: so many studies at once may ask.
BUSY_TIMEOUT_S = 60
_CONNECT_TIMEOUT_S = 5
#: Any number that no other program on a shared PostgreSQL server locks.
_ADVISORY_LOCK = 0x4847_5354_5544
_WRITES = "havengate_writes"


class StudyDatabase:
    """One pool of connections to a migrated database.

    Thread-safe; several processes may share the database. Every failure is a `LedgerError`.
    """

    def __init__(self, url: str) -> None:
        parsed = _parse_url(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        if self.is_sqlite:
            _prepare_file(parsed)
        self._engine = _make_engine(parsed, is_sqlite=self.is_sqlite)
        self._writer = self._engine.execution_options(**{_WRITES: True})
        try:
            with self.writing() as connection:
                _migrate(connection)
        except BaseException:
            self.close()
            raise

    @property
    def engine(self) -> Engine:
        """The pool itself, for tests that watch what is sent to the database."""
        return self._engine

    def close(self) -> None:
        """Close all connections. The database may be opened again."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads."""
        with _translated(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes, alone: durable once the block is left, undone if it raises."""
        with _translated(), self._writer.begin() as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": _ADVISORY_LOCK})
            yield connection


def _migrate(connection: Connection) -> None:
    """Bring the database to this code's version. Raises `LedgerError` if it is newer."""
    connection.execute(
        text("CREATE TABLE IF NOT EXISTS study_version (version BIGINT NOT NULL PRIMARY KEY)")
    )
    found = connection.execute(text("SELECT max(version) FROM study_version")).scalar() or 0
    if found > len(MIGRATIONS):
        raise LedgerError(
            f"expected the studies' database in version {len(MIGRATIONS)} or older, got {found}; "
            "run the Havengate release that wrote it, or a newer one"
        )
    for version in range(found + 1, len(MIGRATIONS) + 1):
        for statement in MIGRATIONS[version - 1]:
            connection.execute(text(statement))
        connection.execute(text("INSERT INTO study_version (version) VALUES (:v)"), {"v": version})


def _parse_url(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise LedgerError(_url_message()) from error
    if parsed.drivername == "postgresql+psycopg":
        return parsed
    if parsed.drivername == "sqlite" and parsed.database not in {None, "", ":memory:"}:
        return parsed
    raise LedgerError(_url_message())


def _url_message() -> str:
    # The URL may hold a password: it is not repeated.
    return (
        "expected federated.database_url as sqlite:///path/to/file or "
        "postgresql+psycopg://user@host/database, got something else; correct it in the "
        "configuration file"
    )


def _prepare_file(url: URL) -> None:
    path = Path(url.database or "")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite gives its -wal and -shm files the mode of the database file.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        path.chmod(0o600)
    except OSError as error:
        raise LedgerError(
            f"expected to create or own the studies' database with mode 0600, got "
            f"{error.strerror}; check federated.database_url and the owner of its directory"
        ) from error


def _make_engine(url: URL, *, is_sqlite: bool) -> Engine:
    if not is_sqlite:
        return create_engine(
            url,
            hide_parameters=True,
            pool_pre_ping=True,
            connect_args={
                "connect_timeout": _CONNECT_TIMEOUT_S,
                "options": f"-c lock_timeout={BUSY_TIMEOUT_S * 1000}",
            },
        )
    engine = create_engine(url, hide_parameters=True, connect_args={"timeout": BUSY_TIMEOUT_S})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own implicit transactions are off: `_begin_sqlite` says how each begins.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and then writes would fail with "busy" instead of waiting its
    # turn.
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:  # the second: where the driver is used bare
        raise LedgerError(
            f"expected the studies' database to answer, got {type(error).__name__}; check that it "
            "runs, has room and may be written, then repeat the call. Nothing may be dispatched"
        ) from error
