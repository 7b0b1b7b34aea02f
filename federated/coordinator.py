"""The composition root of the coordinator: a signed, published study in, answers out.

Wires by hand what the parts need of each other: the SuperLink (`deployment.link`), the roster, the
study log, the ledger, and the run itself (`study_run`). Used by `havengate study run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from federated.aggregation.bits import SystemBits
from federated.deployment.certificates import COORDINATOR_NAME
from federated.deployment.link import Link, LinkAccess
from federated.deployment.places import Places, RosterFile, read_roster
from federated.errors import (
    ApprovalError,
    CohortError,
    DeploymentError,
    ProtocolError,
    StudyLogError,
)
from federated.manifest import Study
from federated.model import Query
from federated.node.enrolment import Enrolment
from federated.signed_study import SignedStudy
from federated.study_log import (
    StudyBundle,
    find_published,
    make_bundle,
    verify_published,
)
from federated.study_run import (
    Deadlines,
    Patience,
    RoundLedger,
    RoundOutcome,
    RunPorts,
    Say,
    StudyRun,
)

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

    from federated.deployment.grid import GridExchange

#: How often, and how long in between, the log is looked at until it is cosigned: half a minute.
_LOOKS: Final = 150
_LOOK_S: Final = 0.2

__all__ = ["COORDINATOR_NAME", "Coordinator", "StudyOutcome", "link_access"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOutcome:
    """What a run gave: an answer for each question, or why there is none."""

    run_id: int
    answers: Sequence[RoundOutcome]
    failures: Mapping[str, str]


class NamedExchange:
    """`GridExchange` by the names of the roster."""

    def __init__(self, exchange: GridExchange, flower_ids: Mapping[str, int]) -> None:
        self._exchange = exchange
        self._ids = dict(flower_ids)
        self._names = {id_: name for name, id_ in flower_ids.items()}

    def ask(
        self, stage: str, payloads: Mapping[str, bytes], patience: Patience
    ) -> Mapping[str, bytes]:
        """Ask, and translate the names."""
        by_id = {self._ids[name]: payload for name, payload in payloads.items()}
        answers = self._exchange.ask(stage, by_id, patience)
        return {self._names[id_]: payload for id_, payload in answers.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinator:
    """What runs studies.

    `log` is the directory of the study log, `query` reads a query's declaration, `believed` is what
    nodes are enrolled with. `wait` lets time pass, in seconds.
    """

    access: LinkAccess
    roster: RosterFile
    believed: Enrolment
    ledger: RoundLedger
    log: Path
    query: Callable[[str], Query]
    deadlines: Deadlines = field(default_factory=Deadlines)
    level: float = 0.95
    wait: Callable[[float], None] = time.sleep

    def run(
        self, signed: SignedStudy, *, queries: Sequence[str] = (), say: Say = lambda _: None
    ) -> StudyOutcome:
        """Run a study: start it, ask each of `queries` (all, by default) in a round, answer.

        A question whose round comes to nothing (too few people, a broken round) does not keep the
        next from being asked; it is in `failures`, and what was reserved for it stays spent. Raises
        `ApprovalError` if nodes or publication are not as approved, `BudgetExhaustedError`,
        `LedgerError`, and `DeploymentError` if the SuperLink refuses or is away.
        """
        study = signed.study
        if self.roster.hash != study.roster:
            raise ApprovalError(
                f"The study {study.id} was approved for other nodes than are enrolled now: propose "
                "it again."
            )
        index = find_published(self.log, study.study_hash)
        self._published(index, study.study_hash)
        names = tuple(queries) or tuple(query.name for query in study.queries)
        for name in names:
            study.query(name)
        link = Link(self.access)
        say(f"starting a run of {study.id}")
        run_id = link.start(signed.encode(), study.run_configuration())
        done: list[StudyOutcome] = []

        def conduct(grid: Grid, context: Context) -> None:  # noqa: ARG001 - Flower's signature
            done.append(self._conduct(grid, signed, index, names, run_id, say))

        link.execute(run_id, conduct)
        if not done:
            raise DeploymentError("The run ended without being conducted.")
        return done[0]

    def _published(self, index: int, study_hash: str, from_size: int = 0) -> StudyBundle:
        """The proof that nodes will believe.

        Between a checkpoint and its witnesses' words passes a moment, and a new checkpoint may come
        any time. A node would refuse what comes without them, and keep the refusal.
        """
        looks = 0
        while True:
            try:
                bundle = make_bundle(self.log, index, from_size=from_size)
                verify_published(
                    bundle,
                    study_hash=study_hash,
                    log_keys=self.believed.log_verifiers(),
                    witness_keys=self.believed.witness_verifiers(),
                    witnesses=self.believed.witnesses,
                )
            except StudyLogError as error:
                looks += 1
                if looks > _LOOKS:
                    raise StudyLogError(
                        "No witness that nodes trust has cosigned the log: nobody was asked. See "
                        f"that the one under [[audit.witnesses]] runs, then try again. ({error})"
                    ) from error
                self.wait(_LOOK_S)
            else:
                return bundle

    def _conduct(
        self,
        grid: Grid,
        signed: SignedStudy,
        index: int,
        names: Sequence[str],
        run_id: int,
        say: Say,
    ) -> StudyOutcome:
        from federated.deployment.grid import GridExchange

        def prove(from_size: int) -> bytes:
            return self._published(index, signed.study.study_hash, from_size).encode()

        ports = RunPorts(
            exchange=NamedExchange(GridExchange(grid), self.roster.flower_ids()),
            ledger=self.ledger,
            roster=self.roster.keys(),
            query=self.query,
            prove=prove,
            random=SystemBits(),
            participants=self.roster.charged,
            most_people=self.roster.most_people,
            say=say,
        )
        run = StudyRun(signed, ports, run_id=run_id, deadlines=self.deadlines, level=self.level)
        answers, failures = [], {}
        for number, name in enumerate(names):
            try:
                answers.append(run.ask(name, number))
            except (CohortError, ProtocolError) as error:
                say(f"{name}: {error}")
                failures[name] = str(error)
        return StudyOutcome(run_id=run_id, answers=tuple(answers), failures=failures)


def roster_for(study: Study, places: Places) -> RosterFile:
    """Return the roster of this machine if it is the study's. Raises `ApprovalError`."""
    roster = read_roster(places.roster)
    if roster.hash != study.roster:
        raise ApprovalError(f"The study {study.id} was approved for other nodes than are enrolled.")
    return roster


def link_access(places: Places, *, address: str) -> LinkAccess:
    """Return how the coordinator reaches the SuperLink of this machine at `address`."""
    current = places.tls("coordinator") / "current"
    return LinkAccess(
        address=address,
        certificate_file=current / "certificate.pem",
        key_file=current / "key.pem",
        ca_file=current / "ca.pem",
        control_secret_file=places.control_secret,
        executor_secret_file=places.executor_secret,
    )
