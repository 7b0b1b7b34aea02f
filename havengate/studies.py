"""The composition root of `havengate study`: settings in, a working paper trail out.

Here alone meet the accounts of the gateway, which know who somebody is, and studies, which want a
person with a fresh second factor. An approver signs in on the command line as on the gateway's own
pages (name, password, code), with the same limits on attempts and the same entries in the log; the
session that begins is ended at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import typer

from audit.entry import parse_entry
from audit.errors import AuditError
from audit.model import Entry
from audit.reader import LogReader
from audit.recorder import Appender, AsyncRecorder, Sequenced
from audit.retention import first_readable
from federated.accounting import Accountant
from federated.approvals import Approvals, FileSigner, Standing
from federated.cli import RunResult, Say, StudyProgram
from federated.coordinator import Coordinator, link_access
from federated.database import StudyDatabase
from federated.deployment.places import Places, read_roster
from federated.deployment.up import remembered
from federated.errors import ApprovalError, DeploymentError, LedgerError, StudyLogError
from federated.ledger import Ledger
from federated.ledger_rows import Charge
from federated.manifest import Study
from federated.node.enrolment import Enrolment, parse_enrolment
from federated.planning import study_costs
from federated.questions import declared_question
from federated.release.document import make_document
from federated.release.files import Reports
from federated.release.proof import make_release_proof
from federated.settings import FederatedSettings
from federated.signed_study import SignedStudy
from federated.standing import Standings
from federated.study_log import verify_logged
from federated.study_program import StudyReading
from federated.study_run import Deadlines
from federated.study_store import StudyStore
from federated.telling import run_lines
from federated.training_files import TrainingFiles
from federated.training_progress import TrainingProgress, progress_of
from gateway.identity.directory import Directory
from gateway.identity.passwords import Passwords
from gateway.identity.recording import IdentityLog
from gateway.identity.records import Account, person_name
from gateway.identity.sign_in import SignedIn, SignIn
from gateway.identity.totp import SecondFactors
from havengate import wiring
from havengate.configuration import Configuration
from keys.errors import KeysError
from keys.kv import KVStore
from keys.private_files import read_private
from policies.model import Assurance, Principal
from policies.store import load_in_force

#: How often, and how long in between, the log is looked at for witnesses' words on a release.
_LOOKS = 50
#: Of the directory of reports: where trainings lie between their rounds. No study has such an id.
_TRAININGS = ".trainings"
_LOOK_S = 0.2
_REFUSED = "Name, password or code is wrong, or there were too many attempts: wait, and try again."


@contextmanager
def open_studies(
    settings: Configuration,
    environ: Mapping[str, str],
    *,
    ask: Callable[[str, bool], str] | None = None,
) -> Iterator[StudyProgram]:
    """Open what `havengate study` works with, the log included.

    `ask(what, hidden)` asks the person at the terminal. Raises a `KeysError`, an `AuditError` or a
    `FederatedError`.
    """
    own = settings.federated
    with ExitStack() as stack:
        places = Places(directory=Path(own.directory))
        trusted = replace(_federation(places).trusted(), own_site="")
        coordinator = FileSigner.load(Path(own.coordinator_key_file))
        engine = load_in_force(settings.policies).engine
        program = stack.enter_context(wiring.open_program(settings, environ))
        directory = Directory.open(
            settings.gateway.identity.database_url,
            settings=settings.gateway.identity.sessions,
            clock=time.time,
        )
        stack.callback(directory.close)
        database = StudyDatabase(own.database_url)
        stack.callback(database.close)
        approvals = Approvals(
            StudyStore(database),
            recorder=program.recorder,
            decide=engine.decide,
            coordinator=coordinator,
            trusted=trusted,
            officers=_officers(own, directory),
            tenant=settings.tenant,
            clock=time.time,
            name_of=_name_of,
        )
        ledger = Ledger(
            database,
            # Later studies are chosen knowing earlier answers.
            accountant=Accountant(delta=own.budget.delta, adaptive=True),
            cap=own.budget.epsilon,
            recorder=program.recorder,
            tenant=settings.tenant,
            clock=time.time,
            ids=wiring.new_request_id,
        )
        desk = SignInDesk(
            directory=directory, program=program, tenant=settings.tenant, ask=ask or _ask
        )
        runner = _Runner(settings=settings, places=places, ledger=ledger, approvals=approvals)
        yield StudyProgram(
            approvals=approvals,
            ledger=ledger,
            reports=runner.reports,
            sign_in=desk.sign_in,
            run=runner.run,
            entries=lambda: log_entries(settings),
            rosters=lambda: _rosters(places),
            publish_log=program.log.publish,
            prove=lambda index: runner.prove(index, program.log.publish),
        )


@contextmanager
def open_reading(settings: Configuration) -> Iterator[StudyReading]:
    """Open what commands work with that only look: neither log nor key server.

    Also while a run is on, which holds the log. Raises a `FederatedError`.
    """
    own = settings.federated
    places, reports = Places(directory=Path(own.directory)), Path(own.reports_directory)
    trusted = replace(_federation(places).trusted(), own_site="")
    database = StudyDatabase(own.database_url)
    try:
        yield StudyReading(
            approvals=Standings(StudyStore(database), trusted, clock=time.time),
            trainings=partial(_progress, reports / _TRAININGS),
        )
    finally:
        database.close()


def _progress(directory: Path, study: Study) -> Iterator[TrainingProgress]:
    return progress_of(study, TrainingFiles(directory=directory, study_hash=study.study_hash))


def enrolled_roster(settings: FederatedSettings) -> str | None:
    """The hash of the nodes that are enrolled on this machine, if any are."""
    roster = read_roster(Places(directory=Path(settings.directory)).roster)
    return roster.hash if roster.nodes else None


def enrolled_nodes(settings: FederatedSettings) -> int | None:
    """How many nodes are enrolled on this machine; None if there is none."""
    return len(read_roster(Places(directory=Path(settings.directory)).roster).nodes) or None


def log_entries(settings: Configuration) -> Iterator[Entry]:
    """Every entry of the log about the ledger that was not pruned."""
    log = LogReader(Path(settings.audit.directory))
    first = first_readable(log, now_s=time.time(), retention_days=settings.audit.retention_days)
    for _, raw in log.read(first):
        if b'"action":"study.' in raw:
            yield parse_entry(raw)


def _federation(places: Places) -> Enrolment:
    try:
        return parse_enrolment(read_private(places.federation))
    except KeysError as error:
        raise DeploymentError(
            f"{places.federation} cannot be read: {error} It says whose approvals count."
        ) from error


def _officers(settings: FederatedSettings, directory: Directory) -> dict[str, frozenset[str]]:
    """Who speaks for each site, by the ids under which the rules know them."""
    found: dict[str, frozenset[str]] = {}
    for site, logins in settings.officers.items():
        accounts = [directory.accounts.find(login) for login in logins]
        found[site] = frozenset(_principal_id(one) for one in accounts if one is not None)
    return found


def _principal_id(account: Account) -> str:
    return account.principal(Assurance()).id


def _name_of(principal: Principal) -> str:
    """The name under which every entry of the log seals this person."""
    return person_name(
        patient=principal.patient,
        references=principal.references,
        otherwise=principal.id,
        roles=principal.roles,
    )


def _rosters(places: Places) -> Iterable[Sequence[str]]:
    """Lists of participants that the ledger may have charged: all nodes of the roster."""
    roster = read_roster(places.roster)
    whom = sorted({name for node in roster.nodes for name in roster.charged(node)})
    yield whom
    # Rows of releases that charged names alone.
    yield [name for name in whom if not name.startswith("key:")]


@dataclass(frozen=True, slots=True, kw_only=True)
class SignInDesk:
    """Signs a person in who sits at the terminal."""

    directory: Directory
    program: wiring.Program
    tenant: str
    ask: Callable[[str, bool], str]

    def sign_in(self) -> Principal:
        """Ask for name, password and code. Raises `ApprovalError`."""
        passwords = Passwords()
        try:
            return asyncio.run(self._sign_in(passwords))
        finally:
            passwords.close()

    async def _sign_in(self, passwords: Passwords) -> Principal:
        recorder = AsyncRecorder(
            _InThread(self.program.log.appender),
            sealer=self.program.keys.keyring,
            clock=time.time,
            ids=wiring.new_request_id,
        )
        store = KVStore(self.program.keys.client, "gateway")
        desk = SignIn(
            directory=self.directory,
            passwords=passwords,
            second_factors=SecondFactors(store, self.directory.accounts, clock=time.time),
            log=IdentityLog(recorder=recorder, tenant=self.tenant, clock=time.time),
        )
        login, password = self.ask("Name", False), self.ask("Password", True)
        account = await desk.password(login, password, None)
        if not isinstance(account, Account):
            raise ApprovalError(_REFUSED)
        if account.must_set_second_factor:
            raise ApprovalError("Sign in on the gateway's page first, and set your second factor.")
        signed_in = await desk.code(account, self.ask("Code", False), None)
        if not isinstance(signed_in, SignedIn):
            raise ApprovalError(_REFUSED)
        # Nobody needs the session: what is done with it is done in this command.
        await asyncio.to_thread(self.directory.sessions.end, signed_in.session.id)
        shown = Assurance(second_factor="totp", second_factor_at=signed_in.session.second_factor_at)
        return account.principal(shown)


class _InThread:
    """`audit.recorder.AsyncAppender` over a log for threads."""

    def __init__(self, log: Appender) -> None:
        self._log = log

    async def append_async(self, entry: bytes) -> Sequenced:
        """Append in a thread."""
        return await asyncio.to_thread(self._log.append, entry)


def _ask(what: str, hidden: bool) -> str:  # noqa: FBT001 - the port's form
    answer: str = typer.prompt(what, hide_input=hidden, err=True)
    return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Runner:
    """Has the deployment ask a study's questions, and keeps the answers."""

    settings: Configuration
    places: Places
    ledger: Ledger
    approvals: Approvals

    @property
    def reports(self) -> Reports:
        return Reports(Path(self.settings.federated.reports_directory))

    @property
    def kept(self) -> Path:
        """Where trainings lie between their rounds."""
        return Path(self.settings.federated.reports_directory) / _TRAININGS

    def run(self, signed: SignedStudy, standing: Standing, say: Say) -> RunResult:
        """As `federated.cli.StudyProgram.run`."""
        own, log = self.settings.federated.run, Path(self.settings.audit.directory)
        study = signed.study
        before = self.ledger.charges(study.study_hash)
        coordinator = Coordinator(
            access=link_access(self.places, address=self._address()),
            roster=read_roster(self.places.roster),
            believed=_federation(self.places),
            ledger=self.ledger,
            log=log,
            trainings=self.kept,
            query=declared_question,
            deadlines=Deadlines(greet_s=own.greet_s, stage_s=own.stage_s),
            level=own.level,
        )
        outcome = coordinator.run(
            signed, say=say, still=lambda: self.approvals.verify_runnable(study.study_hash)
        )
        document = make_document(
            standing,
            signed,
            outcome.answers,
            models=outcome.models,
            failures=outcome.failures,
            bundle=outcome.bundle,
            origin=self.settings.audit.origin,
            charged=self._charged(study, outcome.run_id, before),
            run_id=outcome.run_id,
            at=time.time(),
        )
        # A run without an answer takes the place of no earlier one.
        answered = bool(outcome.answers or outcome.models)
        answer_hash = self.reports.keep(study, document) if answered else ""
        lines = list(run_lines(outcome, document))
        return RunResult(lines=lines, answer_hash=answer_hash, failures=outcome.failures)

    def _charged(self, study: Study, run_id: int, before: Sequence[Charge]) -> Sequence[Charge]:
        """All that the study has cost; where the ledger does not answer, as if all was reserved."""
        try:
            return self.ledger.charges(study.study_hash)
        except LedgerError:
            costs = enumerate(study_costs(study).values())
            return [*before, *(Charge(round=f"{run_id}-{n}", cost=cost) for n, cost in costs)]

    def prove(self, index: int, publish: Callable[[], None]) -> bytes:
        """As `federated.cli.StudyProgram.prove`; waits some seconds for the witnesses."""
        believed, log = _federation(self.places), Path(self.settings.audit.directory)
        publish()
        for _ in range(_LOOKS):
            try:
                proof = make_release_proof(log, index)
                verify_logged(
                    proof,
                    log_keys=believed.log_verifiers(),
                    witness_keys=believed.witness_verifiers(),
                    witnesses=believed.witnesses,
                )
            except (StudyLogError, AuditError):
                time.sleep(_LOOK_S)
            else:
                return proof
        return b""

    def _address(self) -> str:
        files = remembered(self.places)
        if files is None:
            raise DeploymentError("No SuperLink runs on this machine: havengate federated up")
        return f"{files.host}:{files.http_port}"
