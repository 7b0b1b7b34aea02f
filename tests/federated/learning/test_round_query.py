"""What a person's device lets go of in a round of training is bounded, whatever came in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from federated.aggregation.bits import SeededBits, SystemBits
from federated.errors import ManifestError, ProtocolError
from federated.learning.clipping import AdaptiveClip
from federated.learning.evaluate import EvaluateRound
from federated.learning.examples import examples_of
from federated.learning.local import update
from federated.learning.models import parameters
from federated.learning.round_query import TrainQuery, TrainRound
from federated.learning.spec import PersonalHead, TrainSpec
from federated.model import NoisePlan, PersonRows
from tests.federated.analytics.samples import hostile_rows, person
from tests.federated.learning.samples import GRU, LINEAR, LOGISTIC, MLP, SPECS, weights_for

_SPECIAL = (np.nan, np.inf, -np.inf, 1e308, -1e308, 1e150, 5e-324, -0.0, 1.0, -1.0)
#: Coarse rounding, so that an unlucky draw often lies beyond the bound.
COARSE = tuple(
    replace(spec, clip=clip, scale=scale)
    for spec in (MLP, LOGISTIC, GRU)
    for clip, scale in ((1.0, 4.0), (0.01, 400.0), (2.0, 2.5))
)


def bits(seed: int) -> SeededBits:
    return SeededBits(seed.to_bytes(32), b"test")


def keeps(query: TrainRound | EvaluateRound, vector: NDArray[np.int64]) -> None:
    assert vector.shape == (query.dimension,)
    assert vector.dtype == np.int64
    whole = [abs(int(value)) for value in vector]
    assert max(whole) <= query.bound
    assert sum(whole) <= query.sensitivity.l1
    assert sum(value * value for value in whole) <= query.sensitivity.l2**2


@st.composite
def hostile_weights(draw: st.DrawFn) -> tuple[int, str, float]:
    """A seed, a kind, a size: made into weights of the right length by `weights_of`."""
    kind = draw(st.sampled_from(["plain", "special", "constant", "wide", "short", "matrix"]))
    return draw(st.integers(0, 2**32)), kind, draw(st.sampled_from((0.0, 0.5, 30.0, *_SPECIAL)))


def weights_of(count: int, drawn: tuple[int, str, float]) -> NDArray[np.float64]:
    seed, kind, size = drawn
    random = np.random.default_rng(seed)
    plain = random.normal(0, 1, count)
    return {
        "plain": plain,
        "special": random.choice(np.array(_SPECIAL), count),
        "constant": np.full(count, size),
        "wide": plain * 10.0 ** random.integers(-300, 300, count),
        "short": plain[:-1],
        "matrix": plain[None, :],
    }[kind]


@pytest.mark.filterwarnings("error")
@settings(deadline=None, max_examples=50)
@given(rows=hostile_rows(), drawn=hostile_weights(), seed=st.integers(0, 2**32))
@example(rows=person(1), drawn=(1, "plain", 0.0), seed=1)
def test_a_contribution_keeps_to_sensitivity_and_bound_whatever_weights_and_rows_hold(
    rows: PersonRows, drawn: tuple[int, str, float], seed: int
) -> None:
    for spec in (*SPECS, *COARSE):
        query = TrainQuery(spec=spec).at(weights_of(parameters(spec), drawn))
        keeps(query, query.encode(rows, bits(seed)))


@pytest.mark.filterwarnings("error")
@settings(deadline=None, max_examples=15)
@given(
    rows=hostile_rows(),
    drawn=hostile_weights(),
    clip=st.sampled_from((0.0, 0.5, 1e-300, *_SPECIAL)),
    seed=st.integers(0, 2**32),
)
@example(rows=person(1), drawn=(1, "plain", 0.0), clip=5e-324, seed=1)
@example(rows=person(1), drawn=(1, "plain", 0.0), clip=np.nan, seed=1)
def test_no_clip_that_comes_with_a_round_moves_what_was_paid_for(
    rows: PersonRows, drawn: tuple[int, str, float], clip: float, seed: int
) -> None:
    """Nor does it reach the canaries' places, in which nobody has anything."""
    personal = replace(LOGISTIC, personal=PersonalHead(steps=2))
    for spec in (LOGISTIC, personal, COARSE[3]):
        query = TrainQuery(spec=spec, adaptive=AdaptiveClip(), canaries=20)
        weights = weights_of(parameters(spec), drawn).reshape(-1)
        if len(weights) != parameters(spec):
            with pytest.raises(ProtocolError, match="numbers with the round"):
                query.begin(query.give(weights, clip=clip))
            continue
        asked = query.begin(query.give(weights, clip=clip))
        assert (asked.sensitivity, asked.bound) == (query.one_round, query.bound)
        vector = asked.encode(rows, bits(seed))
        keeps(asked, vector)
        assert not vector[-20:].any()


