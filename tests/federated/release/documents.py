"""A release's document for tests, from a real trail of approvals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from audit.note import VerifierKey
from federated.draft import parse_draft
from federated.learning.one_run_bound import guesses_for, lower_bound
from federated.learning.privacy_audit import FALSE_ALARM, AuditResult, NoiseCheck
from federated.ledger_rows import Charge
from federated.manifest import Study
from federated.model import Answer, Estimate, Interval, NoisePlan, PrivacyCost, Sensitivity
from federated.planning import plan_study, study_costs
from federated.release.document import make_document
from federated.signed_study import TrustedKeys
from federated.study_log import make_bundle
from federated.training_run import TrainedOutcome
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


def make_believed(
    folder: Path,
    *,
    of: Study | None = None,
    answers: Sequence[Round] = (SLEEP, CURVE),
    models: Sequence[TrainedOutcome] = (),
    **changes: Any,
) -> tuple[dict[str, Any], Believed]:
    log = StudyLog(folder)
    with log.writer() as writer:
        trail = Trail(folder, log=writer)
        one = trail.approve_all(of or study(CHANGES))
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
    places = {query.name: n for n, query in enumerate(one.queries)}
    rounds = [
        replace(answer, round_id=f"7-{places[answer.query]}", cost=costs[answer.query])
        for answer in answers
        if answer.query not in values["failures"]
    ]
    trained = [
        replace(model, cost=costs[model.query])
        for model in models
        if model.query not in values["failures"]
    ]
    document = make_document(standing, signed, rounds, models=trained, **values)
    return document, Believed(trail.trusted, log.keys, log.witness_keys)


# With a model

TRAINING = """
id = "low-mood"
title = "Low mood after short nights"
question = "Does sleep tell low mood?"
valid_from = 1799990000
valid_until = 1800990000
minimum_cohort = 100
sites = ["north", "south"]

[aggregation]
threshold = 3

[[queries]]
epsilon = 1.0
delta = 1e-6
ask = { kind = "mean", name = "sleep", column = "sleep_hours" }

[[queries]]
epsilon = 2.0
delta = 1e-6
[queries.ask]
kind = "train"
name = "mood"
features = [
    { column = "sleep_hours", low = 4.0, high = 10.0, indicator = true },
    { column = "steps", low = 0.0, high = 20000.0, lag = 1, within = true },
]
label = { column = "mood", below = 0.0 }
work = { epochs = 4, rate = 2.0 }
rounds = 6
held_out = 0.3
canaries = 200
strategy = { kind = "fedavgm", rate = 0.5 }

[[queries]]
epsilon = 1.0
delta = 1e-6
[queries.ask]
kind = "evaluate"
name = "how-good"
of = "mood"
bins = 4
subgroups = [{ column = "sex", edges = [-0.5, 0.5, 1.5] }]
"""
JUDGED = Round(
    query="how-good",
    answer=Answer(
        query="how-good",
        estimates=[
            estimate("AUC", 0.78, 0.03, unit=""),
            estimate("predicted minus observed", 0.01, 0.02, unit=""),
            estimate("Brier score", 0.17, 0.01, unit=""),
            estimate("observed rate", 0.31, 0.02, unit=""),
            *(
                estimate(f"observed rate at scores {at:.2f} to {at + 0.1:.2f}", 0.9 * at, 0.04, "")
                for at in (0.1, 0.3, 0.5, 0.7)
            ),
            estimate("AUC, sex -0.5 to 0.5", 0.76, 0.05, unit=""),
            estimate("predicted minus observed, sex -0.5 to 0.5", 0.02, 0.04, unit=""),
            estimate("AUC, sex 0.5 to 1.5", 0.79, 0.05, unit=""),
            estimate("predicted minus observed, sex 0.5 to 1.5", -0.01, 0.04, unit=""),
        ],
        cautions=["It holds for people like those who were asked, if they were not trained on."],
    ),
    people=900,
)
#: Two features, an indicator, the bias.
WEIGHTS = (-1.5, 0.25, -0.5, 0.125)


def training_study(changes: Mapping[str, str] | None = None) -> Study:
    """A statistic, a training and its evaluation, with noise that costs what it says."""
    text = TRAINING
    for old, new in (changes or {}).items():
        assert old in text, old
        text = text.replace(old, new)
    return plan_study(
        parse_draft(text.encode()),
        people=1000,
        level=0.95,
        roster="ab" * 32,
        code_hash="cd" * 32,
        nodes=4,
    ).study


def audited(cost: PrivacyCost, *, right: float = 0.7, canaries: int = 200) -> AuditResult:
    """An audit that guessed this share right."""
    guesses = guesses_for(canaries, epsilon=cost.epsilon, delta=cost.delta)
    correct = int(right * guesses)
    bound = lower_bound(canaries=canaries, guesses=guesses, correct=correct, delta=cost.delta)
    return AuditResult(
        claimed_epsilon=cost.epsilon,
        delta=cost.delta,
        lower_bound=bound,
        confidence=0.95,
        canaries=canaries,
        guesses=guesses,
        correct=correct,
    )


def model(of: Study, **changes: Any) -> TrainedOutcome:
    """A model of the study's training `mood`, as a run gives it."""
    cost = study_costs(of)["mood"]
    values = {
        "query": "mood",
        "round_id": "7-1",
        "weights": np.array(WEIGHTS),
        "asked": 6,
        "summed": 5,
        "announced": 6,
        "people": 940,
        "nodes": 4,
        "cost": cost,
        "audit": audited(cost),
        "noise": NoiseCheck(
            share=1.01, by_round=(1.0,) * 5, short=(), false_alarm=FALSE_ALARM, passed=True
        ),
        **changes,
    }
    return TrainedOutcome(**values)


def make_trained(
    folder: Path,
    of: Study | None = None,
    *,
    with_model: Mapping[str, Any] | None = None,
    **changes: Any,
) -> tuple[dict[str, Any], Believed]:
    """A release with a model; `with_model` changes what the run gave of it."""
    one = of or training_study()
    return make_believed(
        folder,
        of=one,
        answers=(SLEEP, JUDGED),
        models=(model(one, **(with_model or {})),),
        **changes,
    )
