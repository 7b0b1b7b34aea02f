"""How much noise stays: never less than planned from the honest, hardly more."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from federated.aggregation.bits import SeededBits
from federated.aggregation.encoding import unscale
from federated.aggregation.schedule import SMALLEST_VARIANCE, UNARY, noise_schedule
from federated.model import NoisePlan
from tests.federated.aggregation.test_noise import bits, fits

GAUSS = NoisePlan(mechanism="discrete_gaussian", scale=3.0)
LAPLACE = NoisePlan(mechanism="discrete_laplace", scale=3.0)


@given(data=st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_honest_survivors_carry_the_planned_noise_and_at_most_a_hundredth_more(
    data: st.DataObject,
) -> None:
    nodes = data.draw(st.integers(3, 300))
    minimum = data.draw(st.integers(2 * nodes // 3 + 1, nodes))
    colluding = data.draw(st.integers(0, nodes // 6))
    schedule = noise_schedule(GAUSS, nodes=nodes, minimum_survivors=minimum, colluding=colluding)
    parts = [schedule.base, *schedule.increments]
    for survivors in range(minimum, nodes + 1):
        honest = schedule.weight(survivors) * (survivors - colluding) / survivors
        assert honest >= 1
        if nodes - minimum <= UNARY:
            assert honest == 1
        assert honest < Fraction(101, 100)
        off = sum((schedule.increments[part] for part in schedule.removed(survivors)), Fraction(0))
        assert survivors * (sum(parts) - off) == schedule.weight(survivors)
    assert schedule.removed(minimum) == ()
    assert schedule.removed(nodes) == tuple(range(len(schedule.increments)))


def test_no_survivors_below_the_minimum_are_in_the_schedule() -> None:
    schedule = noise_schedule(GAUSS, nodes=10, minimum_survivors=7, colluding=1)
    with pytest.raises(KeyError):
        schedule.removed(6)


def test_granularity_keeps_every_gaussian_share_wide() -> None:
    for nodes, minimum in ((4, 3), (30, 25), (300, 210)):
        schedule = noise_schedule(
            GAUSS, nodes=nodes, minimum_survivors=minimum, colluding=nodes // 6
        )
        smallest = min(schedule.base, *schedule.increments)
        unit = Fraction(GAUSS.scale) ** 2 * smallest
        assert unit * schedule.granularity**2 >= SMALLEST_VARIANCE
        if schedule.granularity > 1:
            assert unit * (schedule.granularity - 2) ** 2 < SMALLEST_VARIANCE
        # Ten thousand coordinates: still below 2^-80 of ε.
        assert 2 * 10_000 * schedule.log_ratio < 2.0**-80
    assert noise_schedule(LAPLACE, nodes=9, minimum_survivors=7, colluding=0).granularity == 1
    assert noise_schedule(LAPLACE, nodes=9, minimum_survivors=7, colluding=0).log_ratio == 0


@given(scale=st.floats(0.05, 50), nodes=st.integers(3, 60), value=st.integers(-(10**6), 10**6))
@settings(deadline=None, derandomize=True)
def test_taking_granularity_out_again_rounds_up_as_often_as_down(
    scale: float, nodes: int, value: int
) -> None:
    plan = NoisePlan(mechanism="discrete_gaussian", scale=scale)
    schedule = noise_schedule(plan, nodes=nodes, minimum_survivors=2 * nodes // 3 + 1, colluding=0)
    both = unscale(np.array([value, -value]), schedule.granularity)
    assert both[0] == -both[1]


@pytest.mark.parametrize(("first", "second"), [(0.5, 0.5), (1.0, 1.0), (1.0, 3.0)])
def test_the_bound_on_closeness_holds_where_it_can_be_computed(first: float, second: float) -> None:
    """The convolution lemma that `log_ratio` sums up, at variances where the ratio is visible."""
    support = np.arange(-40, 41, dtype=np.float64)

    def mass(variance: float) -> NDArray[np.float64]:
        weights: NDArray[np.float64] = np.exp(-(support**2) / (2 * variance))
        weights /= weights.sum()
        return weights

    summed = np.convolve(mass(first), mass(second))[40:-40]
    middle = slice(34, 47)
    ratio = float(np.abs(np.log(summed[middle] / mass(first + second)[middle])).max())
    bound = 5 * math.exp(-2 * math.pi**2 / (1 / first + 1 / second))
    assert 0 < ratio <= bound


@pytest.mark.parametrize("plan", [GAUSS, LAPLACE])
def test_shares_of_all_survivors_sum_to_the_planned_noise(plan: NoisePlan) -> None:
    schedule = noise_schedule(plan, nodes=5, minimum_survivors=4, colluding=0)
    total = np.zeros(40_000, dtype=np.int64)
    for node in range(4):
        for part in (-1, *schedule.kept[1]):
            total += schedule.share(part, dimension=40_000, random=bits(f"{node} {part}"))
    grain = schedule.granularity
    if plan is GAUSS:
        width = GAUSS.scale * grain
        assert fits(total, lambda k: math.exp(-k * k / (2 * width**2)), width) > 1e-3
    else:
        assert fits(total, lambda k: math.exp(-abs(k) / 3.0), 3.0) > 1e-3


def test_an_increment_is_its_seeds_and_no_other() -> None:
    schedule = noise_schedule(GAUSS, nodes=9, minimum_survivors=7, colluding=0)
    seed = bytes(32)
    first = schedule.increment(0, dimension=100, seed=seed)
    assert np.array_equal(first, schedule.increment(0, dimension=100, seed=seed))
    assert not np.array_equal(first, schedule.increment(1, dimension=100, seed=seed))
    other = schedule.share(0, dimension=100, random=SeededBits(seed, b"other"))
    assert not np.array_equal(first, other)
