"""The disk full, and the log's files taken away or changed under the writer: it notices at once."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from audit import files
from audit.errors import LogFullError, LogTamperedError, LogUnavailableError
from audit.integrate import State, write_state
from audit.journal import (
    encode_frame,
    encode_header,
    frame_seed,
    list_segments,
    segment_path,
)
from audit.log import LogWriter
from audit.merkle import EMPTY_ROOT
from audit.publish import Publisher
from audit.reader import LogReader
from audit.tiles import bundle_path
from audit.verify import examine_log, verify_log
from tests.audit.conftest import ORIGIN, Log, MemorySigner, entry


def segment(log: Log) -> Path:
    return list_segments(log.directory)[-1][1]


def unlink(log: Log) -> None:
    segment(log).unlink()


def rename(log: Log) -> None:
    segment(log).rename(segment(log).with_name("hidden"))


def truncate(log: Log) -> None:
    os.truncate(segment(log), segment(log).stat().st_size - 1)


def truncate_to_nothing(log: Log) -> None:
    os.truncate(segment(log), 0)


def append_to_it(log: Log) -> None:
    with segment(log).open("ab") as file:
        file.write(b"x")


def replace_by_a_copy(log: Log) -> None:
    copy = segment(log).with_name("copy")
    shutil.copy(segment(log), copy)
    copy.replace(segment(log))


def replace_by_a_link(log: Log) -> None:
    moved = segment(log).with_name("moved")
    path = segment(log).rename(moved)
    segment_path(log.directory, 0).symlink_to(path)


def move_the_journal(log: Log) -> None:
    (log.directory / "journal").rename(log.directory / "elsewhere")


def move_the_directory(log: Log) -> None:
    log.directory.rename(log.directory.with_name("elsewhere"))


def replace_the_directory(log: Log) -> None:
    moved = log.directory.rename(log.directory.with_name("elsewhere"))
    shutil.copytree(moved, log.directory)


def remove_everything(log: Log) -> None:
    shutil.rmtree(log.directory)


ATTACKS = [
    unlink,
    rename,
    truncate,
    truncate_to_nothing,
    append_to_it,
    replace_by_a_copy,
    replace_by_a_link,
    move_the_journal,
    move_the_directory,
    replace_the_directory,
    remove_everything,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_nothing_is_acknowledged_once_the_log_is_not_in_its_place(
    log: Log, attack: Callable[[Log], None]
) -> None:
    writer = log.open()
    for number in range(10):
        writer.append(entry(number))
    attack(log)
    for number in range(10, 13):
        with pytest.raises(LogTamperedError):
            writer.append(entry(number))
    assert isinstance(writer.status().failure, LogTamperedError)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_the_check_after_the_sync_finds_it_too(
    log: Log, attack: Callable[[Log], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = log.open()
    writer.append(entry(0))
    real = os.fdatasync

    def attacked(descriptor: int) -> None:
        real(descriptor)
        attack(log)

    monkeypatch.setattr("audit.journal.sync_data", attacked)
    with pytest.raises(LogTamperedError):
        writer.append(entry(1))


def test_stays_closed_after_a_restart_until_an_operator_acts(log: Log) -> None:
    writer = log.open()
    writer.append(entry(0))
    move_the_journal(log)
    with pytest.raises(LogTamperedError):
        writer.append(entry(1))
    log.close()
    (log.directory / "elsewhere").rename(log.directory / "journal")
    with pytest.raises(LogTamperedError, match="remove the file"):
        log.open()
    (log.directory / "halted").unlink()
    writer = log.open()
    # The batch that was refused had not been written.
    assert writer.size == 1


@pytest.mark.parametrize("with_checksum", [False, True])
def test_a_journal_rewritten_in_place_is_found_before_it_is_integrated(
    log: Log,
    with_checksum: bool,  # noqa: FBT001 - drawn by pytest
) -> None:
    writer = log.open()
    for number in range(200):
        writer.append(entry(number))
    seed = frame_seed(encode_header(ORIGIN, 0))
    honest = encode_frame(entry(150), None, starts_batch=True, seed=seed)
    forged = encode_frame(entry(666), None, starts_batch=True, seed=seed)
    if not with_checksum:
        forged = honest[:8] + forged[8:]
    path = segment(log)
    at = path.read_bytes().index(honest)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(forged)
    with Publisher(writer, log.signer) as publisher, pytest.raises(LogTamperedError):
        publisher.publish()
    with pytest.raises(LogTamperedError):
        writer.append(entry(200))
    assert not (log.directory / "checkpoint").exists()


def test_a_tile_that_is_there_and_does_not_fit_halts_the_writer(log: Log) -> None:
    writer = log.open()
    path = log.directory / "tile/0/000"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 8192)
    with pytest.raises(LogTamperedError, match="tile/0/000"):  # noqa: PT012 - soon, not at once
        for number in range(100_000):
            writer.append(entry(number))


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_batch_without_room_leaves_nothing_behind(
    log: Log, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    writer = log.open()
    writer.append(entry(0))
    size = segment(log).stat().st_size
    real = os.pwrite

    def half(descriptor: int, data: bytes, offset: int) -> int:
        real(descriptor, bytes(data)[:20], offset)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(LogFullError, match="No room"):
        writer.append(entry(1))
    assert segment(log).stat().st_size == size
    monkeypatch.undo()
    assert writer.append(entry(2)).index == 1
    log.close()
    assert [raw for _, raw in LogReader(log.directory).read()] == [entry(0), entry(2)]


def test_integration_never_reads_what_a_refused_batch_left_for_a_moment(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = log.open()
    writer.append(entry(0))
    real = os.pwrite

    def written_but_refused(descriptor: int, data: bytes, offset: int) -> int:
        real(descriptor, data, offset)
        writer.integrator.advance()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", written_but_refused)
        with pytest.raises(LogFullError):
            writer.append(entry(1))
    writer.append(entry(2))
    with Publisher(writer, log.signer) as publisher:
        publisher.publish()
    log.close()
    assert verify_log(log.directory, log.keys).size == 2


def test_halts_when_what_was_written_of_a_batch_cannot_be_cut_off(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = log.open()
    writer.append(entry(0))

    def no_room(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", no_room)
    monkeypatch.setattr(os, "ftruncate", broken)
    with pytest.raises(LogUnavailableError, match="disk failed"):
        writer.append(entry(1))
    monkeypatch.undo()
    with pytest.raises(LogUnavailableError, match="disk failed"):
        writer.append(entry(1))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB in memory."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    point = tmp_path / "small"
    point.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(point)]
    done = subprocess.run(["/bin/mount", *options], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
    try:
        yield point
    finally:
        subprocess.run(["/bin/umount", "--lazy", str(point)], check=True)


def test_a_full_disk_refuses_and_goes_on_once_there_is_room(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(300_000))
    signer = MemorySigner()
    log = Log(small_disk / "log", signer=signer)
    written: list[bytes] = []
    with LogWriter.open(log.directory, origin=ORIGIN) as writer:
        publisher = Publisher(writer, signer)
        with pytest.raises(LogFullError, match="Free some space"):  # noqa: PT012 - sooner or later
            for number in range(10_000):
                writer.append(entry(number, size=500))
                written.append(entry(number, size=500))
        for number in range(5):
            with pytest.raises(LogFullError):
                writer.append(entry(number, size=5000))
        with pytest.raises(LogFullError):
            publisher.publish()
        assert writer.status().failure is None
        ballast.unlink()
        assert writer.append(entry(1)).index == len(written)
        written.append(entry(1))
        publisher.publish()
        publisher.close()
    assert [raw for _, raw in LogReader(log.directory).read()] == written
    assert verify_log(log.directory, log.keys).size == len(written)


def test_a_full_disk_survives_a_crash(small_disk: Path) -> None:
    signer = MemorySigner()
    log = Log(small_disk / "log", signer=signer)
    with LogWriter.open(log.directory, origin=ORIGIN) as writer:
        with pytest.raises(LogFullError):  # noqa: PT012 - sooner or later
            for number in range(10_000):
                writer.append(entry(number, size=500))
        size = writer.size
        shutil.copytree(log.directory, small_disk.parent / "copy")
    with LogWriter.open(small_disk.parent / "copy", origin=ORIGIN) as writer:
        assert writer.size == size
        assert writer.append(entry(1)).index == size


def no_room_for(name: str, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Let every file called `name` find the disk full for as long as the list holds True."""
    full = [True]
    replace_file = files.replace_file

    def replace(path: Path, data: bytes) -> None:
        if path.name == name and full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_file(path, data)

    monkeypatch.setattr(files, "replace_file", replace)
    return full


