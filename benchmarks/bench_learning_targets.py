"""What private models reach on real people, beside what a sceptic would name instead.

`learning.auc_at_epsilon.<target>.eps<ε>`, `learning.mae_at_epsilon.…`: person-level (ε, δ),
zero-out; everybody in every round, clip and `Rounding`, the noise that four sites' shares leave in
a secure sum, `training_cost`'s proven bound. People held out, five folds, each fold a training
with noise of its own; the figure is the mean over five seeds of folds and noise, `spread` over
them. The peer is the same people's rows in one place, plain descent, no privacy.

Beside each, under the same name: `curator` (one trusted curator adds the noise at the same ε),
`one_of_4_sites`, `one_of_40_sites` (each site by itself, no privacy, people on sites at random, the
mean of their models on all people held out), and among examples with a past `with_past`,
`own_mean`, `last_value`.
`learning.auc_of_wearables.<data>`: only what a phone or a watch may know, no privacy; `spread` is
the width of a 95 % interval (bootstrap over people).

Clip, rate and rounds were chosen on other people (`learning_choice`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Result
from federated.learning.baselines import Scored, last_value, own_mean
from federated.learning.examples import examples_of
from federated.learning.models import predict
from federated.learning.spec import Examples, Feature, Label, TrainSpec
from federated.model import PersonRows
from tests.federated.analytics import data
from tests.federated.learning import people, targets
from tests.federated.learning.targets import LOW_MOOD, NEXT_MOOD, PHQ9, Target

SEEDS = range(5)
DRAWS = 1000
#: Small practices: as many as NHANES has hundreds of people.
SMALL = 40
PEER = "centralised, no privacy"
TARGETS: dict[str, tuple[Target, tuple[float, ...]]] = {
    "nhanes_phq9": (PHQ9, (2.0, 1.0)),
    "paco_low_mood": (LOW_MOOD, (4.0, 1.0)),
    "scharbert_next_mood": (NEXT_MOOD, (2.0,)),
}

type Floats = NDArray[np.float64]


def run() -> dict[str, Result]:
    """Every target, then wearables alone."""
    results: dict[str, Result] = {}
    for name, (target, epsilons) in TARGETS.items():
        results |= _target(name, target, epsilons)
    for name, (spec, everybody) in WEARABLES.items():
        low, middle, high = wearables(spec, everybody())
        key = f"learning.auc_of_wearables.{name}"
        results[key] = Result(median=middle, spread=high - low, unit="AUC")
    return results


def _target(name: str, target: Target, epsilons: Sequence[float]) -> dict[str, Result]:
    kind = "auc" if target.spec.label.is_class else "mae"
    unit = "AUC" if kind == "auc" else "points of mood, -5 to 5"
    _, rows = targets.split(target)
    studied = [examples_of(target.spec, one) for one in rows]
    plain = [_mean(target, studied, seed, targets.descended) for seed in SEEDS]
    found: dict[str, list[float]] = {
        **{
            f"one_of_{sites}_sites": [site_alone(target, studied, seed, sites) for seed in SEEDS]
            for sites in (targets.SITES, SMALL)
        },
        **with_past(target, rows, studied, epsilons[0]),
    }
    stem = f"learning.{kind}_at_epsilon.{name}"
    results = {f"{stem}.{what}": _result(scores, unit) for what, scores in found.items()}
    for epsilon in epsilons:
        for what, curator in (("", False), (".curator", True)):
            scores = [
                targets.private_score(target, studied, epsilon=epsilon, seed=seed, curator=curator)
                for seed in SEEDS
            ]
            results[f"{stem}.eps{epsilon:g}{what}"] = _result(scores, unit, plain)
    return results


def _result(scores: list[float], unit: str, peer: list[float] | None = None) -> Result:
    return Result(
        median=fmean(scores),
        spread=max(scores) - min(scores),
        unit=unit,
        peer=PEER if peer else None,
        peer_median=fmean(peer) if peer else None,
    )


def _mean(
    target: Target,
    studied: Sequence[Examples],
    seed: int,
    train: Callable[[Target, Sequence[Examples]], Floats],
) -> float:
    return fmean(
        target.score(train(target, [studied[i] for i in learn]), [studied[i] for i in out])
        for learn, out in targets.folds(len(studied), seed)
    )


def site_alone(target: Target, studied: Sequence[Examples], seed: int, sites: int) -> float:
    """Mean over folds and sites: who is learned from is spread over the sites at random."""
    random = np.random.default_rng(seed)
    found = []
    for learn, out in targets.folds(len(studied), seed):
        held_out = [studied[i] for i in out]
        for site in np.array_split(random.permutation(learn), sites):
            own = [studied[i] for i in site]
            found.append(target.score(targets.descended(target, own), held_out))
    return fmean(found)


def with_past(
    target: Target, rows: Sequence[PersonRows], studied: Sequence[Examples], epsilon: float
) -> dict[str, list[float]]:
    """The private model, own mean and last value, all on the examples that have a past."""
    if target.spec.per == "person":
        return {}
    guesses = {"own_mean": own_mean(target.spec, rows), "last_value": last_value(target.spec, rows)}
    known = ~np.isnan(guesses["own_mean"].scores)
    ends = np.cumsum([len(one.y) for one in studied])
    past = [
        Examples(x=one.x[kept], y=one.y[kept])
        for one, kept in zip(studied, np.split(known, ends[:-1]), strict=True)
    ]
    found = {
        "with_past": [
            targets.private_score(target, studied, epsilon=epsilon, seed=seed, judged=past)
            for seed in SEEDS
        ]
    }
    for name, guess in guesses.items():
        scores = np.split(guess.scores, ends[:-1])
        found[name] = [
            fmean(
                _figure(
                    target.spec,
                    Scored(
                        scores=np.concatenate([scores[i] for i in out]),
                        truth=targets.joined([studied[i] for i in out]).y,
                    ),
                )
                for _, out in targets.folds(len(studied), seed)
            )
            for seed in SEEDS
        ]
    return found


def _figure(spec: TrainSpec, found: Scored) -> float:
    return found.auc if spec.label.is_class else found.mae(spec)


def wearables(spec: TrainSpec, everybody: Sequence[PersonRows]) -> tuple[float, float, float]:
    """AUC of people held out, and its 95 % interval: whole people are drawn again, 1,000 times."""
    target = Target(spec=spec, everybody=lambda: everybody, delta=0.0)
    each = [one for one in (examples_of(spec, rows) for rows in everybody) if len(one.y)]
    scores: dict[int, Floats] = {}
    for learn, out in targets.folds(len(each), 0):
        weights = targets.descended(target, [each[i] for i in learn])
        scores |= {i: predict(spec, weights, each[i].x) for i in out}
    random = np.random.default_rng(0)

    def auc(chosen: Sequence[int] | NDArray[np.int64]) -> float:
        return Scored(
            scores=np.concatenate([scores[int(i)] for i in chosen]),
            truth=np.concatenate([each[int(i)].y for i in chosen]),
        ).auc

    drawn = [auc(random.integers(0, len(each), len(each))) for _ in range(DRAWS)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), auc(range(len(each))), float(high)


def _f(column: str, low: float, high: float) -> Feature:
    return Feature(column=column, low=low, high=high)


_LOW_MOOD = Label(column="mood", low=-6, high=6, below=1.5)
WEARABLES: dict[str, tuple[TrainSpec, Callable[[], Sequence[PersonRows]]]] = {
    "nhanes_phq9": (
        replace(
            people.NHANES,
            features=(
                _f("sleep_hours", 4, 7.5),
                _f("sleep_hours", 7.5, 11),
                _f("sedentary_minutes", 0, 900),
                _f("heart_rate", 40, 110),
            ),
        ),
        people.nhanes,
    ),
    "paco_low_mood": (
        replace(
            people.PACO,
            features=(
                _f("outside_hours", 0, 6),
                _f("walking_hours", 0, 2),
                _f("sports_hours", 0, 2),
            ),
        ),
        people.paco,
    ),
    "flueckiger_low_mood": (
        TrainSpec(name="low_mood", features=(_f("active_minutes", 0, 120),), label=_LOW_MOOD),
        data.flueckiger,
    ),
}


def main() -> None:
    """Print the figures alone."""
    for name, one in run().items():
        peer = "" if one.peer_median is None else f"  ({one.peer}: {one.peer_median:.4f})"
        print(f"{name:<64} {one.median:.4f} ± {one.spread / 2:.4f}{peer}", flush=True)


if __name__ == "__main__":
    main()
