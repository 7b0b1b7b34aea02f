"""Round keys and the masks that they give: X25519, HKDF-SHA256, ChaCha20.

Every key derivation names the plan's hash, its purpose and the pair, so that a key of one round,
purpose or pair is of no use in another.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from federated.aggregation.bits import chacha_stream
from federated.errors import ProtocolError

_DOMAIN: Final = b"havengate/secagg/v1\n"
#: Up to here, four bytes of keystream a value do.
_HALF_WORD: Final = 32


def public_key(private: bytes) -> bytes:
    """Return the X25519 public key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def pair_mask_key(private: bytes, public: bytes, *, plan: bytes, own: str, peer: str) -> bytes:
    """Return the key of the mask that two nodes share; the same for both.

    Raises `ProtocolError` if the peer's key is of small order.
    """
    return _derive(_exchange(private, public), plan, "mask", *sorted((own, peer)))


def sealing_key(private: bytes, public: bytes, *, plan: bytes, sender: str, receiver: str) -> bytes:
    """Return the key under which one node seals shares for another; one for each direction.

    `private` and `public` are one's own and the other's, whichever way. Raises `ProtocolError` if
    the other's key is of small order.
    """
    return _derive(_exchange(private, public), plan, "seal", sender, receiver)


def self_mask_key(seed: bytes, *, plan: bytes, node: str) -> bytes:
    """Return the key of the mask that a node's own seed gives."""
    return _derive(seed, plan, "self", node)


def expand(key: bytes, *, dimension: int, modulus_bits: int) -> NDArray[np.uint64]:
    """Return a mask: uniform integers modulo 2^modulus_bits from ChaCha20's keystream."""
    narrow = modulus_bits <= _HALF_WORD
    width = 4 if narrow else 8
    stream = chacha_stream(key, 0).update(bytes(width * dimension))
    words = np.frombuffer(stream, dtype="<u4" if narrow else "<u8").astype(np.uint64)
    return words & np.uint64((1 << modulus_bits) - 1)


def _exchange(private: bytes, public: bytes) -> bytes:
    try:
        theirs = X25519PublicKey.from_public_bytes(public)
        return X25519PrivateKey.from_private_bytes(private).exchange(theirs)
    except ValueError as error:
        raise ProtocolError("A round key is not a key that can be exchanged with.") from error


def _derive(secret: bytes, plan: bytes, *names: str) -> bytes:
    # Ids hold no line breaks (`plan`), so the parts cannot run into each other.
    info = _DOMAIN + "\n".join(names).encode()
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=plan, info=info).derive(secret)
