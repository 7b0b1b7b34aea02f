"""Large content: chunks of 64 KiB, each authenticated with its place, readable from anywhere.

The form, `hgc1`, follows STREAM (Hoang, Reyhanitabar, Rogaway, Vizar 2015): one AES-256-GCM key per
file, derived with its commitment exactly as for a field, and a nonce per chunk of `index(11) ‖
last(1)`. A chunk that is missing, moved, doubled, cut off or taken from another file does not open.

    header: "hgc1" ‖ key id(9) ‖ salt(16) ‖ commitment(32)
    chunk:  ciphertext of 65,536 bytes, fewer in the last one ‖ tag(16)

There is always a last chunk, empty only if the content is. Keys and contexts come from
`keys.keyring`.
"""

from __future__ import annotations

import hmac
import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import BinaryIO, Literal, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keys import aead
from keys.errors import InvalidContextError, MalformedSealedTextError
from keys.sealed import KEY_ID_BYTES, encode_base64url, parse_base64url

MAGIC = b"hgc1"
CHUNK_BYTES = 65_536
HEADER_BYTES = len(MAGIC) + KEY_ID_BYTES + aead.SALT_BYTES + aead.COMMITMENT_BYTES
#: 1 TiB. At 2**36 blocks under one key the bound of GCM is still better than 2**-50.
MAX_CHUNKS = 2**24

