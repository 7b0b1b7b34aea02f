"""An audit refutes no claim that holds, and finds noise that is missing: with the real sampler.

Noise is drawn as in a study: by the exact sampler, as shares of several nodes, or through masks and
back in a whole round of secure aggregation.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from federated.aggregation.bits import SeededBits
from federated.aggregation.encoding import needed_modulus_bits, unscale
from federated.aggregation.noise import sample
from federated.aggregation.schedule import noise_schedule
from federated.errors import AccountingError, CheckpointError
from federated.learning.canaries import Canaries, draw_canaries, lane_shifts, lane_value
from federated.learning.clipping import CountedUpdate
from federated.learning.factorisation import Participation, full_cohort, square_root
from federated.learning.one_run_bound import guesses_for, lower_bound
from federated.learning.privacy_audit import Audit, parse_audit
from federated.learning.training_cost import training_noise
from federated.model import NoisePlan
from tests.federated.aggregation.rounds import Cohort, make_plan

UPDATE: Final = CountedUpdate(dimension=13).sensitivity
VALUE: Final = lane_value(UPDATE)
DELTA: Final = 1e-4
STUDY: Final = bytes(32)

#: Draws the noise of one round's lanes.
type Noise = Callable[[int, SeededBits], NDArray[np.int64]]


def bits(label: object) -> SeededBits:
    return SeededBits(hashlib.sha256(repr(label).encode()).digest(), b"audit test")


def planned(epsilon: float, rounds: int) -> NoisePlan:
    return training_noise(UPDATE, participation=full_cohort(rounds), epsilon=epsilon, delta=DELTA)


def less(plan: NoisePlan, share: float) -> NoisePlan:
    return replace(plan, scale=plan.scale * share)


def of_one(plan: NoisePlan) -> Noise:
    return lambda count, random: sample(count, plan=plan, random=random)


def of_nodes(plan: NoisePlan, *, nodes: int, idle: int, colluding: int = 1) -> Noise:
    """Base shares of all nodes but for those that add nothing, as a round without drop-outs."""
    schedule = noise_schedule(plan, nodes=nodes, minimum_survivors=nodes, colluding=colluding)

    def draw(count: int, random: SeededBits) -> NDArray[np.int64]:
        total = np.zeros(count, dtype=np.int64)
        for _ in range(nodes - idle):
            total += schedule.share(-1, dimension=count, random=random)
        return unscale(total, schedule.granularity)

    return draw


def audited(
    seed: object,
    noises: Sequence[Noise],
    *,
    count: int = 1000,
    shifts: Sequence[int] | None = None,
) -> Audit:
    """An audit of as many rounds as noises."""
    random = bits(seed)
    audit = Audit(canaries=draw_canaries(count, random))
    for shift, noise in zip(shifts or [VALUE] * len(noises), noises, strict=True):
        audit = audit.after(noise(count, random), shift=shift)
    return audit


@pytest.mark.parametrize(("epsilon", "rounds"), [(1.0, 1), (2.0, 4), (8.0, 2)])
def test_a_claim_that_holds_is_hardly_ever_refuted(epsilon: float, rounds: int) -> None:
    noises = [of_one(planned(epsilon, rounds))] * rounds
    results = [
        audited((epsilon, seed), noises, count=200).result(epsilon=epsilon, delta=DELTA)
        for seed in range(150)
    ]
    refuted = sum(not result.passed for result in results)
    assert refuted <= stats.binom.ppf(0.999, 150, 0.05)
    # It is no audit that proves nothing at all.
    if epsilon > 1:
        assert np.mean([result.lower_bound for result in results]) > 0.1 * epsilon


def test_noise_alone_proves_more_than_nothing_no_more_often_than_allowed() -> None:
    """Noise so large that a canary is nothing in it: ε is 0 but for 0.01."""
    plan = NoisePlan(mechanism="discrete_gaussian", scale=1000.0 * VALUE)
    above = 0
    for seed in range(400):
        audit = audited(seed, [of_one(plan)], count=100)
        above += audit.result(epsilon=0.01, delta=1e-9).lower_bound > 0.01
    assert above <= stats.binom.ppf(0.999, 400, 0.05)


@pytest.mark.parametrize("epsilon", [1.0, 2.0])
def test_a_third_of_the_noise_is_found_out_whoever_adds_it(epsilon: float) -> None:
    rounds = 4
    plan = planned(epsilon, rounds)
    for make in (of_one, lambda thin: of_nodes(thin, nodes=5, idle=0, colluding=0)):
        results = [
            audited((epsilon, seed), [make(less(plan, 1 / 3))] * rounds, count=2000).result(
                epsilon=epsilon, delta=DELTA
            )
            for seed in range(4)
        ]
        assert not any(result.passed for result in results)
        full = audited(epsilon, [make(plan)] * rounds, count=2000)
        assert full.result(epsilon=epsilon, delta=DELTA).passed


def test_nodes_that_may_add_no_noise_are_allowed_for_and_one_more_is_found_out() -> None:
    """Of six nodes one may collude: without its noise the plan is kept, without two it is not."""
    plan = planned(2.0, 4)
    for seed in range(3):
        for idle, kept in ((0, True), (1, True), (2, False), (3, False)):
            audit = audited((seed, idle), [of_nodes(plan, nodes=6, idle=idle)] * 4)
            found = audit.noise(plan)
            assert found.share == pytest.approx((6 - idle) / 5, abs=0.1)
            assert found.passed is kept


def test_noise_of_one_node_out_of_twelve_does_not_hide_a_canary() -> None:
    plan = planned(2.0, 4)
    audit = audited("one", [of_nodes(plan, nodes=12, idle=11)] * 4)
    assert not audit.result(epsilon=2.0, delta=DELTA).passed
    assert not audit.noise(plan).passed
    assert audit.noise(plan).short == (0, 1, 2, 3)


def test_a_single_round_without_noise_is_found_out_among_many() -> None:
    plan = planned(2.0, 10)
    nothing: Noise = lambda count, _: np.zeros(count, dtype=np.int64)  # noqa: E731 - as the others
    noises = [of_one(plan)] * 10
    noises[6] = nothing
    audit = audited("gap", noises)
    found = audit.result(epsilon=2.0, delta=DELTA)
    assert found.correct == found.guesses
    assert not found.passed
    assert audit.noise(plan).short == (6,)
    assert not audit.noise(plan).passed
    # The plain sum of the rounds does not see it.
    order = np.argsort(audit.lanes.sum(axis=0))
    half = found.guesses // 2
    coins = audit.canaries.included
    correct = int(coins[order[-half:]].sum() + (~coins[order[:half]]).sum())
    bound = lower_bound(canaries=1000, guesses=found.guesses, correct=correct, delta=DELTA)
    assert bound < 2.0


def test_a_little_noise_missing_in_all_rounds_is_found_out_where_no_round_says_so() -> None:
    plan = planned(2.0, 10)
    found = audited("little", [of_one(less(plan, math.sqrt(0.88)))] * 10).noise(plan)
    assert found.short == ()
    assert found.share == pytest.approx(0.88, abs=0.05)
    assert not found.passed


def test_scores_of_equal_rounds_are_their_sum() -> None:
    audit = audited("sum", [of_one(planned(2.0, 20))] * 20)
    plain = audit.lanes.sum(axis=0)
    assert np.corrcoef(audit.scores, plain)[0, 1] > 0.995


def test_correlated_rounds_are_audited_as_the_one_release_that_they_are() -> None:
    rule, factors = Participation(rounds=32, most=2, gap=16), square_root(16)
    plan = training_noise(UPDATE, participation=rule, factors=factors, epsilon=2.0, delta=DELTA)
    shifts = lane_shifts(UPDATE, participation=rule, factors=factors)
    full = audited("ftrl", [of_one(plan)] * 32, shifts=shifts)
    assert full.result(epsilon=2.0, delta=DELTA).passed
    assert full.noise(plan).passed
    thin = audited("ftrl", [of_one(less(plan, 1 / 3))] * 32, shifts=shifts)
    assert not thin.result(epsilon=2.0, delta=DELTA).passed
    # Weighed by the shifts: the plain sum knows less.
    inside = full.canaries.included

    def apart(scores: NDArray[np.float64] | NDArray[np.int64]) -> float:
        return float((scores[inside].mean() - scores[~inside].mean()) / np.std(scores[~inside]))

    assert apart(full.scores) == pytest.approx(1 / 1.894, abs=0.15)
    assert apart(full.scores) > apart(full.lanes.sum(axis=0)) - 0.02


def test_planned_noise_raises_no_alarm_and_its_share_is_one() -> None:
    plan = planned(2.0, 3)
    shares = []
    for seed in range(150):
        found = audited(seed, [of_one(plan)] * 3, count=200).noise(plan)
        assert found.passed
        shares.append(found.share)
    assert np.mean(shares) == pytest.approx(1.0, abs=4 * math.sqrt(2 / 600 / 150))
    # The alarm rings as often as it says it does.
    rings = sum(
        not audited(seed, [of_one(plan)] * 3, count=200).noise(plan, false_alarm=0.2).passed
        for seed in range(150)
    )
    assert stats.binom.ppf(0.001, 150, 0.12) <= rings <= stats.binom.ppf(0.999, 150, 0.2)


LANES: Final = 60


def round_of(
    plan: NoisePlan, *, people: int, largest: int, inside: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """The sum of one round of secure aggregation: 5 parameters, then lanes on which all have 0.

    `inside`: what a node sends on the lanes instead.
    """
    dimension = 5 + LANES
    schedule = noise_schedule(plan, nodes=6, minimum_survivors=5, colluding=1)
    cohort = Cohort(
        make_plan(
            6,
            dimension=dimension,
            bound=6 * VALUE,
            noise=plan,
            colluding=1,
            threshold=5,
            minimum_survivors=5,
            modulus_bits=needed_modulus_bits(
                bound=6 * VALUE, dimension=dimension, schedule=schedule
            ),
        )
    )
    random = np.random.default_rng(people)
    cohort.vectors = {
        node: np.concatenate(
            [random.integers(-largest, largest + 1, 5), np.zeros(LANES, dtype=np.int64)]
        )
        for node in cohort.vectors
    }
    if inside is not None:
        cohort.vectors["node-2"][5:] += inside
    return cohort.run().total


def test_a_canary_that_is_added_after_unmasking_is_as_one_among_the_people() -> None:
    plan, canaries = planned(2.0, 1), draw_canaries(LANES, bits("inside"))
    outside = round_of(plan, people=1, largest=9)
    inside = round_of(plan, people=1, largest=9, inside=canaries.added(VALUE))
    audit = Audit(canaries=canaries).after(outside[5:], shift=VALUE)
    assert np.array_equal(audit.lanes[0], inside[5:])
    assert np.array_equal(outside[:5], inside[:5])


def test_the_audit_is_blind_to_real_people_and_sees_noise_through_masks_and_back() -> None:
    plan = planned(2.0, 1)
    one, other = round_of(plan, people=1, largest=1000), round_of(plan, people=2, largest=4)
    assert not np.array_equal(one[:5], other[:5])
    # The same seeds, so the same noise: nothing of people is on a lane.
    assert np.array_equal(one[5:], other[5:])
    lanes = [round_of(less(plan, share), people=1, largest=9)[5:] for share in (1.0, 1 / 3)]
    for row, kept in zip(lanes, (True, False), strict=True):
        audit = Audit(canaries=draw_canaries(LANES, bits("masks"))).after(row, shift=VALUE)
        assert audit.noise(plan).passed is kept


def test_guesses_are_fixed_by_the_claim_and_read_off_by_rank() -> None:
    canaries = Canaries(included=np.arange(100) >= 50)
    lanes = np.arange(100, dtype=np.int64)
    found = Audit(canaries=canaries).after(lanes, shift=10).result(epsilon=2.0, delta=DELTA)
    assert found.guesses == guesses_for(100, epsilon=2.0, delta=DELTA)
    assert found.correct == found.guesses
    swapped = Audit(canaries=canaries).after(1000 - lanes, shift=10)
    assert swapped.result(epsilon=2.0, delta=DELTA).correct == 0


def test_scores_know_no_coin() -> None:
    """Guesses are made of what was released: with the same lanes, other coins change nothing."""
    audit = audited("coins", [of_one(planned(2.0, 3))] * 3, count=50)
    flipped = replace(audit, canaries=Canaries(included=~audit.canaries.included))
    assert np.array_equal(audit.scores, flipped.scores)


def test_an_audit_goes_on_after_a_crash_as_if_there_had_been_none() -> None:
    plan = planned(2.0, 3)
    audit = audited("crash", [of_one(plan)] * 2, count=77)
    saved = audit.to_bytes(study=STUDY)
    assert saved == parse_audit(saved, study=STUDY).to_bytes(study=STUDY)
    row = sample(77, plan=plan, random=bits("last"))
    ends = [
        one.after(row, shift=VALUE).result(epsilon=2.0, delta=DELTA)
        for one in (audit, parse_audit(saved, study=STUDY))
    ]
    assert ends[0] == ends[1]
    fresh = Audit(canaries=audit.canaries)
    assert parse_audit(fresh.to_bytes(study=STUDY), study=STUDY).shifts == ()


def test_a_saved_audit_that_is_altered_cut_or_anothers_is_refused() -> None:
    saved = audited("saved", [of_one(planned(2.0, 1))], count=9).to_bytes(study=STUDY)
    for place in range(len(saved)):
        changed = bytearray(saved)
        changed[place] ^= 1
        with pytest.raises(CheckpointError):
            parse_audit(bytes(changed), study=STUDY)
        with pytest.raises(CheckpointError):
            parse_audit(saved[:place], study=STUDY)
    with pytest.raises(CheckpointError, match="another study"):
        parse_audit(saved, study=bytes(31) + b"x")
    with pytest.raises(CheckpointError):
        parse_audit(Audit(canaries=draw_canaries(3, bits(1))).canaries.to_bytes(study=STUDY),
                    study=STUDY)  # fmt: skip


@pytest.mark.parametrize(("rounds", "numbers"), [(1, 0), (1, 9), (2, 10), (0, 10), (2**63, 10)])
def test_a_saved_audit_of_another_length_than_it_says_is_refused(rounds: int, numbers: int) -> None:
    from federated.learning import canaries, privacy_audit

    coins = canaries.packed(draw_canaries(9, bits("length")))
    body = coins + rounds.to_bytes(8, "little") + bytes(8 * numbers)
    data = canaries.sealed(privacy_audit._MAGIC, body, study=STUDY)
    with pytest.raises(CheckpointError, match="length"):
        parse_audit(data, study=STUDY)


def test_refuses_lanes_and_rounds_that_are_none() -> None:
    empty = Audit(canaries=draw_canaries(4, bits("none")))
    with pytest.raises(ValueError, match="one round"):
        empty.result(epsilon=1.0, delta=DELTA)
    with pytest.raises(ValueError, match="one round"):
        empty.noise(planned(1.0, 1))
    with pytest.raises(ValueError, match="4 lanes"):
        empty.after(np.zeros(5, dtype=np.int64), shift=VALUE)
    with pytest.raises(ValueError, match="0 or more"):
        empty.after(np.zeros(4, dtype=np.int64), shift=-1)
    with pytest.raises(ValueError, match="shape"):
        replace(empty, lanes=np.zeros((1, 4), dtype=np.int64))
    one = empty.after(np.zeros(4, dtype=np.int64), shift=VALUE)
    laplace = NoisePlan(mechanism="discrete_laplace", scale=10.0)
    for plan in (laplace, NoisePlan(mechanism="discrete_gaussian", scale=0.5)):
        with pytest.raises(AccountingError, match="measured"):
            one.noise(plan)


def test_a_verdict_is_the_bound_against_the_claim() -> None:
    audit = audited("verdict", [of_one(less(planned(2.0, 1), 0.2))])
    found = audit.result(epsilon=2.0, delta=DELTA)
    assert found.lower_bound > 2.0
    assert not found.passed
    assert replace(found, claimed_epsilon=found.lower_bound).passed
    assert (found.canaries, found.confidence, found.delta) == (1000, 0.95, DELTA)
    sure = [audit.result(epsilon=2.0, delta=DELTA, confidence=c) for c in (0.8, 0.95, 0.999)]
    assert all(a.lower_bound > b.lower_bound for a, b in itertools.pairwise(sure))
