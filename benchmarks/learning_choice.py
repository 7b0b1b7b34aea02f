"""How clip, rate and rounds of `bench_learning_targets` were chosen: once, on other people.

python -m benchmarks.learning_choice

A fifth of each data set's people plays public data of the same kind. On them alone, five folds by
two seeds, each choice of the grid is trained with a fifth of the noise that the study's rounds
will carry, since a fifth of the people take part: it then weighs as much in the mean. The best
stands in `tests.federated.learning.targets`; none of these people is in any figure.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from federated.learning.examples import examples_of
from federated.learning.spec import Examples
from federated.model import NoisePlan
from tests.federated.learning import targets
from tests.federated.learning.targets import LOW_MOOD, NEXT_MOOD, PHQ9, Choice, Target

SEEDS = (100, 101)
GRIDS = {
    "NHANES, PHQ-9 at least 10": (PHQ9, 2.0, (1.0, 2.0, 3.0), (3.0, 6.0), (10, 20, 30), 0.0),
    "PACO, low mood": (LOW_MOOD, 1.0, (0.3, 0.6, 1.0), (2.0, 4.0), (6, 12, 24), 0.0),
    "Scharbert, next mood": (NEXT_MOOD, 2.0, (0.5, 1.0, 2.0), (0.3, 0.5), (15, 30), 0.9),
}


def main() -> None:
    """Print each choice's score, the best last."""
    for name, (target, epsilon, slopes, rates, rounds, momentum) in GRIDS.items():
        public, _ = targets.split(target)
        people = [examples_of(target.spec, rows) for rows in public]
        tried = {
            choice: _score(target.with_choice(choice), people, epsilon)
            for slope, rate, count in itertools.product(slopes, rates, rounds)
            for choice in (Choice(slope=slope, rate=rate, rounds=count, momentum=momentum),)
        }
        better = 1 if target.spec.label.is_class else -1
        print(f"{name}, {len(people)} people, ε = {epsilon:g}")
        for choice, score in sorted(tried.items(), key=lambda one: better * one[1]):
            print(f"  {score:.4f}  {choice}")


def _score(target: Target, people: Sequence[Examples], epsilon: float) -> float:
    whole = targets.noise_of(target.spec, epsilon=epsilon, delta=target.delta)
    noise = NoisePlan(mechanism=whole.mechanism, scale=whole.scale / targets.FOLDS)
    found = []
    for seed in SEEDS:
        for fold, (learn, out) in enumerate(targets.folds(len(people), seed)):
            weights = targets.trained(
                target.spec,
                [people[i] for i in learn],
                strategy=target.strategy,
                noise=noise,
                seed=targets.FOLDS * seed + fold,
            )
            found.append(target.score(weights, [people[i] for i in out]))
    return float(np.mean(found))


if __name__ == "__main__":
    main()
