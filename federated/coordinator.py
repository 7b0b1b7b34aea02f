"""The composition root of the coordinator: a signed, published study in, answers out.

Wires by hand what the parts need of each other: the SuperLink (`deployment.link`), the roster, the
study log, the ledger, and the run itself (`study_run`). Used by `havengate study run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from audit.checkpoint import parse_checkpoint
from audit.errors import AuditError
from audit.files import read_bounded
from audit.note import MAX_NOTE_BYTES
from audit.recovery import CHECKPOINT
from federated.aggregation.bits import SystemBits
from federated.conduct import Conduct, numbers_of
from federated.deployment.link import Link, LinkAccess
from federated.deployment.places import Places, RosterFile, read_roster
from federated.errors import (
    ApprovalError,
    BudgetExhaustedError,
    CohortError,
    DeploymentError,
    FederatedError,
    ProtocolError,
    StudyLogError,
)
from federated.ledger import Reservation, Within
from federated.ledger_rows import Charge
from federated.manifest import Study
from federated.model import PrivacyCost, Query
from federated.node.enrolment import Enrolment
from federated.planning import verify_within
from federated.rounds import answer_price
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
    RoundOutcome,
    RunPorts,
    Say,
    StudyRun,
)
from federated.training_files import TrainingFiles
from federated.training_run import TrainedOutcome, reserved_name

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

    from federated.deployment.grid import GridExchange

#: For so long in all a run waits for the log to be cosigned, and between looks.
_COSIGNED_S: Final = 30.0
_LOOK_S: Final = 0.2
_AWAY: Final = (
    " The SuperLink did not answer: see its log, and that havengate federated up is running. What "
    "was reserved stays spent."
)

__all__ = ["Coordinator", "StudyOutcome", "link_access"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOutcome:
    """What a run gave: an answer or a model for each question, or why there is none.

    `bundle` proves the study's publication to whoever gets the answers.
    """

    run_id: int
    bundle: StudyBundle
    answers: Sequence[RoundOutcome]
    models: Sequence[TrainedOutcome]
    failures: Mapping[str, str]


class StudyLedger(Protocol):
    """What a coordinator needs of `federated.ledger.Ledger`."""

    def reserve(
        self,
        *,
        study: str,
        round_id: str,
        participants: Sequence[str],
        cost: PrivacyCost,
        within: Within | None = None,
    ) -> Reservation:
        """As `Ledger.reserve`."""
        ...

    def spend(self, reservation: Reservation) -> None:
        """As `Ledger.spend`."""
        ...

    def affordable(self, participants: Sequence[str], cost: PrivacyCost) -> frozenset[str]:
        """As `Ledger.affordable`."""
        ...

    def charges(self, study: str) -> Sequence[Charge]:
        """As `Ledger.charges`."""
        ...

    def reservation(self, *, study: str, round_id: str) -> Reservation | None:
        """As `Ledger.reservation`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WithinStudy:
    """The ledger for one study: no round of it is reserved beyond what was approved."""

    study: Study
    ledger: StudyLedger

    def reserve(
        self, *, study: str, round_id: str, participants: Sequence[str], cost: PrivacyCost
    ) -> Reservation:
        """As `Ledger.reserve`; `BudgetExhaustedError` also if the study would have too much."""
        return self.ledger.reserve(
            study=study,
            round_id=round_id,
            participants=participants,
            cost=cost,
            within=partial(verify_within, self.study),
        )

    def spend(self, reservation: Reservation) -> None:
        """As `Ledger.spend`."""
        self.ledger.spend(reservation)

    def affordable(self, participants: Sequence[str], cost: PrivacyCost) -> frozenset[str]:
        """As `Ledger.affordable`."""
        return self.ledger.affordable(participants, cost)

    def reservation(self, round_id: str) -> Reservation | None:
        """What is reserved under a round's name."""
        return self.ledger.reservation(study=self.study.study_hash, round_id=round_id)

    def knows(self, kept: bytes | None) -> bool:
        """Whether the cost of a training of which this is kept is reserved already."""
        name = reserved_name(kept)
        return bool(name) and self.reservation(name) is not None

    def verify_room(self, costs: Sequence[PrivacyCost]) -> None:
        """Prove that a run of these costs still fits. Raises `BudgetExhaustedError`."""
        before = [one.cost for one in self.ledger.charges(self.study.study_hash)]
        verify_within(self.study, [*before, *costs])