@pytest.mark.parametrize("number", [10, 300])
def test_no_room_for_the_state_does_not_halt_the_writer(
    log: Log, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = log.open()
    with Publisher(writer, log.signer) as publisher:
        writer.append(entry(0))
        full = no_room_for("state", monkeypatch)
        for more in range(1, number):
            writer.append(entry(more))
        with pytest.raises(LogFullError):
            publisher.publish()
        assert writer.status().failure is None
        writer.append(entry(number))
        full[0] = False
        publisher.publish()
        assert writer.integrate() is None
    log.close()
    verify_log(log.directory, log.keys)


@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "removed"])
def test_a_writer_whose_lock_was_taken_away_acknowledges_nothing(
    log: Log,
    replaced: bool,  # noqa: FBT001 - a parameter of pytest
) -> None:
    """Otherwise a second writer could open the log beside it, and both give the same index."""
    writer = log.open()
    writer.append(entry(0))
    (log.directory / "lock").unlink()
    if replaced:
        (log.directory / "lock").touch()
    with pytest.raises(LogTamperedError, match="lock"):
        writer.append(entry(1))


def test_damage_in_an_acknowledged_batch_is_no_torn_tail(log: Log) -> None:
    """Not even in the last batch, without a checkpoint, after the writer is gone."""
    writer = log.open()
    for number in range(10):
        writer.append(entry(number))
    log.close()
    data = bytearray(segment(log).read_bytes())
    data[-3] ^= 1
    segment(log).write_bytes(data)
    with pytest.raises(LogTamperedError, match="was acknowledged"):
        log.open()
    assert any("was acknowledged" in one.what for one in examine_log(log.directory, ()).problems)


