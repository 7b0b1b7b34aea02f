"""ε of a training: composition, targets met, and how far above the published references it is."""

from __future__ import annotations

import math
from typing import Any

import pytest

from federated.accounting import calibrate, compose, cost_of, reference_epsilon
from federated.errors import AccountingError
from federated.learning.clipping import CountedUpdate
from federated.learning.factorisation import (
    IDENTITY,
    Participation,
    full_cohort,
    optimised,
    square_root,
)
from federated.learning.training_cost import (
    epsilon_so_far,
    stacked,
    training_cost,
    training_noise,
)
from federated.model import NoisePlan, Sensitivity

ONE = Sensitivity(l1=1.0, l2=1.0)
UPDATE = CountedUpdate(dimension=13).sensitivity


def gaussian(scale: float) -> NoisePlan:
    return NoisePlan(mechanism="discrete_gaussian", scale=scale)


def test_full_cohort_rounds_cost_what_their_composition_costs() -> None:
    noise = gaussian(6 * UPDATE.l2)
    for rounds in (1, 7, 40):
        whole = training_cost(noise, UPDATE, participation=full_cohort(rounds), delta=1e-5)
        each = cost_of(noise, UPDATE, delta=1e-5)
        assert whole.epsilon == pytest.approx(compose([each] * rounds, delta=1e-5), rel=1e-9)
        assert whole.epsilon >= compose([each] * rounds, delta=1e-5) * (1 - 1e-12)


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0])
@pytest.mark.parametrize(
    ("participation", "bands"),
    [(full_cohort(20), 1), (Participation(rounds=64, most=4, gap=16), 16)],
)
def test_the_noise_for_a_target_meets_it_and_less_would_not(
    epsilon: float, participation: Participation, bands: int
) -> None:
    asked: dict[str, Any] = {
        "participation": participation,
        "factors": square_root(bands),
        "delta": 1e-4,
        "closeness": 1e-10,
    }
    noise = training_noise(UPDATE, epsilon=epsilon, **asked)
    assert training_cost(noise, UPDATE, **asked).epsilon <= epsilon
    less = gaussian(noise.scale * 0.999)
    assert training_cost(less, UPDATE, **asked).epsilon > epsilon


#: PLD of the continuous Gaussian, one full-cohort release at δ = 1/(10 N): (N, ε) to the noise.
REFERENCE = {
    (300, 2.0): 1.59, (300, 4.0): 0.89, (300, 8.0): 0.51,
    (1000, 2.0): 1.73, (1000, 4.0): 0.96, (1000, 8.0): 0.54,
    (5000, 2.0): 1.92, (5000, 4.0): 1.05, (5000, 8.0): 0.58,
}  # fmt: skip


@pytest.mark.parametrize(("people", "epsilon"), list(REFERENCE))
def test_the_proven_noise_is_a_little_above_the_reference(people: int, epsilon: float) -> None:
    delta = 1 / (10 * people)
    large = Sensitivity(l1=1000.0, l2=1000.0)
    for rounds in (1, 10):
        noise = training_noise(
            large, participation=full_cohort(rounds), epsilon=epsilon, delta=delta
        )
        ratio = noise.scale / 1000 / math.sqrt(rounds) / REFERENCE[people, epsilon]
        assert 1.06 < ratio < 1.11
    continuous = gaussian(REFERENCE[people, epsilon] * 1000)
    assert reference_epsilon(continuous, large, delta=delta) == pytest.approx(epsilon, rel=0.02)


def test_correlated_rounds_cost_one_release_of_the_stacked_vector() -> None:
    rule = Participation(rounds=64, most=4, gap=16)
    factors = optimised(16, rule)
    whole = stacked(UPDATE, participation=rule, factors=factors)
    expected = UPDATE.l2 * math.sqrt(4 * sum(c * c for c in factors.coefficients))
    assert whole.l2 == pytest.approx(expected)
    assert whole.l2 >= expected
    noise = training_noise(UPDATE, participation=rule, factors=factors, epsilon=2, delta=1e-4)
    assert noise.scale == calibrate("discrete_gaussian", whole, epsilon=2, delta=1e-4).scale


def test_who_takes_part_less_often_costs_less_noise() -> None:
    often, seldom = (
        training_noise(
            UPDATE, participation=Participation(rounds=64, most=most, gap=8), epsilon=2, delta=1e-4
        )
        for most in (8, 2)
    )
    assert often.scale == pytest.approx(2 * seldom.scale)


def test_progress_rises_to_the_whole_cost_and_counts_other_releases() -> None:
    rule, factors = Participation(rounds=32, most=2, gap=16), square_root(16)
    noise = training_noise(UPDATE, participation=rule, factors=factors, epsilon=2, delta=1e-4)
    asked: dict[str, Any] = {"participation": rule, "factors": factors, "delta": 1e-4}
    spent = [epsilon_so_far(noise, UPDATE, done=done, **asked) for done in range(33)]
    assert spent[0] == 0.0
    assert spent == sorted(spent)
    assert spent[1] < spent[8] < spent[17] < spent[-1]
    assert spent[1] < 0.75 * spent[-1]
    assert spent[-1] == pytest.approx(2.0, abs=1e-6)
    bins = cost_of(NoisePlan(mechanism="discrete_laplace", scale=10.0), ONE, delta=0.0)
    beside = epsilon_so_far(noise, UPDATE, done=0, others=[bins], **asked)
    assert beside == pytest.approx(0.1, rel=3e-3)
    assert spent[-1] < epsilon_so_far(noise, UPDATE, done=32, others=[bins], **asked) <= 2.1 + 1e-6


def test_closeness_counts_once_a_round() -> None:
    noise = gaussian(6 * UPDATE.l2)
    asked: dict[str, Any] = {"participation": full_cohort(10), "delta": 1e-5}
    far = training_cost(noise, UPDATE, closeness=1e-8, **asked)
    assert far.closeness == pytest.approx(1e-7)
    assert far.epsilon > training_cost(noise, UPDATE, **asked).epsilon


def test_refuses_noise_that_does_not_compose_so() -> None:
    laplace = NoisePlan(mechanism="discrete_laplace", scale=10.0)
    with pytest.raises(AccountingError, match="Gaussian"):
        training_cost(laplace, ONE, participation=full_cohort(2), factors=IDENTITY, delta=1e-5)