class Asking(Protocol):
    """What `ask_all` needs of `federated.conduct.Conduct`."""

    def ask(self, name: str, round_number: int) -> RoundOutcome | TrainedOutcome:
        """As `Conduct.ask`."""
        ...


def ask_all(
    run: Asking,
    names: Mapping[str, int],
    *,
    say: Say = lambda _: None,
    still: Callable[[], None] = lambda: None,
    aside: Callable[[], str] = lambda: "",
) -> tuple[Sequence[RoundOutcome | TrainedOutcome], Mapping[str, str]]:
    """Ask one question after the other; return what was answered, and why the others were not.

    What was answered has cost something and is kept, whatever comes after. A round that comes to
    nothing, or a budget that one question exceeds, does not keep the next from being asked; ledger,
    log or deployment failing, Ctrl-C or a mistake does, and so does what `still`, looked at before
    each, raises. Raises the first such error if nothing was answered: there is nothing to lose
    then. `names` has the number of each question's first round. `aside` says what else is known
    about a round that came to nothing.
    """
    answers: list[RoundOutcome | TrainedOutcome] = []
    failures: dict[str, str] = {}
    first: BaseException | None = None
    over = False
    for name, number in names.items():
        if over:
            failures[name] = "It was not asked: what failed before stopped the run."
            continue
        try:
            still()
            answers.append(run.ask(name, number))
        except (CohortError, ProtocolError) as error:
            failures[name] = f"{error}{aside()}"
        except BudgetExhaustedError as error:
            first, failures[name] = first or error, str(error)
        except (FederatedError, AuditError) as error:
            first, failures[name], over = first or error, str(error), True
        except BaseException as error:  # noqa: BLE001 - Ctrl-C and bugs take no paid answer away
            # Never its text: nobody knows what is in it.
            first, over = first or error, True
            failures[name] = f"The run was ended ({type(error).__name__})."
        if name in failures:
            say(f"{name}: {failures[name]}")
    if first is not None and not answers:
        raise first
    return tuple(answers), failures


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


