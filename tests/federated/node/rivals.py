"""Reserves on a store as often as the budget allows; prints how often that was. One of several."""

from __future__ import annotations

import sys
from pathlib import Path

from federated.node.budget import Budget
from federated.node.keeper import FileKeeper
from federated.node.store import Store
from tests.federated.node.ledgers import adding, contact


def main(path: Path, keys: Path, name: str) -> None:
    store = Store.open(path, FileKeeper(keys))
    budget = Budget(store, adding)
    me = store.person("me")
    granted = 0
    for number in range(12):
        asked = contact(f"{name}-{number}", epsilon=0.1)
        with store.database.transaction():
            if not budget.judge([me], asked, epsilon=100.0, delta=0.0, questions=1, answers=1000):
                budget.reserve([me], asked, now=1)
                granted += 1
    sys.stdout.write(f"{granted}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
