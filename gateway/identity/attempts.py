"""Attempts to guess: counted before they are judged, by account, by network and by known device.

NIST SP 800-63B section 5.2.2. An attempt is booked first and given back when it succeeds, so that
many at once cannot be more than the limit. Unknown names are counted like known ones. Subjects
stand as SHA-256: what somebody types as a name may be his password.

Whoever knows a name must not be able to keep its owner out. So passwords for one account are
counted by network, and over all networks up to ten times as many; what comes from a device on which
the account signed in before (`devices`) has attempts of its own, whatever others did. Codes are
short: from unknown devices they are counted over all networks together.
"""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Final, Literal

from sqlalchemy import Connection, delete, func, insert, select

from gateway.identity.database import DirectoryDatabase
from gateway.identity.schema import attempts
from gateway.settings import SessionSettings
from keys.ports import Clock

#: Of so many networks a guesser must have one each, before others he never met must wait, too.
_NETWORKS: Final = 10

Kind = Literal["password", "code"]
type _Limits = list[tuple[str, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An attempt that was booked: what to give back."""

    subject: str
    ids: tuple[str, ...]


class Attempts:
    """Books attempts, in the database: all processes count together. Thread-safe."""

    def __init__(
        self, database: DirectoryDatabase, *, settings: SessionSettings, clock: Clock
    ) -> None:
        self._database = database
        self._settings = settings
        self._clock = clock

    @property
    def window_s(self) -> float:
        """For how long attempts count."""
        return self._settings.attempts_window_s

    def book(
        self, kind: Kind, subject: str, *, address: str | None, device: str | None = None
    ) -> Attempt | None:
        """Book an attempt on `subject` (an account or name); None: too many, do not even look.

        `device` is one known for the account: its attempts come first, then those of everybody.
        """
        now = self._clock()
        ways = [] if device is None else [self._by_device(kind, subject, device)]
        ways.append(self._by_network(kind, subject, address))
        with self._database.writing() as connection:
            self._database.lock(connection)
            since = now - self._settings.attempts_window_s
            connection.execute(delete(attempts).where(attempts.c.at <= since))
            for limits in ways:
                if all(_count(connection, hashed) < limit for hashed, limit in limits):
                    names = tuple(uuid.uuid4().hex for _ in limits)
                    rows = [
                        {"id": name, "subject": hashed, "at": now}
                        for name, (hashed, _) in zip(names, limits, strict=True)
                    ]
                    connection.execute(insert(attempts), rows)
                    return Attempt(subject=limits[0][0], ids=names)
        return None

    def _by_device(self, kind: Kind, subject: str, device: str) -> _Limits:
        return [(f"{_hashed(kind, subject)}:{_hashed('device', device)}", self._settings.attempts)]

    def _by_network(self, kind: Kind, subject: str, address: str | None) -> _Limits:
        on_subject, network = _hashed(kind, subject), _hashed("address", _network(address))
        limits = [(on_subject, self._settings.attempts)]
        if kind == "password":
            limits = [
                (f"{on_subject}:{network}", self._settings.attempts),
                (on_subject, self._settings.attempts * _NETWORKS),
            ]
        if address is not None:
            limits.append((network, self._settings.attempts_per_address))
        return limits

    def succeeded(self, attempt: Attempt) -> None:
        """Forget the attempts of this device or network on this subject, and this one elsewhere."""
        with self._database.writing() as connection:
            connection.execute(
                delete(attempts).where(
                    (attempts.c.subject == attempt.subject) | attempts.c.id.in_(attempt.ids)
                )
            )

    def forget(self, kind: Kind, subject: str) -> None:
        """Let somebody try again at once, as an administrator may."""
        with self._database.writing() as connection:
            mine = attempts.c.subject.startswith(_hashed(kind, subject))
            connection.execute(delete(attempts).where(mine))


def _count(connection: Connection, hashed: str) -> int:
    query = select(func.count()).select_from(attempts).where(attempts.c.subject == hashed)
    return int(connection.execute(query).scalar_one())


def _network(address: str | None) -> str:
    """An address, or the 64 bits of one that its owner cannot choose (RFC 4291 section 2.5.1)."""
    try:
        found = ip_address((address or "").strip("[]").partition("%")[0])
    except ValueError:
        return address or ""
    if isinstance(found, IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ip_network((int(found) >> 64 << 64, 64)))


def _hashed(kind: str, subject: str) -> str:
    text = f"{kind}\0{subject}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()
