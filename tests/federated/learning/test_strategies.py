"""From sums to weights: the right steps, the same after a stop, and no leak in stopping early."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from federated.errors import CheckpointError, CohortError, ManifestError
from federated.learning.factorisation import IDENTITY, combine, square_root
from federated.learning.strategies import (
    Correlated,
    FedAvg,
    FedAvgM,
    LostInNoise,
    NoMoreGain,
    Strategy,
    TrainingState,
    parse_state,
    start,
)

STUDY = hashlib.sha256(b"a study").digest()
_CHECK = settings(deadline=None, max_examples=40, derandomize=True)
STRATEGIES: list[Strategy] = [
    FedAvg(rate=0.5),
    FedAvgM(rate=0.1, momentum=0.9, average_from=3),
    FedAvgM(rate=0.1, momentum=0.5, nesterov=True),
    Correlated(inner=FedAvg(average_from=2), factors=square_root(4)),
    Correlated(inner=FedAvgM(momentum=0.7), factors=square_root(1)),
]


def totals(rounds: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(-(10**6), 10**6, (rounds, 3))


def run(strategy: Strategy, rows: NDArray[np.int64], state: TrainingState) -> TrainingState:
    for row in rows:
        state = strategy.step(state, row, people=50, unit=1 / 4096)
    return state


def test_the_mean_update_is_added_at_the_servers_rate() -> None:
    state = FedAvg(rate=0.5).step(
        start(np.array([1.0, 2.0]), clip=1.0), np.array([40, -80]), people=10, unit=0.25
    )
    assert state.weights == pytest.approx([1.5, 1.0])
    assert state.done == 1


def test_momentum_adds_up_earlier_means() -> None:
    rows = np.array([[10.0], [0.0], [20.0]])
    state = start(np.zeros(1), clip=1.0)
    seen, ahead = [], start(np.zeros(1), clip=1.0)
    for row in rows:
        state = FedAvgM(rate=2.0, momentum=0.5).step(state, row, people=10)
        ahead = FedAvgM(rate=2.0, momentum=0.5, nesterov=True).step(ahead, row, people=10)
        seen.append(float(state.weights[0]))
    # Velocities 1, 0.5, 2.25.
    assert seen == pytest.approx([2.0, 3.0, 7.5])
    # Nesterov looks one step of momentum further: 1.5, 0.25, 3.125.
    assert ahead.weights == pytest.approx([9.75])


def test_the_average_is_that_of_the_last_weights() -> None:
    state, seen = start(np.zeros(3), clip=1.0), []
    for row in totals(9):
        state = FedAvg(average_from=4).step(state, row, people=7)
        seen.append(state.weights)
        if state.done < 4:
            assert np.array_equal(state.released, state.weights)
    assert state.averaged == 6
    assert state.released == pytest.approx(np.mean(seen[3:], axis=0))


def test_correlated_sums_decode_to_the_steps_of_the_plain_ones() -> None:
    sums = totals(12)
    factors = square_root(5)
    rows = np.array([combine(list(sums[t::-1]), factors) for t in range(12)])
    for inner in (FedAvg(), FedAvgM(momentum=0.6)):
        plain = run(inner, sums, start(np.ones(3), clip=1.0))
        decoded = run(Correlated(inner=inner, factors=factors), rows, start(np.ones(3), clip=1.0))
        assert np.array_equal(decoded.weights, plain.weights)
        assert np.array_equal(decoded.recent, sums[:-5:-1])
        alone = Correlated(inner=inner, factors=IDENTITY)
        same = run(alone, sums, start(np.ones(3), clip=1.0))
        assert np.array_equal(same.weights, plain.weights)


def test_correlated_sums_decode_right_while_the_clip_changes() -> None:
    factors, sums = square_root(3), totals(6)
    rows = [combine(list(sums[t::-1]), factors) for t in range(6)]
    units = [0.5, 0.25, 0.1, 0.3, 0.2, 0.7]
    strategy = Correlated(inner=FedAvg(), factors=factors)
    state = start(np.zeros(3), clip=1.0)
    for row, unit in zip(rows, units, strict=True):
        state = strategy.step(state, row, people=10, unit=unit)
    assert state.weights == pytest.approx(np.array(units) @ sums / 10)


def test_a_lost_round_takes_nothing_from_the_others_and_comes_back_in_part() -> None:
    factors, sums = square_root(16, grain=1 << 16), totals(12)
    rows = [combine(list(sums[t::-1]), factors) for t in range(12)]
    strategy = Correlated(inner=FedAvg(), factors=factors)
    state = start(np.zeros(3), clip=1.0)
    for now, row in enumerate(rows):
        state = strategy.lost(state) if now == 5 else strategy.step(state, row, people=1)
    assert state.done == 12
    others = np.delete(sums, 5, axis=0).sum(axis=0)
    # Six rows later all but c[6] of it is there, as the root's later rows hold it.
    left = 1 - math.comb(12, 6) / 4**6
    assert state.weights == pytest.approx(others + left * sums[5], rel=1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_stopped_after_any_round_goes_on_with_the_same_numbers(strategy: Strategy) -> None:
    rows = totals(12)
    whole = run(strategy, rows, start(np.ones(3), clip=0.7))
    for stop in range(13):
        half = run(strategy, rows[:stop], start(np.ones(3), clip=0.7))
        back = parse_state(half.to_bytes(study=STUDY), study=STUDY)
        assert back.to_bytes(study=STUDY) == half.to_bytes(study=STUDY)
        assert run(strategy, rows[stop:], back).to_bytes(study=STUDY) == whole.to_bytes(study=STUDY)


def saved() -> bytes:
    return run(STRATEGIES[3], totals(5), start(np.ones(3), clip=0.7)).to_bytes(study=STUDY)


@given(place=st.integers(0, len(saved()) - 1), flip=st.integers(1, 255))
@_CHECK
def test_refuses_a_state_with_any_byte_changed(place: int, flip: int) -> None:
    data = bytearray(saved())
    data[place] ^= flip
    with pytest.raises(CheckpointError):
        parse_state(bytes(data), study=STUDY)


def test_refuses_a_state_cut_anywhere_or_with_more_behind_it() -> None:
    data = saved()
    for size in range(len(data)):
        with pytest.raises(CheckpointError):
            parse_state(data[:size], study=STUDY)
    with pytest.raises(CheckpointError):
        parse_state(data + b"\0", study=STUDY)


def test_refuses_another_studys_state() -> None:
    with pytest.raises(CheckpointError, match="another study"):
        parse_state(saved(), study=bytes(32))
    with pytest.raises(ValueError, match="32 bytes"):
        saved_state().to_bytes(study=b"short")


def saved_state() -> TrainingState:
    return parse_state(saved(), study=STUDY)


def resealed(change: Callable[[bytearray, int], None]) -> bytes:
    """A state that was altered by somebody who knows how to make the digest."""
    body = bytearray(saved()[:-32])
    change(body, len(b"havengate/training-state/v1\n") + 32)
    return bytes(body) + hashlib.sha256(body).digest()


def put(form: str, place: int, value: float) -> Callable[[bytearray, int], None]:
    return lambda body, head: struct.pack_into(form, body, head + place, value)


@pytest.mark.parametrize(
    "change",
    [
        put("<Q", 0, 2),
        put("<Q", 0, 2**63),
        put("<Q", 0, 0),
        put("<Q", 8, 2),
        put("<Q", 8, 1001),
        put("<Q", 16, 6),
        put("<Q", 24, 2**40),
        put("<d", 32, math.nan),
        put("<d", 32, -1.0),
        put("<d", 40, math.inf),
        put("<d", 112, math.nan),
    ],
)
def test_refuses_a_state_that_says_what_none_can(
    change: Callable[[bytearray, int], None],
) -> None:
    with pytest.raises(CheckpointError):
        parse_state(resealed(change), study=STUDY)


def test_nobody_can_write_to_a_state() -> None:
    weights = np.ones(3)
    state = start(weights, clip=1.0)
    weights[0] = 5.0
    assert state.weights[0] == 1.0
    for one in (state.weights, state.velocity, state.average, state_after_a_round().recent):
        with pytest.raises(ValueError, match="read-only"):
            one[0] = 2.0


def state_after_a_round() -> TrainingState:
    return run(STRATEGIES[3], totals(1), start(np.ones(3), clip=1.0))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_refuses_a_round_of_nobody_and_sums_that_are_none(strategy: Strategy) -> None:
    state = start(np.zeros(3), clip=1.0)
    with pytest.raises(CohortError, match="Nobody"):
        strategy.step(state, np.zeros(3), people=0)
    for total in (np.zeros(2), np.zeros((1, 3)), np.array([1.0, math.nan, 0.0])):
        with pytest.raises(ValueError, match="finite sums"):
            strategy.step(state, total, people=3)


def test_a_training_that_runs_away_says_so() -> None:
    state = start(np.full(1, 1e308), clip=1.0)
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="ran away"):
        FedAvg().step(state, np.array([1e308]), people=1)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": np.ones((1, 3))},
        {"velocity": np.ones(2)},
        {"recent": np.ones(3)},
        {"recent": np.ones((9, 3))},
        {"averaged": 9},
        {"clip": 0.0},
    ],
)
def test_refuses_a_state_whose_parts_do_not_fit(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        replace(saved_state(), **change)


def test_training_goes_on_while_it_gains_and_stops_when_it_does_not() -> None:
    rule = NoMoreGain(patience=3, least_gain=0.005)
    rising = [0.6 + 0.02 * k for k in range(8)]
    assert not rule.stops(rising, deviation=0.001)
    flat = [*rising, *[0.74] * 6]
    assert rule.stops(flat, deviation=0.001)
    assert rule.stops([0.7 - 0.01 * k for k in range(6)], deviation=0.001)
    assert not rule.stops(flat[:5], deviation=0.0)


def test_noise_alone_seldom_stops_a_training_that_gains() -> None:
    rule = NoMoreGain(patience=3, least_gain=0.002)
    random = np.random.default_rng(5)
    gaining = 0.6 + 0.01 * np.arange(6)
    stopped = [
        rule.stops(list(gaining + random.normal(0, 0.02, 6)), deviation=0.02) for _ in range(500)
    ]
    assert np.mean(stopped) < 0.02
    # The same scores without the noise taken into account.
    hasty = NoMoreGain(patience=3, least_gain=0.002, sureness=0.0)
    early = [
        hasty.stops(list(gaining + random.normal(0, 0.02, 6)), deviation=0.0) for _ in range(500)
    ]
    assert np.mean(early) > 0.03


def test_a_score_that_is_no_number_never_stops() -> None:
    assert not NoMoreGain(patience=1).stops([0.5, math.nan], deviation=0.0)


def test_sums_that_look_like_noise_stop_and_others_do_not() -> None:
    rule = LostInNoise(patience=4, level=0.95)
    random = np.random.default_rng(6)
    noise = [rule.stops(list(random.normal(0, 50, (4, 13))), deviation=50.0) for _ in range(400)]
    assert np.mean(noise) == pytest.approx(0.95, abs=0.03)
    signal = [rule.stops(list(random.normal(60, 50, (4, 13))), deviation=50.0) for _ in range(400)]
    assert np.mean(signal) < 0.01
    assert not rule.stops([np.zeros(13)] * 3, deviation=50.0)
    assert not rule.stops([np.zeros(13)] * 4, deviation=0.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedAvg(rate=0.0),
        lambda: FedAvg(rate=math.nan),
        lambda: FedAvg(average_from=-1),
        lambda: FedAvgM(momentum=1.0),
        lambda: FedAvgM(momentum=-0.1),
        lambda: FedAvgM(rate=math.inf),
        lambda: NoMoreGain(patience=0),
        lambda: NoMoreGain(least_gain=math.nan),
        lambda: LostInNoise(level=1.0),
        lambda: LostInNoise(patience=0),
    ],
)
def test_refuses_rules_that_go_nowhere(make: Callable[[], Any]) -> None:
    with pytest.raises(ManifestError):
        make()
