"""What somebody who is signed in does with his own account: sign out, password, emergency grants.

Each is written to the log before and after. What ends access is done even if the log cannot be
written; what opens access is then not done, or undone.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from audit.errors import AuditError
from audit.model import Action
from audit.recorder import Act
from gateway.errors import AccountError
from gateway.identity.directory import Directory
from gateway.identity.grants import MAX_OPEN, ROLES_THAT_MAY, check_grant
from gateway.identity.passwords import Passwords, check_new_password
from gateway.identity.recording import SERVICE, IdentityLog
from gateway.identity.records import Account, Grant, SessionView
from gateway.identity.sign_in import SignedIn
from gateway.identity.texts import text
from keys.errors import KeysError

#: What the form offers, in minutes.
DURATIONS = ("30", "60", "120", "240")
#: A grant that ends so little earlier is as good as the one asked for.
_SAME_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnAccount:
    """The acts. Raises `AuditError`, `KeysError` or `DirectoryError`."""

    directory: Directory
    passwords: Passwords
    log: IdentityLog

    async def sign_out(self, view: SessionView, address: str | None) -> None:
        """End this session, and the open emergency grants."""

        def end() -> None:
            self.directory.sessions.end(view.session.id)
            for grant in view.grants:
                self.directory.grants.end(view.account.id, grant.id)

        await self._ending(self._act("logout", view, address, what="sign_out"), end)

    async def end_others(self, view: SessionView, address: str | None) -> None:
        """End all other sessions of this account."""

        def end() -> None:
            self.directory.sessions.end_all(view.account.id, but=view.session.id)

        await self._ending(self._act("logout", view, address, what="end_others"), end)

    async def change_password(
        self,
        view: SessionView,
        *,
        current: str,
        new: str,
        address: str | None,
        device: str = "",
    ) -> SignedIn | Literal["wrong", "too_many", "not_acceptable"]:
        """Set a new password. All sessions end; this browser gets a new one."""
        account = view.account
        async with self.log.act(self._act("admin", view, address, what="password")) as told:
            attempt = await asyncio.to_thread(
                self.directory.book,
                "password",
                account.login,
                account=account.id,
                address=address,
                device=device,
            )
            if attempt is None:
                told.denied("too_many_attempts")
                return "too_many"
            if not await self.passwords.matches(account.password_hash, current):
                told.denied("wrong_password")
                return "wrong"
            await asyncio.to_thread(self.directory.attempts.succeeded, attempt)
            if not _is_acceptable(new, account):
                told.denied("password_not_acceptable")
                return "not_acceptable"
            hashed = await self.passwords.hash(new)
            token, session = await asyncio.to_thread(
                self.directory.sessions.change_password,
                view.session,
                before=account.password_hash,
                password_hash=hashed,
            )
            return SignedIn(token=token, session=session)

    async def open_break_glass(
        self,
        view: SessionView,
        fields: Mapping[str, str],
        address: str | None,
        *,
        prove: Callable[[], Awaitable[str | None]],
    ) -> dict[str, str]:
        """Open a record; or return what is wrong with the form, by field.

        `prove` says what is wrong with the second factor that is shown now, if anything. It is
        asked when nothing else is wrong, because a code counts once.
        """
        patient = fields.get("patient", "").strip().removeprefix("Patient/")
        reason, minutes = fields.get("reason", "").strip(), fields.get("minutes", "")
        if not may_break_glass(view.account):
            return {"patient": text("glass.not_for_you")}
        errors = _errors(patient, reason, minutes)
        if errors:
            return errors
        opened = await asyncio.to_thread(self.directory.grants.of, view.account.id)
        until = self.log.clock() + int(minutes) * 60
        if any(one.patient == patient and one.ends_at >= until - _SAME_S for one in opened):
            # A form sent twice.
            return {}
        if len(opened) >= MAX_OPEN:
            return {"patient": text("glass.too_many")}
        unproven = await prove()
        if unproven is not None:
            return {"code": unproven}
        name = uuid.uuid4().hex
        act = self._act(
            "admin",
            view,
            address,
            what="break_glass_open",
            grant=name,
            purpose="BTG",
            patients=(f"Patient/{patient}",),
            break_glass="granted",
            counts={"minutes": int(minutes)},
        )
        grant: Grant | None = None
        try:
            async with self.log.act(act):
                grant = await asyncio.to_thread(
                    self.directory.grants.open,
                    view.account.id,
                    patient=patient,
                    reason=reason,
                    duration_s=int(minutes) * 60,
                    name=name,
                )
        except BaseException:
            if grant is not None:
                await asyncio.to_thread(self.directory.grants.end, view.account.id, grant.id)
            raise
        return {}

    async def end_break_glass(self, view: SessionView, grant: str, address: str | None) -> None:
        """Close a record that this account has open."""
        found = await asyncio.to_thread(self.directory.grants.of, view.account.id)
        named = next((one for one in found if one.id == grant), None)
        if named is None:
            return
        act = self._act(
            "admin",
            view,
            address,
            what="break_glass_end",
            grant=named.id,
            purpose="BTG",
            patients=(f"Patient/{named.patient}",),
        )

        def end() -> None:
            self.directory.grants.end(view.account.id, named.id)

        await self._ending(act, end)

    async def _ending(self, act: Act, end: Callable[[], None]) -> None:
        """End access, in the log if it can be written: nobody may have to stay signed in.

        When it happened stands in the directory in any case.
        """
        try:
            async with self.log.act(act):
                await asyncio.to_thread(end)
        except (AuditError, KeysError):
            await asyncio.to_thread(end)

    def _act(
        self,
        action: Action,
        view: SessionView,
        address: str | None,
        *,
        what: str,
        grant: str | None = None,
        **more: Any,
    ) -> Act:
        return Act(
            tenant=self.log.tenant,
            who=self.log.who(view.account, address, view.session),
            action=action,
            service=SERVICE,
            details={"what": what} | ({} if grant is None else {"grant": grant}),
            **more,
        )


def may_break_glass(account: Account) -> bool:
    """Whether the rules let a person of these roles open any record in an emergency."""
    return not ROLES_THAT_MAY.isdisjoint(account.roles)


def _is_acceptable(password: str, account: Account) -> bool:
    try:
        check_new_password(password, login=account.login)
    except AccountError:
        return False
    return True


def _errors(patient: str, reason: str, minutes: str) -> dict[str, str]:
    """What is wrong with the words of a grant, by field."""
    good = {"patient": "1", "reason": "long enough", "duration_s": 60}
    errors = {}
    if not _holds(good | {"patient": patient}):
        errors["patient"] = text("glass.patient_wrong")
    if not _holds(good | {"reason": reason}):
        errors["reason"] = text("glass.reason_wrong")
    if minutes not in DURATIONS:
        errors["minutes"] = text("glass.duration_wrong")
    return errors


def _holds(words: Mapping[str, Any]) -> bool:
    try:
        check_grant(**words)
    except AccountError:
        return False
    return True
