"""The coordinator's database, SQLite or PostgreSQL (`keys.sql`).

What is stored is the business of `federated.ledger` and `federated.study_store`. Writers take turns
over the whole database, so that what one has read stays true until it has written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy import Connection

from federated.errors import LedgerError
from federated.schema import MIGRATIONS
from keys.sql import SqlDatabase, Terms, migrate

#: Any number that no other program on a shared PostgreSQL server locks.
_ADVISORY_LOCK: Final = 0x4847_5354_5544
_TERMS: Final = Terms(
    setting="federated.database_url",
    what="the studies' database",
    wrong=LedgerError,
    failed=LedgerError,
    advice="then repeat the call. Nothing may be dispatched",
    # Writers wait for each other: so many studies at once may ask.
    busy_timeout_s=60,
)


class StudyDatabase(SqlDatabase):
    """One pool of connections to a migrated database.

    Thread-safe; several processes may share the database. Every failure is a `LedgerError`.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url, _TERMS)
        try:
            with self.writing() as connection:
                _migrate(connection)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes, alone: durable once the block is left, undone if it raises."""
        with super().writing() as connection:
            self.take_turns(connection, _ADVISORY_LOCK)
            yield connection


def _migrate(connection: Connection) -> None:
    found, known = migrate(connection, "study_version", MIGRATIONS)
    if found > known:
        raise LedgerError(
            f"expected the studies' database in version {known} or older, got {found}; "
            "run the Havengate release that wrote it, or a newer one"
        )
