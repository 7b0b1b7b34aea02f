"""The walk of `audit.verify` over a log's files: entries → leaf hashes → tiles → roots.

Every tile, bundle and journal frame is read and compared with what the entries give. Problems are
collected, not raised, so that one walk names all of them. It runs beside a writer too: what the
checkpoint covers does not change, and what changes is read in an order that keeps it consistent.
Memory does not grow with the log: one bundle, the right edge, and the hashes of the journal.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import msgspec

from audit.checkpoint import Checkpoint
from audit.errors import LogTamperedError, VerificationError
from audit.files import read_bounded
from audit.integrate import STATE, State, first_difference, read_state
from audit.journal import (
    JOURNAL,
    LOCK,
    MARK,
    Segment,
    check_mark,
    list_segments,
    read_journal,
    read_mark,
)
from audit.merkle import HASH_BYTES
from audit.pairing import Pairing, decode_head
from audit.recovery import CHECKPOINT, read_checkpoint
from audit.tiles import (
    MAX_BUNDLE_BYTES,
    TILE_BYTES,
    TILE_WIDTH,
    TreeEdge,
    bundle_path,
    encode_bundle,
    parse_bundle,
    partial_tiles,
    tile_path,
)

#: Problems that are listed; the rest is counted.
MAX_PROBLEMS = 1000
#: Tiles between two reports of progress.
_PROGRESS_TILES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that is not as the checkpoint says: where, and what."""

    where: str
    what: str


class Problems:
    """A bounded list of problems."""

    def __init__(self) -> None:
        self.listed: list[Problem] = []
        self.count = 0

    def add(self, where: str, what: str) -> None:
        """Note one."""
        self.count += 1
        if len(self.listed) < MAX_PROBLEMS:
            self.listed.append(Problem(where=where, what=what))


class Expected:
    """Roots that the tree has to have at some sizes, who says so, and what it means if not."""

    def __init__(self) -> None:
        self._roots: dict[int, list[tuple[bytes, str, str]]] = {}

    def add(self, checkpoint: Checkpoint | State, where: str, what: str) -> None:
        """Expect a root."""
        self._roots.setdefault(checkpoint.size, []).append((checkpoint.root, where, what))

    def within(self, start: int, end: int) -> list[int]:
        """Sizes in [start, end) at which a root is expected, in order."""
        return sorted(size for size in self._roots if start <= size < end)

    def check(self, edge: TreeEdge, problems: Problems) -> None:
        """Compare the tree as it is now."""
        for root, where, what in self._roots.pop(edge.size, ()):
            if edge.root() != root:
                problems.add(where, what)

    def left(self) -> Iterator[tuple[int, str]]:
        """Sizes that were never reached, and who expected them."""
        for size, roots in self._roots.items():
            for _, where, _ in roots:
                yield size, where


