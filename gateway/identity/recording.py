"""What sign-in and the other own pages write to the log: the intent first, then what came of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from audit.model import Assurance
from audit.recorder import Act, Begun, End, Who
from gateway.identity.records import Account, Session
from keys.ports import Clock

SERVICE = "havengate"


class ActRecorder(Protocol):
    """`audit.recorder.AsyncRecorder`, as far as it is needed here."""

    async def intent(self, act: Act, *, request: str | None = None) -> Begun:
        """Record what is about to happen."""
        ...

    async def outcome(self, begun: Begun, end: End) -> int:
        """Record what came of it."""
        ...


@dataclass(slots=True)
class Told:
    """How an act turned out; success unless told otherwise."""

    outcome: Literal["success", "denied", "failed"] = "success"
    reason: str | None = None

    def denied(self, reason: str) -> None:
        """Note a refusal. `reason` is a code."""
        self.outcome, self.reason = "denied", reason


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityLog:
    """Writes acts of persons on the own pages. Raises an `AuditError` or `KeysError`."""

    recorder: ActRecorder
    tenant: str
    clock: Clock

    @asynccontextmanager
    async def act(self, act: Act) -> AsyncIterator[Told]:
        """The intent is durable when the block begins; the outcome when it has been left.

        An error in the block is recorded as failed. If the outcome cannot be recorded this raises:
        whatever was done in the block must then be undone by the caller.
        """
        begun = await self.recorder.intent(act)
        async with self.ending(begun) as told:
            yield told

    @asynccontextmanager
    async def ending(self, begun: Begun) -> AsyncIterator[Told]:
        """As `act`, for an intent that was recorded already."""
        told = Told()
        try:
            yield told
        except BaseException:
            await self.recorder.outcome(begun, End(outcome="failed"))
            raise
        await self.recorder.outcome(begun, End(outcome=told.outcome, reason=told.reason))

    def who(self, account: Account | None, address: str | None, session: Session | None) -> Who:
        """The actor. Somebody whose name has no account is nobody known."""
        if account is None:
            return Who(kind="anonymous", address=address)
        assurance = None
        if session is not None:
            age_s = max(0, int(self.clock() - session.second_factor_at))
            assurance = Assurance(level=session.second_factor, age_s=age_s)
        return Who(
            kind="person",
            person=account.person,
            role=account.role,
            address=address,
            assurance=assurance,
        )
