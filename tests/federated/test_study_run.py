"""One run without a network: real nodes with real guards, and an exchange that misbehaves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from federated.aggregation.bits import SystemBits
from federated.code_hash import installed_code_hash
from federated.deployment.node_files import NodeFiles
from federated.deployment.node_process import declared_query, node_service
from federated.deployment.places import NodeKeys, ensure_node_keys
from federated.draft import parse_study
from federated.errors import (
    BudgetExhaustedError,
    CohortError,
    FederatedError,
    LedgerError,
    ProtocolError,
    RefusedError,
)
from federated.ledger import Ledger
from federated.manifest import roster_hash
from federated.node.agent import RunFacts
from federated.node.budget import Budget, Cap
from federated.node.consent import Consents
from federated.node.contact import Question
from federated.node.enrolment import Enrolment, enrol
from federated.node.keeper import FileKeeper
from federated.node.receipts import Receipts
from federated.node.service import NodeService
from federated.node.store import Store
from federated.rounds import Greeting, encode, open_reply, parse, sign_reply
from federated.signed_study import SignedStudy
from federated.study_log import make_bundle
from federated.study_run import STAGES, Patience, RoundOutcome, RunPorts, StudyRun
from tests.federated.deployment.federation import HOURS, PEOPLE, STUDY, accountant, agree
from tests.federated.ledgers import MemoryLog, close_all, make_ledger
from tests.federated.node.tables import fill
from tests.federated.studies import ORIGIN, Parties, StudyLog

RUN = 77
NODES = 5


@dataclass
class Node:
    name: str
    keys: NodeKeys
    store: Store
    service: NodeService


@dataclass
class World:
    """Five nodes with five people each, everybody's keys, a ledger, a log."""

    nodes: dict[str, Node]
    parties: Parties
    log: StudyLog
    ledger: Ledger
    recorded: MemoryLog
    signed: SignedStudy
    index: int
    configuration: Mapping[str, bool | int | float | str]
    #: node → stage → what becomes of the reply; None for no reply.
    faults: dict[tuple[str, str], Callable[[bytes, bytes], bytes | None]] = field(
        default_factory=dict
    )
    asked: list[str] = field(default_factory=list)
    #: For how many people a node may say that it speaks, by its enrolment.
    most_people: int = len(PEOPLE)

    def ask(
        self, stage: str, payloads: Mapping[str, bytes], patience: Patience
    ) -> Mapping[str, bytes]:
        self.asked.append(stage)
        answers = {}
        for name, payload in payloads.items():
            facts = RunFacts(run_id=RUN, configuration=self.configuration)
            try:
                reply: bytes | None = self.nodes[name].service.respond(facts, stage, payload)
            except FederatedError:
                continue
            fault = self.faults.get((name, stage))
            if fault is not None and reply is not None:
                reply = fault(reply, payload)
            if reply is not None:
                answers[name] = reply
        return answers

    def run(self, *, round_number: int = 0, run_id: int = RUN) -> RoundOutcome:
        return StudyRun(self.signed, self.ports(), run_id=run_id).ask("hours", round_number)

    def ports(self) -> RunPorts:
        return RunPorts(
            exchange=self,
            ledger=self.ledger,
            roster={name: node.keys.identity_public for name, node in self.nodes.items()},
            query=declared_query,
            prove=lambda size: make_bundle(self.log.directory, self.index, from_size=size).encode(),
            random=SystemBits(),
            participants=lambda name: [f"device:{name}"],
            most_people=lambda _: self.most_people,
        )

    def reserved(self, round_number: int = 0) -> bool:
        study = self.signed.study.study_hash
        return self.ledger.reservation(study=study, round_id=f"{RUN}-{round_number}") is not None

    def spent(self, round_number: int = 0) -> bool:
        study = self.signed.study.study_hash
        found = self.ledger.reservation(study=study, round_id=f"{RUN}-{round_number}")
        return found is not None and self.ledger.is_spent(found)

    def receipts(self, name: str) -> Sequence[str]:
        store = self.nodes[name].store
        return [one.outcome for one in Receipts(store).of(store.people()[0])]

    def sign(self, name: str, answer: bytes, stage: str, request: bytes) -> bytes:
        key = self.nodes[name].keys.identity
        return sign_reply(key, answer, run_id=RUN, stage=stage, request=request)


@pytest.fixture
def minimum_cohort() -> int:
    return 6


@pytest.fixture
def world(tmp_path: Path, minimum_cohort: int) -> Iterator[World]:
    parties, log, recorded = Parties(), StudyLog(tmp_path), MemoryLog()
    names = [f"node-{number}" for number in range(1, NODES + 1)]
    keys = {name: ensure_node_keys(tmp_path / name) for name in names}
    now, threshold = int(time.time()), 4
    text = STUDY
    for old, new in {
        "ID": "hours-0",
        "FROM": str(now - 60),
        "UNTIL": str(now + 86_400),
        "ROSTER": roster_hash({name: keys[name].identity_public for name in names}),
        "CODE": installed_code_hash(),
        "THRESHOLD": str(threshold),
        "COLLUDING": "1",
        "SCALE": str(float(declared_query(HOURS).sensitivity.l1)),
    }.items():
        text = text.replace(old, new)
    text = text.replace("minimum_cohort = 6", f"minimum_cohort = {minimum_cohort}")
    signed = parties.sign(parse_study(text.encode()))
    index = log.append_published(signed.study)
    nodes = {name: _node(name, tmp_path / name, keys[name], parties, log) for name in names}
    yield World(
        nodes=nodes,
        parties=parties,
        log=log,
        ledger=make_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite3'}", recorded),
        recorded=recorded,
        signed=signed,
        index=index,
        configuration=signed.study.run_configuration(),
    )
    for node in nodes.values():
        node.store.close()
    close_all()


