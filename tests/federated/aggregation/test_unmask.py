"""What a malicious node can do to the others: leave, or end the round; no wrong secret counts."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from federated.aggregation import masks
from federated.aggregation.messages import (
    Advert,
    Box,
    Consent,
    Masked,
    PeerShares,
    Reveal,
    Shares,
    advert_text,
    box_context,
    encode,
    parse,
)
from federated.aggregation.server import Stage
from federated.aggregation.shares import FIELD, seal, split
from federated.errors import CohortError
from tests.federated.aggregation.rounds import Cohort, Tamper, identity, make_plan, noise

LIAR = "node-1"


def _only(stage: Stage, change: Tamper) -> Tamper:
    def tamper(at: Stage, node: str, reply: bytes) -> bytes | None:
        return change(at, node, reply) if at is stage and node == LIAR else reply

    return tamper


@pytest.mark.parametrize("stage", [s for s in Stage if s not in {Stage.DONE, Stage.ABORTED}])
@pytest.mark.parametrize(
    "junk", [b"", b"NaN", msgspec.msgpack.encode([float("nan")]), b"\xff" * 64, bytes(5_000_000)]
)
def test_who_answers_junk_counts_as_dropped(stage: Stage, junk: bytes) -> None:
    cohort = Cohort(make_plan())
    result = cohort.run(tamper=_only(stage, lambda *_: junk))
    assert cohort.server.dropped.keys() == {LIAR}
    assert cohort.server.dropped[LIAR].startswith(stage)
    assert np.array_equal(result.total, cohort.plain_sum(result.survivors))
    late = stage in {Stage.CONSISTENCY, Stage.UNMASK}
    assert (LIAR in result.survivors) is late


@pytest.mark.parametrize("length", [0, 19, 21, 40])
def test_who_sends_a_vector_of_the_wrong_length_counts_as_dropped(length: int) -> None:
    cohort = Cohort(make_plan())
    short = encode(Masked(cohort.plan.digest, LIAR, bytes(length)))
    result = cohort.run(tamper=_only(Stage.MASK, lambda *_: short))
    assert LIAR not in result.survivors
    assert np.array_equal(result.total, cohort.plain_sum(result.survivors))


def test_who_sends_values_beyond_the_modulus_counts_as_dropped() -> None:
    cohort = Cohort(make_plan(modulus_bits=20))
    beyond = encode(Masked(cohort.plan.digest, LIAR, b"\xff\xff\xff" * 5))
    result = cohort.run(tamper=_only(Stage.MASK, lambda *_: beyond))
    assert LIAR not in result.survivors
    assert np.array_equal(result.total, cohort.plain_sum(result.survivors))


def test_who_copies_anothers_round_keys_counts_as_dropped() -> None:
    cohort = Cohort(make_plan())
    copied: dict[str, Advert] = {}

    def tamper(stage: Stage, node: str, reply: bytes) -> bytes:
        if stage is not Stage.ADVERTISE:
            return reply
        copied[node] = parse(Advert, reply, cohort.plan)
        if node != LIAR:
            return reply
        other = copied["node-0"]
        text = advert_text(cohort.plan, LIAR, other.mask_key, other.seal_key)
        return encode(
            Advert(
                cohort.plan.digest,
                LIAR,
                other.mask_key,
                other.seal_key,
                identity(LIAR).sign(text),
            )
        )

    result = cohort.run(tamper=tamper)
    assert LIAR not in result.survivors
    assert np.array_equal(result.total, cohort.plain_sum(result.survivors))


@pytest.mark.parametrize("stage", [s for s in Stage if s not in {Stage.DONE, Stage.ABORTED}])
def test_who_answers_in_anothers_name_counts_as_dropped(stage: Stage) -> None:
    cohort = Cohort(make_plan())
    seen: dict[str, bytes] = {}

    def tamper(at: Stage, node: str, reply: bytes) -> bytes:
        if at is stage:
            seen[node] = reply
            if node == LIAR:
                return seen["node-0"]
        return reply

    result = cohort.run(tamper=tamper)
    assert LIAR in cohort.server.dropped
    assert np.array_equal(result.total, cohort.plain_sum(result.survivors))


def _wrong_shares(cohort: Cohort, reply: bytes) -> bytes:
    """Shares of secrets that are not the liar's, sealed as they should be."""
    plan, client = cohort.plan, cohort.clients[LIAR]
    message = parse(Shares, reply, plan)
    made = split(b"w" * 32, threshold=plan.threshold, holders=len(plan.nodes))
    assert client._secrets is not None
    boxes = []
    for box in message.boxes:
        key = client._box_key(box.peer, sender=LIAR, receiver=box.peer)
        context = box_context(plan, sender=LIAR, receiver=box.peer)
        share = made[plan.nodes.index(box.peer)]
        boxes.append(Box(box.peer, seal(key, [share] * 2, context=context)))
    return encode(msgspec.structs.replace(message, boxes=tuple(boxes)))


def test_wrong_shares_do_no_harm_while_their_owner_stays() -> None:
    cohort = Cohort(make_plan())
    result = cohort.run(tamper=_only(Stage.SHARE, lambda _s, _n, r: _wrong_shares(cohort, r)))
    assert result.survivors == cohort.plan.nodes
    assert np.array_equal(result.total, cohort.plain_sum(result.survivors))


@pytest.mark.parametrize("leaves", [Stage.MASK, Stage.UNMASK])
def test_wrong_shares_lose_the_round_when_their_owner_leaves(leaves: Stage) -> None:
    cohort = Cohort(make_plan())
    with pytest.raises(CohortError, match="cannot be rebuilt"):
        cohort.run(
            drops={leaves: frozenset({LIAR})},
            tamper=_only(Stage.SHARE, lambda _s, _n, r: _wrong_shares(cohort, r)),
        )
    assert cohort.server.stage is Stage.ABORTED


