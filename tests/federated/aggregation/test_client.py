"""What a node refuses: the moves of a malicious server, one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from federated.aggregation import masks
from federated.aggregation.client import SecureClient
from federated.aggregation.encoding import from_residues, unpack
from federated.aggregation.messages import (
    Advert,
    Adverts,
    Begin,
    Box,
    Consent,
    Consents,
    Delivered,
    Masked,
    Message,
    Reveal,
    Survivors,
    advert_text,
    adverts_digest,
    consent_text,
    encode,
    parse,
)
from federated.aggregation.plan import RoundPlan
from federated.aggregation.server import Stage
from federated.errors import CohortError, ProtocolError
from tests.federated.aggregation.rounds import Cohort, identity, make_plan, noise, public

ME = "node-0"


def _refuses(client: SecureClient, request: bytes, why: str) -> None:
    """The node refuses, its secrets are gone, and it answers nothing from then on."""
    with pytest.raises(ProtocolError, match=why):
        client.answer(request)
    assert client.finished
    assert client._secrets is None
    assert client._held == {}
    with pytest.raises(ProtocolError, match="over for this node"):
        client.answer(request)


def _sign_advert(plan: RoundPlan, node: str, mask_key: bytes, seal_key: bytes) -> Advert:
    signature = identity(node).sign(advert_text(plan, node, mask_key, seal_key))
    return Advert(plan.digest, node, mask_key, seal_key, signature)


def _told(cohort: Cohort, survivors: Sequence[str], shared: Sequence[str] | None = None) -> bytes:
    return consent_text(
        cohort.plan,
        adverts=adverts_digest(tuple(cohort.server._adverts.values())),
        shared=frozenset(cohort.plan.nodes if shared is None else shared),
        survivors=frozenset(survivors),
    )


def _consents(cohort: Cohort, signers: Sequence[str], text: bytes) -> bytes:
    plan = cohort.plan.digest
    return encode(
        Consents(plan, tuple(Consent(plan, name, identity(name).sign(text)) for name in signers))
    )


def _adverts(cohort: Cohort) -> list[Advert]:
    return list(parse(Adverts, cohort.until(Stage.SHARE)[ME], cohort.plan).adverts)


def test_refuses_a_round_of_another_plan() -> None:
    cohort = Cohort(make_plan())
    other = make_plan(round_id="2")
    _refuses(cohort.clients[ME], encode(Begin(other.digest)), "another round")


@pytest.mark.parametrize("stage", [Stage.SHARE, Stage.MASK, Stage.CONSISTENCY, Stage.UNMASK])
def test_refuses_a_message_replayed_from_another_round(stage: Stage) -> None:
    earlier = Cohort(make_plan(round_id="1")).until(stage)[ME]
    cohort = Cohort(make_plan(round_id="2"))
    cohort.until(stage)
    _refuses(cohort.clients[ME], earlier, "another round")


def test_refuses_an_advert_whose_signature_is_from_another_round() -> None:
    earlier = _adverts(Cohort(make_plan(round_id="1")))
    cohort = Cohort(make_plan(round_id="2"), seed=2)
    mine = _adverts(cohort)
    plan = cohort.plan.digest
    replayed = [mine[0], *(msgspec.structs.replace(advert, plan=plan) for advert in earlier[1:])]
    _refuses(cohort.clients[ME], encode(Adverts(plan, tuple(replayed))), "not by the node")


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
            _refuses(cohort.clients[ME], requests[sent], "Expected a message")


def test_refuses_to_answer_after_the_round() -> None:
    cohort = Cohort(make_plan())
    last = cohort.until(Stage.UNMASK)[ME]
    cohort.run()
    _refuses_nothing_left(cohort.clients[ME], last)


def _refuses_nothing_left(client: SecureClient, request: bytes) -> None:
    assert client.finished
    assert client._secrets is None
    assert client._held == {}
    with pytest.raises(ProtocolError, match="over for this node"):
        client.answer(request)


def test_refuses_an_invented_node() -> None:
    cohort = Cohort(make_plan())
    adverts = _adverts(cohort)
    keys = [masks.public_key(bytes([at]) * 32) for at in (1, 2)]
    invented = _sign_advert(cohort.plan, "node-9", keys[0], keys[1])
    request = encode(Adverts(cohort.plan.digest, (*adverts, invented)))
    _refuses(cohort.clients[ME], request, "not on the roster")


@pytest.mark.parametrize("which", ["mask_key", "seal_key"])
def test_refuses_a_swapped_key(which: str) -> None:
    cohort = Cohort(make_plan())
    adverts = _adverts(cohort)
    servers_own = masks.public_key(b"s" * 32)
    adverts[1] = msgspec.structs.replace(adverts[1], **{which: servers_own})
    _refuses(
        cohort.clients[ME], encode(Adverts(cohort.plan.digest, tuple(adverts))), "not by the node"
    )


def test_refuses_keys_that_are_exchanged_between_mask_and_seal() -> None:
    cohort = Cohort(make_plan())
    adverts = _adverts(cohort)
    adverts[1] = msgspec.structs.replace(
        adverts[1], mask_key=adverts[1].seal_key, seal_key=adverts[1].mask_key
    )
    _refuses(
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
    _refuses(cohort.clients[ME], encode(Adverts(cohort.plan.digest, tuple(adverts))), why)


def test_refuses_its_own_key_under_a_colluding_nodes_name() -> None:
    cohort = Cohort(make_plan())
    adverts = _adverts(cohort)
    mine = next(advert for advert in adverts if advert.node == ME)
    adverts[1] = _sign_advert(cohort.plan, "node-1", mine.mask_key, adverts[1].seal_key)
    request = encode(Adverts(cohort.plan.digest, tuple(adverts)))
    _refuses(cohort.clients[ME], request, "keys are the same")


def test_refuses_a_key_of_small_order_from_a_colluding_node() -> None:
    cohort = Cohort(make_plan())
    adverts = _adverts(cohort)
    adverts[1] = _sign_advert(cohort.plan, "node-1", adverts[1].mask_key, bytes(32))
    request = encode(Adverts(cohort.plan.digest, tuple(adverts)))
    _refuses(cohort.clients[ME], request, "cannot be exchanged|can be exchanged")


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
    _refuses(cohort.clients[ME], request, why)
    assert ME not in cohort.asked, "the vector was read for a list that is false"


def test_refuses_one_who_shared_without_having_advertised() -> None:
    cohort = Cohort(make_plan(7))
    cohort.until(Stage.MASK, gone=frozenset({"node-6"}))
    boxes = list(parse(Delivered, cohort.server.requests()[ME], cohort.plan).boxes)
    grown = (*boxes, Box("node-6", boxes[0].data))
    request = encode(Delivered(cohort.plan.digest, grown))
    _refuses(cohort.clients[ME], request, "did not advertise")


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


@pytest.mark.parametrize(
    ("listed", "why"),
    [
        (["node-1", "node-2", "node-3", "node-4", "node-5"], "do not hold this node"),
        ([ME, "node-1", "node-2", "node-3"], "Only 4 nodes survived"),
        ([ME, "node-1", "node-2", "node-3", "node-4", "node-4"], "stands twice"),
        ([ME, "node-1", "node-2", "node-3", "node-4", "node-9"], "never shared"),
        ([ME, "node-1", "node-2", "node-3", "node-4", "node-6"], "never shared"),
        ([], "do not hold this node"),
    ],
)
def test_refuses_a_false_list_of_survivors(listed: list[str], why: str) -> None:
    """Too few, doubled, unknown, without this node; node-6 advertised and never shared."""
    cohort = Cohort(make_plan(7))
    cohort.until(Stage.SHARE)
    cohort.server.collect(cohort.answers(cohort.server.requests(), gone=frozenset({"node-6"})))
    cohort.until(Stage.CONSISTENCY)
    request = encode(Survivors(cohort.plan.digest, tuple(listed)))
    _refuses(cohort.clients[ME], request, why)


def test_two_lists_of_survivors_unmask_nothing() -> None:
    cohort = Cohort(make_plan())
    cohort.until(Stage.CONSISTENCY)
    all_six, five = cohort.plan.nodes, cohort.plan.nodes[:5]
    plan = cohort.plan.digest
    consents = []
    for node in cohort.plan.nodes:
        listed = all_six if node in {"node-0", "node-1", "node-5"} else five
        reply = cohort.clients[node].answer(encode(Survivors(plan, listed)))
        consents.append(parse(Consent, reply, cohort.plan))
    for node in cohort.plan.nodes:
        listed = all_six if node in {"node-0", "node-1", "node-5"} else five
        shown = tuple(c for c in consents if c.node in listed)
        _refuses(cohort.clients[node], encode(Consents(plan, shown)), "not by the node")


def test_a_split_view_with_a_colluding_node_reaches_no_threshold() -> None:
    """The colluder signs both views; the honest are too few for either."""
    cohort = Cohort(make_plan(7))
    cohort.until(Stage.CONSISTENCY)
    plan, names = cohort.plan.digest, cohort.plan.nodes
    views = {node: names if at < 3 else names[:6] for at, node in enumerate(names[:6])}
    signed = {
        node: parse(
            Consent, cohort.clients[node].answer(encode(Survivors(plan, view))), cohort.plan
        )
        for node, view in views.items()
    }
    for node, view in views.items():
        same = [consent for name, consent in signed.items() if views[name] == view]
        colluder = Consent(plan, "node-5", identity("node-5").sign(_told(cohort, view)))
        shown = {consent.node: consent for consent in (*same, colluder)}
        request = encode(Consents(plan, tuple(shown.values())))
        _refuses(cohort.clients[node], request, r"Only [34] nodes agreed")


def test_a_split_view_of_who_shared_unmasks_nothing() -> None:
    """Told that different nodes shared, two halves agree on survivors and on nothing else."""
    cohort = Cohort(make_plan(7))
    requests = cohort.until(Stage.MASK)
    plan = cohort.plan.digest
    for node in cohort.plan.nodes:
        boxes = parse(Delivered, requests[node], cohort.plan).boxes
        if node in {"node-0", "node-1", "node-2"}:
            boxes = tuple(box for box in boxes if box.peer != "node-6")
        cohort.clients[node].answer(encode(Delivered(plan, boxes)))
    survivors = cohort.plan.nodes[:6]
    consents = tuple(
        parse(Consent, cohort.clients[node].answer(encode(Survivors(plan, survivors))), cohort.plan)
        for node in survivors
    )
    for node in survivors:
        _refuses(cohort.clients[node], encode(Consents(plan, consents)), "not by the node")


@pytest.mark.parametrize(
    ("signers", "why"),
    [
        (["node-0", "node-1", "node-2", "node-3"], "Only 4 nodes agreed"),
        (["node-0", "node-1", "node-2", "node-3", "node-3"], "stands twice"),
        (["node-0", "node-1", "node-2", "node-3", "node-9"], "not among the survivors"),
        (["node-0", "node-1", "node-2", "node-3", "node-5"], "not among the survivors"),
    ],
)
def test_refuses_too_few_or_false_consents(signers: list[str], why: str) -> None:
    """node-5 vanished; its signature is right but it is nobody's to count."""
    cohort = Cohort(make_plan())
    cohort.until(Stage.MASK)
    cohort.server.collect(cohort.answers(cohort.server.requests(), gone=frozenset({"node-5"})))
    cohort.until(Stage.UNMASK)
    text = _told(cohort, cohort.plan.nodes[:5])
    _refuses(cohort.clients[ME], _consents(cohort, signers, text), why)


