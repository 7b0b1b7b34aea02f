"""A canary is a person at the edge of what is allowed, and its coin is fair and kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from federated.aggregation.bits import SystemBits
from federated.errors import CheckpointError, ManifestError
from federated.learning.canaries import (
    MAX_CANARIES,
    Canaries,
    draw_canaries,
    lane_shifts,
    lane_value,
    parse_canaries,
)
from federated.learning.clipping import CountedUpdate
from federated.learning.factorisation import (
    IDENTITY,
    Factors,
    Participation,
    full_cohort,
    square_root,
)
from federated.learning.round_query import TrainQuery
from federated.learning.training_cost import stacked
from federated.model import Sensitivity
from tests.federated.learning.samples import SPECS

STUDY = bytes(range(32))
COUNTED = CountedUpdate(dimension=13)
#: Of one round's vector: every model's, and one with a joined count.
UPDATES = [*(TrainQuery(spec=spec).rounding.sensitivity for spec in SPECS), COUNTED.sensitivity]


@pytest.mark.parametrize("update", UPDATES)
def test_a_canary_is_a_person_at_the_bound_and_none_beyond(update: Sensitivity) -> None:
    value = lane_value(update)
    assert value <= update.l2 < value + 1
    assert value <= update.l1
    assert value / update.l2 > 0.999


def test_a_canary_is_within_the_largest_coordinate_that_the_modulus_is_made_for() -> None:
    for spec in SPECS:
        rounding = TrainQuery(spec=spec).rounding
        assert lane_value(rounding.sensitivity) <= rounding.bound
    assert lane_value(COUNTED.sensitivity) <= math.isqrt(
        COUNTED.rounding.squared_bound + COUNTED.weight**2
    )


def test_refuses_a_sensitivity_without_room_for_a_canary() -> None:
    with pytest.raises(ManifestError, match="scale"):
        lane_value(Sensitivity(l1=5.0, l2=0.9))


@pytest.mark.parametrize(
    ("participation", "factors"),
    [
        (full_cohort(7), IDENTITY),
        (Participation(rounds=64, most=4, gap=16), square_root(16)),
        (Participation(rounds=20, most=3, gap=5), square_root(8)),
        (Participation(rounds=9, most=9, gap=4), Factors(coefficients=(4, 2, 1))),
    ],
)
def test_all_rounds_of_a_canary_are_the_stacked_sensitivity(
    participation: Participation, factors: Factors
) -> None:
    shifts = lane_shifts(COUNTED.sensitivity, participation=participation, factors=factors)
    whole = stacked(COUNTED.sensitivity, participation=participation, factors=factors)
    assert len(shifts) == participation.rounds
    squared = sum(shift * shift for shift in shifts)
    assert squared <= whole.l2**2
    assert squared == pytest.approx(whole.l2**2, rel=1e-3)
    assert sum(shifts) <= whole.l1
    assert max(shifts) <= lane_value(COUNTED.sensitivity) * factors.row_bound(participation)


def test_a_full_cohort_adds_the_same_in_every_round() -> None:
    value = lane_value(COUNTED.sensitivity)
    assert lane_shifts(COUNTED.sensitivity, participation=full_cohort(3)) == (value,) * 3


def test_only_who_is_in_adds_and_only_on_its_lane() -> None:
    canaries = Canaries(included=np.array([True, False, True]))
    assert canaries.added(4096).tolist() == [4096, 0, 4096]
    assert canaries.added(4096).dtype == np.int64


def test_coins_are_fair_and_independent_of_place_and_of_each_other() -> None:
    drawn = np.array([draw_canaries(1000, SystemBits()).included for _ in range(400)])
    assert stats.binomtest(int(drawn.sum()), drawn.size).pvalue > 1e-6
    # Each place over draws, each half, neighbours, and draws among each other.
    places = drawn.sum(axis=0)
    assert stats.chisquare([np.sum(places <= 199), np.sum(places >= 201)]).pvalue > 1e-6
    assert np.ptp(places) < 400 * 0.35
    for one, other in (
        (drawn[:, :500], drawn[:, 500:]),
        (drawn[:, 1:], drawn[:, :-1]),
        (drawn[1:], drawn[:-1]),
    ):
        alike = int(np.sum(one == other))
        assert stats.binomtest(alike, one.size).pvalue > 1e-6


@given(count=st.integers(1, 200), data=st.data())
@settings(deadline=None, max_examples=50, derandomize=True)
def test_coins_come_back_as_they_were_and_no_byte_may_change(
    count: int, data: st.DataObject
) -> None:
    canaries = draw_canaries(count, SystemBits())
    saved = canaries.to_bytes(study=STUDY)
    assert np.array_equal(parse_canaries(saved, study=STUDY).included, canaries.included)
    changed = bytearray(saved)
    changed[data.draw(st.integers(0, len(saved) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CheckpointError):
        parse_canaries(bytes(changed), study=STUDY)
    with pytest.raises(CheckpointError):
        parse_canaries(saved[: data.draw(st.integers(0, len(saved) - 1))], study=STUDY)


def test_coins_of_another_study_are_refused() -> None:
    saved = draw_canaries(10, SystemBits()).to_bytes(study=STUDY)
    with pytest.raises(CheckpointError, match="another study"):
        parse_canaries(saved, study=bytes(32))
    with pytest.raises(ValueError, match="32 bytes"):
        draw_canaries(10, SystemBits()).to_bytes(study=b"short")


@pytest.mark.parametrize("count", [0, -1, MAX_CANARIES + 1])
def test_refuses_numbers_of_canaries_that_are_none(count: int) -> None:
    with pytest.raises(ManifestError, match="canaries"):
        draw_canaries(count, SystemBits())


@pytest.mark.parametrize("coins", [np.zeros(0, bool), np.zeros(3), np.zeros((2, 2), bool)])
def test_refuses_what_are_no_coins(coins: np.ndarray) -> None:
    with pytest.raises(ValueError, match="coins"):
        Canaries(included=coins)


def test_coins_are_not_shown_and_cannot_be_changed() -> None:
    canaries = draw_canaries(10, SystemBits())
    assert "True" not in repr(canaries)
    with pytest.raises(ValueError, match="read-only"):
        canaries.included[0] = True
