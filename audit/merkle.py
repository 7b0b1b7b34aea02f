"""The Merkle tree of RFC 6962: hashes, roots, and proofs. Pure; knows no tile and no file.

Comes before: nothing. Comes after: `audit.tiles` cuts the tree into files, `audit.proof` reads the
hashes that a proof needs. Source: RFC 6962 section 2.1; verification as in RFC 9162 sections
2.1.3.2 and 2.1.4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from audit.errors import VerificationError

HASH_BYTES = 32
#: Root of the tree without leaves: SHA-256 of nothing.
EMPTY_ROOT = sha256(b"").digest()

Range = tuple[int, int]


def leaf_hash(entry: bytes) -> bytes:
    """Hash of a leaf: H(0x00 ‖ entry)."""
    return sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of an inner node: H(0x01 ‖ left ‖ right)."""
    return sha256(b"\x01" + left + right).digest()


def perfect_root(hashes: bytes) -> bytes:
    """Root over 1, 2, 4, … hashes that stand one after the other in `hashes`."""
    while len(hashes) > HASH_BYTES:
        hashes = b"".join(
            [sha256(b"\x01" + hashes[at : at + 64]).digest() for at in range(0, len(hashes), 64)]
        )
    return hashes


def root_of_edges(edges: Sequence[bytes | bytearray]) -> bytes:
    """Root of a tree from its right edge.

    `edges[l]` holds the hashes, 0 to 255 of them, of level 8·l that no full tile of 256 covers yet:
    what is left of the leaves in `edges[0]`, and so on up to the top.
    """
    root: bytes | None = None
    for edge in edges:
        end = len(edge)
        width = end // HASH_BYTES
        bit = 1
        while bit <= width:
            if width & bit:
                subtree = perfect_root(bytes(edge[end - bit * HASH_BYTES : end]))
                root = subtree if root is None else node_hash(subtree, root)
                end -= bit * HASH_BYTES
            bit <<= 1
    return EMPTY_ROOT if root is None else root


def split_point(count: int) -> int:
    """The largest power of two smaller than `count` (> 1): where RFC 6962 splits a tree."""
    return 1 << ((count - 1).bit_length() - 1)


def inclusion_ranges(index: int, size: int) -> list[Range]:
    """Leaf ranges [start, end) whose roots prove that leaf `index` is in the tree, leaf to root."""
    if not 0 <= index < size:
        raise ValueError(f"leaf {index} is not in a tree of {size} leaves")
    ranges: list[Range] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + split_point(end - start)
        if index < middle:
            ranges.append((middle, end))
            end = middle
        else:
            ranges.append((start, middle))
            start = middle
    return ranges[::-1]


def consistency_ranges(old_size: int, new_size: int) -> list[Range]:
    """Leaf ranges whose roots prove that the old tree is a prefix of the new one."""
    if not 0 <= old_size <= new_size:
        raise ValueError(f"a tree of {old_size} leaves cannot grow to {new_size}")
    if old_size in {0, new_size}:
        return []
    ranges: list[Range] = []
    start, end = 0, new_size
    whole = True
    while old_size != end:
        middle = start + split_point(end - start)
        if old_size <= middle:
            ranges.append((middle, end))
            end = middle
        else:
            ranges.append((start, middle))
            start, whole = middle, False
    if not whole:
        ranges.append((start, end))
    return ranges[::-1]


def verify_inclusion(
    leaf: bytes, *, index: int, size: int, proof: Sequence[bytes], root: bytes
) -> None:
    """Prove that the leaf with hash `leaf` stands at `index`. Raises `VerificationError`."""
    if not 0 <= index < size:
        raise VerificationError(f"Leaf {index} cannot be in a tree of {size} leaves.")
    node, last, current = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            raise VerificationError(f"The inclusion proof of leaf {index} is too long.")
        if node & 1 or node == last:
            current = node_hash(sibling, current)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            current = node_hash(current, sibling)
        node, last = node >> 1, last >> 1
    if last != 0:
        raise VerificationError(f"The inclusion proof of leaf {index} is too short.")
    if current != root:
        raise VerificationError(
            f"The inclusion proof of leaf {index} does not lead to the root of {size} leaves: "
            "the entry, its index or the proof is not the one that was logged."
        )


def verify_consistency(
    *, old_size: int, old_root: bytes, new_size: int, new_root: bytes, proof: Sequence[bytes]
) -> None:
    """Prove that the tree of `old_size` is a prefix of that of `new_size`.

    Raises `VerificationError`, which means that history was changed (or that the proof is not for
    these two trees).
    """
    if not 0 <= old_size <= new_size:
        raise VerificationError(f"A log of {old_size} entries shrank to {new_size}.")
    if old_size in {0, new_size}:
        _verify_trivial(old_size, old_root, new_size, new_root, proof)
        return
    if not proof:
        raise VerificationError("The consistency proof is empty.")
    # The tree of a power of two is itself the first node on the way; the proof leaves it out.
    first = old_root if old_size & (old_size - 1) == 0 else proof[0]
    siblings = proof if first is old_root else proof[1:]
    old, new = _climb(first, siblings, node=old_size - 1, last=new_size - 1)
    if old != old_root or new != new_root:
        raise VerificationError(
            f"The log of {new_size} entries does not continue the one of {old_size}: "
            "history was changed, or the proof is not for these two trees."
        )


def _climb(first: bytes, siblings: Sequence[bytes], *, node: int, last: int) -> tuple[bytes, bytes]:
    """Roots of the old and the new tree as a consistency proof gives them."""
    while node & 1:
        node, last = node >> 1, last >> 1
    old = new = first
    for sibling in siblings:
        if last == 0:
            raise VerificationError("The consistency proof is too long.")
        if node & 1 or node == last:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            new = node_hash(new, sibling)
        node, last = node >> 1, last >> 1
    if last != 0:
        raise VerificationError("The consistency proof is too short.")
    return old, new


def _verify_trivial(
    old_size: int, old_root: bytes, new_size: int, new_root: bytes, proof: Sequence[bytes]
) -> None:
    if proof:
        raise VerificationError("A consistency proof between these sizes has to be empty.")
    if old_size == 0 and old_root != EMPTY_ROOT:
        raise VerificationError("A log of no entries has another root than the empty tree.")
    if old_size == new_size and old_root != new_root:
        raise VerificationError(
            f"Two logs of {new_size} entries have different roots: history was changed."
        )
