"""Verification of a whole log: every byte of its directory against its checkpoint.

Lives here: what is asked, what is reported, checkpoints and cosignatures. The walk over the files
stands in `audit.examine`. Not here: one entry's proof (`audit.proof`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from audit.checkpoint import Checkpoint, SignedCheckpoint, parse_checkpoint, verify_checkpoint
from audit.errors import AuditConfigurationError, MalformedNoteError, VerificationError
from audit.examine import Examination, Expected, Problem, Problems
from audit.files import read_bounded
from audit.note import MAX_NOTE_BYTES, Note, VerifierKey
from audit.pairing import Story
from audit.recovery import CHECKPOINT, HALTED

#: A checkpoint is published before its cosignatures arrive: so long they are waited for.
COSIGN_WAIT_S = 3.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What verification found. The log is as it was published if there are no problems."""

    origin: str
    #: Entries that the checkpoint covers.
    size: int
    #: Entries in the directory, published or only sequenced.
    sequenced: int
    #: Entries that were read and hashed: all but those that were pruned.
    checked: int
    cosigned_by: Sequence[str]
    #: Entries up to which an older checkpoint was found to be continued.
    consistent_with: int | None
    problems: Sequence[Problem]
    problem_count: int
    story: Story


class LogVerificationError(VerificationError):
    """The log is not as its checkpoint says. `report` lists everything that was found."""

    def __init__(self, report: Report) -> None:
        first = report.problems[0]
        more = f" ({report.problem_count - 1} more problems)" if report.problem_count > 1 else ""
        super().__init__(f"{first.where}: {first.what}{more}")
        self.report = report


def verify_log(
    directory: Path,
    verifier_keys: Sequence[VerifierKey],
    *,
    witness_keys: Sequence[VerifierKey] = (),
    older_checkpoint: bytes | None = None,
    retained_from: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Prove that a log's directory is what its checkpoint says; return what else was found.

    `verifier_keys` are all versions of the log's key. `older_checkpoint` is one that the caller
    kept: the log has to continue it. Every witness of `witness_keys` has to have cosigned. Entries
    before `retained_from` may be pruned; their tiles may not. `progress(done, total)` is called now
    and then, in entries. Raises `LogVerificationError`, which carries the report, or
    `AuditConfigurationError` if there is no log.
    """
    report = examine_log(
        directory,
        verifier_keys,
        witness_keys=witness_keys,
        older_checkpoint=older_checkpoint,
        retained_from=retained_from,
        progress=progress,
    )
    if report.problem_count:
        raise LogVerificationError(report)
    return report


def examine_log(
    directory: Path,
    verifier_keys: Sequence[VerifierKey],
    *,
    witness_keys: Sequence[VerifierKey] = (),
    older_checkpoint: bytes | None = None,
    retained_from: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """As `verify_log`, but a report with problems is returned, not raised.

    Only an `older_checkpoint` that does not verify raises `VerificationError`: it is the caller's
    own.
    """
    if not directory.is_dir():
        raise AuditConfigurationError(f"{directory} holds no log. Set [audit] directory.")
    problems = Problems()
    expected = Expected()
    signed = _checkpoint(directory, verifier_keys, witness_keys, problems)
    if signed is not None:
        expected.add(signed.checkpoint, CHECKPOINT, "the entries have another root than it says")
    older = None
    if older_checkpoint is not None:
        older = verify_checkpoint(older_checkpoint, verifier_keys).checkpoint
        expected.add(older, "older checkpoint", "the log does not continue it: history was changed")
        _compare(signed, older, problems)
    examination = Examination(
        directory, expected, problems, retained_from=retained_from, progress=progress
    )
    examination.run(0 if signed is None else signed.checkpoint.size)
    cosigned_by = () if signed is None else _cosigners(signed.note, witness_keys, problems)
    for name in sorted({key.name for key in witness_keys}.difference(cosigned_by)):
        problems.add(
            CHECKPOINT,
            f"{name} did not cosign it: that witness is out of reach, or saw another history",
        )
    return Report(
        origin="" if signed is None else signed.checkpoint.origin,
        size=0 if signed is None else signed.checkpoint.size,
        sequenced=examination.size,
        checked=examination.checked,
        cosigned_by=cosigned_by,
        consistent_with=None if older is None or problems.count else older.size,
        problems=problems.listed,
        problem_count=problems.count,
        story=examination.pairing.story(),
    )


def _checkpoint(
    directory: Path,
    keys: Sequence[VerifierKey],
    witness_keys: Sequence[VerifierKey],
    problems: Problems,
) -> SignedCheckpoint | None:
    """The checkpoint; None if there is none to read. Whatever is wrong with it is noted."""
    if (directory / HALTED).exists():
        problems.add(HALTED, "the writer stopped because the files were changed under it")
    try:
        data = _await_cosigned(directory / CHECKPOINT, witness_keys)
    except (OSError, ValueError) as error:
        problems.add(CHECKPOINT, f"it cannot be read: {error}")
        return None
    try:
        return verify_checkpoint(data, keys)
    except (VerificationError, MalformedNoteError) as error:
        problems.add(CHECKPOINT, str(error))
    try:
        # Not proven; but what else is wrong can be said against it.
        return parse_checkpoint(data)
    except MalformedNoteError:
        return None


def _await_cosigned(path: Path, witness_keys: Sequence[VerifierKey]) -> bytes:
    """The checkpoint, at best one on which all witnesses have a line: theirs come a little later.

    Whether the lines fit is not looked at here. Raises `OSError` or `ValueError`.
    """
    deadline = time.monotonic() + COSIGN_WAIT_S
    wanted = {key.name.encode() for key in witness_keys}
    while True:
        data = read_bounded(path, MAX_NOTE_BYTES)
        if all(name in data for name in wanted) or time.monotonic() > deadline:
            return data
        time.sleep(_POLL_S)


def _compare(signed: SignedCheckpoint | None, older: Checkpoint, problems: Problems) -> None:
    if signed is None:
        return
    if signed.checkpoint.origin != older.origin:
        problems.add(CHECKPOINT, f"it is not of {older.origin}")
    if signed.checkpoint.size < older.size:
        problems.add(
            CHECKPOINT,
            f"it covers {signed.checkpoint.size} entries, an older one {older.size}: "
            "the log was rolled back",
        )


def _cosigners(
    note: Note, witness_keys: Sequence[VerifierKey], problems: Problems
) -> tuple[str, ...]:
    known = {(key.name, key.key_id): key for key in witness_keys}
    names: list[str] = []
    for signature in note.signatures:
        key = known.get((signature.name, signature.key_id))
        if key is None:
            continue
        try:
            key.verify(note.text, signature.signature)
        except VerificationError as error:
            problems.add(CHECKPOINT, str(error))
        else:
            names.append(key.name)
    return tuple(names)
