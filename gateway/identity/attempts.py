"""Attempts to guess: counted before they are judged, by account and by address.

NIST SP 800-63B section 5.2.2. An attempt is booked first and given back when it succeeds, so that
many at once cannot be more than the limit. Unknown names are counted like known ones. Subjects
stand as SHA-256: what somebody types as a name may be his password.
"""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass

from sqlalchemy import delete, func, insert, select

from gateway.identity.database import DirectoryDatabase
from gateway.identity.schema import attempts
from gateway.settings import SessionSettings
from keys.ports import Clock


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

    def book(self, kind: str, subject: str, *, address: str | None) -> Attempt | None:
        """Book an attempt on `subject` (an account or name); None: too many, do not even look."""
        now = self._clock()
        on_subject = _hashed(kind, subject)
        limits = [(on_subject, self._settings.attempts)]
        if address is not None:
            limits.append((_hashed("address", address), self._settings.attempts_per_address))
        booked = [(uuid.uuid4().hex, hashed) for hashed, _ in limits]
        with self._database.writing() as connection:
            self._database.lock(connection)
            since = now - self._settings.attempts_window_s
            connection.execute(delete(attempts).where(attempts.c.at <= since))
            for hashed, limit in limits:
                count = connection.execute(
                    select(func.count()).select_from(attempts).where(attempts.c.subject == hashed)
                ).scalar_one()
                if count >= limit:
                    return None
            rows = [{"id": name, "subject": hashed, "at": now} for name, hashed in booked]
            connection.execute(insert(attempts), rows)
        return Attempt(subject=on_subject, ids=tuple(name for name, _ in booked))

    def succeeded(self, attempt: Attempt) -> None:
        """Forget the attempts on this subject, and this one of the address."""
        with self._database.writing() as connection:
            connection.execute(
                delete(attempts).where(
                    (attempts.c.subject == attempt.subject) | attempts.c.id.in_(attempt.ids)
                )
            )

    def forget(self, kind: str, subject: str) -> None:
        """Let somebody try again at once, as an administrator may."""
        with self._database.writing() as connection:
            hashed = _hashed(kind, subject)
            connection.execute(delete(attempts).where(attempts.c.subject == hashed))


def _hashed(kind: str, subject: str) -> str:
    text = f"{kind}\0{subject}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()
