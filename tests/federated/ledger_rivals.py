"""Many coordinators that reserve for the same people at once, each a process of its own.

Forked from here, since starting Python once is what takes long. Each connects to the log's writer,
waits until all are there, reserves for its own study until the budget refuses, and appends to the
file `out` what it was allowed.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from audit.transport import BlockingLogClient
from federated.errors import BudgetExhaustedError
from tests.federated.ledgers import cost, make_ledger


def compete(number: int, url: str, socket: str, out: str, gate: int) -> None:
    log = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with BlockingLogClient(Path(socket), timeout_s=120) as client:
        ledger = make_ledger(url, client)
        os.read(gate, 1)
        for attempt in range(1000):
            try:
                reservation = ledger.reserve(
                    study=f"{number:064x}",
                    round_id=f"round-{attempt}",
                    participants=["a", "b", f"own-{number}"],
                    cost=cost(0.1),
                )
            except BudgetExhaustedError:
                return
            os.write(log, f"{reservation.id}\n".encode())
            ledger.spend(reservation)


def main() -> None:
    url, socket, out, count = sys.argv[1:]
    gate, opener = os.pipe()
    children = []
    for number in range(int(count)):
        child = os.fork()
        if child == 0:
            os.close(opener)
            status = 1
            try:
                compete(number, url, socket, out, gate)
                status = 0
            except BaseException:  # noqa: BLE001 - the parent is told by the status
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    # All begin at the end of the pipe, that is, at once.
    os.close(opener)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.write(1, f"{sum(status != 0 for status in statuses)}\n".encode())


if __name__ == "__main__":
    main()
