"""Writer processes that die, by SIGKILL, at their n-th call of the system that changes a disk.

Reads one job a line on its input, as JSON, and forks a writer for it: starting Python once is what
takes long. Answers with the exit status. The writer prints to the file `out`, through a descriptor
that is not counted, `acknowledged <number> <index>` for every append that it was told is sequenced,
`published <size>`, and at its end `calls <number of calls>`.

With `at` = 0 nothing is killed. `mode`: `before` dies before the call takes effect, `after` after
it, `half` writes half of the bytes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.log import LogWriter
from audit.publish import Publisher
from audit.witness import LocalSigner
from tests.audit.conftest import ORIGIN, entry

CALLS = (
    "pwrite",
    "fdatasync",
    "fsync",
    "rename",
    "replace",
    "unlink",
    "rmdir",
    "mkdir",
    "ftruncate",
)
SEED = b"\x07" * 32


class Killer:
    """Counts calls, and kills this process at one of them."""

    def __init__(self, at: int, mode: str) -> None:
        self.count = 0
        self._at = at
        self._mode = mode
        self._lock = threading.Lock()

    def wrap(self, name: str) -> None:
        real: Callable[..., Any] = getattr(os, name)

        def counted(*args: Any, **more: Any) -> Any:
            with self._lock:
                self.count += 1
                mine = self.count == self._at
            if mine and self._mode == "half" and name == "pwrite":
                descriptor, data, offset = args
                real(descriptor, bytes(data)[: len(data) // 2], offset)
                self._die()
            if mine and self._mode != "after":
                self._die()
            result = real(*args, **more)
            if mine:
                self._die()
            return result

        setattr(os, name, counted)

    @staticmethod
    def _die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def write(directory: str, at: int, mode: str, count: int, first: int) -> None:
    killer = Killer(at, mode)
    for name in CALLS:
        killer.wrap(name)
    signer = LocalSigner(Ed25519PrivateKey.from_private_bytes(SEED))
    writer = LogWriter.open(Path(directory), origin=ORIGIN)
    publisher = Publisher(writer, signer)
    for number in range(first, first + count):
        place = writer.append(entry(number), key=number.to_bytes(16, "big"))
        say(f"acknowledged {number} {place.index}")
        if (number - first) % (count // 3 + 1) == 0:
            checkpoint = publisher.publish()
            say(f"published {0 if checkpoint is None else checkpoint.size}")
    publisher.publish()
    publisher.close()
    writer.close()
    say(f"calls {killer.count}")


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        out = job.pop("out")
        child = os.fork()
        if child == 0:
            os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
            try:
                write(**job)
            except BaseException:  # noqa: BLE001 - the forked child must not fall into the loop
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        say(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main()
