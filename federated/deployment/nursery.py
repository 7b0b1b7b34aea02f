"""All nodes of one machine, each a process of its own, forked from one that has imported all.

A node's libraries take seconds to import; ten nodes would take them ten times, on a machine with
two processors. Run as `python -m federated.deployment.nursery FILE…`, one `node.json` each, it
imports once and forks for each file. A child that ends is forked again; children are killed by the
kernel when this process dies. Who runs one node runs `federated.deployment.node_process` instead.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from keys.private_files import write_private

_PR_SET_PDEATHSIG: Final = 1
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 10.0
_STABLE_AFTER_S: Final = 30.0
_GRACE_S: Final = 6.0
_LOOK_S: Final = 0.1
#: Beside `node.json`: the process id of the node, text.
PID_FILE: Final = "node.pid"


@dataclass(slots=True)
class _Child:
    file: Path
    pid: int = 0
    born: float = 0.0
    due: float = 0.0
    pause_s: float = _FIRST_PAUSE_S


class Nursery:
    """Keeps one child for each file until SIGTERM or SIGINT. `live` is what a child does."""

    def __init__(self, files: list[Path], live: Callable[[list[str]], int]) -> None:
        self._live = live
        self._children = [_Child(file) for file in files]
        self._ending = False

    def run(self) -> None:
        """Fork, and fork again what ends; at a signal, end all and return."""
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, self._end)
        while not self._ending:
            now = time.monotonic()
            for child in self._children:
                if not child.pid and now >= child.due:
                    self._bear(child)
            self._bury()
            time.sleep(_LOOK_S)
        self._end_all()

    def _end(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a handler
        self._ending = True

    def _bear(self, child: _Child) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _be_born(child.file, parent, self._live)
        child.pid, child.born = pid, time.monotonic()
        write_private(child.file.parent / PID_FILE, str(pid).encode())

    def _bury(self) -> None:
        for child in self._children:
            if not child.pid or os.waitpid(child.pid, os.WNOHANG) == (0, 0):
                continue
            now = time.monotonic()
            stable = now - child.born > _STABLE_AFTER_S
            child.pause_s = _FIRST_PAUSE_S if stable else min(child.pause_s * 2, _LONGEST_PAUSE_S)
            child.pid, child.due = 0, now + child.pause_s

    def _end_all(self) -> None:
        for child in self._children:
            if child.pid:
                os.kill(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        while any(child.pid for child in self._children) and time.monotonic() < deadline:
            self._bury()
            time.sleep(_LOOK_S / 2)
        for child in self._children:
            if child.pid:
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)


def _be_born(file: Path, parent: int, live: Callable[[list[str]], int]) -> NoReturn:
    """Be a node: in a group of its own, dying with the parent, printing into its own log."""
    status = 70
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == parent:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            log = os.open(file.parent / "node.log", flags, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            status = live([str(file)])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def import_all() -> Callable[[list[str]], int]:
    """Import all that a node needs; return what a node does."""
    # Threads of libraries do not survive a fork.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    import dp_accounting.pld.privacy_loss_distribution
    import dp_accounting.rdp.rdp_privacy_accountant

    from federated.code_hash import installed_code_hash
    from federated.deployment import node_process

    # Of what is loaded now, not of what an update may put there later.
    installed_code_hash()
    del dp_accounting
    gc.collect()
    gc.freeze()
    return node_process.main


def main(arguments: list[str]) -> int:
    """Import, then fork."""
    os.umask(0o077)
    Nursery([Path(one) for one in arguments], import_all()).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
