"""The one writer of a log: callers wait until their entry is *sequenced*.

Sequenced means: it has its index, and the batch it came in is forced to the disk, and the file was
seen to be still in its place. Whatever waits when the disk is free is one batch, one write, one
sync. Not here: what the journal looks like (`audit.journal`), tiles (`audit.integrate`), processes
that hand their entries over a socket (`audit.transport`).
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from audit.errors import (
    AuditConfigurationError,
    AuditError,
    LogFullError,
    LogTamperedError,
    LogUnavailableError,
    MalformedEntryError,
    MalformedNoteError,
)
from audit.hold import as_halt, mark_halted, not_opened, take_lock
from audit.integrate import KEY_WINDOW, Integrator, Synced
from audit.journal import KEY_BYTES, SEGMENT_BYTES, JournalWriter
from audit.merkle import leaf_hash
from audit.note import parse_key_name
from audit.recovery import Recovered, RecoveryReport, recover
from audit.tiles import MAX_ENTRY_BYTES, TILE_WIDTH
from audit.waiting import AsyncWaiter, Outcome, Request, Sequenced, ThreadWaiter, again, deliver

MAX_BATCH_BYTES = 4 * 2**20
MAX_QUEUE_BYTES = 64 * 2**20
#: Entries that may wait for integration. Only a full or failing disk gets that far behind; the
#: hashes of those entries are in memory, 32 bytes each.
MAX_BACKLOG = 2**20
#: The wall clock may be corrected by this much without an entry about it.
CLOCK_TOLERANCE_S = 1.0
_RETRY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class LogStatus:
    """What a writer knows about itself. `failure` is set once it refuses entries for good."""

    size: int
    integrated: int
    waiting: int
    failure: AuditError | None
    #: Why integration does not get on at the moment; it is tried again.
    integration_error: AuditError | None


class LogWriter:
    """Appends to one log's directory. There is one per directory, in one process (flock).

    Open it with `LogWriter.open`; close it, or use it in `with`. Any thread and any event loop may
    append. After a failure other than a full disk every append raises, until an operator has acted.
    """

    def __init__(
        self,
        directory: Path,
        *,
        recovered: Recovered,
        lock_descriptor: int,
        origin: str,
        max_batch: int,
        max_queue: int,
        clock: Callable[[], float],
        clock_step_entry: Callable[[float, float], bytes] | None,
    ) -> None:
        self.directory = directory
        self.origin = origin
        self.recovery: RecoveryReport = recovered.report
        self._lock_descriptor = lock_descriptor
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._clock = clock
        self._clock_step_entry = clock_step_entry
        self._last_time = clock()
        # Guarded by `_guard`: the queue, the failure, and how far the journal is durable.
        self._guard = threading.Condition()
        self._queue: deque[Request] = deque()
        self._queued_bytes = 0
        self._failure: AuditError | None = None
        self._closing = False
        self._backlog: list[bytes] = recovered.leaves
        self._backlog_start = recovered.state.size
        self._synced = Synced(
            size=recovered.report.size,
            segment_first=recovered.segment_first,
            end_bytes=recovered.end_bytes,
        )
        # Used by the writing thread only.
        self._keys = recovered.keys
        self._journal = JournalWriter(
            directory,
            origin=origin,
            segment_bytes=SEGMENT_BYTES,
            lock_descriptor=lock_descriptor,
        )
        self._journal.open_segment(recovered.segment_first, recovered.end_bytes)
        self.integrator = Integrator(
            directory,
            state=recovered.state,
            edge=recovered.edge,
            synced=self.synced,
            leaves=self._acknowledged,
        )
        self._integration_error: AuditError | None = None
        self._integrate_now = threading.Event()
        # What the journal held when it was opened.
        self._integrate_now.set()
        self._threads = [
            threading.Thread(target=self._write_loop, name="audit-write", daemon=True),
            threading.Thread(target=self._integrate_loop, name="audit-integrate", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        origin: str,
        max_batch: int = 1024,
        max_queue: int = 8192,
        clock: Callable[[], float] = time.time,
        clock_step_entry: Callable[[float, float], bytes] | None = None,
    ) -> Self:
        """Open or make the log in `directory`, mend what a crash left, and start writing.

        `clock` is Unix seconds. When it steps back by more than a second between two batches,
        `clock_step_entry(before, after)` makes an entry that is sequenced before all that follow.
        `recovery` says what was mended. Raises `LogLockedError`, `LogTamperedError`,
        `AuditConfigurationError` or `LogUnavailableError`.
        """
        try:
            parse_key_name(origin)
        except MalformedNoteError as error:
            # Else entries would be taken, and no checkpoint over them could ever be signed.
            raise AuditConfigurationError(
                f"[audit] origin {origin!r} cannot name a log: no spaces, no plus sign, not empty, "
                "such as audit.example/clinic/1."
            ) from error
        lock = take_lock(directory)
        try:
            recovered = recover(directory, origin)
            return cls(
                directory,
                recovered=recovered,
                lock_descriptor=lock,
                origin=origin,
                max_batch=max_batch,
                max_queue=max_queue,
                clock=clock,
                clock_step_entry=clock_step_entry,
            )
        except OSError as error:
            os.close(lock)
            raise not_opened(error) from error
        except BaseException:
            os.close(lock)
            raise

    def append(
        self, entry: bytes, *, key: bytes | None = None, timeout_s: float | None = None
    ) -> Sequenced:
        """Hand in an entry and wait until it is sequenced. For threads.

        With a `key` of 16 random bytes a repeated call is harmless: it returns the first one's
        place. Raises `MalformedEntryError`, or `LogUnavailableError` (then release nothing; after
        a time-out the entry may still be written).
        """
        waiter = ThreadWaiter()
        self._submit(Request(entry, key, None, waiter))
        try:
            return waiter.result(timeout_s)
        except TimeoutError as error:
            raise LogUnavailableError(
                f"The entry was not sequenced within {timeout_s} s; it may still be written. "
                "Look at the disk that holds the log."
            ) from error

    def append_async(self, entry: bytes, *, key: bytes | None = None) -> AsyncWaiter:
        """Hand in an entry from the running event loop; the future is done once it is sequenced.

        Its result and errors are those of `append`. Being refused at once raises here.
        """
        loop = asyncio.get_running_loop()
        waiter: AsyncWaiter = loop.create_future()
        self._submit(Request(entry, key, loop, waiter))
        return waiter

    @property
    def size(self) -> int:
        """How many entries are sequenced."""
        return self._synced.size

    def synced(self) -> Synced:
        """How far the journal is durable."""
        return self._synced

    def status(self) -> LogStatus:
        """How the writer is doing."""
        with self._guard:
            return LogStatus(
                size=self._synced.size,
                integrated=self.integrator.size,
                waiting=len(self._queue),
                failure=self._failure,
                integration_error=self._integration_error,
            )

    def halt(self, error: AuditError) -> None:
        """Refuse every entry from now on. If the files were changed, also after a restart."""
        with self._guard:
            if self._failure is None:
                self._failure = error
            waiting = self._drain()
            self._guard.notify_all()
        self._integrate_now.set()
        if isinstance(error, LogTamperedError):
            mark_halted(self._journal.directory_descriptor, error)
        deliver([(request, error) for request in waiting])

    def close(self) -> None:
        """Sequence and integrate what waits, stop, and let go of the lock."""
        with self._guard:
            if self._closing:
                return
            self._closing = True
            self._guard.notify_all()
        self._threads[0].join()
        self._integrate_now.set()
        self._threads[1].join()
        if self._failure is None:
            self.integrate()
        self.integrator.close()
        self._journal.close()
        os.close(self._lock_descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- Handing in ----------------------------------------------------------------------------

    def _submit(self, request: Request) -> None:
        size = len(request.entry)
        if not 0 < size <= MAX_ENTRY_BYTES:
            raise MalformedEntryError(
                f"An entry has 1 to {MAX_ENTRY_BYTES} bytes, this one has {size}. "
                "Put references into it instead of content."
            )
        if request.key is not None and len(request.key) != KEY_BYTES:
            raise MalformedEntryError(f"An idempotency key has {KEY_BYTES} bytes.")
        with self._guard:
            if self._failure is not None:
                raise again(self._failure)
            if self._closing:
                raise LogUnavailableError("The log is closed: the program is shutting down.")
            if len(self._queue) >= self._max_queue or self._queued_bytes + size > MAX_QUEUE_BYTES:
                raise LogUnavailableError(
                    f"{len(self._queue)} entries wait already: the disk does not keep up. "
                    "Try again later, or look at the disk that holds the log."
                )
            self._queue.append(request)
            self._queued_bytes += size
            if len(self._queue) == 1:
                self._guard.notify_all()

    def _drain(self) -> list[Request]:
        waiting = list(self._queue)
        self._queue.clear()
        self._queued_bytes = 0
        return waiting

    # --- The writing thread --------------------------------------------------------------------

    def _write_loop(self) -> None:
        while batch := self._next_batch():
            try:
                outcomes = self._write(batch)
            except LogTamperedError as error:
                self.halt(error)
                outcomes = [error] * len(batch)
            except LogUnavailableError as error:
                outcomes = [error] * len(batch)
            except Exception as error:  # noqa: BLE001 - the journal's state is not known any more
                failure = as_halt(error)
                self.halt(failure)
                outcomes = [failure] * len(batch)
            deliver(list(zip(batch, outcomes, strict=True)))

    def _next_batch(self) -> list[Request]:
        """Wait for entries; an empty list means that the writer stops."""
        batch: list[Request] = []
        with self._guard:
            while not self._queue and not self._closing and self._failure is None:
                self._guard.wait()
            size = 0
            queue = self._queue
            while queue and len(batch) < self._max_batch and size < MAX_BATCH_BYTES:
                request = queue.popleft()
                size += len(request.entry)
                batch.append(request)
            self._queued_bytes -= size
        return batch

    def _write(self, batch: Sequence[Request]) -> list[Outcome]:
        """Sequence a batch; the outcomes stand in its order. Raises for the batch as a whole."""
        if len(self._backlog) > MAX_BACKLOG:
            raise LogUnavailableError(
                f"{len(self._backlog)} entries wait for integration: the log's disk does not take "
                "tiles. See the status of the log."
            )
        if self._journal.is_full:
            self._journal.new_segment(self._synced.size)
        first = self._synced.size
        leaves: list[bytes] = []
        frames: list[bytes] = []
        keys: dict[bytes, tuple[int, bytes]] = {}
        outcomes: list[Outcome] = []

        def add(entry: bytes, key: bytes | None, leaf: bytes) -> Sequenced:
            frames.append(self._journal.encode(entry, key, starts_batch=not frames))
            leaves.append(leaf)
            return Sequenced(first + len(leaves) - 1, leaf)

        now = self._clock()
        step = self._clock_step(now)
        if step is not None:
            add(step, None, leaf_hash(step))
        for request in batch:
            leaf = leaf_hash(request.entry)
            key = request.key
            if key is None:
                outcomes.append(add(request.entry, None, leaf))
                continue
            before = keys.get(key) or self._keys.get(key)
            if before is None:
                outcome = add(request.entry, key, leaf)
                keys[key] = (outcome.index, leaf)
                outcomes.append(outcome)
            else:
                outcomes.append(_repeated(before, leaf))
        self._journal.append(b"".join(frames))
        self._last_time = now
        self._acknowledge(leaves, keys)
        return outcomes

    def _acknowledge(self, leaves: Sequence[bytes], keys: dict[bytes, tuple[int, bytes]]) -> None:
        self._keys.update(keys)
        while len(self._keys) > KEY_WINDOW:
            del self._keys[next(iter(self._keys))]
        with self._guard:
            self._backlog.extend(leaves)
            self._synced = Synced(
                size=self._synced.size + len(leaves),
                segment_first=self._journal.first,
                end_bytes=self._journal.end_bytes,
            )
            waiting = len(self._backlog)
        if waiting >= TILE_WIDTH:
            self._integrate_now.set()

    def _clock_step(self, now: float) -> bytes | None:
        """An entry about the clock, if it went back since the last batch that was written."""
        before = self._last_time
        if now < before - CLOCK_TOLERANCE_S and self._clock_step_entry is not None:
            return self._clock_step_entry(before, now)
        return None

    # --- The integrating thread ----------------------------------------------------------------

    def _acknowledged(self, start: int, end: int) -> Sequence[bytes]:
        """Hashes under which entries were acknowledged; those before a full tile are let go."""
        with self._guard:
            offset = self._backlog_start
            return self._backlog[start - offset : end - offset]

    def _forget(self, before: int) -> None:
        with self._guard:
            del self._backlog[: before - self._backlog_start]
            self._backlog_start = before

    def _integrate_loop(self) -> None:
        while self._failure is None:
            self._integrate_now.wait()
            self._integrate_now.clear()
            if self._closing and not self._threads[0].is_alive():
                return
            error = self.integrate()
            if error is not None and not self._closing:
                # No room: leave the disk alone for a while, then look again.
                time.sleep(_RETRY_S)
                self._integrate_now.set()

    def integrate(self) -> AuditError | None:
        """Bring the tiles up to what is sequenced. Returns why it could not be done for now.

        Anything but a full disk halts the writer.
        """
        try:
            self._forget(self.integrator.advance())
        except LogFullError as error:
            self._integration_error = error
            return error
        except AuditError as error:
            self.halt(error)
            return error
        except Exception as error:  # noqa: BLE001 - whatever it was, nothing more may be promised
            failure = as_halt(error)
            self.halt(failure)
            return failure
        self._integration_error = None
        return None


def _repeated(before: tuple[int, bytes], leaf: bytes) -> Outcome:
    index, first_leaf = before
    if first_leaf != leaf:
        return MalformedEntryError(
            f"The idempotency key was used for another entry ({index}). Use each key once."
        )
    return Sequenced(index, leaf)
