"""Whole trainings of virtual people: the study's own parts, and what simulation adds."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
from numpy.typing import NDArray

from federated.accounting import compose
from federated.aggregation.bits import SeededBits
from federated.aggregation.noise import sample
from federated.errors import ManifestError
from federated.learning.factorisation import Participation, square_root
from federated.learning.models import initial
from federated.learning.round_query import TrainQuery
from federated.learning.spec import TrainSpec
from federated.learning.split import is_held_out
from federated.learning.strategies import Correlated, FedAvg, FedAvgM, start
from federated.learning.training_cost import training_cost
from federated.model import NoisePlan, RandomBits
from federated.simulation.choose import Grid, choose
from federated.simulation.devices import devices_of
from federated.simulation.training import (
    Course,
    Here,
    Population,
    Target,
    divided,
    simulate,
)
from federated.simulation.vectorised import RoundSum
from tests.federated.learning.test_baselines import SPEC, people

PEOPLE = people(120, 1)
TARGET = Target(epsilon=4.0, delta=1e-4)
SEED = b"a study"


def population(spec: TrainSpec = SPEC) -> Population:
    return divided(spec, PEOPLE)


def test_people_are_divided_as_nodes_divide_them() -> None:
    found = divided(SPEC, PEOPLE, study="sleep")
    held = [
        place
        for place in range(len(PEOPLE))
        if is_held_out(study="sleep", tag=f"virtual-{place}", fraction=SPEC.held_out)
    ]
    assert found.held_out.tolist() == held
    assert sorted([*found.train, *found.held_out]) == list(range(len(PEOPLE)))
    assert divided(SPEC, PEOPLE, study="mood").held_out.tolist() != held


@pytest.mark.parametrize("exact", [False, True])
def test_a_training_is_the_loop_that_a_coordinator_runs(*, exact: bool) -> None:
    """Device by device, with the deployment's query and the same noise: the same weights."""
    found = population()
    course = Course(rounds=3, exact=True) if exact else Course(rounds=3)
    run = simulate(found, course, noise=TARGET, seed=SEED)
    assert run.noise is not None
    key = sha256(b"havengate/simulation/v1\n" + SEED).digest()
    rounding, noise = SeededBits(key, b"rounding"), SeededBits(key, b"noise")
    state = start(initial(SPEC, seed=SEED), clip=SPEC.clip)
    for _ in range(3):
        query = TrainQuery(spec=SPEC).at(state.weights)
        total = sample(query.dimension, plan=run.noise, random=noise)
        for place in found.train:
            total = total + query.encode(PEOPLE[place], rounding)
        state = FedAvg().step(state, total, people=len(found.train), unit=1 / SPEC.scale)
    # Without rounding at random a coordinate is off by half an integer a person, on average less.
    assert run.weights == pytest.approx(state.weights, abs=0 if exact else 3e-4)
    if exact:
        assert np.array_equal(run.weights, state.weights)


def test_noise_and_cost_are_those_of_the_whole_training() -> None:
    run = simulate(population(), Course(rounds=7), noise=TARGET, seed=SEED)
    assert run.cost is not None
    assert run.participation == Participation(rounds=7, most=7, gap=1)
    assert run.cost.epsilon == pytest.approx(TARGET.epsilon, rel=1e-6)
    assert compose([run.cost], delta=TARGET.delta) <= TARGET.epsilon * (1 + 1e-9)


def test_a_given_noise_is_priced_at_the_given_delta() -> None:
    plan = NoisePlan(mechanism="discrete_gaussian", scale=20_000.0)
    assert simulate(population(), Course(rounds=2), noise=plan, seed=SEED).cost is None
    run = simulate(population(), Course(rounds=2), noise=plan, seed=SEED, delta=1e-5)
    update = TrainQuery(spec=SPEC).rounding.sensitivity
    rule = Participation(rounds=2, most=2)
    assert run.cost == training_cost(plan, update, participation=rule, delta=1e-5)
    assert run.noise == plan


