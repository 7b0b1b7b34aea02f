"""Tiles and entry bundles: names and bytes (C2SP tlog-tiles). Pure; opens no file.

Comes before: `audit.merkle`. Comes after: `audit.integrate` writes them, `audit.proof`,
`audit.reader` and `audit.verify` read them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from audit.errors import VerificationError
from audit.merkle import HASH_BYTES, perfect_root, root_of_edges

TILE_WIDTH = 256
TILE_BYTES = TILE_WIDTH * HASH_BYTES
MAX_ENTRY_BYTES = 65_535
#: The largest bundle there can be: 256 entries of the greatest length.
MAX_BUNDLE_BYTES = TILE_WIDTH * (2 + MAX_ENTRY_BYTES)
#: Levels 0 to 63 may be named; a tree of 2^63 leaves needs no more than eight of them.
MAX_LEVEL = 63

_LENGTH = struct.Struct(">H")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One tile of a tree: `width` is 256 for a full one."""

    level: int
    index: int
    width: int = TILE_WIDTH

    @property
    def path(self) -> str:
        """Where it lies below the log's directory."""
        return tile_path(self.level, self.index, self.width)


def tile_path(level: int, index: int, width: int = TILE_WIDTH) -> str:
    """`tile/<L>/<N>[.p/<W>]`."""
    if not 0 <= level <= MAX_LEVEL:
        raise ValueError(f"tile level {level} is not in 0 to {MAX_LEVEL}")
    return f"tile/{level}/{_number_path(index)}{_width_path(width)}"


def bundle_path(index: int, width: int = TILE_WIDTH) -> str:
    """`tile/entries/<N>[.p/<W>]`."""
    return f"tile/entries/{_number_path(index)}{_width_path(width)}"


def _number_path(index: int) -> str:
    if index < 0:
        raise ValueError(f"tile index {index} is negative")
    path = f"{index % 1000:03d}"
    while index >= 1000:  # noqa: PLR2004 - groups of three digits
        index //= 1000
        path = f"x{index % 1000:03d}/{path}"
    return path


def _width_path(width: int) -> str:
    if not 1 <= width <= TILE_WIDTH:
        raise ValueError(f"tile width {width} is not in 1 to {TILE_WIDTH}")
    return "" if width == TILE_WIDTH else f".p/{width}"


def level_count(size: int, level: int) -> int:
    """How many hashes level `level` of the tiles holds for a tree of `size` leaves."""
    return int(size >> (8 * level))


def tile_width(size: int, level: int, index: int) -> int:
    """Width of that tile in a tree of `size` leaves; 0 if it has no such tile."""
    return max(0, min(TILE_WIDTH, level_count(size, level) - index * TILE_WIDTH))


def partial_tiles(size: int) -> list[Tile]:
    """The tiles at the right edge that are not full, from level 0 upwards, none empty."""
    tiles: list[Tile] = []
    level = 0
    while count := level_count(size, level):
        index, width = divmod(count, TILE_WIDTH)
        if width:
            tiles.append(Tile(level=level, index=index, width=width))
        level += 1
    return tiles


def full_tile_count(size: int, level: int) -> int:
    """How many full tiles level `level` has."""
    return level_count(size, level) // TILE_WIDTH


def encode_bundle(entries: Sequence[bytes]) -> bytes:
    """Entries as a bundle: big-endian uint16 length, then the entry, for each of them."""
    pack = _LENGTH.pack
    return b"".join([part for entry in entries for part in (pack(len(entry)), entry)])


def parse_bundle(data: bytes, *, width: int, name: str) -> list[bytes]:
    """The entries of a bundle that must hold exactly `width` of them.

    Raises `VerificationError`, with the offset, if it does not. `name` says which bundle it was.
    """
    entries: list[bytes] = []
    add = entries.append
    at, end = 0, len(data)
    while at < end:
        start = at + 2
        # A length that is itself cut in half must not be read: take it as larger than what is left.
        at = start + (data[start - 2] << 8 | data[start - 1] if start <= end else end)
        if at > end:
            raise VerificationError(f"{name} ends inside the entry at byte {start - 2}.")
        add(data[start:at])
    if len(entries) != width:
        raise VerificationError(f"{name} holds {len(entries)} entries instead of {width}.")
    return entries


class TreeEdge:
    """The right edge of a growing tree: per level, the hashes that no full tile covers yet.

    Everything else of the tree is in full tiles, so this is all that is needed to go on.
    """

    def __init__(self, size: int = 0, levels: Sequence[bytes] = ()) -> None:
        self._size = size
        self._levels = [bytearray(level) for level in levels]

    @property
    def size(self) -> int:
        """How many leaves the tree has."""
        return self._size

    def append(self, leaf: bytes) -> list[tuple[Tile, bytes]]:
        """Add a leaf hash; return the tiles that it filled, from level 0 upwards."""
        self._size += 1
        return self._carry(leaf)

    def append_tile(self, leaves: bytes) -> list[tuple[Tile, bytes]]:
        """Add the 256 leaf hashes of a whole tile, where one begins; return the tiles filled."""
        if self._size % TILE_WIDTH or len(leaves) != TILE_BYTES:
            raise ValueError("a whole tile can only be added where one begins")
        self._size += TILE_WIDTH
        if self._levels:
            self._levels[0].clear()
        else:
            self._levels.append(bytearray())
        self._levels[0] += leaves[:-HASH_BYTES]
        return self._carry(leaves[-HASH_BYTES:])

    def _carry(self, carried: bytes) -> list[tuple[Tile, bytes]]:
        filled: list[tuple[Tile, bytes]] = []
        level = 0
        while True:
            if level == len(self._levels):
                self._levels.append(bytearray())
            edge = self._levels[level]
            edge += carried
            if len(edge) < TILE_BYTES:
                return filled
            data = bytes(edge)
            edge.clear()
            count = full_tile_count(self._size, level)
            filled.append((Tile(level=level, index=count - 1), data))
            level, carried = level + 1, perfect_root(data)

    def partial(self) -> list[tuple[Tile, bytes]]:
        """The partial tiles of the tree as it is now, with their bytes."""
        return [(tile, bytes(self._levels[tile.level])) for tile in partial_tiles(self._size)]

    def level(self, level: int) -> bytes:
        """The hashes of one level's edge."""
        return bytes(self._levels[level])

    def root(self) -> bytes:
        """Root of the tree as it is now."""
        return root_of_edges(self._levels)

    def copy(self) -> TreeEdge:
        """An independent copy."""
        return TreeEdge(self._size, [bytes(level) for level in self._levels])
