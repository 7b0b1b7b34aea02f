"""The mode in which the server is trusted: named so, with all the noise added once."""

from __future__ import annotations

import hashlib
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from federated.aggregation.bits import SeededBits
from federated.aggregation.encoding import pack
from federated.aggregation.messages import Begin, Plain, encode
from federated.aggregation.plan import RoundPlan
from federated.aggregation.server import Stage
from federated.aggregation.trusted import TrustedClient, TrustedServer
from federated.errors import CohortError, ProtocolError
from tests.federated.aggregation.rounds import Cohort, make_plan, noise

BITS = SeededBits(hashlib.sha256(b"trusted").digest(), b"test")


def _round(plan: RoundPlan, missing: int = 0) -> tuple[TrustedServer, NDArray[np.int64]]:
    server = TrustedServer(plan, random=BITS)
    vectors = {
        node: np.full(plan.dimension, 7 * at - 10, dtype=np.int64)
        for at, node in enumerate(plan.nodes)
    }
    replies = {}
    for node, request in server.requests().items():
        held = partial(vectors.__getitem__, node)
        client = TrustedClient(plan=plan, node=node, contribution=held)
        replies[node] = client.answer(request)
        assert client.finished
        with pytest.raises(ProtocolError, match="over for this node"):
            client.answer(request)
    present = plan.nodes[missing:]
    server.collect({node: replies[node] for node in present})
    return server, np.sum([vectors[node] for node in present], axis=0)


def test_the_sum_is_exact_before_noise_and_named_for_its_trust() -> None:
    server, plain = _round(make_plan(trust_model="trusted_server"), missing=1)
    result = server.result()
    assert np.array_equal(result.total, plain)
    assert result.trust_model == "trusted_server"
    assert server.dropped.keys() == {"node-0"}


@pytest.mark.parametrize("mechanism", ["discrete_laplace", "discrete_gaussian"])
def test_the_whole_planned_noise_is_added_once(mechanism: str) -> None:
    plan = make_plan(trust_model="trusted_server", dimension=20_000, noise=noise(mechanism, 10.0))
    server, plain = _round(plan)
    variance = float(np.var(server.result().total - plain))
    assert variance == pytest.approx(100 if mechanism == "discrete_gaussian" else 200, rel=0.08)
    assert server.result().noise_weight == 1


def test_too_few_end_the_round() -> None:
    with pytest.raises(CohortError):
        _round(make_plan(trust_model="trusted_server"), missing=2)


def test_junk_foreign_and_unbounded_vectors_count_as_dropped() -> None:
    plan = make_plan(7, trust_model="trusted_server")
    server = TrustedServer(plan, random=BITS)
    good = {node: encode(Plain(plan.digest, node, bytes(20))) for node in plan.nodes}
    good["node-0"] = encode(Plain(plan.digest, "node-0", b"\xff\xff\xff\x7f" * 5))
    good["node-1"] = good["node-2"]
    server.collect(good)
    assert server.dropped.keys() == {"node-0", "node-1"}
    assert server.stage is Stage.DONE


@pytest.mark.parametrize("value", [-(2**63), -6001, 6000, 6001, 2**63 - 1])
def test_whether_a_node_answers_does_not_depend_on_what_its_vector_holds(value: int) -> None:
    plan = make_plan(trust_model="trusted_server")
    vector = np.full(plan.dimension, value, dtype=np.int64)
    client = TrustedClient(plan=plan, node="node-0", contribution=lambda: vector)
    server = TrustedServer(plan, random=BITS)
    requests = server.requests()
    replies = {
        node: encode(Plain(plan.digest, node, pack(np.zeros(5, np.uint64), plan.modulus_bits)))
        for node in plan.nodes
    }
    server.collect({**replies, "node-0": client.answer(requests["node-0"])})
    assert server.dropped == {}
    assert server.result().total.tolist() == [max(-6000, min(6000, value))] * plan.dimension


def test_a_plan_for_masks_is_never_run_without() -> None:
    plan = make_plan()
    with pytest.raises(ProtocolError):
        TrustedServer(plan, random=BITS)
    with pytest.raises(ProtocolError):
        TrustedClient(plan=plan, node="node-0", contribution=lambda: np.zeros(5, dtype=np.int64))


def test_a_client_with_masks_does_not_answer_a_trusted_servers_request() -> None:
    trusted = make_plan(trust_model="trusted_server")
    client = Cohort(make_plan()).clients["node-0"]
    with pytest.raises(ProtocolError, match="another plan"):
        client.answer(encode(Begin(trusted.digest)))
