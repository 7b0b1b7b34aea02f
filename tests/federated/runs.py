"""One run without a network: real nodes with real guards, and an exchange that misbehaves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from federated.aggregation.bits import SystemBits
from federated.code_hash import installed_code_hash
from federated.deployment.node_files import NodeFiles
from federated.deployment.node_process import node_service
from federated.deployment.places import NodeKeys, ensure_node_keys
from federated.draft import parse_study
from federated.errors import (
    FederatedError,
)
from federated.ledger import Ledger
from federated.manifest import Study, roster_hash
from federated.node.agent import RunFacts
from federated.node.consent import Consents, Scope
from federated.node.contact import Question
from federated.node.enrolment import Enrolment, enrol
from federated.node.keeper import FileKeeper
from federated.node.receipts import Receipts
from federated.node.service import NodeService
from federated.node.store import Store
from federated.questions import declared_question
from federated.rounds import sign_reply
from federated.signed_study import SignedStudy
from federated.study_log import make_bundle
from federated.study_run import Patience, RoundOutcome, RunPorts, StudyRun
from tests.federated.deployment.federation import HOURS, PEOPLE, STUDY
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
    #: Flower's id of the run that is on.
    run_id: int = RUN

    def ask(
        self, stage: str, payloads: Mapping[str, bytes], patience: Patience
    ) -> Mapping[str, bytes]:
        self.asked.append(stage)
        answers = {}
        for name, payload in payloads.items():
            facts = RunFacts(run_id=self.run_id, configuration=self.configuration)
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
            query=declared_question,
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
        """What rounds left for the first person; that people were counted stands beside it."""
        store = self.nodes[name].store
        told = [one.outcome for one in Receipts(store).of(store.people()[0])]
        return [one for one in told if one != "counted"]

    def sign(self, name: str, answer: bytes, stage: str, request: bytes) -> bytes:
        key = self.nodes[name].keys.identity
        return sign_reply(key, answer, run_id=RUN, stage=stage, request=request)


@contextmanager
def opened(directory: Path, *, minimum_cohort: int = 6) -> Iterator[World]:
    """The world, in a directory; closed again at the end."""
    now, threshold = int(time.time()), 4
    text = STUDY
    for old, new in {
        "ID": "hours-0",
        "FROM": str(now - 60),
        "UNTIL": str(now + 86_400),
        "CODE": installed_code_hash(),
        "THRESHOLD": str(threshold),
        "COLLUDING": "1",
        "SCALE": str(float(declared_question(HOURS).sensitivity.l1)),
    }.items():
        text = text.replace(old, new)
    text = text.replace("minimum_cohort = 6", f"minimum_cohort = {minimum_cohort}")

    def study(roster: str) -> Study:
        return parse_study(text.replace("ROSTER", roster).encode())

    rows = {person: {"sleep_hours": [7.0, 7.5]} for person in PEOPLE}
    with opened_for(directory, study, lambda _: rows) as world:
        yield world


@contextmanager
def opened_for(
    directory: Path,
    study: Callable[[str], Study],
    rows: Callable[[str], Mapping[str, Mapping[str, Sequence[float]]]],
    *,
    cap: float = 1.0,
) -> Iterator[World]:
    """The world of a study, which is made of the roster's hash; `rows` are the people of a node."""
    parties, log, recorded = Parties(), StudyLog(directory), MemoryLog()
    names = [f"node-{number}" for number in range(1, NODES + 1)]
    keys = {name: ensure_node_keys(directory / name) for name in names}
    signed = parties.sign(study(roster_hash({n: keys[n].identity_public for n in names})))
    index = log.append_published(signed.study)
    nodes = {
        name: _node(name, directory / name, keys[name], parties, log, rows(name), signed.study)
        for name in names
    }
    yield World(
        nodes=nodes,
        parties=parties,
        log=log,
        ledger=make_ledger(f"sqlite:///{directory / 'ledger.sqlite3'}", recorded, cap=cap),
        recorded=recorded,
        signed=signed,
        index=index,
        configuration=signed.study.run_configuration(),
    )
    for node in nodes.values():
        node.store.close()
    close_all()


def _node(
    name: str,
    directory: Path,
    keys: NodeKeys,
    parties: Parties,
    log: StudyLog,
    rows: Mapping[str, Mapping[str, Sequence[float]]],
    study: Study,
) -> Node:
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
    fill(store, rows)
    agreed = Scope(
        kinds=frozenset(json.loads(query.ask)["kind"] for query in study.queries),
        columns=frozenset(study.columns),
        purposes=frozenset({study.purpose}),
    )
    Consents(store).give(store.people(), agreed, now=int(time.time()))
    files = NodeFiles(superlink="", ca_file="", directory=str(directory), store="")
    return Node(
        name=name, keys=keys, store=store, service=node_service(store, files, declared_question)
    )


def gone(reply: bytes, request: bytes) -> None:
    """The fault of not answering."""


def question(world: World) -> Question:
    return Question(
        study=world.signed.encode(),
        query="hours",
        run=str(RUN),
        round_number=0,
        roster={name: node.keys.identity_public for name, node in world.nodes.items()},
    )
