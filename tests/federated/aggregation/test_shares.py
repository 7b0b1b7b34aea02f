"""Shamir's sharing: any t rebuild, fewer know nothing, and boxes open for one receiver."""

from __future__ import annotations

import itertools

import pytest
import shamirs
from Crypto.Util.number import isPrime
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.aggregation.shares import (
    FIELD,
    SHARE_BYTES,
    commit,
    rebuild,
    seal,
    sealed_bytes,
    split,
    unseal,
    weights,
)
from federated.errors import ProtocolError


def test_the_field_is_one() -> None:
    assert isPrime(FIELD)


@given(
    secret=st.binary(min_size=32, max_size=32),
    holders=st.integers(3, 12),
    data=st.data(),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_any_threshold_of_shares_rebuild_the_secret(
    secret: bytes, holders: int, data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(2, holders))
    made = split(secret, threshold=threshold, holders=holders)
    assert {len(share) for share in made} == {SHARE_BYTES}
    places = data.draw(st.permutations(range(1, holders + 1)))[:threshold]
    assert rebuild([made[place - 1] for place in places], weights(places)) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_the_smallest_and_the_largest_secret_are_rebuilt(secret: bytes) -> None:
    made = split(secret, threshold=3, holders=5)
    for places in itertools.combinations(range(1, 6), 3):
        assert rebuild([made[place - 1] for place in places], weights(places)) == secret


def test_rebuilding_agrees_with_the_library() -> None:
    secret = bytes(range(32))
    made = split(secret, threshold=4, holders=6)
    points = [
        shamirs.share(place, int.from_bytes(made[place - 1]), FIELD) for place in (2, 3, 5, 6)
    ]
    assert shamirs.interpolate(points, threshold=4) == int.from_bytes(secret)
    assert rebuild([made[place - 1] for place in (2, 3, 5, 6)], weights((2, 3, 5, 6))) == secret


def test_fewer_than_the_threshold_fit_every_secret() -> None:
    """For any other secret there is a polynomial through the same shares: they say nothing."""
    made = split(b"a" * 32, threshold=3, holders=5)
    known = {1: int.from_bytes(made[0]), 2: int.from_bytes(made[1])}
    for other in (0, 1, int.from_bytes(b"b" * 32)):
        # The share at place 3 with which places 1 to 3 rebuild the other secret.
        first, second, third = weights((1, 2, 3))
        missing = (other - first * known[1] - second * known[2]) * pow(third, -1, FIELD) % FIELD
        shares = [made[0], made[1], missing.to_bytes(SHARE_BYTES)]
        assert rebuild(shares, weights((1, 2, 3))) == other.to_bytes(32)


def test_two_sharings_of_one_secret_differ() -> None:
    one, other = (split(bytes(32), threshold=2, holders=3) for _ in range(2))
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_shares_add_up() -> None:
    """Linear: the sum of shares is a share of the sum (mod the field)."""
    one, other = (1234).to_bytes(32), (4321).to_bytes(32)
    pairs = zip(
        split(one, threshold=3, holders=4), split(other, threshold=3, holders=4), strict=True
    )
    summed = [
        ((int.from_bytes(a) + int.from_bytes(b)) % FIELD).to_bytes(SHARE_BYTES) for a, b in pairs
    ]
    assert int.from_bytes(rebuild(summed[:3], weights((1, 2, 3)))) == 5555


@pytest.mark.parametrize("places", [(1, 1, 2), (0, 1), (-1, 2)])
def test_weights_need_different_places_from_one_on(places: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="different places"):
        weights(places)


@pytest.mark.parametrize("share", [b"", bytes(32), FIELD.to_bytes(33), b"\xff" * 33])
def test_refuses_what_is_no_share(share: bytes) -> None:
    with pytest.raises(ProtocolError, match="not an element"):
        rebuild([share, bytes(33)], weights((1, 2)))


def test_refuses_a_rebuilt_value_that_is_no_secret() -> None:
    high = (FIELD - 1).to_bytes(33)
    with pytest.raises(ProtocolError, match="no 32-byte secret"):
        rebuild([high, high], weights((1, 2)))


def test_a_secret_has_its_length() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        split(b"short", threshold=2, holders=3)


def test_a_box_opens_for_its_key_and_context_alone() -> None:
    parts = [bytes([at]) * SHARE_BYTES for at in range(3)]
    box = seal(b"k" * 32, parts, context=b"a to b")
    assert len(box) == sealed_bytes(3)
    assert unseal(b"k" * 32, box, context=b"a to b", count=3) == parts
    for key, context, sealed in (
        (b"x" * 32, b"a to b", box),
        (b"k" * 32, b"b to a", box),
        (b"k" * 32, b"a to b", box[:-1]),
        (b"k" * 32, b"a to b", b""),
    ):
        with pytest.raises(ProtocolError, match="altered"):
            unseal(key, sealed, context=context, count=3)
    for at in range(len(box)):
        flipped = bytearray(box)
        flipped[at] ^= 1
        with pytest.raises(ProtocolError, match="altered"):
            unseal(b"k" * 32, bytes(flipped), context=b"a to b", count=3)
    with pytest.raises(ProtocolError, match="another number"):
        unseal(b"k" * 32, box, context=b"a to b", count=2)


def test_a_commitment_is_to_one_secret_of_one_node_in_one_round() -> None:
    made = {
        commit(secret, plan=plan, node=node, label=label)
        for secret in (b"a" * 32, b"b" * 32)
        for plan in (b"p" * 32, b"q" * 32)
        for node in ("n", "m")
        for label in ("seed", "increment 0")
    }
    assert len(made) == 16
