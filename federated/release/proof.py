"""Proof that this very answer was released: the log's entry that names its hash.

A C2SP tlog-proof (`audit.proof`) of the entry `study.release`, with the cosigned checkpoint that
covers it. It stands beside `answer.json` as `answer.proof`, since nothing can hold its own hash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.errors import AuditError
from audit.note import VerifierKey
from federated.errors import StudyLogError
from federated.manifest import Study
from federated.release.check import verify_document
from federated.release.document import document_hash
from federated.study_log import HASH_DETAIL, make_bundle, verify_logged

if TYPE_CHECKING:
    # The device's store stands behind it.
    from federated.node.enrolment import Enrolment


def make_release_proof(directory: Path, index: int) -> bytes:
    """The proof of the entry at `index`, from a log's directory. Raises `StudyLogError`."""
    return make_bundle(directory, index).proof


def verify_release(
    proof: bytes,
    *,
    study_hash: str,
    answer_hash: str,
    origin: str,
    log_keys: Sequence[VerifierKey],
    witness_keys: Sequence[VerifierKey],
    witnesses: int = 1,
) -> None:
    """Prove that the answer of this hash was released, of this study, in the log that is known.

    Raises `StudyLogError`: the answer was changed after its release, or was never released.
    """
    try:
        checkpoint, entry = verify_logged(
            proof, log_keys=log_keys, witness_keys=witness_keys, witnesses=witnesses
        )
    except AuditError as error:
        raise StudyLogError(f"The release is not proven: {error}") from error
    if checkpoint.origin != origin:
        raise StudyLogError(f"The proof is from the log {checkpoint.origin}, not from {origin}.")
    said = (entry.action, entry.stage, entry.outcome)
    if said != ("study.release", "outcome", "success") or (
        entry.details.get(HASH_DETAIL) != study_hash
    ):
        raise StudyLogError("The entry in the proof does not say that this study was released.")
    if entry.details.get("answer") != answer_hash:
        raise StudyLogError(
            "The log says that another answer was released: this one was changed since."
        )


def verify_believed(
    document: Mapping[str, Any], believed: Enrolment, *, proof: bytes | None
) -> Study:
    """Return the study once the document is proven by an enrolment's keys, and its release, too.

    Without `proof` that it was released is not looked at. Raises as `verify_document` and
    `verify_release`.
    """
    study = verify_document(
        document,
        replace(believed.trusted(), own_site=""),
        origin=believed.origin,
        log_keys=believed.log_verifiers(),
        witness_keys=believed.witness_verifiers(),
        witnesses=believed.witnesses,
    )
    if proof is not None:
        verify_release(
            proof,
            study_hash=study.study_hash,
            answer_hash=document_hash(document),
            origin=believed.origin,
            log_keys=believed.log_verifiers(),
            witness_keys=believed.witness_verifiers(),
            witnesses=believed.witnesses,
        )
    return study
