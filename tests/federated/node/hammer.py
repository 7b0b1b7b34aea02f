"""Uses one store, or one keeper, as often as it can, beside others. Run by tests, several at once.

`keep PATH NAME` sets many secrets. `change STORE KEYS NAME` pauses, resumes, withdraws. `open STORE
KEYS` opens and reads till standard input closes. `erase STORE KEYS` erases everybody but "kept".
"""

from __future__ import annotations

import select
import sys
from collections.abc import Callable
from pathlib import Path

from federated.node.budget import Budget
from federated.node.consent import Consents, Scope
from federated.node.keeper import FileKeeper
from federated.node.store import Store
from tests.federated.node.ledgers import adding, contact

_MOOD = frozenset({"mood"})


def keep(path: str, name: str) -> None:
    keeper = FileKeeper(Path(path))
    for number in range(60):
        keeper.set(f"{name}-{number}", str(number))


def change(path: str, keys: str, name: str) -> None:
    scope = Scope(kinds=frozenset({"mean"}), columns=_MOOD, purposes=frozenset({"HRESCH"}))
    for number in range(12):
        store = Store.open(Path(path), FileKeeper(Path(keys)))
        me, budget = store.person("me"), Budget(store, adding)
        store.set_state(me, "paused" if number % 2 else "taking_part", now=number)
        store.withdraw(me, f"{name}-{number}", now=number)
        Consents(store).give([me], scope, now=number)
        budget.spend(budget.reserve([me], contact(f"{name}-{number}"), now=number))
        store.close()


def read(path: str, keys: str) -> None:
    while not select.select([sys.stdin], [], [], 0)[0]:
        store = Store.open(Path(path), FileKeeper(Path(keys)))
        for _ in range(3):
            kept = store.rows(store.person("kept"), _MOOD)
            assert kept.values["mood"].tolist() == [3.0]
        store.close()


def erase(path: str, keys: str) -> None:
    store = Store.open(Path(path), FileKeeper(Path(keys)))
    for person in store.people():
        if person.name != "kept":
            store.erase_person(person)
    store.close()


_WAYS: dict[str, Callable[..., None]] = {
    "keep": keep, "change": change, "open": read, "erase": erase,
}  # fmt: skip

if __name__ == "__main__":
    _WAYS[sys.argv[1]](*sys.argv[2:])
