"""A federation for tests: OpenBao's certificates, a SuperLink, nodes with stores, all processes."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from audit.entry import parse_entry
from audit.model import Entry
from audit.reader import LogReader
from audit.recorder import Recorder, Sequenced
from federated.accounting import Accountant
from federated.code_hash import installed_code_hash
from federated.coordinator import Coordinator, StudyOutcome, link_access
from federated.database import StudyDatabase
from federated.deployment.certificates import Certificates
from federated.deployment.places import Places, RosterFile
from federated.deployment.processes import ChildProcess
from federated.deployment.up import Federation
from federated.draft import parse_draft, parse_study
from federated.ledger import Ledger
from federated.manifest import Study
from federated.node.budget import Budget, Cap
from federated.node.consent import Consents, Scope
from federated.node.enrolment import Enrolment, parse_enrolment
from federated.node.keeper import FileKeeper
from federated.node.receipts import Receipts
from federated.node.store import Store
from federated.planning import plan_study
from federated.questions import declared_question
from federated.signed_study import SignedStudy
from federated.study_run import Deadlines
from keys.private_files import read_private, write_private
from keys.settings import PkiSettings
from tests.federated.node.tables import fill
from tests.federated.studies import ORIGIN, Parties, PlainSealer, StudyLog
from tests.openbao import RunningServer, wait_until

PEOPLE = ("me", "you", "he", "she", "they")
FIVE = {name: {"sleep_hours": [7.0, 7.5, 6.5], "mood": [0.5, 1.0, -1.0]} for name in PEOPLE}

STUDY = """
id = "ID"
title = "Hours of sleep"
question = "How many hours do people sleep?"
purpose = "HRESCH"
valid_from = FROM
valid_until = UNTIL
epsilon = 1.0
minimum_cohort = 6
sites = ["north", "south"]
roster = "ROSTER"
code_hash = "CODE"

[aggregation]
threshold = THRESHOLD
colluding = COLLUDING
minimum_survivors = THRESHOLD

[[queries]]
epsilon = 1.0
columns = ["sleep_hours"]
mechanism = "discrete_laplace"
scale = SCALE
ask = { kind = "histogram", name = "hours", column = "sleep_hours", edges = [4.0, 6.0, 8.0] }
"""

TRAINING = """
id = "ID"
title = "Low mood after short nights"
question = "Does sleep tell low mood?"
valid_from = FROM
minimum_cohort = 15
sites = ["north", "south"]

[aggregation]
threshold = THRESHOLD

[[queries]]
epsilon = 8.0
delta = 1e-7
[queries.ask]
kind = "train"
name = "low-mood"
features = [{ column = "sleep_hours", low = 4.0, high = 10.0 }]
label = { column = "mood", below = 0.0 }
rounds = 5
held_out = 0.2
canaries = 100
"""


@dataclass
class Running:
    """A federation that is up, and everything around it."""

    places: Places
    federation: Federation
    parties: Parties
    log: StudyLog
    roster: RosterFile
    ledger: Ledger
    names: list[str]
    counter: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def study(self, changes: Mapping[str, str] | None = None) -> Study:
        """A new study of the nodes that are there; `changes` replace texts of its file."""
        now, nodes = int(time.time()), len(self.names)
        threshold = 2 * nodes // 3 + 1
        text = STUDY
        for old, new in {
            "ID": f"hours-{next(self.counter)}",
            "FROM": str(now - 60),
            "UNTIL": str(now + 86_400),
            "ROSTER": self.roster.hash,
            "CODE": installed_code_hash(),
            "THRESHOLD": str(threshold),
            "COLLUDING": str(min(1, 2 * threshold - nodes - 1)),
            "SCALE": str(float(declared_question(HOURS).sensitivity.l1)),
            **(changes or {}),
        }.items():
            text = text.replace(old, new)
        return parse_study(text.encode())

    def training(self) -> Study:
        """A new study that trains the default model in five rounds."""
        nodes = len(self.names)
        text = TRAINING
        for old, new in {
            "ID": f"training-{next(self.counter)}",
            "FROM": str(int(time.time()) - 60),
            "THRESHOLD": str(2 * nodes // 3 + 1),
        }.items():
            text = text.replace(old, new)
        return plan_study(
            parse_draft(text.encode()),
            people=nodes * len(PEOPLE),
            level=0.95,
            roster=self.roster.hash,
            code_hash=installed_code_hash(),
            nodes=nodes,
        ).study

    def agreed(self, study: Study) -> SignedStudy:
        """Any study, signed by everybody, and in the log."""
        signed = self.parties.sign(study)
        self.log.append_published(signed.study)
        return signed

    def approved(self, changes: Mapping[str, str] | None = None) -> SignedStudy:
        """A study that everybody signed, and that is in the log."""
        return self.agreed(self.study(changes))

    def coordinator(
        self, deadlines: Deadlines | None = None, ledger: Ledger | None = None
    ) -> Coordinator:
        port = self.federation.ports.http
        return Coordinator(
            access=link_access(self.places, address=f"127.0.0.1:{port}"),
            roster=self.roster,
            believed=parse_enrolment(read_private(self.places.federation)),
            ledger=ledger or self.ledger,
            log=self.log.directory,
            trainings=self.places.directory / "trainings",
            query=declared_question,
            deadlines=deadlines or Deadlines(greet_s=20.0, stage_s=60.0),
        )

    def run(self, signed: SignedStudy, deadlines: Deadlines | None = None) -> StudyOutcome:
        return self.coordinator(deadlines).run(signed, say=print)

    def open_store(self, name: str) -> Store:
        """A node's store, beside its own process."""
        directory = self.places.node(name)
        return Store.open(directory / "device.store", FileKeeper(directory / "device.keys"))

    def receipts(self, name: str) -> list[str]:
        store = self.open_store(name)
        try:
            return [one.words() for one in Receipts(store).of(store.people()[0])]
        finally:
            store.close()

    def wait_whole(self) -> None:
        """Return once every node is online again and none is told to misbehave."""
        directory = self.places.node(self.names[0])
        (directory / "fault").unlink(missing_ok=True)
        wait_until((directory / "ready").exists)
        self.federation.wait_online(set(self.roster.flower_ids().values()))

    def online(self) -> set[int]:
        return self.federation.link.online()


