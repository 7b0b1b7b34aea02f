"""Clips: bounded whatever comes, and found where the true quantile is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from federated.aggregation.bits import SeededBits
from federated.aggregation.noise import sample
from federated.errors import CohortError, ManifestError
from federated.learning.clipping import AdaptiveClip, CountedUpdate, NormBins, weight_for
from federated.model import NoisePlan

_ANY = hnp.arrays(np.float64, 6, elements=st.floats(width=64))
_CHECK = settings(deadline=None, max_examples=80, derandomize=True)


def bits(label: str) -> SeededBits:
    return SeededBits(hashlib.sha256(label.encode()).digest(), b"test")


@given(update=_ANY, clip_norm=st.floats(1e-300, 1e300), weight=st.integers(1, 5000))
@_CHECK
def test_update_and_count_together_are_within_their_one_sensitivity(
    update: NDArray[np.float64], clip_norm: float, weight: int
) -> None:
    counted = CountedUpdate(dimension=6, unit=100.0, weight=weight)
    vector = [int(v) for v in counted.encode(update, clip_norm=clip_norm, random=bits("joint"))]
    assert math.sqrt(sum(v * v for v in vector)) <= counted.sensitivity.l2
    assert sum(map(abs, vector)) <= counted.sensitivity.l1
    assert max(map(abs, vector)) <= counted.bound
    assert abs(vector[-1]) == weight


def test_the_joint_sensitivity_is_not_larger_than_it_must_be() -> None:
    counted = CountedUpdate(dimension=6, unit=1000.0, weight=500)
    vector = counted.encode(np.full(6, 9.0), clip_norm=1.0, random=bits("tight"))
    assert np.linalg.norm(vector) > 0.99 * counted.sensitivity.l2
    assert counted.sensitivity.l2 == pytest.approx(math.hypot(1000, 500), rel=0.01)


@pytest.mark.parametrize("clip_norm", [math.nan, math.inf, 0.0, -1.0])
def test_sends_zeros_where_the_clip_is_none(clip_norm: float) -> None:
    counted = CountedUpdate(dimension=3)
    assert not counted.encode(np.ones(3), clip_norm=clip_norm, random=bits("none")).any()


def test_who_has_no_update_sends_zeros_and_counts_as_half_within() -> None:
    counted = CountedUpdate(dimension=2)
    nothing = counted.encode(None, clip_norm=1.0, random=bits("nobody"))
    assert not nothing.any()
    assert counted.decode(nothing, clip_norm=1.0, people=1).unclipped == 0.5


def test_the_sum_comes_back_in_units_of_the_rounds_own_clip() -> None:
    counted = CountedUpdate(dimension=2, weight=300)
    updates = [np.array([0.3, 0.4]), np.array([30.0, -40.0]), np.array([0.0, 1.0])]
    random = bits("sum")
    total = np.sum([counted.encode(u, clip_norm=2.0, random=random) for u in updates], axis=0)
    found = counted.decode(total, clip_norm=2.0, people=3)
    assert found.update == pytest.approx([0.3 + 1.2, 0.4 - 1.6 + 1.0], abs=0.003)
    assert found.unclipped == pytest.approx(2 / 3)


def test_noise_is_split_between_update_and_count_as_published() -> None:
    """Andrew et al. 2021: z_update = (z^-2 - (2·z_count)^-2)^(-1/2), counts around 1/2."""
    counted = CountedUpdate(dimension=50, weight=weight_for(50, share=0.2))
    noise = 3.0 * counted.sensitivity.l2
    for_update = noise / counted.rounding.sensitivity.l2
    for_count = noise / (2 * counted.weight)
    published = (3.0**-2 - (2 * for_count) ** -2) ** -0.5
    assert for_update == pytest.approx(published, rel=1e-6)
    assert counted.inflation == pytest.approx(math.sqrt(1 / 0.8), rel=1e-3)
    assert counted.deviation(noise, people=200) == pytest.approx(for_count / 200)


def test_a_count_of_one_per_cent_costs_half_a_per_cent() -> None:
    counted = CountedUpdate(dimension=13, weight=weight_for(13))
    assert counted.inflation == pytest.approx(1.005, abs=2e-4)
    per_person = counted.deviation(4.0 * counted.sensitivity.l2, people=500)
    assert per_person == pytest.approx(5 * 4.0 / 500, rel=0.01)


def norms(random: np.random.Generator, people: int) -> NDArray[np.float64]:
    """Lengths whose median is 1."""
    return np.exp(random.normal(0, 0.5, people))


def followed(
    start: float,
    rule: AdaptiveClip,
    *,
    multiplier: float,
    drop_outs: float,
    rounds: int = 60,
    share: Callable[[float], float] = lambda unclipped: unclipped,
) -> list[float]:
    """Clips of `rounds` rounds over 120 people, with the noise that is really added."""
    counted = CountedUpdate(dimension=3, weight=weight_for(3))
    random, source = np.random.default_rng(7), bits(f"follow {start}")
    plan = NoisePlan(
        mechanism="discrete_gaussian", scale=max(0.01, multiplier * counted.sensitivity.l2)
    )
    clips = [start]
    for _ in range(rounds):
        people = 120 - int(random.binomial(120, drop_outs))
        lengths = norms(random, people)
        total = sample(counted.dimension + 1, plan=plan, random=source)
        for length in lengths:
            update = np.array([length, 0.0, 0.0])
            total = total + counted.encode(update, clip_norm=clips[-1], random=source)
        found = counted.decode(total, clip_norm=clips[-1], people=people)
        clips.append(rule.following(clips[-1], share(found.unclipped)))
    return clips


@pytest.mark.parametrize("start", [0.1, 5.0])
@pytest.mark.parametrize(("multiplier", "drop_outs"), [(0.0, 0.0), (1.5, 0.3)])
def test_an_adaptive_clip_comes_to_the_true_quantile_from_far_off(
    start: float, multiplier: float, drop_outs: float
) -> None:
    rule = AdaptiveClip()
    clips = followed(start, rule, multiplier=multiplier, drop_outs=drop_outs)
    assert np.mean(clips[-10:]) == pytest.approx(1.0, abs=0.1)
    assert clips[-1] == pytest.approx(1.0, abs=0.2)


def test_other_quantiles_are_followed_too() -> None:
    for quantile, away in ((0.2, -0.8416), (0.8, 0.8416)):
        rule = AdaptiveClip(quantile=quantile)
        clips = followed(1.0, rule, multiplier=0.5, drop_outs=0.1)
        assert np.mean(clips[-20:]) == pytest.approx(math.exp(away * 0.5), rel=0.1)


@pytest.mark.parametrize(("start", "away"), [(0.1, 0.0003), (5.0, 1820.0)])
def test_following_those_who_were_clipped_instead_runs_away(start: float, away: float) -> None:
    """The mistake that other software makes, to show that the tests above would notice it."""
    rule = AdaptiveClip()
    clips = followed(start, rule, multiplier=0.0, drop_outs=0.0, share=lambda within: 1 - within)
    assert clips[-1] == pytest.approx(away, rel=0.2)


def test_noise_does_not_move_where_the_clip_rests() -> None:
    rule = AdaptiveClip(quantile=0.8)
    random = np.random.default_rng(1)
    moves = [math.log(rule.following(1.0, 0.8 + noise)) for noise in random.normal(0, 3.0, 100_000)]
    assert np.mean(moves) == pytest.approx(0.0, abs=0.003)
    assert max(map(abs, moves)) <= rule.rate + 1e-12


def test_a_clip_stays_within_its_bounds() -> None:
    rule = AdaptiveClip(low=0.5, high=2.0)
    assert rule.following(0.5, 1.0) == 0.5
    assert rule.following(2.0, 0.0) == 2.0
    with pytest.raises(ValueError, match="no number"):
        rule.following(1.0, math.nan)


@given(update=_ANY)
@_CHECK
def test_a_person_is_in_one_bin_whatever_the_update(update: NDArray[np.float64]) -> None:
    vector = NormBins(low=0.01, high=100.0).encode(update)
    assert vector.sum() == 1
    assert vector.max() == 1
    assert vector.min() == 0


def test_updates_fall_into_the_bins_that_hold_their_norm() -> None:
    bins = NormBins(low=1.0, high=8.0, bins=3)
    for norm, place in ((0.0, 0), (1.0, 0), (1.5, 1), (2.0, 1), (3.0, 2), (8.0, 3), (9.0, 4)):
        assert bins.encode(np.array([norm, 0.0])).argmax() == place
    assert bins.encode(np.array([math.nan, 3.0])).argmax() == 2
    assert bins.encode(np.array([1e308, 1e308])).argmax() == 4
    assert not bins.encode(None).any()


@pytest.mark.parametrize("at", [0.25, 0.5, 0.9])
def test_the_released_quantile_is_near_the_true_one_under_noise(at: float) -> None:
    bins = NormBins(low=1e-3, high=1e3)
    plan = NoisePlan(mechanism="discrete_laplace", scale=4.0)
    lengths = norms(np.random.default_rng(3), 500)
    exact = np.sum([bins.encode(np.array([one])) for one in lengths], axis=0)
    found = []
    for run in range(20):
        counts = exact + sample(bins.dimension, plan=plan, random=bits(f"bins {run}"))
        found.append(bins.quantile(counts, at=at, deviation=4 * math.sqrt(2)))
    true = float(np.quantile(lengths, at))
    assert np.mean(np.log(found)) == pytest.approx(math.log(true), abs=0.12)
    assert np.std(np.log(found)) < 0.25


def test_quantiles_beyond_the_bins_are_the_bounds() -> None:
    bins = NormBins(low=1.0, high=8.0, bins=3)
    assert bins.quantile(np.array([90, 5, 5, 0, 0]), at=0.5, deviation=0.0) == 1.0
    assert bins.quantile(np.array([0, 0, 5, 5, 90]), at=0.5, deviation=0.0) == 8.0
    assert bins.quantile(np.array([0, 0, 50, 50, 0]), at=0.5, deviation=0.0) == pytest.approx(4.0)
    # Noise makes running sums fall; the curve does not.
    assert 1 <= bins.quantile(np.array([3, 60, -9, 60, -4]), at=0.5, deviation=0.0) <= 8


def test_refuses_a_quantile_that_is_lost_in_the_noise() -> None:
    bins = NormBins(low=1.0, high=8.0, bins=3)
    with pytest.raises(CohortError, match="stand out"):
        bins.quantile(np.array([1, 2, 9, 4, 1]), at=0.5, deviation=5.0)
    with pytest.raises(ValueError, match="5 counts"):
        bins.quantile(np.zeros(4), at=0.5, deviation=1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NormBins(low=0.0, high=1.0),
        lambda: NormBins(low=2.0, high=1.0),
        lambda: NormBins(low=1.0, high=math.inf),
        lambda: NormBins(low=1.0, high=2.0, bins=0),
        lambda: CountedUpdate(dimension=0),
        lambda: CountedUpdate(dimension=1, unit=0.5),
        lambda: CountedUpdate(dimension=1, weight=0),
        lambda: AdaptiveClip(quantile=1.0),
        lambda: AdaptiveClip(rate=0.0),
        lambda: AdaptiveClip(low=0.0),
        lambda: weight_for(3, share=0.0),
    ],
)
def test_refuses_what_bounds_nothing(make: Callable[[], Any]) -> None:
    with pytest.raises(ManifestError):
        make()
