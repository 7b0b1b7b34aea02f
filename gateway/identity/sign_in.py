"""Signing in: password, then second factor, then a session. Without the pages around it.

For a name without an account everything is done that is done for one with: an attempt is counted,
an intent is recorded, a hash is computed. Recording goes on beside the hash, which takes longer, so
that sealing a known person's name cannot be told by the clock.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Literal

from audit.recorder import Act
from gateway.identity.accounts import normal_login
from gateway.identity.directory import Directory
from gateway.identity.passwords import Passwords
from gateway.identity.recording import SERVICE, IdentityLog
from gateway.identity.records import Account, Session
from gateway.identity.totp import SecondFactors

Refused = Literal["wrong", "locked", "too_many"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedIn:
    """A session and its token, which goes into the cookie and nowhere else."""

    token: str = field(repr=False)
    session: Session


@dataclass(frozen=True, slots=True, kw_only=True)
class SignIn:
    """The steps. Raises `AuditError`, `KeysError` or `DirectoryError`: then nobody is signed in."""

    directory: Directory
    passwords: Passwords
    second_factors: SecondFactors
    log: IdentityLog

    async def password(
        self, login: str, password: str, address: str | None, device: str = ""
    ) -> Account | Refused:
        """Compare a password; who has shown it may show his second factor."""
        # One and the same name is looked for and counted: a padded one is not another.
        name = normal_login(login)
        account = await asyncio.to_thread(self.directory.accounts.find, name)
        attempt = await asyncio.to_thread(
            self.directory.book,
            "password",
            name,
            account="" if account is None else account.id,
            address=address,
            device=device,
        )
        act = self._act("login", account, address, step="password")
        if attempt is None:
            async with self.log.act(act) as told:
                told.denied("too_many_attempts")
            return "too_many"
        kept = None if account is None else account.password_hash
        begun, same = await asyncio.gather(
            self.log.recorder.intent(act), self.passwords.matches(kept, password)
        )
        async with self.log.ending(begun) as told:
            if account is None or not same:
                told.denied("wrong_password")
                return "wrong"
            if account.locked:
                told.denied("locked")
                return "locked"
            await asyncio.to_thread(self.directory.attempts.succeeded, attempt)
            return await self._rehashed(account, password)

    async def enrol(
        self, account: Account, code: str, address: str | None, device: str = "", *, visit: str
    ) -> SignedIn | Refused:
        """Take the second factor that this visit was shown into use, and begin a session."""
        return await self._by_code(account, code, address, device, visit=visit)

    async def code(
        self, account: Account, code: str, address: str | None, device: str = ""
    ) -> SignedIn | Refused:
        """Compare a code, and begin a session."""
        return await self._by_code(account, code, address, device, visit=None)

    async def step_up(
        self,
        account: Account,
        session: Session,
        code: str,
        address: str | None,
        device: str = "",
    ) -> SignedIn | Refused:
        """Compare a code, and give the session a new token and a fresh second factor."""
        act = self._act("stepup", account, address, step="code", session=session)
        renewed: SignedIn | None = None
        try:
            async with self.log.act(act) as told:
                refused = await self._verify(account, code, address, device, visit=None)
                if refused is not None:
                    told.denied(_REASONS[refused])
                    return refused
                token, new = await asyncio.to_thread(
                    self.directory.sessions.renew, session, second_factor="totp"
                )
                renewed = SignedIn(token=token, session=new)
        except BaseException:
            await self._undo(renewed)
            raise
        return renewed

    async def _by_code(
        self, account: Account, code: str, address: str | None, device: str, *, visit: str | None
    ) -> SignedIn | Refused:
        act = self._act("login", account, address, step="code" if visit is None else "enrol")
        begun: SignedIn | None = None
        try:
            async with self.log.act(act) as told:
                refused = await self._verify(account, code, address, device, visit=visit)
                if refused is not None:
                    told.denied(_REASONS[refused])
                    return refused
                token, session = await asyncio.to_thread(
                    self.directory.sessions.begin, account.id, second_factor="totp"
                )
                begun = SignedIn(token=token, session=session)
        except BaseException:
            await self._undo(begun)
            raise
        return begun

    async def _verify(
        self, account: Account, code: str, address: str | None, device: str, *, visit: str | None
    ) -> Refused | None:
        attempt = await asyncio.to_thread(
            self.directory.book,
            "code",
            account.id,
            account=account.id,
            address=address,
            device=device,
        )
        if attempt is None:
            return "too_many"
        if visit is None:
            right = await self.second_factors.check(account, code)
        else:
            right = await self.second_factors.confirm(account, code, visit=visit)
        if not right:
            return "wrong"
        await asyncio.to_thread(self.directory.attempts.succeeded, attempt)
        return None

    async def _undo(self, made: SignedIn | None) -> None:
        """End a session whose beginning could not be recorded: its token was given to nobody."""
        if made is not None:
            await asyncio.to_thread(self.directory.sessions.end, made.session.id)

    async def _rehashed(self, account: Account, password: str) -> Account:
        if not self.passwords.outdated(account.password_hash):
            return account
        new = await self.passwords.hash(password)
        accounts = self.directory.accounts
        await asyncio.to_thread(accounts.rehash, account.id, old=account.password_hash, new=new)
        return await asyncio.to_thread(accounts.get, account.id) or account

    def _act(
        self,
        action: Literal["login", "stepup"],
        account: Account | None,
        address: str | None,
        *,
        step: str,
        session: Session | None = None,
    ) -> Act:
        return Act(
            tenant=self.log.tenant,
            who=self.log.who(account, address, session),
            action=action,
            service=SERVICE,
            details={"step": step},
        )


_REASONS: dict[Refused, str] = {
    "wrong": "wrong_code", "locked": "locked", "too_many": "too_many_attempts",
}  # fmt: skip
