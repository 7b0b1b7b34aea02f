"""What other processes do in the tests of several processes on one key table."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tests.keys.fakes import FakeKeyServer
from tests.keys.workbench import workbench

#: A key server that needs no connection: every process that knows the key is one.
SHARED_EPOCHS = {1: b"\x01" * 32}


def shared_server() -> FakeKeyServer:
    """Return one process's view of a key server that all share."""
    return FakeKeyServer(epoch_keys=dict(SHARED_EPOCHS))


def seal_many(url: str, person: str, count: int, seals_per_key: int, block: int) -> list[str]:
    """Seal a person's texts in this process."""
    with workbench(
        url, server=shared_server(), seals_per_key=seals_per_key, seals_per_reservation=block
    ) as bench:
        return [bench.seal(person, str(number).encode()) for number in range(count)]


def in_processes(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run the same work in several processes at once; return their results."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        return [future.result() for future in [pool.submit(work, *arguments) for _ in range(count)]]
