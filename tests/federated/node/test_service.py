"""What becomes of a round on a node: nothing fails in silence, and nothing tells of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from federated.aggregation.messages import Begin
from federated.aggregation.messages import encode as encode_stage
from federated.errors import CohortError, ProtocolError, RefusedError, StoreError
from federated.model import PersonRows, PrivacyCost, Query, RandomBits
from federated.node import enrolment
from federated.node import service as services
from federated.node.agent import RunFacts
from federated.node.budget import Budget
from federated.node.contact import ContactRequest, parse_request
from federated.node.guard import Guard
from federated.node.receipts import Receipts
from federated.node.service import NodeService, roster_of, round_name
from federated.node.store import Store
from federated.questions import declared_question
from federated.rounds import Ask, encode, parse, round_plan
from federated.study_log import make_bundle
from federated.study_run import STAGES
from tests.federated.deployment.federation import PEOPLE
from tests.federated.node.tables import fill
from tests.federated.runs import RUN, World, opened, question
from tests.federated.studies import ORIGIN

ME = "node-2"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with opened(tmp_path) as made:
        yield made


@dataclass
class Strange:
    """A real query whose vector is what a test wants."""

    query: Query
    vector: Callable[[Query, PersonRows], NDArray[Any]]

    def __getattr__(self, name: str) -> object:
        return getattr(self.query, name)

    def begin(self, given: bytes, *, index: int = 0) -> Strange:
        """Itself, as a statistic's is: else the real one would answer in its place."""
        assert (given, index) == (b"", 0)
        return self

    def encode(self, rows: PersonRows, random: RandomBits) -> NDArray[Any]:
        del random
        return self.vector(self.query, rows)


def asks(world: World, vector: Callable[[Query, PersonRows], NDArray[Any]]) -> None:
    """Let a node's queries make such vectors."""
    service = world.nodes[ME].service

    def query(ask: str) -> Query:
        return Strange(declared_question(ask), vector)  # type: ignore[return-value]

    service._ports = replace(service._ports, query=query)


def fails(query: Query, rows: PersonRows) -> NDArray[np.int64]:
    raise ZeroDivisionError(f"slept {rows.values}")


def huge(query: Query, rows: PersonRows) -> NDArray[np.int64]:
    del rows
    return np.full(query.dimension, 2**62, np.int64)


def wrong_shape(query: Query, rows: PersonRows) -> NDArray[np.int64]:
    del rows
    return np.ones(query.dimension + 1, np.int64)


def no_integers(query: Query, rows: PersonRows) -> NDArray[np.float64]:
    del rows
    return np.full(query.dimension, np.nan)


def contact(world: World, **changes: object) -> bytes:
    """What the coordinator sends a node first."""
    request = ContactRequest(
        study=world.signed.encode(),
        proof=make_bundle(world.log.directory, world.index, from_size=0).encode(),
        query="hours",
        run=str(RUN),
        round_number=0,
        roster={name: node.keys.identity_public for name, node in world.nodes.items()},
        taking_part=dict.fromkeys(world.nodes, len(PEOPLE)),
    )
    request = replace(request, **changes)  # type: ignore[arg-type]
    study = world.signed.study
    declared = study.query("hours")
    plan = round_plan(
        study, declared, declared_question(declared.ask), round_id=round_name(request),
        taking_part=roster_of(request),
    )  # fmt: skip
    return encode(Ask(contact=request.encode(), request=encode_stage(Begin(plan.digest))))


def begin(world: World, **changes: object) -> bytes:
    facts = RunFacts(run_id=RUN, configuration=world.configuration)
    return world.nodes[ME].service.respond(facts, "advertise", contact(world, **changes))


def spends(world: World) -> int:
    found = world.nodes[ME].store.database.one("SELECT count(*) FROM spends")
    assert found
    return int(found[0])


# --- Nothing tells of rows -----------------------------------------------------------------------


@pytest.mark.parametrize("vector", [fails, huge, wrong_shape, no_integers])
def test_an_answer_comes_whatever_a_persons_rows_make_of_it(
    world: World, vector: Callable[[Query, PersonRows], NDArray[Any]]
) -> None:
    asks(world, vector)
    outcome = world.run()
    assert (outcome.nodes, outcome.dropped) == (5, {})
    assert set(world.receipts(ME)) == {"allowed"}


def test_one_persons_vector_counts_at_most_as_far_as_the_query_says(world: World) -> None:
    asks(world, huge)
    summand = services._Summand(ports=world.nodes[ME].service._ports)
    summand.asked = query = summand.ports.query(world.signed.study.queries[0].ask).begin(b"")
    begin(world)
    current = world.nodes[ME].service._round
    assert current is not None
    summand.admission = current.admission
    assert summand().tolist() == [len(PEOPLE) * query.bound] * query.dimension


