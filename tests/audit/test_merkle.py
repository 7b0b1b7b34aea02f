"""Trees against a definition written as plainly as RFC 6962 section 2.1."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audit.errors import VerificationError
from audit.merkle import (
    EMPTY_ROOT,
    consistency_ranges,
    inclusion_ranges,
    leaf_hash,
    verify_consistency,
    verify_inclusion,
)
from audit.tiles import TreeEdge

LARGEST = 300
ENTRIES = [b"entry %d" % number for number in range(LARGEST)]
# Leaves of certificate-transparency's reference tree; root from AUDIT_FORMATS.md.
REFERENCE = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657",
             "606162636465666768696a6b6c6d6e6f"]  # fmt: skip
REFERENCE_ROOT = "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"

_roots: dict[tuple[int, int], bytes] = {}


def mth(start: int, end: int) -> bytes:
    """MTH(D[start:end]) of RFC 6962 section 2.1, remembered."""
    if (start, end) not in _roots:
        _roots[start, end] = plain_mth(ENTRIES[start:end], start)
    return _roots[start, end]


def plain_mth(entries: list[bytes], start: int) -> bytes:
    n = len(entries)
    if n == 0:
        return sha256(b"").digest()
    if n == 1:
        return sha256(b"\x00" + entries[0]).digest()
    k = 1
    while k * 2 < n:
        k *= 2
    return sha256(b"\x01" + mth(start, start + k) + mth(start + k, start + n)).digest()


def path(m: int, start: int, end: int) -> list[bytes]:
    """PATH(m, D[start:end]) of RFC 6962 section 2.1.1."""
    n = end - start
    if n == 1:
        return []
    k = 1
    while k * 2 < n:
        k *= 2
    if m < k:
        return [*path(m, start, start + k), mth(start + k, end)]
    return [*path(m - k, start + k, end), mth(start, start + k)]


def subproof(m: int, start: int, end: int, *, whole: bool) -> list[bytes]:
    """SUBPROOF(m, D[start:end], b) of RFC 6962 section 2.1.2."""
    n = end - start
    if m == n:
        return [] if whole else [mth(start, end)]
    k = 1
    while k * 2 < n:
        k *= 2
    if m <= k:
        return [*subproof(m, start, start + k, whole=whole), mth(start + k, end)]
    return [*subproof(m - k, start + k, end, whole=False), mth(start, start + k)]


def test_the_reference_tree_has_its_published_root() -> None:
    edge = TreeEdge()
    for leaf in REFERENCE:
        edge.append(leaf_hash(bytes.fromhex(leaf)))
    assert edge.root().hex() == REFERENCE_ROOT
    assert TreeEdge().root() == EMPTY_ROOT == sha256(b"").digest()


def test_every_tree_up_to_300_leaves_has_the_root_that_the_rfc_defines() -> None:
    edge = TreeEdge()
    for size in range(1, LARGEST + 1):
        edge.append(leaf_hash(ENTRIES[size - 1]))
        assert edge.root() == mth(0, size)


def test_every_inclusion_proof_up_to_300_leaves_is_that_of_the_rfc_and_verifies() -> None:
    for size in range(1, LARGEST + 1):
        root = mth(0, size)
        for index in range(size):
            proof = [mth(*leaves) for leaves in inclusion_ranges(index, size)]
            assert proof == path(index, 0, size)
            leaf = leaf_hash(ENTRIES[index])
            verify_inclusion(leaf, index=index, size=size, proof=proof, root=root)


def test_every_consistency_proof_up_to_300_leaves_is_that_of_the_rfc_and_verifies() -> None:
    for new in range(1, LARGEST + 1):
        for old in range(1, new + 1):
            proof = [mth(*leaves) for leaves in consistency_ranges(old, new)]
            assert proof == subproof(old, 0, new, whole=True)
            verify_consistency(
                old_size=old, old_root=mth(0, old), new_size=new, new_root=mth(0, new), proof=proof
            )


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_an_inclusion_proof_fails_with_anything_changed(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, LARGEST))
    index = data.draw(st.integers(0, size - 1))
    proof = path(index, 0, size)
    leaf, root = leaf_hash(ENTRIES[index]), mth(0, size)
    kind = data.draw(st.sampled_from(["leaf", "root", "hash", "longer", "shorter", "index"]))
    if kind in {"hash", "shorter"} and not proof:
        kind = "leaf"
    if kind == "leaf":
        leaf = leaf_hash(b"another")
    elif kind == "root":
        root = leaf_hash(b"another")
    elif kind == "hash":
        at = data.draw(st.integers(0, len(proof) - 1))
        proof[at] = leaf_hash(proof[at])
    elif kind == "longer":
        proof.append(root)
    elif kind == "shorter":
        proof.pop()
    else:
        index = data.draw(st.integers(0, LARGEST).filter(lambda other: other != index))
    with pytest.raises(VerificationError):
        verify_inclusion(leaf, index=index, size=size, proof=proof, root=root)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_consistency_proof_fails_with_anything_changed(data: st.DataObject) -> None:
    new = data.draw(st.integers(2, LARGEST))
    old = data.draw(st.integers(1, new - 1))
    proof = subproof(old, 0, new, whole=True)
    old_root, new_root = mth(0, old), mth(0, new)
    kind = data.draw(st.sampled_from(["old", "new", "hash", "longer", "shorter", "none", "swap"]))
    if kind == "old":
        old_root = leaf_hash(b"another")
    elif kind == "new":
        new_root = leaf_hash(b"another")
    elif kind == "hash":
        at = data.draw(st.integers(0, len(proof) - 1))
        proof[at] = leaf_hash(proof[at])
    elif kind == "longer":
        proof.append(new_root)
    elif kind == "shorter":
        proof.pop()
    elif kind == "none":
        proof = []
    else:
        old, new = new, old
    with pytest.raises(VerificationError):
        verify_consistency(
            old_size=old, old_root=old_root, new_size=new, new_root=new_root, proof=proof
        )


def test_refuses_two_roots_of_one_size_and_a_proof_where_none_belongs() -> None:
    root, other = mth(0, 5), mth(0, 6)
    with pytest.raises(VerificationError, match="different roots"):
        verify_consistency(old_size=5, old_root=root, new_size=5, new_root=other, proof=[])
    with pytest.raises(VerificationError, match="empty"):
        verify_consistency(old_size=5, old_root=root, new_size=5, new_root=root, proof=[root])
    with pytest.raises(VerificationError, match="empty tree"):
        verify_consistency(old_size=0, old_root=root, new_size=5, new_root=root, proof=[])
    with pytest.raises(ValueError, match="not in a tree"):
        inclusion_ranges(5, 5)
    with pytest.raises(ValueError, match="cannot grow"):
        consistency_ranges(6, 5)
