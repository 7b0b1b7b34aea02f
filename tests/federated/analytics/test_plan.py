"""What a query costs and how sure it will be is known before anything runs."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.special import ndtr

from federated.accounting import calibrate, compose
from federated.aggregation.bits import SeededBits as NodeBits
from federated.aggregation.encoding import unscale
from federated.aggregation.noise import sample
from federated.aggregation.polya import laplace_share
from federated.aggregation.schedule import noise_schedule
from federated.analytics.base import BaseQuery
from federated.analytics.intervals import carried, noise_moments
from federated.analytics.means import Mean
from federated.analytics.plan import choose_noise, plan_query
from federated.analytics.trend import WeeklyTrend
from federated.errors import AccountingError
from federated.model import Mechanism, NoisePlan
from tests.federated.analytics.samples import MOOD, QUERIES, SeededBits
from tests.federated.analytics.simulated import laplace

DRAWS = 30_000


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
@pytest.mark.parametrize("scale", [0.3, 0.9, 1.5, 2.0, 3.0, 40.0])
def test_noise_moments_are_those_of_what_is_left_in_the_sum(
    mechanism: Mechanism, scale: float
) -> None:
    plan = NoisePlan(mechanism=mechanism, scale=scale)
    places = np.arange(-2000, 2001)
    if mechanism == "discrete_laplace":
        mass = np.exp(-np.abs(places) / scale) / np.exp(-np.abs(places) / scale).sum()
    else:
        # Drawn on a lattice that is much finer, and rounded.
        mass = np.diff(ndtr((np.arange(-2000, 2002) - 0.5) / scale))
    second, fourth = (float(np.sum(mass * places**k)) for k in (2, 4))
    found = noise_moments(plan, 4)
    assert found.variance == pytest.approx(second / 16, rel=1e-6)
    expected = (fourth - 3 * second**2) / 256
    assert found.fourth == pytest.approx(expected, rel=1e-6, abs=1e-5 * second**2)


@pytest.mark.parametrize("mechanism", ["discrete_laplace", "discrete_gaussian"])
@pytest.mark.parametrize("scale", [0.4, 0.9, 1.5, 3.0, 9.0])
@pytest.mark.parametrize(("nodes", "survivors"), [(4, 4), (4, 3), (12, 12)])
def test_noise_moments_are_what_the_nodes_really_add(
    mechanism: Mechanism, scale: float, nodes: int, survivors: int
) -> None:
    plan = NoisePlan(mechanism=mechanism, scale=scale)
    schedule = noise_schedule(plan, nodes=nodes, minimum_survivors=2 * nodes // 3 + 1, colluding=1)
    parts = (-1, *schedule.kept[nodes - survivors])
    total = np.zeros(DRAWS, dtype=np.int64)
    for node in range(survivors):
        for part in parts:
            bits = NodeBits(bytes(32), f"{node} {part}".encode())
            total += schedule.share(part, dimension=DRAWS, random=bits)
    drawn = unscale(total, schedule.granularity)
    told = noise_moments(carried(plan, float(schedule.weight(survivors))), 1)
    kurtosis = float(np.mean((drawn / drawn.std()) ** 4)) - 1
    error = 4 * math.sqrt(kurtosis / DRAWS)
    assert drawn.var() <= told.variance * (1 + error)
    # Of a Laplace sum's moments a larger scale's are told, which are a little larger.
    slack = 0.2 if mechanism == "discrete_laplace" and scale < 1 else 0.05
    assert drawn.var() >= told.variance * (1 - slack - error)
    assert abs(drawn.mean()) <= 4 * drawn.std() / math.sqrt(DRAWS)


#: So many queries as there are kinds, and so many draws of a round's noise.
ROUNDS = 4000
#: Where an interval's critical value is √3, kurtosis changes nothing: its ends are √3 standard
#: errors from the estimate.
LEVEL = math.erf(math.sqrt(1.5))


@pytest.mark.parametrize("query", QUERIES, ids=lambda q: q.name)
def test_the_error_that_is_foreseen_is_the_one_that_nodes_noise_makes(query: BaseQuery) -> None:
    people, nodes = 4000, 4
    weight = Fraction(nodes, nodes - 1)
    plan = plan_query(query, epsilon=1.0, delta=0, people=people, level=LEVEL, weight=float(weight))
    total = np.rint(query.typical(people) * query.layout.unit).astype(np.int64)
    noise = laplace_share(
        ROUNDS * query.dimension,
        scale=Fraction(plan.noise.scale),
        weight=weight,
        random=NodeBits(bytes(32), query.name.encode()),
    ).reshape(ROUNDS, -1)
    values = []
    for drawn in noise:
        answer = query.decode(total + drawn, noise=plan.noise, people=people, level=LEVEL)
        values.append([e.value for e in answer.estimates])
    simulated = np.std(np.array(values), axis=0)
    for one, error in zip(plan.expected, simulated, strict=True):
        added = math.sqrt((one.half_width**2 - one.half_width_without_noise**2) / 3)
        assert added == pytest.approx(error, rel=0.08), one.name


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
