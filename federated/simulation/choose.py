"""Clip, rate, rounds and noise, chosen on public data before a single person is asked.

Every combination of a small grid is simulated at the same ε and δ, several times, and scored on
people held out. Data must be public or made up: trying combinations on private people would be a
release for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from federated.learning.round_query import TrainQuery
from federated.learning.spec import TrainSpec
from federated.model import NoisePlan, PersonRows
from federated.simulation.devices import Devices, devices_of
from federated.simulation.training import Course, Here, Target, divided, simulate
from federated.simulation.vectorised import Vectorised


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What is tried: every combination. `rates` are those of the work on the device."""

    clips: Sequence[float]
    rates: Sequence[float]
    rounds: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One combination and how it did.

    `spec` declares it. `noise` is that of each round's sum; `multiplier` (sigma) the same in units
    of one update's sensitivity. `scores`: one for each seed, as `training.Step.score`; `clipped`:
    the share of updates that were longer than the clip, over all rounds.
    """

    spec: TrainSpec
    noise: NoisePlan
    multiplier: float
    scores: NDArray[np.float64] = field(repr=False)
    clipped: float

    @property
    def score(self) -> float:
        """The mean over seeds."""
        return float(self.scores.mean())

    @property
    def deviation(self) -> float:
        """Of the scores between seeds: differences between choices below it say little."""
        return float(self.scores.std())


def choose(
    spec: TrainSpec,
    people: Sequence[PersonRows] | Devices,
    grid: Grid,
    *,
    target: Target,
    course: Course | None = None,
    seeds: Sequence[bytes] = (b"0", b"1", b"2"),
    backend: Vectorised | None = None,
) -> tuple[Choice, ...]:
    """All combinations, the best first.

    Held-out people are the same for all and differ from seed to seed. Of `course`, the rounds are
    the grid's. The integers' scale follows the clip, so that rounding costs each the same.

    The best of many looks a little better than it is. What is best depends on how many people there
    are: with fewer public people than the study will ask, let each stand for several (`copies`).
    """
    devices = people if isinstance(people, Devices) else devices_of(spec, people)
    found = [
        _tried(
            replace(
                spec,
                clip=clip,
                scale=spec.scale * spec.clip / clip,
                rounds=rounds,
                work=replace(spec.work, rate=rate),
            ),
            devices,
            target=target,
            course=replace(course or Course(), rounds=rounds),
            seeds=seeds,
            backend=backend or Vectorised(),
        )
        for clip, rate, rounds in product(grid.clips, grid.rates, grid.rounds)
    ]
    return tuple(sorted(found, key=lambda choice: -np.nan_to_num(choice.score, nan=-np.inf)))


def _tried(
    spec: TrainSpec,
    devices: Devices,
    *,
    target: Target,
    course: Course,
    seeds: Sequence[bytes],
    backend: Vectorised,
) -> Choice:
    update = TrainQuery(spec=spec).rounding.sensitivity
    summing = Here(spec=spec, devices=devices, backend=backend)
    scores, clipped, people, noise = [], 0, 0, None
    for seed in seeds:
        population = divided(spec, devices, study=f"choose-{seed.hex()}")
        run = simulate(population, course, noise=target, seed=seed, summing=summing, judged=False)
        scores.append(population.score(run.weights))
        clipped += sum(step.clipped for step in run.trace)
        people += sum(step.people for step in run.trace)
        noise = run.noise
    if noise is None:
        raise ValueError("expected at least one seed")
    return Choice(
        spec=spec,
        noise=noise,
        multiplier=noise.scale / update.l2,
        scores=np.array(scores),
        clipped=clipped / max(people, 1),
    )