def test_a_journal_cut_between_batches_is_found(log: Log) -> None:
    writer = log.open()
    writer.append(entry(0))
    size = segment(log).stat().st_size
    writer.append(entry(1))
    log.close()
    os.truncate(segment(log), size)
    with pytest.raises(LogTamperedError, match="was acknowledged"):
        log.open()


@pytest.mark.parametrize("older", [True, False])
def test_an_older_checkpoint_or_none_is_not_signed_over(
    log: Log,
    older: bool,  # noqa: FBT001 - a parameter of pytest
) -> None:
    """Otherwise the log's own signer would sign whatever history lies there as a new one."""
    log.fill(10)
    first = log.checkpoint
    log.fill(10, first=10)
    if older:
        (log.directory / "checkpoint").write_bytes(first)
    else:
        (log.directory / "checkpoint").unlink()
    with pytest.raises(LogTamperedError, match="20 entries were published"):
        log.open()
    found = examine_log(log.directory, log.keys).problems
    assert [one.where for one in found] == ["checkpoint"] * (1 if older else 2)


def test_a_state_that_counts_less_than_was_published_is_found(log: Log) -> None:
    """Else what is still in the journal would hide that a full bundle is gone."""
    log.fill(300)
    (log.directory / bundle_path(0)).unlink()
    write_state(log.directory, State(origin=ORIGIN, size=0, root=EMPTY_ROOT))
    problems = examine_log(log.directory, log.keys).problems
    assert "state" in {one.where for one in problems}
