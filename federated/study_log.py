"""Proof that a study was published: the log entry that names its hash, and that the log has it.

Lives here: what the coordinator makes for a device, and what the device does with it before it
looks at anything else. The log is the audit log with its witnesses (`audit`); a study is published
when every approval is in, as an entry of the action `study.publish`.

A device remembers the newest checkpoint that it has seen. Each proof must lead from there to a
checkpoint that the log signed and a witness cosigned: a log that was rolled back, split or
rewritten is found at the next contact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from audit.checkpoint import (
    Checkpoint,
    SignedCheckpoint,
    parse_checkpoint,
    parse_checkpoint_text,
)
from audit.entry import parse_entry
from audit.errors import AuditError
from audit.files import read_bounded
from audit.merkle import EMPTY_ROOT, HASH_BYTES, verify_consistency
from audit.model import Entry
from audit.note import COSIGNATURE, MAX_NOTE_BYTES, VerifierKey, verify_note
from audit.proof import (
    MAX_PROOF_BYTES,
    MAX_PROOF_HASHES,
    DirectoryTiles,
    consistency_proof,
    parse_proof,
    prove,
    verify_proof,
)
from audit.reader import LogReader
from audit.recovery import CHECKPOINT
from federated.errors import StudyLogError

#: Details of the entry: `study` is the study's hash, `name` its id.
HASH_DETAIL: Final = "study"
ID_DETAIL: Final = "name"
#: A larger bundle is refused unread.
MAX_BUNDLE_BYTES: Final = 2 * MAX_PROOF_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyBundle:
    """What a device gets. Parsed, not verified.

    `proof` is a C2SP tlog-proof file that carries the entry and the cosigned checkpoint;
    `consistency` leads to that checkpoint from the one of `from_size` entries.
    """

    proof: bytes
    from_size: int
    consistency: tuple[bytes, ...]

    def encode(self) -> bytes:
        """The form in which it travels; `parse_bundle` reads it."""
        return msgspec.json.encode(
            _Wire(proof=self.proof, from_size=self.from_size, consistency=list(self.consistency))
        )


class _Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    proof: bytes
    from_size: int
    consistency: list[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """The newest checkpoint that a device has proven. Kept in the device's store as `encode`."""

    checkpoint: Checkpoint

    @classmethod
    def nothing(cls, origin: str) -> Remembered:
        """Before the first contact: the empty tree, which every log continues."""
        return cls(checkpoint=Checkpoint(origin=origin, size=0, root=EMPTY_ROOT))

    @classmethod
    def parse(cls, text: str) -> Remembered:
        """Read what `encode` made. Raises `StudyLogError`."""
        try:
            return cls(checkpoint=parse_checkpoint_text(text))
        except AuditError as error:
            raise StudyLogError(f"The remembered checkpoint is damaged: {error}") from error

    @property
    def size(self) -> int:
        """How many entries the log had: what the coordinator must lead on from."""
        return self.checkpoint.size

    def encode(self) -> str:
        """Three lines: origin, size, root."""
        return self.checkpoint.text


def parse_bundle(data: bytes) -> StudyBundle:
    """Read a bundle. Raises `StudyLogError`; proves nothing yet."""
    if len(data) > MAX_BUNDLE_BYTES:
        raise StudyLogError(f"The proof has more than {MAX_BUNDLE_BYTES} bytes.")
    try:
        wire = msgspec.json.decode(data, type=_Wire)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise StudyLogError("The proof that the study was published is malformed.") from error
    if wire.from_size < 0 or len(wire.consistency) > MAX_PROOF_HASHES:
        raise StudyLogError("The proof that the log goes on is longer than any can be.")
    if any(len(one) != HASH_BYTES for one in wire.consistency):
        raise StudyLogError("The proof that the log goes on holds something that is no hash.")
    return StudyBundle(
        proof=wire.proof, from_size=wire.from_size, consistency=tuple(wire.consistency)
    )


def verify_bundle(
    bundle: StudyBundle,
    *,
    study_hash: str,
    remembered: Remembered,
    log_keys: Sequence[VerifierKey],
    witness_keys: Sequence[VerifierKey],
    witnesses: int = 1,
) -> Remembered:
    """Prove that the study of this hash was published in the log that the device knows.

    `log_keys` are the verifier keys of all versions of the log's key, `witness_keys` those of
    witnesses that the device trusts, of which at least `witnesses` (by name) must have cosigned.
    Returns what to remember from now on, to be stored before anything else is done. Raises
    `StudyLogError`: do not run the study, and keep the bundle as evidence.
    """
    new = verify_published(
        bundle,
        study_hash=study_hash,
        log_keys=log_keys,
        witness_keys=witness_keys,
        witnesses=witnesses,
    )
    try:
        _verify_continues(bundle, remembered, new)
    except AuditError as error:
        raise StudyLogError(f"The study's publication is not proven: {error}") from error
    return Remembered(checkpoint=new)


