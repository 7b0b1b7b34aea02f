"""The database behind the directory, SQLite or PostgreSQL (`keys.sql`).

Here is `version`, by which a cache learns that anybody changed anything. Source:
sqlite.org/pragma.html#pragma_data_version.
"""

from __future__ import annotations

import sqlite3
import threading
from typing import Final

from sqlalchemy import Connection

from gateway.errors import DirectoryError, GatewayConfigurationError
from gateway.identity.schema import ADVISORY_LOCK, migrate
from keys.sql import BUSY_TIMEOUT_S, SqlDatabase, Terms

_TERMS: Final = Terms(
    setting="gateway.identity.database_url",
    what="the directory of accounts",
    wrong=GatewayConfigurationError,
    failed=DirectoryError,
    pragmas={"synchronous": "FULL", "secure_delete": "ON"},
)


class DirectoryDatabase(SqlDatabase):
    """One pool of connections to a migrated database.

    Thread-safe; every failure is a `DirectoryError`, of the configuration a
    `GatewayConfigurationError`.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url, _TERMS)
        self._watch: sqlite3.Connection | None = None
        self._watch_lock = threading.Lock()
        try:
            with self.writing() as connection:
                self.lock(connection)
                migrate(connection)
            if self.is_sqlite:
                self._watch = self._open_watch()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all connections. The database may be opened again."""
        super().close()
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def lock(self, connection: Connection) -> None:
        """Let no other process do the same until the transaction ends; SQLite writers always so."""
        self.take_turns(connection, ADVISORY_LOCK)

    def version(self) -> int | None:
        """A number that differs once anything was committed by any process; None: always ask.

        Costs microseconds: the connection that asks never writes, so every commit is another's.
        """
        with self._watch_lock:
            if self._watch is None:
                return None
            with self.translated():
                (found,) = self._watch.execute("PRAGMA data_version").fetchone()
                return int(found)

    def _open_watch(self) -> sqlite3.Connection:
        with self.translated():
            return sqlite3.connect(
                self._url.database or "",
                isolation_level=None,
                timeout=BUSY_TIMEOUT_S,
                check_same_thread=False,
            )
