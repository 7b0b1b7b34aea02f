"""kill -9 at every write, sync, rename, removal: nothing acknowledged is lost or doubled."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.checkpoint import parse_checkpoint, verifier_keys
from audit.log import LogWriter
from audit.publish import Publisher
from audit.reader import LogReader
from audit.verify import verify_log
from audit.witness import LocalSigner
from tests.audit.conftest import ORIGIN, entry
from tests.audit.killing_writer import SEED

KEYS = verifier_keys(ORIGIN, LocalSigner(Ed25519PrivateKey.from_private_bytes(SEED)))


class Writers:
    """Starts writers that die."""

    def __init__(self, process: subprocess.Popen[str], out: Path) -> None:
        self._process = process
        self._out = out

    def run(
        self, directory: Path, at: int, mode: str, *, count: int, first: int = 0
    ) -> list[list[str]]:
        """Run one until it is killed or done; what it printed, by words."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"directory": str(directory), "at": at, "mode": mode, "count": count, "first": first}
        self._process.stdin.write(json.dumps({**job, "out": str(self._out)}) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline().strip() in {"0", "-9"}
        return [line.split() for line in self._out.read_text().splitlines()]

    def calls(self, directory: Path, *, count: int, first: int = 0) -> int:
        """How many calls one makes that is not killed."""
        return int(self.run(directory, 0, "before", count=count, first=first)[-1][1])


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Writers]:
    command = [sys.executable, "-m", "tests.audit.killing_writer"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Writers(process, tmp_path_factory.mktemp("out") / "said")
        assert process.stdin is not None
        process.stdin.close()


def check_after_crash(directory: Path, said: list[list[str]], *, first: int, last: int) -> None:
    """Open what the dead writer left, let its caller repeat, and look at every entry."""
    acknowledged = {int(w[1]): int(w[2]) for w in said if w[0] == "acknowledged"}
    published = max([int(w[1]) for w in said if w[0] == "published"], default=0)
    signer = LocalSigner(Ed25519PrivateKey.from_private_bytes(SEED))
    with LogWriter.open(directory, origin=ORIGIN) as writer, Publisher(writer, signer) as publisher:
        if (directory / "checkpoint").exists():
            size = parse_checkpoint((directory / "checkpoint").read_bytes()).checkpoint.size
            assert published <= size <= writer.size
        # The caller got no answer for the last one, and hands all of them in again.
        for number in range(first, last):
            place = writer.append(entry(number), key=number.to_bytes(16, "big"))
            assert acknowledged.get(number, place.index) == place.index
        publisher.publish()
    entries = dict(LogReader(directory).read())
    for number, index in acknowledged.items():
        assert entries[index] == entry(number)
    numbers = Counter(json.loads(raw)["request"] for raw in entries.values())
    assert numbers == Counter(f"r{number}" for number in range(last))
    report = verify_log(directory, KEYS)
    assert report.size == report.sequenced == last


@pytest.mark.parametrize("mode", ["before", "after", "half"])
def test_nothing_acknowledged_is_lost_when_a_new_log_dies_at_any_call(
    tmp_path: Path, mode: str, writers: Writers
) -> None:
    total = writers.calls(tmp_path / "whole", count=4)
    for at in range(1, total + 1):
        directory = tmp_path / str(at)
        said = writers.run(directory, at, mode, count=4)
        check_after_crash(directory, said, first=0, last=4)
    assert total > 20


@pytest.mark.parametrize("mode", ["before", "after", "half"])
def test_nothing_is_lost_when_a_log_dies_while_it_fills_a_tile(
    tmp_path: Path, mode: str, prepared: Path, writers: Writers
) -> None:
    """From 250 entries to 258: tile, bundle, level 1, state, removal of partial tiles."""
    whole = tmp_path / "whole"
    shutil.copytree(prepared, whole)
    total = writers.calls(whole, count=8, first=250)
    at = 1
    while True:
        directory = tmp_path / str(at)
        shutil.copytree(prepared, directory)
        said = writers.run(directory, at, mode, count=8, first=250)
        check_after_crash(directory, said, first=250, last=258)
        # Threads share the calls out differently each time: go on until a run completes.
        if said and said[-1][0] == "calls":
            break
        at += 1
    assert at > total // 2


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, writers: Writers) -> Path:
    directory = tmp_path_factory.mktemp("prepared") / "log"
    writers.run(directory, 0, "before", count=250)
    return directory
