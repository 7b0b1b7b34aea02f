"""What a node says it would answer, who is counted by it, and who is believed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest

from federated import study_run
from federated.aggregation.server import SecureServer
from federated.errors import (
    CohortError,
    FederatedError,
    ProtocolError,
    RefusedError,
)
from federated.model import Query
from federated.node.agent import RunFacts
from federated.node.consent import Consents
from federated.node.contact import ContactRequest as Request
from federated.node.contact import parse_request
from federated.node.receipts import Receipts
from federated.rounds import Ask, Greeting, encode, open_reply, parse
from federated.study_run import Patience, StudyRun
from tests.federated.deployment.federation import PEOPLE
from tests.federated.runs import RUN, World, gone, opened, question


@pytest.fixture
def minimum_cohort() -> int:
    return 6


@pytest.fixture
def world(tmp_path: Path, minimum_cohort: int) -> Iterator[World]:
    with opened(tmp_path, minimum_cohort=minimum_cohort) as made:
        yield made


def revoke(world: World, node: str, *people: str) -> None:
    store = world.nodes[node].store
    for name in people:
        Consents(store).revoke(store.person(name), now=int(time.time()))


def claims(world: World, node: str, **changes: object) -> None:
    """Let a node say something else in its greeting, under its own signature."""

    def forged(reply: bytes, request: bytes) -> bytes:
        said = msgspec.structs.replace(parse(Greeting, reply[64:]), **changes)
        return world.sign(node, encode(said), "greet", request)

    world.faults[node, "greet"] = forged


def test_counts_those_who_would_be_let_in_and_nobody_else(world: World) -> None:
    revoke(world, "node-2", "me", "you")
    revoke(world, "node-3", "he")
    store = world.nodes["node-3"].store
    store.set_state(store.person("she"), "paused", now=int(time.time()))
    outcome = world.run()
    assert (outcome.nodes, outcome.people) == (5, 21)
    assert world.receipts("node-4") == ["allowed"]


@pytest.mark.parametrize("minimum_cohort", [25])
def test_those_who_did_not_agree_do_not_fill_a_cohort(world: World) -> None:
    revoke(world, "node-2", "me")
    with pytest.raises(CohortError, match="24 people"):
        world.run()
    assert not world.reserved()


@pytest.mark.parametrize("people", [0, -1, 6, 10**9 + 1, 2**62])
def test_a_node_that_claims_more_people_than_it_may_takes_no_part(
    world: World, people: int
) -> None:
    claims(world, "node-2", people=people)
    outcome = world.run()
    assert (outcome.nodes, outcome.people) == (4, 20)
    assert outcome.dropped["node-2"].startswith("greet: The node speaks for")


def test_a_claim_that_every_node_would_refuse_costs_nobody_anything(world: World) -> None:
    world.most_people = 2**63
    for node in ("node-2", "node-3"):
        claims(world, node, people=10**9 + 1)
    with pytest.raises(CohortError, match="would answer"):
        world.run()
    assert not world.reserved()


def test_a_request_that_every_node_would_refuse_costs_nobody_anything(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of it is checked as nodes check it, whatever was let through before."""
    world.most_people = 2**63
    monkeypatch.setattr(study_run, "MAX_PEOPLE", 2**63)
    claims(world, "node-2", people=10**9 + 1)
    with pytest.raises(FederatedError):
        world.run()
    assert world.asked == ["greet"]
    assert not world.reserved()


@pytest.mark.parametrize(
    "change", [{"study": "ab" * 32}, {"query": "other"}, {"run": "78"}, {"round_number": 1}]
)
def test_a_greeting_for_another_round_does_not_count(
    world: World, change: Mapping[str, object]
) -> None:
    claims(world, "node-2", **change)
    outcome = world.run()
    assert outcome.nodes == 4
    assert "another round" in outcome.dropped["node-2"]


def test_a_greeting_is_not_taken_for_one_to_another_round(world: World) -> None:
    facts = RunFacts(run_id=RUN, configuration=world.configuration)
    earlier = world.nodes["node-2"].service.respond(facts, "greet", question(world).encode())
    world.faults["node-2", "greet"] = lambda *_: earlier
    outcome = world.run(round_number=1)
    assert outcome.nodes == 4
    assert "node-2" in outcome.dropped


class Liar(StudyRun):
    """A coordinator that wants an answer from however few, and counts one node as ten people."""

    counted = "node-1"

    def _verify_cohort(self, people: int, query: Query) -> None:
        """Look away."""

    def _request(
        self, name: str, round_number: int, greetings: Mapping[str, Greeting], given: bytes
    ) -> Request:
        request = super()._request(name, round_number, greetings, given)
        return replace(request, taking_part={**request.taking_part, self.counted: 10})


