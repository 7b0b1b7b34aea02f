"""Checkpoints: what they say and who signed them."""

from __future__ import annotations

import pytest

from audit.checkpoint import (
    Checkpoint,
    parse_checkpoint_text,
    sign_checkpoint,
    signed_checkpoint,
    verifier_keys,
    verify_checkpoint,
)
from audit.errors import MalformedNoteError, VerificationError
from audit.merkle import EMPTY_ROOT, leaf_hash
from audit.note import VerifierKey
from tests.audit.conftest import ORIGIN, MemorySigner

CHECKPOINT = Checkpoint(origin=ORIGIN, size=7, root=leaf_hash(b"x"))


def test_a_checkpoint_reads_as_it_was_written() -> None:
    assert parse_checkpoint_text(CHECKPOINT.text) == CHECKPOINT
    empty = Checkpoint(origin=ORIGIN, size=0, root=EMPTY_ROOT)
    assert parse_checkpoint_text(empty.text) == empty


@pytest.mark.parametrize(
    "size", ["07", "-1", "+7", "7 ", "", "0x7", "\u0667", str(2**63), "9" * 5000]
)
def test_refuses_a_size_that_is_no_plain_number(size: str) -> None:
    with pytest.raises(MalformedNoteError):
        parse_checkpoint_text(CHECKPOINT.text.replace("\n7\n", f"\n{size}\n"))


def test_refuses_other_lines_and_other_roots() -> None:
    for text in (
        CHECKPOINT.text + "extension\n",
        CHECKPOINT.text[:-1],
        CHECKPOINT.text.replace("=\n", "\n"),
        CHECKPOINT.text.replace("\n7\n", "\n0\n"),
        CHECKPOINT.text.replace(ORIGIN, ""),
        CHECKPOINT.text.replace(ORIGIN, "with space"),
    ):
        with pytest.raises(MalformedNoteError):
            parse_checkpoint_text(text)


def test_every_version_of_the_key_is_known_after_a_rotation() -> None:
    signer = MemorySigner()
    before = sign_checkpoint(CHECKPOINT, signer).note.encode()
    signer.rotate()
    after = sign_checkpoint(CHECKPOINT, signer).note.encode()
    keys = verifier_keys(ORIGIN, signer)
    for data in (before, after):
        assert verify_checkpoint(data, keys).checkpoint == CHECKPOINT
    with pytest.raises(VerificationError):
        verify_checkpoint(after, keys[:1])


def test_never_accepts_a_signature_that_does_not_fit() -> None:
    signer = MemorySigner()
    signer.wrong = True
    with pytest.raises(VerificationError):
        sign_checkpoint(CHECKPOINT, signer)
    with pytest.raises(VerificationError, match="version 9"):
        signed_checkpoint(CHECKPOINT, version=9, signature=b"", public_keys=signer.public_keys())


def test_a_witness_alone_or_another_log_cannot_speak_for_a_log() -> None:
    signer = MemorySigner()
    data = sign_checkpoint(CHECKPOINT, signer).note.encode()
    key = signer.public_keys()[1]
    with pytest.raises(VerificationError):
        verify_checkpoint(data, [VerifierKey.ed25519("other.example/log", key)])
    with pytest.raises(VerificationError):
        verify_checkpoint(data, [VerifierKey.cosigner(ORIGIN, key)])
    # A known key of another name signed it, the origin's own did not.
    other = MemorySigner()
    forged = Checkpoint(origin="other.example/log", size=7, root=CHECKPOINT.root)
    note = sign_checkpoint(forged, other).note
    _, signature = other.sign(CHECKPOINT.text.encode())
    line = note.signatures[0]
    moved = type(note)(
        text=CHECKPOINT.text,
        signatures=(type(line)(name=line.name, key_id=line.key_id, signature=signature),),
    )
    with pytest.raises(VerificationError, match="own key"):
        verify_checkpoint(moved.encode(), verifier_keys("other.example/log", other))
