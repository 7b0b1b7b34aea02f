"""Chunked content: any way of writing and reading gives the same; no rearrangement opens."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keys import chunked
from keys.chunked import CHUNK_BYTES, HEADER_BYTES, ChunkedReader, ChunkedWriter, header_of
from keys.errors import InvalidContextError, MalformedSealedTextError, UnsealError
from tests.keys.workbench import Workbench, context_of, workbench

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


def seal(content: bytes, pieces: list[int] | None = None, *, derived: bytes = DERIVED) -> bytes:
    sink = io.BytesIO()
    with ChunkedWriter(sink, key_id=KEY_ID, salt=SALT, derived=derived) as writer:
        at = 0
        for size in pieces or []:
            writer.write(content[at : at + size])
            at += size
        writer.write(content[at:])
    return sink.getvalue()


def reader_of(sealed: bytes, *, derived: bytes = DERIVED) -> ChunkedReader:
    source = io.BytesIO(sealed)
    return ChunkedReader(source, header=header_of(source), derived=derived)


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
        assert b"".join(ChunkedReader(source, header=header, derived=DERIVED)) == content


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
        with ChunkedWriter(sink, key_id=KEY_ID, salt=SALT, derived=DERIVED) as writer:
            writer.write(os.urandom(2 * SMALL))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    with pytest.raises(UnsealError):
        b"".join(reader_of(sink.getvalue()))


def test_writing_after_the_end_is_refused() -> None:
    writer = ChunkedWriter(io.BytesIO(), key_id=KEY_ID, salt=SALT, derived=DERIVED)
    writer.finish()
    with pytest.raises(ValueError, match="finish"):
        writer.write(b"more")


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


def test_a_chunk_of_another_file_of_the_same_person_does_not_open(bench: Workbench) -> None:
    ours = seal_file(bench, "ada", bytes(2 * CHUNK_BYTES))
    theirs = seal_file(bench, "ada", bytes(2 * CHUNK_BYTES))
    cut = HEADER_BYTES + CHUNK_BYTES + 16
    mixed = ours[:cut] + theirs[cut:]
    with pytest.raises(UnsealError):
        b"".join(bench.keyring.open_stream(context_of("ada"), io.BytesIO(mixed)))


def test_a_field_cannot_be_passed_off_as_content(bench: Workbench) -> None:
    """The derivations of fields and files are kept apart by their labels."""
    from keys import aead

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
