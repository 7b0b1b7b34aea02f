"""Real people's data: private answers agree with the clear ones, at a person-level ε of 1."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from federated.analytics.association import Association
from federated.analytics.base import BaseQuery
from federated.analytics.conditional import OwnAverageSplit
from federated.analytics.counts import Count
from federated.analytics.groups import GroupMeans
from federated.analytics.means import Mean
from federated.analytics.plan import choose_noise
from federated.analytics.quantiles import Quantiles
from federated.analytics.quantity import Quantity
from federated.errors import CohortError
from federated.model import Answer, NoisePlan, PersonRows
from tests.federated.analytics import data
from tests.federated.analytics.samples import MOOD, SLEEP, SeededBits
from tests.federated.analytics.simulated import laplace

NONE = NoisePlan(mechanism="discrete_laplace", scale=1e-3)
PHQ9 = Quantity(column="phq9_total", low=0, high=27, summary="last")
HOURS = Quantity(column="sleep_hours", low=0, high=14, summary="last", unit="h")
LOW_MOOD = OwnAverageSplit(
    name="low_mood", outcome="mood", less_than=1.5, by="sleep_quality", days=21
)


@cache
def total(query: BaseQuery, people: Callable[[], tuple[PersonRows, ...]]) -> tuple[int, ...]:
    random = SeededBits(3)
    summed = np.sum([query.encode(rows, random) for rows in people()], axis=0)
    return tuple(int(value) for value in summed)


def clear(query: BaseQuery, people: Callable[[], tuple[PersonRows, ...]]) -> Answer:
    sums = np.array(total(query, people))
    return query.decode(sums, noise=NONE, people=len(people()), level=0.95)


def private(
    query: BaseQuery,
    people: Callable[[], tuple[PersonRows, ...]],
    *,
    seed: int,
    epsilon: float = 1.0,
) -> Answer:
    noise = choose_noise(query, epsilon=epsilon, delta=0)
    drawn = laplace(np.random.default_rng(seed), noise.scale, query.dimension)
    sums = np.array(total(query, people)) + drawn
    return query.decode(sums, noise=noise, people=len(people()), level=0.95)


def test_paco_in_the_clear_says_what_was_published() -> None:
    assert len(data.paco()) == 562
    worse, better, difference = clear(LOW_MOOD, data.paco).estimates
    assert worse.value == pytest.approx(0.41, abs=0.005)
    assert better.value == pytest.approx(0.28, abs=0.005)
    assert difference.value == pytest.approx(0.13, abs=0.005)


def test_paco_low_mood_after_worse_and_better_sleep_is_told_apart_at_one() -> None:
    apart = 0
    for seed in range(100):
        worse, better, difference = private(LOW_MOOD, data.paco, seed=seed).estimates
        apart += worse.interval.low > better.interval.high and difference.interval.low > 0
    assert apart >= 95


def test_paco_mood_rises_with_sleep_within_people() -> None:
    query = Association(name="a", x=SLEEP, y=MOOD, spread_x=1.5, spread_y=2, days=21)
    slope, correlation = private(query, data.paco, seed=1).estimates
    exact, _ = clear(query, data.paco).estimates
    assert slope.interval.low > 0
    assert slope.interval.low < exact.value < slope.interval.high
    assert correlation.interval.low > 0


def test_flueckigers_seventy_two_are_too_few_for_an_association_at_one() -> None:
    query = Association(name="a", x=SLEEP, y=MOOD, spread_x=1.5, spread_y=2)
    assert len(data.flueckiger()) == 72
    with pytest.raises(CohortError, match="too few"):
        private(query, data.flueckiger, seed=1)
    split = OwnAverageSplit(name="s", outcome="mood", less_than=1.5, by="sleep_quality")
    for one, exact in zip(
        private(split, data.flueckiger, seed=1).estimates,
        clear(split, data.flueckiger).estimates,
        strict=True,
    ):
        assert one.interval.low < exact.value < one.interval.high


def test_scharberts_mood_is_known_to_a_twentieth() -> None:
    assert len(data.scharbert()) == 2791
    query = Mean(name="mood", of=MOOD)
    (exact,) = clear(query, data.scharbert).estimates
    (found,) = private(query, data.scharbert, seed=2).estimates
    assert found.interval.low < exact.value < found.interval.high
    assert found.interval.high - found.interval.low < 0.12


def test_nhanes_has_its_people_and_its_zeros_are_zeros() -> None:
    people = data.nhanes()
    totals = np.array([rows.values["phq9_total"][0] for rows in people])
    assert len(people) == 5068
    assert totals.min() == 0
    assert (totals == np.round(totals)).all()
    assert not ((totals > 0) & (totals < 1)).any()


def test_nhanes_phq9_is_highest_where_people_sleep_least() -> None:
    query = GroupMeans(name="g", outcome=PHQ9, by=HOURS, edges=(0, 5, 6, 7, 8, 9, 14), reference=3)
    exact = {e.name: e for e in clear(query, data.nhanes).estimates}
    found = {e.name: e for e in private(query, data.nhanes, seed=4).estimates}
    assert found["0 to 5 h against 7 to 8 h"].interval.low > 1
    assert found["mean at 7 to 8 h"].value == pytest.approx(2.95, abs=0.25)
    inside = [e.interval.low <= exact[n].value <= e.interval.high for n, e in found.items()]
    assert sum(inside) >= len(inside) - 1


def test_nhanes_counts_depression_and_gives_whole_quartiles() -> None:
    count, share = private(Count(name="c", of=PHQ9, at_least=10), data.nhanes, seed=5).estimates
    assert count.value == pytest.approx(459, abs=10)
    assert share.interval.low < 459 / 5068 < share.interval.high
    quartiles = private(Quantiles(name="q", of=PHQ9, whole=True), data.nhanes, seed=5).estimates
    totals = [rows.values["phq9_total"][0] for rows in data.nhanes()]
    expected = np.quantile(totals, [0.25, 0.5, 0.75], method="inverted_cdf")
    assert [e.value for e in quartiles] == pytest.approx(expected.tolist())