_SEALED_CHUNK_BYTES = CHUNK_BYTES + aead.TAG_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What stands before the first chunk."""

    key_id: str
    salt: bytes = field(repr=False)
    commitment: bytes = field(repr=False)


class ChunkedWriter:
    """Seals a stream into a sink that the caller opens and closes. Holds at most two chunks.

    As a context manager it finishes only if the block ends well: what an exception leaves behind
    has no last chunk and never opens. The same holds once a write failed, however it is caught.
    `before_chunk` is called before each chunk and may refuse it. Not thread-safe.
    """

    def __init__(
        self,
        sink: BinaryIO,
        *,
        key_id: str,
        salt: bytes,
        derived: bytes,
        before_chunk: Callable[[], object],
    ) -> None:
        self._sink = sink
        self._before_chunk = before_chunk
        self._box = AESGCM(derived[: aead.KEY_BYTES])
        self._pending = bytearray()
        self._indices = itertools.count()
        self._state: Literal["open", "failed", "finished"] = "open"
        commitment = derived[aead.KEY_BYTES :]
        _write_all(sink, MAGIC + parse_base64url(key_id) + salt + commitment)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None:
            self.finish()

    def write(self, data: bytes) -> int:
        """Take more content, in pieces of any size.

        Raises `ValueError` after `finish` or a failed write.
        """
        self._refuse_failed()
        if self._state == "finished":
            raise ValueError("expected writes before finish(), got one after; open a new writer")
        view = memoryview(data)
        for start in range(0, len(view), CHUNK_BYTES):
            self._pending += view[start : start + CHUNK_BYTES]
            # A full chunk is kept until more follows: only then is it known not to be the last.
            if len(self._pending) > CHUNK_BYTES:
                self._emit(bytes(self._pending[:CHUNK_BYTES]), last=False)
                del self._pending[:CHUNK_BYTES]
        return len(view)

    def finish(self) -> None:
        """Write the last chunk. What was written before cannot be opened without it.

        Raises `ValueError` after a failed write: part of the content is not there.
        """
        self._refuse_failed()
        if self._state == "open":
            self._emit(bytes(self._pending), last=True)
            self._pending.clear()
            self._state = "finished"

    def _emit(self, chunk: bytes, *, last: bool) -> None:
        # Until it is written: a sink that failed may hold part of it.
        self._state = "failed"
        self._before_chunk()
        # Taken once and never again, whatever fails or races: no nonce serves two chunks.
        index = next(self._indices)
        if index >= MAX_CHUNKS:
            raise InvalidContextError(
                f"expected at most {MAX_CHUNKS * CHUNK_BYTES} bytes of content, got more; "
                "store it in several parts"
            )
        _write_all(self._sink, self._box.encrypt(_nonce(index, last=last), chunk, None))
        self._state = "open"

    def _refuse_failed(self) -> None:
        if self._state == "failed":
            raise ValueError(
                "expected a writer whose writes succeeded, got one after a failed write; what it "
                "left does not open: begin again with a new sink"
            )


class ChunkedReader:
    """Opens what `ChunkedWriter` sealed. The caller opens and closes the source. Not thread-safe.

    `before_chunk` is called before each chunk is opened and may refuse it.

    Iterating yields chunks as they verify, from a source that need not be seekable; the end is
    reported only if the last chunk was there, so whoever acts on a part acts before the whole is
    known to be complete. `read_at` needs a seekable source and verifies the length before it
    returns anything.
    """

    def __init__(
        self,
        source: BinaryIO,
        *,
        header: Header,
        derived: bytes,
        before_chunk: Callable[[], object],
    ) -> None:
        if not hmac.compare_digest(header.commitment, derived[aead.KEY_BYTES :]):
            raise aead.unseal_error()
        self._source = source
        self._before_chunk = before_chunk
        self._box = AESGCM(derived[: aead.KEY_BYTES])
        self._length: int | None = None
        self._cached: tuple[int, bytes] | None = None

    def __iter__(self) -> Iterator[bytes]:
        """Yield the content from its beginning to its end, one chunk at a time."""
        if self._source.seekable():
            self._source.seek(HEADER_BYTES)
        index = 0
        sealed = _read_up_to(self._source, _SEALED_CHUNK_BYTES)
        while True:
            following = _read_up_to(self._source, _SEALED_CHUNK_BYTES)
            yield self._open(index, sealed, last=not following)
            if not following:
                return
            sealed = following
            index += 1

    @property
    def size_bytes(self) -> int:
        """Length of the content, authenticated by the last chunk. Raises `UnsealError`."""
        if self._length is None:
            body = self._source.seek(0, io.SEEK_END) - HEADER_BYTES
            last = max(0, -(-body // _SEALED_CHUNK_BYTES) - 1)
            self._length = last * CHUNK_BYTES + len(self._chunk(last, last))
        return self._length

    def read_at(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset`; fewer at the end, none beyond it.

        Reads only the chunks concerned, and the last one. Raises `UnsealError`, or `ValueError` for
        a negative number.
        """
        if offset < 0 or size < 0:
            raise ValueError(f"expected offset and size of 0 or more, got {offset} and {size}")
        end = min(offset + size, self.size_bytes)
        if offset >= end:
            return b""
        first, last = offset // CHUNK_BYTES, (end - 1) // CHUNK_BYTES
        final = max(0, -(-self.size_bytes // CHUNK_BYTES) - 1)
        content = b"".join(self._chunk(index, final) for index in range(first, last + 1))
        return content[offset - first * CHUNK_BYTES : end - first * CHUNK_BYTES]

    def _chunk(self, index: int, final: int) -> bytes:
        if self._cached is None or self._cached[0] != index:
            self._source.seek(HEADER_BYTES + index * _SEALED_CHUNK_BYTES)
            sealed = _read_up_to(self._source, _SEALED_CHUNK_BYTES)
            self._cached = (index, self._open(index, sealed, last=index == final))
        return self._cached[1]

    def _open(self, index: int, sealed: bytes, *, last: bool) -> bytes:
        self._before_chunk()
        # Too many chunks were never written by us; an empty one only as the whole of empty content.
        if index >= MAX_CHUNKS or (index > 0 and len(sealed) <= aead.TAG_BYTES):
            raise aead.unseal_error()
        try:
            return self._box.decrypt(_nonce(index, last=last), sealed, None)
        except InvalidTag as error:
            raise aead.unseal_error() from error


def header_of(source: BinaryIO) -> Header:
    """Read the header from the start of a source. Raises `MalformedSealedTextError`."""
    raw = _read_up_to(source, HEADER_BYTES)
    if len(raw) != HEADER_BYTES or not raw.startswith(MAGIC):
        raise MalformedSealedTextError(
            "expected content that starts with a header of the form hgc1, got something else; "
            "check that it was sealed by Havengate and is read from its beginning"
        )
    salt_at = len(MAGIC) + KEY_ID_BYTES
    commitment_at = salt_at + aead.SALT_BYTES
    return Header(
        key_id=encode_base64url(raw[len(MAGIC) : salt_at]),
        salt=raw[salt_at:commitment_at],
        commitment=raw[commitment_at:],
    )


def _nonce(index: int, *, last: bool) -> bytes:
    return index.to_bytes(11) + (b"\x01" if last else b"\x00")


def _read_up_to(source: BinaryIO, size: int) -> bytes:
    """Read until `size` bytes are there or the source ends: a pipe may give fewer at once."""
    parts: list[bytes] = []
    while size > 0 and (part := source.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _write_all(sink: BinaryIO, data: bytes) -> None:
    """Write everything: an unbuffered file may take less at once."""
    view = memoryview(data)
    while view:
        view = view[sink.write(view) :]
