"""Entries of a log by range, from bundles and, where there are none yet, from the journal.

Works beside a running writer and without one. What it returns is as found, not proven:
`audit.verify` and `audit.proof` prove. Used by: index, search, exports, command line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from audit.checkpoint import Checkpoint
from audit.errors import AuditConfigurationError, VerificationError
from audit.files import read_bounded
from audit.integrate import State, read_state
from audit.journal import read_journal
from audit.recovery import read_checkpoint
from audit.tiles import MAX_BUNDLE_BYTES, TILE_WIDTH, bundle_path, parse_bundle

#: How often a range that moved from the journal into bundles while it was read is looked for again.
_ATTEMPTS = 8


class LogReader:
    """Reads one log's directory. Holds nothing open between calls; any thread may use it."""

    def __init__(self, directory: Path) -> None:
        """Raises `AuditConfigurationError` if there is no log, `LogTamperedError` for a bad one."""
        self.directory = directory
        self.origin = self._state().origin

    def checkpoint(self) -> Checkpoint | None:
        """The published checkpoint, unverified; None if none was published yet."""
        found = read_checkpoint(self.directory)
        return None if found is None else found[1]

    def published_size(self) -> int:
        """How many entries the published checkpoint covers: these never change and never vanish."""
        checkpoint = self.checkpoint()
        return 0 if checkpoint is None else checkpoint.size

    def size(self) -> int:
        """How many entries are there, in bundles and journal.

        Beside a running writer the last batch may be counted before it is forced to the disk; only
        a power cut can take it back. `published_size` never counts such.
        """
        size = self._state().size
        for index, _ in self._journal(size):
            size = index + 1
        return size

    def entry(self, index: int) -> bytes:
        """One entry. Raises `IndexError` if it is not there, or as `read` does."""
        for _, entry in self.read(index, index + 1):
            return entry
        raise IndexError(f"The log has no entry {index} yet.")

    def read(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes]]:
        """Index and bytes of the entries from `start` up to `end`, or up to the last one there is.

        Raises `VerificationError` or `LogTamperedError` where an entry is missing (pruned entries
        are: begin behind them) or damaged.
        """
        at, attempts = start, 0
        while end is None or at < end:
            integrated = self._state().size
            if at < integrated:
                limit = integrated if end is None else min(end, integrated)
                yield from self._bundles(at, limit)
                at = limit
                continue
            before = at
            for index, entry in self._journal(at):
                if index != at or index == end:
                    break
                yield index, entry
                at = index + 1
            if at in {before, end}:
                # Nothing more, or the entry went into a bundle just now.
                attempts += 1
                if self._state().size <= at or attempts > _ATTEMPTS:
                    return

    def _state(self) -> State:
        state = read_state(self.directory)
        if state is None:
            raise AuditConfigurationError(
                f"{self.directory} holds no log. Set [audit] directory, or start the log first."
            )
        return state

    def _bundles(self, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Entries from full bundles; `end` is not beyond what is integrated."""
        for number in range(start // TILE_WIDTH, -(-end // TILE_WIDTH)):
            first = number * TILE_WIDTH
            for index, entry in enumerate(read_bundle(self.directory, number), first):
                if start <= index < end:
                    yield index, entry

    def _journal(self, start: int) -> Iterator[tuple[int, bytes]]:
        """Entries from the journal; ends early if the writer removes an integrated segment."""
        try:
            for index, frame in read_journal(self.directory, origin=self.origin, start=start):
                yield index, frame.entry
        except FileNotFoundError:
            return


def read_bundle(directory: Path, number: int, width: int = TILE_WIDTH) -> list[bytes]:
    """The entries of one bundle. Raises `VerificationError` if it is missing or damaged."""
    path = directory / bundle_path(number, width)
    try:
        data = read_bounded(path, MAX_BUNDLE_BYTES)
    except (OSError, ValueError) as error:
        raise VerificationError(
            f"{path} cannot be read: {error}. If these entries were pruned, begin behind them."
        ) from error
    return parse_bundle(data, width=width, name=str(path))
