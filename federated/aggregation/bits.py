"""Sources of random bits: the operating system's, and a seed's ChaCha20 stream.

Samplers draw 64-bit words in bulk (`words`). Now and then a word alone does not decide; then they
draw from `refinement(position)`, a stream of its own for that word, so that two machines whose
floating point differs in the last digit still read the same words at the same places.
"""

from __future__ import annotations

import os
from typing import Final, Protocol

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from federated.model import RandomBits

SEED_BYTES: Final = 32
_DOMAIN: Final = b"havengate/bits/v1\n"


class WordSource(RandomBits, Protocol):
    """Random bits that also come as arrays."""

    @property
    def position(self) -> int:
        """How many words were drawn."""
        ...

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` independent uniform words."""
        ...

    def refinement(self, position: int) -> RandomBits:
        """More bits below the word drawn at `position`; independent of everything else."""
        ...


class SeededBits:
    """A seed's stream: ChaCha20 (RFC 8439) under a key from HKDF-SHA256 with `label` as info.

    Who knows the seed can draw the same. Indistinguishable from independent fair bits for who
    does not; at most 256 GiB of one stream may be drawn.
    """

    def __init__(self, seed: bytes, label: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"A seed has {SEED_BYTES} bytes, this one has {len(seed)}.")
        self._key = HKDF(
            algorithm=hashes.SHA256(), length=32, salt=None, info=_DOMAIN + label
        ).derive(seed)
        self._stream = chacha_stream(self._key, 0)
        self._position = 0

    @property
    def position(self) -> int:
        """How many words were drawn."""
        return self._position

    def bits(self, count: int) -> int:
        """`count` fair bits as an integer."""
        size = -(-count // 8)
        return int.from_bytes(self._stream.update(bytes(size)), "little") & ((1 << count) - 1)

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` uniform words, little-endian on every machine."""
        self._position += count
        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")

    def refinement(self, position: int) -> RandomBits:
        """The stream under the same key whose nonce is the word's position."""
        return _Refinement(self._key, position)


class _Refinement:
    def __init__(self, key: bytes, position: int) -> None:
        self._stream = chacha_stream(key, position + 1)

    def bits(self, count: int) -> int:
        """`count` fair bits as an integer."""
        size = -(-count // 8)
        return int.from_bytes(self._stream.update(bytes(size)), "little") & ((1 << count) - 1)


class SystemBits:
    """The operating system's random bits. Nobody can draw them again."""

    def __init__(self) -> None:
        self._position = 0

    @property
    def position(self) -> int:
        """How many words were drawn."""
        return self._position

    def bits(self, count: int) -> int:
        """`count` fair bits as an integer."""
        return int.from_bytes(os.urandom(-(-count // 8)), "little") & ((1 << count) - 1)

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` uniform words."""
        self._position += count
        return np.frombuffer(os.urandom(8 * count), dtype="<u8")

    def refinement(self, position: int) -> RandomBits:  # noqa: ARG002 - every bit is fresh
        """Fresh bits."""
        return self


class _Wrapped:
    """Words from a source that only gives bits."""

    def __init__(self, source: RandomBits) -> None:
        self._source = source
        self._position = 0

    @property
    def position(self) -> int:
        return self._position

    def bits(self, count: int) -> int:
        return self._source.bits(count)

    def words(self, count: int) -> NDArray[np.uint64]:
        self._position += count
        raw = self._source.bits(64 * count).to_bytes(8 * count, "little")
        return np.frombuffer(raw, dtype="<u8")

    def refinement(self, position: int) -> RandomBits:  # noqa: ARG002 - every bit is fresh
        return self._source


def word_source(random: RandomBits) -> WordSource:
    """Return `random` itself where it gives words, else a wrapper around it."""
    return random if isinstance(random, SeededBits | SystemBits) else _Wrapped(random)


class Stream(Protocol):
    """What a ChaCha20 encryptor is used for here."""

    def update(self, data: bytes) -> bytes:
        """Encrypt; of zeros, the keystream itself."""
        ...


def chacha_stream(key: bytes, nonce: int) -> Stream:
    """ChaCha20's keystream from block 0: 4 bytes of block counter, 12 of nonce (RFC 8439)."""
    return Cipher(ChaCha20(key, bytes(8) + nonce.to_bytes(8, "little")), mode=None).encryptor()
