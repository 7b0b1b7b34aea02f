"""Dies by SIGKILL at one line after the other of a change to a store. Run by tests.

Each attempt is a process of its own that opens the store, changes it step by step, and says each
step when it is done. It is killed at the n-th line that it runs inside of the store and below it,
a line that comes again and again within a step counted twice.
What it said must be there afterwards, the ledger must verify, and a copy of the files from before
must be refused. `spend` withdraws, reserves and spends; `erase` erases a person.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from federated.errors import LedgerError, StoreError
from federated.node.budget import Budget
from federated.node.keeper import FileKeeper
from federated.node.store import Person, Store
from tests.federated.node.ledgers import adding, contact
from tests.federated.node.tables import fill

WATCHED = (
    "budget.py", "chest.py", "database.py", "generation.py", "keeper.py", "private_files.py",
    "store.py",
)  # fmt: skip
MOOD = frozenset({"mood"})


def step() -> None:
    """Called between two steps."""


def kill_at(line: int) -> None:
    seen = 0
    visits: Counter[tuple[str, int]] = Counter()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal seen
        if frame.f_code is step.__code__:
            visits.clear()
        if not frame.f_code.co_filename.endswith(WATCHED):
            return None
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            visits[place] += 1
            seen += visits[place] <= 2
            if seen >= line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def spend(store: Store, line: int, say: Callable[[bytes], object]) -> None:
    budget, me = Budget(store, adding), store.person("me")
    kill_at(line)
    store.withdraw(me, f"study-{line}", now=1)
    say(b"w")
    step()
    numbers = budget.reserve([me], contact(f"run-{line}"), now=1)
    say(b"r")
    step()
    budget.spend(numbers)
    say(b"s")


def verify_spend(store: Store, line: int, said: bytes) -> None:
    me = store.person("me")
    states = {one.run: one.state for one in Budget(store, adding).spends(me)}
    if b"w" in said:
        assert me.number in store.withdrawn(f"study-{line}"), f"line {line}: forgotten"
    if b"r" in said:
        assert f"run-{line}" in states, f"line {line}: reserved, and not in the ledger"
    if b"s" in said:
        assert states[f"run-{line}"] == "spent", f"line {line}: spent, and not in the ledger"


def erase(store: Store, line: int, say: Callable[[bytes], object]) -> None:
    person = store.person(f"gone-{line}")
    kill_at(line)
    store.erase_person(person)
    say(b"e")


def verify_erase(store: Store, line: int, said: bytes) -> None:
    for number in range(3):
        rows = store.rows(store.person(f"p{number}"), MOOD)
        assert rows.values["mood"].tolist() == [float(number)], f"line {line}: keys were lost"
    left = {person.name for person in store.people()}
    assert not (said and f"gone-{line}" in left), f"line {line}: erased, and still there"
    if f"gone-{line}" in left:
        assert store.rows(store.person(f"gone-{line}"), MOOD).values["mood"].tolist() == [9.0]
        store.erase_person(store.person(f"gone-{line}"))


def verify_copy(copy: Path, keeper: FileKeeper, gone: str, said: bytes) -> None:
    """What was copied before the change: refused if any of it was said, and nobody erased opens."""
    try:
        store = Store.open(copy, keeper)
    except StoreError:
        return
    erased: list[Person] = [person for person in store.people() if person.name == gone]
    assert not erased, f"{gone} opens from a copy"
    try:
        Budget(store, adding).ready()
    except LedgerError:
        return
    finally:
        store.close()
    assert not said, f"{gone or said!r}: a copy from before passes"


def before(mode: str, path: Path, keeper: FileKeeper, line: int) -> Path:
    store = Store.open(path, keeper)
    if mode == "erase":
        fill(store, {f"gone-{line}": {"mood": [9.0]}})
    store.close()
    copy = path.with_name("copy.store")
    for suffix in ("", ".keys"):
        shutil.copy(path.with_name(path.name + suffix), copy.with_name(copy.name + suffix))
    return copy


def attempt(mode: str, path: Path, keeper: FileKeeper, line: int) -> tuple[bytes, int]:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        store = Store.open(path, keeper)
        {"spend": spend, "erase": erase}[mode](store, line, lambda word: os.write(writer, word))
        sys.settrace(None)
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    said = os.read(reader, 16)
    os.close(reader)
    return said, status


def main(mode: str, path: Path, keeper: FileKeeper) -> None:
    line, killed = 0, 0
    while True:
        line += 1
        copy = before(mode, path, keeper, line)
        said, status = attempt(mode, path, keeper, line)
        store = Store.open(path, keeper)
        Budget(store, adding).verify()
        {"spend": verify_spend, "erase": verify_erase}[mode](store, line, said)
        store.close()
        verify_copy(copy, keeper, f"gone-{line}" if mode == "erase" else "", said)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        killed += 1
    assert not list(path.parent.rglob(".*")), "what a crash left is still there"
    sys.stdout.write(f"{killed}\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), FileKeeper(Path(sys.argv[3])))
