"""What a node refuses once vectors are sent: false lists of survivors, false consents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.aggregation import masks
from federated.aggregation.encoding import from_residues, unpack
from federated.aggregation.messages import (
    Consent,
    Consents,
    Delivered,
    Masked,
    Reveal,
    Survivors,
    adverts_digest,
    consent_text,
    encode,
    parse,
)
from federated.aggregation.plan import default_threshold
from federated.aggregation.server import Stage
from federated.errors import ProtocolError
from tests.federated.aggregation.rounds import (
    Cohort,
    answers_nothing,
    identity,
    make_plan,
    noise,
    refuses,
)

ME = "node-0"
#: Ten people at each node: with one node fewer they are 50.
PEOPLE = {f"node-{at}": 10 for at in range(6)}


def test_refuses_survivors_who_speak_for_fewer_people_than_promised() -> None:
    cohort = Cohort(make_plan(people=PEOPLE, minimum_people=51))
    cohort.until(Stage.CONSISTENCY)
    few = encode(Survivors(cohort.plan.digest, cohort.plan.nodes[:5]))
    refuses(cohort.clients[ME], few, "50 people survived; this node asks for 51")


def test_refuses_survivors_who_speak_for_fewer_people_than_the_node_asks_for() -> None:
    cohort = Cohort(make_plan(people=PEOPLE, minimum_people=2), minimum_people=51)
    cohort.until(Stage.CONSISTENCY)
    few = encode(Survivors(cohort.plan.digest, cohort.plan.nodes[:5]))
    refuses(cohort.clients[ME], few, "50 people survived; this node asks for 51")


def test_reads_no_vector_when_those_who_shared_speak_for_fewer_people_than_promised() -> None:
    cohort = Cohort(make_plan(people=PEOPLE, minimum_people=51))
    boxes = parse(Delivered, cohort.until(Stage.MASK)[ME], cohort.plan).boxes
    few = encode(Delivered(cohort.plan.digest, boxes[:4]))
    refuses(cohort.clients[ME], few, "50 people shared; this node asks for 51")
    assert cohort.asked == []


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
    refuses(cohort.clients[ME], request, why)


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
        refuses(cohort.clients[node], encode(Consents(plan, shown)), "not by the node")


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
        refuses(cohort.clients[node], request, r"Only [34] nodes agreed")


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
        refuses(cohort.clients[node], encode(Consents(plan, consents)), "not by the node")


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
    refuses(cohort.clients[ME], _consents(cohort, signers, text), why)


def test_refuses_consents_to_another_list() -> None:
    cohort = Cohort(make_plan())
    cohort.until(Stage.UNMASK)
    text = _told(cohort, cohort.plan.nodes[:5])
    request = _consents(cohort, cohort.plan.nodes, text)
    refuses(cohort.clients[ME], request, "not by the node")


def test_refuses_a_consent_that_one_node_signed_for_another() -> None:
    cohort = Cohort(make_plan())
    cohort.until(Stage.UNMASK)
    text, plan = _told(cohort, cohort.plan.nodes), cohort.plan.digest
    forged = tuple(Consent(plan, node, identity("node-1").sign(text)) for node in cohort.plan.nodes)
    refuses(cohort.clients[ME], encode(Consents(plan, forged)), "not by the node")


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
    for gave in reveal.survivors:
        mask_key, seed, *increments = held[gave.peer]
        assert gave.shares == (seed, *(increments[part] for part in off))
        assert mask_key not in gave.shares
    answers_nothing(cohort.clients[ME], request)


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


@given(data=st.data())
@settings(deadline=None, max_examples=25, derandomize=True)
def test_whatever_two_views_are_shown_one_at_most_is_unmasked(data: st.DataObject) -> None:
    """As many nodes collude as a plan allows, sign everything, and hand over all they hold."""
    nodes = data.draw(st.integers(4, 10))
    threshold = data.draw(st.integers(default_threshold(nodes), nodes - 1))
    colluding = 2 * threshold - nodes - 1
    plan = make_plan(nodes, threshold=threshold, minimum_survivors=threshold, colluding=colluding)
    cohort = Cohort(plan)
    requests = cohort.until(Stage.MASK)
    bad = plan.nodes[:colluding]
    views = [_view(data, plan.nodes, threshold) for _ in range(2)]
    chosen = {node: views[data.draw(st.integers(0, 1))] for node in plan.nodes if node not in bad}
    # Whether consents to the other view are passed off as consents to this one.
    mixed = data.draw(st.booleans())
    signed: dict[str, Consent] = {}
    for node, (shared, survivors) in chosen.items():
        if node not in survivors:
            continue
        boxes = parse(Delivered, requests[node], plan).boxes
        told = tuple(box for box in boxes if box.peer in shared)
        cohort.clients[node].answer(encode(Delivered(plan.digest, told)))
        reply = cohort.clients[node].answer(encode(Survivors(plan.digest, survivors)))
        signed[node] = parse(Consent, reply, plan)
    reveals: dict[str, Reveal] = {}
    for node in signed:
        shared, survivors = chosen[node]
        text = _told(cohort, survivors, shared)
        passed_off = survivors if mixed else ()
        shown = [
            c for name, c in signed.items() if chosen[name] == chosen[node] or name in passed_off
        ]
        shown += [
            Consent(plan.digest, name, identity(name).sign(text))
            for name in bad
            if name in survivors
        ]
        try:
            reply = cohort.clients[node].answer(encode(Consents(plan.digest, tuple(shown))))
        except ProtocolError:
            continue
        reveals[node] = parse(Reveal, reply, plan)
    assert len({chosen[node] for node in reveals}) <= 1
    for owner in chosen:
        seed = {n for n, r in reveals.items() if owner in {g.peer for g in r.survivors}}
        key = {n for n, r in reveals.items() if owner in {g.peer for g in r.vanished}}
        seed |= {owner} & reveals.keys()
        assert not (len(seed) + colluding >= threshold and len(key) + colluding >= threshold)
        assert not (seed and key)


def _view(
    data: st.DataObject, nodes: tuple[str, ...], least: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Who shared and who survived, as a malicious server might say."""
    shared = data.draw(st.permutations(nodes))[: data.draw(st.integers(least, len(nodes)))]
    survivors = data.draw(st.permutations(shared))[: data.draw(st.integers(least, len(shared)))]
    return tuple(sorted(shared)), tuple(sorted(survivors))
