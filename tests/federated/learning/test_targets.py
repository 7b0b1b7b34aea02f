"""What is to be reached on real people, one seed of each; and that the fast way is the real one.

All five seeds, and what a sceptic would name instead, are `benchmarks.bench_learning_targets`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from federated.accounting import compose, cost_of
from federated.aggregation.bits import SeededBits
from federated.learning.baselines import Scored
from federated.learning.examples import examples_of, history_of
from federated.learning.local import update
from federated.learning.models import parameters
from federated.learning.round_query import TrainQuery
from federated.learning.spec import Examples, TrainSpec, Work
from federated.learning.strategies import FedAvg
from federated.model import PersonRows
from tests.federated.learning import targets
from tests.federated.learning.targets import LOW_MOOD, NEXT_MOOD, PHQ9, Target

TARGETS = pytest.mark.parametrize(
    "target", [PHQ9, LOW_MOOD, NEXT_MOOD], ids=["phq9", "low_mood", "next_mood"]
)


@cache
def studied(target: Target) -> tuple[tuple[PersonRows, ...], tuple[Examples, ...]]:
    """Rows and examples of the people who were not used to choose anything."""
    _, rows = targets.split(target)
    return tuple(rows), tuple(examples_of(target.spec, one) for one in rows)


def somebody(target: Target, count: int) -> tuple[Examples, ...]:
    return tuple(one for one in studied(target)[1] if len(one.y))[:count]


def private(target: Target, epsilon: float) -> float:
    return targets.private_score(target, studied(target)[1], epsilon=epsilon, seed=0)


def test_depression_is_told_at_epsilon_2() -> None:
    """Measured over five seeds: 0.803; without privacy 0.814."""
    assert len(PHQ9.spec.features) <= 20
    assert private(PHQ9, 2.0) >= 0.79


@pytest.mark.parametrize(("epsilon", "least"), [(4.0, 0.785), (1.0, 0.78)])
def test_low_mood_is_told_at_epsilon_4_and_at_1(epsilon: float, least: float) -> None:
    """Measured over five seeds: 0.799 at both; without privacy 0.798."""
    assert private(LOW_MOOD, epsilon) >= least


def test_the_next_days_mood_is_foretold_better_than_by_the_own_mean_at_epsilon_2() -> None:
    """Measured over five seeds: 0.956 against 0.966, on the days that have a past."""
    rows, examples = studied(NEXT_MOOD)
    past, guesses = [], []
    for person, one in zip(rows, examples, strict=True):
        guess = history_of(NEXT_MOOD.spec, person).mean
        known = ~np.isnan(guess)
        past.append(Examples(x=one.x[known], y=one.y[known]))
        guesses.append(guess[known])
    own_mean = Scored(scores=np.concatenate(guesses), truth=targets.joined(past).y)
    model = targets.private_score(NEXT_MOOD, examples, epsilon=2.0, seed=0, judged=past)
    assert model <= own_mean.mae(NEXT_MOOD.spec) - 0.005


@TARGETS
def test_nobody_on_whom_something_was_chosen_is_in_a_figure(target: Target) -> None:
    public, rest = targets.split(target)
    everybody = {id(one) for one in target.everybody()}
    assert {id(one) for one in public} | {id(one) for one in rest} == everybody
    assert len(public) + len(rest) == len(everybody)
    for learn, out in targets.folds(len(rest), 0):
        assert not set(learn) & set(out)


@TARGETS
@pytest.mark.parametrize("epochs", [1, 3])
def test_the_batched_work_is_the_devices_own(target: Target, epochs: int) -> None:
    work = Work(epochs=epochs, rate=target.spec.work.rate, l2=0.01)
    spec = replace(target.spec, work=work)
    people = somebody(target, 50)
    weights = np.random.default_rng(1).normal(size=parameters(spec))
    expected = [update(spec, weights, one) for one in people]
    found = targets.updates(spec, targets.batch_of(people), weights)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def by_device(spec: TrainSpec, people: tuple[PersonRows, ...]) -> NDArray[np.float64]:
    """Rounds without noise, each person's vector by the query that runs on their device."""
    weights, bits = np.zeros(parameters(spec)), SeededBits(bytes(32), b"devices")
    for _ in range(spec.rounds):
        at = TrainQuery(spec=spec).at(weights)
        total = np.sum([at.encode(rows, bits) for rows in people], axis=0)
        weights = weights + total / spec.scale / len(people)
    return weights


@TARGETS
def test_a_batched_training_ends_where_the_devices_rounds_end(target: Target) -> None:
    rows, examples = studied(target)
    rows, examples = rows[:150], examples[:150]
    spec = replace(target.spec, rounds=3)
    found = targets.trained(spec, examples, strategy=FedAvg(), noise=None, seed=0)
    # Rounding draws its own chances in both: half an integer each, in the mean over people.
    near = 10 * spec.clip / targets.UNITS / math.sqrt(len(rows))
    np.testing.assert_allclose(found, by_device(spec, rows), atol=near)
    assert np.abs(found).max() > 100 * near


@TARGETS
def test_rounded_updates_keep_the_bound_that_the_price_is_reckoned_with(target: Target) -> None:
    rounding = TrainQuery(spec=target.spec).rounding
    random = np.random.default_rng(2)
    wild = random.normal(size=(2000, rounding.dimension)) * 10.0 ** random.uniform(-3, 6, (2000, 1))
    found = targets.rounded(rounding, wild, random)
    lengths = np.einsum("nd,nd->n", found, found)
    assert lengths.max() <= rounding.squared_bound
    assert lengths.max() > 0.99 * rounding.squared_bound


@TARGETS
@pytest.mark.parametrize("epsilon", [1.0, 2.0, 4.0])
def test_a_whole_training_costs_what_is_claimed(target: Target, epsilon: float) -> None:
    spec, delta = target.spec, target.delta
    assert delta <= 0.1 / len(target.everybody())
    noise = targets.noise_of(spec, epsilon=epsilon, delta=delta)
    assert targets.cost(spec, noise, delta=delta).epsilon <= epsilon
    one = cost_of(noise, TrainQuery(spec=spec).rounding.sensitivity, delta=delta)
    assert compose([one] * spec.rounds, delta=delta) == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.parametrize(("curator", "weight"), [(True, 1.0), (False, 4 / 3)])
def test_the_sum_carries_the_planned_noise_and_with_sites_a_third_more(
    *, curator: bool, weight: float
) -> None:
    """A third more of its variance, for one site that may tell the server its share."""
    people = somebody(PHQ9, 40)
    spec = replace(PHQ9.spec, rounds=1)
    noise = targets.noise_of(spec, epsilon=2.0, delta=PHQ9.delta)
    drawn = []
    for seed in range(60):
        with_it, without = (
            targets.trained(spec, people, strategy=FedAvg(), noise=one, seed=seed, curator=curator)
            for one in (noise, None)
        )
        drawn.append((with_it - without) * len(people) * spec.scale / noise.scale)
    values = np.concatenate(drawn)
    # Of a sample variance of n normal draws the deviation is √(2/n).
    assert np.mean(values**2) == pytest.approx(weight, rel=4 * math.sqrt(2 / len(values)))
    assert abs(np.mean(values)) < 4 * math.sqrt(weight / len(values))
