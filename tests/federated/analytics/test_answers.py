"""With hardly any noise answers are the plain statistics; with too few people there are none."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from federated.accounting import calibrate
from federated.analytics.base import SMALLEST_COHORT, BaseQuery
from federated.analytics.bernstein import Moments, basis
from federated.analytics.counts import Count
from federated.analytics.means import Mean
from federated.analytics.quantiles import Quantiles
from federated.analytics.quantity import Quantity
from federated.errors import CohortError, ManifestError
from federated.model import Answer, NoisePlan, PersonRows
from tests.federated.analytics.samples import MOOD, QUERIES, SeededBits, person
from tests.federated.analytics.simulated import laplace

NONE = NoisePlan(mechanism="discrete_laplace", scale=1e-3)
PEOPLE = 300
BY_NAME = {query.name: query for query in QUERIES}


@cache
def cohort() -> tuple[PersonRows, ...]:
    return tuple(person(k) for k in range(PEOPLE))


def summed(query: BaseQuery, people: tuple[PersonRows, ...]) -> NDArray[np.int64]:
    vectors = [query.encode(rows, SeededBits(k)) for k, rows in enumerate(people)]
    return np.asarray(np.sum(vectors, axis=0), dtype=np.int64)


def answer(query: BaseQuery, people: tuple[PersonRows, ...], noise: NoisePlan = NONE) -> Answer:
    return query.decode(summed(query, people), noise=noise, people=len(people), level=0.95)


@cache
def values(name: str) -> dict[str, float]:
    return {e.name: e.value for e in answer(BY_NAME[name], cohort()).estimates}


def last(column: str) -> NDArray[np.float64]:
    return np.array([rows.values[column][-1] for rows in cohort()])


def means(column: str) -> NDArray[np.float64]:
    return np.array([rows.values[column].mean() for rows in cohort()])


def test_count_is_the_number_of_people() -> None:
    reached = int((last("phq9_total") >= 10).sum())
    assert values("count") == {"count": reached, "share": pytest.approx(reached / PEOPLE)}


def test_histogram_is_the_share_in_each_bin() -> None:
    counted, _ = np.histogram(last("phq9_total"), bins=(0, 5, 10, 15, 20, 27))
    assert list(values("histogram").values()) == pytest.approx((counted / PEOPLE).tolist())


def test_mean_and_variance_are_those_of_peoples_own_means() -> None:
    assert values("mean")["mean"] == pytest.approx(means("mood").mean(), abs=0.01)
    found = values("variance")
    assert found["variance"] == pytest.approx(means("mood").var(ddof=1), abs=0.05)
    assert found["standard deviation"] == pytest.approx(np.sqrt(found["variance"]))


@pytest.mark.parametrize("name", ["quantiles", "dyadic"])
def test_quantiles_are_within_a_leaf(name: str) -> None:
    expected = np.quantile(means("mood"), [0.25, 0.5, 0.75])
    # A leaf's width, and what 300 people leave open within it.
    assert list(values(name).values()) == pytest.approx(expected.tolist(), abs=12 / 64)


def test_slope_and_correlation_are_the_pooled_ones_of_demeaned_days() -> None:
    xs, ys = [], []
    for rows in cohort():
        x, y = rows.values["sleep_quality"], rows.values["mood"]
        dx, dy = x - x.mean(), y - y.mean()
        # The same joint clipping: people whose days vary more count less.
        total = (dx @ dx / 1.5**2 + dy @ dy / 2**2) / (2 * len(x))
        kept = min(1.0, 1 / float(total)) ** 0.5
        xs.append(dx * kept)
        ys.append(dy * kept)
    dx, dy = np.concatenate(xs), np.concatenate(ys)
    assert values("association")["slope"] == pytest.approx(dx @ dy / (dx @ dx), abs=0.01)
    expected = dx @ dy / np.sqrt((dx @ dx) * (dy @ dy))
    assert values("association")["correlation"] == pytest.approx(expected, abs=0.01)


def test_split_is_the_share_of_days_on_either_side_of_the_own_average() -> None:
    low: dict[str, list[bool]] = {"below": [], "above": []}
    for rows in cohort():
        sleep, mood = rows.values["sleep_quality"], rows.values["mood"]
        for side, days in (("below", sleep < sleep.mean()), ("above", sleep > sleep.mean())):
            low[side] += (mood[days] < 1.5).tolist()
    below, above = float(np.mean(low["below"])), float(np.mean(low["above"]))
    found = list(values("split").values())
    assert found == pytest.approx([below, above, below - above], abs=0.005)


def test_contrast_is_the_difference_of_mean_changes() -> None:
    change = np.array([r.values["phq9_total"][-1] - r.values["phq9_total"][0] for r in cohort()])
    arm = last("arm")
    effect = change[arm == 1].mean() - change[arm == 0].mean()
    assert values("contrast")["effect"] == pytest.approx(effect, abs=0.05)


def test_groups_are_means_by_bin_and_differences_from_the_reference() -> None:
    group = np.digitize(means("sleep_quality"), (3, 5))
    outcome = last("phq9_total")
    expected = [outcome[group == k].mean() for k in np.unique(group)]
    found = list(values("groups").values())
    # Nobody sleeps that badly here: the first bin is empty and says so by its interval.
    assert found[1:3] == pytest.approx(expected[-2:], abs=0.05)
    assert found[-1] == pytest.approx(expected[-1] - expected[-2], abs=0.05)


def test_trend_is_the_mean_of_peoples_own_slopes() -> None:
    slopes, weekly = [], []
    for rows in cohort():
        week = (rows.days - rows.days[0]) // 7
        by_week = np.array([rows.values["mood"][week == k].mean() for k in range(3)])
        slopes.append((by_week[2] - by_week[0]) / 2)
        weekly.append(by_week)
    found = values("trend")
    assert found["change per week"] == pytest.approx(np.mean(slopes), abs=0.02)
    assert found["mean in week 2"] == pytest.approx(np.mean(weekly, axis=0)[1], abs=0.02)


def test_a_mean_is_of_those_with_data_however_many_are_said_to_take_part() -> None:
    # What a site says is an upper bound: who has no data, or adds nothing, must drop out.
    query = BY_NAME["mean"]
    silent = PersonRows(days=np.empty(0, dtype=np.int64), values={})
    total = summed(query, (*cohort(), *[silent] * PEOPLE))
    for people in (PEOPLE, 2 * PEOPLE):
        [found] = query.decode(total, noise=NONE, people=people, level=0.95).estimates
        assert found.value == pytest.approx(means("mood").mean(), abs=0.01)


@pytest.mark.parametrize("mean", [0.0, 0.12, 0.25, 0.5, 0.75, 1.0])
def test_a_means_noise_is_near_the_least_that_is_possible_where_the_count_is_measured(
    mean: float,
) -> None:
    gradient = Moments(sums=PEOPLE * basis(mean, 2)).mean_gradient() * PEOPLE
    # Whatever the vector: its gradient, at a person x, gives x - mean (DESIGN.md, "Mean").
    for x in (0.0, 0.3, 1.0):
        assert gradient @ basis(x, 2) == pytest.approx(x - mean)
    least = max(mean, 1 - mean)
    assert np.linalg.norm(gradient) <= (1.12 if abs(mean - 0.5) >= 0.25 else 1.42) * least
    # A sum around the middle and a count, ε shared out equally.
    shared = np.sqrt(1 + 4 * (mean - 0.5) ** 2)
    assert np.linalg.norm(gradient) < 0.8 * shared


def test_an_empty_group_gets_the_whole_range() -> None:
    nobody = answer(BY_NAME["trend"], cohort()).estimates[-1]
    assert (nobody.interval.low, nobody.interval.high) == (-6, 6)


def test_whole_numbers_give_whole_quantiles() -> None:
    score = Quantity(column="phq9_total", low=0, high=27, summary="last")
    query = Quantiles(name="whole", of=score, at=(0.1, 0.5, 0.9), whole=True)
    found = answer(query, cohort()).estimates
    of = last("phq9_total")
    for share, value in zip(query.at, [e.value for e in found], strict=True):
        # What a quantile is: where just as many lie below, either neighbour is one.
        assert value in of
        assert (of < value).mean() <= share + 1e-9
        assert (of <= value).mean() >= share - 1e-9
    assert all(e.interval.low == round(e.interval.low) <= e.value for e in found)


@pytest.mark.parametrize("query", QUERIES, ids=lambda q: q.name)
def test_refuses_below_the_minimum_cohort(query: BaseQuery) -> None:
    total = summed(query, cohort())
    with pytest.raises(CohortError, match="at least 20"):
        query.decode(total, noise=NONE, people=SMALLEST_COHORT - 1, level=0.95)


@pytest.mark.parametrize("query", QUERIES, ids=lambda q: q.name)
def test_refuses_when_the_noise_hides_that_anybody_answered(query: BaseQuery) -> None:
    noise = calibrate("discrete_laplace", query.sensitivity, epsilon=0.1)
    refused = 0
    for seed in range(100):
        drawn = laplace(np.random.default_rng(seed), noise.scale, query.dimension)
        try:
            query.decode(drawn, noise=noise, people=50, level=0.95)
        except CohortError:
            refused += 1
    # Noise alone may look like a few people once in a while: it is known to be rare.
    assert refused >= 95


@pytest.mark.parametrize("query", QUERIES, ids=lambda q: q.name)
def test_answers_name_their_estimates_once_and_say_what_they_cannot(query: BaseQuery) -> None:
    found = answer(query, cohort())
    names = [e.name for e in found.estimates]
    assert len(set(names)) == len(names)
    assert found.cautions
    assert all(caution.endswith(".") for caution in found.cautions)
    for e in found.estimates:
        assert e.interval.low <= e.value <= e.interval.high
        assert e.interval.level == 0.95


@pytest.mark.parametrize("query", QUERIES, ids=lambda q: q.name)
def test_more_noise_makes_intervals_wider(query: BaseQuery) -> None:
    total = summed(query, cohort())
    widths = []
    for epsilon in (20.0, 5.0):
        noise = calibrate("discrete_laplace", query.sensitivity, epsilon=epsilon)
        found = query.decode(total, noise=noise, people=PEOPLE, level=0.95).estimates
        widths.append(sum(e.interval.high - e.interval.low for e in found))
    assert widths[0] < widths[1]


def test_refuses_sums_of_another_length_and_levels_that_are_none() -> None:
    query = BY_NAME["mean"]
    with pytest.raises(ValueError, match="3 sums"):
        query.decode(np.zeros(4, dtype=np.int64), noise=NONE, people=50, level=0.95)
    with pytest.raises(ValueError, match="confidence level"):
        query.decode(np.zeros(3, dtype=np.int64), noise=NONE, people=50, level=1.0)


def test_a_cohort_below_twenty_cannot_be_declared() -> None:
    with pytest.raises(ManifestError, match="at least 20"):
        Mean(name="mean", of=MOOD, minimum_cohort=19)
    with pytest.raises(ManifestError, match="name"):
        Mean(name="Mean of mood", of=MOOD)
    with pytest.raises(ManifestError, match="low"):
        Quantity(column="mood", low=1, high=float("nan"))
    with pytest.raises(ManifestError, match="at_least"):
        Count(name="count", of=MOOD, at_least=2, at_most=1)
