"""The journal: sequenced entries on disk, before tiles hold them.

Lives here: the bytes of segments, appending and cutting, reading, what a crash may leave and what
it may not. Not here: who waits for an append (`audit.log`), tiles (`audit.integrate`).

A segment `journal/<index of its first entry, 16 digits>.seg` is

    "HGJ1" ‖ u64 first index ‖ u16 length of origin ‖ origin ‖ u32 CRC-32 of all before
    then frames:  u8 flags ‖ u8 0 ‖ u16 length ‖ u32 CRC-32 ‖ [16 bytes key] ‖ entry

and the file `acknowledged` says how far the journal was durable at least: u64 first index of the
last segment ‖ u64 its size ‖ u32 CRC-32. It is written, unsynced, after each batch was synced and
before anyone is told: a killed process leaves it exact, a power cut at most too low.

All is big-endian. The CRC of a frame covers all of it and starts from the header's, so that a frame
of another log or segment does not pass. `flags` is never zero (a hole in a file is not a frame) and
marks the first frame of a batch: a batch is written only after the one before it was synced, so a
frame that fails *before* a batch start was damaged later, while one after the last batch start is
what a crash leaves. The key is the caller's idempotency key.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self
from zlib import crc32

from audit.errors import LogFullError, LogTamperedError
from audit.files import (
    read_bounded,
    replace_file_durably,
    sync_data,
    sync_directory,
    write_all,
)

JOURNAL = "journal"
#: Locked by the one writer.
LOCK = "lock"
KEY_BYTES = 16
#: Says how far the journal was acknowledged at least.
MARK = "acknowledged"
#: A new segment is begun once one is larger than this.
SEGMENT_BYTES = 8 * 2**20
#: Errors that mean: no room now, maybe later.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})

_MAGIC = b"HGJ1"
_FIRST = struct.Struct(">4sQH")
_CRC = struct.Struct(">I")
_HEAD = struct.Struct(">BxHI")
_MARK = struct.Struct(">QQ")
_PRESENT, _BATCH_START, _HAS_KEY = 0x40, 0x01, 0x02
_KNOWN_FLAGS = _PRESENT | _BATCH_START | _HAS_KEY
_STARTS = re.compile(rb"[\x41\x43]\x00")
_SEGMENT_NAME = re.compile(r"[0-9]{16}\.seg")
_CHUNK_BYTES = 2**20
_LOOKS = 3


class Frame(NamedTuple):
    """One entry as it stands in the journal. A tuple: hundreds of thousands are read at a time."""

    entry: bytes
    key: bytes | None
    starts_batch: bool


def segment_path(directory: Path, first: int) -> Path:
    """Where the segment whose first entry has index `first` lies, below the log's directory."""
    return directory / JOURNAL / f"{first:016d}.seg"


def list_segments(directory: Path) -> list[tuple[int, Path]]:
    """First index and path of every segment, in order."""
    found = [p for p in (directory / JOURNAL).iterdir() if _SEGMENT_NAME.fullmatch(p.name)]
    return sorted((int(path.stem), path) for path in found)


def encode_header(origin: str, first: int) -> bytes:
    """The bytes a segment begins with."""
    name = origin.encode()
    header = _FIRST.pack(_MAGIC, first, len(name)) + name
    return header + _CRC.pack(crc32(header))


def frame_seed(header: bytes) -> int:
    """The value from which the CRC of every frame of a segment starts."""
    return crc32(header)


def encode_frame(entry: bytes, key: bytes | None, *, starts_batch: bool, seed: int) -> bytes:
    """The bytes of one frame."""
    flags = _PRESENT | (_BATCH_START if starts_batch else 0) | (_HAS_KEY if key else 0)
    body = key + entry if key else entry
    crc = crc32(body, seed ^ (flags << 16 | len(entry)))
    return _HEAD.pack(flags, len(entry), crc) + body


def parse_frame(data: bytes, at: int, seed: int) -> tuple[Frame, int] | None:
    """The frame at `at` and where the next one begins; None if there is no whole, valid frame."""
    body = at + _HEAD.size
    if body > len(data):
        return None
    flags, length, crc = _HEAD.unpack_from(data, at)
    if flags & _PRESENT == 0 or flags & ~_KNOWN_FLAGS or data[at + 1]:
        return None
    entry = body + KEY_BYTES if flags & _HAS_KEY else body
    end = entry + length
    if end > len(data) or crc32(data[body:end], seed ^ (flags << 16 | length)) != crc:
        return None
    key = data[body:entry] if entry > body else None
    return Frame(data[entry:end], key, bool(flags & _BATCH_START)), end


def encode_mark(first: int, end_bytes: int) -> bytes:
    """The bytes of `acknowledged`: the last segment has at least `end_bytes`."""
    body = _MARK.pack(first, end_bytes)
    return body + _CRC.pack(crc32(body))


