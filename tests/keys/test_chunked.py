"""Chunked content: any way of writing and reading gives the same; no rearrangement opens."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import given, settings
from hypothesis import strategies as st

from keys import aead, chunked
from keys.chunked import CHUNK_BYTES, HEADER_BYTES, ChunkedReader, ChunkedWriter, header_of
from keys.errors import (
    InvalidContextError,
    MalformedSealedTextError,
    PersonErasedError,
    UnsealError,
)
from tests.keys.vectors import HGC1_VECTORS
from tests.keys.workbench import TENANT, Workbench, context_of, workbench

SMALL = 16
KEY_ID = "AAAAAAAAAAAA"
DERIVED = bytes(range(64))
SALT = bytes(16)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with small():
        yield


def small() -> Any:
    """Return a context in which chunks have 16 bytes, so that little content has many."""
    patch = pytest.MonkeyPatch()
    patch.setattr(chunked, "CHUNK_BYTES", SMALL)
    patch.setattr(chunked, "_SEALED_CHUNK_BYTES", SMALL + 16)

    class Undo:
        def __enter__(self) -> None:
            return None

        def __exit__(self, *_: object) -> None:
            patch.undo()

    return Undo()


def writer_to(sink: Any, *, derived: bytes = DERIVED) -> ChunkedWriter:
    return ChunkedWriter(sink, key_id=KEY_ID, salt=SALT, derived=derived, before_chunk=allow)


def allow() -> None:
    """Every chunk may be sealed and opened."""


def seal(content: bytes, pieces: list[int] | None = None, *, derived: bytes = DERIVED) -> bytes:
    sink = io.BytesIO()
    with writer_to(sink, derived=derived) as writer:
        at = 0
        for size in pieces or []:
            writer.write(content[at : at + size])
            at += size
        writer.write(content[at:])
    return sink.getvalue()


def reader_of(sealed: bytes, *, derived: bytes = DERIVED) -> ChunkedReader:
    source = io.BytesIO(sealed)
    header = header_of(source)
    return ChunkedReader(source, header=header, derived=derived, before_chunk=allow)


def chunks_of(sealed: bytes) -> list[bytes]:
    body = sealed[HEADER_BYTES:]
    return [body[at : at + SMALL + 16] for at in range(0, len(body), SMALL + 16)]


def read_in_pieces(sealed: bytes) -> bytes:
    reader = reader_of(sealed)
    return b"".join(reader.read_at(at, SMALL) for at in range(0, 7 * SMALL, SMALL))


class Dribble(io.RawIOBase):
    """A source that cannot seek and gives one to three bytes at a time."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        size = min(size, 1 + self._at % 3)
        part = self._content[self._at : self._at + size]
        self._at += len(part)
        return part


@given(st.binary(max_size=100), st.lists(st.integers(0, 40), max_size=6))
def test_how_content_is_written_does_not_matter(content: bytes, pieces: list[int]) -> None:
    with small():
        sealed = seal(content, pieces)
        assert sealed == seal(content)
        assert b"".join(reader_of(sealed)) == content


@given(st.binary(max_size=100), st.data())
def test_how_content_is_read_does_not_matter(content: bytes, data: st.DataObject) -> None:
    with small():
        reader = reader_of(seal(content))
        for _ in range(5):
            offset, size = data.draw(st.tuples(st.integers(0, 110), st.integers(0, 110)))
            assert reader.read_at(offset, size) == content[offset : offset + size]
            assert reader.size_bytes == len(content)
            if data.draw(st.booleans()):
                assert b"".join(reader) == content


@given(st.binary(max_size=100))
def test_reads_from_a_source_that_cannot_seek(content: bytes) -> None:
    with small():
        source: Any = Dribble(seal(content))
        header = header_of(source)
        reader = ChunkedReader(source, header=header, derived=DERIVED, before_chunk=allow)
        assert b"".join(reader) == content


@given(st.binary(max_size=70), st.data())
def test_any_flipped_bit_fails(content: bytes, data: st.DataObject) -> None:
    with small():
        sealed = bytearray(seal(content))
        bit = data.draw(st.integers((4 + 9 + 16) * 8, len(sealed) * 8 - 1))
        sealed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(UnsealError):
            b"".join(reader_of(bytes(sealed)))
        with pytest.raises(UnsealError):
            read_in_pieces(bytes(sealed))


@pytest.mark.parametrize("length", [0, 1, SMALL - 1, SMALL, SMALL + 1, 3 * SMALL, 3 * SMALL + 5])
def test_content_that_was_cut_off_anywhere_fails(small_chunks: None, length: int) -> None:
    sealed = seal(os.urandom(length))
    for cut in range(len(sealed)):
        with pytest.raises(UnsealError):
            b"".join(reader_of(sealed[:cut]))
        with pytest.raises(UnsealError):
            reader_of(sealed[:cut]).read_at(0, 1)
        with pytest.raises(UnsealError):
            _ = reader_of(sealed[:cut]).size_bytes