def test_refuses_consents_to_another_list() -> None:
    cohort = Cohort(make_plan())
    cohort.until(Stage.UNMASK)
    text = _told(cohort, cohort.plan.nodes[:5])
    request = _consents(cohort, cohort.plan.nodes, text)
    _refuses(cohort.clients[ME], request, "not by the node")


def test_refuses_a_consent_that_one_node_signed_for_another() -> None:
    cohort = Cohort(make_plan())
    cohort.until(Stage.UNMASK)
    text, plan = _told(cohort, cohort.plan.nodes), cohort.plan.digest
    forged = tuple(Consent(plan, node, identity("node-1").sign(text)) for node in cohort.plan.nodes)
    _refuses(cohort.clients[ME], encode(Consents(plan, forged)), "not by the node")


def test_never_reveals_both_secrets_of_one_peer() -> None:
    """Survivors: seed and what comes off. Vanished: mask key. In one answer, once."""
    plan = make_plan(
        8, noise=noise(), minimum_survivors=6, threshold=6, dimension=3, modulus_bits=48
    )
    cohort = Cohort(plan)
    cohort.until(Stage.MASK)
    cohort.server.collect(cohort.answers(cohort.server.requests(), gone=frozenset({"node-7"})))
    request = cohort.until(Stage.UNMASK)[ME]
    held = {peer: list(shares) for peer, shares in cohort.clients[ME]._held.items()}
    reveal = parse(Reveal, cohort.clients[ME].answer(request), plan)
    assert [given.peer for given in reveal.vanished] == ["node-7"]
    assert {given.peer for given in reveal.survivors} == set(plan.nodes[1:7])
    assert reveal.vanished[0].shares == (held["node-7"][0],)
    schedule = plan.schedule
    assert schedule is not None
    off = schedule.removed(7)
    assert off == (1,)
    for given in reveal.survivors:
        mask_key, seed, *increments = held[given.peer]
        assert given.shares == (seed, *(increments[part] for part in off))
        assert mask_key not in given.shares
    _refuses_nothing_left(cohort.clients[ME], request)


