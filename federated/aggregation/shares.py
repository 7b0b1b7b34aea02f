"""Shamir's secret sharing of 32-byte secrets, and sealing shares for one receiver.

The field has 2^256 + 297 elements, a prime, so any 32 bytes are an element. Shares are made by the
library `shamirs`, whose coefficients come from the operating system. Rebuilding is Lagrange
interpolation at 0: its weights depend on the holders alone, and are computed once for all secrets
that the same holders give shares of, where the library would do so for each secret anew.

A share says nothing about whether it is right. Who rebuilds checks the secret against its
commitment or public key (`commit`, `unmask`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import shamirs
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from federated.errors import ProtocolError

FIELD: Final = 2**256 + 297
SECRET_BYTES: Final = 32
#: A field element.
SHARE_BYTES: Final = 33

_COMMIT_DOMAIN: Final = b"havengate/secagg/commitment/v1\n"


def split(secret: bytes, *, threshold: int, holders: int) -> list[bytes]:
    """Return one share for each of `holders`, of which any `threshold` rebuild the secret.

    Fewer are independent of it. The holder at place x (counted from 1) has the polynomial's value
    at x.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"expected {SECRET_BYTES} bytes")
    made = shamirs.shares(
        int.from_bytes(secret), quantity=holders, modulus=FIELD, threshold=threshold, compact=True
    )
    return [share.value.to_bytes(SHARE_BYTES) for share in made]


def weights(places: Sequence[int]) -> list[int]:
    """Lagrange weights at 0 for holders at these places, which are different and positive."""
    if len(set(places)) != len(places) or min(places) < 1:
        raise ValueError("expected different places from 1 on")
    found = []
    for place in places:
        above, below = 1, 1
        for other in places:
            if other != place:
                above = above * other % FIELD
                below = below * (other - place) % FIELD
        found.append(above * pow(below, -1, FIELD) % FIELD)
    return found


def rebuild(shares: Sequence[bytes], lagrange: Sequence[int]) -> bytes:
    """Return the secret of these shares, whose holders' weights are `lagrange`.

    Raises `ProtocolError` if they are not shares of 32 bytes; wrong ones among them usually give
    another secret.
    """
    values = [int.from_bytes(share) for share in shares]
    if any(len(share) != SHARE_BYTES for share in shares) or max(values) >= FIELD:
        raise ProtocolError("A share is not an element of the field.")
    secret = sum(value * weight for value, weight in zip(values, lagrange, strict=True)) % FIELD
    if secret >= 1 << (8 * SECRET_BYTES):
        raise ProtocolError("The shares are of no 32-byte secret.")
    return secret.to_bytes(SECRET_BYTES)


def commit(secret: bytes, *, plan: bytes, node: str, label: str) -> bytes:
    """Return what a node publishes so that its rebuilt secret can be checked.

    SHA-256; hides a secret of 32 random bytes, and binds.
    """
    name = f"{label}\n{node}\n".encode()
    return hashlib.sha256(_COMMIT_DOMAIN + plan + name + secret).digest()


def seal(key: bytes, shares: Sequence[bytes], *, context: bytes) -> bytes:
    """Encrypt shares for one receiver: ChaCha20-Poly1305 under a key that is used once."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), b"".join(shares), context)


def unseal(key: bytes, box: bytes, *, context: bytes, count: int) -> list[bytes]:
    """Undo `seal`. Raises `ProtocolError` if it was altered or holds another number of shares."""
    try:
        plain = ChaCha20Poly1305(key).decrypt(bytes(12), box, context)
    except InvalidTag as error:
        raise ProtocolError("A sealed share was altered, or was for somebody else.") from error
    if len(plain) != count * SHARE_BYTES:
        raise ProtocolError(f"A sealed box holds another number of shares than {count}.")
    return [plain[at : at + SHARE_BYTES] for at in range(0, len(plain), SHARE_BYTES)]


def sealed_bytes(count: int) -> int:
    """Size of a box of `count` shares."""
    return count * SHARE_BYTES + 16
