"""Bearer tokens that were revoked before they expired, by the SHA-256 of issuer and `jti`."""

from __future__ import annotations

import hashlib
import threading
from typing import Final

from sqlalchemy import delete, insert, select

from gateway.identity.database import DirectoryDatabase
from gateway.identity.schema import revoked_tokens
from keys.ports import Clock

#: Providers may have a leeway of two minutes, in which an expired token still counts.
_BEYOND_S: Final = 3_600.0


class Revocations:
    """The list, kept in memory until anybody changes anything. Thread-safe."""

    def __init__(self, database: DirectoryDatabase, *, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: frozenset[str] = frozenset()
        self._kept_version: int | None = None

    def revoke(self, *, issuer: str, jti: str, until: float) -> None:
        """Refuse a token from now on. `until` is its expiry: it is remembered well beyond that."""
        name = _name(issuer, jti)
        with self._database.writing() as connection:
            connection.execute(
                delete(revoked_tokens).where(
                    (revoked_tokens.c.until < self._clock() - _BEYOND_S)
                    | (revoked_tokens.c.token == name)
                )
            )
            connection.execute(insert(revoked_tokens).values(token=name, until=until))

    def contains(self, *, issuer: str, jti: str) -> bool | None:
        """Whether a token is revoked, from memory; None: something changed, `read` first."""
        version = self._database.version()
        with self._lock:
            if version is None or version != self._kept_version:
                return None
            return _name(issuer, jti) in self._kept

    def read(self, *, issuer: str, jti: str) -> bool:
        """Whether a token is revoked, from the database."""
        version = self._database.version()
        with self._database.reading() as connection:
            found = frozenset(connection.execute(select(revoked_tokens.c.token)).scalars())
        with self._lock:
            self._kept, self._kept_version = found, version
        return _name(issuer, jti) in found


def _name(issuer: str, jti: str) -> str:
    text = f"{issuer}\0{jti}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()
