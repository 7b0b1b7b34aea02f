"""The committing authenticated encryption `hg1`: bytes in, bytes out.

Every message has its own AES-256-GCM key, derived together with a key commitment by one HKDF-Expand
block (RFC 5869 section 2.3) from the data key, a random salt and the associated data. A message is
`salt(16) ‖ commitment(32) ‖ ciphertext ‖ tag(16)`. DESIGN.md argues why this commits to the key and
to the context, and why a fixed GCM nonce is right here.

Not here: which key seals what (`keys.keyring`), the printable form (`keys.sealed`), large content
(`keys.chunked`).
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.hmac import HMAC

from keys.errors import KeyConfigurationError, UnsealError

KEY_BYTES = 32
SALT_BYTES = 16
COMMITMENT_BYTES = 32
TAG_BYTES = 16
#: What sealing adds to the length of the plaintext.
OVERHEAD_BYTES = SALT_BYTES + COMMITMENT_BYTES + TAG_BYTES
#: At most this many messages under one data key: salts then collide with probability below 2**-64.
SEALS_PER_KEY = 2**32

#: Labels of equal length, so that no derivation for one use can be read as one for another.
MESSAGE_LABEL = b"havengate/hg1/"
FILE_LABEL = b"havengate/hgc1"

_DERIVED_BYTES = 64
#: Each derived key encrypts one message, so its nonce need not differ from any other.
_NONCE = bytes(12)
#: The counter octet of the first, and here only, block of HKDF-Expand.
_FIRST_BLOCK = b"\x01"
_COMMITMENT_END = SALT_BYTES + COMMITMENT_BYTES


def encode_parts(parts: Iterable[str | bytes]) -> bytes:
    """Join parts, each after its length: different lists never give the same bytes."""
    encoded = [part.encode() if isinstance(part, str) else part for part in parts]
    return b"".join(len(part).to_bytes(4) + part for part in encoded)


def key_hash(key: bytes) -> HMAC:
    """Return HMAC-SHA512 with a 32-byte key and nothing hashed yet: what a data key is kept as.

    OpenSSL erases it when the last reference goes (HMAC_CTX_free(3)); copying it costs half of
    keying it again. Raises `KeyConfigurationError` for a key of any other length: HMAC pads short
    keys, so two lengths could mean the same key, and nothing would be committed to.
    """
    if len(key) != KEY_BYTES:
        raise KeyConfigurationError(
            f"expected a data key of {KEY_BYTES} bytes, got {len(key)}; the key table or the key "
            "server belongs to another program"
        )
    return HMAC(key, SHA512())


def expand(key: HMAC, info: bytes) -> bytes:
    """HKDF-Expand with SHA-512, 64 bytes: one block.

    Extraction is skipped because the key is already uniform (RFC 5869 section 3.3).
    """
    block = key.copy()
    block.update(info + _FIRST_BLOCK)
    return block.finalize()


def derive(key: HMAC, label: bytes, salt: bytes, associated: bytes) -> bytes:
    """Derive the 64 bytes of one message: an AES-256 key and the commitment to key and context."""
    return expand(key, label + salt + associated)


def encrypt(derived: bytes, salt: bytes, plaintext: bytes) -> bytes:
    """Encrypt the one message that `derived` is for."""
    box = AESGCM(derived[:KEY_BYTES])
    return salt + derived[KEY_BYTES:] + box.encrypt(_NONCE, plaintext, None)


def decrypt(derived: bytes, message: bytes) -> bytes:
    """Open `message` with what was derived from its salt. Raises `UnsealError`, and only that."""
    if not hmac.compare_digest(message[SALT_BYTES:_COMMITMENT_END], derived[KEY_BYTES:]):
        raise unseal_error()
    try:
        return AESGCM(derived[:KEY_BYTES]).decrypt(_NONCE, message[_COMMITMENT_END:], None)
    except InvalidTag as error:
        raise unseal_error() from error


def new_salt() -> bytes:
    """Return 16 random bytes: the only randomness of a message."""
    return os.urandom(SALT_BYTES)


def salt_of(message: bytes) -> bytes:
    """Return the salt of a message. Raises `UnsealError` if it is shorter than any message."""
    if len(message) < OVERHEAD_BYTES:
        raise unseal_error()
    return message[:SALT_BYTES]


def seal(key: bytes, associated: bytes, plaintext: bytes) -> bytes:
    """Seal `plaintext` under a 32-byte uniform key, bound to `associated`.

    The caller sees to it that no key seals more than `SEALS_PER_KEY` messages.
    """
    salt = new_salt()
    return encrypt(derive(key_hash(key), MESSAGE_LABEL, salt, associated), salt, plaintext)


def unseal(key: bytes, associated: bytes, message: bytes) -> bytes:
    """Open what `seal` made with the same key and the same `associated`. Raises `UnsealError`."""
    return decrypt(derive(key_hash(key), MESSAGE_LABEL, salt_of(message), associated), message)


def unseal_error() -> UnsealError:
    """Return the one error for a wrong key, a wrong place and a changed text."""
    return UnsealError(
        "expected a text sealed for this tenant, person, service and field; it did not open: it "
        "was changed, moved, or sealed under another key; fetch it again, or restore it from a "
        "backup"
    )
