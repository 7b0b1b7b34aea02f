"""Programs that we did not write read our bytes: PyPI `aics-tlog`."""

from __future__ import annotations

from pathlib import Path

import aics_tlog
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.checkpoint import parse_checkpoint, verify_checkpoint
from audit.log import LogWriter
from audit.merkle import leaf_hash
from audit.note import VerifierKey
from audit.proof import DirectoryTiles, consistency_proof, inclusion_proof
from audit.publish import Publisher
from tests.audit.conftest import ORIGIN, Log, entry
from tests.audit.local_witness import DirectWitness, local_witness

SIZES = [1, 2, 255, 256, 257, 700]


@pytest.mark.parametrize("size", SIZES)
def test_the_independent_reader_accepts_checkpoint_tiles_and_entries(log: Log, size: int) -> None:
    log.fill(size)
    key = aics_tlog.parse_vkey(log.keys[0].text)
    result = aics_tlog.verify_checkpoint(
        aics_tlog.parse_note(log.checkpoint), key, expected_origin=ORIGIN
    )
    assert (result.ok, result.log_ok, result.size) == (True, True, size)
    root = parse_checkpoint(log.checkpoint).checkpoint.root
    assert result.root == root
    files = aics_tlog.FileSystemTileReader(log.directory)
    assert aics_tlog.tree_root_from_tiles(files, size) == root
    assert aics_tlog.audit_tiles(files, size, root).size == size
    reader = aics_tlog.VerifiedTileReader(files, size, root)
    assert [reader.entry(index) for index in range(size)] == [entry(n) for n in range(size)]


def test_both_make_the_same_proofs_and_accept_each_others(log: Log) -> None:
    log.fill(600)
    files, tiles = aics_tlog.FileSystemTileReader(log.directory), DirectoryTiles(log.directory)
    root = parse_checkpoint(log.checkpoint).checkpoint.root
    for index in range(0, 600, 7):
        proof = inclusion_proof(tiles, index=index, size=600)
        assert proof == aics_tlog.inclusion_proof_from_tiles(files, index, 600)
        assert aics_tlog.verify_inclusion(leaf_hash(entry(index)), index, 600, proof, root)
    for old in range(1, 600, 7):
        changed = consistency_proof(tiles, old_size=old, new_size=600)
        assert changed == aics_tlog.consistency_proof_from_tiles(files, old, 600)
        old_root = aics_tlog.tree_root_from_tiles(files, old, 600)
        assert aics_tlog.verify_consistency(old, 600, old_root, root, changed)


def test_the_independent_reader_counts_our_witness_cosignature(log: Log, tmp_path: Path) -> None:
    witness = local_witness(tmp_path / "witness", log.keys)
    with (
        LogWriter.open(log.directory, origin=ORIGIN) as writer,
        Publisher(writer, log.signer, witnesses=[DirectWitness(witness)]) as publisher,
    ):
        writer.append(entry(0))
        publisher.publish()
    result = aics_tlog.verify_checkpoint(
        aics_tlog.parse_note(log.checkpoint),
        aics_tlog.parse_vkey(log.keys[0].text),
        [aics_tlog.parse_vkey(key.text) for key in witness.verifier_keys()],
        quorum=1,
    )
    assert (result.ok, result.cosignature_count, result.size) == (True, 1, 1)


def test_we_accept_a_checkpoint_and_cosignature_that_the_other_program_made() -> None:
    private, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    made = aics_tlog.Checkpoint(origin=ORIGIN, size=3, root=leaf_hash(b"x"))
    note = aics_tlog.sign_checkpoint(made, private, ORIGIN)
    key = VerifierKey.parse(
        aics_tlog.format_vkey(
            aics_tlog.vkey_from_ed25519(ORIGIN, private.public_key().public_bytes_raw())
        )
    )
    checkpoint = verify_checkpoint(note.to_bytes(), [key]).checkpoint
    assert (checkpoint.size, checkpoint.root) == (3, leaf_hash(b"x"))
    blob, _ = aics_tlog.sign_cosignature(other, "w.example", 1_700_000_000, ORIGIN, 3, made.root)
    witness = VerifierKey.parse(
        aics_tlog.format_vkey(aics_tlog.cosignature_vkey("w.example", other.public_key()))
    )
    witness.verify(checkpoint.text, blob)
