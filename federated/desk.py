"""Where a person's step in a study is decided and recorded: by the policies, in the audit log.

Lives here: the question to the policies, the entry before and after, the row of the step. What a
step means, and what must hold for it, stands in `federated.approvals`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Final, cast

from audit.model import Action, Assurance
from audit.recorder import Act, Begun, End, Recorder, Who
from federated.errors import ApprovalError, FederatedError
from federated.manifest import Study
from federated.study_log import HASH_DETAIL, ID_DETAIL
from federated.study_store import Step, StepKind, person_tag
from policies.model import (
    Allowed,
    Context,
    Decision,
    Principal,
    Purpose,
    Request,
    Resource,
    StudyAction,
    StudyStanding,
)

_ACTIONS: Final[Mapping[StepKind, Action]] = {
    "propose": "study.propose",
    "approve": "study.approve",
    "refuse": "study.refuse",
    "publish": "study.publish",
    "run": "study.run",
    "release": "study.release",
    "withdraw": "study.withdraw",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """Decides and records. `clock` is Unix time in seconds; the rest as `Approvals` says."""

    recorder: Recorder
    decide: Callable[[Request], Decision]
    tenant: str
    clock: Callable[[], float]
    name_of: Callable[[Principal], str]

    def authorised(
        self,
        kind: StepKind,
        study: Study,
        principal: Principal,
        facts: StudyStanding,
        *,
        role: str,
        site: str = "",
        answer: str = "",
        kept: str = "",
    ) -> Begun:
        """Ask the policies, and record what is about to happen. Raises `ApprovalError`."""
        now = self.clock()
        request = Request(
            principal=principal,
            action=_question(kind),
            resource=Resource(
                service="studies", kind="generic", type="Study", id=study.id, study=facts
            ),
            # A code that the policies do not know is one that they refuse.
            context=Context(purpose=cast("Purpose", study.purpose), now=now),
        )
        decision = self.decide(request)
        allowed = isinstance(decision, Allowed)
        act = replace(
            self.act(
                kind,
                study,
                _who(self.name_of(principal), principal, role, now),
                site=site,
                answer=answer,
                kept=kept,
            ),
            decision="allow" if allowed else "deny",
            rules=decision.rules,
        )
        begun = self.recorder.intent(act)
        if principal.kind != "user" or principal.scopes is not None:
            self.recorder.outcome(begun, End(outcome="denied", reason="federated.approval"))
            raise ApprovalError("Only a person who is signed in himself decides about studies.")
        if not isinstance(decision, Allowed):
            reason = decision.failure or decision.remedy.kind
            self.recorder.outcome(begun, End(outcome="denied", reason=reason))
            raise ApprovalError(f"{decision.reason} {decision.remedy.text}")
        return begun

    def act(
        self,
        kind: StepKind,
        study: Study,
        who: Who,
        *,
        site: str = "",
        answer: str = "",
        kept: str = "",
    ) -> Act:
        """What the log says of a step; `kept` is the hash of the answer before costs were added."""
        details = {HASH_DETAIL: study.study_hash, ID_DETAIL: study.id}
        if site:
            details["site"] = site
        if answer:
            details["answer"] = answer
        if kept:
            details["kept"] = kept
        return Act(
            tenant=self.tenant,
            who=who,
            action=_ACTIONS[kind],
            service="studies",
            purpose=study.purpose,
            details=details,
        )

    def step(
        self,
        kind: StepKind,
        study: Study,
        principal: Principal,
        begun: Begun,
        *,
        role: str,
        site: str = "",
    ) -> Step:
        """The row of a step that a person takes."""
        return Step(
            kind=kind,
            role=role,
            site=site,
            person=person_tag(study.study_hash, principal.id),
            at_us=int(self.clock() * 1_000_000),
            log_index=begun.index,
        )

    def ending(self, begun: Begun) -> AbstractContextManager[None]:
        """Record how the step ends: as a failure if it raises, else as a success."""
        return _Ending(self.recorder, begun, success=True)

    def failing(self, begun: Begun) -> AbstractContextManager[None]:
        """Record that the step failed if it raises; else it goes on."""
        return _Ending(self.recorder, begun, success=False)


class _Ending:
    """Records how a step ended: a failure always, a success if it ends here."""

    def __init__(self, recorder: Recorder, begun: Begun, *, success: bool) -> None:
        self._recorder = recorder
        self._begun = begun
        self._success = success

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None:
            if self._success:
                self._recorder.outcome(self._begun, End(outcome="success"))
        elif isinstance(error, FederatedError):
            self._recorder.outcome(self._begun, End(outcome="denied", reason=error.code))


def _question(kind: StepKind) -> StudyAction:
    questions: dict[StepKind, StudyAction] = {
        "propose": "study-propose",
        "approve": "study-approve",
        "refuse": "study-approve",
        "run": "study-run",
        "release": "study-release",
        "withdraw": "study-withdraw",
    }
    return questions[kind]


def _who(name: str, principal: Principal, role: str, now: float) -> Who:
    shown = principal.assurance
    at = shown.second_factor_at
    age_s = None if at is None or at > now else int(now - at)
    return Who(
        kind="person",
        person=name,
        role=role,
        assurance=Assurance(level=shown.second_factor, age_s=age_s),
    )
