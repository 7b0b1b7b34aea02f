"""The sum is right, or there is none."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from federated.aggregation.plan import default_threshold
from federated.aggregation.server import SecureServer, Stage
from federated.errors import CohortError, ProtocolError
from tests.federated.aggregation.rounds import STAGES, Cohort, make_plan, noise
from tests.federated.aggregation.test_noise import fits

_SLOW = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@pytest.mark.parametrize("bits", [15, 16, 24, 32, 33, 40, 63, 64])
def test_the_sum_is_exact_before_noise(bits: int) -> None:
    cohort = Cohort(make_plan(modulus_bits=bits, dimension=200))
    result = cohort.run()
    assert result.survivors == cohort.plan.nodes
    assert np.array_equal(result.total, cohort.plain_sum(cohort.plan.nodes))
    assert result.trust_model == "secure_aggregation"


@pytest.mark.parametrize("stage", STAGES)
def test_the_sum_is_that_of_survivors_whatever_stage_somebody_dies_at(stage: Stage) -> None:
    cohort = Cohort(make_plan(7))
    result = cohort.run(drops={stage: frozenset({"node-2", "node-6"})})
    died_late = stage in {Stage.CONSISTENCY, Stage.UNMASK}
    assert ("node-2" in result.survivors) is died_late
    assert len(result.survivors) == (7 if died_late else 5)
    assert np.array_equal(result.total, cohort.plain_sum(result.survivors))
    assert cohort.server.dropped.keys() == {"node-2", "node-6"}


@pytest.mark.parametrize("stage", STAGES)
def test_the_round_ends_without_a_sum_below_the_threshold(stage: Stage) -> None:
    cohort = Cohort(make_plan(7))
    with pytest.raises(CohortError):
        cohort.run(drops={stage: frozenset({"node-0", "node-1", "node-2"})})
    assert cohort.server.stage is Stage.ABORTED
    assert cohort.server.requests() == {}
    with pytest.raises(ProtocolError):
        cohort.server.result()
    with pytest.raises(ProtocolError):
        cohort.server.collect({})


@given(data=st.data())
@_SLOW
def test_random_drop_outs_never_give_a_wrong_sum(data: st.DataObject) -> None:
    nodes = data.draw(st.integers(3, 9))
    threshold = data.draw(st.integers(default_threshold(nodes), nodes))
    minimum = data.draw(st.integers(threshold, nodes))
    mechanism = data.draw(
        st.sampled_from([None, noise("discrete_laplace", 5.0), noise("discrete_gaussian", 5.0)])
    )
    cohort = Cohort(
        make_plan(
            nodes,
            threshold=threshold,
            minimum_survivors=minimum,
            noise=mechanism,
            colluding=data.draw(
                st.integers(0 if mechanism is None else 1, 2 * threshold - nodes - 1)
            ),
        ),
        seed=data.draw(st.integers(0, 1000)),
    )
    # Mostly few, so that rounds come to their end.
    leaving = data.draw(st.lists(st.sampled_from(cohort.plan.nodes), max_size=3, unique=True))
    drops: dict[Stage, frozenset[str]] = {}
    for node in leaving:
        stage = data.draw(st.sampled_from(STAGES))
        drops[stage] = drops.get(stage, frozenset()) | {node}
    early = sum(len(gone) for stage, gone in drops.items() if stage in STAGES[:3])
    try:
        result = cohort.run(drops=drops)
    except CohortError:
        assert nodes - early < minimum or nodes - len(leaving) < threshold
        return
    assert len(result.survivors) == nodes - early >= minimum
    assert np.array_equal(result.total, cohort.expected(result.survivors))
    if mechanism is None:
        assert np.array_equal(result.total, cohort.plain_sum(result.survivors))


@given(data=st.data())
@_SLOW
def test_altered_answers_never_give_a_wrong_sum_unless_a_vector_itself_is(
    data: st.DataObject,
) -> None:
    cohort = Cohort(make_plan(5, threshold=4, minimum_survivors=4), seed=3)
    liar = data.draw(st.sampled_from(cohort.plan.nodes))
    stage = data.draw(st.sampled_from([s for s in STAGES if s is not Stage.MASK]))
    where = data.draw(st.floats(0, 1, exclude_max=True))
    bit = data.draw(st.integers(0, 7))

    def tamper(at: Stage, node: str, reply: bytes) -> bytes:
        if at is not stage or node != liar:
            return reply
        changed = bytearray(reply)
        changed[int(where * len(changed))] ^= 1 << bit
        return bytes(changed)

    try:
        result = cohort.run(tamper=tamper)
    except CohortError:
        return
    assert np.array_equal(result.total, cohort.plain_sum(result.survivors))


@pytest.mark.parametrize("mechanism", ["discrete_laplace", "discrete_gaussian"])
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_the_sum_carries_the_planned_noise_once_the_excess_is_off(
    mechanism: str, missing: int
) -> None:
    plan = make_plan(
        9,
        dimension=20_000,
        noise=noise(mechanism, 12.0),
        colluding=1,
        threshold=7,
        minimum_survivors=7,
    )
    cohort = Cohort(plan, seed=missing + 10)
    gone = {Stage.MASK: frozenset(plan.nodes[:missing]), Stage.UNMASK: frozenset({"node-8"})}
    if missing == 2:
        gone[Stage.UNMASK] = frozenset()
    result = cohort.run(drops=gone)
    left = len(result.survivors)
    assert left == 9 - missing
    error = result.total - cohort.plain_sum(result.survivors)
    one = 12.0**2
    if mechanism == "discrete_laplace":
        q = np.exp(-1 / 12.0)
        one = 2 * q / (1 - q) ** 2
    # Exactly the plan's noise from all but one colluding survivor.
    assert result.noise_weight == pytest.approx(left / (left - 1), rel=1e-12)
    wide = 6 * np.sqrt((stats.kurtosis(error, fisher=False) - 1) / plan.dimension)
    ratio = float(np.var(error)) / (result.noise_weight * one)
    assert abs(ratio - 1) < wide < 0.15


@pytest.mark.parametrize("mechanism", ["discrete_laplace", "discrete_gaussian"])
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_what_stays_in_the_sum_has_the_planned_distribution(mechanism: str, missing: int) -> None:
    """Not its variance alone: shares added, excess taken off, granularity divided out."""
    plan = make_plan(
        9,
        dimension=20_000,
        noise=noise(mechanism, 12.0),
        colluding=1,
        threshold=7,
        minimum_survivors=7,
    )
    cohort = Cohort(plan, seed=missing + 20)
    result = cohort.run(drops={Stage.MASK: frozenset(plan.nodes[:missing])})
    error = result.total - cohort.plain_sum(result.survivors)
    share = len(result.survivors) / (len(result.survivors) - 1)
    if mechanism == "discrete_laplace":
        assert fits(error, _polya_difference(12.0, share), 12.0) > 1e-3
        return
    grain = plan.granularity
    assert grain == 3
    variance = 12.0**2 * share * grain**2

    def weight(value: float) -> float:
        # What rounds to it.
        return sum(math.exp(-((grain * value + off) ** 2) / (2 * variance)) for off in range(-1, 2))

    assert fits(error, weight, 12.0) > 1e-3


def _polya_difference(scale: float, share: float) -> Callable[[float], float]:
    """Masses of NB(share, q) - NB(share, q): discrete Laplace noise where the share is 1."""
    one = stats.nbinom.pmf(np.arange(3000), share, 1 - math.exp(-1 / scale))
    masses = np.convolve(one, one[::-1])
    return lambda value: float(masses[int(value) + len(one) - 1])


def test_masked_vectors_say_nothing_by_themselves() -> None:
    plan = make_plan(4, dimension=20_000, modulus_bits=16, bound=4000)
    cohort = Cohort(plan)
    cohort.vectors = {node: np.zeros(plan.dimension, dtype=np.int64) for node in plan.nodes}
    cohort.until(Stage.CONSISTENCY)
    for masked in cohort.server._masked.values():
        for shift in (0, 8):
            counts = np.bincount((masked >> np.uint64(shift)).astype(np.int64) & 255, minlength=256)
            assert stats.chisquare(counts).pvalue > 1e-6


def test_a_plan_that_trusts_the_server_is_not_run_with_masks() -> None:
    with pytest.raises(ProtocolError, match="secure aggregation"):
        SecureServer(make_plan(trust_model="trusted_server"))


def test_a_late_or_unasked_answer_changes_nothing() -> None:
    cohort = Cohort(make_plan(7))
    cohort.server.collect(
        cohort.answers(cohort.server.requests(), gone=frozenset({"node-3"}))
        | {"stranger": b"hello"}
    )
    late = cohort.clients["node-3"].answer(SecureServer(cohort.plan).requests()["node-3"])
    replies = cohort.answers(cohort.server.requests()) | {"node-3": late}
    cohort.server.collect(replies)
    result = cohort.run()
    assert "node-3" not in result.survivors
    assert np.array_equal(result.total, cohort.plain_sum(result.survivors))
