"""Training by turns: whose turn it is, what is sent, and that it keeps to what was paid for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from federated.aggregation.bits import SeededBits
from federated.errors import ManifestError
from federated.learning.canaries import lane_shifts
from federated.learning.clipping import AdaptiveClip
from federated.learning.declare import complete, declaration_of, learning_from
from federated.learning.factorisation import (
    Factors,
    decode,
    error,
    running_noise,
    square_root,
)
from federated.learning.plan import plan_training
from federated.learning.round_query import CarriedRound, TrainQuery, TrainRound
from federated.learning.spec import Feature, Label, TrainSpec
from federated.learning.strategies import Correlated, LostInNoise, start
from federated.learning.turns import Turns
from federated.learning.words import training_lines
from federated.model import Carried, PersonRows, Whole
from tests.federated.analytics.samples import QUERIES

SPEC = TrainSpec(
    name="mood",
    features=(Feature(column="sleep_hours", low=4.0, high=10.0),),
    label=Label(column="mood", low=-6.0, high=6.0, below=0.0),
    rounds=12,
    clip=0.5,
)
TURNS = Turns(gap=4, factors=square_root(6).coefficients)
QUERY = TrainQuery(spec=SPEC, turns=TURNS)
DECLARED: Mapping[str, Any] = {
    "kind": "train",
    "name": "mood",
    "features": [{"column": "sleep_hours"}],
    "label": {"column": "mood", "below": 0.0},
    "rounds": 12,
}

type Vector = NDArray[np.int64]


def round_at(index: int, query: TrainQuery = QUERY) -> CarriedRound:
    found = query.at(np.zeros(2), index=index)
    assert isinstance(found, CarriedRound)
    return found


def person(seed: int) -> PersonRows:
    drawn = np.random.default_rng(seed)
    sleep = drawn.uniform(4.0, 10.0, 10)
    return PersonRows(
        days=np.arange(10), values={"sleep_hours": sleep, "mood": np.clip(sleep - 7.0, -6.0, 6.0)}
    )


def sent_by(
    brought: Mapping[int, Vector], *, forgotten: Mapping[int, set[int]], query: TrainQuery = QUERY
) -> list[Vector]:
    """All rows of a person who brings these, and in each round has forgotten some of them."""
    rows, kept = [], dict[int, Vector]()
    for index in range(query.rounds):
        at = round_at(index, query)
        for lost in forgotten.get(index, ()):
            kept.pop(lost, None)
        if index in brought:
            kept[index] = brought[index]
        rows.append(at.combined(kept))
        kept = dict(at.needed(kept))
    return rows


# --- Whose turn it is -----------------------------------------------------------------------------


def test_everybody_has_a_turn_once_in_a_gap_and_all_rounds_have_some() -> None:
    turns = Turns(gap=8, factors=(4, 2, 1))
    share = np.zeros(64)
    for number in range(2000):
        mine = [
            index
            for index in range(64)
            if turns.has_turn(study="s", tag=f"person-{number}", index=index)
        ]
        assert len(mine) == 8
        assert {after - before for before, after in pairwise(mine)} == {8}
        rule = turns.participation(64)
        assert all(rule.admits(mine[:place], now) for place, now in enumerate(mine))
        share[mine] += 1 / 2000
    # Binomial: five deviations around an eighth.
    assert np.abs(share - 1 / 8).max() < 5 * np.sqrt(1 / 8 * 7 / 8 / 2000)


def test_a_turn_depends_on_study_and_tag_and_is_not_who_is_held_out() -> None:
    def phases(study: str) -> list[int]:
        return [
            next(i for i in range(4) if TURNS.has_turn(study=study, tag=f"p{k}", index=i))
            for k in range(400)
        ]

    assert phases("a") == phases("a") != phases("b")
    held = [not round_at(0).asks(study="a", tag=f"p{k}") for k in range(400)]
    shares = [
        np.mean([h for h, p in zip(held, phases("a"), strict=True) if p == k]) for k in range(4)
    ]
    assert max(shares) - min(shares) < 0.25


# --- What is sent ---------------------------------------------------------------------------------


def test_a_training_by_turns_is_carried_and_others_are_not() -> None:
    assert isinstance(round_at(3), Carried)
    plain = TrainQuery(spec=SPEC).at(np.zeros(2), index=3)
    assert not isinstance(plain, Carried)
    assert type(plain) is TrainRound
    for query in QUERIES:
        asked = query.begin(b"")
        assert not isinstance(asked, Carried | Whole)


def test_without_noise_decoding_gives_what_people_newly_brought() -> None:
    drawn = np.random.default_rng(1)
    totals = np.zeros((QUERY.rounds, 2), dtype=np.int64)
    rows = np.zeros_like(totals)
    for number in range(40):
        phase = int(drawn.integers(4))
        brought = {
            index: round_at(index).encode(person(number), SeededBits(bytes([number]) * 32, b"x"))
            for index in range(phase, QUERY.rounds, 4)
        }
        for index, vector in brought.items():
            totals[index] += vector
        rows += np.array(sent_by(brought, forgotten={}))
    assert np.abs(totals).sum() > 0
    assert np.array_equal(decode(rows, QUERY.factors), totals)


def test_only_what_later_rounds_send_is_to_be_kept() -> None:
    vector = np.ones(2, dtype=np.int64)
    # Six bands: what was brought five rounds ago is sent for the last time.
    assert set(round_at(8).needed({2: vector, 3: vector, 4: vector, 8: vector})) == {4, 8}
    assert set(round_at(4).needed({0: vector, 4: vector, 9: vector})) == {0, 4}
    assert round_at(11).needed({8: vector, 11: vector}) == {}
    alone = replace(QUERY, turns=Turns(gap=4, factors=(1024,)))
    assert round_at(3, alone).needed({3: vector}) == {}


@given(
    phase=st.integers(0, 3),
    away=st.sets(st.integers(0, 11)),
    silent=st.sets(st.integers(0, 11)),
    lost=st.dictionaries(st.integers(0, 11), st.sets(st.integers(0, 11)), max_size=6),
    signs=st.lists(st.sampled_from([-1, 1]), min_size=12, max_size=12),
)
def test_whoever_misses_rounds_or_forgets_stays_within_what_was_paid_for(
    phase: int, away: set[int], silent: set[int], lost: dict[int, set[int]], signs: list[int]
) -> None:
    """The worst updates there are, in whichever turns, and any of what is kept lost at any time."""
    largest = QUERY.rounding.squared_bound
    brought = {
        index: np.array([signs[index] * int(np.sqrt(largest)), 0], dtype=np.int64)
        for index in range(phase, QUERY.rounds, 4)
        if index not in away
    }
    rows = np.array(
        [
            row if index not in away | silent else np.zeros(2, dtype=np.int64)
            for index, row in enumerate(sent_by(brought, forgotten=lost))
        ]
    )
    assert np.linalg.norm(rows) <= QUERY.sensitivity.l2
    assert np.abs(rows).sum() <= QUERY.sensitivity.l1
    assert np.abs(rows).max(initial=0) <= QUERY.bound


def test_the_bound_is_reached_and_a_turn_too_many_breaks_it() -> None:
    length = int(np.sqrt(QUERY.rounding.squared_bound))
    vector = np.array([length, 0], dtype=np.int64)
    worst = np.array(sent_by(dict.fromkeys(range(0, 12, 4), vector), forgotten={}))
    assert np.linalg.norm(worst) > 0.99 * QUERY.sensitivity.l2 * length / QUERY.one_round.l2
    more = np.array(sent_by(dict.fromkeys(range(12), vector), forgotten={}))
    assert np.linalg.norm(more) > QUERY.sensitivity.l2


def test_rounds_that_come_out_of_order_stay_within_it_too() -> None:
    length = int(np.sqrt(QUERY.rounding.squared_bound))
    drawn = np.random.default_rng(3)
    for _ in range(50):
        kept, rows = dict[int, Vector](), []
        for index in drawn.permutation(QUERY.rounds).tolist():
            at = round_at(index)
            if index % 4 == 1:
                kept[index] = np.array([length, 0], dtype=np.int64)
            rows.append(at.combined(kept))
            kept = dict(at.needed(kept))
        assert np.linalg.norm(np.array(rows)) <= QUERY.sensitivity.l2


def test_a_canary_is_no_larger_than_a_person_can_be() -> None:
    shifts = lane_shifts(QUERY.one_round, participation=QUERY.participation, factors=QUERY.factors)
    assert len(shifts) == QUERY.rounds
    assert np.linalg.norm(shifts) <= QUERY.sensitivity.l2
    assert np.linalg.norm(shifts) > 0.99 * QUERY.sensitivity.l2


# --- What is declared -----------------------------------------------------------------------------


def test_turns_survive_a_declaration_and_are_said_in_words() -> None:
    declared = declaration_of(QUERY)
    assert declared["turns"] == {"gap": 4, "factors": list(TURNS.factors)}
    assert learning_from(declared) == QUERY
    words = dict(training_lines(QUERY))["turns"]
    assert all(str(number) in words for number in (4, 6, *TURNS.factors))


def test_a_draft_says_how_many_and_the_best_factors_are_declared() -> None:
    (found,) = complete([{**DECLARED, "turns": {"gap": 4, "bands": 6}}])
    query = learning_from(found)
    assert isinstance(query, TrainQuery)
    assert query.turns is not None
    assert len(query.turns.factors) == 6
    assert error(query.factors, query.participation) <= error(square_root(6), query.participation)
    assert complete([found]) == [found]
    # More bands than rounds are as many as there are rounds.
    (long,) = complete([{**DECLARED, "turns": {"gap": 4, "bands": 100}}])
    assert len(long["turns"]["factors"]) == 12


def test_momentum_has_factors_of_its_own() -> None:
    strategy = {"kind": "fedavgm", "momentum": 0.9}
    turns = {"gap": 4, "bands": 6}
    (plain,) = complete([{**DECLARED, "turns": turns}])
    (momentum,) = complete([{**DECLARED, "turns": turns, "strategy": strategy}])
    assert plain["turns"] != momentum["turns"]


@pytest.mark.parametrize(
    "turns",
    [
        {"gap": 0, "factors": [1]},
        {"gap": 13, "factors": [1]},
        {"gap": 4, "factors": []},
        {"gap": 4, "factors": [3, 1]},
        {"gap": 4, "factors": [2, 4]},
        {"gap": 4, "factors": [2, 1.5]},
        {"gap": 4, "factors": [2, 0]},
        {"gap": 4},
        {"gap": 4, "factors": [1], "most": 3},
        {"gap": 4, "bands": 6, "factors": [1]},
        {"gap": 4, "bands": 0},
        {"gap": 4, "bands": True},
        {"gap": 4, "bands": 10**9},
        {"gap": 13, "bands": 2},
        [],
        "all",
    ],
)
def test_turns_that_cannot_be_are_refused(turns: object) -> None:
    with pytest.raises(ManifestError):
        learning_from(complete([{**DECLARED, "turns": turns}])[0])


def test_what_reads_sums_of_independent_noise_does_not_go_with_turns() -> None:
    for other in ({"adaptive": AdaptiveClip(quantile=0.5)}, {"stop": LostInNoise()}):
        with pytest.raises(ManifestError, match="independent"):
            TrainQuery(spec=SPEC, turns=TURNS, **other)


def test_updates_too_large_to_take_apart_are_refused() -> None:
    large = replace(SPEC, clip=1.0, scale=2.0**39)
    TrainQuery(spec=large)
    with pytest.raises(ManifestError, match="too large"):
        TrainQuery(spec=large, turns=Turns(gap=1, factors=(1 << 16,) * 6))


# --- What it costs --------------------------------------------------------------------------------


def test_a_plan_costs_what_the_stacked_rows_do() -> None:
    plan = plan_training(QUERY, epsilon=2.0, delta=1e-5, people=300)
    assert plan.cost.sensitivity == QUERY.sensitivity
    assert 1.9 < plan.cost.epsilon <= 2.0
    # Three turns instead of twelve rounds: a full cohort needs four times the variance, but each
    # row is larger by the first factor, and has more rounds in it.
    everybody = plan_training(TrainQuery(spec=SPEC), epsilon=2.0, delta=1e-5, people=300)
    norm = np.sqrt(QUERY.factors.squared_sensitivity(QUERY.participation))
    assert plan.noise.scale / everybody.noise.scale == pytest.approx(norm / np.sqrt(12), rel=1e-3)


def test_a_plan_says_how_loud_the_running_sum_will_be() -> None:
    """As loud as noise that is really drawn and decoded, which noise of single rounds is not."""
    (expected,) = plan_training(QUERY, epsilon=2.0, delta=1e-5, people=300).expected
    noise = plan_training(QUERY, epsilon=2.0, delta=1e-5, people=300).noise
    drawn = np.random.default_rng(5)
    sums = []
    for _ in range(400):
        rows = np.rint(drawn.normal(0.0, noise.scale, (QUERY.rounds, 2)))
        sums.append(decode(rows, QUERY.factors).sum(axis=0) / SPEC.scale / (300 * 0.8 / 4))
    assert np.sqrt(np.mean(np.square(sums)) * 2) == pytest.approx(expected.half_width, rel=0.1)
    assert running_noise(Factors(coefficients=(8,)), 9) == pytest.approx(3 / 8)


def test_the_server_decodes_and_a_lost_round_keeps_its_place() -> None:
    server = QUERY.server
    assert isinstance(server, Correlated)
    assert server.factors == Factors(coefficients=TURNS.factors)
    state = server.lost(start(np.zeros(2), clip=0.5))
    assert (state.done, state.recent.shape) == (1, (1, 2))
    assert TrainQuery(spec=SPEC).server == QUERY.strategy