@pytest.mark.parametrize("spec", COARSE, ids=lambda spec: f"{spec.name}-{spec.clip:g}")
def test_no_unlucky_draw_of_the_rounding_passes(spec: TrainSpec) -> None:
    for seed in range(150):
        weights = weights_for(parameters(spec), seed, 2.0)
        query = TrainQuery(spec=spec).at(weights)
        keeps(query, query.encode(person(seed), bits(seed)))


def test_an_update_beyond_the_clip_is_clipped_and_one_within_is_not() -> None:
    rows = person(3)
    weights = weights_for(parameters(LOGISTIC), 1)
    change = update(LOGISTIC, weights, examples_of(LOGISTIC, rows))
    length = float(np.linalg.norm(change))
    for clip in (length / 2, length * 2):
        spec = replace(LOGISTIC, clip=clip, scale=2.0**30)
        query = TrainQuery(spec=spec).at(weights)
        found = query.encode(rows, SystemBits()) / spec.scale
        assert found == pytest.approx(change * min(1, clip / length), abs=2**-29)


def test_the_sensitivity_counts_what_rounding_adds() -> None:
    query = TrainQuery(spec=replace(MLP, scale=4.0)).at(np.zeros(parameters(MLP)))
    assert query.sensitivity.l2 > 4.0 * MLP.clip
    assert query.sensitivity == query.rounding.sensitivity
    fine = TrainQuery(spec=MLP).at(np.zeros(parameters(MLP)))
    assert fine.rounding.inflation < 1.001


def test_the_bounds_are_the_specifications_and_no_weights_change_them() -> None:
    for drawn in ((1, "plain", 0.0), (2, "special", 0.0), (3, "short", 0.0)):
        query = TrainQuery(spec=MLP).at(weights_of(parameters(MLP), drawn))
        assert query.dimension == parameters(MLP)
        assert query.sensitivity == TrainQuery(spec=MLP).rounding.sensitivity


def test_who_has_nothing_to_say_adds_nothing() -> None:
    nobody = PersonRows(days=np.empty(0, dtype=np.int64), values={})
    unknown = PersonRows(days=np.arange(3), values={"mood": np.full(3, np.nan)})
    for spec in SPECS:
        query = TrainQuery(spec=spec).at(weights_for(parameters(spec), 1))
        for rows in (nobody, unknown):
            assert not query.encode(rows, bits(0)).any()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_round_reads_the_columns_that_it_names_and_no_others(spec: TrainSpec) -> None:
    query = TrainQuery(spec=spec).at(weights_for(parameters(spec), 1))
    rows = person(1)
    only = {name: rows.values[name] for name in query.columns}
    blind = PersonRows(days=rows.days, values=only)
    assert np.array_equal(query.encode(rows, bits(2)), query.encode(blind, bits(2)))


def test_the_sum_says_the_mean_update_of_those_who_took_part() -> None:
    spec = replace(LINEAR, clip=100.0, scale=2.0**20)
    query = TrainQuery(spec=spec).at(np.zeros(parameters(spec)))
    people = [person(seed) for seed in range(8)]
    total = np.sum([query.encode(rows, bits(k)) for k, rows in enumerate(people)], axis=0)
    noise = NoisePlan(mechanism="discrete_gaussian", scale=2.0**20)
    found = query.decode(total, noise=noise, people=8, level=0.95)
    expected = np.mean([update(spec, query.weights, examples_of(spec, r)) for r in people], axis=0)
    assert found.update == pytest.approx(expected, abs=1e-5)
    assert found.deviation == pytest.approx(1 / 8)
    with pytest.raises(ValueError, match="expected 3 sums"):
        query.decode(total[:-1], noise=noise, people=8, level=0.95)
    with pytest.raises(ValueError, match="over 0"):
        query.decode(total, noise=noise, people=0, level=0.95)


def test_a_round_keeps_its_weights_to_itself() -> None:
    weights = np.zeros(parameters(LINEAR))
    query = TrainQuery(spec=LINEAR).at(weights)
    weights += 1
    assert not query.weights.any()
    assert "weights" not in repr(query)


@pytest.mark.parametrize("canaries", [-1, 1, 19, 8193])
def test_refuses_canaries_of_which_no_audit_can_be_made(canaries: int) -> None:
    with pytest.raises(ManifestError, match="canaries"):
        TrainQuery(spec=LOGISTIC, canaries=canaries)
