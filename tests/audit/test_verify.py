"""Whoever changes a log is found out: verification of the whole directory."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from pathlib import Path

import aics_tlog
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audit import verify
from audit.checkpoint import Checkpoint, sign_checkpoint, verify_checkpoint
from audit.errors import VerificationError
from audit.integrate import read_state, write_state
from audit.journal import encode_frame, encode_header, frame_seed, list_segments, read_journal
from audit.log import LogWriter
from audit.publish import Publisher
from audit.tiles import bundle_path
from audit.verify import LogVerificationError, Report, examine_log, verify_log
from tests.audit.conftest import ORIGIN, Log, MemorySigner, entry
from tests.audit.local_witness import DirectWitness, local_witness

FIXTURE = [HealthCheck.function_scoped_fixture]


def files_of(directory: Path) -> list[Path]:
    """Every file that says something: the lock is empty."""
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.stat().st_size)


def found(log: Log) -> Report:
    return examine_log(log.directory, log.keys)


def test_an_honest_log_verifies_in_every_size(log: Log) -> None:
    total = 0
    for count in (1, 99, 155, 1, 1, 255, 300):
        log.fill(count, first=total)
        total += count
        report = verify_log(log.directory, log.keys)
        assert (report.size, report.sequenced, report.checked) == (total, total, total)
        assert report.problems == []


def test_verifies_what_is_sequenced_but_not_published(log: Log) -> None:
    log.fill(300)
    with LogWriter.open(log.directory, origin=ORIGIN) as writer:
        for number in range(300, 700):
            writer.append(entry(number))
        beside = verify_log(log.directory, log.keys)
    after = verify_log(log.directory, log.keys)
    for report in (beside, after):
        assert (report.size, report.sequenced, report.checked) == (300, 700, 700)


@settings(max_examples=150, deadline=None, suppress_health_check=FIXTURE)
@given(st.data())
def test_a_flipped_byte_in_any_file_is_found(log: Log, data: st.DataObject) -> None:
    if not log.directory.exists():
        # Several published sizes, full and partial tiles on two levels, and an unpublished rest.
        log.fill(200)
        log.fill(330, first=200)
        log.fill(17, first=530)
        with LogWriter.open(log.directory, origin=ORIGIN) as writer:
            for number in range(547, 560):
                writer.append(entry(number))
    path = data.draw(st.sampled_from(files_of(log.directory)), label="file")
    honest = path.read_bytes()
    at = data.draw(st.integers(0, len(honest) - 1), label="byte")
    changed = bytearray(honest)
    changed[at] ^= data.draw(st.integers(1, 255), label="mask")
    path.write_bytes(changed)
    try:
        with pytest.raises(VerificationError):
            verify_log(log.directory, log.keys)
    finally:
        path.write_bytes(honest)
    verify_log(log.directory, log.keys)


def test_a_flipped_byte_in_what_is_only_sequenced_is_found(log: Log) -> None:
    log.fill(3)
    with LogWriter.open(log.directory, origin=ORIGIN) as writer:
        writer.append(entry(3))
        writer.append(entry(4))
    ((_, path),) = list_segments(log.directory)
    honest = path.read_bytes()
    start = honest.index(entry(2)) + len(entry(2))
    for at in range(start, len(honest)):
        path.write_bytes(honest[:at] + bytes([honest[at] ^ 1]) + honest[at + 1 :])
        with pytest.raises(VerificationError, match="no valid frames"):
            verify_log(log.directory, log.keys)


async def test_a_log_of_three_levels_verifies_and_a_changed_upper_tile_is_found(log: Log) -> None:
    count = 65_536 + 300
    with (
        LogWriter.open(log.directory, origin=ORIGIN) as writer,
        Publisher(writer, log.signer) as publisher,
    ):
        for first in range(0, count, 4096):
            numbers = range(first, min(first + 4096, count))
            await asyncio.gather(*(writer.append_async(entry(n)) for n in numbers))
        publisher.publish()
    assert verify_log(log.directory, log.keys).checked == count
    files = aics_tlog.FileSystemTileReader(log.directory)
    root = verify_checkpoint(log.checkpoint, log.keys).checkpoint.root
    assert aics_tlog.audit_tiles(files, count, root).size == count
    with LogWriter.open(log.directory, origin=ORIGIN) as writer:
        assert (writer.size, writer.recovery.replayed) == (count, count % 256)
    for name in ("tile/1/000", "tile/1/001.p/1", "tile/2/000.p/1"):
        path = log.directory / name
        honest = path.read_bytes()
        path.write_bytes(honest[:9] + bytes([honest[9] ^ 1]) + honest[10:])
        with pytest.raises(VerificationError, match=name):
            verify_log(log.directory, log.keys)
        path.write_bytes(honest)


def test_a_missing_file_is_found_and_named(log: Log) -> None:
    log.fill(200)
    log.fill(330, first=200)
    needed = {
        "checkpoint",
        "state",
        "journal/0000000000000000.seg",
        "tile/0/000",
        "tile/0/001",
        "tile/0/002.p/18",
        "tile/1/000.p/2",
        "tile/entries/000",
        "tile/entries/001",
        "tile/entries/002.p/18",
    }
    assert needed <= {str(p.relative_to(log.directory)) for p in files_of(log.directory)}
    for name in sorted(needed):
        path = log.directory / name
        data = path.read_bytes()
        path.unlink()
        report = found(log)
        assert any(name.split("/")[0] in p.where for p in report.problems), name
        path.write_bytes(data)
    verify_log(log.directory, log.keys)


def test_all_that_is_wrong_is_listed_with_its_place(log: Log) -> None:
    log.fill(1000)
    for number in (0, 2):
        path = log.directory / bundle_path(number)
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
    report = found(log)
    text = "\n".join(f"{p.where}: {p.what}" for p in report.problems)
    assert "entry 255" in text
    assert "entry 767" in text
    with pytest.raises(LogVerificationError) as caught:
        verify_log(log.directory, log.keys)
    assert caught.value.report.problem_count == report.problem_count


def rebuild(source: Log, entries: list[bytes], target: Path, *, keep: bytes | None) -> None:
    """An attacker with the whole disk rebuilds a log, every hash and CRC right, without the key."""
    forger = MemorySigner()
    with LogWriter.open(target, origin=ORIGIN) as writer, Publisher(writer, forger) as publisher:
        for one in entries:
            writer.append(one)
        publisher.publish()
    if keep is not None:
        (target / "checkpoint").write_bytes(keep)


@pytest.mark.parametrize("attack", ["change", "remove", "insert", "swap"])
@pytest.mark.parametrize("at", [0, 130, 299, 511])
def test_history_that_was_rebuilt_without_the_key_is_found(
    log: Log, tmp_path: Path, attack: str, at: int
) -> None:
    log.fill(300)
    older = log.checkpoint
    log.fill(300, first=300)
    entries = [entry(number) for number in range(600)]
    if attack == "change":
        entries[at] = entry(99_999)
    elif attack == "remove":
        del entries[at]
    elif attack == "insert":
        entries.insert(at, entry(99_999))
    else:
        entries[at], entries[at + 1] = entries[at + 1], entries[at]
    forged = tmp_path / "forged"
    rebuild(log, entries, forged, keep=log.checkpoint)
    with pytest.raises(VerificationError):
        verify_log(forged, log.keys, older_checkpoint=older)
    with pytest.raises(VerificationError):
        verify_log(forged, log.keys)


@pytest.mark.parametrize("at", [0, 130, 299])
def test_even_the_holder_of_the_key_cannot_change_what_an_older_checkpoint_covers(
    log: Log, tmp_path: Path, at: int
) -> None:
    log.fill(300)
    older = log.checkpoint
    entries = [entry(number) for number in range(600)]
    entries[at] = entry(99_999)
    forged = Log(tmp_path / "forged", signer=log.signer)
    with (
        LogWriter.open(forged.directory, origin=ORIGIN) as writer,
        Publisher(writer, log.signer) as publisher,
    ):
        for one in entries:
            writer.append(one)
        publisher.publish()
    assert verify_log(forged.directory, log.keys).size == 600
    with pytest.raises(VerificationError, match="history was changed"):
        verify_log(forged.directory, log.keys, older_checkpoint=older)


def test_a_log_that_was_rolled_back_is_found_by_an_older_checkpoint(
    log: Log, tmp_path: Path
) -> None:
    log.fill(300)
    shutil.copytree(log.directory, tmp_path / "old")
    log.fill(10, first=300)
    with pytest.raises(VerificationError, match="rolled back"):
        verify_log(tmp_path / "old", log.keys, older_checkpoint=log.checkpoint)


def test_each_older_checkpoint_is_continued_by_an_honest_log(log: Log) -> None:
    kept: list[bytes] = []
    for count in (0, 1, 255, 1, 300, 7):
        log.fill(count, first=100 * len(kept))
        kept.append(log.checkpoint)
    for older in kept:
        report = verify_log(log.directory, log.keys, older_checkpoint=older)
        assert report.consistent_with is not None


def test_an_older_checkpoint_of_a_stranger_is_refused(log: Log) -> None:
    log.fill(3)
    stranger = sign_checkpoint(Checkpoint(origin=ORIGIN, size=1, root=b"x" * 32), MemorySigner())
    with pytest.raises(VerificationError, match="known"):
        verify_log(log.directory, log.keys, older_checkpoint=stranger.note.encode())


def test_a_journal_rewritten_with_good_checksums_is_found(log: Log) -> None:
    log.fill(300)
    ((first, path),) = list_segments(log.directory)
    header = encode_header(ORIGIN, first)
    frames = [frame.entry for _, frame in read_journal(log.directory, origin=ORIGIN)]
    frames[280] = entry(99_999)
    body = [encode_frame(one, None, starts_batch=True, seed=frame_seed(header)) for one in frames]
    path.write_bytes(header + b"".join(body))
    with pytest.raises(VerificationError):
        verify_log(log.directory, log.keys)


def test_cosignatures_are_verified(log: Log, tmp_path: Path) -> None:
    witness = local_witness(tmp_path / "witness", log.keys)
    with (
        LogWriter.open(log.directory, origin=ORIGIN) as writer,
        Publisher(writer, log.signer, witnesses=[DirectWitness(witness)]) as publisher,
    ):
        writer.append(entry(0))
        publisher.publish()
    keys = witness.verifier_keys()
    report = verify_log(log.directory, log.keys, witness_keys=keys)
    assert report.cosigned_by == ("witness.example",)
    # Another checkpoint's cosignature does not count.
    data = log.checkpoint.decode()
    log.fill(1, first=1)
    line = data.splitlines()[-1]
    (log.directory / "checkpoint").write_text(log.checkpoint.decode() + line + "\n")
    with pytest.raises(VerificationError, match="signature by witness"):
        verify_log(log.directory, log.keys, witness_keys=keys)


def test_a_checkpoint_that_a_witness_did_not_cosign_is_a_problem_for_who_trusts_that_witness(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log that was rewritten or rolled back with its own key is one that no witness cosigns."""
    monkeypatch.setattr(verify, "COSIGN_WAIT_S", 0.2)
    keys = local_witness(tmp_path / "witness", log.keys).verifier_keys()
    log.fill(1)
    with pytest.raises(VerificationError, match=r"witness\.example did not cosign"):
        verify_log(log.directory, log.keys, witness_keys=keys)