class Watched:
    """Sums made here, and who was asked for them."""

    def __init__(self, found: Population) -> None:
        self.here = Here(spec=found.spec, devices=found.devices)
        self.asked: list[list[int]] = []

    def __call__(
        self, weights: NDArray[np.float64], asked: NDArray[np.int64], random: RandomBits | None
    ) -> RoundSum:
        self.asked.append(asked.tolist())
        return self.here(weights, asked, random)


def test_a_cohort_takes_turns_and_the_price_knows_it() -> None:
    found = population()
    watched = Watched(found)
    course = Course(rounds=9, cohort=30)
    run = simulate(found, course, noise=TARGET, seed=SEED, summing=watched)
    turns = math.ceil(len(found.train) / 30)
    assert run.participation == Participation(rounds=9, most=math.ceil(9 / turns), gap=turns)
    assert all(len(asked) <= 30 for asked in watched.asked)
    assert sorted(itertools.chain(*watched.asked[:turns])) == sorted(found.train.tolist())
    for person in found.train.tolist():
        own = [number for number, asked in enumerate(watched.asked) if person in asked]
        for place, number in enumerate(own):
            assert run.participation.admits(own[:place], number)
    everybody = simulate(found, Course(rounds=9), noise=TARGET, seed=SEED)
    assert run.noise is not None
    assert everybody.noise is not None
    assert run.noise.scale < everybody.noise.scale


