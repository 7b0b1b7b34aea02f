"""Questions to virtual people: the query's own code, exact sums, the exact sampler's noise."""

from __future__ import annotations

import numpy as np
import pytest

from federated.accounting import calibrate
from federated.analytics.base import BaseQuery
from federated.analytics.counts import Count
from federated.analytics.intervals import noise_moments
from federated.analytics.means import Mean
from federated.model import NoisePlan
from federated.simulation.analytics import answered, encode_all, planned, scaling
from federated.simulation.training import Target
from tests.federated.analytics.samples import MOOD, PHQ9, QUERIES, SeededBits, person

PEOPLE = [person(seed) for seed in range(60)]
HARDLY = NoisePlan(mechanism="discrete_laplace", scale=0.01)
MEAN = Mean(name="mean", of=MOOD)


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_a_cohort_of_the_people_themselves_is_their_study(query: BaseQuery) -> None:
    encoded = encode_all(query, PEOPLE, seed=b"x")
    random = SeededBits(0)
    sent = np.array([query.encode(rows, random) for rows in PEOPLE])
    # Each encoding rounds at random: by less than one integer.
    assert np.abs(encoded.vectors - sent).max() <= 1
    found = answered(encoded, people=len(PEOPLE), noise=HARDLY, seed=b"x")
    expected = query.decode(
        encoded.vectors.sum(axis=0), noise=HARDLY, people=len(PEOPLE), level=0.95
    )
    assert found.answer == expected


def test_a_million_people_are_counted_and_not_looped_over() -> None:
    encoded = encode_all(MEAN, PEOPLE, seed=b"x")
    counts = np.full(60, 1_000_000 // 60, dtype=np.int64)
    counts[: 1_000_000 % 60] += 1
    assert np.array_equal(encoded.total(counts), (encoded.vectors * counts[:, None]).sum(axis=0))
    noise, cost = planned(MEAN, Target(epsilon=1.0, delta=1e-7))
    assert cost.epsilon <= 1.0 + 1e-9
    found = answered(encoded, people=1_000_000, noise=noise, seed=b"x")
    assert found.people == 1_000_000
    assert found.answer is not None


def test_intervals_shrink_as_the_cohort_grows_at_the_same_cost() -> None:
    found = scaling(
        MEAN, PEOPLE, sizes=(200, 10_000, 1_000_000), target=Target(epsilon=1.0, delta=1e-7),
        seed=b"x",
    )  # fmt: skip
    widths = []
    for one in found:
        assert one.answer is not None
        interval = one.answer.estimates[0].interval
        widths.append(interval.high - interval.low)
    assert widths[0] > 4 * widths[1] > 16 * widths[2]


def test_a_cohort_too_small_says_why() -> None:
    encoded = encode_all(MEAN, PEOPLE, seed=b"x")
    found = answered(encoded, people=5, noise=HARDLY, seed=b"x")
    assert found.answer is None
    assert found.refused is not None
    assert "needed" in found.refused


def test_intervals_hold_the_truth_of_drawn_cohorts() -> None:
    encoded = encode_all(MEAN, PEOPLE, seed=b"x")
    truth = encoded.query.decode(
        encoded.vectors.sum(axis=0) * 1000, noise=HARDLY, people=60_000, level=0.95
    )
    value = truth.estimates[0].value
    noise = calibrate("discrete_laplace", MEAN.sensitivity, epsilon=1.0)
    held = 0
    for number in range(300):
        found = answered(encoded, people=400, noise=noise, seed=b"%d" % number, drawn=True)
        assert found.answer is not None
        interval = found.answer.estimates[0].interval
        held += interval.low <= value <= interval.high
    assert held >= 270


def test_refuses_nobody() -> None:
    encoded = encode_all(MEAN, [], seed=b"x")
    with pytest.raises(ValueError, match="expected people"):
        answered(encoded, people=100, noise=HARDLY, seed=b"x")
    with pytest.raises(ValueError, match="cohort of 1"):
        answered(encode_all(MEAN, PEOPLE, seed=b"x"), people=0, noise=HARDLY, seed=b"x")


def test_every_answer_carries_the_planned_noise() -> None:
    query = Count(name="count", of=PHQ9, at_least=10)
    encoded = encode_all(query, PEOPLE, seed=b"x")
    noise = calibrate("discrete_laplace", query.sensitivity, epsilon=1.0)
    found = []
    for number in range(300):
        answer = answered(encoded, people=600, noise=noise, seed=b"%d" % number).answer
        assert answer is not None
        found.append(next(one.value for one in answer.estimates if one.name == "count"))
    expected = noise_moments(noise, query.layout.unit).deviation
    assert np.std(found) == pytest.approx(expected, rel=0.25)
