"""Asks again, while content passes in pieces, whether it still may pass.

A consent can be withdrawn, a relation end, an emergency be closed, a rule change or a session be
ended while an answer of an hour is on its way. So everything that was asked before it began is
asked again every `RECHECK_S` seconds, before the next piece passes: who it is, how he stands to the
patients, and the rules in force now. What cannot be told ends the stream as a denial does.
Before: `gateway.core.exchange`, which ends it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from gateway.core.commands import Failed, Identify
from gateway.core.enforcement import Enforcement, Steps
from gateway.core.messages import RequestHead
from gateway.core.questions import Question
from gateway.errors import UnavailableError
from gateway.identity.model import Identified
from policies.model import Denied
from policies.store import InForce

#: Nothing passes later than this after it was last asked. Facts may be as old again
#: (`gateway.facts.KEPT_S`).
RECHECK_S: Final = 2.0

SESSION_ENDED: Final = "gateway.session_ended"
NO_LONGER_ALLOWED: Final = "gateway.no_longer_allowed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Why a stream must end. `denied` is what the rules say now, if it was they."""

    code: str
    denied: Denied | None = None


@dataclass(slots=True, kw_only=True)
class Recheck:
    """Looks after one stream. `head` is the request as it came, with what was shown to sign in."""

    head: RequestHead
    began: Enforcement
    questions: tuple[Question, ...]
    in_force: Callable[[], InForce]
    clock: Callable[[], float]
    checked: float

    def look(self) -> Steps[Ended | None]:
        """None if it may go on. Asks at most every `RECHECK_S` seconds."""
        now = self.clock()
        # A clock that was set back must not put the next look off.
        if 0 <= now - self.checked < RECHECK_S:
            return None
        self.checked = now
        identified = yield from self._identify(now)
        if isinstance(identified, Ended):
            return identified
        again = self.began.anew(identified, in_force=self.in_force(), now=now)
        try:
            yield from again.know({one.patient for one in self.questions if one.patient})
        except UnavailableError as error:
            return Ended(code=error.code)
        for question in self.questions:
            decision = again.ask(question)
            if isinstance(decision, Denied):
                return Ended(code=decision.failure or NO_LONGER_ALLOWED, denied=decision)
        return None

    def _identify(self, now: float) -> Steps[Identified | Ended]:
        before = self.began.identified
        if before.means == "anonymous":
            return before
        answer = yield Identify(head=self.head, route=self.began.route)
        if isinstance(answer, Failed):
            # It cannot be told whether the session ended, so the log must not say so.
            return Ended(code=answer.code)
        if not isinstance(answer, Identified) or answer.principal.id != before.principal.id:
            return Ended(code=SESSION_ENDED)
        return _with_factor_as_before(answer, now=now, elapsed_s=now - self.began.now)


def _with_factor_as_before(identified: Identified, *, now: float, elapsed_s: float) -> Identified:
    """A second factor that was fresh when the stream began does not end it by growing older."""
    principal = identified.principal
    shown_at = principal.assurance.second_factor_at
    if shown_at is None:
        return identified
    assurance = replace(
        principal.assurance, second_factor_at=min(now, shown_at + max(0.0, elapsed_s))
    )
    return replace(identified, principal=replace(principal, assurance=assurance))
