"""Dies by SIGKILL at one line after the other of reserving and spending. Run by `test_budget`.

Each attempt is a process of its own that opens the store, reserves, says so, spends, says so. It is
killed at the n-th line that it runs inside of the store, the keeper and the budget. What it said
must be in the ledger afterwards, and the ledger must verify.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from federated.node.budget import Budget
from federated.node.keeper import FileKeeper
from federated.node.store import Store
from tests.federated.node.ledgers import adding, contact

WATCHED = ("budget.py", "database.py", "keeper.py", "private_files.py")


def kill_at(line: int) -> None:
    seen = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.endswith(WATCHED):
            return None
        if event == "line":
            seen += 1
            if seen == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def attempt(path: Path, keys: Path, line: int, said: int) -> None:
    store = Store.open(path, FileKeeper(keys))
    budget = Budget(store, adding)
    me = store.person("me")
    kill_at(line)
    numbers = budget.reserve([me], contact(f"run-{line}"), now=1)
    os.write(said, b"r")
    budget.spend(numbers)
    os.write(said, b"s")
    sys.settrace(None)
    os._exit(0)


def verify(path: Path, keys: Path, line: int, said: bytes) -> None:
    store = Store.open(path, FileKeeper(keys))
    budget = Budget(store, adding)
    budget.verify()
    states = {one.run: one.state for one in budget.spends(store.person("me"))}
    if b"r" in said:
        assert f"run-{line}" in states, f"line {line}: reserved, and not in the ledger"
    if b"s" in said:
        assert states[f"run-{line}"] == "spent", f"line {line}: spent, and not in the ledger"
    store.close()


def main(path: Path, keys: Path) -> None:
    line, killed = 0, 0
    while True:
        line += 1
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            attempt(path, keys, line, writer)
        os.close(writer)
        _, status = os.waitpid(child, 0)
        said = os.read(reader, 16)
        os.close(reader)
        verify(path, keys, line, said)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        killed += 1
    sys.stdout.write(f"{killed}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