def test_waits_a_moment_for_a_cosignature_that_is_on_its_way(log: Log, tmp_path: Path) -> None:
    witness = local_witness(tmp_path / "witness", log.keys)
    log.fill(1)
    bare = log.checkpoint
    with (
        LogWriter.open(log.directory, origin=ORIGIN) as writer,
        Publisher(writer, log.signer, witnesses=[DirectWitness(witness)]) as publisher,
    ):
        publisher.publish()
    cosigned = log.checkpoint
    assert bare != cosigned
    path = log.directory / "checkpoint"
    path.write_bytes(bare)
    later = threading.Timer(0.3, lambda: path.write_bytes(cosigned))
    later.start()
    report = verify_log(log.directory, log.keys, witness_keys=witness.verifier_keys())
    later.join()
    assert report.cosigned_by == ("witness.example",)


def test_pruned_bundles_are_passed_over_but_their_tiles_are_not(log: Log) -> None:
    log.fill(1000)
    for number in (0, 1):
        (log.directory / bundle_path(number)).unlink()
    with pytest.raises(VerificationError, match="missing"):
        verify_log(log.directory, log.keys)
    with pytest.raises(VerificationError, match="missing"):
        verify_log(log.directory, log.keys, retained_from=511)
    report = verify_log(log.directory, log.keys, retained_from=512)
    assert (report.size, report.checked) == (1000, 1000 - 512)
    path = log.directory / "tile/0/001"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerificationError):
        verify_log(log.directory, log.keys, retained_from=512)


