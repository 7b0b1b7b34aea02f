"""What a node refuses: the moves of a malicious server, one by one."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from federated.aggregation import masks
from federated.aggregation.client import SecureClient
from federated.aggregation.messages import (
    Advert,
    Adverts,
    Begin,
    Box,
    Delivered,
    Message,
    advert_text,
    encode,
    parse,
)
from federated.aggregation.plan import RoundPlan
from federated.aggregation.server import Stage
from federated.errors import CohortError, ProtocolError
from tests.federated.aggregation.rounds import (
    Cohort,
    answers_nothing,
    identity,
    make_plan,
    public,
    refuses,
)

ME = "node-0"


def _sign_advert(plan: RoundPlan, node: str, mask_key: bytes, seal_key: bytes) -> Advert:
    signature = identity(node).sign(advert_text(plan, node, mask_key, seal_key))
    return Advert(plan.digest, node, mask_key, seal_key, signature)


def _adverts(cohort: Cohort) -> list[Advert]:
    return list(parse(Adverts, cohort.until(Stage.SHARE)[ME], cohort.plan).adverts)


def test_refuses_a_round_of_another_plan() -> None:
    cohort = Cohort(make_plan())
    other = make_plan(round_id="2")
    refuses(cohort.clients[ME], encode(Begin(other.digest)), "another round")


@pytest.mark.parametrize("stage", [Stage.SHARE, Stage.MASK, Stage.CONSISTENCY, Stage.UNMASK])
def test_refuses_a_message_replayed_from_another_round(stage: Stage) -> None:
    earlier = Cohort(make_plan(round_id="1")).until(stage)[ME]
    cohort = Cohort(make_plan(round_id="2"))
    cohort.until(stage)
    refuses(cohort.clients[ME], earlier, "another round")


def test_refuses_an_advert_whose_signature_is_from_another_round() -> None:
    earlier = _adverts(Cohort(make_plan(round_id="1")))
    cohort = Cohort(make_plan(round_id="2"), seed=2)
    mine = _adverts(cohort)
    plan = cohort.plan.digest
    replayed = [mine[0], *(msgspec.structs.replace(advert, plan=plan) for advert in earlier[1:])]
    refuses(cohort.clients[ME], encode(Adverts(plan, tuple(replayed))), "not by the node")


def test_refuses_every_stage_out_of_order_and_twice() -> None:
    honest = Cohort(make_plan())
    stages = (Stage.ADVERTISE, Stage.SHARE, Stage.MASK, Stage.CONSISTENCY, Stage.UNMASK)
    requests = {stage: honest.until(stage)[ME] for stage in stages}
    for expected in stages:
        for sent in stages:
            if sent is expected:
                continue
            cohort = Cohort(make_plan())
            cohort.until(expected)
            refuses(cohort.clients[ME], requests[sent], "Expected a message")


def test_refuses_to_answer_after_the_round() -> None:
    cohort = Cohort(make_plan())
    last = cohort.until(Stage.UNMASK)[ME]
    cohort.run()
    answers_nothing(cohort.clients[ME], last)


def test_refuses_an_invented_node() -> None:
    cohort = Cohort(make_plan())
    adverts = _adverts(cohort)
    keys = [masks.public_key(bytes([at]) * 32) for at in (1, 2)]
    invented = _sign_advert(cohort.plan, "node-9", keys[0], keys[1])
    request = encode(Adverts(cohort.plan.digest, (*adverts, invented)))
    refuses(cohort.clients[ME], request, "not on the roster")


@pytest.mark.parametrize("which", ["mask_key", "seal_key"])
def test_refuses_a_swapped_key(which: str) -> None:
    cohort = Cohort(make_plan())
    adverts = _adverts(cohort)
    servers_own = masks.public_key(b"s" * 32)
    adverts[1] = msgspec.structs.replace(adverts[1], **{which: servers_own})
    refuses(
        cohort.clients[ME], encode(Adverts(cohort.plan.digest, tuple(adverts))), "not by the node"
    )


def test_refuses_keys_that_are_exchanged_between_mask_and_seal() -> None:
    cohort = Cohort(make_plan())
    adverts = _adverts(cohort)
    adverts[1] = msgspec.structs.replace(
        adverts[1], mask_key=adverts[1].seal_key, seal_key=adverts[1].mask_key
    )
    refuses(
        cohort.clients[ME], encode(Adverts(cohort.plan.digest, tuple(adverts))), "not by the node"
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda adverts: adverts[:3], "Only 3 nodes advertised"),
        (lambda adverts: [*adverts, adverts[1]], "stands twice"),
        (lambda adverts: adverts[1:], "own advert"),
        (
            lambda adverts: [
                msgspec.structs.replace(adverts[0], signature=bytes(64)),
                *adverts[1:],
            ],
            "own advert",
        ),
        (
            lambda adverts: [
                adverts[0],
                msgspec.structs.replace(adverts[1], node="node-2"),
                *adverts[3:],
            ],
            "not by the node",
        ),
    ],
)
def test_refuses_a_false_list_of_adverts(
    change: Callable[[list[Advert]], list[Advert]], why: str
) -> None:
    cohort = Cohort(make_plan())
    adverts = change(_adverts(cohort))
    refuses(cohort.clients[ME], encode(Adverts(cohort.plan.digest, tuple(adverts))), why)


def test_refuses_its_own_key_under_a_colluding_nodes_name() -> None:
    cohort = Cohort(make_plan())
    adverts = _adverts(cohort)
    mine = next(advert for advert in adverts if advert.node == ME)
    adverts[1] = _sign_advert(cohort.plan, "node-1", mine.mask_key, adverts[1].seal_key)
    request = encode(Adverts(cohort.plan.digest, tuple(adverts)))
    refuses(cohort.clients[ME], request, "keys are the same")


def test_refuses_a_key_of_small_order_from_a_colluding_node() -> None:
    cohort = Cohort(make_plan())
    adverts = _adverts(cohort)
    adverts[1] = _sign_advert(cohort.plan, "node-1", adverts[1].mask_key, bytes(32))
    request = encode(Adverts(cohort.plan.digest, tuple(adverts)))
    refuses(cohort.clients[ME], request, "can be exchanged")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda boxes: boxes[:2], "Only 3 nodes shared"),
        (lambda boxes: [*boxes, boxes[0]], "stands twice"),
        (lambda boxes: [*boxes, Box(ME, boxes[0].data)], "did not advertise, or this node"),
        (lambda boxes: [*boxes, Box("node-9", boxes[0].data)], "did not advertise"),
    ],
)
def test_refuses_a_false_list_of_who_shared(
    change: Callable[[list[Box]], list[Box]], why: str
) -> None:
    cohort = Cohort(make_plan())
    boxes = list(parse(Delivered, cohort.until(Stage.MASK)[ME], cohort.plan).boxes)
    request = encode(Delivered(cohort.plan.digest, tuple(change(boxes))))
    refuses(cohort.clients[ME], request, why)
    assert ME not in cohort.asked, "the vector was read for a list that is false"


def test_refuses_one_who_shared_without_having_advertised() -> None:
    cohort = Cohort(make_plan(7))
    cohort.until(Stage.MASK, gone=frozenset({"node-6"}))
    boxes = list(parse(Delivered, cohort.server.requests()[ME], cohort.plan).boxes)
    grown = (*boxes, Box("node-6", boxes[0].data))
    request = encode(Delivered(cohort.plan.digest, grown))
    refuses(cohort.clients[ME], request, "did not advertise")


def test_a_tampered_or_misdirected_box_gives_no_share_and_never_a_wrong_sum() -> None:
    cohort = Cohort(make_plan())
    requests = cohort.until(Stage.MASK)
    boxes = list(parse(Delivered, requests[ME], cohort.plan).boxes)
    others = parse(Delivered, requests["node-1"], cohort.plan).boxes
    flipped = bytearray(boxes[0].data)
    flipped[7] ^= 1
    boxes[0] = Box(boxes[0].peer, bytes(flipped))
    # What node-2 sealed for node-1, handed to this node.
    stray = next(box for box in others if box.peer == boxes[1].peer)
    boxes[1] = stray
    client = cohort.clients[ME]
    request = encode(Delivered(cohort.plan.digest, tuple(boxes)))
    replies = {ME: client.answer(request)}
    assert client._held.keys() == {box.peer for box in boxes[2:]}
    replies |= cohort.answers({node: requests[node] for node in requests if node != ME})
    cohort.server.collect(replies)
    result = cohort.run(drops={Stage.UNMASK: frozenset({"node-5"})})
    assert np.array_equal(result.total, cohort.plain_sum(result.survivors))


def test_boxes_that_all_are_tampered_with_lose_the_round_and_nothing_else() -> None:
    cohort = Cohort(make_plan())
    requests = cohort.until(Stage.MASK)
    replies = {}
    for node, request in requests.items():
        boxes = parse(Delivered, request, cohort.plan).boxes
        broken = tuple(
            Box(box.peer, bytes(len(box.data))) if box.peer == "node-5" else box for box in boxes
        )
        replies[node] = cohort.clients[node].answer(encode(Delivered(cohort.plan.digest, broken)))
    del replies["node-5"]
    cohort.server.collect(replies)
    with pytest.raises(CohortError, match="cannot be rebuilt"):
        cohort.run()


def test_reads_the_vector_only_when_enough_have_shared_and_once() -> None:
    cohort = Cohort(make_plan())
    cohort.until(Stage.MASK)
    assert cohort.asked == []
    cohort.run()
    assert sorted(cohort.asked) == list(cohort.plan.nodes)


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(4, dtype=np.int64),
        np.zeros((5, 1), dtype=np.int64),
        np.zeros(5, dtype=np.float64),
    ],
)
def test_sends_nothing_when_its_own_vector_breaks_the_plan(vector: NDArray[np.int64]) -> None:
    cohort = Cohort(make_plan())
    cohort.vectors[ME] = vector
    request = cohort.until(Stage.MASK)[ME]
    refuses(cohort.clients[ME], request, "own vector")


@pytest.mark.parametrize("value", [-(2**63), -6001, -6000, 0, 6000, 6001, 2**63 - 1])
def test_whether_it_answers_does_not_depend_on_what_its_vector_holds(value: int) -> None:
    cohort = Cohort(make_plan())
    for vector in cohort.vectors.values():
        vector[:] = 0
    cohort.vectors[ME] = np.full(5, value, dtype=np.int64)
    result = cohort.run()
    assert ME in result.survivors
    assert result.total.tolist() == [max(-6000, min(6000, value))] * 5


def test_a_round_whose_rows_cannot_be_read_is_over_and_its_secrets_gone() -> None:
    cohort = Cohort(make_plan())
    request = cohort.until(Stage.MASK)[ME]
    del cohort.vectors[ME]
    with pytest.raises(KeyError):
        cohort.clients[ME].answer(request)
    answers_nothing(cohort.clients[ME], request)


def test_takes_no_part_under_another_key_or_off_the_roster() -> None:
    plan = make_plan(roster={f"node-{at}": public(f"node-{at}") for at in range(6)})
    for node, key in (("node-9", "node-9"), (ME, "node-1")):
        with pytest.raises(ProtocolError, match="roster"):
            SecureClient(
                plan=plan,
                node=node,
                identity=identity(key),
                contribution=lambda: np.zeros(5, dtype=np.int64),
                random=Cohort(plan).clients[ME]._random,
            )


def test_takes_no_part_with_masks_where_the_server_is_to_be_trusted() -> None:
    with pytest.raises(ProtocolError, match="trusts the server"):
        Cohort(make_plan(trust_model="trusted_server"))


@pytest.mark.parametrize("junk", [b"", b"\x00", b"NaN", b"\xff" * 40, bytes(10_000_000)])
def test_refuses_junk_of_any_size(junk: bytes) -> None:
    refuses(Cohort(make_plan()).clients[ME], junk, "Expected a message|longer than any")


def test_refuses_a_message_with_something_added() -> None:
    plan = make_plan()

    class Longer(Message, frozen=True, tag="begin"):
        extra: int

    for request in (encode(Longer(plan.digest, 1)), encode(Begin(plan.digest)) + b"\x00"):
        refuses(Cohort(plan).clients[ME], request, "Expected a message")


def test_errors_and_representations_hold_no_secret() -> None:
    cohort = Cohort(make_plan())
    request = cohort.until(Stage.MASK)[ME]
    client = cohort.clients[ME]
    secrets = client._secrets
    assert secrets is not None
    hidden = (secrets.mask_private, secrets.seal_private, secrets.seed)
    cohort.vectors[ME] = np.full(4, 123456789, dtype=np.int64)
    with pytest.raises(ProtocolError) as refusal:
        client.answer(request)
    shown = f"{refusal.value} {refusal.value.diagnostics()} {client!r} {secrets!r}"
    assert "123456789" not in shown
    for secret in hidden:
        assert secret.hex() not in shown
        assert repr(secret) not in shown
