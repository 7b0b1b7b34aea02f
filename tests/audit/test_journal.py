"""What a crash may leave in a journal, and what it may not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audit.errors import LogTamperedError
from audit.integrate import read_state, write_state
from audit.journal import (
    MARK,
    Segment,
    encode_frame,
    encode_header,
    encode_mark,
    frame_seed,
    parse_frame,
    read_journal,
    segment_path,
)
from audit.reader import LogReader
from audit.recovery import recover
from tests.audit.conftest import ORIGIN, Log, entry

FIXTURE = [HealthCheck.function_scoped_fixture]


def write(directory: Path, batches: list[list[bytes]], *, first: int = 0) -> list[list[int]]:
    """Replace a segment by batches; where each frame of each batch begins and the last one ends."""
    header = encode_header(ORIGIN, first)
    data, places = header, []
    for batch in batches:
        starts = []
        for number, one in enumerate(batch):
            starts.append(len(data))
            data += encode_frame(one, None, starts_batch=number == 0, seed=frame_seed(header))
        places.append(starts)
    segment_path(directory, first).write_bytes(data)
    # As after a power cut: how far it was acknowledged did not reach the disk.
    (directory / MARK).write_bytes(encode_mark(first, len(header)))
    return [*places, [len(data)]]


@settings(max_examples=200)
@given(
    raw=st.binary(min_size=1, max_size=200),
    key=st.none() | st.binary(min_size=16, max_size=16),
    starts=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_frame_reads_as_it_was_written(
    *, raw: bytes, key: bytes | None, starts: bool, seed: int
) -> None:
    encoded = encode_frame(raw, key, starts_batch=starts, seed=seed)
    parsed = parse_frame(encoded, 0, seed)
    assert parsed is not None
    frame, end = parsed
    assert (frame.entry, frame.key, frame.starts_batch, end) == (raw, key, starts, len(encoded))
    assert parse_frame(encoded[:-1], 0, seed) is None
    assert parse_frame(encoded, 0, seed ^ 1) is None


@settings(max_examples=300)
@given(st.binary(min_size=1, max_size=60), st.data())
def test_a_frame_with_a_changed_byte_is_none(raw: bytes, data: st.DataObject) -> None:
    encoded = bytearray(encode_frame(raw, None, starts_batch=True, seed=7))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    assert parse_frame(bytes(encoded), 0, 7) is None


def test_zeros_are_no_frame() -> None:
    assert parse_frame(bytes(100), 0, 0) is None


@settings(max_examples=120, deadline=None, suppress_health_check=FIXTURE)
@given(st.data())
def test_a_tail_that_was_torn_anywhere_in_the_last_batch_is_cut_and_reported(
    log: Log, data: st.DataObject
) -> None:
    if not log.directory.exists():
        log.open()
        log.close()
    places = write(log.directory, [[entry(0), entry(1)], [entry(2), entry(3), entry(4)]])
    path = segment_path(log.directory, 0)
    whole = path.read_bytes()
    cut = data.draw(st.integers(places[1][0], len(whole) - 1))
    torn = whole[:cut]
    if data.draw(st.booleans()):
        # Blocks reach the disk in any order: a hole, then what was written behind it.
        hole = data.draw(st.integers(0, len(whole) - cut))
        torn = whole[:cut] + bytes(hole) + whole[cut + hole :]
    path.write_bytes(torn)
    left = [places[1][n] for n in range(3) if cut >= [*places[1][1:], places[2][0]][n]]
    writer = log.open()
    report = writer.recovery
    log.close()
    if torn == whole:
        assert (report.size, report.cut_bytes) == (5, 0)
        return
    assert report.size == 2 + len(left)
    assert report.cut_bytes == len(torn) - report.cut_offset if report.cut_bytes else True
    assert [raw for _, raw in LogReader(log.directory).read()] == [
        entry(number) for number in range(report.size)
    ]
    assert path.stat().st_size == len(torn) - report.cut_bytes


@settings(max_examples=120, deadline=None, suppress_health_check=FIXTURE)
@given(st.data())
def test_damage_before_the_last_batch_is_refused_with_file_and_offset(
    log: Log, data: st.DataObject
) -> None:
    if not log.directory.exists():
        log.open()
        log.close()
    places = write(log.directory, [[entry(0), entry(1)], [entry(2)], [entry(3), entry(4)]])
    path = segment_path(log.directory, 0)
    changed = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, places[2][0] - 1))
    changed[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    with pytest.raises(LogTamperedError, match=r"0000000000000000\.seg at byte \d+"):
        log.open()
    assert path.read_bytes() == changed


def test_segments_have_to_join(log: Log) -> None:
    log.open()
    log.close()
    write(log.directory, [[entry(0)], [entry(1)]])
    write(log.directory, [[entry(2)]], first=2)
    assert [i for i, _ in read_journal(log.directory, origin=ORIGIN)] == [0, 1, 2]
    assert [i for i, _ in read_journal(log.directory, origin=ORIGIN, start=2)] == [2]
    write(log.directory, [[entry(0)]])
    with pytest.raises(LogTamperedError, match="next segment begins with entry 2"):
        list(read_journal(log.directory, origin=ORIGIN))
    with pytest.raises(LogTamperedError, match="next segment begins with entry 2"):
        recover(log.directory, ORIGIN)


def test_a_segment_of_another_log_is_refused(log: Log) -> None:
    log.open()
    log.close()
    path = segment_path(log.directory, 0)
    path.write_bytes(encode_header("other.example/log", 0))
    with pytest.raises(LogTamperedError, match="header"):
        log.open()


def test_nothing_is_read_behind_the_limit(log: Log) -> None:
    log.open()
    log.close()
    places = write(log.directory, [[entry(0)], [entry(1)]])
    path = segment_path(log.directory, 0)
    with Segment(path, origin=ORIGIN, first=0) as segment:
        assert segment.read(places[1][0]) is not None
        assert segment.read(places[1][0]) is None
        # What stands there may change until it was forced to the disk.
        write(log.directory, [[entry(0)], [entry(7)]])
        frame = segment.read(places[2][0])
        assert frame is not None
        assert frame.entry == entry(7)


def test_a_journal_shorter_than_the_checkpoint_is_refused(log: Log) -> None:
    log.fill(20)
    places = write(log.directory, [[entry(n)] for n in range(20)])
    path = segment_path(log.directory, 0)
    path.write_bytes(path.read_bytes()[: places[19][0]])
    with pytest.raises(LogTamperedError, match="covers 20 entries, but only 19"):
        log.open()


def test_a_journal_shorter_than_what_is_integrated_is_refused(log: Log) -> None:
    log.fill(300)
    (log.directory / "checkpoint").unlink()
    path = segment_path(log.directory, 0)
    path.write_bytes(encode_header(ORIGIN, 0))
    with pytest.raises(LogTamperedError, match="256 entries were integrated"):
        log.open()
    path.unlink()
    with pytest.raises(LogTamperedError, match="no segment"):
        log.open()


@pytest.mark.parametrize("name", ["state", "tile/0/000", "checkpoint", "tile/entries/000"])
def test_a_changed_file_that_the_writer_builds_on_is_refused(log: Log, name: str) -> None:
    log.fill(300)
    path = log.directory / name
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    if name == "tile/entries/000":
        # Reading every bundle again at each start would take too long: `verify_log` finds it.
        assert log.open().size == 300
        return
    # A tile is named by `verify_log`; on opening it is the tree that does not fit.
    named = "state" if name == "tile/0/000" else name
    with pytest.raises(LogTamperedError, match=named):
        log.open()


def test_a_lost_state_is_not_taken_for_a_new_log(log: Log) -> None:
    log.fill(10)
    state = log.directory / "state"
    state.unlink()
    with pytest.raises(LogTamperedError, match="not new"):
        log.open()
    (log.directory / "checkpoint").unlink()
    for path in sorted((log.directory / "tile").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (log.directory / "tile").rmdir()
    with pytest.raises(LogTamperedError, match="not new"):
        log.open()


@pytest.mark.parametrize("size", [10, 700])
def test_a_checkpoint_of_another_tree_is_refused(log: Log, tmp_path: Path, size: int) -> None:
    other = Log(tmp_path / "other", signer=log.signer)
    other.fill(5, first=5000)
    log.fill(size)
    (log.directory / "checkpoint").write_bytes(other.checkpoint)
    with pytest.raises(LogTamperedError, match=f"{size} entries were published"):
        log.open()
    # Also where `state` was made to agree.
    state = read_state(log.directory)
    assert state is not None
    write_state(log.directory, replace(state, swept=0))
    with pytest.raises(LogTamperedError, match="another root"):
        log.open()
