"""Bearer tokens that were revoked before they expired: single ones, and all of a subject.

A token is known by the SHA-256 of issuer and `jti`, or, if it has none, of the part that its
signature covers: that part alone cannot be written differently without a new signature (the text of
a signature can). All tokens of a subject are revoked by the time at which they were issued, so that
what the provider issues later counts again.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import delete, insert, select

from gateway.identity.database import DirectoryDatabase
from gateway.identity.schema import revoked_subjects, revoked_tokens
from keys.ports import Clock

#: Providers may have a leeway of two minutes, in which an expired token still counts.
_BEYOND_S: Final = 3_600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocable:
    """What a token can be revoked by. `issued_at` is Unix time in seconds, at the earliest."""

    token: str = field(repr=False)
    subject: str | None = field(repr=False)
    issued_at: float


@dataclass(frozen=True, slots=True)
class _Known:
    tokens: frozenset[str] = frozenset()
    #: With the time until which tokens were issued that are not good any more.
    subjects: dict[str, float] = field(default_factory=dict)

    def contains(self, one: Revocable) -> bool:
        before = None if one.subject is None else self.subjects.get(one.subject)
        return one.token in self.tokens or (before is not None and one.issued_at <= before)


class Revocations:
    """The list, kept in memory until anybody changes anything. Thread-safe."""

    def __init__(self, database: DirectoryDatabase, *, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._lock = threading.Lock()
        self._kept = _Known()
        self._kept_version: int | None = None

    def revoke(self, token: str, *, until: float) -> None:
        """Refuse a token from now on, by its digest.

        `until` is its expiry: it is remembered well beyond that.
        """
        with self._database.writing() as connection:
            connection.execute(
                delete(revoked_tokens).where(
                    (revoked_tokens.c.until < self._clock() - _BEYOND_S)
                    | (revoked_tokens.c.token == token)
                )
            )
            connection.execute(insert(revoked_tokens).values(token=token, until=until))

    def revoke_subject(self, subject: str, *, until: float) -> None:
        """Refuse all tokens of a subject, by its digest, that were issued until now.

        `until` is when the last of them expires at the latest.
        """
        now = self._clock()
        with self._database.writing() as connection:
            before = connection.execute(
                select(revoked_subjects).where(revoked_subjects.c.subject == subject)
            ).first()
            if before is not None:
                # What is revoked stays so, also by a clock that was set back.
                now, until = max(now, before.issued_before), max(until, before.until)
            connection.execute(
                delete(revoked_subjects).where(
                    (revoked_subjects.c.until < self._clock() - _BEYOND_S)
                    | (revoked_subjects.c.subject == subject)
                )
            )
            connection.execute(
                insert(revoked_subjects).values(subject=subject, issued_before=now, until=until)
            )

    def contains(self, one: Revocable) -> bool | None:
        """Whether a token is revoked, from memory; None: something changed, `read` first."""
        version = self._database.version()
        with self._lock:
            if version is None or version != self._kept_version:
                return None
            return self._kept.contains(one)

    def read(self, one: Revocable) -> bool:
        """Whether a token is revoked, from the database."""
        version = self._database.version()
        with self._database.reading() as connection:
            tokens = frozenset(connection.execute(select(revoked_tokens.c.token)).scalars())
            rows = connection.execute(select(revoked_subjects)).all()
        known = _Known(tokens, {row.subject: row.issued_before for row in rows})
        with self._lock:
            self._kept, self._kept_version = known, version
        return known.contains(one)


def token_with_id(issuer: str, jti: str) -> str:
    """The digest of a token that has a `jti`."""
    return _digest(issuer, jti)


def token_without_id(issuer: str, token: str) -> str:
    """The digest of a compact token that has none: of all but its signature."""
    return _digest(issuer, "", token.rpartition(".")[0])


def subject_of(issuer: str, subject: str) -> str:
    """The digest of a subject, or of a program that has none."""
    return _digest(issuer, "", "", subject)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