def test_no_more_noise_comes_off_than_the_signed_survivors_allow() -> None:
    """A server that passes a vanished node off as a survivor gets more taken off, but no sum."""
    plan = make_plan(
        8, noise=noise(scale=5.0), minimum_survivors=6, threshold=6, dimension=4, modulus_bits=48
    )
    cohort = Cohort(plan)
    cohort.until(Stage.MASK)
    replies = cohort.answers(cohort.server.requests(), gone=frozenset({"node-7"}))
    masked = {node: parse(Masked, reply, plan) for node, reply in replies.items()}
    lie = encode(Survivors(plan.digest, plan.nodes))
    consents = tuple(
        parse(Consent, cohort.clients[node].answer(lie), plan) for node in plan.nodes[:7]
    )
    reveals = [
        parse(Reveal, cohort.clients[node].answer(encode(Consents(plan.digest, consents))), plan)
        for node in plan.nodes[:7]
    ]
    # Nobody told the mask key of the node that never sent a vector: its masks stay in the sum.
    assert all(reveal.vanished == () for reveal in reveals)
    total = np.zeros(plan.dimension, dtype=np.uint64)
    for node, reveal in zip(plan.nodes[:7], reveals, strict=True):
        total += unpack(masked[node].values, dimension=4, modulus_bits=48)
        key = masks.self_mask_key(reveal.seed, plan=plan.digest, node=node)
        total -= masks.expand(key, dimension=4, modulus_bits=48)
    seen = from_residues(total & np.uint64((1 << 48) - 1), 48)
    assert np.abs(seen).max() > 1 << 40


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
        np.full(5, 6001, dtype=np.int64),
        np.full(5, -(2**63), dtype=np.int64),
    ],
)
def test_sends_nothing_when_its_own_vector_breaks_the_plan(vector: NDArray[np.int64]) -> None:
    cohort = Cohort(make_plan())
    cohort.vectors[ME] = vector
    request = cohort.until(Stage.MASK)[ME]
    _refuses(cohort.clients[ME], request, "own vector")


