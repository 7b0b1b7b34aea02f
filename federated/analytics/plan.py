"""Before anything runs: which noise a query gets at this ε and δ, and how sure the answer will be.

The mechanism with the smaller noise is taken: every estimate moves with the noise of a coordinate
in the same way whatever its kind. What to expect is read off a made-up, unremarkable cohort of the
given size (each query's `typical`): it says how wide intervals will be, not where they will lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from federated.accounting import calibrate, cost_of
from federated.analytics.base import BaseQuery
from federated.analytics.intervals import carried, noise_moments
from federated.errors import AccountingError, CohortError
from federated.model import Estimate, Mechanism, NoisePlan, PrivacyCost

_MECHANISMS: Final[tuple[Mechanism, ...]] = ("discrete_laplace", "discrete_gaussian")
_HARDLY_ANY: Final = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedError:
    """Half of the interval's width to expect, in `unit`: all of it, and without any noise."""

    name: str
    unit: str
    half_width: float
    half_width_without_noise: float


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryPlan:
    """What a query will cost and how sure its answer will be, for a cohort of `people`.

    `expected` is empty, and `refused` says why, where the answer would be refused.
    """

    query: str
    columns: frozenset[str]
    noise: NoisePlan
    cost: PrivacyCost
    people: int
    level: float
    expected: tuple[ExpectedError, ...]
    refused: str | None = None


def plan_query(
    query: BaseQuery,
    *,
    epsilon: float,
    delta: float,
    people: int,
    level: float = 0.95,
    closeness: float = 0.0,
    weight: float = 1.0,
) -> QueryPlan:
    """Choose mechanism and scale, and foresee the error. Reads nobody's data.

    `weight` is how many times the planned variance the sum will carry, colluding nodes' part
    included: it makes the answer less sure, and no cheaper. Raises `AccountingError` if no noise
    keeps to ε and δ.
    """
    noise = choose_noise(query, epsilon=epsilon, delta=delta, closeness=closeness)
    cost = cost_of(noise, query.sensitivity, delta=delta, closeness=closeness)
    refused = None
    expected: tuple[ExpectedError, ...] = ()
    try:
        expected = _expected(query, carried(noise, weight), people, level)
    except CohortError as error:
        refused = str(error)
    return QueryPlan(
        query=query.name,
        columns=query.columns,
        noise=noise,
        cost=cost,
        people=people,
        level=level,
        expected=expected,
        refused=refused,
    )


def choose_noise(
    query: BaseQuery, *, epsilon: float, delta: float, closeness: float = 0.0
) -> NoisePlan:
    """The kind of noise with the smaller variance at that cost. Laplace if both are equal."""
    found: list[NoisePlan] = []
    problems: list[AccountingError] = []
    for mechanism in _MECHANISMS:
        try:
            found.append(
                calibrate(
                    mechanism,
                    query.sensitivity,
                    epsilon=epsilon,
                    delta=delta,
                    closeness=closeness,
                )
            )
        except AccountingError as error:
            problems.append(error)
    if not found:
        raise problems[0]
    return min(found, key=lambda noise: noise_moments(noise, query.layout.unit).variance)


def _expected(
    query: BaseQuery, noise: NoisePlan, people: int, level: float
) -> tuple[ExpectedError, ...]:
    masses = query.typical(people) * query.layout.unit
    total = np.asarray(np.rint(masses), dtype=np.int64)
    nearly_none = NoisePlan(mechanism="discrete_laplace", scale=_HARDLY_ANY)
    noisy = query.decode(total, noise=noise, people=people, level=level).estimates
    clear = query.decode(total, noise=nearly_none, people=people, level=level).estimates
    return tuple(
        ExpectedError(
            name=one.name,
            unit=one.unit,
            half_width=_half_width(one),
            half_width_without_noise=_half_width(other),
        )
        for one, other in zip(noisy, clear, strict=True)
    )


def _half_width(estimate: Estimate) -> float:
    return (estimate.interval.high - estimate.interval.low) / 2