@dataclass
class TwoFaced:
    """Tells the node of which it lies the truth, and lies of another: the totals are the same."""

    world: World

    def ask(
        self, stage: str, payloads: Mapping[str, bytes], patience: Patience
    ) -> Mapping[str, bytes]:
        if stage != "advertise":
            return self.world.ask(stage, payloads, patience)
        ask = parse(Ask, payloads[Liar.counted])
        request = parse_request(ask.contact)
        told = {**request.taking_part, Liar.counted: len(PEOPLE), "node-2": 10}
        other = msgspec.structs.replace(ask, contact=replace(request, taking_part=told).encode())
        lied = {**payloads, Liar.counted: encode(other)}
        answers = dict(self.world.ask(stage, lied, patience))
        if (reply := answers.get(Liar.counted)) is not None:
            # What a reply answers is signed with it; the coordinator itself need not look.
            answers[Liar.counted] = self.world.sign(
                Liar.counted, reply[64:], stage, payloads[Liar.counted]
            )
        return answers


@pytest.mark.parametrize("minimum_cohort", [30])
def test_each_node_told_another_truth_makes_no_larger_cohort(world: World) -> None:
    ports = replace(world.ports(), exchange=TwoFaced(world))
    with pytest.raises(CohortError):
        Liar(world.signed, ports, run_id=RUN).ask("hours", 0)
    assert "mask" not in world.asked


@pytest.mark.parametrize("minimum_cohort", [25])
def test_who_leaves_nodes_out_gets_no_sum_over_fewer_people_than_promised(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StudyRun, "_verify_cohort", lambda *_: None)
    monkeypatch.setattr(SecureServer, "_verify_people", lambda *_: None, raising=False)
    world.faults["node-2", "mask"] = gone
    with pytest.raises(CohortError, match="0 of 4 nodes answered at stage `consistency`"):
        world.run()


def greet(world: World, **changes: object) -> Greeting:
    facts = RunFacts(run_id=RUN, configuration=world.configuration)
    payload = replace(question(world), **changes).encode()  # type: ignore[arg-type]
    node = world.nodes["node-1"]
    reply = node.service.respond(facts, "greet", payload)
    key = node.keys.identity_public
    return parse(Greeting, open_reply(key, reply, run_id=RUN, stage="greet", request=payload))


def test_a_greeting_reserves_nothing_and_tells_people_only_where_it_ends(world: World) -> None:
    revoke(world, "node-1", "me")
    assert greet(world).people == 4
    store = world.nodes["node-1"].store
    for _ in range(3):
        greet(world)
    for person in store.people():
        # Whether they agreed or not: a study asked, and was told a number.
        (receipt,) = Receipts(store).of(person)
        assert (receipt.outcome, receipt.times) == ("counted", 4)
        assert "Nothing of yours was read or spent" in receipt.words()
    assert store.database.one("SELECT count(*) FROM spends") == (0,)
    revoke(world, "node-1", *PEOPLE)
    with pytest.raises(RefusedError) as caught:
        greet(world)
    assert caught.value.rule == "consent"
    # No request follows: this was the whole contact, and each is told of it.
    for person in store.people():
        receipt = Receipts(store).of(person)[-1]
        assert (receipt.outcome, receipt.told.rule) == ("refused", "consent")


def unsigned(world: World) -> dict[str, object]:
    return {"study": replace(world.signed, signatures=world.signed.signatures[1:]).encode()}


def unconfigured(world: World) -> dict[str, object]:
    world.configuration = {**world.configuration, "more": 1}
    return {}


def other_code(world: World) -> dict[str, object]:
    world.nodes["node-1"].service._ports.guard._ports = replace(
        world.nodes["node-1"].service._ports.guard._ports, code_hash="ab" * 32
    )
    return {}


def expired(world: World) -> dict[str, object]:
    service = world.nodes["node-1"].service
    over = float(world.signed.study.valid_until)
    service._ports = replace(service._ports, now=lambda: over)
    return {}


def not_enrolled(world: World) -> dict[str, object]:
    database = world.nodes["node-1"].store.database
    with database.transaction():
        database.run("DELETE FROM meta WHERE name = 'enrolment'")
    return {}


def other_roster(world: World) -> dict[str, object]:
    """As of a study that was approved for others, and asked of this node all the same."""
    return {"roster": dict(list(question(world).roster.items())[1:])}


def garbage(world: World) -> dict[str, object]:
    return {"study": b"{}"}


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (garbage, "manifest"),
        (unsigned, "signatures"),
        (not_enrolled, "signatures"),
        (other_code, "code"),
        (unconfigured, "run_configuration"),
        (other_roster, "roster"),
        (expired, "expired"),
    ],
)
def test_a_greeting_about_a_study_that_is_not_in_order_gets_no_answer(
    world: World, broken: Callable[[World], dict[str, object]], rule: str
) -> None:
    with pytest.raises(RefusedError) as caught:
        greet(world, **broken(world))
    assert caught.value.rule == rule
    assert world.receipts("node-1") == ["refused"]


def test_a_greeting_about_another_run_gets_no_answer(world: World) -> None:
    with pytest.raises(ProtocolError):
        greet(world, run=str(RUN + 1))


def test_a_greeting_about_a_round_that_was_answered_gets_no_answer(world: World) -> None:
    world.run()
    with pytest.raises(RefusedError) as caught:
        greet(world)
    assert caught.value.rule == "repeat"
