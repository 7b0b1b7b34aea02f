"""The form of a release's document, strictly: every field, its type, and what no field may hold.

Lives here: reading. What must follow from what was signed is compared in `federated.release.check`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from federated.errors import ManifestError

MAX_TEXT: Final = 4096


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Closed to fields that it does not know."""


class Cost(_Part, frozen=True, kw_only=True):
    """What a round cost each person."""

    epsilon: float
    delta: float
    closeness: float
    mechanism: str
    scale: float
    l1: float
    l2: float


class Charged(_Part, frozen=True, kw_only=True):
    """One round in the ledger."""

    round: str
    cost: Cost


class Privacy(_Part, frozen=True, kw_only=True):
    """What the study cost in all, and what was approved."""

    unit: str
    adjacency: str
    epsilon: float
    delta: float
    approved_epsilon: float
    approved_delta: float
    charged: list[Charged]


class Estimated(_Part, frozen=True, kw_only=True):
    """One number with its interval."""

    name: str
    value: float
    low: float
    high: float
    level: float
    unit: str


class Answered(_Part, frozen=True, kw_only=True):
    """One question's answer."""

    query: str
    round: str
    ask: dict[str, Any]
    people: int
    nodes: int
    dropped: int
    estimates: list[Estimated]
    cautions: list[str]
    cost: Cost


class Audited(_Part, frozen=True, kw_only=True):
    """What guessing canaries proved."""

    lower_bound: float
    confidence: float
    canaries: int
    guesses: int
    correct: int


class Noise(_Part, frozen=True, kw_only=True):
    """How much noise was in the canaries' places, as a share of the planned variance."""

    share: float
    short: list[int]
    false_alarm: float
    passed: bool


class Trained(_Part, frozen=True, kw_only=True):
    """One training's model."""

    query: str
    round: str
    ask: dict[str, Any]
    people: int
    nodes: int
    asked: int
    summed: int
    weights: str
    cost: Cost
    audit: Audited | None
    noise: Noise | None


class Alarm(_Part, frozen=True, kw_only=True):
    """What an audit found against a model."""

    query: str
    finding: str


class Approved(_Part, frozen=True, kw_only=True):
    """One step of the paper trail."""

    step: Literal["propose", "approve", "publish"]
    role: str
    site: str
    key: str
    at: int
    log_index: int


class Evidence(_Part, frozen=True, kw_only=True):
    """What proves the rest."""

    signed_study: str
    log_origin: str
    log_proof: str


class Run(_Part, frozen=True, kw_only=True):
    """Which run, and when."""

    id: str
    at: int


class Form(_Part, frozen=True, kw_only=True):
    """The whole document. `study` and `trust` are compared as they are."""

    format: str
    alarms: list[Alarm]
    study: dict[str, Any]
    privacy: Privacy
    trust: dict[str, Any]
    answers: list[Answered]
    models: list[Trained]
    failures: dict[str, str]
    approvals: list[Approved]
    evidence: Evidence
    run: Run

    def parts(self) -> list[Answered | Trained]:
        """What the run gave: answers and models."""
        return [*self.answers, *self.models]


def parse_form(document: Mapping[str, Any]) -> Form:
    """Read it. Raises `ManifestError` for a field that is missing, unknown, or no such value."""
    try:
        found = msgspec.convert(document, Form)
    except msgspec.ValidationError as error:
        raise ManifestError(f"The document is malformed: {error}.") from error
    _verify_lists(found)
    for one in found.answers:
        _verify_answer(one)
    for model in found.models:
        _verify_model(model)
    texts = [*found.failures.values(), *(text for one in found.answers for text in one.cautions)]
    if not all(text and text.isprintable() and len(text) <= MAX_TEXT for text in texts):
        raise ManifestError("A failure or caution is not one line of printable text.")
    return found


def _verify_lists(found: Form) -> None:
    for what, names in (
        ("questions", [one.query for one in found.parts()]),
        ("rounds", [one.round for one in found.parts()]),
        ("charged rounds", [one.round for one in found.privacy.charged]),
        ("keys", [one.key for one in found.approvals]),
    ):
        if len(set(names)) != len(names):
            raise ManifestError(f"The document names one of its {what} twice.")
    _verify_rising("steps", [one.at for one in found.approvals] + [found.run.at])
    indices = [one.log_index for one in found.approvals]
    if len(set(indices)) != len(indices):
        raise ManifestError("Two steps of the document are one entry of the log.")
    _verify_rising("entries", indices)


def _verify_rising(what: str, numbers: Sequence[int]) -> None:
    if any(later < earlier for earlier, later in zip([0, *numbers], numbers, strict=False)):
        raise ManifestError(f"The document's {what} are not in the order of time.")


def _verify_model(one: Trained) -> None:
    if one.nodes < 1 or not 1 <= one.summed <= one.asked:
        raise ManifestError(f"The model {one.query} counts nodes or rounds that cannot be.")
    audit, noise = one.audit, one.noise
    if (audit is None) != (noise is None):
        raise ManifestError(f"The model {one.query} was audited in half.")
    if audit is not None and not (
        math.isfinite(audit.lower_bound)
        and audit.lower_bound >= 0
        and 0 < audit.confidence < 1
        and 0 <= audit.correct <= audit.guesses <= audit.canaries
    ):
        raise ManifestError(f"The audit of the model {one.query} counts what cannot be.")
    if noise is not None and not (
        math.isfinite(noise.share)
        and noise.share >= 0
        and 0 < noise.false_alarm < 1
        and all(0 <= number < one.summed for number in noise.short)
        and noise.short == sorted(set(noise.short))
        and not (noise.passed and noise.short)
    ):
        raise ManifestError(f"The noise of the model {one.query} is none.")


def _verify_answer(one: Answered) -> None:
    names = [estimate.name for estimate in one.estimates]
    if not names or len(set(names)) != len(names):
        raise ManifestError(f"The answer {one.query} has no estimates, or one twice.")
    for estimate in one.estimates:
        numbers = (estimate.value, estimate.low, estimate.high, estimate.level)
        if not all(map(math.isfinite, numbers)):
            raise ManifestError(f"The answer {one.query} holds what is no number.")
        if not (estimate.low <= estimate.high and 0 < estimate.level < 1):
            raise ManifestError(f"The answer {one.query} has an interval that is none.")
    if len({estimate.level for estimate in one.estimates}) != 1:
        raise ManifestError(f"The answer {one.query} has intervals of different levels.")
    if one.nodes < 1 or one.dropped < 0:
        raise ManifestError(f"The answer {one.query} counts nodes that cannot be.")