@pytest.mark.parametrize("value", [bytes(33), b"\xff" * 33, (FIELD - 1).to_bytes(33)])
def test_a_liar_among_those_who_rebuild_is_left_out(value: bytes) -> None:
    cohort = Cohort(make_plan(7))

    def lie(_stage: Stage, _node: str, reply: bytes) -> bytes:
        reveal = parse(Reveal, reply, cohort.plan)
        wrong = tuple(PeerShares(g.peer, (value,) * len(g.shares)) for g in reveal.survivors)
        gone = tuple(PeerShares(g.peer, (value,) * len(g.shares)) for g in reveal.vanished)
        return encode(msgspec.structs.replace(reveal, survivors=wrong, vanished=gone))

    result = cohort.run(
        drops={Stage.UNMASK: frozenset({"node-6"})}, tamper=_only(Stage.UNMASK, lie)
    )
    assert np.array_equal(result.total, cohort.plain_sum(result.survivors))


def test_too_many_liars_lose_the_round() -> None:
    cohort = Cohort(make_plan(7))

    def lie(stage: Stage, node: str, reply: bytes) -> bytes:
        if stage is not Stage.UNMASK or node in {"node-0", "node-1"}:
            return reply
        reveal = parse(Reveal, reply, cohort.plan)
        wrong = tuple(PeerShares(g.peer, (bytes(33),)) for g in reveal.survivors)
        return encode(msgspec.structs.replace(reveal, survivors=wrong))

    with pytest.raises(CohortError, match="cannot be rebuilt"):
        cohort.run(drops={Stage.UNMASK: frozenset({"node-6"})}, tamper=lie)


@pytest.mark.parametrize("what", ["seed", "increment", "missing", "doubled", "both", "itself"])
def test_a_false_reveal_counts_as_none(what: str) -> None:
    plan = make_plan(
        8, noise=noise(), minimum_survivors=6, threshold=6, dimension=3, modulus_bits=48
    )
    cohort = Cohort(plan)

    def lie(_stage: Stage, _node: str, reply: bytes) -> bytes:
        reveal = parse(Reveal, reply, plan)
        first, gone = reveal.survivors[0], reveal.vanished[0]
        changes: dict[str, dict[str, object]] = {
            "seed": {"seed": b"x" * 32},
            "increment": {"increments": (b"x" * 32,)},
            "missing": {"increments": ()},
            "doubled": {"survivors": (*reveal.survivors, first)},
            "both": {"vanished": (gone, PeerShares(first.peer, gone.shares))},
            "itself": {"vanished": (gone, PeerShares(LIAR, gone.shares))},
        }
        return encode(msgspec.structs.replace(reveal, **changes[what]))

    result = cohort.run(drops={Stage.MASK: frozenset({"node-7"})}, tamper=_only(Stage.UNMASK, lie))
    assert cohort.server.dropped.keys() == {"node-7", LIAR}
    assert LIAR in result.survivors
    assert np.array_equal(result.total, cohort.expected(result.survivors))


def test_an_advert_that_its_node_did_not_sign_counts_as_none() -> None:
    cohort = Cohort(make_plan())

    def lie(_stage: Stage, _node: str, reply: bytes) -> bytes:
        advert = parse(Advert, reply, cohort.plan)
        text = advert_text(cohort.plan, LIAR, advert.mask_key, advert.seal_key)
        return encode(msgspec.structs.replace(advert, signature=identity("node-2").sign(text)))

    result = cohort.run(tamper=_only(Stage.ADVERTISE, lie))
    assert cohort.server.dropped.keys() == {LIAR}
    assert np.array_equal(result.total, cohort.plain_sum(result.survivors))


def test_a_false_consent_counts_as_none() -> None:
    cohort = Cohort(make_plan())
    wrong = encode(Consent(cohort.plan.digest, LIAR, identity(LIAR).sign(b"something else")))
    result = cohort.run(tamper=_only(Stage.CONSISTENCY, lambda *_: wrong))
    assert LIAR in cohort.server.dropped
    assert np.array_equal(result.total, cohort.plain_sum(result.survivors))


@pytest.mark.parametrize("change", ["fewer", "doubled", "stranger", "small", "commitments"])
def test_shares_that_are_not_one_for_each_peer_count_as_none(change: str) -> None:
    cohort = Cohort(make_plan())

    def lie(_stage: Stage, _node: str, reply: bytes) -> bytes:
        message = parse(Shares, reply, cohort.plan)
        boxes = {
            "fewer": message.boxes[1:],
            "doubled": (*message.boxes, message.boxes[0]),
            "stranger": (*message.boxes[1:], Box("node-9", message.boxes[0].data)),
            "small": (Box(message.boxes[0].peer, b"small"), *message.boxes[1:]),
        }.get(change, message.boxes)
        commitments = message.commitments * (2 if change == "commitments" else 1)
        changed = msgspec.structs.replace(message, boxes=boxes, commitments=commitments)
        return encode(changed)

    result = cohort.run(tamper=_only(Stage.SHARE, lie))
    assert LIAR not in result.survivors
    assert np.array_equal(result.total, cohort.plain_sum(result.survivors))


def test_a_rebuilt_mask_key_is_the_one_that_was_advertised() -> None:
    cohort = Cohort(make_plan())
    cohort.until(Stage.MASK)
    secrets = cohort.clients["node-5"]._secrets
    assert secrets is not None
    assert masks.public_key(secrets.mask_private) == cohort.server._adverts["node-5"].mask_key
    result = cohort.run(drops={Stage.MASK: frozenset({"node-5"})})
    assert np.array_equal(result.total, cohort.plain_sum(result.survivors))
