"""A coordinator's paper trail for tests: people, their keys, the real rules, a log."""

from __future__ import annotations

import uuid
from pathlib import Path

from audit.recorder import Recorder
from federated.approvals import Approvals, FileSigner
from federated.database import StudyDatabase
from federated.manifest import Study
from federated.signed_study import TrustedKeys
from federated.standing import Standings
from federated.study_store import StudyStore
from policies.bundle import load
from policies.engine import Engine
from policies.model import Assurance, Principal
from tests.federated.ledgers import MemoryLog
from tests.federated.studies import NOW, PlainSealer, study

ENGINE = Engine(load())


def person(name: str, *roles: str, age_s: float = 60) -> Principal:
    return Principal(
        kind="user",
        id=name,
        roles=frozenset(roles),
        assurance=Assurance(second_factor="totp", second_factor_at=NOW - age_s),
    )


RESEARCHER = person("ruth", "researcher")
MEMBER = person("emil", "ethics-board")
NORTH = person("nora", "site-officer")
SOUTH = person("sven", "site-officer")


class Trail:
    """Approvals over a database of their own, with everybody's keys."""

    def __init__(self, folder: Path, *, url: str = "", log: object | None = None) -> None:
        self.log = MemoryLog() if log is None else log
        self.coordinator = FileSigner.create(folder / "keys" / "coordinator")
        self.board = FileSigner.create(folder / "keys" / "board")
        self.north = FileSigner.create(folder / "keys" / "north")
        self.south = FileSigner.create(folder / "keys" / "south")
        self.now = float(NOW)
        self.database = StudyDatabase(url or f"sqlite:///{folder}/studies.sqlite3")
        self.trusted = TrustedKeys(
            coordinator=frozenset({self.coordinator.public_key}),
            ethics_board=frozenset({self.board.public_key}),
            sites={
                "north": frozenset({self.north.public_key}),
                "south": frozenset({self.south.public_key}),
            },
        )
        self.recorder = Recorder(
            self.log,  # type: ignore[arg-type]
            sealer=PlainSealer(),
            clock=lambda: self.now,
            ids=lambda: uuid.uuid4().hex,
        )
        self.approvals = Approvals(
            StudyStore(self.database),
            recorder=self.recorder,
            decide=ENGINE.decide,
            coordinator=self.coordinator,
            trusted=self.trusted,
            officers={"north": frozenset({"nora", "ruth"}), "south": frozenset({"sven", "emil"})},
            tenant="clinic",
            clock=lambda: self.now,
        )

    @property
    def reading(self) -> Standings:
        """Where studies stand, as commands see it that only look."""
        return Standings(StudyStore(self.database), self.trusted, clock=lambda: self.now)

    def approve_all(self, of: Study | None = None) -> Study:
        """Propose and approve, by everybody whose word is needed."""
        one = of or study()
        self.approvals.propose(one, RESEARCHER)
        self.approvals.approve(one.id, MEMBER, capacity="ethics-board", signer=self.board)
        self.approvals.approve(one.id, NORTH, capacity="site", site="north", signer=self.north)
        self.approvals.approve(one.id, SOUTH, capacity="site", site="south", signer=self.south)
        return one
