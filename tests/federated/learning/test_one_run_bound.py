"""What guesses prove: published and independent values, and never more than the truth."""

from __future__ import annotations

import bisect
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from federated.errors import AccountingError
from federated.learning.one_run_bound import guesses_for, lower_bound, p_value, power
from tests.federated.learning.audit_references import REFERENCES, Counted


@pytest.mark.parametrize(("counted", "expected"), REFERENCES.items())
def test_the_bound_is_that_of_an_independent_implementation(
    counted: Counted, expected: float
) -> None:
    assert counted.bound() == pytest.approx(expected, abs=1e-3)


def test_the_papers_own_example() -> None:
    """Steinke, Nasr and Jagielski (2023), appendix D: 75 of 100 guesses among 1000 canaries."""
    bound = lower_bound(canaries=1000, guesses=100, correct=75, delta=1e-4)
    assert bound == pytest.approx(0.673, abs=5e-4)


def test_p_values_rise_with_epsilon_and_the_bound_lies_where_they_pass() -> None:
    deltas, sizes = (0.0, 1e-6, 1e-4, 1e-3, 1e-2), ((20, 20), (200, 30), (1000, 92), (1000, 506))
    for (canaries, guesses), delta in itertools.product(sizes, deltas):
        for share in (0.5, 0.65, 0.8, 0.95, 1.0):
            correct = math.ceil(share * guesses)
            found = [
                p_value(
                    canaries=canaries,
                    guesses=guesses,
                    correct=correct,
                    epsilon=epsilon,
                    delta=delta,
                )
                for epsilon in np.linspace(0, 8, 81).tolist()
            ]
            # Where it matters: up to the first that is not refuted at 95 %, and none after it is.
            refuted = [p <= 0.05 for p in found]
            first = refuted.index(False)
            assert not any(refuted[first:])
            bound = lower_bound(canaries=canaries, guesses=guesses, correct=correct, delta=delta)
            assert (first - 1) * 0.1 <= max(bound, 0) + 1e-9
            assert bound <= first * 0.1


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("guesses", [10, 100, 600])
def test_randomised_response_is_refuted_no_more_often_than_allowed(
    epsilon: float, guesses: int
) -> None:
    """The worst case of δ = 0: each coin is right with e^ε/(1 + e^ε). Computed, not simulated."""
    right = 1 / (1 + math.exp(-epsilon))
    for confidence in (0.9, 0.95):

        def above(correct: int, confidence: float = confidence) -> bool:
            bound = lower_bound(
                canaries=1000,
                guesses=guesses,
                correct=correct,
                delta=0.0,
                confidence=confidence,
            )
            return bound > epsilon

        # More that are right never prove less.
        first = bisect.bisect_left(range(guesses + 1), x=True, key=above)
        wrong = float(stats.binom.sf(first - 1, guesses, right))
        assert wrong <= 1 - confidence
        if guesses == 600:
            assert wrong > 0.5 * (1 - confidence)


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_what_delta_gives_away_is_not_held_against_epsilon(epsilon: float) -> None:
    """Coins that come out whole with probability δ, the rest by randomised response.

    That is (ε, δ)-private, and guessing what came out is right more often than ε alone allows.
    """
    random, canaries, guesses, delta = np.random.default_rng(7), 1000, 20, 0.01
    right = 1 / (1 + math.exp(-epsilon))
    wrong = naive = 0
    for _ in range(400):
        whole = min(guesses, int(random.binomial(canaries, delta)))
        correct = whole + int(random.binomial(guesses - whole, right))
        counted = {"canaries": canaries, "guesses": guesses, "correct": correct}
        wrong += lower_bound(**counted, delta=delta) > epsilon
        naive += lower_bound(**counted, delta=0.0) > epsilon
    assert wrong <= stats.binom.ppf(0.999, 400, 0.05)
    assert naive > 60


def test_nothing_is_proven_by_nothing() -> None:
    assert lower_bound(canaries=100, guesses=0, correct=0, delta=0.0) == 0.0
    assert lower_bound(canaries=100, guesses=50, correct=0, delta=0.0) == 0.0
    assert lower_bound(canaries=100, guesses=50, correct=25, delta=1e-5) == 0.0
    assert lower_bound(canaries=5, guesses=4, correct=4, delta=0.0) == 0.0


