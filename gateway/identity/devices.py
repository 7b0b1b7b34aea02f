"""Browsers in which somebody signed in before: they keep a chance while others guess.

A device is known for the accounts that signed in with it, by a random cookie whose SHA-256 stands
here (OWASP, Slow Down Online Guessing Attacks with Device Cookies). Knowing one signs nobody in: it
only has attempts counted apart (`attempts`). A reset or locked account has no known devices.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Final

from sqlalchemy import Connection, delete, insert, select

from gateway.identity.database import DirectoryDatabase
from gateway.identity.schema import devices
from keys.ports import Clock

DEVICE_COOKIE: Final = "__Host-havengate-device"
KEPT_S: Final = 180 * 86_400
_TOKEN_BYTES: Final = 32
_MAX_CHARACTERS: Final = 64
#: For one account; the one not used for longest is forgotten first.
_MAX_KNOWN: Final = 20


class Devices:
    """Remembers and recognises devices. Thread-safe."""

    def __init__(self, database: DirectoryDatabase, *, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def known(self, token: str, account: str) -> str | None:
        """The name of the device if this account signed in with it, else None.

        For an account that does not exist (any other text) the same work is done.
        """
        name = _hashed(token)
        with self._database.reading() as connection:
            row = connection.execute(
                select(devices.c.account)
                .where(devices.c.device == name, devices.c.account == account)
                .where(devices.c.seen_at > self._clock() - KEPT_S)
            ).first()
        return None if row is None else name

    def remember(self, account: str, token: str) -> str:
        """Note that this account signed in; returns the token to keep in that browser.

        It is a new one unless we made the one shown: what others planted is never believed.
        """
        now = self._clock()
        with self._database.writing() as connection:
            connection.execute(delete(devices).where(devices.c.seen_at <= now - KEPT_S))
            if not self._is_ours(connection, token):
                token = secrets.token_urlsafe(_TOKEN_BYTES)
            name, mine = _hashed(token), devices.c.account == account
            connection.execute(delete(devices).where(mine, devices.c.device == name))
            connection.execute(insert(devices).values(device=name, account=account, seen_at=now))
            newest = select(devices.c.device).where(mine).order_by(devices.c.seen_at.desc())
            kept = connection.execute(newest.limit(_MAX_KNOWN)).scalars().all()
            connection.execute(delete(devices).where(mine, devices.c.device.not_in(kept)))
        return token

    @staticmethod
    def _is_ours(connection: Connection, token: str) -> bool:
        if not 0 < len(token) <= _MAX_CHARACTERS:
            return False
        found = select(devices.c.device).where(devices.c.device == _hashed(token))
        return connection.execute(found).first() is not None


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
