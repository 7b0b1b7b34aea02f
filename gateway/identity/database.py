"""The database behind the directory: SQLite by default, PostgreSQL by URL.

Here are connection settings, transactions, file modes, the translation of library errors, and
`version`, by which a cache learns that anybody changed anything. SQLite: WAL, `synchronous=FULL`,
file mode 0600. Sources: sqlite.org/pragma.html#pragma_data_version, sqlite.org/wal.html.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from gateway.errors import DirectoryError, GatewayConfigurationError
from gateway.identity.schema import ADVISORY_LOCK, migrate

BUSY_TIMEOUT_S = 10
_CONNECT_TIMEOUT_S = 5


class DirectoryDatabase:
    """One pool of connections to a migrated database.

    Thread-safe; every failure is a `DirectoryError`.
    """

    def __init__(self, url: str) -> None:
        parsed = _parse_url(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        if self.is_sqlite:
            _prepare_file(parsed)
        self._engine = _make_engine(parsed, is_sqlite=self.is_sqlite)
        self._writer = self._engine.execution_options(havengate_writes=True)
        self._watch: sqlite3.Connection | None = None
        self._watch_lock = threading.Lock()
        try:
            with self.writing() as connection:
                self.lock(connection)
                migrate(connection)
            if self.is_sqlite:
                self._watch = _open_watch(parsed)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all connections. The database may be opened again."""
        self._engine.dispose()
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads."""
        with _translated(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes: durable once the block is left, undone if the block raises."""
        with _translated(), self._writer.begin() as connection:
            yield connection

    def lock(self, connection: Connection) -> None:
        """Let no other process do the same until the transaction ends; SQLite writers always so."""
        if not self.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": ADVISORY_LOCK})

    def version(self) -> int | None:
        """A number that differs once anything was committed by any process; None: always ask.

        Costs microseconds: the connection that asks never writes, so every commit is another's.
        """
        with self._watch_lock:
            if self._watch is None:
                return None
            with _translated():
                (found,) = self._watch.execute("PRAGMA data_version").fetchone()
                return int(found)


def _parse_url(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise GatewayConfigurationError(_url_message()) from error
    if parsed.drivername == "postgresql+psycopg":
        return parsed
    if parsed.drivername == "sqlite" and parsed.database not in {None, "", ":memory:"}:
        return parsed
    raise GatewayConfigurationError(_url_message())


def _url_message() -> str:
    # The URL may hold a password: it is not repeated.
    return (
        "expected gateway.identity.database_url as sqlite:///path/to/file or "
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
        raise GatewayConfigurationError(
            f"expected to create or own the directory's file with mode 0600, got {error.strerror}; "
            "check gateway.identity.database_url and the owner of its folder"
        ) from error


def _make_engine(url: URL, *, is_sqlite: bool) -> Engine:
    if not is_sqlite:
        return create_engine(
            url,
            hide_parameters=True,
            pool_pre_ping=True,
            connect_args={
                "connect_timeout": _CONNECT_TIMEOUT_S,
                "tcp_user_timeout": BUSY_TIMEOUT_S * 1000,
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
    cursor.execute("PRAGMA secure_delete=ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and then writes would fail with "busy" instead of waiting.
    writes = connection.get_execution_options().get("havengate_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _open_watch(url: URL) -> sqlite3.Connection:
    with _translated():
        return sqlite3.connect(
            url.database or "",
            isolation_level=None,
            timeout=BUSY_TIMEOUT_S,
            check_same_thread=False,
        )


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise DirectoryError(
            f"expected the directory of accounts to answer, got {type(error).__name__}; check that "
            "its database runs, has room and may be written, then repeat the call"
        ) from error