def test_chunks_moved_doubled_dropped_or_added_fail(small_chunks: None) -> None:
    content = os.urandom(5 * SMALL)
    sealed = seal(content)
    head, chunks = sealed[:HEADER_BYTES], chunks_of(sealed)
    variants = [chunks[:at] + chunks[at + 1 :] for at in range(5)]
    variants += [[*chunks[:at], chunks[at], *chunks[at:]] for at in range(5)]
    for at, after in pairwise(range(5)):
        swapped = list(chunks)
        swapped[at], swapped[after] = swapped[after], swapped[at]
        variants.append(swapped)
    variants.append([*chunks, *chunks_of(seal(b""))])
    variants.append([*chunks, bytes(16)])
    for variant in variants:
        with pytest.raises(UnsealError):
            b"".join(reader_of(head + b"".join(variant)))
        with pytest.raises(UnsealError):
            read_in_pieces(head + b"".join(variant))


def test_what_a_failed_write_leaves_never_opens(small_chunks: None) -> None:
    sink = io.BytesIO()

    def fail() -> None:
        with writer_to(sink) as writer:
            writer.write(os.urandom(2 * SMALL))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    with pytest.raises(UnsealError):
        b"".join(reader_of(sink.getvalue()))


def test_writing_after_the_end_is_refused() -> None:
    writer = writer_to(io.BytesIO())
    writer.finish()
    with pytest.raises(ValueError, match="finish"):
        writer.write(b"more")


class Full(io.BytesIO):
    """A sink that takes part of one write, fails, and works again: a disk that was full."""

    failed = False

    def write(self, data: Any, /) -> int:
        if not self.failed and self.tell() > HEADER_BYTES + SMALL:
            self.failed = True
            super().write(bytes(data)[:5])
            raise OSError(28, "No space left on device")
        return super().write(data)


def test_a_failed_write_that_is_passed_over_is_not_called_finished(small_chunks: None) -> None:
    """Content with a hole in it must not be taken for whole until somebody tries to read it."""
    sink = Full()

    def careless() -> None:
        with writer_to(sink) as writer:
            for _ in range(5):
                with suppress(OSError):
                    writer.write(os.urandom(SMALL))

    with pytest.raises(ValueError, match="failed write"):
        careless()
    assert sink.failed


def test_a_last_chunk_that_was_not_written_is_not_called_finished(small_chunks: None) -> None:
    sink = Full()
    writer = writer_to(sink)
    writer.write(os.urandom(SMALL + 1))
    with pytest.raises(OSError, match="No space"):
        writer.finish()
    with pytest.raises(ValueError, match="failed write"):
        writer.finish()


def test_threads_that_share_a_writer_against_its_rule_never_share_a_nonce(
    small_chunks: None,
) -> None:
    """The content is then broken, which reading finds; equal nonces would give content away."""
    writer, nonces = writer_to(io.BytesIO()), []
    real = writer._box
    start = threading.Barrier(2)

    class Slow:
        def encrypt(self, nonce: bytes, data: bytes, associated: None) -> bytes:
            nonces.append(nonce)
            with suppress(threading.BrokenBarrierError):
                start.wait(0.2)
            return real.encrypt(nonce, data, associated)

    writer._box = Slow()  # type: ignore[assignment]
    with ThreadPoolExecutor(2) as pool:
        for worker in [pool.submit(writer._emit, bytes(16), last=False) for _ in range(2)]:
            worker.result()
    assert len(set(nonces)) == 2


def test_another_key_fails_before_any_content_is_read() -> None:
    with pytest.raises(UnsealError):
        reader_of(seal(b"text"), derived=bytes(32) + DERIVED[32:][::-1])


@pytest.mark.parametrize("source", [b"", b"hgc1", b"hgc2" + bytes(200), b"plain text" * 20])
def test_refuses_what_does_not_begin_with_a_header(source: bytes) -> None:
    with pytest.raises(MalformedSealedTextError):
        header_of(io.BytesIO(source))


def test_content_beyond_the_limit_is_refused(
    small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "MAX_CHUNKS", 3)
    assert len(b"".join(reader_of(seal(bytes(3 * SMALL))))) == 3 * SMALL
    with pytest.raises(InvalidContextError):
        seal(bytes(3 * SMALL + 1))


@pytest.mark.parametrize("vector", HGC1_VECTORS, ids=lambda vector: str(vector["name"]))
def test_the_format_is_frozen(vector: dict[str, Any]) -> None:
    content = plain_of(vector)
    key = aead.key_hash(bytes.fromhex(vector["key"]))
    salt, place = bytes.fromhex(vector["salt"]), bytes.fromhex(vector["associated"])
    derived = aead.derive(key, aead.FILE_LABEL, salt, place)
    sink = io.BytesIO()
    with ChunkedWriter(
        sink, key_id=vector["key_id"], salt=salt, derived=derived, before_chunk=allow
    ) as writer:
        writer.write(content)
    sealed = sink.getvalue()
    assert sealed[:HEADER_BYTES].hex() == vector["header"]
    assert sealed[-24:].hex() == vector["end"]
    assert hashlib.sha256(sealed).hexdigest() == vector["sha256"]
    assert b"".join(reader_of(sealed, derived=derived)) == content