def read_mark(directory: Path) -> tuple[int, int] | None:
    """How far the journal was acknowledged at least: first index of a segment, and its size then.

    None if the checksum does not fit: a power cut may tear what is not synced. Raises
    `LogTamperedError` if there is no such file.
    """
    path = directory / MARK
    # Beside a writer, a second look tells a file that is being written from a damaged one.
    for _ in range(_LOOKS):
        try:
            data = read_bounded(path, _MARK.size + _CRC.size)
            first, end_bytes = _MARK.unpack_from(data)
        except struct.error:
            continue
        except (OSError, ValueError) as error:
            raise LogTamperedError(f"{path} cannot be read: {error}.") from error
        if data == encode_mark(first, end_bytes):
            return first, end_bytes
    return None


def check_mark(directory: Path, marked: tuple[int, int], *, first: int, end_bytes: int) -> None:
    """See that a journal that ends there holds all that was acknowledged.

    Raises `LogTamperedError`: then damage at its end is none that a crash leaves.
    """
    if (first, end_bytes) < marked:
        raise LogTamperedError(
            f"{segment_path(directory, first)} at byte {end_bytes}: no whole batch follows, but "
            f"byte {marked[1]} of segment {marked[0]} was acknowledged: it was damaged or cut. "
            "Restore the journal from a copy that has it, or start a new log under a new origin."
        )


class Segment:
    """Reads one segment from its beginning, a chunk at a time. Close it, or use it in `with`."""

    def __init__(self, path: Path, *, origin: str, first: int) -> None:
        """Raises `LogTamperedError` if the header is damaged or another log's."""
        self.path = path
        self.first = first
        self._index = first
        header = encode_header(origin, first)
        self._seed = frame_seed(header)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._buffer = b""
        self._at = 0
        #: Where in the file `_buffer` begins.
        self._base = len(header)
        if os.pread(self._descriptor, len(header), 0) != header:
            self.close()
            raise LogTamperedError(
                f"{path} at byte 0: the header is not that of segment {first} of {origin}. "
                "Restore the file or start a new log under a new origin."
            )

    @property
    def index(self) -> int:
        """Index of the entry that `read` returns next."""
        return self._index

    @property
    def offset(self) -> int:
        """Where in the file the next frame begins."""
        return self._base + self._at

    def read(self, limit: int | None = None) -> Frame | None:
        """The next whole, valid frame; None where there is none (yet: a later call looks again).

        `limit` is where what may still change begins: nothing is read from there on.
        """
        parsed = parse_frame(self._buffer, self._at, self._seed)
        while parsed is None and self._fill(limit):
            parsed = parse_frame(self._buffer, self._at, self._seed)
        if parsed is None:
            return None
        frame, self._at = parsed
        self._index += 1
        return frame

    def _fill(self, limit: int | None) -> bool:
        """Read on. False if nothing came, or if a frame's worth is there and is not valid."""
        if len(self._buffer) - self._at > _HEAD.size + KEY_BYTES + 65_535:
            return False
        end = self._base + len(self._buffer)
        wanted = _CHUNK_BYTES if limit is None else min(_CHUNK_BYTES, limit - end)
        if wanted <= 0:
            return False
        more = os.pread(self._descriptor, wanted, end)
        self._buffer = self._buffer[self._at :] + more
        self._base, self._at = self._base + self._at, 0
        return bool(more)

    def batch_starts_after(self, offset: int) -> int | None:
        """Offset of a batch start behind `offset`; if there is one, this is no torn tail."""
        data = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        for match in _STARTS.finditer(data, offset + 1):
            if parse_frame(data, match.start(), self._seed) is not None:
                return match.start()
        return None

    @property
    def size_bytes(self) -> int:
        """Size of the file now."""
        return os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(directory: Path, *, origin: str, start: int = 0) -> Iterator[tuple[int, Frame]]:
    """Index and frame of the journal's entries from `start` on, up to one that is not whole.

    Raises `LogTamperedError` if segments do not join, or if a segment that is not the last one is
    damaged.
    """
    segments = list_segments(directory)
    followings = [*(first for first, _ in segments[1:]), None]
    for (first, path), following in zip(segments, followings, strict=False):
        if following is not None and following <= start:
            continue
        with Segment(path, origin=origin, first=first) as segment:
            while (frame := segment.read()) is not None:
                if segment.index > start:
                    yield segment.index - 1, frame
            if following is not None and segment.index != following:
                raise damaged(segment, f"the next segment begins with entry {following}")


def damaged(segment: Segment, why: str) -> LogTamperedError:
    """The error for a segment that breaks off where it must not."""
    return LogTamperedError(
        f"{segment.path} at byte {segment.offset}: no valid frame for entry {segment.index}, "
        f"but {why}. "
        "The journal was changed; keep the directory as it is and compare it with a copy."
    )


