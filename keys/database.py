"""The database behind the key table, SQLite or PostgreSQL (`keys.sql`).

What is stored is the business of `keys.table` and the modules beside it. SQLite:
`secure_delete=ON`, so that an erased key is overwritten, not only unlinked.
"""

from __future__ import annotations

import time
from typing import Final

from keys.errors import KeyConfigurationError, KeyTableError
from keys.migrations import migrate
from keys.sql import SqlDatabase, Terms

_SCRUB_ATTEMPTS: Final = 5
#: How it is opened.
TERMS: Final = Terms(
    setting="keys.table_url",
    what="the key table",
    wrong=KeyConfigurationError,
    failed=KeyTableError,
    pragmas={"synchronous": "FULL", "secure_delete": "ON"},
)


class KeyDatabase(SqlDatabase):
    """One pool of connections to a migrated database.

    Thread-safe; every failure is a `KeyTableError`, of the configuration a `KeyConfigurationError`.
    """

    def __init__(self, url: str, terms: Terms = TERMS) -> None:
        super().__init__(url, terms)
        try:
            with self.writing() as connection:
                migrate(connection)
        except BaseException:
            self.close()
            raise

    def scrub(self) -> None:
        """Make SQLite forget what was overwritten: empty the write-ahead log into the database.

        Raises `KeyTableError` while a long reader prevents that. PostgreSQL has no such call: there
        the remains of a row die with the epoch that wrapped it.
        """
        if not self.is_sqlite:
            return
        for _ in range(_SCRUB_ATTEMPTS):
            with self.translated(), self.engine.connect() as connection:
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
