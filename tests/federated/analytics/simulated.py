"""Simulated studies: how often an interval holds the truth.

A large made-up population stands for everybody; each study draws people from it, adds their masses,
adds noise of the planned kind and decodes. The truth is the same query over the whole population
with hardly any noise. Noise comes from numpy here: good enough to simulate, never for a claim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from federated.accounting import calibrate
from federated.analytics.association import Association
from federated.analytics.association import masses_of as association_masses
from federated.analytics.base import BaseQuery
from federated.analytics.bernstein import basis
from federated.analytics.conditional import OwnAverageSplit
from federated.analytics.conditional import masses_of as split_masses
from federated.analytics.counts import Count, Histogram
from federated.analytics.groups import ArmContrast, GroupMeans
from federated.analytics.means import Mean, Variance
from federated.analytics.quantiles import Quantiles
from federated.analytics.quantity import Quantity
from federated.analytics.trend import WeeklyTrend
from federated.model import NoisePlan

POPULATION = 60_000
SCORE = Quantity(column="score", low=0, high=1)
_NONE = NoisePlan(mechanism="discrete_laplace", scale=1e-3)

type Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A query, and the masses of a whole made-up population: shape (people, dimension)."""

    query: BaseQuery
    population: Callable[[np.random.Generator], Floats]


def covered(
    kind: Kind, *, people: int, epsilon: float, studies: int, seed: int, level: float = 0.95
) -> Mapping[str, float]:
    """Share of studies whose interval holds the truth, by estimate."""
    random = np.random.default_rng(seed)
    query = kind.query
    masses = kind.population(random)
    whole = _integers(query, masses.sum(axis=0))
    answer = query.decode(whole, noise=_NONE, people=len(masses), level=level)
    truth = {e.name: e.value for e in answer.estimates}
    if "count" in truth:
        truth["count"] *= people / len(masses)
    plan = calibrate("discrete_laplace", query.sensitivity, epsilon=epsilon)
    held: Counter[str] = Counter()
    for _ in range(studies):
        chosen = random.integers(0, len(masses), people)
        total = _integers(query, masses[chosen].sum(axis=0))
        total += laplace(random, plan.scale, query.dimension)
        answer = query.decode(total, noise=plan, people=people, level=level)
        held.update(
            e.name for e in answer.estimates if e.interval.low <= truth[e.name] <= e.interval.high
        )
    return {name: held[name] / studies for name in truth}


def laplace(random: np.random.Generator, scale: float, size: int) -> NDArray[np.int64]:
    """Discrete Laplace noise: the difference of two geometric variables."""
    success = -np.expm1(-1 / scale)
    return np.asarray(random.geometric(success, size) - random.geometric(success, size))


def _integers(query: BaseQuery, masses: Floats) -> NDArray[np.int64]:
    return np.asarray(np.rint(masses * query.layout.unit), dtype=np.int64)


def _hot(size: int, places: NDArray[np.int64]) -> Floats:
    return np.asarray(np.eye(size)[places])


def _count(random: np.random.Generator) -> Floats:
    return _hot(2, (random.random(POPULATION) > 0.09).astype(np.int64))


def _histogram(random: np.random.Generator) -> Floats:
    return _hot(5, random.choice(5, POPULATION, p=[0.74, 0.15, 0.06, 0.03, 0.02]))


def _mean(random: np.random.Generator) -> Floats:
    return basis(random.beta(1.2, 8, POPULATION), 2)


def _variance(random: np.random.Generator) -> Floats:
    return basis(random.beta(2, 4, POPULATION), 4)


