"""The process that `bench_federated` times: one run of a study that is approved and published."""

from __future__ import annotations

import json
import sys
import time
import uuid
from itertools import pairwise
from pathlib import Path

from audit.log import LogWriter
from audit.recorder import Recorder
from federated.accounting import Accountant
from federated.coordinator import Coordinator, link_access
from federated.database import StudyDatabase
from federated.deployment.places import Places, read_roster
from federated.ledger import Ledger
from federated.node.enrolment import parse_enrolment
from federated.questions import declared_question
from federated.signed_study import parse_signed_study
from keys.private_files import read_private


class NobodySealer:
    """Seals nothing: none of the run's entries names a person.

    The tests' own sealer would have the timed process import the tests.
    """

    def seal_for_person(self, *, tenant: str, person: str, field: str, plaintext: bytes) -> str:
        """Raise: there is nothing to seal."""
        raise NotImplementedError

    def name_for_person(self, *, tenant: str, person: str, field: str) -> str:
        """Raise: there is nobody to name."""
        raise NotImplementedError

    def open_for_person(self, *, tenant: str, field: str, text: str) -> bytes:
        """Raise: there is nothing to open."""
        raise NotImplementedError

    def key_ids(self, *, tenant: str, person: str) -> list[str]:
        """Raise: there are no keys."""
        raise NotImplementedError


def main(told: dict[str, str]) -> None:
    """Run the study and print how many nodes took part, and how long it took."""
    began = time.perf_counter()
    places, log = Places(directory=Path(told["places"])), Path(told["log"])
    database = StudyDatabase(told["ledger"])
    with LogWriter.open(log, origin=told["origin"]) as writer:
        ledger = Ledger(
            database,
            accountant=Accountant(delta=1e-6, adaptive=True),
            cap=100.0,
            recorder=Recorder(
                writer, sealer=NobodySealer(), clock=time.time, ids=lambda: uuid.uuid4().hex
            ),
            tenant="clinic",
            clock=time.time,
            ids=lambda: uuid.uuid4().hex,
        )
        coordinator = Coordinator(
            access=link_access(places, address=told["address"]),
            roster=read_roster(places.roster),
            believed=parse_enrolment(read_private(places.federation)),
            ledger=ledger,
            log=log,
            trainings=places.directory / "trainings",
            query=declared_question,
        )
        stamps: list[tuple[str, float]] = []

        def say(line: str) -> None:
            stamps.append((line, round(time.perf_counter() - began, 2)))

        signed = parse_signed_study(Path(told["study"]).read_bytes())
        outcome = coordinator.run(signed, say=say)
    database.close()
    one = outcome.models[0] if outcome.models else outcome.answers[0]
    ends = [at for line, at in stamps if ": round " in line]
    found = {
        "nodes": one.nodes,
        "inside_s": time.perf_counter() - began,
        "stages": stamps,
        # A training's rounds but the first, which greets cold.
        "rounds_s": [after - before for before, after in pairwise(ends)],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
