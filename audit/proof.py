"""Proofs from tiles, and proof files (C2SP tlog-proof).

Lives here: the hash of any range of leaves from the tiles of a directory, inclusion and consistency
proofs, and the file that carries an inclusion proof with its checkpoint. Not here: the mathematics
(`audit.merkle`) and the whole-log check (`audit.verify`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from audit.checkpoint import SignedCheckpoint, parse_size, verify_checkpoint
from audit.errors import MalformedNoteError, VerificationError
from audit.files import read_bounded
from audit.merkle import (
    HASH_BYTES,
    Range,
    consistency_ranges,
    inclusion_ranges,
    leaf_hash,
    node_hash,
    perfect_root,
    split_point,
    verify_inclusion,
)
from audit.note import MAX_NOTE_BYTES, VerifierKey, decode_base64, encode_base64
from audit.tiles import TILE_BYTES, TILE_WIDTH, tile_path, tile_width

PROOF_HEADER = "c2sp.org/tlog-proof@v1"
#: A tree of 2^63 leaves has paths of 63 hashes.
MAX_PROOF_HASHES = 63
MAX_PROOF_BYTES = MAX_NOTE_BYTES + 2 * 65_535


class TileSource(Protocol):
    """Where hashes come from."""

    def tile(self, level: int, index: int, width: int) -> bytes:
        """At least the first `width` hashes of a tile; `VerificationError` if there are none."""
        ...


class DirectoryTiles:
    """The tiles of a log's directory. What it returns is not verified: the proof is."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def tile(self, level: int, index: int, width: int) -> bytes:
        """Read the tile of that width or, once it has been removed, the full one."""
        for candidate in dict.fromkeys((width, TILE_WIDTH)):
            path = self._directory / tile_path(level, index, candidate)
            try:
                data = read_bounded(path, TILE_BYTES)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                raise VerificationError(f"{path} cannot be read: {error}.") from error
            if len(data) != candidate * HASH_BYTES:
                raise VerificationError(
                    f"{path} has {len(data)} bytes instead of {candidate * HASH_BYTES}."
                )
            return data
        path = self._directory / tile_path(level, index, width)
        raise VerificationError(f"{path} is missing: it was removed, or the log was cut.")


def range_root(source: TileSource, leaves: Range, size: int) -> bytes:
    """Root over the leaves [start, end) that is a node of the tree of `size` leaves."""
    start, end = leaves
    count = end - start
    if count & (count - 1):
        middle = start + split_point(count)
        left = range_root(source, (start, middle), size)
        return node_hash(left, range_root(source, (middle, end), size))
    level, rest = divmod(count.bit_length() - 1, 8)
    index, first = divmod(start >> (8 * level), TILE_WIDTH)
    data = source.tile(level, index, tile_width(size, level, index))
    return perfect_root(data[first * HASH_BYTES : (first + (1 << rest)) * HASH_BYTES])


def tree_root(source: TileSource, size: int, *, tiles_size: int) -> bytes:
    """Root of the first `size` (> 0) leaves from the tiles published for `tiles_size`."""
    return range_root(source, (0, size), tiles_size)


def inclusion_proof(source: TileSource, *, index: int, size: int) -> list[bytes]:
    """Hashes, leaf to root, that prove leaf `index` in the published tree of `size`."""
    return [range_root(source, leaves, size) for leaves in inclusion_ranges(index, size)]


def consistency_proof(source: TileSource, *, old_size: int, new_size: int) -> list[bytes]:
    """Hashes that prove the old tree to be a prefix of the published new one."""
    return [
        range_root(source, leaves, new_size) for leaves in consistency_ranges(old_size, new_size)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """A proof file: that an entry stands at `index` in the tree of the checkpoint it carries.

    `extra` is any bytes the maker wants to travel along; Havengate puts the entry itself there, so
    that one file is enough to check.
    """

    index: int
    hashes: tuple[bytes, ...]
    checkpoint: bytes
    extra: bytes | None = None

    def encode(self) -> bytes:
        """The file's bytes."""
        lines = [PROOF_HEADER]
        if self.extra is not None:
            lines.append(f"extra {encode_base64(self.extra)}")
        lines.append(f"index {self.index}")
        lines.extend(encode_base64(one) for one in self.hashes)
        return ("\n".join(lines) + "\n\n").encode() + self.checkpoint


def parse_proof(data: bytes) -> Proof:
    """Read a proof file. Raises `MalformedNoteError`; proves nothing yet."""
    if len(data) > MAX_PROOF_BYTES:
        raise MalformedNoteError(f"The proof is larger than {MAX_PROOF_BYTES} bytes.")
    head, empty, checkpoint = data.partition(b"\n\n")
    try:
        lines = head.decode("ascii").split("\n")
    except UnicodeDecodeError as error:
        raise MalformedNoteError("The proof is not ASCII above its checkpoint.") from error
    if not empty or lines.pop(0) != PROOF_HEADER:
        raise MalformedNoteError(f"A proof begins with `{PROOF_HEADER}`.")
    extra: bytes | None = None
    if lines and lines[0].startswith("extra "):
        extra = decode_base64(lines.pop(0).removeprefix("extra "), what="The proof's extra data")
    if not lines or not lines[0].startswith("index "):
        raise MalformedNoteError("The proof does not say its index.")
    index = parse_size(lines.pop(0).removeprefix("index "), what="The proof's index")
    hashes = tuple(decode_base64(line, what="A hash of the proof") for line in lines)
    if len(hashes) > MAX_PROOF_HASHES or any(len(one) != HASH_BYTES for one in hashes):
        raise MalformedNoteError("The proof holds something that is not a list of 32-byte hashes.")
    return Proof(index=index, hashes=hashes, checkpoint=checkpoint, extra=extra)


def verify_proof(proof: Proof, entry: bytes, keys: Sequence[VerifierKey]) -> SignedCheckpoint:
    """Prove that `entry` stands in the log whose keys these are; return the checkpoint it is in.

    Raises `MalformedNoteError` or `VerificationError`.
    """
    signed = verify_checkpoint(proof.checkpoint, keys)
    verify_inclusion(
        leaf_hash(entry),
        index=proof.index,
        size=signed.checkpoint.size,
        proof=proof.hashes,
        root=signed.checkpoint.root,
    )
    return signed


def prove(directory: Path, index: int, *, checkpoint: bytes, size: int, entry: bytes) -> Proof:
    """Make the proof file for an entry of a log's directory, with the entry as its extra data."""
    hashes = inclusion_proof(DirectoryTiles(directory), index=index, size=size)
    return Proof(index=index, hashes=tuple(hashes), checkpoint=checkpoint, extra=entry)
