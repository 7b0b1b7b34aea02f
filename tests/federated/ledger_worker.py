"""A coordinator that reserves, dispatches and spends, and dies by SIGKILL at its n-th write.

Reads one job a line on its input, as JSON, and forks a coordinator for it: starting Python once is
what takes long. Answers with the exit status. A write is a statement or commit of the database, or
a write or sync of the log's files. What was really dispatched is appended to the file `out`,
through a descriptor that is not counted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from sqlalchemy import event

from audit.log import LogWriter
from federated.errors import BudgetExhaustedError
from tests.federated.ledgers import STUDY, cost, make_ledger
from tests.federated.studies import ORIGIN


class Killer:
    """Counts writes, and kills this process at one of them."""

    def __init__(self, at: int) -> None:
        self.count = 0
        self._at = at
        self._lock = threading.Lock()

    def hit(self, *_: Any) -> None:
        with self._lock:
            self.count += 1
            if self.count == self._at:
                os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, name: str) -> None:
        real = getattr(os, name)

        def counted(*args: Any, **more: Any) -> Any:
            self.hit()
            return real(*args, **more)

        setattr(os, name, counted)


def run(job: dict[str, Any]) -> None:
    out = os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    write, sync = os.write, os.fsync
    killer = Killer(job["at"])
    with LogWriter.open(Path(job["log"]), origin=ORIGIN) as log:
        ledger = make_ledger(job["url"], log, cap=job["cap"])
        for name in ("pwrite", "fdatasync"):
            killer.wrap(name)
        engine = ledger._database.engine  # to be killed inside of it
        for moment in ("before_cursor_execute", "after_cursor_execute", "commit"):
            event.listen(engine, moment, killer.hit)
        for number in range(job["rounds"]):
            try:
                reservation = ledger.reserve(
                    study=STUDY,
                    round_id=f"{job['name']}-{number}",
                    participants=job["participants"],
                    cost=cost(job["epsilon"]),
                )
            except BudgetExhaustedError:
                break
            write(out, f"{reservation.round}\n".encode())
            sync(out)
            ledger.spend(reservation)
    write(out, f"writes {killer.count}\n".encode())


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(json.loads(line))
                status = 0
            except BaseException:  # noqa: BLE001 - the parent is told by the status
                traceback.print_exc()
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        os.write(1, f"{os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    main()