class JournalWriter:
    """Appends frames to the last segment. One thread uses it; `audit.log` owns it.

    After any error but `LogFullError` the caller must halt: what is on disk is not known any more.
    """

    def __init__(
        self, directory: Path, *, origin: str, segment_bytes: int, lock_descriptor: int
    ) -> None:
        self._directory = directory
        self._journal = directory / JOURNAL
        self._origin = origin
        self._segment_bytes = segment_bytes
        self._descriptor = -1
        self._path = self._journal
        self._seed = 0
        self._end = 0
        self.first = 0
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        #: Stays with the directory wherever it is moved.
        self.directory_descriptor = os.open(directory, flags)
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        self._mark_descriptor = os.open(directory / MARK, flags)
        # The lock too: who replaces it can open the log a second time.
        self._places = (
            (directory, _identity(directory.stat())),
            (self._journal, _identity(self._journal.stat())),
            (directory / LOCK, _identity(os.fstat(lock_descriptor))),
        )

    @property
    def end_bytes(self) -> int:
        """Size that the current segment has to have."""
        return self._end

    def open_segment(self, first: int, end: int) -> None:
        """Go on in an existing segment, cut to `end` bytes if it is longer."""
        self._close_segment()
        self.first = first
        self._path = segment_path(self._directory, first)
        self._seed = frame_seed(encode_header(self._origin, first))
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags)
        self._end = end
        if os.fstat(self._descriptor).st_size != end:
            os.ftruncate(self._descriptor, end)
        # Also what was written but not synced when the writer died: it is acknowledged from now on.
        sync_data(self._descriptor)
        self._mark()

    def new_segment(self, first: int) -> None:
        """Begin a segment. Durable on return. Raises `LogFullError` if there is no room."""
        header = encode_header(self._origin, first)
        try:
            replace_file_durably(segment_path(self._directory, first), header)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise _full(self._journal) from error
            raise
        self.open_segment(first, len(header))

    @property
    def is_full(self) -> bool:
        """Whether the next batch should go to a new segment."""
        return self._end >= self._segment_bytes

    def encode(self, entry: bytes, key: bytes | None, *, starts_batch: bool) -> bytes:
        """A frame for the current segment."""
        return encode_frame(entry, key, starts_batch=starts_batch, seed=self._seed)

    def append(self, frames: bytes) -> None:
        """Write a batch and force it to the disk; then see that the file is still in its place.

        Raises `LogFullError` with nothing written, `LogTamperedError`, or `OSError`.
        """
        # Before too: a batch should not go where nobody will find it.
        self.check_place()
        try:
            write_all(self._descriptor, frames, self._end)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            os.ftruncate(self._descriptor, self._end)
            raise _full(self._journal) from error
        sync_data(self._descriptor)
        self._end += len(frames)
        self.check_place()
        self._mark()

    def check_place(self) -> None:
        """See that segment, directories and lock are what they were. Raises `LogTamperedError`."""
        held = os.fstat(self._descriptor)
        if held.st_size != self._end:
            raise LogTamperedError(
                f"{self._path} has {held.st_size} bytes instead of {self._end}: "
                "somebody else wrote to it or cut it."
            )
        for path, identity in ((self._path, _identity(held)), *self._places):
            try:
                found = _identity(path.stat(follow_symlinks=False))
            except OSError as error:
                raise LogTamperedError(
                    f"{path} is gone ({error.strerror}): it was removed or moved under the writer."
                ) from error
            if found != identity:
                raise LogTamperedError(f"{path} is not the one that was opened: it was replaced.")

    def _mark(self) -> None:
        """Say how far the journal is durable. Not synced: being too low does no harm."""
        try:
            write_all(self._mark_descriptor, encode_mark(self.first, self._end), 0)
        except OSError as error:
            # A file system that never overwrites in place may have no room even for this.
            if error.errno not in NO_ROOM:
                raise

    def close(self) -> None:
        """Close what is open."""
        self._close_segment()
        os.close(self._mark_descriptor)
        os.close(self.directory_descriptor)

    def _close_segment(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def remove_segments(directory: Path, *, before: int) -> None:
    """Delete the segments all of whose entries have an index below `before`; never the last one."""
    segments = list_segments(directory)
    for (_, path), (following, _) in pairwise(segments):
        if following <= before:
            path.unlink()


def begin_journal(directory: Path, *, origin: str) -> None:
    """Make the first segment of a new log."""
    (directory / JOURNAL).mkdir(mode=0o700, exist_ok=True)
    sync_directory(directory)
    header = encode_header(origin, 0)
    replace_file_durably(segment_path(directory, 0), header)
    replace_file_durably(directory / MARK, encode_mark(0, len(header)))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _full(where: Path) -> LogFullError:
    return LogFullError(
        f"No room in {where}: nothing of the batch was kept. Free some space; appends then go on."
    )
