"""Banded factors: what a person can move, how far sums are off, and that nothing is lost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from federated.errors import ManifestError
from federated.learning.factorisation import (
    IDENTITY,
    Factors,
    Participation,
    combine,
    decode,
    decode_next,
    error,
    full_cohort,
    least_error,
    numeric_error,
    optimised,
    root_coefficients,
    square_root,
)

_CHECK = settings(deadline=None, max_examples=60, derandomize=True)
_FALLING = st.lists(st.integers(1, 64), min_size=0, max_size=5).map(
    lambda rest: Factors(coefficients=(64, *sorted(rest, reverse=True)))
)


def matrix(factors: Factors, rounds: int) -> NDArray[np.int64]:
    square = np.zeros((rounds, rounds), dtype=np.int64)
    for lag, factor in enumerate(factors.coefficients[:rounds]):
        square += np.diag(np.full(rounds - lag, factor), -lag)
    return square


def patterns(rule: Participation) -> Iterator[tuple[int, ...]]:
    """All sets of rounds in which one person may take part."""
    for count in range(rule.most + 1):
        for rounds in itertools.combinations(range(rule.rounds), count):
            gaps = (after - before for before, after in itertools.pairwise(rounds))
            if all(gap >= rule.gap for gap in gaps):
                yield rounds


@given(factors=_FALLING, rounds=st.integers(1, 8), most=st.integers(1, 4), gap=st.integers(1, 5))
@_CHECK
def test_sensitivity_is_the_largest_over_all_patterns_of_participation(
    factors: Factors, rounds: int, most: int, gap: int
) -> None:
    rule = Participation(rounds=rounds, most=most, gap=gap)
    square = matrix(factors, rounds)
    moved = [square[:, list(chosen)].sum(axis=1) for chosen in patterns(rule)]
    assert factors.squared_sensitivity(rule) == max(int(one @ one) for one in moved)


@given(
    factors=_FALLING,
    gap=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    width=st.integers(1, 3),
)
@_CHECK
def test_missed_rounds_late_joining_and_lost_pasts_never_raise_the_sensitivity(
    factors: Factors, gap: int, seed: int, width: int
) -> None:
    rule = Participation(rounds=7, most=3, gap=gap)
    random = np.random.default_rng(seed)
    bound = factors.squared_sensitivity(rule)
    square = matrix(factors, rule.rounds)
    for chosen in patterns(rule):
        if not chosen:
            continue
        columns = square[:, list(chosen)]
        # Any rows of any update may be missing: never sent, or forgotten by the device.
        masked = columns * random.integers(0, 2, columns.shape)
        vectors = random.normal(size=(len(chosen), width))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        assert float(np.sum((masked @ vectors) ** 2)) <= bound * (1 + 1e-12)


def test_columns_that_are_bands_apart_share_no_row() -> None:
    factors = square_root(4)
    rule = Participation(rounds=16, most=4, gap=4)
    assert factors.squared_sensitivity(rule) == 4 * sum(c * c for c in factors.coefficients)
    # What comes after the last round is cut off.
    short = Participation(rounds=5, most=2, gap=4)
    first = sum(c * c for c in factors.coefficients)
    assert factors.squared_sensitivity(short) == first + factors.coefficients[0] ** 2


def test_closer_participation_costs_more() -> None:
    factors = square_root(8)
    costs = [
        factors.squared_sensitivity(Participation(rounds=64, most=8, gap=gap))
        for gap in (8, 4, 2, 1)
    ]
    assert costs == sorted(costs)
    assert costs[-1] > 3 * costs[0]


def test_a_device_holds_itself_to_the_participation_that_was_declared() -> None:
    rule = Participation(rounds=20, most=3, gap=5)
    assert rule.admits((), 7)
    assert rule.admits((2,), 7)
    assert not rule.admits((3,), 7)
    assert not rule.admits((0, 5, 10), 15)
    assert not rule.admits((7,), 7)
    assert not rule.admits((10,), 2)
    assert not rule.admits((), 20)
    assert not rule.admits((), -1)


@given(data=st.data(), most=st.integers(1, 4), gap=st.integers(1, 5))
@_CHECK
def test_whatever_a_device_asks_for_what_is_admitted_is_a_pattern(
    data: st.DataObject, most: int, gap: int
) -> None:
    rule = Participation(rounds=9, most=most, gap=gap)
    taken: list[int] = []
    for now in data.draw(st.permutations(range(9))):
        if rule.admits(taken, now):
            taken.append(now)
    assert tuple(sorted(taken)) in set(patterns(rule))


def test_the_error_of_the_square_root_is_the_published_one() -> None:
    """Fichtenberger, Henzinger, Upadhyay 2023: the sum over j < n of (C(2j, j)/4^j)².

    These are Landau's constants: 1, 5/4, 89/64, 381/256, … (Watson 1930), near
    (ln n + Euler's constant + ln 16)/π.
    """
    published = {1: 1.0, 2: 5 / 4, 3: 89 / 64, 4: 381 / 256}
    for rounds in (1, 2, 3, 4, 16, 64, 256, 1000):
        once = Participation(rounds=rounds, most=1)
        found = numeric_error(root_coefficients(rounds), once, goal="max")
        exact = sum((math.comb(2 * j, j) / 4**j) ** 2 for j in range(rounds))
        assert found == pytest.approx(exact, rel=1e-12)
        assert found == pytest.approx(published.get(rounds, found), rel=1e-12)
        if rounds >= 16:
            near = (math.log(rounds) + np.euler_gamma + math.log(16)) / math.pi
            assert found == pytest.approx(near, abs=0.1 / rounds)


def test_the_square_root_is_the_root_of_the_running_sum() -> None:
    root = root_coefficients(50)
    assert np.convolve(root, root)[:50] == pytest.approx(np.ones(50))


def test_no_factorisation_is_below_the_least_error_and_the_best_is_near_it() -> None:
    for rounds in (2, 16, 64, 256):
        once = Participation(rounds=rounds, most=1)
        running = np.tril(np.ones((rounds, rounds)))
        nuclear = float(np.linalg.svd(running, compute_uv=False).sum())
        assert least_error(rounds) == pytest.approx(nuclear / rounds)
        root = numeric_error(root_coefficients(rounds), once)
        assert least_error(rounds) < root < 1.12 * least_error(rounds)


def test_optimising_finds_the_square_root_where_it_is_proven_the_best() -> None:
    """Dvijotham et al. 2024: of all Toeplitz factors it has the smallest `max` error."""
    once = Participation(rounds=24, most=1)
    found = optimised(24, once, goal="max", grain=1 << 16)
    assert found.scaled == pytest.approx(root_coefficients(24), abs=3e-3)
    best = numeric_error(root_coefficients(24), once, goal="max")
    assert best * (1 - 1e-9) <= error(found, once, goal="max") <= best * (1 + 1e-4)


def test_optimising_is_never_worse_than_the_square_root_it_starts_from() -> None:
    rule = Participation(rounds=64, most=4, gap=16)
    for goal, momentum in itertools.product(("rms", "max"), (0.0, 0.9)):
        asked: dict[str, Any] = {"goal": goal, "momentum": momentum}
        found = error(optimised(16, rule, **asked), rule, **asked)
        assert found <= error(square_root(16), rule, **asked) * (1 + 1e-4)
        assert found < 0.7 * error(IDENTITY, rule, **asked)


def test_the_gradient_that_the_optimiser_gets_is_that_of_the_loss() -> None:
    from scipy.optimize import check_grad

    from federated.learning.factorisation import _Task, _workload

    for goal, gap in (("rms", 3), ("max", 1)):
        rule = Participation(rounds=12, most=3, gap=gap)
        task = _Task(rule, _workload(12, 0.5), goal)  # type: ignore[arg-type]
        start = np.array([0.3, -0.2, 1.0, 2.0])
        off = check_grad(lambda x, t=task: t.loss(x)[0], lambda x, t=task: t.loss(x)[1], start)
        assert off < 1e-5


def test_errors_are_those_of_the_matrices() -> None:
    rule = Participation(rounds=20, most=2, gap=7)
    factors = optimised(5, rule, momentum=0.5)
    square = matrix(factors, 20) / factors.coefficients[0]
    weights = np.array([(1 - 0.5 ** (s + 1)) / 0.5 for s in range(20)])
    work = np.array([[weights[t - s] if t >= s else 0.0 for s in range(20)] for t in range(20)])
    rows = np.linalg.norm(work @ np.linalg.inv(square), axis=1)
    moved = math.sqrt(factors.squared_sensitivity(rule)) / factors.coefficients[0]
    assert error(factors, rule, momentum=0.5) == pytest.approx(moved * math.sqrt(np.mean(rows**2)))
    assert error(factors, rule, goal="max", momentum=0.5) == pytest.approx(moved * max(rows))


def tree_error(rounds: int) -> float:
    """`max` error of the binary tree: a running sum adds one node for each binary digit."""
    levels = rounds.bit_length()
    return math.sqrt(levels * max(count.bit_count() for count in range(1, rounds + 1)))


def test_the_binary_tree_is_far_worse_and_independent_noise_worst() -> None:
    for rounds in (64, 256, 1000):
        once = Participation(rounds=rounds, most=1)
        root = numeric_error(root_coefficients(rounds), once, goal="max")
        assert tree_error(rounds) > 2.4 * root
        assert error(IDENTITY, once, goal="max") == pytest.approx(math.sqrt(rounds))
        assert error(IDENTITY, once, goal="max") > 3 * root


def test_correlating_gains_nothing_where_everybody_is_in_every_round() -> None:
    everybody = full_cohort(20)
    alone = error(IDENTITY, everybody)
    assert alone == pytest.approx(20 * math.sqrt(21 / 40))
    assert error(optimised(20, everybody), everybody) > alone * (1 - 1e-3)
    assert error(square_root(20), everybody) > alone


def test_whole_numbers_cost_next_to_nothing() -> None:
    rule = Participation(rounds=64, most=4, gap=16)
    exact = numeric_error(root_coefficients(16), rule)
    for grain, most in ((64, 1.002), (1024, 1.0001)):
        assert error(square_root(16, grain=grain), rule) < most * exact


@given(factors=_FALLING, rounds=st.integers(1, 12), seed=st.integers(0, 2**32))
@_CHECK
def test_what_was_combined_is_decoded_exactly(factors: Factors, rounds: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    sums = random.integers(-(2**40), 2**40, (rounds, 3))
    sent = np.array([combine(list(sums[t::-1]), factors) for t in range(rounds)])
    assert np.array_equal(sent, matrix(factors, rounds) @ sums)
    assert np.array_equal(decode(sent, factors), sums)


def test_decoding_row_by_row_needs_only_the_last_bands() -> None:
    factors = square_root(4)
    rows = np.random.default_rng(1).normal(size=(30, 2)) * 1000
    whole = decode(rows, factors)
    assert matrix(factors, 30) @ whole == pytest.approx(rows)
    for now in range(30):
        recent = whole[max(0, now - 3) : now][::-1]
        assert np.array_equal(decode_next(rows[now], recent, factors), whole[now])


def test_decoding_never_blows_up() -> None:
    for coefficients in ((8, 8, 8), (4, 4, 1, 1), square_root(64).coefficients, (64, 63, 62)):
        factors = Factors(coefficients=coefficients)
        pulse = np.zeros((1000, 1))
        pulse[0] = factors.coefficients[0]
        assert np.max(np.abs(decode(pulse, factors))) <= 3


def test_devices_that_send_without_their_past_are_in_the_sum_at_first_and_fade() -> None:
    factors = square_root(16, grain=1 << 12)
    update = np.array([1 << 20])
    kept = np.zeros((16, 1))
    kept[0] = combine([update], factors)
    running = np.cumsum(decode(kept, factors)) / update[0]
    # A·C⁻¹ = C for the root: what is left after so many rounds is the root's own coefficient.
    assert running == pytest.approx(root_coefficients(16), abs=1e-3)


@pytest.mark.parametrize(
    "past",
    [
        [],
        [np.zeros(2, dtype=np.int64), np.zeros(3, dtype=np.int64)],
        [np.array([2**50])],
        [np.array([-(2**63)])],
    ],
)
def test_refuses_to_combine_what_could_not_be_decoded(past: list[NDArray[np.int64]]) -> None:
    with pytest.raises(ValueError, match="expected"):
        combine(past, Factors(coefficients=(64, 32)))


@pytest.mark.parametrize(
    "coefficients", [(), (0,), (2, 4), (3, 1), (4, 0), (4, -1), (4.0, 2), (1 << 20,), (True,)]
)
def test_refuses_factors_whose_sensitivity_is_not_known(coefficients: Any) -> None:
    with pytest.raises(ManifestError):
        Factors(coefficients=coefficients)


@pytest.mark.parametrize("change", [{"rounds": 0}, {"most": 0}, {"gap": 0}])
def test_refuses_a_participation_that_says_nothing(change: dict[str, int]) -> None:
    with pytest.raises(ManifestError):
        Participation(**({"rounds": 3, "most": 2, "gap": 1} | change))


def test_refuses_momentum_that_never_ends() -> None:
    with pytest.raises(ManifestError):
        error(IDENTITY, full_cohort(3), momentum=1.0)


def test_a_rows_bound_holds_for_every_row() -> None:
    factors = square_root(6)
    for rule in (Participation(rounds=12, most=3, gap=2), full_cohort(12)):
        square = matrix(factors, 12)
        largest = max(
            int(square[:, list(one)].sum(axis=1).max(initial=0)) for one in patterns(rule)
        )
        assert factors.row_bound(rule) == largest
