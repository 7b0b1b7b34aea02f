"""The one writer: order, durability, bounds, idempotency, the clock."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from audit.errors import (
    AuditConfigurationError,
    LogLockedError,
    LogUnavailableError,
    MalformedEntryError,
)
from audit.files import sync_data
from audit.journal import list_segments
from audit.log import LogWriter
from audit.merkle import leaf_hash
from audit.reader import LogReader
from audit.waiting import Sequenced
from tests.audit.conftest import ORIGIN, Log, entry


def test_gives_indexes_in_order_with_the_leaf_hash(log: Log) -> None:
    writer = log.open()
    for number in range(600):
        assert writer.append(entry(number)) == Sequenced(number, leaf_hash(entry(number)))
    log.close()
    assert [raw for _, raw in LogReader(log.directory).read()] == [entry(n) for n in range(600)]


async def test_many_callers_in_one_loop_each_get_their_own_place(log: Log) -> None:
    writer = log.open()
    places = await asyncio.gather(*(writer.append_async(entry(n)) for n in range(5000)))
    assert sorted(place.index for place in places) == list(range(5000))
    for number, place in enumerate(places):
        assert place.leaf_hash == leaf_hash(entry(number))


def test_threads_and_loops_share_one_writer(log: Log) -> None:
    writer = log.open()
    places: list[Sequenced] = []

    async def some(first: int) -> None:
        places.extend(
            await asyncio.gather(*(writer.append_async(entry(first + n)) for n in range(99)))
        )

    def by_thread(first: int) -> None:
        places.extend(writer.append(entry(first + n)) for n in range(99))

    threads = [threading.Thread(target=by_thread, args=(1000 * n,)) for n in range(4)]
    threads += [threading.Thread(target=asyncio.run, args=(some(1000 * n),)) for n in range(4, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(place.index for place in places) == list(range(8 * 99))


class Disk:
    """Holds every sync of data up, on demand, or makes it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = threading.Event()
        self.free.set()
        self.reached = threading.Event()
        self.error: OSError | None = None
        self.syncs = 0
        monkeypatch.setattr("audit.journal.sync_data", self._sync)

    def hold(self) -> None:
        """Let the next sync, and those after it, wait for `free`."""
        self.reached.clear()
        self.free.clear()

    def _sync(self, descriptor: int) -> None:
        self.reached.set()
        self.free.wait(30)
        self.syncs += 1
        if self.error is not None:
            raise self.error
        sync_data(descriptor)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


async def test_nobody_is_told_before_the_disk_has_it(log: Log, disk: Disk) -> None:
    writer = log.open()
    disk.hold()
    waiter = writer.append_async(entry(0))
    await asyncio.to_thread(disk.reached.wait, 10)
    done, _ = await asyncio.wait([waiter], timeout=0.2)
    assert not done
    disk.free.set()
    assert (await waiter).index == 0


async def test_whatever_waits_is_one_batch_and_one_sync(log: Log, disk: Disk) -> None:
    writer = log.open()
    disk.hold()
    first = writer.append_async(entry(0))
    await asyncio.to_thread(disk.reached.wait, 10)
    others = [writer.append_async(entry(n)) for n in range(1, 257)]
    before = disk.syncs
    disk.free.set()
    await asyncio.gather(first, *others)
    assert disk.syncs - before <= 3


