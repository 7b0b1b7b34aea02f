"""Where a study stands, as its steps say it: who has signed, and whose word is missing.

Pure but for `Standings`, which reads a store. Who may take a step is decided in
`federated.approvals`; rows stand in `federated.study_store`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from federated.errors import ApprovalError
from federated.manifest import Study
from federated.signed_study import Role, SignedStudy, StudySignature, TrustedKeys
from federated.study_store import Record, Step, StudyStore

type Stage = Literal["proposed", "approved", "published", "refused", "withdrawn", "expired"]


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


def standing_of(record: Record, trusted: TrustedKeys, *, now: float) -> Standing:
    """Where it stands at `now` (Unix seconds), by the keys that were enrolled."""
    missing = missing_words(record, trusted)
    stage: Stage = "proposed" if missing else "approved"
    if record.of("publish"):
        stage = "published"
    if now > record.study.valid_until:
        stage = "expired"
    if record.of("withdraw"):
        stage = "withdrawn"
    if record.of("refuse"):
        stage = "refused"
    return Standing(record=record, stage=stage, missing=missing)


class Standings:
    """Where all studies of a store stand. Looks only; `clock` is Unix time in seconds."""

    def __init__(
        self, store: StudyStore, trusted: TrustedKeys, *, clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._trusted = trusted
        self._clock = clock

    def standing(self, name: str) -> Standing:
        """That of the study of this id or hash. Raises `ApprovalError` if there is none."""
        return self._of(self._store.find(name))

    def all(self) -> list[Standing]:
        """Every study's, the oldest first."""
        return [self._of(record) for record in self._store.all()]

    def _of(self, record: Record) -> Standing:
        return standing_of(record, self._trusted, now=self._clock())


def verify_stands(record: Record) -> None:
    """Nobody stopped it. Raises `ApprovalError`."""
    if record.of("refuse"):
        raise ApprovalError(f"The study {record.study.id} was refused.")
    if record.of("withdraw"):
        raise ApprovalError(
            f"The study {record.study.id} was withdrawn: it neither runs nor is released any more."
        )


def verify_asked(study: Study, role: str, site: str) -> None:
    """Whoever speaks is asked at all. Raises `ApprovalError`."""
    if role == "site" and site not in study.sites:
        raise ApprovalError(
            f"The study {study.id} does not ask the site {site or 'without a name'}."
        )
    if role != "site" and site:
        raise ApprovalError(f"Only a site's officer speaks for the site {site}.")


def verify_first_word(record: Record, step: Step) -> None:
    """Whoever speaks in `step` is not heard twice, nor about his own. Raises `ApprovalError`."""
    if record.of("publish", "refuse"):
        raise ApprovalError(f"The study {record.study.id} is decided already.")
    spoken = record.of("approve", "refuse")
    keys = {one.public_key for one in spoken} - {""}
    if any(one.person == step.person for one in record.of("propose")):
        raise ApprovalError("Nobody approves what he proposed: somebody else must.")
    if step.public_key in keys or any(step.person == one.person for one in spoken):
        raise ApprovalError("Nobody speaks twice about one study: somebody else must.")


def verify_enrolled(study: Study, signature: StudySignature, trusted: TrustedKeys) -> None:
    """The key was enrolled for the role it signs in. Raises `ApprovalError`."""
    verify_asked(study, signature.role, signature.site)
    if signature.public_key not in keys_for(trusted, signature.role, signature.site):
        who = f"site {signature.site}" if signature.site else signature.role
        raise ApprovalError(
            f"This key was not enrolled for {who}: have its public key added with "
            "`havengate federated trust`, or sign with the one that was."
        )


def keys_for(trusted: TrustedKeys, role: Role, site: str) -> frozenset[bytes]:
    """The keys that were enrolled for a role."""
    match role:
        case "coordinator":
            return trusted.coordinator
        case "ethics-board":
            return trusted.ethics_board
        case "site":
            return trusted.sites.get(site, frozenset())


def signatures_of(record: Record) -> tuple[StudySignature, ...]:
    """The signatures that were given, in order. Not verified."""
    return tuple(
        StudySignature(
            role=step.role,  # type: ignore[arg-type]
            site=step.site,
            public_key=bytes.fromhex(step.public_key),
            signature=bytes.fromhex(step.signature),
        )
        for step in record.of("approve", "publish")
    )


def signed_of(record: Record) -> SignedStudy:
    """The study with the signatures that it has. Not verified."""
    return SignedStudy(study=record.study, signatures=signatures_of(record))


def missing_words(record: Record, trusted: TrustedKeys) -> tuple[str, ...]:
    """Whose approval it waits for, in words."""
    given = signatures_of(record)
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