HOURS = '{"column":"sleep_hours","edges":[4.0,6.0,8.0],"kind":"histogram","name":"hours"}'


@contextmanager
def running(
    bao: RunningServer,
    directory: Path,
    *,
    nodes: int,
    people: Callable[[str], Mapping[str, Mapping[str, Sequence[float]]]] = lambda _: FIVE,
) -> Iterator[Running]:
    """Start everything in `directory`: each node with its people, who agree to everything."""
    # The processes that start now must find the same sources.
    installed_code_hash()
    parties, log = Parties(), StudyLog(directory)
    places = Places(directory=directory / "federation")
    places.prepare()
    believed = Enrolment(
        node="all",
        coordinator=(parties.coordinator.public.hex(),),
        ethics_board=(parties.board.public.hex(),),
        sites={name: (key.public.hex(),) for name, key in parties.sites.items()},
        origin=ORIGIN,
        log_keys=tuple(key.text for key in log.keys),
        witness_keys=tuple(key.text for key in log.witness_keys),
        allow_trusted_server=True,
    )
    write_private(places.federation, msgspec.json.encode(believed))
    names = [f"node-{number}" for number in range(1, nodes + 1)]
    with bao.client("gateway") as server, bao.client("coordinator") as client:
        certificates = Certificates.open(
            places, server=server, client=client, settings=PkiSettings()
        )
        database = StudyDatabase(f"sqlite:///{directory / 'ledger.sqlite3'}")
        try:
            with Federation(places, certificates, say=print) as federation:
                roster = federation.enrol(names, site=lambda name: name)
                for name in names:
                    populate(places.node(name), people(name))
                with faulty(federation, places, names[0]):
                    federation.start_nodes(names[1:])
                    federation.wait_online(set(roster.flower_ids().values()))
                    yield Running(
                        places=places,
                        federation=federation,
                        parties=parties,
                        log=log,
                        roster=roster,
                        ledger=ledger_over(database, log),
                        names=names,
                    )
        finally:
            database.close()


@contextmanager
def faulty(federation: Federation, places: Places, name: str) -> Iterator[None]:
    """Run one node as a process that can be told to misbehave."""
    child = ChildProcess(
        name,
        "tests.federated.deployment.faulty_node",
        [str(federation.write_node_files(name))],
        log_file=places.node(name) / "node.log",
    )
    child.start()
    try:
        yield
    finally:
        child.stop()


def populate(directory: Path, people: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Put people into a node's store, who agree to what is asked of their sleep and mood."""
    store = Store.open(directory / "device.store", FileKeeper(directory / "device.keys"))
    try:
        fill(store, people)
        agree(store)
        Budget(store, accountant).set_cap(Cap(epsilon=1000.0, delta=1e-6))
    finally:
        store.close()


def agree(store: Store) -> None:
    """Let everybody in a store agree to what is asked of their sleep and mood."""
    scope = Scope(
        kinds=frozenset({"histogram", "train", "evaluate"}),
        columns=frozenset({"sleep_hours", "mood"}),
        purposes=frozenset({"HRESCH"}),
    )
    Consents(store).give(store.people(), scope, now=int(time.time()))


def accountant(delta: float, adaptive: bool) -> Accountant:  # noqa: FBT001 - the port's
    return Accountant(delta=delta, adaptive=adaptive)


class OpeningLog:
    """Appends to the log's directory, opening it each time: tests publish studies in between."""

    def __init__(self, log: StudyLog) -> None:
        self._log = log

    def append(self, entry: bytes) -> Sequenced:
        with self._log.writer() as writer:
            return writer.append(entry)


def entries_of(log: StudyLog) -> list[Entry]:
    return [parse_entry(raw) for _, raw in LogReader(log.directory).read()]


def recorder_over(log: StudyLog) -> Recorder:
    return Recorder(
        OpeningLog(log),
        sealer=PlainSealer(),
        clock=time.time,
        ids=lambda: uuid.uuid4().hex,
    )


def ledger_over(database: StudyDatabase, log: StudyLog, *, cap: float = 100.0) -> Ledger:
    return Ledger(
        database,
        accountant=Accountant(delta=1e-6, adaptive=True),
        cap=cap,
        recorder=recorder_over(log),
        tenant="clinic",
        clock=time.time,
        ids=lambda: uuid.uuid4().hex,
    )
