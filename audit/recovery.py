"""Opening a log's directory: what a crash left is mended and reported, anything else is refused.

Lives here: making a new log, replaying the journal, cutting a torn tail, and seeing that journal,
tiles, `state` and checkpoint fit together. Not here: writing on (`audit.log`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from audit.checkpoint import Checkpoint, parse_checkpoint
from audit.errors import AuditError, LogTamperedError, VerificationError
from audit.files import make_directory, read_bounded
from audit.integrate import (
    KEY_WINDOW,
    STATE,
    EdgeTiles,
    State,
    check_origin,
    read_state,
    write_state,
)
from audit.journal import (
    JOURNAL,
    Segment,
    begin_journal,
    check_mark,
    damaged,
    encode_header,
    list_segments,
    read_mark,
)
from audit.merkle import EMPTY_ROOT, leaf_hash, perfect_root
from audit.note import MAX_NOTE_BYTES
from audit.proof import DirectoryTiles, range_root
from audit.tiles import TILE_WIDTH, TreeEdge, level_count

CHECKPOINT = "checkpoint"
#: Written when tampering was noticed; while it is there, nobody writes to the log.
HALTED = "halted"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryReport:
    """What opening a log found. `cut_bytes` were of a batch that was never acknowledged."""

    size: int
    replayed: int
    created: bool = False
    cut_bytes: int = 0
    cut_file: str = ""
    cut_offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """Everything a writer needs to go on."""

    report: RecoveryReport
    state: State
    edge: TreeEdge
    #: Hashes of the entries from `state.size` on, which are only in the journal.
    leaves: list[bytes]
    keys: dict[bytes, tuple[int, bytes]]
    segment_first: int
    end_bytes: int


def recover(directory: Path, origin: str) -> Recovered:
    """Open a log's directory, or make it. The caller holds its lock.

    Raises `LogTamperedError`, naming file and offset, `AuditConfigurationError`, or `OSError`.
    """
    _refuse_if_halted(directory)
    state, created = _open_state(directory, origin)
    edge = _load_edge(directory, state)
    journal = _replay(directory, origin, state.size)
    size = state.size + len(journal.leaves)
    _check_checkpoint(directory, state, edge, journal.leaves)
    report = RecoveryReport(
        size=size,
        replayed=len(journal.leaves),
        created=created,
        cut_bytes=journal.cut_bytes,
        cut_file=journal.path.name if journal.cut_bytes else "",
        cut_offset=journal.end_bytes if journal.cut_bytes else 0,
    )
    return Recovered(
        report=report,
        state=state,
        edge=edge,
        leaves=journal.leaves,
        keys=journal.keys,
        segment_first=journal.first,
        end_bytes=journal.end_bytes,
    )


def read_checkpoint(directory: Path) -> tuple[bytes, Checkpoint] | None:
    """The published checkpoint, bytes and parsed, unverified; None if nothing was published yet.

    Raises `LogTamperedError` if it does not parse.
    """
    path = directory / CHECKPOINT
    try:
        data = read_bounded(path, MAX_NOTE_BYTES)
        return data, parse_checkpoint(data).checkpoint
    except FileNotFoundError:
        return None
    except (AuditError, ValueError) as error:
        raise LogTamperedError(f"{path} at byte 0: {error}") from error


def _refuse_if_halted(directory: Path) -> None:
    path = directory / HALTED
    if path.exists():
        raise LogTamperedError(
            f"{path}: the writer stopped because the log's files were changed under it. "
            "Read that file, run `havengate audit verify`, find out who did it; "
            "then remove the file to write again."
        )


def _open_state(directory: Path, origin: str) -> tuple[State, bool]:
    state = read_state(directory)
    if state is not None:
        check_origin(directory, state, origin)
        return state, False
    leftovers = [name for name in (CHECKPOINT, "tile") if (directory / name).exists()]
    journal = list_segments(directory) if (directory / JOURNAL).is_dir() else []
    # A crash while the log was made leaves at most an empty first segment.
    empty = len(encode_header(origin, 0))
    if leftovers or any(path.stat().st_size > empty or first for first, path in journal):
        raise LogTamperedError(f"{directory / STATE} is missing, but the log is not new.")
    make_directory(directory / JOURNAL)
    begin_journal(directory, origin=origin)
    state = State(origin=origin, size=0, root=EMPTY_ROOT)
    write_state(directory, state)
    return state, True


def _load_edge(directory: Path, state: State) -> TreeEdge:
    """Rebuild the right edge above full tiles. Raises `LogTamperedError` if it does not fit."""
    source = DirectoryTiles(directory)
    levels: list[bytes] = [b""]
    try:
        level = 1
        while count := level_count(state.size, level):
            first = count - count % TILE_WIDTH
            # Partial tiles lie on disk for published sizes only; their hashes come from below.
            full = [source.tile(level - 1, index, TILE_WIDTH) for index in range(first, count)]
            levels.append(b"".join(perfect_root(data) for data in full))
            level += 1
        edge = TreeEdge(state.size, levels)
    except VerificationError as error:
        raise LogTamperedError(str(error)) from error
    if edge.root() != state.root:
        raise LogTamperedError(
            f"{directory / STATE}: the tiles of {state.size} entries have another root. "
            "Run `havengate audit verify` to find the tile that was changed."
        )
    return edge


@dataclass(frozen=True, slots=True, kw_only=True)
class _Replay:
    leaves: list[bytes]
    keys: dict[bytes, tuple[int, bytes]]
    path: Path
    first: int
    end_bytes: int
    cut_bytes: int


def _replay(directory: Path, origin: str, integrated: int) -> _Replay:
    """Read the whole journal. Raises `LogTamperedError` for anything but a torn last batch."""
    segments = _find_segments(directory, integrated)
    leaves: list[bytes] = []
    keys: dict[bytes, tuple[int, bytes]] = {}
    first, path = segments[-1]
    for number, (first, path) in enumerate(segments):
        with Segment(path, origin=origin, first=first) as segment:
            _read_segment(segment, integrated, leaves, keys)
            cut = segment.size_bytes - segment.offset
            if number + 1 < len(segments):
                following = segments[number + 1][0]
                if cut or segment.index != following:
                    raise damaged(segment, f"the next segment begins with entry {following}")
            elif segment.index < integrated:
                raise damaged(segment, f"{integrated} entries were integrated")
            elif cut and (later := segment.batch_starts_after(segment.offset)) is not None:
                raise damaged(segment, f"a later batch stands at byte {later}")
            end = segment.offset
    check_mark(directory, read_mark(directory) or (0, 0), first=first, end_bytes=end)
    recent = dict(list(keys.items())[-KEY_WINDOW:])
    return _Replay(leaves=leaves, keys=recent, path=path, first=first, end_bytes=end, cut_bytes=cut)


def _find_segments(directory: Path, integrated: int) -> Sequence[tuple[int, Path]]:
    journal = directory / JOURNAL
    try:
        segments = list_segments(directory)
    except OSError as error:
        raise LogTamperedError(f"{journal} cannot be read: {error.strerror}.") from error
    if not segments or segments[0][0] > integrated:
        raise LogTamperedError(
            f"{journal}: no segment holds what follows entry {integrated}; it was removed."
        )
    return segments


def _read_segment(
    segment: Segment, integrated: int, leaves: list[bytes], keys: dict[bytes, tuple[int, bytes]]
) -> None:
    while (frame := segment.read()) is not None:
        index = segment.index - 1
        if index < integrated and frame.key is None:
            continue
        leaf = leaf_hash(frame.entry)
        if index >= integrated:
            leaves.append(leaf)
        if frame.key is not None:
            keys[frame.key] = (index, leaf)


def _check_checkpoint(
    directory: Path, state: State, edge: TreeEdge, leaves: Sequence[bytes]
) -> None:
    found = read_checkpoint(directory)
    path = directory / CHECKPOINT
    published = 0 if found is None else found[1].size
    if published < state.swept:
        raise LogTamperedError(
            f"{path}: {state.swept} entries were published, but it covers {published} or is gone. "
            "Restore the newest one; a witness may have it."
        )
    if found is None:
        return
    _, checkpoint = found
    size = edge.size + len(leaves)
    if checkpoint.origin != state.origin:
        raise LogTamperedError(f"{path} at byte 0: it is of the log {checkpoint.origin}.")
    if checkpoint.size > size:
        raise LogTamperedError(
            f"{directory / JOURNAL}: the checkpoint covers {checkpoint.size} entries, "
            f"but only {size} are there: the journal was cut."
        )
    if _root_at(directory, checkpoint.size, edge, leaves) != checkpoint.root:
        raise LogTamperedError(
            f"{path}: its {checkpoint.size} entries have another root than the files here: the "
            "checkpoint or the log was replaced."
        )


def _root_at(directory: Path, size: int, edge: TreeEdge, leaves: Sequence[bytes]) -> bytes:
    if size >= edge.size:
        grown = edge.copy()
        for leaf in leaves[: size - edge.size]:
            grown.append(leaf)
        return grown.root()
    if size == 0:
        return EMPTY_ROOT
    try:
        return range_root(EdgeTiles(directory, edge), (0, size), edge.size)
    except VerificationError as error:
        raise LogTamperedError(str(error)) from error
