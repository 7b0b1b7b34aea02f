"""The search index: entries a second, against a plain table of the same entries without any index.

Both read the same bytes from memory in batches of the same size and store them in SQLite with the
same journal mode and sync. The peer stores each entry as text; the index parses it and keeps
columns, persons' keys, labels, rules and words (FTS5).
"""

from __future__ import annotations

import random
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from audit.entry import encode_entry
from audit.index import AuditIndex
from audit.model import Actor, Entry, Resource
from benchmarks.harness import Result, alternate
from keys.sealed import new_key_id

ENTRIES = 100_000
PERSONS = 5_000
BATCH = 12_500


class _Log:
    """Entries in memory, so that only the index is measured."""

    origin = "bench.example/log"

    def __init__(self, entries: list[bytes]) -> None:
        self._entries = entries

    def size(self) -> int:
        return len(self._entries)

    def entry(self, index: int) -> bytes:
        return self._entries[index]

    def read(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes]]:
        yield from enumerate(self._entries[start:end], start)


def _entries() -> list[bytes]:
    """Intents and outcomes of reads by thousands of persons, 690 bytes each."""
    choose = random.Random(1)
    keys = [new_key_id() for _ in range(PERSONS)]
    found: list[bytes] = []
    for number in range(ENTRIES):
        actor, patient = (f"hg1.{choose.choice(keys)}.{'b' * 90}" for _ in range(2))
        final = number % 2
        entry = Entry(
            v=1,
            stage="outcome" if final else "intent",
            request=f"{number // 2:032x}",
            time=1_800_000_000_000_000 + number * 1000,
            tenant="clinic-1",
            actor=Actor(kind="person", role="clinician", sealed=actor),
            client=actor,
            purpose="TREAT",
            service="ehr",
            action="read",
            resources=(Resource(type="Observation", id=f"obs-{number // 2}"),),
            patients=(patient,),
            labels=("R", "PSY"),
            decision="allow",
            rules=("treating-clinician",),
            outcome="success" if final else None,
            status=200 if final else None,
        )
        found.append(encode_entry(entry))
    return found


def _index(directory: Path, log: _Log) -> float:
    with AuditIndex.anew(f"sqlite:///{directory}/index.sqlite3") as index:
        begun = time.perf_counter()
        index.refresh(log)
        return ENTRIES / (time.perf_counter() - begun)


def _plain_table(directory: Path, log: _Log) -> float:
    path = directory / "plain.sqlite3"
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("CREATE TABLE entries (log_index INTEGER PRIMARY KEY, entry TEXT)")
        begun = time.perf_counter()
        for start in range(0, log.size(), BATCH):
            connection.execute("BEGIN")
            rows = [(index, raw.decode()) for index, raw in log.read(start, start + BATCH)]
            connection.executemany("INSERT INTO entries VALUES (?, ?)", rows)
            connection.execute("COMMIT")
        return ENTRIES / (time.perf_counter() - begun)
    finally:
        connection.close()


def run() -> dict[str, Result]:
    """Measure both by turns."""
    log = _Log(_entries())
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        ours, peer = alternate(lambda: _index(directory, log), lambda: _plain_table(directory, log))
    return {
        "audit.index_per_s": Result.of(
            ours, unit="entries/s", peer="SQLite, plain table of the same JSON", peer_rounds=peer
        )
    }
