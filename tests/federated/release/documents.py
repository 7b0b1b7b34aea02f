"""A release's document for tests, from a real trail of approvals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from audit.note import VerifierKey
from federated.ledger_rows import Charge
from federated.model import Answer, Estimate, Interval, NoisePlan, PrivacyCost, Sensitivity
from federated.planning import study_costs
from federated.release.document import make_document
from federated.signed_study import TrustedKeys
from federated.study_log import make_bundle
from tests.federated.studies import NOW, ORIGIN, StudyLog, study
from tests.federated.trails import Trail


@dataclass(frozen=True)
class Round:
    """As `federated.study_run.RoundOutcome`, without the run."""

    query: str
    answer: Answer
    round_id: str = "7-sleep-0"
    people: int = 5068
    nodes: int = 4
    dropped: Mapping[str, str] = field(default_factory=dict)
    cost: PrivacyCost = PrivacyCost(  # noqa: RUF009 - frozen
        epsilon=0.5,
        delta=5e-7,
        noise=NoisePlan(mechanism="discrete_gaussian", scale=1843.25),
        sensitivity=Sensitivity(l1=1024.0, l2=362.04),
    )


def estimate(name: str, value: float, half: float, unit: str = "points") -> Estimate:
    interval = Interval(low=value - half, high=value + half, level=0.95)
    return Estimate(name=name, value=value, interval=interval, unit=unit)


#: The study of `studies`, with noise that costs what it says.
CHANGES = {
    "minimum_cohort = 10": "minimum_cohort = 1000",
    "scale = 12.5": "scale = 9400.0",
    "scale = 14.0": "scale = 9400.0",
    '["mood", "sleep_hours"]': '["mood"]',
    "low = 0.0, high = 10.0": "low = -6.0, high = 6.0",
}
SLEEP = Round(
    query="sleep",
    answer=Answer(
        query="sleep",
        estimates=[
            estimate("PHQ-9 at less than 6 hours", 5.41, 0.42),
            estimate("PHQ-9 at 6 to 7 hours", 3.62, 0.24),
            estimate("PHQ-9 at 7 to 9 hours", 2.71, 0.11),
            estimate("PHQ-9 at 9 hours or more", 3.55, 0.31),
            estimate("share below 6 hours", 0.113, 0.009, unit="share"),
        ],
        cautions=["Hours beyond 3 to 14 were counted as 3 or 14, which can pull means inward."],
    ),
)
CURVE = Round(
    query="mood",
    answer=Answer(
        query="mood",
        estimates=[estimate(f"week {n}", 5 + n / 20, 0.4) for n in range(1, 53)],
    ),
    dropped={"south": "mask"},
)


@dataclass(frozen=True)
class Believed:
    """Whose word counts."""

    trusted: TrustedKeys
    log_keys: tuple[VerifierKey, ...]
    witness_keys: tuple[VerifierKey, ...]


def make(folder: Path, **changes: Any) -> dict[str, Any]:
    return make_believed(folder, **changes)[0]


def make_believed(folder: Path, **changes: Any) -> tuple[dict[str, Any], Believed]:
    log = StudyLog(folder)
    with log.writer() as writer:
        trail = Trail(folder, log=writer)
        one = trail.approve_all(study(CHANGES))
        (step,) = trail.approvals.standing(one.id).record.of("publish")
        with log.publisher(writer) as publisher:
            publisher.publish()
        standing, signed = trail.approvals.standing(one.id), trail.approvals.signed(one.id)
        trail.database.close()
    costs = study_costs(one)
    values = {
        "failures": {},
        "bundle": make_bundle(log.directory, step.log_index),
        "origin": ORIGIN,
        "charged": [Charge(round=f"7-{n}", cost=cost) for n, cost in enumerate(costs.values())],
        "run_id": 7,
        "at": NOW,
        **changes,
    }
    rounds = [
        replace(answer, round_id=f"7-{n}", cost=costs[answer.query])
        for n, answer in enumerate((SLEEP, CURVE))
        if answer.query not in values["failures"]
    ]
    document = make_document(standing, signed, rounds, **values)
    return document, Believed(trail.trusted, log.keys, log.witness_keys)