def _quantiles(random: np.random.Generator) -> Floats:
    leaf = np.minimum((random.beta(2, 4, POPULATION) * 64).astype(np.int64), 63)
    return np.concatenate([_hot(8, leaf // 8), _hot(64, leaf)], axis=1)


def _association(random: np.random.Generator) -> Floats:
    """Slopes and spreads that differ between people, 4 to 21 days each."""
    days = random.integers(4, 22, POPULATION)
    spread = random.uniform(0.5, 1.3, POPULATION)
    slope = random.normal(0.25, 0.25, POPULATION)
    there = np.arange(21) < days[:, None]
    x = np.where(there, random.normal(0, spread[:, None], (POPULATION, 21)), 0.0)
    error = np.where(there, random.normal(0, 0.9, (POPULATION, 21)), 0.0)
    x = np.where(there, x - x.sum(axis=1, keepdims=True) / days[:, None], 0.0)
    y = slope[:, None] * x + error
    y = np.where(there, y - y.sum(axis=1, keepdims=True) / days[:, None], 0.0)
    weight = days / 21
    factor = weight / (2 * days)
    return association_masses(
        factor * (x * x).sum(axis=1),
        factor * (y * y).sum(axis=1),
        factor * (x * y).sum(axis=1),
        weight=weight,
    )


def _split(random: np.random.Generator) -> Floats:
    """People who differ in how often it happens and in how many days they have."""
    days = np.stack(
        [random.integers(1, 11, POPULATION), random.integers(1, 12, POPULATION)], axis=1
    )
    own = random.beta(1.2, 2.4, POPULATION)
    likely = np.stack([np.minimum(own * 1.3, 1), own * 0.9], axis=1)
    return split_masses(days / 21, random.binomial(days, likely) / days)


def _contrast(random: np.random.Generator) -> Floats:
    arm = random.integers(0, 2, POPULATION)
    change = random.beta(5 - arm, 5, POPULATION)
    return np.concatenate([(arm == k)[:, None] * basis(change, 2) for k in (0, 1)], axis=1)


def _groups(random: np.random.Generator) -> Floats:
    group = random.choice(3, POPULATION, p=[0.25, 0.5, 0.25])
    outcome = random.beta(1 + group / 2, 6, POPULATION)
    return np.concatenate([(group == k)[:, None] * basis(outcome, 2) for k in range(3)], axis=1)


def _trend(random: np.random.Generator) -> Floats:
    """A level per person, a slope per person, and weeks that are missed."""
    weeks = np.arange(4)
    level = random.normal(0.45, 0.12, POPULATION)
    slope = random.normal(0.01, 0.02, POPULATION)
    noise = random.normal(0, 0.06, (POPULATION, 4))
    values = np.clip(level[:, None] + slope[:, None] * weeks + noise, 0, 1)
    there = random.random((POPULATION, 4)) < 0.85
    count = there.sum(axis=1)
    time = np.where(there, weeks, 0.0)
    centred = np.where(
        there, time - time.sum(axis=1, keepdims=True) / np.maximum(count, 1)[:, None], 0.0
    )
    own = (centred * values).sum(axis=1) / np.maximum((centred**2).sum(axis=1), 1e-9)
    shifted = (np.clip(own / 0.25, -1, 1) + 1) / 2
    last = np.where((count > 1)[:, None], 2.0 * basis(shifted, 2), 0.0)
    weekly = [np.where(there[:, k : k + 1], basis(values[:, k], 2), 0.0) for k in range(4)]
    return np.concatenate([*weekly, last], axis=1)


_BY = Quantity(column="by", low=0, high=3)
KINDS: Mapping[str, Kind] = {
    "count": Kind(query=Count(name="count", of=SCORE), population=_count),
    "histogram": Kind(
        query=Histogram(name="histogram", of=SCORE, edges=(0, 0.2, 0.4, 0.6, 0.8, 1)),
        population=_histogram,
    ),
    "mean": Kind(query=Mean(name="mean", of=SCORE), population=_mean),
    "variance": Kind(query=Variance(name="variance", of=SCORE), population=_variance),
    "quantiles": Kind(query=Quantiles(name="quantiles", of=SCORE), population=_quantiles),
    "association": Kind(
        query=Association(name="association", x=SCORE, y=_BY, spread_x=1, spread_y=1, days=21),
        population=_association,
    ),
    "split": Kind(
        query=OwnAverageSplit(name="split", outcome="a", less_than=0, by="b", days=21),
        population=_split,
    ),
    "contrast": Kind(query=ArmContrast(name="contrast", outcome=SCORE), population=_contrast),
    "groups": Kind(
        query=GroupMeans(name="groups", outcome=SCORE, by=_BY, edges=(0, 1, 2, 3), reference=1),
        population=_groups,
    ),
    "trend": Kind(query=WeeklyTrend(name="trend", of=SCORE, weeks=4), population=_trend),
}