def test_a_round_whose_rows_cannot_be_read_is_over_and_its_secrets_gone() -> None:
    cohort = Cohort(make_plan())
    request = cohort.until(Stage.MASK)[ME]
    del cohort.vectors[ME]
    with pytest.raises(KeyError):
        cohort.clients[ME].answer(request)
    _refuses_nothing_left(cohort.clients[ME], request)


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
    _refuses(Cohort(make_plan()).clients[ME], junk, "Expected a message|longer than any")


def test_refuses_a_message_with_something_added() -> None:
    plan = make_plan()

    class Longer(Message, frozen=True, tag="begin"):
        extra: int

    for request in (encode(Longer(plan.digest, 1)), encode(Begin(plan.digest)) + b"\x00"):
        _refuses(Cohort(plan).clients[ME], request, "Expected a message")


def test_errors_and_representations_hold_no_secret() -> None:
    cohort = Cohort(make_plan())
    request = cohort.until(Stage.MASK)[ME]
    client = cohort.clients[ME]
    secrets = client._secrets
    assert secrets is not None
    hidden = (secrets.mask_private, secrets.seal_private, secrets.seed)
    cohort.vectors[ME] = np.full(5, 123456789, dtype=np.int64)
    with pytest.raises(ProtocolError) as refusal:
        client.answer(request)
    shown = f"{refusal.value} {refusal.value.diagnostics()} {client!r} {secrets!r}"
    assert "123456789" not in shown
    for secret in hidden:
        assert secret.hex() not in shown
        assert repr(secret) not in shown