def _node(name: str, directory: Path, keys: NodeKeys, parties: Parties, log: StudyLog) -> Node:
    store = Store.create(directory / "device.store", FileKeeper(directory / "device.keys"))
    enrol(
        store,
        Enrolment(
            node=name,
            coordinator=(parties.coordinator.public.hex(),),
            ethics_board=(parties.board.public.hex(),),
            sites={site: (key.public.hex(),) for site, key in parties.sites.items()},
            origin=ORIGIN,
            log_keys=tuple(key.text for key in log.keys),
            witness_keys=tuple(key.text for key in log.witness_keys),
        ),
    )
    fill(store, {person: {"sleep_hours": [7.0, 7.5]} for person in PEOPLE})
    agree(store)
    files = NodeFiles(superlink="", ca_file="", directory=str(directory), store="")
    return Node(
        name=name, keys=keys, store=store, service=node_service(store, files, declared_query)
    )


def gone(reply: bytes, request: bytes) -> None:
    """The fault of not answering."""


def test_reserves_before_anybody_is_asked_and_spends_before_the_answer(world: World) -> None:
    outcome = world.run()
    assert (outcome.nodes, outcome.people) == (5, 25)
    assert world.asked == list(STAGES)
    assert world.spent()
    assert world.receipts("node-1") == ["allowed"]


@pytest.mark.parametrize("stage", STAGES)
def test_goes_on_without_a_node_that_stops_answering(world: World, stage: str) -> None:
    for later in STAGES[STAGES.index(stage) :]:
        world.faults["node-2", later] = gone
    outcome = world.run()
    assert outcome.nodes == (5 if stage in {"consistency", "unmask"} else 4)
    assert world.spent()


@pytest.mark.parametrize("stage", STAGES[1:])
def test_releases_nothing_when_two_vanish_and_what_was_reserved_stays(
    world: World, stage: str
) -> None:
    for name in ("node-2", "node-3"):
        for later in STAGES[STAGES.index(stage) :]:
            world.faults[name, later] = gone
    with pytest.raises(CohortError):
        world.run()
    assert world.reserved()
    assert not world.spent()


def test_reserves_nothing_when_too_few_are_there(world: World) -> None:
    for name in ("node-2", "node-3"):
        world.faults[name, "greet"] = gone
    with pytest.raises(CohortError, match="are there"):
        world.run()
    assert not world.reserved()


@pytest.mark.parametrize("minimum_cohort", [26])
def test_reserves_nothing_when_too_few_people_would_take_part(world: World) -> None:
    with pytest.raises(CohortError, match="at least 26"):
        world.run()
    assert world.asked == ["greet"]
    assert not world.reserved()


@pytest.mark.parametrize("minimum_cohort", [21])
def test_releases_nothing_when_too_few_people_survive(world: World) -> None:
    world.faults["node-2", "share"] = gone
    with pytest.raises(CohortError, match="20 people"):
        world.run()
    assert world.reserved()
    assert not world.spent()


FAULTS = ["noise", "empty", "huge", "unsigned", "nan", "wrong-shape"]


@pytest.mark.parametrize(
    ("stage", "fault"),
    [*((stage, "noise") for stage in STAGES), *(("mask", fault) for fault in FAULTS[1:])],
)
def test_counts_a_node_that_answers_garbage_as_gone(world: World, stage: str, fault: str) -> None:
    def broken(reply: bytes, request: bytes) -> bytes:
        answer = reply[64:]
        match fault:
            case "noise":
                return world.sign("node-2", os.urandom(300), stage, request)
            case "empty":
                return b""
            case "huge":
                return world.sign("node-2", bytes(9 * 1024 * 1024), stage, request)
            case "unsigned":
                return os.urandom(64) + answer
            case "nan":
                return world.sign(
                    "node-2", msgspec.msgpack.encode([float("nan")] * 3), stage, request
                )
            case _:
                return world.sign("node-2", answer[:-3], stage, request)

    world.faults["node-2", stage] = broken
    outcome = world.run()
    assert outcome.nodes == (5 if stage in {"consistency", "unmask"} else 4)


def test_a_node_cannot_answer_for_another(world: World) -> None:
    other = Ed25519PrivateKey.generate()

    def forged(reply: bytes, request: bytes) -> bytes:
        return sign_reply(other, reply[64:], run_id=RUN, stage="mask", request=request)

    world.faults["node-2", "mask"] = forged
    assert world.run().nodes == 4


