"""Proofs from the tiles of a real log, and proof files."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audit.checkpoint import Checkpoint, parse_checkpoint
from audit.errors import AuditError, MalformedNoteError, VerificationError
from audit.merkle import leaf_hash, verify_consistency
from audit.proof import (
    DirectoryTiles,
    Proof,
    consistency_proof,
    parse_proof,
    prove,
    verify_proof,
)
from audit.reader import LogReader
from tests.audit.conftest import Log, entry


def proof_of(log: Log, index: int) -> Proof:
    reader = LogReader(log.directory)
    return prove(
        log.directory,
        index,
        checkpoint=log.checkpoint,
        size=reader.published_size(),
        entry=reader.entry(index),
    )


def test_every_entry_of_a_log_is_proven_by_its_proof_file(log: Log) -> None:
    log.fill(700)
    for index in range(700):
        proof = parse_proof(proof_of(log, index).encode())
        assert proof.extra == entry(index)
        verify_proof(proof, entry(index), log.keys)


def test_a_proof_does_not_prove_another_entry_or_place(log: Log) -> None:
    log.fill(300)
    proof = proof_of(log, 17)
    with pytest.raises(VerificationError):
        verify_proof(proof, entry(18), log.keys)
    moved = Proof(index=18, hashes=proof.hashes, checkpoint=proof.checkpoint)
    with pytest.raises(VerificationError):
        verify_proof(moved, entry(17), log.keys)


def test_each_checkpoint_is_proven_to_continue_the_ones_before(log: Log) -> None:
    checkpoints: list[Checkpoint] = []
    for count in (1, 200, 55, 1, 300, 4):
        log.fill(count, first=sum(c.size for c in checkpoints[-1:]))
        checkpoints.append(parse_checkpoint(log.checkpoint).checkpoint)
    newest = checkpoints[-1]
    for old in checkpoints:
        proof = consistency_proof(
            DirectoryTiles(log.directory), old_size=old.size, new_size=newest.size
        )
        verify_consistency(
            old_size=old.size,
            old_root=old.root,
            new_size=newest.size,
            new_root=newest.root,
            proof=proof,
        )


def test_a_missing_or_cut_tile_is_named(log: Log) -> None:
    log.fill(300)
    path = log.directory / "tile/0/000"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VerificationError, match="tile/0/000"):
        proof_of(log, 3)
    path.unlink()
    with pytest.raises(VerificationError, match="tile/0/000"):
        proof_of(log, 3)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_no_changed_byte_of_a_proof_file_passes(log: Log, data: st.DataObject) -> None:
    if not log.directory.exists():
        log.fill(300)
    proof = proof_of(log, 7)
    encoded = bytearray(Proof(index=7, hashes=proof.hashes, checkpoint=proof.checkpoint).encode())
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(AuditError):
        verify_proof(parse_proof(bytes(encoded)), entry(7), log.keys)


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for candidate in (data, b"c2sp.org/tlog-proof@v1\n" + data):
        try:
            parse_proof(candidate)
        except MalformedNoteError:
            continue


def test_refuses_too_many_hashes_and_too_many_bytes() -> None:
    long = Proof(index=0, hashes=(leaf_hash(b""),) * 64, checkpoint=b"")
    with pytest.raises(MalformedNoteError, match="hashes"):
        parse_proof(long.encode())
    huge = Proof(index=0, hashes=(), checkpoint=b"x" * 300_000)
    with pytest.raises(MalformedNoteError, match="larger"):
        parse_proof(huge.encode())