def verify_published(
    bundle: StudyBundle,
    *,
    study_hash: str,
    log_keys: Sequence[VerifierKey],
    witness_keys: Sequence[VerifierKey],
    witnesses: int = 1,
) -> Checkpoint:
    """The part of `verify_bundle` that needs no memory: a coordinator checks it before it asks.

    Raises `StudyLogError`.
    """
    try:
        checkpoint, entry = verify_logged(
            bundle.proof, log_keys=log_keys, witness_keys=witness_keys, witnesses=witnesses
        )
    except AuditError as error:
        raise StudyLogError(f"The study's publication is not proven: {error}") from error
    _verify_entry(entry, study_hash)
    return checkpoint


def verify_logged(
    proof: bytes,
    *,
    log_keys: Sequence[VerifierKey],
    witness_keys: Sequence[VerifierKey],
    witnesses: int,
) -> tuple[Checkpoint, Entry]:
    """The entry that a C2SP tlog-proof carries, and the cosigned checkpoint that covers it.

    Raises `StudyLogError` or an `AuditError`.
    """
    signed, entry = _verify_inclusion(proof, log_keys)
    _verify_cosigned(signed, witness_keys, witnesses)
    return signed.checkpoint, entry


def _verify_inclusion(
    raw: bytes, log_keys: Sequence[VerifierKey]
) -> tuple[SignedCheckpoint, Entry]:
    proof = parse_proof(raw)
    if proof.extra is None:
        raise StudyLogError("The proof does not carry the entry that it is for.")
    signed = verify_proof(proof, proof.extra, log_keys)
    return signed, parse_entry(proof.extra)


def _verify_cosigned(
    signed: SignedCheckpoint, witness_keys: Sequence[VerifierKey], witnesses: int
) -> None:
    cosigners = [key for key in witness_keys if key.algorithm == COSIGNATURE]
    if witnesses < 1 or not cosigners:
        raise StudyLogError("No witness is trusted here: enrol the device with a witness's key.")
    names = {signature.name for signature in verify_note(signed.note, cosigners)}
    if len(names) < witnesses:
        raise StudyLogError(
            f"{len(names)} trusted witness(es) cosigned the checkpoint, {witnesses} are needed."
        )


def _verify_continues(bundle: StudyBundle, remembered: Remembered, new: Checkpoint) -> None:
    old = remembered.checkpoint
    if new.origin != old.origin:
        raise StudyLogError(
            f"The proof is from the log {new.origin}, this device follows {old.origin}."
        )
    if bundle.from_size != old.size and new.size >= old.size:
        raise StudyLogError(
            f"The proof leads on from {bundle.from_size} entries, this device remembers "
            f"{old.size}: ask for a proof from there."
        )
    verify_consistency(
        old_size=old.size,
        old_root=old.root,
        new_size=new.size,
        new_root=new.root,
        proof=bundle.consistency,
    )


def _names_study(entry: Entry, study_hash: str) -> bool:
    return (
        entry.action == "study.publish"
        and entry.stage == "outcome"
        and entry.outcome == "success"
        and entry.details.get(HASH_DETAIL) == study_hash
    )


def _verify_entry(entry: Entry, study_hash: str) -> None:
    if not _names_study(entry, study_hash):
        raise StudyLogError(
            "The entry in the proof does not say that this study was published: it is of another "
            "study, or of another step."
        )


def find_published(directory: Path, study_hash: str, *, start: int = 0) -> int:
    """Index of the entry that publishes the study in a log's directory.

    Raises `StudyLogError` if there is none; `start` is where to begin to look.
    """
    try:
        for index, raw in LogReader(directory).read(start):
            if study_hash.encode() in raw and _names_study(parse_entry(raw), study_hash):
                return index
    except AuditError as error:
        raise StudyLogError(f"The study log cannot be read: {error}") from error
    raise StudyLogError("The study was not published: it waits for an approval, or for the log.")


def make_bundle(directory: Path, index: int, *, from_size: int = 0) -> StudyBundle:
    """Make the proof for the entry at `index`, for a device that remembers `from_size` entries.

    Reads the log's directory as it is published now. Raises `StudyLogError` while no checkpoint
    covers the entry (ask again after the next one), or if the device remembers more than there is,
    which means that this log was rolled back.
    """
    try:
        note = read_bounded(directory / CHECKPOINT, MAX_NOTE_BYTES)
        size = parse_checkpoint(note).checkpoint.size
        if from_size > size:
            raise StudyLogError(
                f"The device has seen {from_size} entries, the log has {size}: it was rolled back."
            )
        if index >= size:
            raise StudyLogError("No checkpoint covers the study's entry yet: try again shortly.")
        entry = LogReader(directory).entry(index)
        proof = prove(directory, index, checkpoint=note, size=size, entry=entry)
        tiles = DirectoryTiles(directory)
        hashes = consistency_proof(tiles, old_size=from_size, new_size=size)
    except (AuditError, OSError, ValueError, IndexError) as error:
        raise StudyLogError(f"The study log cannot be read: {error}") from error
    return StudyBundle(proof=proof.encode(), from_size=from_size, consistency=tuple(hashes))
