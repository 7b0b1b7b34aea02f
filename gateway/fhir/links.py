"""Paging links of the app, given to clients in a form that says nothing and fits nobody else.

A link of the app holds search terms (blind-index tokens among them), cursors and internal host
names. The client gets it encrypted: AES-256-GCM (NIST SP 800-38D, random 96-bit nonce) under a key
derived with HKDF-SHA256 (RFC 5869). Principal and route are associated data. The gateway keeps
nothing.
"""

from __future__ import annotations

import os
import struct
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from gateway.errors import BadRequestError
from keys.sealed import encode_base64url, parse_base64url

LIFE_S: Final = 3_600.0
MIN_KEY_BYTES: Final = 32
MAX_TOKEN_CHARACTERS: Final = 16_384

_NONCE_BYTES: Final = 12
_INFO: Final = b"havengate/fhir/links/1"
_EXPIRY: Final = struct.Struct(">d")
#: Links are filled up to a multiple of this, so that their length says little about them.
_BLOCK_BYTES: Final = 64


class Pager:
    """Seals and opens links under a key of at least 32 random bytes, the same in every worker."""

    def __init__(self, key: bytes) -> None:
        if len(key) < MIN_KEY_BYTES:
            raise ValueError(f"expected a key of at least {MIN_KEY_BYTES} bytes, got {len(key)}")
        derived = HKDF(algorithm=SHA256(), length=32, salt=None, info=_INFO).derive(key)
        self._cipher = AESGCM(derived)

    def seal(self, link: str, *, principal: str, route: str, now: float) -> str:
        """A URL-safe text that only the same principal on the same route can have opened.

        For one hour; `now` in Unix seconds. Raises `ValueError` for a link too long to be opened.
        """
        inner = _EXPIRY.pack(now + LIFE_S) + link.encode()
        inner += b"\0" * (-len(inner) % _BLOCK_BYTES)
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + self._cipher.encrypt(nonce, inner, _bound(principal, route))
        token = encode_base64url(sealed)
        if len(token) > MAX_TOKEN_CHARACTERS:
            raise ValueError(f"expected a shorter link, got {len(link)} characters")
        return token

    def open(self, token: str, *, principal: str, route: str, now: float) -> str:
        """The link again.

        Raises `BadRequestError`: one and the same for whatever is not authentic, with status 410
        for what was and has expired.
        """
        if len(token) > MAX_TOKEN_CHARACTERS:
            raise _refused()
        try:
            sealed = parse_base64url(token)
            nonce, message = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
            inner = self._cipher.decrypt(nonce, message, _bound(principal, route))
        except (InvalidTag, ValueError) as error:
            raise _refused() from error
        [expires] = _EXPIRY.unpack_from(inner)
        # Negated, so that a time that compares with nothing (NaN) is refused.
        if not now < expires <= now + LIFE_S:
            raise BadRequestError(
                "Expected a paging link at most one hour old, got an older one. Search again.",
                status=410,
            )
        return inner[_EXPIRY.size :].rstrip(b"\0").decode()


def _bound(principal: str, route: str) -> bytes:
    """Both, unambiguously: the length of the first goes before."""
    first = principal.encode()
    return struct.pack(">I", len(first)) + first + route.encode()


def _refused() -> BadRequestError:
    return BadRequestError(
        "Expected a paging link as this gateway gave it, to the same person for the same app; got "
        "something else. Search again."
    )
