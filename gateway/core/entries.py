"""What the log will say of one exchange, gathered while it goes on.

Here the terms of HTTP and of the rules become those of the log (`audit.recorder.Act`, `End`).
Nothing here writes.
"""

from __future__ import annotations

from typing import Literal

from audit.model import Action as LogAction
from audit.model import Assurance as LogAssurance
from audit.recorder import Act, Begun, End, Who
from gateway.core.questions import Question, patient_reference, resource_reference
from gateway.identity.model import Identified
from policies.model import Action, Allowed, Decision, Denied, ServiceKind
from policies.obligations import Obligation

#: More records than this in one answer are counted, not named one by one.
MAX_NAMED = 256

_LOG_ACTIONS: dict[Action, LogAction] = {"count": "search"}
_OBLIGATION_WORDS: dict[str, str] = {
    "Redact": "redact", "Mask": "mask", "Pseudonymise": "pseudonymise", "StepUp": "step_up",
    "LimitRows": "limit_rows", "RedisclosureNotice": "notice",
    "ExcludeFromCounts": "exclude_from_counts", "Review": "review",
}  # fmt: skip


class Trail:
    """The entries of one exchange in the making. `begun` is set once the intent is durable."""

    def __init__(
        self,
        *,
        tenant: str,
        service: str,
        kind: ServiceKind,
        action: Action,
        identified: Identified | None,
        address: str | None,
        now: float,
    ) -> None:
        self.begun: Begun | None = None
        self.action = action
        self.bytes_in: int | None = None
        self.decision: Literal["allow", "deny"] | None = None
        self._tenant = tenant
        self._service = service
        self._kind = kind
        self._identified = identified
        self._who = _who(identified, address, now)
        # Dictionaries keep the order in which names came, each once.
        self._resources: dict[str, None] = {}
        self._patients: dict[str, None] = {}
        self._labels: set[str] = set()
        self._rules: set[str] = set()
        self._obligations: set[str] = set()
        self._consents: set[str] = set()
        self._counts: dict[str, int] = {}
        self._broke_glass = False

    @property
    def knows_who(self) -> bool:
        """Whether somebody is named who has signed in."""
        return self._who.kind != "anonymous"

    @property
    def types(self) -> frozenset[str]:
        """Types of records that were touched."""
        return frozenset(name.partition("/")[0] for name in self._resources)

    def asked(self, question: Question, decision: Decision) -> None:
        """Note a question about the exchange as a whole."""
        self.action = question.action
        self.touched(question)
        self._rules.update(decision.rules)
        if isinstance(decision, Allowed):
            self._oblige(decision.obligations)

    def touched(self, question: Question) -> None:
        """Note what it is about."""
        name = resource_reference(question)
        if name is not None and len(self._resources) < MAX_NAMED:
            self._resources[name] = None
        if question.patient is not None and len(self._patients) < MAX_NAMED:
            self._patients[patient_reference(question.patient)] = None
        self._labels |= question.labels.codes

    def released(self, question: Question, allowed: Allowed) -> None:
        """Note a record that goes out."""
        self.touched(question)
        self._rules.update(allowed.rules)
        self._oblige(allowed.obligations)
        self.count("released")

    def withheld(self, question: Question, denied: Denied) -> None:
        """Note a record that stays: its patient is not named, for nothing about him went out."""
        del question
        self._rules.update(denied.rules)
        self.count("withheld")

    def denied(self, denied: Denied) -> None:
        """Note what refused the exchange as a whole."""
        self.decision = "deny"
        self._rules.update(denied.rules)

    def count(self, name: str, number: int = 1) -> None:
        """Add to a number."""
        self._counts[name] = self._counts.get(name, 0) + number

    def broke_glass(self) -> None:
        """Note that an emergency grant was what allowed."""
        self._broke_glass = True

    def _oblige(self, obligations: tuple[Obligation, ...]) -> None:
        self._obligations.update(_OBLIGATION_WORDS[type(one).__name__] for one in obligations)

    def act(
        self,
        decision: Literal["allow", "deny"],
        *,
        reason: str | None = None,
        counts: dict[str, int] | None = None,
        stream: str | None = None,
    ) -> Act:
        """The intent, as far as is known. `stream` is the request whose content was passing."""
        self.decision = decision
        for name, number in (counts or {}).items():
            self.count(name, number)
        purpose = self._identified.purpose if self._identified else None
        return Act(
            tenant=self._tenant,
            who=self._who,
            action=_LOG_ACTIONS.get(self.action, self.action),  # type: ignore[arg-type]
            service=self._service,
            purpose="BTG" if self._broke_glass else purpose,
            resources=tuple(self._resources),
            patients=tuple(self._patients),
            labels=tuple(sorted(self._labels)),
            decision=decision,
            rules=tuple(sorted(self._rules)),
            obligations=tuple(sorted(self._obligations)),
            break_glass="granted" if self._broke_glass else None,
            reason=reason,
            bytes_in=self.bytes_in,
            counts=dict(self._counts),
            details={"kind": self._kind} | ({} if stream is None else {"stream": stream}),
        )

    def end(
        self,
        outcome: Literal["success", "denied", "failed", "aborted"],
        *,
        status: int,
        reason: str | None = None,
        bytes_out: int | None = None,
        duration_us: int | None = None,
    ) -> End:
        """The outcome, with everything noted since the intent."""
        return End(
            outcome=outcome,
            # The log takes plain integers; `HTTPStatus` is an enumeration.
            status=int(status),
            reason=reason,
            decision="deny" if outcome == "denied" else None,
            resources=tuple(self._resources),
            patients=tuple(self._patients),
            labels=tuple(sorted(self._labels)),
            rules=tuple(sorted(self._rules)),
            obligations=tuple(sorted(self._obligations)),
            bytes_in=self.bytes_in,
            bytes_out=bytes_out,
            duration_us=duration_us,
            counts=dict(self._counts),
            break_glass="granted" if self._broke_glass else None,
        )


def _who(identified: Identified | None, address: str | None, now: float) -> Who:
    if identified is None or identified.principal.kind == "anonymous":
        return Who(kind="anonymous", address=address)
    if identified.principal.kind == "service":
        return Who(kind="service", name=identified.person, role=identified.role, address=address)
    assurance = identified.principal.assurance
    age_s = None
    if assurance.second_factor_at is not None:
        age_s = max(0, int(now - assurance.second_factor_at))
    return Who(
        kind="person",
        person=identified.person,
        role=identified.role,
        address=address,
        assurance=LogAssurance(level=assurance.second_factor, age_s=age_s),
    )