def test_a_reply_to_another_stage_or_request_does_not_count(world: World) -> None:
    kept: list[bytes] = []

    def keep(reply: bytes, request: bytes) -> bytes:
        kept.append(reply)
        return reply

    world.faults["node-2", "share"] = keep
    world.faults["node-2", "mask"] = lambda *_: kept[0]
    assert world.run().nodes == 4


def test_asks_nobody_whose_budget_would_not_do(world: World, tmp_path: Path) -> None:
    world.ledger = make_ledger(f"sqlite:///{tmp_path / 'small.sqlite3'}", world.recorded, cap=0.5)
    with pytest.raises(BudgetExhaustedError):
        world.run()
    assert world.asked == ["greet"]
    assert not world.reserved()


def test_never_dispatches_the_same_round_twice(world: World) -> None:
    for name in ("node-2", "node-3"):
        world.faults[name, "share"] = gone
    with pytest.raises(CohortError):
        world.run()
    world.faults.clear()
    before = list(world.asked)
    with pytest.raises(CohortError, match="0 of 5 nodes"):
        world.run()
    assert world.asked == [*before, "greet"]


def test_never_reserves_the_same_round_twice(world: World) -> None:
    """Not even where every node would answer it again."""
    world.run()
    for node in world.nodes.values():
        with node.store.database.transaction():
            node.store.database.run("DELETE FROM spends")
        node.store.keeper.set("counter", "0")
    before = list(world.asked)
    with pytest.raises(FederatedError) as caught:
        world.run()
    assert isinstance(caught.value, LedgerError | BudgetExhaustedError)
    assert world.asked == [*before, "greet"]


def test_dispatches_nothing_when_the_ledger_fails(world: World) -> None:
    def failing(**named: object) -> None:
        raise LedgerError("away")

    world.ledger.reserve = failing  # type: ignore[method-assign, assignment]
    with pytest.raises(LedgerError):
        world.run()
    assert world.asked == ["greet"]


def test_gives_no_answer_out_when_it_cannot_be_spent(world: World) -> None:
    def failing(reservation: object) -> None:
        raise LedgerError("away")

    world.ledger.spend = failing  # type: ignore[method-assign]
    with pytest.raises(LedgerError):
        world.run()
    assert world.reserved()


def test_a_run_of_another_id_gets_no_answer(world: World) -> None:
    with pytest.raises(CohortError):
        world.run(run_id=RUN + 1)


def test_a_changed_run_configuration_gets_no_answer(world: World) -> None:
    world.configuration = {**world.configuration, "study-id": "other"}
    with pytest.raises(CohortError):
        world.run()
    assert world.receipts("node-1") == ["refused"]


def test_people_whose_own_budget_is_used_up_are_not_asked(world: World) -> None:
    for name in ("node-2", "node-3"):
        Budget(world.nodes[name].store, accountant).set_cap(Cap(epsilon=0.5, delta=1e-4))
    with pytest.raises(CohortError):
        world.run()
    assert world.receipts("node-2") == ["refused"]


def test_people_are_told_of_a_round_that_nobody_went_on_with(world: World) -> None:
    for name in ("node-2", "node-3"):
        world.faults[name, "share"] = gone
    with pytest.raises(CohortError):
        world.run()
    service = world.nodes["node-1"].service
    service.tidy()
    assert world.receipts("node-1") == ["reserved"]
    late = time.monotonic() + 10_000
    service._ports = replace(service._ports, ticks=lambda: late)
    service.tidy()
    assert world.receipts("node-1") == ["failed"]


def test_consent_that_was_taken_back_is_respected(world: World) -> None:
    store = world.nodes["node-2"].store
    for person in store.people():
        Consents(store).revoke(person, now=int(time.time()))
    outcome = world.run()
    assert outcome.nodes == 4
    assert outcome.dropped == {"node-2": "greet: no answer"}
    assert world.receipts("node-2") == []


# --- What a greeting says ------------------------------------------------------------------------


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


def question(world: World) -> Question:
    return Question(study=world.signed.encode(), query="hours", run=str(RUN), round_number=0)


def greet(world: World, **changes: object) -> Greeting:
    facts = RunFacts(run_id=RUN, configuration=world.configuration)
    payload = replace(question(world), **changes).encode()  # type: ignore[arg-type]
    node = world.nodes["node-1"]
    reply = node.service.respond(facts, "greet", payload)
    key = node.keys.identity_public
    return parse(Greeting, open_reply(key, reply, run_id=RUN, stage="greet", request=payload))


def test_a_greeting_reserves_nothing_and_tells_nobody_who_did_not_agree(world: World) -> None:
    revoke(world, "node-1", "me")
    assert greet(world).people == 4
    store = world.nodes["node-1"].store
    assert all(not Receipts(store).of(person) for person in store.people())
    assert store.database.one("SELECT count(*) FROM spends") == (0,)
    revoke(world, "node-1", *PEOPLE)
    with pytest.raises(RefusedError) as caught:
        greet(world)
    assert caught.value.rule == "consent"
    assert world.receipts("node-1") == []


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
