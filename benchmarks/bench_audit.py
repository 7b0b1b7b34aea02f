"""The audit log: how many entries a second are sequenced, and verified again.

`run()` is what `make bench` calls. By hand, `python -m benchmarks.bench_audit ENTRIES` appends,
publishes and verifies that many small entries and prints how the memory of the process grows,
which it must not.
"""

from __future__ import annotations

import asyncio
import resource
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.checkpoint import verifier_keys
from audit.log import LogWriter
from audit.publish import Publisher
from audit.verify import verify_log
from benchmarks.harness import Result

ORIGIN = "bench.example/log"
CALLERS = 256
ROUNDS = 5
ENTRIES_A_ROUND = CALLERS * 100
VERIFIED = CALLERS * 2048
#: About what an exchange with three patients comes to.
ENTRY_BYTES = 600
_MIB = 2**20


class _Signer:
    """Signs without a key server: what is measured is the log."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()

    def public_keys(self) -> Mapping[int, bytes]:
        return {1: self._key.public_key().public_bytes_raw()}

    def sign(self, message: bytes) -> tuple[int, bytes]:
        return 1, self._key.sign(message)


def _entry(number: int, size_bytes: int = ENTRY_BYTES) -> bytes:
    raw = f'{{"request":"r{number:012d}","stage":"log","time":{10**15 + number},"z":"'
    return (raw + "x" * max(0, size_bytes - len(raw) - 2) + '"}').encode()


async def _append(writer: LogWriter, entries: list[bytes], latencies_s: list[float]) -> float:
    """Seconds until all are sequenced, handed in by callers who each wait for their own."""
    feed = iter(entries)

    async def caller() -> None:
        for entry in feed:
            begin = time.perf_counter()
            await writer.append_async(entry)
            latencies_s.append(time.perf_counter() - begin)

    begin = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return time.perf_counter() - begin


def _ours(directory: Path, entries: list[bytes], latencies_s: list[float]) -> float:
    """Appends a second, with integration and publishing running beside them."""
    with (
        LogWriter.open(directory, origin=ORIGIN) as writer,
        Publisher(writer, _Signer()).start(),
    ):
        return len(entries) / asyncio.run(_append(writer, entries, latencies_s))


def _sqlite(path: Path, entries: list[bytes]) -> float:
    """Rows a second with one synchronous commit for each batch of as many rows."""
    database = sqlite3.connect(path, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("CREATE TABLE log (i INTEGER PRIMARY KEY, entry BLOB NOT NULL)")
        begin = time.perf_counter()
        for first in range(0, len(entries), CALLERS):
            database.execute("BEGIN")
            rows = [(entry,) for entry in entries[first : first + CALLERS]]
            database.executemany("INSERT INTO log (entry) VALUES (?)", rows)
            database.execute("COMMIT")
        return len(entries) / (time.perf_counter() - begin)
    finally:
        database.close()


def _fill(directory: Path, signer: _Signer, count: int, size_bytes: int = ENTRY_BYTES) -> None:
    """Append in blocks, with as many waiting as the queue takes."""

    async def all_of(writer: LogWriter) -> None:
        for first in range(0, count, 4096):
            last = min(first + 4096, count)
            entries = [_entry(number, size_bytes) for number in range(first, last)]
            await asyncio.gather(*map(writer.append_async, entries))

    with LogWriter.open(directory, origin=ORIGIN) as writer, Publisher(writer, signer) as publisher:
        asyncio.run(all_of(writer))
        publisher.publish()


def run() -> dict[str, Result]:
    """All figures of this suite."""
    entries = [_entry(number) for number in range(ENTRIES_A_ROUND)]
    appends: list[float] = []
    peers: list[float] = []
    slowest_ms: list[float] = []
    verified: list[float] = []
    with tempfile.TemporaryDirectory(prefix="havengate-bench-") as name:
        place = Path(name)
        for number in range(ROUNDS):
            latencies_s: list[float] = []
            appends.append(_ours(place / f"log{number}", entries, latencies_s))
            slowest_ms.append(statistics.quantiles(latencies_s, n=100)[98] * 1000)
            peers.append(_sqlite(place / f"peer{number}", entries))
        signer = _Signer()
        _fill(place / "verify", signer, VERIFIED)
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            verify_log(place / "verify", verifier_keys(ORIGIN, signer))
            verified.append(VERIFIED / (time.perf_counter() - begin))
    sqlite = f"SQLite, WAL, one synchronous=FULL commit per {CALLERS} rows"
    return {
        "audit.appends_per_s": Result.of(appends, unit="1/s", peer=sqlite, peer_rounds=peers),
        "audit.append_p99_ms": Result.of(slowest_ms, unit="ms"),
        "audit.verify_per_s": Result.of(verified, unit="1/s"),
    }


def memory(count: int) -> None:
    """Print the process's largest resident size as a log grows, then while it is verified."""
    signer = _Signer()
    with tempfile.TemporaryDirectory(prefix="havengate-bench-") as name:
        directory = Path(name) / "log"
        step = max(1, count // 10)
        for done in range(0, count, step):
            begin = time.perf_counter()
            _fill(directory, signer, min(step, count - done), size_bytes=64)
            rate = step / (time.perf_counter() - begin)
            print(f"{done + step:>10,} entries  {_peak_mib():6.1f} MiB  {rate:8,.0f}/s")
        begin = time.perf_counter()
        report = verify_log(directory, verifier_keys(ORIGIN, signer))
        rate = report.size / (time.perf_counter() - begin)
        print(f"{report.size:>10,} verified {_peak_mib():6.1f} MiB  {rate:8,.0f}/s")


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (_MIB if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    memory(int(sys.argv[1]))
