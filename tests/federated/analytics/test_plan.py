"""What a query costs and how sure it will be is known before anything runs."""

from __future__ import annotations

import numpy as np
import pytest

from federated.accounting import calibrate, compose
from federated.aggregation.noise import sample
from federated.analytics.base import BaseQuery
from federated.analytics.intervals import noise_moments
from federated.analytics.means import Mean
from federated.analytics.plan import choose_noise, plan_query
from federated.analytics.trend import WeeklyTrend
from federated.errors import AccountingError
from federated.model import NoisePlan
from tests.federated.analytics.samples import MOOD, QUERIES, SeededBits
from tests.federated.analytics.simulated import laplace


@pytest.mark.parametrize("query", QUERIES, ids=lambda q: q.name)
def test_a_plan_keeps_to_its_budget_and_foresees_each_estimate(query: BaseQuery) -> None:
    plan = plan_query(query, epsilon=1.0, delta=1e-6, people=2000)
    assert plan.cost.epsilon <= 1
    assert plan.cost.delta <= 1e-6
    assert compose([plan.cost], delta=1e-6) <= 1
    assert plan.columns == query.columns
    assert plan.refused is None
    assert all(0 < e.half_width_without_noise <= e.half_width for e in plan.expected)


@pytest.mark.parametrize("query", QUERIES, ids=lambda q: q.name)
def test_the_kind_of_noise_with_the_smaller_error_is_taken(query: BaseQuery) -> None:
    for epsilon, delta in ((1.0, 1e-6), (1.0, 1e-2), (8.0, 1e-6)):
        chosen = choose_noise(query, epsilon=epsilon, delta=delta)
        for mechanism in ("discrete_laplace", "discrete_gaussian"):
            other = calibrate(mechanism, query.sensitivity, epsilon=epsilon, delta=delta)
            unit = query.layout.unit
            assert noise_moments(chosen, unit).variance <= noise_moments(other, unit).variance


def test_many_weeks_take_gaussian_noise_and_one_place_takes_laplace() -> None:
    year = WeeklyTrend(name="year", of=MOOD, weeks=52)
    assert choose_noise(year, epsilon=1, delta=1e-6).mechanism == "discrete_gaussian"
    one = Mean(name="one", of=MOOD)
    assert choose_noise(one, epsilon=1, delta=1e-6).mechanism == "discrete_laplace"
    assert choose_noise(year, epsilon=1, delta=0).mechanism == "discrete_laplace"


def test_a_cohort_that_is_too_small_is_said_before_anything_is_spent() -> None:
    plan = plan_query(Mean(name="mean", of=MOOD), epsilon=1, delta=0, people=10)
    assert plan.expected == ()
    assert plan.refused is not None
    assert "at least 20" in plan.refused


def test_more_people_or_more_epsilon_are_foreseen_to_give_a_surer_answer() -> None:
    def width(people: int, epsilon: float) -> float:
        query = Mean(name="mean", of=MOOD)
        return plan_query(query, epsilon=epsilon, delta=0, people=people).expected[0].half_width

    assert width(1000, 1) < width(200, 1)
    assert width(200, 4) < width(200, 1)


def test_no_budget_is_no_plan() -> None:
    with pytest.raises(AccountingError):
        plan_query(QUERIES[0], epsilon=0, delta=1e-6, people=100)


@pytest.mark.parametrize("mechanism", ["discrete_laplace", "discrete_gaussian"])
@pytest.mark.parametrize("scale", [0.3, 0.9, 1.5, 40.0])
def test_noise_moments_are_those_of_the_distribution(mechanism: str, scale: float) -> None:
    plan = NoisePlan(mechanism=mechanism, scale=scale)  # type: ignore[arg-type]
    places = np.arange(-2000, 2001)
    exponent = np.abs(places) / scale if "laplace" in mechanism else places**2 / (2 * scale**2)
    mass = np.exp(-exponent) / np.exp(-exponent).sum()
    second, fourth = (float(np.sum(mass * places**k)) for k in (2, 4))
    found = noise_moments(plan, 4)
    assert found.variance == pytest.approx(second / 16, rel=1e-6)
    expected = (fourth - 3 * second**2) / 256
    assert found.fourth == pytest.approx(expected, rel=1e-6, abs=1e-6 * second**2)


def test_the_simulated_noise_has_the_planned_variance() -> None:
    drawn = laplace(np.random.default_rng(1), 5.0, 200_000)
    plan = NoisePlan(mechanism="discrete_laplace", scale=5.0)
    assert drawn.var() == pytest.approx(noise_moments(plan, 1).variance, rel=0.03)


@pytest.mark.parametrize("query", QUERIES, ids=lambda q: q.name)
def test_planned_noise_is_what_devices_can_draw_exactly(query: BaseQuery) -> None:
    for delta in (0.0, 1e-2):
        plan = choose_noise(query, epsilon=1.0, delta=delta)
        drawn = sample(2000, plan=plan, random=SeededBits(5))
        expected = noise_moments(plan, 1).variance
        # Laplace: the variance of 2,000 draws has a relative standard error of √(5/2000) = 5 %.
        assert drawn.var() == pytest.approx(expected, rel=0.2)
        total = np.rint(query.typical(2000) * query.layout.unit).astype(np.int64)
        noisy = total + drawn[: query.dimension]
        assert query.decode(noisy, noise=plan, people=2000, level=0.95).estimates
