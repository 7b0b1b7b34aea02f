"""Programs that tests start and kill: a parent with a child, and what a nursery's child does."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from federated.deployment.nursery import Nursery
from federated.deployment.processes import ChildProcess


def live(arguments: list[str]) -> int:
    """Be a child of the nursery until killed; end at once where the file says so."""
    if "brief" in Path(arguments[0]).read_text():
        return 0
    time.sleep(600)
    return 0


def main(what: str, *arguments: str) -> None:
    match what:
        case "parent":
            log = Path(arguments[0])
            child = ChildProcess(
                "child", "tests.federated.deployment.parents", ["sleep"], log_file=log
            )
            child.start()
            while child.pid is None:
                time.sleep(0.01)
            sys.stdout.write(f"{child.pid}\n")
            sys.stdout.flush()
            time.sleep(600)
        case "sleep":
            time.sleep(600)
        case "nursery":
            Nursery([Path(one) for one in arguments], live).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