def test_a_gap_is_a_cohort_told_otherwise() -> None:
    found, seed = population(), b"gap"
    gap, cohort = (
        simulate(found, Course(rounds=8, **turns), noise=None, seed=seed)  # type: ignore[arg-type]
        for turns in ({"gap": 4}, {"cohort": -(-len(found.train) // 4)})
    )
    assert gap.participation == cohort.participation == Participation(rounds=8, most=2, gap=4)
    assert np.array_equal(gap.weights, cohort.weights)


def test_who_stays_away_is_drawn_in_each_round() -> None:
    found = population()
    watched = Watched(found)
    simulate(found, Course(rounds=6, absent=0.3), noise=None, seed=SEED, summing=watched)
    sizes = [len(asked) for asked in watched.asked]
    assert 0.5 < np.mean(sizes) / len(found.train) < 0.9
    assert len({tuple(asked) for asked in watched.asked}) == 6


def test_a_round_without_people_leaves_the_weights() -> None:
    found = population()

    def nobody_comes(
        weights: NDArray[np.float64], asked: NDArray[np.int64], random: RandomBits | None
    ) -> RoundSum:
        return RoundSum(total=np.zeros(weights.size), people=0, silent=0, clipped=0)

    inner = FedAvg()
    for strategy in (inner, Correlated(inner=inner, factors=square_root(3))):
        course = Course(rounds=3, strategy=strategy)
        run = simulate(found, course, noise=TARGET, seed=SEED, summing=nobody_comes)
        assert not run.weights.any()
        assert [step.people for step in run.trace] == [0, 0, 0]


def test_correlated_rounds_without_noise_are_plain_rounds() -> None:
    found = population()
    for exact in (False, True):
        plain = Course(rounds=6, cohort=40, strategy=FedAvgM(), exact=exact)
        correlated = replace(plain, strategy=Correlated(inner=FedAvgM(), factors=square_root(4)))
        one = simulate(found, plain, noise=None, seed=SEED)
        other = simulate(found, correlated, noise=None, seed=SEED)
        assert other.weights == pytest.approx(one.weights, abs=1e-9)
    noisy = simulate(found, correlated, noise=TARGET, seed=SEED)
    assert noisy.cost is not None
    assert noisy.cost.epsilon <= TARGET.epsilon * (1 + 1e-9)


def test_the_same_seed_is_the_same_study_and_another_is_not() -> None:
    found, course = population(), Course(rounds=3, cohort=40, absent=0.1)
    one, again = (simulate(found, course, noise=TARGET, seed=SEED) for _ in range(2))
    other = simulate(found, course, noise=TARGET, seed=b"another")
    assert np.array_equal(one.weights, again.weights)
    assert one.trace == again.trace
    assert not np.array_equal(one.weights, other.weights)


def test_copies_make_noise_smaller_and_nothing_else_different() -> None:
    found = population()
    once = simulate(found, Course(rounds=3), noise=None, seed=SEED)
    many = simulate(found, Course(rounds=3, copies=50), noise=None, seed=SEED)
    assert many.weights == pytest.approx(once.weights, abs=1e-9)
    noisy = simulate(found, Course(rounds=3), noise=TARGET, seed=SEED)
    calm = simulate(found, Course(rounds=3, copies=50), noise=TARGET, seed=SEED)
    assert calm.trace[0].people == 50 * noisy.trace[0].people
    off = [float(np.linalg.norm(run.weights - once.weights)) for run in (noisy, calm)]
    assert off[1] < off[0] / 5


def test_training_learns_and_says_how_well() -> None:
    found = divided(SPEC, people(600, 3))
    run = simulate(found, Course(rounds=10), noise=Target(epsilon=4, delta=1e-4), seed=SEED)
    scores = [step.score for step in run.trace]
    assert scores[-1] > 0.8
    assert found.score(run.weights) == scores[-1]
    unjudged = simulate(found, Course(rounds=2), noise=None, seed=SEED, judged=False)
    assert all(math.isnan(step.score) for step in unjudged.trace)


def test_a_number_is_scored_by_its_error() -> None:
    spec = replace(SPEC, kind="linear", label=replace(SPEC.label, at_least=None))
    found = divided(spec, PEOPLE)
    score = found.score(np.zeros(3))
    assert score == pytest.approx(-0.5)
    alone = Population(
        spec=spec, devices=found.devices, train=found.train, held_out=np.zeros(0, dtype=np.int64)
    )
    assert math.isnan(alone.score(np.zeros(3)))


def test_refuses_a_training_without_people_or_sense() -> None:
    empty = divided(SPEC, devices_of(SPEC, []))
    with pytest.raises(ManifestError, match="Nobody is left"):
        simulate(empty, Course(), noise=None, seed=SEED)
    for bad in (
        {"rounds": 1001}, {"cohort": 0}, {"absent": 1.0}, {"copies": 0}, {"gap": 0},
        {"gap": 2, "cohort": 9},
    ):  # fmt: skip
        with pytest.raises(ManifestError):
            Course(**bad)


def test_a_grid_is_tried_at_the_same_cost_and_the_best_comes_first() -> None:
    grid = Grid(clips=(0.01, 2.0), rates=(4.0,), rounds=(2, 6))
    found = choose(SPEC, people(300, 5), grid, target=TARGET, seeds=(b"0", b"1"))
    assert len(found) == 4
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert {(one.spec.clip, one.spec.rounds) for one in found} == {
        (0.01, 2), (0.01, 6), (2.0, 2), (2.0, 6)
    }  # fmt: skip
    for one in found:
        update = TrainQuery(spec=one.spec).rounding.sensitivity
        rule = Participation(rounds=one.spec.rounds, most=one.spec.rounds)
        cost = training_cost(one.noise, update, participation=rule, delta=TARGET.delta)
        assert cost.epsilon == pytest.approx(TARGET.epsilon, rel=1e-6)
        assert one.multiplier == pytest.approx(one.noise.scale / update.l2)
        assert one.spec.clip * one.spec.scale == pytest.approx(SPEC.clip * SPEC.scale)
    tight = [one.clipped for one in found if one.spec.clip == 0.01]
    loose = [one.clipped for one in found if one.spec.clip == 2.0]
    assert min(tight) > max(loose)