def plain_of(vector: dict[str, Any]) -> bytes:
    """Return the content of a vector: bytes that count up, 251 different ones."""
    return bytes(index % 251 for index in range(vector["size_bytes"]))


@pytest.mark.parametrize("vector", HGC1_VECTORS, ids=lambda vector: str(vector["name"]))
def test_the_vectors_are_what_the_published_constructions_give(vector: dict[str, Any]) -> None:
    """Recomputed from HKDF-Expand and AES-256-GCM of `cryptography` alone, chunk by chunk."""
    content = plain_of(vector)
    salt = bytes.fromhex(vector["salt"])
    info = b"havengate/hgc1" + salt + bytes.fromhex(vector["associated"])
    derived = HKDFExpand(algorithm=SHA512(), length=64, info=info).derive(
        bytes.fromhex(vector["key"])
    )
    box = AESGCM(derived[:32])
    sealed = b"hgc1" + base64.urlsafe_b64decode(vector["key_id"]) + salt + derived[32:]
    last = max(0, (len(content) - 1) // 65_536)
    for index in range(last + 1):
        nonce = index.to_bytes(11, "big") + bytes([index == last])
        chunk = content[index * 65_536 : (index + 1) * 65_536]
        sealed += box.encrypt(nonce, chunk, None)
    assert hashlib.sha256(sealed).hexdigest() == vector["sha256"]


# --- Through the keyring --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    with workbench(tmp_path_factory.mktemp("chunked") / "keys.sqlite3") as made:
        yield made


def seal_file(bench: Workbench, person: str, content: bytes) -> bytes:
    sink = io.BytesIO()
    with bench.keyring.seal_stream(context_of(person), sink) as writer:
        writer.write(content)
    return sink.getvalue()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3 * CHUNK_BYTES + 7), st.data())
def test_large_content_opens_in_its_place(
    bench: Workbench, length: int, data: st.DataObject
) -> None:
    content = os.urandom(length)
    sealed = seal_file(bench, "ada", content)
    reader = bench.keyring.open_stream(context_of("ada"), io.BytesIO(sealed))
    offset = data.draw(st.integers(0, length))
    size = data.draw(st.integers(0, length))
    assert reader.read_at(offset, size) == content[offset : offset + size]
    assert b"".join(reader) == content


@pytest.mark.parametrize("part", ["tenant", "person", "service", "field"])
def test_large_content_that_was_moved_does_not_open(bench: Workbench, part: str) -> None:
    sealed = seal_file(bench, "ada", b"text")
    with pytest.raises(UnsealError):
        bench.keyring.open_stream(context_of("ada", **{part: "elsewhere"}), io.BytesIO(sealed))


def test_erasing_a_person_ends_what_is_being_read_and_written(tmp_path: Path) -> None:
    with workbench(tmp_path / "k") as bench:
        sealed = seal_file(bench, "ada", bytes(3 * CHUNK_BYTES))
        reading = iter(bench.keyring.open_stream(context_of("ada"), io.BytesIO(sealed)))
        at = bench.keyring.open_stream(context_of("ada"), io.BytesIO(sealed))
        writer = bench.keyring.seal_stream(context_of("ada"), io.BytesIO())
        next(reading)
        at.read_at(0, 1)
        writer.write(bytes(2 * CHUNK_BYTES))
        bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
        with pytest.raises(PersonErasedError):
            next(reading)
        with pytest.raises(PersonErasedError):
            at.read_at(CHUNK_BYTES, 1)
        with pytest.raises(PersonErasedError):
            writer.finish()


def test_a_chunk_of_another_file_of_the_same_person_does_not_open(bench: Workbench) -> None:
    ours = seal_file(bench, "ada", bytes(2 * CHUNK_BYTES))
    theirs = seal_file(bench, "ada", bytes(2 * CHUNK_BYTES))
    cut = HEADER_BYTES + CHUNK_BYTES + 16
    mixed = ours[:cut] + theirs[cut:]
    with pytest.raises(UnsealError):
        b"".join(bench.keyring.open_stream(context_of("ada"), io.BytesIO(mixed)))


def test_a_field_cannot_be_passed_off_as_content(bench: Workbench) -> None:
    """The derivations of fields and files are kept apart by their labels."""
    key, salt, place = aead.key_hash(bytes(32)), bytes(16), b"place"
    field = aead.derive(key, aead.MESSAGE_LABEL, salt, place)
    assert field != aead.derive(key, aead.FILE_LABEL, salt, place)


def test_memory_stays_bounded_however_large_the_content(bench: Workbench, tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "large"
    block = os.urandom(2**20)
    tracemalloc.start()
    with path.open("wb") as sink, bench.keyring.seal_stream(context_of("ada"), sink) as writer:
        for _ in range(24):
            writer.write(block)
    with path.open("rb") as source:
        reader = bench.keyring.open_stream(context_of("ada"), source)
        assert sum(len(chunk) for chunk in reader) == 24 * 2**20
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20