def test_more_confidence_and_more_delta_prove_less() -> None:
    counted = {"canaries": 1000, "guesses": 100, "correct": 90}
    bounds = [lower_bound(**counted, delta=delta) for delta in (0.0, 1e-5, 1e-4, 1e-3)]
    assert bounds == sorted(bounds, reverse=True)
    assert len(set(bounds)) == 4
    sure = [lower_bound(**counted, delta=1e-5, confidence=c) for c in (0.8, 0.95, 0.999)]
    assert sure == sorted(sure, reverse=True)


def test_the_number_of_guesses_is_a_rule_of_public_numbers() -> None:
    for canaries in (2, 3, 10, 101, 1000):
        for epsilon in (0.5, 4.0):
            guesses = guesses_for(canaries, epsilon=epsilon, delta=1e-5)
            assert 2 <= guesses <= canaries
            assert guesses % 2 == 0
            assert guesses == guesses_for(canaries, epsilon=epsilon, delta=1e-5)
    few, many = (guesses_for(1000, epsilon=epsilon, delta=1e-4) for epsilon in (1.0, 4.0))
    assert few < many


@pytest.mark.parametrize("share", [1.0, 1 / 3])
def test_expected_bounds_are_those_of_simulated_audits(share: float) -> None:
    random, runs = np.random.default_rng(3), 60
    told = power(500, epsilon=2.0, delta=1e-4, noise_share=share)
    distance = 1 / 1.894 / share
    bounds = []
    for _ in range(runs):
        coins = random.random(500) < 0.5
        order = np.argsort(random.normal(size=500) + distance * coins)
        half = told.guesses // 2
        correct = int(coins[order[-half:]].sum() + (~coins[order[:half]]).sum())
        bounds.append(lower_bound(canaries=500, guesses=told.guesses, correct=correct, delta=1e-4))
    error = 4 * float(np.std(bounds)) / math.sqrt(runs)
    assert abs(float(np.mean(bounds)) - told.expected_bound) < error
    spread = 4 * math.sqrt(told.chance * (1 - told.chance) / runs) + 0.02
    assert abs(float(np.mean(np.array(bounds) > 2.0)) - told.chance) < spread


def test_a_thousand_canaries_find_out_a_third_of_the_noise_and_refute_no_honest_claim() -> None:
    for epsilon in (1.0, 2.0, 4.0):
        honest = power(1000, epsilon=epsilon, delta=1e-4)
        third = power(1000, epsilon=epsilon, delta=1e-4, noise_share=1 / 3)
        assert 0.1 < honest.expected_bound < epsilon
        assert honest.chance < 1e-3
        assert third.expected_bound > epsilon
        assert third.chance > 0.8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"correct": 11}, "as many correct"),
        ({"guesses": 101}, "as many correct"),
        ({"correct": -1}, "as many correct"),
        ({"delta": 1.0}, "δ"),
        ({"delta": -0.1}, "δ"),
        ({"confidence": 1.0}, "confidence"),
        ({"confidence": 0.0}, "confidence"),
    ],
)
def test_refuses_counts_and_parameters_that_no_audit_has(
    changed: dict[str, float], message: str
) -> None:
    asked = {"canaries": 100, "guesses": 10, "correct": 5, "delta": 0.0} | changed
    with pytest.raises(ValueError, match=message):
        lower_bound(**asked)  # type: ignore[arg-type]


def test_refuses_a_rule_without_canaries_and_power_without_noise() -> None:
    with pytest.raises(ValueError, match="2 canaries"):
        guesses_for(1, epsilon=1.0, delta=1e-5)
    with pytest.raises(AccountingError, match="δ above 0"):
        guesses_for(100, epsilon=1.0, delta=0.0)
    with pytest.raises(ValueError, match="share"):
        power(100, epsilon=1.0, delta=1e-5, noise_share=0.0)
    with pytest.raises(ValueError, match="ε"):
        p_value(canaries=10, guesses=5, correct=4, epsilon=-1.0, delta=0.0)
