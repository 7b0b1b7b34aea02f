"""From the journal into tiles: what lies on the disk for each size."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path

import pytest

from audit.errors import LogFullError, LogUnavailableError
from audit.integrate import State, first_difference, read_state, write_state
from audit.merkle import leaf_hash
from audit.reader import LogReader, read_bundle
from audit.tiles import TILE_WIDTH, TreeEdge, partial_tiles
from audit.verify import verify_log
from tests.audit.conftest import ORIGIN, Log, entry


def test_tiles_hold_the_hashes_of_the_entries_at_every_published_size(log: Log) -> None:
    edge = TreeEdge()
    for number in range(TILE_WIDTH * 2 + 3):
        edge.append(leaf_hash(entry(number)))
    log.fill(TILE_WIDTH * 2 + 3)
    for tile, data in edge.partial():
        assert (log.directory / tile.path).read_bytes() == data
    assert [t.path for t in partial_tiles(515)] == ["tile/0/002.p/3", "tile/1/000.p/2"]
    for number in (0, 1):
        hashes = b"".join(leaf_hash(one) for one in read_bundle(log.directory, number))
        assert (log.directory / f"tile/0/00{number}").read_bytes() == hashes


def test_level_two_appears_with_the_65536th_entry(log: Log) -> None:
    writer = log.open()
    writer.close()
    edge = TreeEdge()
    leaves = b"".join(leaf_hash(b"%d" % number) for number in range(TILE_WIDTH))
    filled = [tile for _ in range(TILE_WIDTH) for tile, _ in edge.append_tile(leaves)]
    assert [(t.level, t.index) for t in filled][-2:] == [(0, 255), (1, 0)]
    assert [(t.level, t.width) for t in partial_tiles(65_536)] == [(2, 1)]


def test_goes_on_after_a_restart_within_a_tile_and_within_a_segment(log: Log) -> None:
    total = 0
    for count in (100, 156, 1, 254, 2, 600, 255):
        writer = log.open()
        for number in range(total, total + count):
            writer.append(entry(number))
        total += count
        log.close()
        state = read_state(log.directory)
        assert state is not None
        assert state.size == total // TILE_WIDTH * TILE_WIDTH
    log.fill(1, first=total)
    verify_log(log.directory, log.keys)


@pytest.mark.parametrize("lost", ["tile", "state"])
def test_integration_may_be_repeated(log: Log, lost: str) -> None:
    """As after a crash between tiles and state, or before the tiles' names were durable."""
    log.fill(200)
    before = {name: (log.directory / name).read_bytes() for name in ("state", "checkpoint")}
    log.fill(500, first=200)
    for name, data in before.items():
        (log.directory / name).write_bytes(data)
    if lost == "tile":
        shutil.rmtree(log.directory / "tile/1")
        (log.directory / "tile/entries/001").unlink()
        (log.directory / "tile/0/000").unlink()
    log.fill(1, first=700)
    report = verify_log(log.directory, log.keys)
    assert report.size == 701


def test_without_room_for_tiles_entries_go_on_and_integration_catches_up(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = log.open()

    def full(path: Path, _: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("audit.integrate.replace_file", full)
        for number in range(1000):
            writer.append(entry(number))
        until_error(writer.integrate)
        assert isinstance(writer.status().integration_error, LogFullError)
        assert writer.integrator.size == 0
    assert writer.integrate() is None
    assert writer.integrator.size == 768
    log.close()
    log.fill(1, first=1000)
    assert verify_log(log.directory, log.keys).size == 1001


def until_error(attempt: object) -> None:
    deadline = time.monotonic() + 20
    while callable(attempt) and attempt() is None:
        assert time.monotonic() < deadline


def test_the_backlog_of_hashes_has_an_end(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audit.log.MAX_BACKLOG", 300)
    writer = log.open()

    def full(path: Path, _: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("audit.integrate.replace_file", full)
        with pytest.raises(LogUnavailableError, match="wait for integration"):  # noqa: PT012
            for number in range(1000):
                writer.append(entry(number))
        written = writer.size
    assert written < 310
    assert writer.integrate() is None
    assert writer.append(entry(0)).index == written
    log.close()
    assert len(list(LogReader(log.directory).read())) == written + 1


def test_a_state_reads_as_it_was_written(tmp_path: Path) -> None:
    state = State(origin=ORIGIN, size=512, root=leaf_hash(b"x"), swept=300)
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    assert read_state(tmp_path / "none") is None


def test_the_first_difference_is_found() -> None:
    assert first_difference(b"abc", b"abd") == 2
    assert first_difference(b"ab", b"abd") == 2
    assert first_difference(b"abd", b"ab") == 2
    assert first_difference(b"xb", b"ab") == 0
