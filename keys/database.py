"""The database behind the key table: SQLite by default, PostgreSQL by URL.

Here are connection settings, transactions, file modes and the translation of library errors. What
is stored is the business of `keys.table` and the modules beside it.

SQLite: WAL, `synchronous=FULL`, `secure_delete=ON` (an erased key is overwritten, not only
unlinked), file mode 0600. Sources: sqlite.org/pragma.html, sqlite.org/wal.html.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from keys.errors import KeyConfigurationError, KeyTableError
from keys.migrations import migrate

BUSY_TIMEOUT_S = 10
_CONNECT_TIMEOUT_S = 5
_SCRUB_ATTEMPTS = 5


class KeyDatabase:
    """One pool of connections to a migrated database.

    Thread-safe; every failure is a `KeyTableError`.
    """

    def __init__(self, url: str) -> None:
        parsed = _parse_url(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        if self.is_sqlite:
            _prepare_file(parsed)
        self._engine = _make_engine(parsed, is_sqlite=self.is_sqlite)
        self._writer = self._engine.execution_options(havengate_writes=True)
        try:
            with self.writing() as connection:
                migrate(connection)
        except BaseException:
            self.close()
            raise

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
        """A transaction that writes: durable once the block is left, undone if the block raises."""
        with _translated(), self._writer.begin() as connection:
            yield connection

    def scrub(self) -> None:
        """Make SQLite forget what was overwritten: empty the write-ahead log into the database.

        Raises `KeyTableError` while a long reader prevents that. PostgreSQL has no such call: there
        the remains of a row die with the epoch that wrapped it.
        """
        if not self.is_sqlite:
            return
        for _ in range(_SCRUB_ATTEMPTS):
            with _translated(), self._engine.connect() as connection:
                # Outside a transaction, which would itself be the reader that prevents it.
                cursor = connection.connection.cursor()
                try:
                    cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                    (busy, _, _) = cursor.fetchone() or (1, 0, 0)
                finally:
                    cursor.close()
            if not busy:
                return
            time.sleep(0.05)
        raise KeyTableError(
            "expected to empty the write-ahead log of the key table, but another connection keeps "
            "reading an old state; end that reader (a backup, a shell) and repeat the call"
        )


def _parse_url(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise KeyConfigurationError(_url_message()) from error
    if parsed.drivername == "postgresql+psycopg":
        return parsed
    if parsed.drivername == "sqlite" and parsed.database not in {None, "", ":memory:"}:
        return parsed
    raise KeyConfigurationError(_url_message())


def _url_message() -> str:
    # The URL may hold a password: it is not repeated.
    return (
        "expected keys.table_url as sqlite:///path/to/file or "
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
        raise KeyConfigurationError(
            f"expected to create or own the key table file with mode 0600, got {error.strerror}; "
            "check keys.table_url and the owner of its directory"
        ) from error


def _make_engine(url: URL, *, is_sqlite: bool) -> Engine:
    if not is_sqlite:
        return create_engine(
            url,
            hide_parameters=True,
            pool_pre_ping=True,
            connect_args=_postgres_limits(url),
        )
    engine = create_engine(url, hide_parameters=True, connect_args={"timeout": BUSY_TIMEOUT_S})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _postgres_limits(url: URL) -> dict[str, str | int]:
    """Return what keeps a call from waiting for ever on a lock or on a network that is gone."""
    given = url.query.get("options", "")
    options = given if isinstance(given, str) else " ".join(given)
    wait_ms = int(BUSY_TIMEOUT_S * 1000)
    return {
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "tcp_user_timeout": wait_ms,
        "keepalives_idle": BUSY_TIMEOUT_S,
        "keepalives_interval": 1,
        "options": f"{options} -c lock_timeout={wait_ms}".strip(),
    }


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own implicit transactions are off: `_begin_sqlite` says how each begins.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA secure_delete=ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and then writes would fail with "busy" instead of waiting its
    # turn.
    writes = connection.get_execution_options().get("havengate_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:  # the second: where the driver is used bare
        raise KeyTableError(
            f"expected the key table to answer, got {type(error).__name__}; check that its "
            "database runs, has room and may be written, then repeat the call"
        ) from error