@dataclass
class Sided(Strange):
    """Asks one person alone."""

    tag: str = ""

    def asks(self, *, study: str, tag: str) -> bool:
        assert study == "hours-0"
        return tag == self.tag


def test_who_is_not_asked_adds_nothing_and_is_worked_for_all_the_same(world: World) -> None:
    """Held out or not is told neither by a sum of zeros alone nor by how soon it comes."""
    node, worked = world.nodes[ME], []

    def ones(query: Query, rows: PersonRows) -> NDArray[np.int64]:
        worked.append(rows)
        return np.ones(query.dimension, np.int64)

    tag = node.store.tag(node.store.people()[0])
    real = declared_question(world.signed.study.queries[0].ask)
    asked = Sided(query=real, vector=ones, tag=tag)
    node.service._ports = replace(node.service._ports, query=lambda _: asked)  # type: ignore[arg-type,return-value]
    begin(world)
    current = node.service._round
    assert current is not None
    summand = services._Summand(
        ports=node.service._ports,
        asked=asked,  # type: ignore[arg-type]
        study="hours-0",
        admission=current.admission,
    )
    assert summand().tolist() == [1] * real.dimension
    assert len(worked) == len(PEOPLE)


ROWS: dict[str, Mapping[str, list[float]]] = {
    "usual": {"sleep_hours": [7.0, 7.5]},
    "least": {"sleep_hours": [0.0]},
    "most": {"sleep_hours": [24.0] * 400},
    "other columns": {"mood": [3.0] * 10},
}


def test_data_of_as_many_people_get_the_same_answers_and_refusals(tmp_path: Path) -> None:
    """Stage by stage, to the byte: what a node sends differs in what stands masked alone."""
    found = {}
    for place, (name, rows) in enumerate(ROWS.items()):
        with opened(tmp_path / f"world-{place}") as world:
            store = world.nodes[ME].store
            refill(store, rows)
            sizes: dict[str, int] = {}
            for stage in STAGES:
                world.faults[ME, stage] = measuring(sizes, stage)
            outcome = world.run()
            found[name] = (sizes, outcome.people, dict(outcome.dropped), world.receipts(ME))
            assert set(sizes) == set(STAGES)
    usual = found.pop("usual")
    assert all(other == usual for other in found.values())


def measuring(sizes: dict[str, int], stage: str) -> Callable[[bytes, bytes], bytes]:
    def note(reply: bytes, request: bytes) -> bytes:
        del request
        sizes[stage] = len(reply)
        return reply

    return note


def refill(store: Store, rows: Mapping[str, list[float]]) -> None:
    """Let everybody in a store have these rows, and no others."""
    with store.database.transaction():
        store.database.run("DELETE FROM rows")
    fill(store, dict.fromkeys(PEOPLE, rows))


# --- Nothing fails in silence --------------------------------------------------------------------


