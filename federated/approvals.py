"""From a proposal to a study that may run: who says what, in which order, with which signature.

Lives here: the steps and what must hold at each: propose, approve (or refuse) as a member of the
ethics board or for a site, publish, run, release. Each is decided by the policies (who may, with a
second factor of the last quarter of an hour), is recorded in the audit log before and after, and is
kept as a row. Rows stand in `federated.study_store`, signatures in `federated.signed_study`.

Four eyes are a rule of the policies and, beside it, of this module, which no policy file can
change: nobody approves what he proposed, nobody speaks twice. An approval is a signature by a key
that was enrolled for that role: whoever holds the database or this process cannot make one.

Who holds the keys: each approver has an Ed25519 key of his own in a file of mode 0600, where he
sits (`FileSigner`). They are not in the coordinator's key server, because whoever could sign there
as everybody would be four eyes by himself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.model import Action, Assurance
from audit.recorder import Act, Begun, End, Recorder, Who
from federated.errors import ApprovalError, FederatedError
from federated.manifest import Study
from federated.signed_study import (
    Role,
    SignedStudy,
    Signer,
    StudySignature,
    TrustedKeys,
    sign_study,
    verify_study,
)
from federated.study_log import HASH_DETAIL, ID_DETAIL
from federated.study_store import Record, Step, StepKind, StudyStore, person_tag
from keys.errors import KeysError
from keys.private_files import make_private_directory, read_private, write_private
from policies.model import (
    Allowed,
    Capacity,
    Context,
    Decision,
    Principal,
    Request,
    Resource,
    StudyAction,
    StudyStanding,
)

type Stage = Literal["proposed", "approved", "published", "refused", "expired"]

_ACTIONS: Final[Mapping[StepKind, Action]] = {
    "propose": "study.propose",
    "approve": "study.approve",
    "refuse": "study.refuse",
    "publish": "study.publish",
    "run": "study.run",
    "release": "study.release",
}
_KEY_BYTES: Final = 32


class FileSigner:
    """An approver's or coordinator's Ed25519 key: 32 bytes in a file that only its owner reads."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def load(cls, path: Path) -> FileSigner:
        """Read the key. Raises `ApprovalError` if it is missing, open to others, or no key."""
        try:
            raw = read_private(path)
        except KeysError as error:
            raise ApprovalError(f"{error} `havengate study key {path}` makes a new one.") from error
        if len(raw) != _KEY_BYTES:
            raise ApprovalError(f"{path} must hold the {_KEY_BYTES} bytes of an Ed25519 key.")
        return cls(Ed25519PrivateKey.from_private_bytes(raw))

    @classmethod
    def create(cls, path: Path) -> FileSigner:
        """Make a key. Raises `ApprovalError` if there is a file already."""
        if path.exists():
            raise ApprovalError(f"{path} is there already: name another file.")
        key = Ed25519PrivateKey.generate()
        try:
            if not path.parent.exists():
                make_private_directory(path.parent)
            write_private(path, key.private_bytes_raw())
        except (OSError, KeysError) as error:
            raise ApprovalError(f"{path} cannot be written: {error}.") from error
        return cls(key)

    @property
    def public_key(self) -> bytes:
        """The raw 32 bytes that others are enrolled with."""
        return self._key.public_key().public_bytes_raw()

    def public_keys(self) -> Mapping[int, bytes]:
        """As `signed_study.Signer` says; there is one version."""
        return {1: self.public_key}

    def sign(self, message: bytes) -> tuple[int, bytes]:
        """As `signed_study.Signer` says."""
        return 1, self._key.sign(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a study stands. `missing` says in words whose approval it waits for."""

    record: Record
    stage: Stage
    missing: tuple[str, ...]

    @property
    def study(self) -> Study:
        """The study itself."""
        return self.record.study

    @property
    def released(self) -> bool:
        """Whether an answer was given out."""
        return bool(self.record.of("release"))


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedRun:
    """A run that may go on: the study with every signature, and the entry that announced it."""

    signed: SignedStudy
    begun: Begun


class Approvals:
    """The paper trail of all studies of one coordinator. Threads and processes may share it.

    `decide` is the policies' engine; `trusted` holds the keys that were enrolled for each role;
    `officers` the ids of the persons who speak for each site; `clock` is Unix time in seconds;
    `name_of` gives the name under which the log seals a person.
    """

    def __init__(
        self,
        store: StudyStore,
        *,
        recorder: Recorder,
        decide: Callable[[Request], Decision],
        coordinator: Signer,
        trusted: TrustedKeys,
        officers: Mapping[str, frozenset[str]],
        tenant: str,
        clock: Callable[[], float],
        name_of: Callable[[Principal], str] = lambda principal: principal.id,
    ) -> None:
        self._name_of = name_of
        self._store = store
        self._recorder = recorder
        self._decide = decide
        self._coordinator = coordinator
        self._trusted = trusted
        self._officers = officers
        self._tenant = tenant
        self._clock = clock

    # --- Looking ---------------------------------------------------------------------------------

    def standing(self, name: str) -> Standing:
        """Where the study of this id or hash stands. Raises `ApprovalError` if there is none."""
        return self._standing(self._store.find(name))

    def all(self) -> list[Standing]:
        """Every study, the oldest first."""
        return [self._standing(record) for record in self._store.all()]

    def signed(self, name: str) -> SignedStudy:
        """The study with the signatures that it has."""
        return _signed(self._store.find(name))

    def _standing(self, record: Record) -> Standing:
        missing = _missing(record, self._trusted)
        stage: Stage = "proposed" if missing else "approved"
        if record.of("publish"):
            stage = "published"
        if self._clock() > record.study.valid_until:
            stage = "expired"
        if record.of("refuse"):
            stage = "refused"
        return Standing(record=record, stage=stage, missing=missing)

    # --- Steps -----------------------------------------------------------------------------------

    def propose(self, study: Study, principal: Principal) -> Standing:
        """Propose a study: from now on it cannot be changed.

        Raises `ApprovalError` if this person may not, or if its id was used before.
        """
        begun = self._authorised("propose", study, principal, StudyStanding(), role="researcher")
        step = self._step("propose", study, principal, begun, role="researcher")
        with self._ending(begun):
            self._verify_valid(study)
            self._store.add(study, step)
        return self._standing(Record(study=study, steps=(step,)))

    def approve(
        self,
        name: str,
        principal: Principal,
        *,
        capacity: Capacity,
        signer: Signer,
        site: str = "",
    ) -> Standing:
        """Give one's word for a study, as the ethics board or for a site, with one's signature.

        The last word that is needed publishes the study. Raises `ApprovalError` if this person may
        not, has spoken before, or signs with a key that was not enrolled for this role.
        """
        record = self._store.find(name)
        begun, step = self._word("approve", record, principal, capacity, site)
        with self._ending(begun):
            signature = sign_study(record.study, signer, role=_role(capacity), site=site)
            self._verify_enrolled(record.study, signature)
            step = replace(
                step,
                public_key=signature.public_key.hex(),
                signature=signature.signature.hex(),
            )
            record = self._store.append(record.study.study_hash, step, self._verify_speaks(step))
        if self._standing(record).stage == "approved":
            return self.publish(record.study.study_hash)
        return self._standing(record)

    def refuse(
        self, name: str, principal: Principal, *, capacity: Capacity, site: str = ""
    ) -> Standing:
        """Give one's word against a study; one is enough, and final. Raises `ApprovalError`."""
        record = self._store.find(name)
        begun, step = self._word("refuse", record, principal, capacity, site)
        with self._ending(begun):
            record = self._store.append(record.study.study_hash, step, self._verify_speaks(step))
        return self._standing(record)

    def _word(
        self, kind: StepKind, record: Record, principal: Principal, capacity: Capacity, site: str
    ) -> tuple[Begun, Step]:
        role = _role(capacity)
        facts = replace(
            self._facts(record, principal),
            capacity=capacity,
            own_site=principal.id in self._officers.get(site, frozenset()),
        )
        begun = self._authorised(kind, record.study, principal, facts, role=role, site=site)
        return begun, self._step(kind, record.study, principal, begun, role=role, site=site)

    def publish(self, name: str) -> Standing:
        """Sign an approved study as the coordinator and put it into the log for devices to see.

        `approve` does it; this is for after a crash in between. Raises `ApprovalError` unless every
        approval is in.
        """
        record = self._store.find(name)
        if record.of("publish"):
            return self._standing(record)
        self._verify_valid(record.study)
        signature = sign_study(record.study, self._coordinator, role="coordinator")
        step = Step(
            kind="publish",
            role="coordinator",
            public_key=signature.public_key.hex(),
            signature=signature.signature.hex(),
            at_us=int(self._clock() * 1_000_000),
            log_index=0,
        )
        published = Record(study=record.study, steps=(*record.steps, step))
        verify_study(_signed(published), self._trusted)
        if record.of("refuse"):
            raise ApprovalError(f"The study {record.study.id} was refused.")
        act = self._act("publish", record.study, Who(kind="system", name="coordinator"))
        # In the log first: an entry too many says nothing wrong, one too few stops every device.
        index = self._recorder.outcome(self._recorder.intent(act), End(outcome="success"))
        step = replace(step, log_index=index)
        return self._standing(
            self._store.append(record.study.study_hash, step, _verify_unpublished)
        )

    def start_run(self, name: str, principal: Principal) -> StartedRun:
        """Let a study run: everything is looked at again. Raises `ApprovalError`.

        Whoever gets it must call `end_run`.
        """
        record = self._store.find(name)
        facts = self._facts(record, principal)
        begun = self._authorised("run", record.study, principal, facts, role="researcher")
        with self._failing(begun):
            self._verify_runnable(record)
            step = self._step("run", record.study, principal, begun, role="researcher")
            self._store.append(record.study.study_hash, step, self._verify_runnable)
        return StartedRun(signed=_signed(record), begun=begun)

    def end_run(self, run: StartedRun, error: FederatedError | None = None) -> None:
        """Record how a run ended."""
        if error is None:
            self._recorder.outcome(run.begun, End(outcome="success"))
        else:
            self._recorder.outcome(run.begun, End(outcome="failed", reason=error.code))

    def release(self, name: str, principal: Principal, *, answer_hash: str) -> int:
        """Record that an answer is given out, before it is; return the index of its entry.

        `answer_hash` is the SHA-256, in hex, of its JSON. Raises `ApprovalError`.
        """
        record = self._store.find(name)
        facts = self._facts(record, principal)
        begun = self._authorised(
            "release", record.study, principal, facts, role="researcher", answer=answer_hash
        )
        with self._failing(begun):
            if not record.of("run"):
                raise ApprovalError(f"The study {record.study.id} has not run: nothing to release.")
            step = self._step("release", record.study, principal, begun, role="researcher")
            self._store.append(record.study.study_hash, step, self._verify_runnable)
        return self._recorder.outcome(begun, End(outcome="success"))

    # --- What must hold --------------------------------------------------------------------------

    def _facts(self, record: Record, principal: Principal) -> StudyStanding:
        tag = person_tag(record.study.study_hash, principal.id)
        return StudyStanding(
            proposed_by_self=any(step.person == tag for step in record.of("propose")),
            spoken_by_self=any(step.person == tag for step in record.of("approve", "refuse")),
            approved=self._standing(record).stage == "published",
        )

    def _authorised(
        self,
        kind: StepKind,
        study: Study,
        principal: Principal,
        facts: StudyStanding,
        *,
        role: str,
        site: str = "",
        answer: str = "",
    ) -> Begun:
        """Ask the policies, and record what is about to happen. Raises `ApprovalError`."""
        now = self._clock()
        request = Request(
            principal=principal,
            action=_question(kind),
            resource=Resource(
                service="studies", kind="generic", type="Study", id=study.id, study=facts
            ),
            context=Context(purpose="HRESCH", now=now),
        )
        decision = self._decide(request)
        allowed = isinstance(decision, Allowed)
        act = replace(
            self._act(
                kind,
                study,
                _who(self._name_of(principal), principal, role, now),
                site=site,
                answer=answer,
            ),
            decision="allow" if allowed else "deny",
            rules=decision.rules,
        )
        begun = self._recorder.intent(act)
        if principal.kind != "user" or principal.scopes is not None:
            self._recorder.outcome(begun, End(outcome="denied", reason="federated.approval"))
            raise ApprovalError("Only a person who is signed in himself decides about studies.")
        if not isinstance(decision, Allowed):
            reason = decision.failure or decision.remedy.kind
            self._recorder.outcome(begun, End(outcome="denied", reason=reason))
            raise ApprovalError(f"{decision.reason} {decision.remedy.text}")
        return begun

    def _act(
        self, kind: StepKind, study: Study, who: Who, *, site: str = "", answer: str = ""
    ) -> Act:
        details = {HASH_DETAIL: study.study_hash, ID_DETAIL: study.id}
        if site:
            details["site"] = site
        if answer:
            details["answer"] = answer
        return Act(
            tenant=self._tenant,
            who=who,
            action=_ACTIONS[kind],
            service="studies",
            purpose="HRESCH",
            details=details,
        )

    def _step(
        self,
        kind: StepKind,
        study: Study,
        principal: Principal,
        begun: Begun,
        *,
        role: str,
        site: str = "",
    ) -> Step:
        return Step(
            kind=kind,
            role=role,
            site=site,
            person=person_tag(study.study_hash, principal.id),
            at_us=int(self._clock() * 1_000_000),
            log_index=begun.index,
        )

    def _verify_valid(self, study: Study) -> None:
        if self._clock() > study.valid_until:
            raise ApprovalError(f"The study {study.id} is past its time: propose a new one.")

    def _verify_enrolled(self, study: Study, signature: StudySignature) -> None:
        if signature.public_key not in _keys_for(self._trusted, signature.role, signature.site):
            who = f"site {signature.site}" if signature.site else signature.role
            raise ApprovalError(
                f"This key was not enrolled for {who}: have its public key added to "
                "[federated.keys], or sign with the one that was."
            )
        if signature.role == "site" and signature.site not in study.sites:
            raise ApprovalError(f"The study {study.id} does not ask the site {signature.site}.")

    def _verify_speaks(self, step: Step) -> Callable[[Record], None]:
        def verify(record: Record) -> None:
            self._verify_valid(record.study)
            if record.of("publish", "refuse"):
                raise ApprovalError(f"The study {record.study.id} is decided already.")
            spoken = record.of("approve", "refuse")
            keys = {one.public_key for one in spoken} - {""}
            if any(one.person == step.person for one in record.of("propose")):
                raise ApprovalError("Nobody approves what he proposed: somebody else must.")
            if step.public_key in keys or any(step.person == one.person for one in spoken):
                raise ApprovalError("Nobody speaks twice about one study: somebody else must.")

        return verify

    def _verify_runnable(self, record: Record) -> None:
        if not record.of("publish") or record.of("refuse"):
            raise ApprovalError(f"The study {record.study.id} waits for approvals.")
        if not record.study.valid_from <= self._clock() <= record.study.valid_until:
            raise ApprovalError(f"The study {record.study.id} is not valid at this time.")
        verify_study(_signed(record), self._trusted)

    def _ending(self, begun: Begun) -> _Ending:
        return _Ending(self._recorder, begun, success=True)

    def _failing(self, begun: Begun) -> _Ending:
        return _Ending(self._recorder, begun, success=False)


class _Ending:
    """Records how a step ended: a failure always, a success if it ends here."""

    def __init__(self, recorder: Recorder, begun: Begun, *, success: bool) -> None:
        self._recorder = recorder
        self._begun = begun
        self._success = success

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None:
            if self._success:
                self._recorder.outcome(self._begun, End(outcome="success"))
        elif isinstance(error, FederatedError):
            self._recorder.outcome(self._begun, End(outcome="denied", reason=error.code))


def _verify_unpublished(record: Record) -> None:
    if record.of("refuse"):
        raise ApprovalError(f"The study {record.study.id} was refused.")


def _role(capacity: Capacity) -> Role:
    if capacity == "none":
        raise ApprovalError("Say whether you approve as the ethics board or for a site.")
    return capacity


def _question(kind: StepKind) -> StudyAction:
    questions: dict[StepKind, StudyAction] = {
        "propose": "study-propose",
        "approve": "study-approve",
        "refuse": "study-approve",
        "run": "study-run",
        "release": "study-release",
    }
    return questions[kind]


def _who(name: str, principal: Principal, role: str, now: float) -> Who:
    shown = principal.assurance
    at = shown.second_factor_at
    age_s = None if at is None or at > now else int(now - at)
    return Who(
        kind="person",
        person=name,
        role=role,
        assurance=Assurance(level=shown.second_factor, age_s=age_s),
    )


def _keys_for(trusted: TrustedKeys, role: Role, site: str) -> frozenset[bytes]:
    match role:
        case "coordinator":
            return trusted.coordinator
        case "ethics-board":
            return trusted.ethics_board
        case "site":
            return trusted.sites.get(site, frozenset())


def _signatures(record: Record) -> tuple[StudySignature, ...]:
    return tuple(
        StudySignature(
            role=step.role,  # type: ignore[arg-type]
            site=step.site,
            public_key=bytes.fromhex(step.public_key),
            signature=bytes.fromhex(step.signature),
        )
        for step in record.of("approve", "publish")
    )


def _signed(record: Record) -> SignedStudy:
    return SignedStudy(study=record.study, signatures=_signatures(record))


def _missing(record: Record, trusted: TrustedKeys) -> tuple[str, ...]:
    given = _signatures(record)
    board = {
        one.public_key
        for one in given
        if one.role == "ethics-board" and one.public_key in trusted.ethics_board
    }
    short = record.study.ethics_approvals - len(board)
    waits = [f"{short} of the ethics board"] if short > 0 else []
    for site in record.study.sites:
        keys = trusted.sites.get(site, frozenset())
        if not any(one.site == site and one.public_key in keys for one in given):
            waits.append(f"site {site}")
    return tuple(waits)
