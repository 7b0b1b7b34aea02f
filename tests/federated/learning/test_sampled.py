"""What sampled steps cost: beside published figures, other accountants, exact divergences."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest

from federated.errors import AccountingError
from federated.learning.sampled import sampled_epsilon, sampled_multiplier, sampled_reference

#: multiplier, rate, steps, δ.
CASES = [
    (4.0, 0.01, 10_000, 1e-5),
    (1.5, 0.04, 2250, 1e-5),
    (1.1, 256 / 60_000, 14_040, 1e-5),
    (3.35, 0.5, 40, 1.8e-4),
    (1.0, 1.0, 1, 1e-5),
]
cases = pytest.mark.parametrize(("multiplier", "rate", "steps", "delta"), CASES)


def test_the_moments_accountants_figure_is_not_exceeded() -> None:
    """Abadi et al. 2016, section 3.2: rate 0.01, noise 4, 10,000 steps, δ = 1e-5: ε ≈ 1.26."""
    found = sampled_epsilon(multiplier=4.0, rate=0.01, steps=10_000, delta=1e-5)
    assert 1.0 < found < 1.26


def test_opacus_own_figure_is_met() -> None:
    """`accountants_test.test_rdp_accountant` of 1.6: 7.32911117143, with fractional orders too."""
    found = sampled_epsilon(multiplier=1.5, rate=0.04, steps=2250, delta=1e-5)
    assert 7.32911117 <= found < 7.34


@cases
def test_the_bound_lies_between_the_reference_and_opacus_own_bound(
    multiplier: float, rate: float, steps: int, delta: float
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant  # type: ignore[import-untyped]
        from opacus.accountants.analysis import rdp  # type: ignore[import-untyped]

        prv = PRVAccountant()
        prv.history = [(multiplier, rate, steps)]
        upper = prv.get_epsilon(delta=delta)
        orders = list(range(2, 65))
        loss = rdp.compute_rdp(q=rate, noise_multiplier=multiplier, steps=steps, orders=orders)
        theirs, _ = rdp.get_privacy_spent(orders=orders, rdp=loss, delta=delta)
    ours, reference = (
        cost(multiplier=multiplier, rate=rate, steps=steps, delta=delta)
        for cost in (sampled_epsilon, sampled_reference)
    )
    # Opacus' PRV accountant says its numerical figure plus an allowance of 0.01.
    assert reference == pytest.approx(upper, abs=0.02)
    assert reference < ours < 1.15 * reference
    assert ours <= theirs * (1 + 1e-6)


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("scale", [1.0, 1.7, 6.0])
@pytest.mark.parametrize("shift", [1, 2, 5])
def test_the_discrete_mechanism_is_within_the_bound_in_both_directions(
    rate: float, scale: float, shift: int
) -> None:
    """Summed over the lattice itself, where no proof is needed: one step, any δ."""
    places = np.arange(-400, 401)
    without = np.exp(-(places**2) / (2 * scale**2))
    without /= without.sum()
    moved = np.exp(-((places - shift) ** 2) / (2 * scale**2))
    moved /= moved.sum()
    with_them = (1 - rate) * without + rate * moved
    for delta in (1e-3, 1e-6):
        epsilon = sampled_epsilon(multiplier=scale / shift, rate=rate, steps=1, delta=delta)
        for p, q in ((with_them, without), (without, with_them)):
            assert np.maximum(p - math.exp(epsilon) * q, 0).sum() <= delta


@cases
def test_the_noise_for_a_target_is_the_least_that_meets_it(
    multiplier: float, rate: float, steps: int, delta: float
) -> None:
    epsilon = sampled_epsilon(multiplier=multiplier, rate=rate, steps=steps, delta=delta)
    found = sampled_multiplier(epsilon=epsilon, delta=delta, rate=rate, steps=steps)
    assert found == pytest.approx(multiplier, rel=2e-4)
    assert sampled_epsilon(multiplier=found, rate=rate, steps=steps, delta=delta) <= epsilon


def test_sampling_never_costs_more_than_asking_everybody() -> None:
    for rate in (0.05, 0.5, 0.99):
        some = sampled_epsilon(multiplier=5.0, rate=rate, steps=30, delta=1e-5)
        assert some <= sampled_epsilon(multiplier=5.0, rate=1.0, steps=30, delta=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("multiplier", 0.0), ("multiplier", math.nan), ("rate", 0.0), ("rate", 1.1), ("steps", 0),
        ("delta", 0.0), ("delta", 1.0), ("delta", math.nan),
    ],
)  # fmt: skip
def test_refuses_what_has_no_cost(name: str, value: float) -> None:
    good: dict[str, Any] = {"multiplier": 1.0, "rate": 0.1, "steps": 10, "delta": 1e-5}
    for cost in (sampled_epsilon, sampled_reference):
        with pytest.raises(AccountingError):
            cost(**(good | {name: value}))


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_refuses_a_target_that_is_no_positive_number(epsilon: float) -> None:
    with pytest.raises(AccountingError, match="positive"):
        sampled_multiplier(epsilon=epsilon, delta=1e-5, rate=0.1, steps=10)


def test_refuses_a_target_that_no_noise_meets() -> None:
    with pytest.raises(AccountingError, match="fewer steps"):
        sampled_multiplier(epsilon=1e-9, delta=1e-12, rate=1.0, steps=100_000)
