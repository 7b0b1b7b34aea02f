"""Integration: from the journal into Merkle tiles and entry bundles.

Lives here: what is written when the tree grows, in which order, and the `state` file that says how
far it got. Not here: signing (`audit.publish`) and what a crash leaves (`audit.recovery`).

Every step may be repeated: a tile that is there already has to have the same bytes. Order: full
bundles and tiles, their directories, `state`; only then may journal segments go.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import msgspec

from audit.errors import AuditConfigurationError, LogFullError, LogTamperedError
from audit.files import (
    make_directory,
    read_bounded,
    replace_file,
    replace_file_durably,
    sync_directory,
)
from audit.journal import JOURNAL, NO_ROOM, Segment, damaged, list_segments, remove_segments
from audit.merkle import HASH_BYTES, consistency_ranges, leaf_hash
from audit.note import decode_base64, encode_base64
from audit.proof import DirectoryTiles, range_root
from audit.tiles import (
    MAX_BUNDLE_BYTES,
    TILE_WIDTH,
    TreeEdge,
    bundle_path,
    encode_bundle,
    full_tile_count,
    tile_path,
)

STATE = "state"
#: Journal segments are kept for this many entries longer than needed: their idempotency keys make a
#: caller's retry harmless even after a restart.
KEY_WINDOW = 65_536
_MAX_STATE_BYTES = 4096


class _StateFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    origin: str
    size: int
    root: str
    swept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How far integration got.

    `size` entries (a multiple of 256) are in full tiles and bundles, and have `root`. Partial
    tiles of published sizes below `swept` have been removed where full ones exist.
    """

    origin: str
    size: int
    root: bytes
    swept: int = 0


def read_state(directory: Path) -> State | None:
    """The state of a log's directory; None if there is none. Raises `LogTamperedError`."""
    path = directory / STATE
    try:
        body, _, checksum = read_bounded(path, _MAX_STATE_BYTES).partition(b"\n")
        # A body whose checksum does not fit is taken as no body at all.
        found = msgspec.json.decode(body if checksum == _checksum(body) else b"", type=_StateFile)
        root = decode_base64(found.root, what="root")
    except FileNotFoundError:
        return None
    except Exception as error:
        raise LogTamperedError(
            f"{path} at byte 0: it does not read as the writer left it."
        ) from error
    if found.size % TILE_WIDTH or found.size < 0 or len(root) != HASH_BYTES:
        raise LogTamperedError(f"{path}: size {found.size} or its root cannot be.")
    return State(origin=found.origin, size=found.size, root=root, swept=found.swept)


def write_state(directory: Path, state: State) -> None:
    """Replace the state, durably. Raises `LogFullError` with the old one in place, or `OSError`."""
    file = _StateFile(
        origin=state.origin, size=state.size, root=encode_base64(state.root), swept=state.swept
    )
    body = msgspec.json.encode(file)
    try:
        replace_file_durably(directory / STATE, body + b"\n" + _checksum(body))
    except OSError as error:
        if error.errno in NO_ROOM:
            raise LogFullError(
                f"No room for {directory / STATE}: entries stay in the journal until then. "
                "Free some space."
            ) from error
        raise


def _checksum(body: bytes) -> bytes:
    return f"{crc32(body):08x}\n".encode()


