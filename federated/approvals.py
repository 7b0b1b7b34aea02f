"""From a proposal to a study that may run: who says what, in which order, with which signature.

Lives here: the steps and what must hold at each: propose, approve (or refuse) as a member of the
ethics board or for a site, publish, run, release, withdraw. Each is decided by the policies (who
may, with a second factor of the last quarter of an hour), recorded in the audit log before and
after (`federated.desk`), and kept as a row (`federated.study_store`). Signatures stand in
`federated.signed_study`, what follows from both in `federated.standing`.

Four eyes are a rule of the policies and, beside it, of this module, which no policy file can
change: nobody approves what he proposed, nobody speaks twice. An approval is a signature by a key
that was enrolled for that role: whoever holds the database or this process cannot make one.

Who holds the keys: each approver has an Ed25519 key of his own in a file of mode 0600, where he
sits (`FileSigner`). They are not in the coordinator's key server, because whoever could sign there
as everybody would be four eyes by himself.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from audit.recorder import Begun, End, Recorder, Who
from federated.desk import Desk
from federated.errors import ApprovalError, FederatedError
from federated.file_signer import FileSigner
from federated.manifest import Study
from federated.signed_study import (
    Role,
    SignedStudy,
    Signer,
    TrustedKeys,
    sign_study,
    verify_study,
)
from federated.standing import (
    Stage,
    Standing,
    signed_of,
    standing_of,
    verify_asked,
    verify_enrolled,
    verify_first_word,
    verify_stands,
)
from federated.study_store import Record, Step, StepKind, StudyStore, person_tag
from policies.model import (
    Capacity,
    Decision,
    Principal,
    Request,
    StudyStanding,
)

__all__ = ["Approvals", "FileSigner", "Stage", "Standing", "StartedRun"]

#: In which capacity a published study is stopped.
type Stopping = Literal["ethics-board", "site", "coordinator"]

_ANSWER_HASH = re.compile(r"[0-9a-f]{64}").fullmatch


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
        self._store = store
        self._recorder = recorder
        self._coordinator = coordinator
        self._trusted = trusted
        self._officers = officers
        self._desk = Desk(
            recorder=recorder, decide=decide, tenant=tenant, clock=clock, name_of=name_of
        )
        self._clock = clock

    def standing(self, name: str) -> Standing:
        """Where the study of this id or hash stands. Raises `ApprovalError` if there is none."""
        return self._standing(self._store.find(name))

    def all(self) -> list[Standing]:
        """Every study, the oldest first."""
        return [self._standing(record) for record in self._store.all()]

    def signed(self, name: str) -> SignedStudy:
        """The study with the signatures that it has."""
        return signed_of(self._store.find(name))

    def verify_runnable(self, name: str) -> None:
        """Whoever runs it may go on: it is approved, in its time, and nobody stopped it meanwhile.

        Raises `ApprovalError`.
        """
        self._verify_runnable(self._store.find(name))

    def _standing(self, record: Record) -> Standing:
        return standing_of(record, self._trusted, now=self._clock())

    def propose(self, study: Study, principal: Principal) -> Standing:
        """Propose a study: from now on it cannot be changed.

        Raises `ApprovalError` if this person may not, or if its id was used before.
        """
        begun = self._desk.authorised(
            "propose", study, principal, StudyStanding(), role="researcher"
        )
        step = self._desk.step("propose", study, principal, begun, role="researcher")
        with self._desk.ending(begun):
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
        shown: str = "",
    ) -> Standing:
        """Give one's word for a study, as the ethics board or for a site, with one's signature.

        `shown` is the hash of what the approver was shown: nothing else is signed. The last word
        that is needed publishes the study. Raises `ApprovalError` if this person may not, has
        spoken before, or signs with a key that was not enrolled for this role.
        """
        record = self._store.find(name)
        if shown and not hmac.compare_digest(shown, record.study.study_hash):
            raise ApprovalError(
                f"{name} is another study now than the one that was shown: look again "
                f"(havengate study show {record.study.id}), then decide."
            )
        begun, step = self._word("approve", record, principal, capacity, site)
        with self._desk.ending(begun):
            signature = sign_study(record.study, signer, role=_role(capacity), site=site)
            verify_enrolled(record.study, signature, self._trusted)
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
        with self._desk.ending(begun):
            record = self._store.append(record.study.study_hash, step, self._verify_speaks(step))
        return self._standing(record)

    def _word(
        self, kind: StepKind, record: Record, principal: Principal, capacity: Capacity, site: str
    ) -> tuple[Begun, Step]:
        role = _role(capacity)
        facts = self._facts(record, principal, capacity=capacity, site=site)
        begun = self._desk.authorised(kind, record.study, principal, facts, role=role, site=site)
        with self._desk.failing(begun):
            verify_asked(record.study, role, site)
        return begun, self._desk.step(kind, record.study, principal, begun, role=role, site=site)

    def withdraw(
        self, name: str, principal: Principal, *, capacity: Stopping, site: str = ""
    ) -> Standing:
        """Stop a published study: from now on it neither runs nor is released. Final.

        One person suffices: a member of the ethics board, the officer of one of its sites, or an
        administrator for the coordinator. Raises `ApprovalError`. A device is not told: one that
        consents would answer a coordinator that ignores this until `valid_until`.
        """
        record = self._store.find(name)
        asked: Capacity = "none" if capacity == "coordinator" else capacity
        facts = self._facts(record, principal, capacity=asked, site=site)
        begun = self._desk.authorised(
            "withdraw", record.study, principal, facts, role=capacity, site=site
        )
        step = self._desk.step("withdraw", record.study, principal, begun, role=capacity, site=site)
        with self._desk.ending(begun):
            verify_asked(record.study, capacity, site)
            record = self._store.append(record.study.study_hash, step, _verify_published)
        return self._standing(record)

    def publish(self, name: str) -> Standing:
        """Sign an approved study as the coordinator and put it into the log for devices to see.

        `approve` does it; this is for after a crash in between. Once is enough, whoever else does
        it meanwhile. Raises `ApprovalError` unless every approval is in.
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
        verify_study(signed_of(published), self._trusted)
        verify_stands(record)
        act = self._desk.act("publish", record.study, Who(kind="system", name="coordinator"))
        # In the log first: an entry too many says nothing wrong, one too few stops every device.
        index = self._recorder.outcome(self._recorder.intent(act), End(outcome="success"))
        step = replace(step, log_index=index)
        try:
            record = self._store.append(record.study.study_hash, step, _verify_unpublished)
        except ApprovalError:
            record = self._store.get(record.study.study_hash)
            if not record.of("publish"):
                raise
        return self._standing(record)

    def start_run(self, name: str, principal: Principal) -> StartedRun:
        """Let a study run: everything is looked at again. Raises `ApprovalError`.

        Whoever gets it must call `end_run`.
        """
        record = self._store.find(name)
        facts = self._facts(record, principal)
        begun = self._desk.authorised("run", record.study, principal, facts, role="researcher")
        with self._desk.failing(begun):
            self._verify_runnable(record)
            step = self._desk.step("run", record.study, principal, begun, role="researcher")
            self._store.append(record.study.study_hash, step, self._verify_runnable)
        return StartedRun(signed=signed_of(record), begun=begun)

    def end_run(
        self, run: StartedRun, error: FederatedError | None = None, *, answer_hash: str = ""
    ) -> None:
        """Record how a run ended: with an answer of this hash (SHA-256, hex), or with an error.

        Only an answer that was recorded here can be released. Raises `ApprovalError` for neither.
        """
        if error is not None:
            self._recorder.outcome(run.begun, End(outcome="failed", reason=error.code))
            return
        if not _ANSWER_HASH(answer_hash):
            raise ApprovalError("A run that went well has an answer, and says the answer's hash.")
        study = run.signed.study.study_hash
        step = Step(
            kind="answer",
            role="researcher",
            answer=answer_hash,
            at_us=int(self._clock() * 1_000_000),
            log_index=run.begun.index,
        )
        self._store.append(study, step, _verify_ran)
        self._recorder.outcome(run.begun, End(outcome="success", details={"answer": answer_hash}))

    def release(
        self, name: str, principal: Principal, *, answer_hash: str, kept_hash: str = ""
    ) -> int:
        """Record that an answer is given out, before it is; return the index of its entry.

        `answer_hash` is the SHA-256, in hex, of its JSON, `kept_hash` that with which a run of this
        study ended well. They differ if, and only if, the study has cost more since: the answer
        says it then (`release.document.with_charges`). Raises `ApprovalError`.
        """
        record = self._store.find(name)
        kept_hash = kept_hash or answer_hash
        facts = self._facts(record, principal)
        begun = self._desk.authorised(
            "release",
            record.study,
            principal,
            facts,
            role="researcher",
            answer=answer_hash,
            kept="" if kept_hash == answer_hash else kept_hash,
        )
        with self._desk.failing(begun):
            if not record.of("run"):
                raise ApprovalError(f"The study {record.study.id} has not run: nothing to release.")
            if kept_hash not in {one.answer for one in record.of("answer")}:
                raise ApprovalError(
                    f"No run of {record.study.id} gave this answer: it was changed since, or is "
                    "another study's. Nothing is given out."
                )
            step = self._desk.step("release", record.study, principal, begun, role="researcher")
            self._store.append(record.study.study_hash, step, self._verify_runnable)
        return self._recorder.outcome(begun, End(outcome="success"))

    def _facts(
        self,
        record: Record,
        principal: Principal,
        *,
        capacity: Capacity = "none",
        site: str = "",
    ) -> StudyStanding:
        tag = person_tag(record.study.study_hash, principal.id)
        return StudyStanding(
            capacity=capacity,
            own_site=principal.id in self._officers.get(site, frozenset()),
            proposed_by_self=any(step.person == tag for step in record.of("propose")),
            spoken_by_self=any(step.person == tag for step in record.of("approve", "refuse")),
            approved=self._standing(record).stage == "published",
        )

    def _verify_valid(self, study: Study) -> None:
        if self._clock() > study.valid_until:
            raise ApprovalError(f"The study {study.id} is past its time: propose a new one.")

    def _verify_speaks(self, step: Step) -> Callable[[Record], None]:
        def verify(record: Record) -> None:
            self._verify_valid(record.study)
            verify_asked(record.study, step.role, step.site)
            verify_first_word(record, step)

        return verify

    def _verify_runnable(self, record: Record) -> None:
        _verify_published(record)
        if not record.study.valid_from <= self._clock() <= record.study.valid_until:
            raise ApprovalError(f"The study {record.study.id} is not valid at this time.")
        verify_study(signed_of(record), self._trusted)


def _verify_published(record: Record) -> None:
    if not record.of("publish"):
        raise ApprovalError(f"The study {record.study.id} waits for approvals.")
    verify_stands(record)


def _verify_unpublished(record: Record) -> None:
    verify_stands(record)
    if record.of("publish"):
        # Two signatures of the coordinator would be one too many for whoever checks a release.
        raise ApprovalError(f"The study {record.study.id} is published already.")


def _verify_ran(record: Record) -> None:
    if not record.of("run"):
        raise ApprovalError(f"The study {record.study.id} has not run.")


def _role(capacity: Capacity) -> Role:
    if capacity == "none":
        raise ApprovalError("Say whether you approve as the ethics board or for a site.")
    return capacity
