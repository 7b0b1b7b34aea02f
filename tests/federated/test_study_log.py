"""What a device accepts as proof that its study was published, and what it never does."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from audit.proof import parse_proof
from federated.errors import StudyLogError
from federated.manifest import Study
from federated.study_log import (
    Remembered,
    StudyBundle,
    find_published,
    make_bundle,
    parse_bundle,
    verify_bundle,
)
from tests.federated.studies import ORIGIN, StudyLog, study


@pytest.fixture
def log(tmp_path: Path) -> StudyLog:
    return StudyLog(tmp_path)


def accept(
    log: StudyLog, bundle: StudyBundle, of: Study, remembered: Remembered | None = None
) -> Remembered:
    return verify_bundle(
        bundle,
        study_hash=of.study_hash,
        remembered=remembered or Remembered.nothing(ORIGIN),
        log_keys=log.keys,
        witness_keys=log.witness_keys,
    )


def test_a_published_study_is_proven_and_the_checkpoint_remembered(log: StudyLog) -> None:
    index = log.append_published(study(), others=300)
    bundle = parse_bundle(make_bundle(log.directory, index).encode())
    remembered = accept(log, bundle, study())
    assert remembered.size == 602 - 300
    assert Remembered.parse(remembered.encode()) == remembered
    assert find_published(log.directory, study().study_hash) == index


def test_the_log_goes_on_from_what_is_remembered(log: StudyLog) -> None:
    first = study()
    remembered = accept(log, make_bundle(log.directory, log.append_published(first)), first)
    second = study({"sleep-and-mood": "sleep-and-mood-2"})
    index = log.append_published(second, others=7)
    bundle = make_bundle(log.directory, index, from_size=remembered.size)
    assert accept(log, bundle, second, remembered).size == 11
    again = make_bundle(log.directory, index, from_size=11)
    assert accept(log, again, second, accept(log, bundle, second, remembered)).size == 11


def test_refuses_a_proof_that_does_not_lead_on_from_what_is_remembered(log: StudyLog) -> None:
    index = log.append_published(study())
    remembered = accept(log, make_bundle(log.directory, index), study())
    log.append_published(study(), others=3)
    with pytest.raises(StudyLogError, match="ask for a proof from there"):
        accept(log, make_bundle(log.directory, index), study(), remembered)


def test_refuses_a_log_that_was_rolled_back(log: StudyLog, tmp_path: Path) -> None:
    index = log.append_published(study(), others=2)
    shutil.copytree(log.directory, tmp_path / "backup")
    old = make_bundle(log.directory, index)
    log.append_published(study(), others=5)
    newest = find_published(log.directory, study().study_hash, start=index + 1)
    remembered = accept(log, make_bundle(log.directory, newest), study())
    with pytest.raises(StudyLogError, match="shrank"):
        accept(log, old, study(), remembered)
    with pytest.raises(StudyLogError, match="rolled back"):
        make_bundle(tmp_path / "backup", index, from_size=remembered.size)


def test_refuses_a_log_whose_history_was_rewritten(log: StudyLog, tmp_path: Path) -> None:
    index = log.append_published(study(), others=2)
    remembered = accept(log, make_bundle(log.directory, index), study())
    other = StudyLog(tmp_path / "other")
    other.signer = log.signer
    other.append_published(study(), others=9)
    forged = make_bundle(
        other.directory, find_published(other.directory, study().study_hash), from_size=4
    )
    with pytest.raises(StudyLogError):
        verify_bundle(
            forged,
            study_hash=study().study_hash,
            remembered=remembered,
            log_keys=log.keys,
            # Even if a witness went along.
            witness_keys=(*log.witness_keys, *other.witness_keys),
        )


def test_refuses_what_no_trusted_witness_cosigned(tmp_path: Path) -> None:
    alone = StudyLog(tmp_path, witnessed=False)
    bundle = make_bundle(alone.directory, alone.append_published(study()))
    with pytest.raises(StudyLogError, match="No signature is by a key that is known"):
        accept(alone, bundle, study())
    stranger = StudyLog(tmp_path / "stranger")
    seen = make_bundle(stranger.directory, stranger.append_published(study()))
    with pytest.raises(StudyLogError):
        verify_bundle(
            seen,
            study_hash=study().study_hash,
            remembered=Remembered.nothing(ORIGIN),
            log_keys=stranger.keys,
            witness_keys=alone.witness_keys,
        )
    with pytest.raises(StudyLogError, match="No witness is trusted"):
        verify_bundle(
            seen,
            study_hash=study().study_hash,
            remembered=Remembered.nothing(ORIGIN),
            log_keys=stranger.keys,
            witness_keys=stranger.keys,
        )


def test_one_witness_is_not_two(log: StudyLog) -> None:
    bundle = make_bundle(log.directory, log.append_published(study()))
    with pytest.raises(StudyLogError, match="2 are needed"):
        verify_bundle(
            bundle,
            study_hash=study().study_hash,
            remembered=Remembered.nothing(ORIGIN),
            log_keys=log.keys,
            witness_keys=log.witness_keys,
            witnesses=2,
        )


def test_refuses_the_entry_of_another_study_or_step(log: StudyLog) -> None:
    proposed = log.append_published(study(), action="study.propose")
    with pytest.raises(StudyLogError, match="another step"):
        accept(log, make_bundle(log.directory, proposed), study())
    intent = log.append_published(study()) - 1
    with pytest.raises(StudyLogError, match="another step"):
        accept(log, make_bundle(log.directory, intent), study())
    other = study({"Sleep and mood": "Sleep and moods"})
    with pytest.raises(StudyLogError, match="another study"):
        accept(log, make_bundle(log.directory, intent + 1), other)


def test_refuses_another_logs_proof(log: StudyLog) -> None:
    bundle = make_bundle(log.directory, log.append_published(study()))
    with pytest.raises(StudyLogError, match="follows log"):
        accept(log, bundle, study(), Remembered.nothing("log.example/other"))


def test_refuses_any_flipped_bit(log: StudyLog) -> None:
    index = log.append_published(study(), others=20)
    bundle = make_bundle(log.directory, index)
    for place in range(0, len(bundle.proof), 7):
        changed = bytearray(bundle.proof)
        changed[place] ^= 1
        with pytest.raises(StudyLogError):
            accept(log, replace(bundle, proof=bytes(changed)), study())


def test_refuses_an_entry_that_is_not_the_proven_one(log: StudyLog) -> None:
    bundle = make_bundle(log.directory, log.append_published(study(), others=3))
    proof = parse_proof(bundle.proof)
    bare = replace(proof, extra=None)
    with pytest.raises(StudyLogError, match="does not carry"):
        accept(log, replace(bundle, proof=bare.encode()), study())


def test_refuses_what_is_malformed_or_too_large() -> None:
    for data in (b"", b"{}", b"[" * 5000, b"x" * 10**6, b'{"\xff":1}', b'{"proof":"\xff"}'):
        with pytest.raises(StudyLogError):
            parse_bundle(data)
    for hashes, size in (((b"\0" * 31,), 0), ((b"\0" * 32,) * 64, 0), ((), -1)):
        with pytest.raises(StudyLogError):
            parse_bundle(StudyBundle(proof=b"", from_size=size, consistency=hashes).encode())


def test_is_made_only_once_a_checkpoint_covers_it(log: StudyLog) -> None:
    log.append_published(study())
    with log.writer() as writer:
        index = log.record(writer, study(), others=1)
        with pytest.raises(StudyLogError, match="No checkpoint covers"):
            make_bundle(log.directory, index)
    with pytest.raises(StudyLogError, match="waits for an approval"):
        find_published(log.directory, "0" * 64)


def test_a_damaged_memory_is_not_a_fresh_start() -> None:
    with pytest.raises(StudyLogError, match="damaged"):
        Remembered.parse("log.example/studies\n-1\nAAAA\n")
