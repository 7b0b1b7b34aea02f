"""Accounts, sessions and what belongs to them: the parts that share one database.

`Directory.open` gives all of it. Every method blocks on the database and is to be run in a thread,
but for `Sessions.kept` and `Revocations.contains`, which answer from memory as long as nothing was
changed by anybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from gateway.identity.accounts import Accounts
from gateway.identity.attempts import Attempt, Attempts, Kind
from gateway.identity.database import DirectoryDatabase
from gateway.identity.devices import Devices
from gateway.identity.grants import Grants
from gateway.identity.revocations import Revocations
from gateway.identity.session_store import Sessions
from gateway.settings import SessionSettings
from keys.ports import Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """The parts. Thread-safe; raises `DirectoryError` whenever the database fails."""

    database: DirectoryDatabase
    accounts: Accounts
    sessions: Sessions
    attempts: Attempts
    devices: Devices
    grants: Grants
    revocations: Revocations

    @classmethod
    def open(cls, url: str, *, settings: SessionSettings, clock: Clock) -> Self:
        """Open, and bring to the newest version.

        Raises `GatewayConfigurationError` for a URL, file or version that is not acceptable.
        """
        database = DirectoryDatabase(url)
        emergencies = Grants(database, clock=clock)
        return cls(
            database=database,
            accounts=Accounts(database, clock=clock),
            sessions=Sessions(database, settings=settings, clock=clock, emergencies=emergencies),
            attempts=Attempts(database, settings=settings, clock=clock),
            devices=Devices(database, clock=clock),
            grants=emergencies,
            revocations=Revocations(database, clock=clock),
        )

    def book(
        self, kind: Kind, subject: str, *, account: str, address: str | None, device: str
    ) -> Attempt | None:
        """Book an attempt, apart from others' if the device is known for this account's id."""
        known = self.devices.known(device, account)
        return self.attempts.book(kind, subject, address=address, device=known)

    def close(self) -> None:
        """Close all connections."""
        self.database.close()