class Examination:
    """One walk. `size` and `checked` say afterwards how many entries there are and were hashed."""

    def __init__(
        self,
        directory: Path,
        expected: Expected,
        problems: Problems,
        *,
        retained_from: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._directory = directory
        self._expected = expected
        self._problems = problems
        self._retained_from = retained_from
        self._progress = progress
        self._edge = TreeEdge()
        self._journal_first = 0
        self._journal_leaves: list[bytes] = []
        self.pairing = Pairing()
        self.size = 0
        self.checked = 0

    def run(self, published: int) -> None:
        """Walk. `published` is the size of the checkpoint."""
        state = self._state()
        origin = "" if state is None else state.origin
        self._read_journal(origin)
        self._check_published(state, published)
        # Read again: the writer may have integrated, and then dropped segments, in between.
        state = self._state() or state
        integrated = published // TILE_WIDTH * TILE_WIDTH if state is None else state.size
        if state is not None:
            self._expected.add(state, STATE, "the entries have another root than it says")
        if self._journal_leaves and self._journal_first > integrated:
            self._problems.add(JOURNAL, f"no segment holds entry {integrated}")
        end = max(integrated, self._journal_first + len(self._journal_leaves))
        self._expected.check(self._edge, self._problems)
        for number in range(integrated // TILE_WIDTH):
            self._full_tile(number)
            if self._progress is not None and number % _PROGRESS_TILES == 0:
                self._progress(number * TILE_WIDTH, end)
        self._tail(origin, integrated, end)
        self._right_edge(published)
        self.size = self._edge.size
        for size, where in self._expected.left():
            self._problems.add(where, f"it covers {size} entries, only {self.size} are there")
        if self._progress is not None:
            self._progress(self.size, self.size)

    # --- State and journal ---------------------------------------------------------------------

    def _state(self) -> State | None:
        try:
            state = read_state(self._directory)
        except LogTamperedError as error:
            self._problems.add(STATE, str(error))
            return None
        if state is None:
            self._problems.add(STATE, "it is missing")
        return state

    def _check_published(self, state: State | None, published: int) -> None:
        """See that the checkpoint and the tiles are not older than what `state` says."""
        if state is None:
            return
        if state.swept > published:
            # The writer may have published since the checkpoint was read.
            try:
                found = read_checkpoint(self._directory)
            except LogTamperedError:
                found = None
            if found is None or found[1].size < state.swept:
                self._problems.add(CHECKPOINT, f"{state.swept} entries were published: rolled back")
        if state.size < published // TILE_WIDTH * TILE_WIDTH:
            self._problems.add(STATE, f"it knows of {state.size} entries of {published} published")

    def _read_journal(self, origin: str) -> None:
        """Check every frame of every segment; keep the leaf hashes."""
        try:
            # First, because a writer that runs moves on.
            marked = read_mark(self._directory)
            if marked is None:
                self._problems.add(MARK, "its checksum does not fit")
        except LogTamperedError as error:
            self._problems.add(MARK, str(error))
            marked = None
        try:
            segments = list_segments(self._directory)
        except OSError as error:
            self._problems.add(JOURNAL, f"it cannot be read: {error.strerror}")
            return
        if not segments:
            self._problems.add(JOURNAL, "it has no segment")
            return
        self._journal_first = segments[0][0]
        for number, (first, path) in enumerate(segments):
            if first != self._journal_first + len(self._journal_leaves):
                self._problems.add(self._name(path), f"entries before {first} are missing")
                return
            last = number + 1 == len(segments)
            try:
                with Segment(path, origin=origin, first=first) as segment:
                    self._read_segment(segment, last=last)
                    if last:
                        end = segment.offset
                        check_mark(self._directory, marked or (0, 0), first=first, end_bytes=end)
            except FileNotFoundError:
                # The writer dropped it just now; what it held is in bundles.
                self._journal_first = segments[min(number + 1, len(segments) - 1)][0]
                self._journal_leaves.clear()
            except (OSError, LogTamperedError) as error:
                self._problems.add(self._name(path), str(error))
                return

    def _read_segment(self, segment: Segment, *, last: bool) -> None:
        while (frame := segment.read()) is not None:
            self._journal_leaves.append(sha256(b"\x00" + frame.entry).digest())
        rest = segment.size_bytes - segment.offset
        if rest and not (last and self._writer_runs()):
            self._problems.add(
                self._name(segment.path),
                f"{rest} bytes from byte {segment.offset} on are no valid frames: changed, or an "
                "unfinished batch, which opening the log cuts off",
            )

    def _writer_runs(self) -> bool:
        try:
            with (self._directory / LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    # --- Tiles ---------------------------------------------------------------------------------

    def _full_tile(self, number: int) -> None:
        """A tile that is integrated: its bundle, its hashes, the tiles above that it fills."""
        first = number * TILE_WIDTH
        entries = self._bundle(number)
        tile = self._read(tile_path(0, number), TILE_BYTES)
        if entries is None:
            leaves = tile
        else:
            leaves = self._hash(first, entries)
            self._compare_leaves(tile_path(0, number), first, tile, leaves)
            self._compare_journal(first, leaves)
            self._partials(bundle_path(number), _bundle_prefix(entries))
        if leaves is None or len(leaves) != TILE_BYTES:
            # Already noted. Go on, so that all that is wrong gets named; no root will fit.
            leaves = bytes(TILE_BYTES)
        self._grow(first, leaves)

    def _bundle(self, number: int) -> list[bytes] | None:
        path = bundle_path(number)
        pruned = (number + 1) * TILE_WIDTH <= self._retained_from
        data = self._read(path, MAX_BUNDLE_BYTES, optional=pruned)
        if data is None:
            return None
        try:
            return parse_bundle(data, width=TILE_WIDTH, name=path)
        except VerificationError as error:
            self._problems.add(path, str(error))
            return None

    def _hash(self, first: int, entries: Sequence[bytes]) -> bytes:
        """Leaf hashes of entries, which also tell their story."""
        see = self.pairing.see
        for index, entry in enumerate(entries, first):
            try:
                see(index, decode_head(entry))
            except (msgspec.MsgspecError, ValueError):
                self._problems.add(f"entry {index}", "it does not read as an audit entry")
        self.checked += len(entries)
        return b"".join([sha256(b"\x00" + entry).digest() for entry in entries])

    def _compare_leaves(self, path: str, first: int, tile: bytes | None, leaves: bytes) -> None:
        if tile is not None and tile != leaves:
            index = first + first_difference(tile, leaves) // HASH_BYTES
            self._problems.add(path, f"it does not fit entry {index} in its bundle")

    def _compare_journal(self, first: int, leaves: bytes) -> None:
        """Compare entries that are in the journal as well."""
        start = max(first, self._journal_first)
        end = min(first + TILE_WIDTH, self._journal_first + len(self._journal_leaves))
        for index in range(start, end):
            at = (index - first) * HASH_BYTES
            if leaves[at : at + HASH_BYTES] != self._journal_leaves[index - self._journal_first]:
                self._problems.add(f"entry {index}", "its bundle and the journal differ")

    def _grow(self, first: int, leaves: bytes, *, integrated: bool = True) -> None:
        """Add a full tile to the tree; compare roots inside it, and the tiles above it."""
        sizes = self._expected.within(first + 1, first + TILE_WIDTH)
        if sizes:
            edge = self._edge.copy()
            for at in range(sizes[-1] - first):
                edge.append(leaves[at * HASH_BYTES : (at + 1) * HASH_BYTES])
                self._expected.check(edge, self._problems)
        for tile, data in self._edge.append_tile(leaves):
            if tile.level > 0 or not integrated:
                found = self._read(tile.path, TILE_BYTES, optional=not integrated)
                if found is not None and found != data:
                    child = tile.index * TILE_WIDTH + first_difference(found, data) // HASH_BYTES
                    self._problems.add(
                        tile.path, f"it does not fit hash {child} of the level below"
                    )
            self._partials(tile.path, _hashes_prefix(data))
        self._expected.check(self._edge, self._problems)

    def _tail(self, origin: str, start: int, end: int) -> None:
        """Entries that are only in the journal so far."""
        entries: list[bytes] = []
        try:
            for index, frame in read_journal(self._directory, origin=origin, start=start):
                if index >= end or index != self._edge.size + len(entries):
                    break
                entries.append(frame.entry)
                if len(entries) == TILE_WIDTH:
                    self._tail_tile(entries)
                    entries = []
        except (OSError, LogTamperedError):
            # Noted when the journal was read first.
            pass
        if entries:
            self._tail_tile(entries)

    def _tail_tile(self, entries: list[bytes]) -> None:
        first = self._edge.size
        leaves = self._hash(first, entries)
        path = bundle_path(first // TILE_WIDTH)
        if len(entries) == TILE_WIDTH:
            # A crash may have come between its tiles and the state that says they are there.
            found = self._read(path, MAX_BUNDLE_BYTES, optional=True)
            if found is not None and found != encode_bundle(entries):
                self._problems.add(path, "it does not fit the journal")
            self._grow(first, leaves, integrated=False)
        else:
            for at in range(0, len(leaves), HASH_BYTES):
                self._edge.append(leaves[at : at + HASH_BYTES])
                self._expected.check(self._edge, self._problems)
        self._partials(path, _bundle_prefix(entries))

    def _right_edge(self, published: int) -> None:
        """Partial tiles at the end of the log, and that those of the checkpoint are there."""
        for tile, data in self._edge.partial():
            full = tile_path(tile.level, tile.index)
            self._partials(full, _hashes_prefix(data))
        number, width = divmod(published, TILE_WIDTH)
        needed = [
            (tile.path, tile_path(tile.level, tile.index)) for tile in partial_tiles(published)
        ]
        if width and published > self._retained_from:
            needed.append((bundle_path(number, width), bundle_path(number)))
        for path, full in needed:
            if not any((self._directory / name).exists() for name in (path, full)):
                self._problems.add(path, "it is missing")

    def _partials(self, full: str, prefix: Callable[[int], bytes | None]) -> None:
        """Compare the partial tiles or bundles that lie beside where the full one goes."""
        directory = self._directory / f"{full}.p"
        try:
            names = [path.name for path in directory.iterdir()]
        except FileNotFoundError:
            return
        except OSError as error:
            self._problems.add(f"{full}.p", f"it cannot be read: {error.strerror}")
            return
        for name in names:
            # What begins with a point was being written when the writer died.
            if name.startswith("."):
                continue
            path = f"{full}.p/{name}"
            wanted = prefix(int(name)) if name.isascii() and name.isdigit() else None
            found = self._read(path, MAX_BUNDLE_BYTES, optional=True)
            if wanted is None:
                self._problems.add(path, "no part of the log has this width")
            elif found is not None and found != wanted:
                self._problems.add(
                    path, f"it is wrong from byte {first_difference(found, wanted)} on"
                )

    def _read(self, path: str, limit_bytes: int, *, optional: bool = False) -> bytes | None:
        try:
            return read_bounded(self._directory / path, limit_bytes)
        except FileNotFoundError:
            if not optional:
                self._problems.add(path, "it is missing")
        except (OSError, ValueError) as error:
            self._problems.add(path, f"it cannot be read: {error}")
        return None

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._directory))


def _hashes_prefix(data: bytes) -> Callable[[int], bytes | None]:
    return lambda width: data[: width * HASH_BYTES] if 0 < width * HASH_BYTES <= len(data) else None


def _bundle_prefix(entries: Sequence[bytes]) -> Callable[[int], bytes | None]:
    return lambda width: encode_bundle(entries[:width]) if 0 < width <= len(entries) else None
