"""Runs changed rules over decisions that were recorded, and lists which would have been others.

Before: recorded decisions from wherever they are kept (`RecordedDecision`; the program that knows
the audit trail wires it in). After: a report for people. Nothing is changed anywhere.

A record seldom holds all that was known then. So each request is also decided by the rules of
today: where these do not come to the recorded answer, the record says too little, or the rules have
changed since, and what new rules would say proves nothing. Such records are counted, not judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from policies.engine import Engine
from policies.model import Allowed, Decision, Request


class RecordedDecision(Protocol):
    """One past decision. `request` is `None` if the record does not hold enough to ask again."""

    @property
    def index(self) -> int:
        """Where it stands in the log."""
        ...

    @property
    def allowed(self) -> bool:
        """What was decided."""
        ...

    @property
    def request(self) -> Request | None:
        """What was asked, as far as it was recorded."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A past decision that would be another one under the changed rules."""

    index: int
    kind: Literal["now_denied", "now_allowed", "other_obligations"]
    before: Decision
    after: Decision


@dataclass(slots=True, kw_only=True)
class Tally:
    """How many records were seen, and how many could be judged."""

    seen: int = 0
    same: int = 0
    changed: int = 0
    incomplete: int = 0
    not_reproduced: int = 0


@dataclass(slots=True, kw_only=True)
class Replay:
    """Compares two engines over records, one at a time: memory does not grow with the trail."""

    current: Engine
    changed: Engine
    tally: Tally = field(default_factory=Tally)

    def run(self, records: Iterable[RecordedDecision]) -> Iterator[Changed]:
        """Give every decision that would be another one; `tally` counts along."""
        for record in records:
            self.tally.seen += 1
            if record.request is None:
                self.tally.incomplete += 1
                continue
            before = self.current.decide(record.request)
            if isinstance(before, Allowed) is not record.allowed:
                self.tally.not_reproduced += 1
                continue
            after = self.changed.decide(record.request)
            kind = _difference(before, after)
            if kind is None:
                self.tally.same += 1
                continue
            self.tally.changed += 1
            yield Changed(index=record.index, kind=kind, before=before, after=after)


def _difference(
    before: Decision, after: Decision
) -> Literal["now_denied", "now_allowed", "other_obligations"] | None:
    match before, after:
        case Allowed(), Allowed():
            return None if before.obligations == after.obligations else "other_obligations"
        case Allowed(), _:
            return "now_denied"
        case _, Allowed():
            return "now_allowed"
        case _:
            return None
