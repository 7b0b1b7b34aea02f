"""Sessions of browsers: made at sign-in, read at every request, ended at once everywhere.

A token is known to the browser alone; here stands its SHA-256 (the token has 256 random bits, so no
slow hash is needed). What was read is kept in memory until anybody, in any process, commits
anything (`DirectoryDatabase.version`): an ended session is refused by the very next request.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import uuid
from dataclasses import replace
from typing import Any, Final, Literal

from sqlalchemy import Connection, Row, delete, insert, select, update

from gateway.errors import AccountError
from gateway.identity.accounts import account_of
from gateway.identity.database import DirectoryDatabase
from gateway.identity.grants import Grants
from gateway.identity.records import Session, SessionView
from gateway.identity.schema import accounts, grants, sessions
from gateway.settings import SessionSettings
from keys.ports import Clock
from policies.model import SecondFactor

MAX_KEPT: Final = 10_000
TOKEN_BYTES: Final = 32
#: Use of a session is written at most this often, so that a page with many parts costs one write.
_NOTE_EVERY_S: Final = 60.0
#: For so long an ended session stays to be looked at.
_KEEP_ENDED_S: Final = 30 * 86_400.0


def token_hash(token: str) -> str:
    """What stands for a token in the database."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


class Sessions:
    """Makes, reads and ends sessions. Thread-safe."""

    def __init__(
        self,
        database: DirectoryDatabase,
        *,
        settings: SessionSettings,
        clock: Clock,
        emergencies: Grants,
    ) -> None:
        self._database = database
        self._emergencies = emergencies
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: dict[str, SessionView] = {}
        self._kept_version: int | None = None

    # --- Reading ----------------------------------------------------------------------------------

    def kept(self, hashed: str) -> SessionView | None:
        """What is in memory about a token, if nothing was changed since. Does not block."""
        version = self._database.version()
        with self._lock:
            if version is None or version != self._kept_version:
                self._kept.clear()
                self._kept_version = version
                return None
            return self._kept.get(hashed)

    def load(self, hashed: str) -> SessionView | None:
        """What the database says about a token; None if it knows none such."""
        # Asked before the reading: what is committed in between makes the next look find a change.
        version = self._database.version()
        view = self._read(hashed)
        if view is None or not all(one.reason for one in view.grants):
            # A reason that could not be read because keys were away may be read the next time.
            return view
        with self._lock:
            if version is not None and version == self._kept_version:
                if len(self._kept) >= MAX_KEPT:
                    self._kept.clear()
                self._kept[hashed] = view
        return view

    def _read(self, hashed: str) -> SessionView | None:
        now = self._clock()
        with self._database.reading() as connection:
            row = connection.execute(
                select(sessions).where(sessions.c.token_hash == hashed)
            ).first()
            if row is None:
                return None
            owner = connection.execute(select(accounts).where(accounts.c.id == row.account)).first()
            if owner is None:
                return None
            found = connection.execute(
                select(grants).where(grants.c.account == row.account, grants.c.ends_at > now)
            ).all()
        return SessionView(
            session=_session_of(row),
            account=account_of(owner),
            grants=tuple(self._emergencies.of_row(one) for one in found),
        )

    def state(self, view: SessionView) -> Literal["valid", "revoked", "expired"]:
        """`valid`, or why not: `revoked` or `expired`. Pure but for the clock."""
        now, session = self._clock(), view.session
        if session.ended_at is not None or view.account.locked:
            return "revoked"
        if view.account.must_set_second_factor or session.second_factor == "none":
            return "revoked"
        idle = now - session.used_at > self._settings.idle_s
        if idle or now - session.began_at > self._settings.lifetime_s:
            return "expired"
        return "valid"

    def due(self, view: SessionView) -> bool:
        """Whether the use of a session should be noted."""
        every_s = min(_NOTE_EVERY_S, self._settings.idle_s / 4)
        return self._clock() - view.session.used_at >= every_s

    def of(self, account: str) -> list[Session]:
        """The open sessions of an account, the latest first."""
        with self._database.reading() as connection:
            rows = connection.execute(
                select(sessions)
                .where(sessions.c.account == account, sessions.c.ended_at.is_(None))
                .where(sessions.c.used_at > self._clock() - self._settings.idle_s)
                .where(sessions.c.began_at > self._clock() - self._settings.lifetime_s)
                .order_by(sessions.c.used_at.desc())
            ).all()
        return [_session_of(row) for row in rows]

    # --- Changing ---------------------------------------------------------------------------------

    def begin(self, account: str, *, second_factor: SecondFactor) -> tuple[str, Session]:
        """A new session, after password and second factor. Returns its token, once."""
        now = self._clock()
        token, session = _new(account, now, second_factor=second_factor, began_at=now)
        with self._database.writing() as connection:
            self._verify_may_sign_in(connection, account)
            connection.execute(delete(sessions).where(sessions.c.ended_at < now - _KEEP_ENDED_S))
            connection.execute(delete(sessions).where(sessions.c.began_at < now - _KEEP_ENDED_S))
            connection.execute(insert(sessions).values(**_values(token, session)))
        return token, session

    def renew(self, old: Session, *, second_factor: SecondFactor) -> tuple[str, Session]:
        """The same session under another token and id, with its second factor shown now.

        Raises `AccountError` if it was ended meanwhile: what was revoked does not come back.
        """
        now = self._clock()
        token, session = _new(old.account, now, second_factor=second_factor, began_at=old.began_at)
        with self._database.writing() as connection:
            self._replace(connection, old, token, session)
        return token, session

    def change_password(
        self, old: Session, *, before: str, password_hash: str
    ) -> tuple[str, Session]:
        """Set a new password, end all sessions of the account, and go on under a new token.

        All of it or nothing. Raises `AccountError` if the session was ended, or the password
        changed, meanwhile.
        """
        now = self._clock()
        token, made = _new(old.account, now, second_factor=old.second_factor, began_at=old.began_at)
        session = replace(made, second_factor_at=old.second_factor_at)
        with self._database.writing() as connection:
            self._replace(connection, old, token, session)
            done = connection.execute(
                update(accounts)
                .where(accounts.c.id == old.account, accounts.c.password_hash == before)
                .values(password_hash=password_hash)
            )
            if done.rowcount != 1:
                raise AccountError("expected the password that was shown, got another; try again")
            connection.execute(
                update(sessions)
                .where(sessions.c.account == old.account, sessions.c.ended_at.is_(None))
                .where(sessions.c.id != session.id)
                .values(ended_at=now)
            )
        return token, session

    def _replace(self, connection: Connection, old: Session, token: str, session: Session) -> None:
        self._verify_may_sign_in(connection, old.account)
        done = connection.execute(
            update(sessions)
            .where(sessions.c.id == old.id, sessions.c.ended_at.is_(None))
            .values(ended_at=session.used_at)
        )
        if done.rowcount != 1:
            raise AccountError("expected an open session, got an ended one; sign in again")
        connection.execute(insert(sessions).values(**_values(token, session)))

    def note_use(self, session: Session) -> None:
        """Write down that a session is in use."""
        with self._database.writing() as connection:
            connection.execute(
                update(sessions)
                .where(sessions.c.id == session.id, sessions.c.ended_at.is_(None))
                .values(used_at=self._clock())
            )

    def end(self, session: str) -> None:
        """End one session; if it has ended, nothing."""
        with self._database.writing() as connection:
            connection.execute(
                update(sessions)
                .where(sessions.c.id == session, sessions.c.ended_at.is_(None))
                .values(ended_at=self._clock())
            )

    def end_all(self, account: str, *, but: str | None = None) -> int:
        """End all sessions of an account, maybe but one; returns how many."""
        with self._database.writing() as connection:
            done = connection.execute(
                update(sessions)
                .where(sessions.c.account == account, sessions.c.ended_at.is_(None))
                .where(sessions.c.id != (but or ""))
                .values(ended_at=self._clock())
            )
            return int(done.rowcount)

    @staticmethod
    def _verify_may_sign_in(connection: Connection, account: str) -> None:
        row = connection.execute(select(accounts).where(accounts.c.id == account)).first()
        if row is None or row.locked or row.must_set_second_factor:
            raise AccountError("expected an account that may sign in, got one that may not")


def _new(
    account: str, now: float, *, second_factor: SecondFactor, began_at: float
) -> tuple[str, Session]:
    session = Session(
        id=uuid.uuid4().hex,
        account=account,
        began_at=began_at,
        used_at=now,
        second_factor=second_factor,
        second_factor_at=now,
    )
    return secrets.token_urlsafe(TOKEN_BYTES), session


def _values(token: str, session: Session) -> dict[str, Any]:
    return {
        "token_hash": token_hash(token),
        "id": session.id,
        "account": session.account,
        "began_at": session.began_at,
        "used_at": session.used_at,
        "second_factor": session.second_factor,
        "second_factor_at": session.second_factor_at,
        "ended_at": None,
    }


def _session_of(row: Row[Any]) -> Session:
    return Session(
        id=row.id,
        account=row.account,
        began_at=row.began_at,
        used_at=row.used_at,
        second_factor=row.second_factor,
        second_factor_at=row.second_factor_at,
        ended_at=row.ended_at,
    )
