"""Entries by range, beside a writer and without one."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audit.errors import AuditConfigurationError, VerificationError
from audit.log import LogWriter
from audit.reader import LogReader
from audit.tiles import bundle_path
from tests.audit.conftest import ORIGIN, Log, entry


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 720), st.none() | st.integers(0, 720))
def test_any_range_gives_exactly_its_entries(log: Log, start: int, end: int | None) -> None:
    if not log.directory.exists():
        log.fill(600)
        with LogWriter.open(log.directory, origin=ORIGIN) as writer:
            for number in range(600, 700):
                writer.append(entry(number))
    wanted = [
        (number, entry(number)) for number in range(start, min(700, 700 if end is None else end))
    ]
    assert list(LogReader(log.directory).read(start, end)) == wanted


def test_knows_what_is_published_and_what_is_only_sequenced(log: Log) -> None:
    writer = log.open()
    reader = LogReader(log.directory)
    assert (reader.origin, reader.size(), reader.published_size()) == (ORIGIN, 0, 0)
    assert reader.checkpoint() is None
    log.close()
    log.fill(300)
    writer = log.open()
    writer.append(entry(300))
    assert (reader.size(), reader.published_size()) == (301, 300)
    assert reader.entry(300) == entry(300)
    with pytest.raises(IndexError, match="no entry 301"):
        reader.entry(301)


def test_follows_a_log_that_is_written_meanwhile(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    # Segments go almost at once, so that entries move into bundles while they are read.
    monkeypatch.setattr("audit.integrate.KEY_WINDOW", 0)
    monkeypatch.setattr("audit.log.SEGMENT_BYTES", 4096)
    writer = log.open()
    count = 6000
    thread = threading.Thread(
        target=lambda: [writer.append(entry(number)) for number in range(count)]
    )
    thread.start()
    reader = LogReader(log.directory)
    seen: list[bytes] = []
    while len(seen) < count:
        for index, raw in reader.read(len(seen)):
            assert index == len(seen)
            seen.append(raw)
    thread.join()
    assert seen == [entry(number) for number in range(count)]


def test_a_pruned_range_is_named_and_the_rest_is_read(log: Log) -> None:
    log.fill(600)
    (log.directory / bundle_path(0)).unlink()
    reader = LogReader(log.directory)
    with pytest.raises(VerificationError, match="pruned"):
        list(reader.read())
    assert [index for index, _ in reader.read(256)] == list(range(256, 600))


def test_a_directory_without_a_log_says_so(tmp_path: Path) -> None:
    with pytest.raises(AuditConfigurationError, match="holds no log"):
        LogReader(tmp_path)
