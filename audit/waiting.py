"""Who waits for an entry, and how they are woken.

Lives here: what an append returns and what waits for it, in threads and in event loops. Used by:
`audit.log`, `audit.transport`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from audit.errors import AuditError


@dataclass(frozen=True, slots=True)
class Sequenced:
    """An entry that is durable: its place in the log for good, and its leaf hash."""

    index: int
    leaf_hash: bytes


Outcome = Sequenced | AuditError
AsyncWaiter = asyncio.Future[Sequenced]
ThreadWaiter = Future[Sequenced]


@dataclass(slots=True)
class Request:
    """An entry that waits to be sequenced, and who waits for it."""

    entry: bytes
    key: bytes | None
    loop: asyncio.AbstractEventLoop | None
    waiter: AsyncWaiter | ThreadWaiter


def deliver(outcomes: Sequence[tuple[Request, Outcome]]) -> None:
    """Wake those who wait: one call into each event loop, whatever the number of futures."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Request, Outcome]]] = {}
    for one in outcomes:
        if one[0].loop is None:
            _settle([one])
        else:
            by_loop.setdefault(one[0].loop, []).append(one)
    for loop, some in by_loop.items():
        try:
            loop.call_soon_threadsafe(_settle, some)
        except RuntimeError:
            # The loop was closed: nobody waits there any more.
            continue


def _settle(outcomes: Sequence[tuple[Request, Outcome]]) -> None:
    for request, outcome in outcomes:
        if request.waiter.done():
            continue
        if isinstance(outcome, Sequenced):
            request.waiter.set_result(outcome)
        else:
            request.waiter.set_exception(again(outcome))


def again(error: AuditError) -> AuditError:
    """The same error for another caller: an exception object belongs to one traceback."""
    return type(error)(str(error))