class _Waiting:
    """Half a minute in all, in small pauses, however many proofs wait."""

    def __init__(self, wait: Callable[[float], None]) -> None:
        self._wait = wait
        self._left_s = _COSIGNED_S

    def goes_on(self) -> bool:
        """Let a moment pass; return False, at once, when all of the time has passed."""
        if self._left_s <= 0:
            return False
        self._left_s -= _LOOK_S
        self._wait(_LOOK_S)
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinator:
    """What runs studies.

    `log` is the directory of the study log, `trainings` that of trainings under way; `query` reads
    a query's declaration, `believed` is what
    nodes are enrolled with. `wait` lets time pass, in seconds.
    """

    access: LinkAccess
    roster: RosterFile
    believed: Enrolment
    ledger: StudyLedger
    log: Path
    trainings: Path
    query: Callable[[str], Query]
    deadlines: Deadlines = field(default_factory=Deadlines)
    level: float = 0.95
    wait: Callable[[float], None] = time.sleep

    def run(
        self,
        signed: SignedStudy,
        *,
        queries: Sequence[str] = (),
        say: Say = lambda _: None,
        still: Callable[[], None] = lambda: None,
    ) -> StudyOutcome:
        """Run a study: start it, ask each of `queries` (all, by default) in a round, answer.

        A question without an answer is in `failures`, as `ask_all` says, and what was reserved for
        it stays spent; `still` raises if the study may not go on. Raises `ApprovalError` if nodes
        or publication are not as approved, `BudgetExhaustedError` before anything is dispatched if
        the study, over all its runs, would take more rounds or cost more than was approved,
        `LedgerError`, and `DeploymentError` if the SuperLink refuses or is away.
        """
        study = signed.study
        if self.roster.hash != study.roster:
            raise ApprovalError(
                f"The study {study.id} was approved for other nodes than are enrolled now: propose "
                "it again."
            )
        index = find_published(self.log, study.study_hash)
        bundle = self._published(index, study.study_hash, _Waiting(self.wait))
        numbers = numbers_of(study)
        names = {name: numbers[study.query(name).name] for name in queries} or numbers
        ledger = WithinStudy(study=study, ledger=self.ledger)
        files = TrainingFiles(directory=self.trainings, study_hash=study.study_hash)
        # What was reserved for a training that goes on is reserved already.
        new = [study.query(name) for name in names if not ledger.knows(files.read(name))]
        ledger.verify_room([answer_price(one, self.query(one.ask)) for one in new])
        link = Link(self.access)
        say(f"starting a run of {study.id}")
        run_id = link.start(signed.encode(), study.run_configuration())
        done: list[StudyOutcome] = []

        def run(grid: Grid, context: Context) -> None:  # noqa: ARG001 - Flower's signature
            from federated.deployment.grid import GridExchange

            exchange = GridExchange(grid)
            conduct = Conduct(
                study=study,
                run=self._run(exchange, signed, index, ledger, run_id, say),
                checkpoints=files,
                reservation=ledger.reservation,
                say=say,
                still=still,
            )
            found, failures = ask_all(
                conduct, names, say=say, still=still, aside=lambda: _AWAY if exchange.away else ""
            )
            done.append(_outcome(run_id, bundle, found, failures))

        link.execute(run_id, run)
        if not done:
            raise DeploymentError("The run ended without being conducted.")
        return done[0]

    def _published(
        self, index: int, study_hash: str, waiting: _Waiting, from_size: int = 0
    ) -> StudyBundle:
        """The proof that nodes will believe.

        Between a checkpoint and its witnesses' words passes a moment, and a new checkpoint may come
        any time. A node would refuse what comes without them, and keep the refusal. Raises
        `StudyLogError`, at once for a node that claims to have seen more than there is: no waiting
        would make that true.
        """
        while True:
            self._verify_not_ahead(from_size)
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
                if not waiting.goes_on():
                    raise StudyLogError(
                        "No witness that nodes trust has cosigned the log: nobody was asked. See "
                        f"that the one under [[audit.witnesses]] runs, then try again. ({error})"
                    ) from error
            else:
                return bundle

    def _verify_not_ahead(self, from_size: int) -> None:
        if not from_size:
            return
        try:
            note = read_bounded(self.log / CHECKPOINT, MAX_NOTE_BYTES)
            size = parse_checkpoint(note).checkpoint.size
        except (AuditError, OSError) as error:
            raise StudyLogError(f"The study log cannot be read: {error}") from error
        if from_size > size:
            raise StudyLogError(
                f"A node says that it has seen {from_size} entries, the log has {size}: it gets no "
                "proof."
            )

    def _run(
        self,
        exchange: GridExchange,
        signed: SignedStudy,
        index: int,
        ledger: WithinStudy,
        run_id: int,
        say: Say,
    ) -> StudyRun:
        waiting = _Waiting(self.wait)

        def prove(from_size: int) -> bytes:
            """Nodes choose the sizes that proofs lead on from, each its own if it likes."""
            return self._published(index, signed.study.study_hash, waiting, from_size).encode()

        ports = RunPorts(
            exchange=NamedExchange(exchange, self.roster.flower_ids()),
            ledger=ledger,
            roster=self.roster.keys(),
            query=self.query,
            prove=prove,
            random=SystemBits(),
            participants=self.roster.charged,
            sites=self.roster.sites(),
            most_people=self.roster.most_people,
            say=say,
        )
        return StudyRun(signed, ports, run_id=run_id, deadlines=self.deadlines, level=self.level)


def _outcome(
    run_id: int,
    bundle: StudyBundle,
    found: Sequence[RoundOutcome | TrainedOutcome],
    failures: Mapping[str, str],
) -> StudyOutcome:
    return StudyOutcome(
        run_id=run_id,
        bundle=bundle,
        answers=[one for one in found if isinstance(one, RoundOutcome)],
        models=[one for one in found if isinstance(one, TrainedOutcome)],
        failures=failures,
    )


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