async def test_the_queue_has_an_end_in_entries_and_in_bytes(
    log: Log, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("audit.log.MAX_QUEUE_BYTES", 100_000)
    with LogWriter.open(log.directory, origin=ORIGIN, max_queue=10) as writer:
        disk.hold()
        waiting = [writer.append_async(entry(0))]
        await asyncio.to_thread(disk.reached.wait, 10)
        waiting += [writer.append_async(entry(n)) for n in range(10)]
        with pytest.raises(LogUnavailableError, match="wait already"):
            writer.append_async(entry(11))
        disk.free.set()
        await asyncio.gather(*waiting)
        disk.hold()
        waiting = [writer.append_async(entry(0))]
        await asyncio.to_thread(disk.reached.wait, 10)
        waiting += [writer.append_async(b"x" * 60_000)]
        with pytest.raises(LogUnavailableError, match="wait already"):
            writer.append_async(b"x" * 60_000)
        disk.free.set()
        await asyncio.gather(*waiting)


def test_a_failed_sync_halts_the_writer_for_good_and_is_not_tried_again(
    log: Log, disk: Disk
) -> None:
    writer = log.open()
    writer.append(entry(0))
    disk.error = OSError(5, "Input/output error")
    with pytest.raises(LogUnavailableError, match="disk failed"):
        writer.append(entry(1))
    disk.error = None
    syncs = disk.syncs
    for _ in range(3):
        with pytest.raises(LogUnavailableError, match="disk failed"):
            writer.append(entry(2))
    assert disk.syncs == syncs
    assert writer.status().failure is not None


@pytest.mark.parametrize("size", [0, 65_536])
def test_refuses_an_entry_without_or_with_too_many_bytes(log: Log, size: int) -> None:
    with pytest.raises(MalformedEntryError):
        log.open().append(b"x" * size)


def test_the_longest_entry_goes_all_the_way(log: Log) -> None:
    writer = log.open()
    longest = [os.urandom(65_535) for _ in range(300)]
    for one in longest:
        writer.append(one)
    log.close()
    assert [raw for _, raw in LogReader(log.directory).read()] == longest
    assert log.open().size == 300


def test_a_repeated_key_gives_the_first_place_also_after_a_restart(log: Log) -> None:
    writer = log.open()
    keys = [os.urandom(16) for _ in range(700)]
    for number, key in enumerate(keys):
        assert writer.append(entry(number), key=key).index == number
    for _ in range(2):
        for number, key in enumerate(keys):
            assert writer.append(entry(number), key=key).index == number
        log.close()
        writer = log.open()
    assert writer.size == 700
    with pytest.raises(MalformedEntryError, match="another entry"):
        writer.append(entry(99), key=keys[0])
    with pytest.raises(MalformedEntryError, match="16 bytes"):
        writer.append(entry(99), key=b"short")


async def test_a_key_repeated_within_one_batch_is_one_entry(log: Log, disk: Disk) -> None:
    writer = log.open()
    disk.hold()
    first = writer.append_async(entry(0))
    await asyncio.to_thread(disk.reached.wait, 10)
    key = os.urandom(16)
    twins = [writer.append_async(entry(1), key=key) for _ in range(5)]
    disk.free.set()
    places = await asyncio.gather(first, *twins)
    assert {place.index for place in places[1:]} == {1}
    assert writer.size == 2


def test_one_writer_at_a_time(log: Log) -> None:
    log.open()
    with pytest.raises(LogLockedError, match="Another process"):
        LogWriter.open(log.directory, origin=ORIGIN)


def test_refuses_the_directory_of_another_log(log: Log) -> None:
    log.fill(3)
    with pytest.raises(AuditConfigurationError, match=ORIGIN):
        LogWriter.open(log.directory, origin="other.example/log")


def test_a_closed_writer_refuses_and_what_waited_is_written(log: Log) -> None:
    writer = log.open()
    writer.append(entry(0))
    log.close()
    with pytest.raises(LogUnavailableError, match="closed"):
        writer.append(entry(1))


def test_files_are_for_their_owner_only(log: Log) -> None:
    old = os.umask(0)
    try:
        log.fill(300)
    finally:
        os.umask(old)
    for path in log.directory.rglob("*"):
        wanted = 0o700 if path.is_dir() else 0o600
        assert path.stat().st_mode & 0o777 == wanted, path


@pytest.mark.parametrize(
    ("steps", "told"),
    [([0, 10, 20], []), ([0, 10, 9.5], []), ([0, 100, 40], [(100, 40)]), ([9, 1, 0.5], [(9, 1)])],
)
def test_a_clock_that_is_set_back_gets_an_entry_before_the_next(
    log: Log, steps: list[float], told: list[tuple[float, float]]
) -> None:
    now = [steps[0]]
    seen: list[tuple[float, float]] = []

    def clock() -> float:
        return now[0]

    def step_entry(before: float, after: float) -> bytes:
        seen.append((before, after))
        return b"the clock was set back"

    writer = LogWriter.open(log.directory, origin=ORIGIN, clock=clock, clock_step_entry=step_entry)
    with writer:
        for number, now[0] in enumerate(steps):
            writer.append(entry(number))
    assert seen == told
    entries = [raw for _, raw in LogReader(log.directory).read()]
    assert entries.count(b"the clock was set back") == len(told)
    if told:
        assert entries[-1 if steps[0] == 0 else 1] != entries[0]


def test_a_full_segment_is_followed_by_another_and_old_ones_go(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("audit.integrate.KEY_WINDOW", 300)
    monkeypatch.setattr("audit.log.SEGMENT_BYTES", 4096)
    writer = log.open()
    for number in range(2000):
        writer.append(entry(number))
    log.close()
    first, _ = list_segments(log.directory)[0]
    assert 1000 < first <= 2000 - 300
    writer = log.open()
    assert writer.size == 2000
    writer.append(entry(2000))
    log.close()
    entries = [raw for _, raw in LogReader(log.directory).read()]
    assert entries == [entry(number) for number in range(2001)]


def run_in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_loop_that_was_closed_does_not_disturb_the_others(log: Log, disk: Disk) -> None:
    writer = log.open()
    disk.hold()

    async def leave() -> None:
        writer.append_async(entry(0))
        await asyncio.to_thread(disk.reached.wait, 10)
        writer.append_async(entry(1))

    asyncio.run(leave())
    thread = run_in_thread(lambda: writer.append(entry(2)))
    disk.free.set()
    thread.join(10)
    assert writer.append(entry(3)).index == 3


def test_refuses_a_directory_it_cannot_make(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LogUnavailableError, match="cannot be opened"):
        LogWriter.open(tmp_path / "file" / "log", origin=ORIGIN)


@pytest.mark.parametrize("origin", ["", "audit example", "audit+1", "audit\n1"])
def test_refuses_an_origin_under_which_nothing_could_be_published(
    tmp_path: Path, origin: str
) -> None:
    with pytest.raises(AuditConfigurationError, match="cannot name a log"):
        LogWriter.open(tmp_path / "log", origin=origin)
