"""Names and bytes of tiles and bundles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.errors import VerificationError
from audit.merkle import leaf_hash
from audit.tiles import (
    TILE_WIDTH,
    TreeEdge,
    bundle_path,
    encode_bundle,
    full_tile_count,
    parse_bundle,
    partial_tiles,
    tile_path,
    tile_width,
)


def test_names_are_those_of_the_specification() -> None:
    assert tile_path(0, 1234067) == "tile/0/x001/x234/067"
    assert tile_path(2, 0, 1) == "tile/2/000.p/1"
    assert tile_path(0, 999) == "tile/0/999"
    assert tile_path(0, 1000) == "tile/0/x001/000"
    assert bundle_path(67, 255) == "tile/entries/067.p/255"
    for level, index, width in ((-1, 0, 1), (64, 0, 1), (0, -1, 1), (0, 0, 0), (0, 0, 257)):
        with pytest.raises(ValueError, match="tile"):
            tile_path(level, index, width)


def test_the_worked_example_of_70000_entries_comes_out() -> None:
    assert [full_tile_count(70_000, level) for level in range(3)] == [273, 1, 0]
    tiles = [(tile.level, tile.index, tile.width) for tile in partial_tiles(70_000)]
    assert tiles == [(0, 273, 112), (1, 1, 17), (2, 0, 1)]
    assert [(tile.level, tile.width) for tile in partial_tiles(256)] == [(1, 1)]
    assert partial_tiles(0) == []
    assert tile_width(70_000, 0, 273) == 112
    assert tile_width(70_000, 0, 274) == 0
    assert tile_width(70_000, 1, 0) == TILE_WIDTH


def test_a_growing_edge_fills_the_same_tiles_by_leaves_and_by_whole_tiles() -> None:
    leaves = [leaf_hash(b"%d" % number) for number in range(TILE_WIDTH)]
    one, other = TreeEdge(), TreeEdge()
    filled = []
    for _ in range(TILE_WIDTH + 2):
        by_leaves = [tile for leaf in leaves for tile in one.append(leaf)]
        assert other.append_tile(b"".join(leaves)) == by_leaves
        filled += by_leaves
        assert one.root() == other.root()
    assert one.partial() == other.partial()
    levels = [tile.level for tile, _ in filled]
    assert (levels.count(0), levels.count(1), levels.count(2)) == (TILE_WIDTH + 2, 1, 0)
    one.append(leaves[0])
    with pytest.raises(ValueError, match="whole tile"):
        one.append_tile(b"".join(leaves))


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_bundles_come_back_as_they_were(entries: list[bytes]) -> None:
    assert parse_bundle(encode_bundle(entries), width=len(entries), name="x") == entries


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=8), st.data())
def test_a_bundle_that_was_cut_or_has_another_width_is_refused(
    entries: list[bytes], data: st.DataObject
) -> None:
    encoded = encode_bundle(entries)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(VerificationError):
        parse_bundle(encoded[:cut], width=len(entries), name="x")
    with pytest.raises(VerificationError):
        parse_bundle(encoded, width=len(entries) + 1, name="x")


def test_the_longest_entry_fits_a_bundle() -> None:
    longest = b"x" * 65_535
    assert parse_bundle(encode_bundle([longest]), width=1, name="x") == [longest]
