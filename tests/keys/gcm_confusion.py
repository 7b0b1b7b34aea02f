"""Makes one AES-GCM ciphertext that opens under two keys, to show what a commitment is for.

Method: Dodis, Grubbs, Ristenpart, Woodage 2018, section 3; Albertini et al. 2022, section 3. GCM's
tag is linear in the ciphertext blocks over GF(2**128), so one free block makes both tags equal.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_REDUCTION = 0xE1 << 120
_ONE = 1 << 127


def craft(first: bytes, second: bytes, nonce: bytes) -> bytes:
    """Return `ciphertext ‖ tag`, two blocks and a tag, valid under both 32-byte keys."""
    hashes = [int.from_bytes(_block(key, bytes(16))) for key in (first, second)]
    masks = [int.from_bytes(_block(key, nonce + b"\0\0\0\1")) for key in (first, second)]
    fixed = 0x68617665_6E676174_65206B65_7920636F
    length = (0).to_bytes(8) + (256).to_bytes(8)
    # tag = fixed*H^3 + free*H^2 + length*H + mask, alike for both keys: solve for `free`.
    constants = [
        _times(fixed, _power(h, 3)) ^ _times(int.from_bytes(length), h) ^ mask
        for h, mask in zip(hashes, masks, strict=True)
    ]
    squares = _power(hashes[0], 2) ^ _power(hashes[1], 2)
    free = _times(constants[0] ^ constants[1], _power(squares, 2**128 - 2))
    tag = constants[0] ^ _times(free, _power(hashes[0], 2))
    return fixed.to_bytes(16) + free.to_bytes(16) + tag.to_bytes(16)


def _block(key: bytes, block: bytes) -> bytes:
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 (one block of GCM)
    return encryptor.update(block)


def _times(a: int, b: int) -> int:
    """Multiply in GF(2**128) as NIST SP 800-38D section 6.3 does."""
    product = 0
    for bit in range(127, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = (b >> 1) ^ (_REDUCTION if b & 1 else 0)
    return product


def _power(base: int, exponent: int) -> int:
    result = _ONE
    while exponent:
        if exponent & 1:
            result = _times(result, base)
        base = _times(base, base)
        exponent >>= 1
    return result