def test_tells_exchanges_without_an_end_and_time_that_ran_back(log: Log) -> None:
    with (
        LogWriter.open(log.directory, origin=ORIGIN) as writer,
        Publisher(writer, log.signer) as publisher,
    ):
        writer.append(entry(0, stage="intent", request="whole"))
        writer.append(entry(1, stage="intent", request="dangling"))
        writer.append(entry(2, stage="outcome", request="whole"))
        writer.append(entry(3, stage="opened", request="stream"))
        writer.append(entry(4, stage="closed", request="never-opened"))
        writer.append(entry(-5_000_000))
        writer.append(b'{"parts":2,"request":"dangling","stage":"outcome","time":1000000000000006}')
        publisher.publish()
    story = verify_log(log.directory, log.keys).story
    assert [(d.index, d.request) for d in story.dangling] == [(1, "dangling"), (3, "stream")]
    assert [(d.index, d.request) for d in story.orphans] == [(4, "never-opened")]
    assert [(r.index, r.back_us) for r in story.regressions] == [(5, 5_000_004)]


def test_one_outcome_does_not_end_two_intents_of_the_same_id(log: Log) -> None:
    with (
        LogWriter.open(log.directory, origin=ORIGIN) as writer,
        Publisher(writer, log.signer) as publisher,
    ):
        writer.append(entry(0, stage="intent", request="a"))
        writer.append(entry(1, stage="intent", request="a"))
        writer.append(entry(2, stage="outcome", request="a"))
        publisher.publish()
    story = verify_log(log.directory, log.keys).story
    assert ([one.index for one in story.dangling], story.dangling_count) == ([1], 1)


def test_an_entry_that_is_no_entry_is_a_problem(log: Log) -> None:
    with (
        LogWriter.open(log.directory, origin=ORIGIN) as writer,
        Publisher(writer, log.signer) as publisher,
    ):
        writer.append(entry(0))
        writer.append(b"\xff not json")
        publisher.publish()
    with pytest.raises(VerificationError, match="entry 1"):
        verify_log(log.directory, log.keys)


def test_a_state_that_was_forged_with_its_checksum_is_found(log: Log) -> None:
    log.fill(600)
    state = read_state(log.directory)
    assert state is not None
    for size, root in ((256, state.root), (512, b"x" * 32), (1024, state.root)):
        write_state(log.directory, type(state)(origin=ORIGIN, size=size, root=root, swept=600))
        with pytest.raises(VerificationError):
            verify_log(log.directory, log.keys)
    write_state(log.directory, state)
    verify_log(log.directory, log.keys)


def test_progress_reaches_the_end(log: Log) -> None:
    log.fill(600)
    seen: list[tuple[int, int]] = []
    verify_log(log.directory, log.keys, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (600, 600)
    assert json.dumps(seen)
