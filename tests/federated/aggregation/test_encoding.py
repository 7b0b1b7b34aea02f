"""Clipping, rounding, modulus: bounds hold whatever comes, and sums come back."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from federated.aggregation.bits import SeededBits
from federated.aggregation.encoding import (
    Rounding,
    clip,
    from_residues,
    needed_modulus_bits,
    pack,
    to_residues,
    unpack,
    unscale,
)
from federated.aggregation.noise import sample
from federated.aggregation.schedule import noise_schedule
from federated.model import NoisePlan

_ANY = hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(width=64))
_CHECK = settings(deadline=None, max_examples=50, derandomize=True)


def bits(label: str = "encoding") -> SeededBits:
    return SeededBits(hashlib.sha256(label.encode()).digest(), b"test")


@given(vector=_ANY, order=st.sampled_from([1, 2]), norm=st.floats(1e-3, 1e6))
@_CHECK
def test_clipping_holds_whatever_the_vector(
    vector: NDArray[np.float64], order: int, norm: float
) -> None:
    clipped = clip(vector, norm=norm, order=order)
    assert np.isfinite(clipped).all()
    assert np.linalg.norm(clipped, ord=order) <= norm * (1 + 1e-12)


def test_clipping_leaves_what_is_within_the_norm_and_keeps_directions() -> None:
    vector = np.array([3.0, -4.0])
    assert np.array_equal(clip(vector, norm=5.0, order=2), vector)
    assert clip(vector, norm=1.0, order=2) == pytest.approx([0.6, -0.8])
    assert clip(vector, norm=1.0, order=1) == pytest.approx([3 / 7, -4 / 7])
    assert np.array_equal(
        clip(np.array([np.nan, np.inf, -np.inf, 1.0]), norm=1.0, order=2), [0, 0, 0, 1]
    )


@pytest.mark.parametrize(("norm", "order"), [(0.0, 2), (-1.0, 1), (math.nan, 2), (1.0, 3)])
def test_clipping_refuses_a_norm_that_is_none(norm: float, order: int) -> None:
    with pytest.raises(ValueError, match="positive norm"):
        clip(np.zeros(2), norm=norm, order=order)


@given(vector=_ANY, scale=st.floats(0.01, 1e6), beta=st.floats(0.05, 0.95))
@_CHECK
def test_a_rounded_vector_is_within_its_stated_sensitivity(
    vector: NDArray[np.float64], scale: float, beta: float
) -> None:
    rounding = Rounding(dimension=len(vector), clip_norm=1.0, scale=scale, beta=beta)
    rounded = rounding.encode(vector, bits())
    exact = [int(value) for value in rounded]
    assert sum(value * value for value in exact) <= rounding.sensitivity.l2**2
    assert sum(map(abs, exact)) <= rounding.sensitivity.l1
    assert max(map(abs, exact)) <= rounding.bound
    scaled = clip(vector, norm=1.0, order=2) * scale
    assert np.all(np.abs(rounded - scaled) <= 1)


def test_rounding_is_right_on_average() -> None:
    rounding = Rounding(dimension=4, clip_norm=10.0, scale=1.0)
    vector = np.array([0.25, -1.5, 3.9, 0.0])
    source = bits("average")
    mean = np.mean([rounding.encode(vector, source) for _ in range(2500)], axis=0)
    assert mean == pytest.approx(vector, abs=0.05)


def test_inflation_is_the_published_one_and_vanishes_with_the_scale() -> None:
    rounding = Rounding(dimension=100, clip_norm=1.0, scale=50.0)
    # 50² + 100/4 + √(2·½)·(50 + 10/2), and (50 + 10)² = 3600 is larger.
    assert rounding.squared_bound in {2580, 2581}
    assert rounding.inflation == pytest.approx(math.sqrt(2581) / 50)
    inflations = [
        Rounding(dimension=100, clip_norm=1.0, scale=float(s)).inflation for s in (10, 100, 10_000)
    ]
    assert inflations == sorted(inflations, reverse=True)
    assert inflations[-1] < 1.0002


@pytest.mark.parametrize(
    "change", [{"beta": 0.0}, {"beta": 1.0}, {"scale": 0.0}, {"scale": 1e300}, {"dimension": 0}]
)
def test_refuses_a_rounding_that_bounds_nothing(change: dict[str, Any]) -> None:
    given: dict[str, Any] = {"dimension": 3, "clip_norm": 1.0, "scale": 10.0} | change
    with pytest.raises(ValueError, match="expected beta"):
        Rounding(**given)


def test_refuses_a_vector_of_another_length() -> None:
    with pytest.raises(ValueError, match="3 coordinates"):
        Rounding(dimension=3, clip_norm=1.0, scale=10.0).encode(np.zeros(4), bits())


def test_the_reals_come_back_from_a_sum() -> None:
    rounding = Rounding(dimension=3, clip_norm=1.0, scale=1000.0)
    vectors = [np.array([0.1, -0.2, 0.3]), np.array([0.5, 0.5, -0.5])]
    total = np.sum([rounding.encode(vector, bits("sum")) for vector in vectors], axis=0)
    assert rounding.decode(total) == pytest.approx(sum(vectors), abs=0.003)


@given(
    values=hnp.arrays(np.int64, 20, elements=st.integers(-(2**62), 2**62 - 1)),
    modulus_bits=st.integers(1, 64),
)
@_CHECK
def test_residues_and_bytes_come_back(values: NDArray[np.int64], modulus_bits: int) -> None:
    half = 1 << (modulus_bits - 1)
    small = np.array([(int(v) + half) % (2 * half) - half for v in values], dtype=np.int64)
    residues = to_residues(small, modulus_bits)
    assert int(residues.max()) < 1 << modulus_bits
    data = pack(residues, modulus_bits)
    assert len(data) == 20 * -(-modulus_bits // 8)
    back = unpack(data, dimension=20, modulus_bits=modulus_bits)
    assert np.array_equal(from_residues(back, modulus_bits), small)


@pytest.mark.parametrize("data", [b"", bytes(5), bytes(7), b"\x00\x00\x00\xff\xff\xff"])
def test_refuses_packed_values_of_wrong_length_or_size(data: bytes) -> None:
    with pytest.raises(ValueError, match="expected"):
        unpack(data, dimension=2, modulus_bits=20)


@pytest.mark.parametrize("grain", [1, 2, 3, 100])
def test_granularity_is_divided_out_to_the_nearest(grain: int) -> None:
    values = np.arange(-500, 500)
    expected = np.floor(values / grain + 0.5) if grain % 2 == 0 else np.round(values / grain)
    assert np.array_equal(unscale(values, grain), expected)
    assert np.array_equal(unscale(values * grain, grain), values)


@pytest.mark.parametrize("mechanism", ["discrete_laplace", "discrete_gaussian"])
@pytest.mark.parametrize("scale", [0.5, 10.0, 5000.0])
def test_the_modulus_holds_bound_and_noise(mechanism: Any, scale: float) -> None:
    plan = NoisePlan(mechanism=mechanism, scale=scale)
    schedule = noise_schedule(plan, nodes=10, minimum_survivors=7, colluding=1)
    needed = needed_modulus_bits(bound=1000, dimension=100_000, schedule=schedule)
    grain = schedule.granularity
    drawn = np.abs(sample(100_000, plan=plan, random=bits(mechanism))).max() * grain
    room = (1 << (needed - 1)) - 1000 * grain
    # 2^-40 lies far beyond what a hundred thousand draws show, and not absurdly far.
    assert 1.5 * drawn < room
    tight = needed_modulus_bits(bound=1, dimension=1, schedule=schedule)
    assert (1 << (tight - 2)) < 80 * scale * grain + 4


def test_the_modulus_without_noise_holds_the_bound_exactly() -> None:
    for bound in (1, 2, 3, 126, 127, 2**31 - 1, 2**62):
        needed = needed_modulus_bits(bound=bound, dimension=5, schedule=None)
        assert 1 << (needed - 1) > bound
    assert needed_modulus_bits(bound=126, dimension=5, schedule=None) == 8