@pytest.mark.parametrize("error", [StoreError("full"), RuntimeError("slept 3.0")])
def test_a_round_that_fails_while_rows_are_read_is_over_and_told(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    store = world.nodes[ME].store

    def fail(*_: object) -> PersonRows:
        raise error

    monkeypatch.setattr(store, "rows", fail)
    assert world.run().nodes == 4
    assert world.receipts(ME) == ["allowed", "failed"]
    assert world.nodes[ME].service._round is None
    told = Receipts(store).of(store.people()[0])[-1].words()
    assert "stays spent" in told
    assert "3.0" not in told


def test_an_error_of_the_node_is_a_protocol_error_and_says_nothing_of_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("mood was 3.0")

    monkeypatch.setattr(Guard, "admit", fail)
    with pytest.raises(ProtocolError) as caught:
        begin(world)
    assert "3.0" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_crash_after_reserving_leaves_a_receipt_that_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(services, "_Round", die)
    with pytest.raises(Killed):
        begin(world)
    assert spends(world) == len(PEOPLE)
    assert world.receipts(ME) == ["reserved"]


def price_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    def fail(*_: object) -> PrivacyCost:
        raise OverflowError("too much")

    guard = world.nodes[ME].service._ports.guard
    monkeypatch.setattr(guard, "_ports", replace(guard._ports, price=fail))
    return {}


def other_run(world: World, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    return {"run": str(RUN + 1)}


def other_key(world: World, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    service = world.nodes[ME].service
    service._ports = replace(service._ports, identity=Ed25519PrivateKey.generate())
    return {}


def no_plan(world: World, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    def fail(*_: object, **__: object) -> None:
        raise ProtocolError("The modulus is too small.")

    request = contact(world)
    monkeypatch.setattr("tests.federated.node.test_service.contact", lambda *_, **__: request)
    monkeypatch.setattr(services, "round_plan", fail)
    return {}


@pytest.mark.parametrize(
    ("broken", "rule"),
    [(price_fails, "cost"), (other_run, "plan"), (other_key, "plan"), (no_plan, "plan")],
)
def test_reserves_nothing_for_what_cannot_be_answered(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[World, pytest.MonkeyPatch], dict[str, object]],
    rule: str,
) -> None:
    changes = broken(world, monkeypatch)
    with pytest.raises(RefusedError) as caught:
        begin(world, **changes)
    assert caught.value.rule == rule
    assert spends(world) == 0
    assert world.receipts(ME) == ["refused"]


def test_reserves_nothing_for_a_round_that_others_were_told_otherwise(world: World) -> None:
    """The coordinator's plan counts others than this node was told of: no message would fit."""
    told = {**dict.fromkeys(world.nodes, len(PEOPLE)), "node-1": 9, "node-3": 1}
    ask = parse(Ask, contact(world))
    lied = replace(parse_request(ask.contact), taking_part=told).encode()
    facts = RunFacts(run_id=RUN, configuration=world.configuration)
    payload = encode(Ask(contact=lied, request=ask.request))
    with pytest.raises(RefusedError) as caught:
        world.nodes[ME].service.respond(facts, "advertise", payload)
    assert caught.value.rule == "plan"
    assert spends(world) == 0
    assert world.receipts(ME) == ["refused"]


def test_a_receipt_that_cannot_be_changed_hides_no_error(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(world)

    def fail(*_: object, **__: object) -> None:
        raise StoreError("The disk is full.")

    monkeypatch.setattr(Receipts, "fail", fail)
    facts = RunFacts(run_id=RUN, configuration=world.configuration)
    with pytest.raises(ProtocolError):
        world.nodes[ME].service.respond(facts, "share", encode(Ask(contact=b"", request=b"x")))
    assert world.receipts(ME) == ["reserved"]


# --- Time ----------------------------------------------------------------------------------------


def at(service: NodeService, ticks: Callable[[], float]) -> None:
    service._ports = replace(service._ports, ticks=ticks)


def test_a_round_is_over_some_time_after_it_began_however_often_it_is_asked(world: World) -> None:
    """A server that sends a request now and then keeps no secret of a round alive."""
    step_s = services._PATIENCE_S - 1.0
    assert 4 * step_s > services._LONGEST_ROUND_S
    for node in world.nodes.values():
        at(node.service, lambda: step_s * len(world.asked))
    with pytest.raises(CohortError, match="unmask"):
        world.run()
    assert world.asked == list(STAGES)
    for name, node in world.nodes.items():
        assert node.service._round is None
        assert world.receipts(name) == ["allowed", "failed"]


def test_a_round_that_nobody_goes_on_with_is_given_up_at_its_deadline(world: World) -> None:
    service = world.nodes[ME].service
    at(service, lambda: 0.0)
    begin(world)
    current = service._round
    assert current is not None
    current.at = late = services._LONGEST_ROUND_S + 1.0
    at(service, lambda: late)
    service.tidy()
    assert service._round is None
    assert world.receipts(ME) == ["failed"]


@pytest.mark.parametrize("payload", [encode(Ask(contact=b"x", request=b"")), None])
def test_a_request_that_is_refused_ends_no_round_that_is_under_way(
    world: World, payload: bytes | None
) -> None:
    """Not one that means nothing, nor the first of this very round, come twice."""
    begin(world)
    before = world.nodes[ME].service._round
    facts = RunFacts(run_id=RUN, configuration=world.configuration)
    with pytest.raises(RefusedError):
        world.nodes[ME].service.respond(facts, "advertise", payload or contact(world))
    assert world.nodes[ME].service._round is before
    assert world.receipts(ME)[0] == "reserved"


def test_another_round_that_is_let_in_ends_the_one_before(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(world)
    monkeypatch.setattr(Budget, "judge", lambda *_, **__: {})
    seen = enrolment.remembered(world.nodes[ME].store, ORIGIN).size
    proof = make_bundle(world.log.directory, world.index, from_size=seen).encode()
    begin(world, round_number=1, proof=proof)
    current = world.nodes[ME].service._round
    assert current is not None
    assert current.admission.request.round_number == 1
    assert world.receipts(ME) == ["failed", "reserved"]


def test_a_round_is_given_up_at_its_deadline_though_messages_keep_coming(world: World) -> None:
    """Where something always comes, nobody has time to look for what is over."""
    service = world.nodes[ME].service
    at(service, lambda: 0.0)
    begin(world)
    at(service, lambda: services._PATIENCE_S + 1.0)
    facts = RunFacts(run_id=RUN, configuration=world.configuration)
    with pytest.raises(RefusedError):
        service.respond(facts, "greet", question(world).encode())
    assert service._round is None
    assert world.receipts(ME) == ["failed", "refused"]