def check_origin(directory: Path, state: State, origin: str) -> None:
    """See that this is the log that was asked for. Raises `AuditConfigurationError`."""
    if state.origin != origin:
        raise AuditConfigurationError(
            f"{directory} holds the log {state.origin}, but the configuration names {origin}. "
            "Set [audit] origin or directory so that they belong together."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Synced:
    """How much of the journal is durable.

    That is `size` entries, the last of them in the segment that begins with `segment_first`, up to
    `end_bytes`.
    """

    size: int
    segment_first: int
    end_bytes: int


class Integrator:
    """Grows the tiles of one directory. Any thread may call it; calls take turns.

    `leaves(start, end)` returns the hashes under which those entries were acknowledged: what the
    journal gives back has to match them.
    """

    def __init__(
        self,
        directory: Path,
        *,
        state: State,
        edge: TreeEdge,
        synced: Callable[[], Synced],
        leaves: Callable[[int, int], Sequence[bytes]],
    ) -> None:
        self._directory = directory
        self._state = state
        self._edge = edge
        self._synced = synced
        self._leaves = leaves
        self._lock = threading.Lock()
        self._entries: list[bytes] = []
        self._full = (state.size, state.root)
        self._unwritten: list[tuple[Path, bytes]] = []
        self._unsynced: set[Path] = set()
        self._directories: set[Path] = set()
        self._segment: Segment | None = None

    @property
    def size(self) -> int:
        """How many entries are in durable full tiles and bundles."""
        return self._state.size

    def advance(self) -> int:
        """Integrate all that is durable; return how many entries are in full tiles now.

        Raises `LogFullError` (call again later), `LogTamperedError`, or `OSError`.
        """
        with self._lock:
            self._advance(self._synced())
            return self._state.size

    def cut(self) -> tuple[int, bytes]:
        """Integrate all that is durable, with partial tiles for the size it has now: size and root.

        Everything that a checkpoint over them covers is then on the disk. Raises as `advance` does.
        """
        with self._lock:
            self._advance(self._synced())
            size = self._edge.size
            for tile, data in self._edge.partial():
                self._unwritten.append((self._directory / tile.path, data))
            if self._entries:
                path = bundle_path(size // TILE_WIDTH, len(self._entries))
                self._unwritten.append((self._directory / path, encode_bundle(self._entries)))
            self._flush()
            self._sync()
            return size, self._edge.root()

    def tree_root(self, size: int) -> bytes:
        """Root of the first `size` (> 0) entries, as integrated."""
        with self._lock:
            return range_root(EdgeTiles(self._directory, self._edge), (0, size), self._edge.size)

    def proof(self, old_size: int, new_size: int) -> list[bytes]:
        """Consistency proof between two sizes that are not beyond what is integrated."""
        with self._lock:
            source = EdgeTiles(self._directory, self._edge)
            ranges = consistency_ranges(old_size, new_size)
            return [range_root(source, leaves, self._edge.size) for leaves in ranges]

    def sweep(self, published: int) -> None:
        """Remove the partial tiles of sizes before `published` where its tree has the full tile."""
        with self._lock:
            old = self._state.swept
            if published <= old:
                return
            level = 0
            while (end := full_tile_count(published, level)) > 0:
                # Sizes that were cut but never published may have left some in between as well.
                for index in range(full_tile_count(old, level), end):
                    self._remove_partials(tile_path(level, index))
                    if level == 0:
                        self._remove_partials(bundle_path(index))
                level += 1
            state = replace(self._state, swept=published)
            write_state(self._directory, state)
            self._state = state

    def close(self) -> None:
        """Close what is open."""
        with self._lock:
            if self._segment is not None:
                self._segment.close()
                self._segment = None

    def _advance(self, synced: Synced) -> None:
        self._flush()
        while self._edge.size < synced.size:
            end = min(synced.size, (self._edge.size // TILE_WIDTH + 1) * TILE_WIDTH)
            self._take(self._leaves(self._edge.size, end), synced)
            self._flush()
        size, root = self._full
        if size > self._state.size:
            self._sync()
            state = replace(self._state, size=size, root=root)
            write_state(self._directory, state)
            self._state = state
            remove_segments(self._directory, before=min(size, synced.size - KEY_WINDOW))

    def _take(self, leaves: Sequence[bytes], synced: Synced) -> None:
        """Read entries back from the journal into the tree, at most to the end of a tile."""
        for leaf in leaves:
            entry = self._read(synced)
            if leaf_hash(entry) != leaf:
                raise LogTamperedError(
                    f"Entry {self._edge.size} in the journal is not the one that was acknowledged: "
                    "the file was changed under the writer."
                )
            self._entries.append(entry)
            filled = self._edge.append(leaf)
            if filled:
                bundle = bundle_path(filled[0][0].index)
                self._unwritten.append((self._directory / bundle, encode_bundle(self._entries)))
                self._unwritten += [(self._directory / tile.path, data) for tile, data in filled]
                self._entries.clear()
                self._full = (self._edge.size, self._edge.root())

    def _read(self, synced: Synced) -> bytes:
        """The next entry of the journal, never looking past what is durable."""
        index = self._edge.size
        if self._segment is None:
            self._segment = open_segment_at(self._directory, self._state.origin, index)
        frame = self._segment.read(self._limit(synced))
        if frame is None and self._segment.first != synced.segment_first:
            # A segment is left only after it was synced, so the entry has to begin the next one.
            self._segment.close()
            self._segment = open_segment_at(self._directory, self._state.origin, index)
            frame = self._segment.read(self._limit(synced))
        if frame is None:
            raise damaged(self._segment, f"{synced.size} entries were acknowledged")
        return frame.entry

    def _limit(self, synced: Synced) -> int | None:
        if self._segment is not None and self._segment.first == synced.segment_first:
            return synced.end_bytes
        return None

    def _flush(self) -> None:
        """Write what is to be written; what could not be is kept for the next call."""
        while self._unwritten:
            path, data = self._unwritten[0]
            try:
                self._write_once(path, data)
            except OSError as error:
                if error.errno in NO_ROOM:
                    raise LogFullError(
                        f"No room for {path}: entries stay in the journal until then. "
                        "Free some space."
                    ) from error
                raise
            del self._unwritten[0]

    def _write_once(self, path: Path, data: bytes) -> None:
        try:
            there = read_bounded(path, MAX_BUNDLE_BYTES)
        except FileNotFoundError:
            if path.parent not in self._directories:
                make_directory(path.parent)
                self._directories.add(path.parent)
            replace_file(path, data)
        else:
            if there != data:
                raise LogTamperedError(
                    f"{path} at byte {first_difference(there, data)}: it is there already and does "
                    "not fit the journal. Keep the directory as it is and compare it with a copy."
                )
        # Also one that was there: the writer before may have died between its rename and the sync.
        self._unsynced.add(path.parent)

    def _sync(self) -> None:
        for directory in list(self._unsynced):
            sync_directory(directory)
            self._unsynced.discard(directory)

    def _remove_partials(self, full: str) -> None:
        directory = self._directory / f"{full}.p"
        try:
            names = list(directory.iterdir())
        except FileNotFoundError:
            return
        for name in names:
            name.unlink()
        directory.rmdir()
        self._directories.discard(directory)


class EdgeTiles:
    """Tiles of a directory, with those at the right edge from memory."""

    def __init__(self, directory: Path, edge: TreeEdge) -> None:
        self._tiles = DirectoryTiles(directory)
        self._edge = edge

    def tile(self, level: int, index: int, width: int) -> bytes:
        """As `audit.proof.TileSource` says."""
        if index == full_tile_count(self._edge.size, level):
            return self._edge.level(level)
        return self._tiles.tile(level, index, width)


def open_segment_at(directory: Path, origin: str, index: int) -> Segment:
    """Open the segment that holds, or will hold, entry `index`, standing before it.

    Raises `LogTamperedError` if there is none.
    """
    fitting = [found for found in list_segments(directory) if found[0] <= index]
    if not fitting:
        raise LogTamperedError(f"{directory / JOURNAL}: no segment holds entry {index}.")
    first, path = fitting[-1]
    segment = Segment(path, origin=origin, first=first)
    while segment.index < index:
        if segment.read() is None:
            segment.close()
            raise damaged(segment, f"entry {index} was acknowledged")
    return segment


def first_difference(one: bytes, other: bytes) -> int:
    """Offset of the first byte that differs, or where the shorter one ends."""
    if one == other[: len(one)]:
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
