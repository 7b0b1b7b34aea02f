"""Secrets that all worker processes share, held by the key server and made when first needed."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from gateway.errors import UnavailableError
from gateway.identity.database import DirectoryDatabase
from gateway.identity.totp import SecretStore

_BYTES: Final = 32
_NONCE_BYTES: Final = 12


class SharedSecret:
    """A key for authentication codes and sealing. `label` keeps one use apart from another."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def open(cls, store: SecretStore, path: str, database: DirectoryDatabase) -> SharedSecret:
        """Read it, or make it. Blocking. Raises a `KeysError` or `DirectoryError`.

        Processes that start at once end with one secret: only one at a time may make it.
        """
        held = store.read(path)
        if held is None:
            with database.writing() as connection:
                database.lock(connection)
                held = store.read(path)
                if held is None:
                    made = base64.b64encode(secrets.token_bytes(_BYTES)).decode("ascii")
                    held = {"key": made}
                    store.write(path, held)
        try:
            key = base64.b64decode(str(held.get("key", "")), validate=True)
        except binascii.Error:
            key = b""
        if len(key) != _BYTES:
            raise UnavailableError(
                f"expected a secret of {_BYTES} bytes at {path} on the key server, got something "
                "else; restore it from a backup of the key server",
                "gateway.shared_secret",
            )
        return cls(key)

    def mac(self, label: str, *parts: str) -> str:
        """An HMAC-SHA256 over the parts, in base64url. Where one part ends is part of it."""
        code = hmac.digest(self._key, _framed((label, *parts)), hashlib.sha256)
        return base64.urlsafe_b64encode(code).rstrip(b"=").decode("ascii")

    def seal(self, label: str, text: str, *bound_to: str) -> str:
        """The text under AES-256-GCM, readable again with the same label and parts alone."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = self._cipher(label).encrypt(nonce, text.encode(), _framed(bound_to))
        return base64.urlsafe_b64encode(nonce + sealed).decode("ascii")

    def unseal(self, label: str, sealed: str, *bound_to: str) -> str | None:
        """What was sealed; None if it was not, or not with this label and these parts."""
        try:
            raw = base64.urlsafe_b64decode(sealed.encode("ascii"))
            cipher, bound = self._cipher(label), _framed(bound_to)
            return cipher.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], bound).decode()
        except (InvalidTag, ValueError):
            return None

    def _cipher(self, label: str) -> AESGCM:
        return AESGCM(hmac.digest(self._key, _framed(("seal", label)), hashlib.sha256))

    def matches(self, code: str, label: str, *parts: str) -> bool:
        """Whether a code is the one for these parts, compared in constant time."""
        wanted = self.mac(label, *parts).encode("ascii")
        return hmac.compare_digest(code.encode("utf-8", "surrogatepass"), wanted)


def _framed(parts: tuple[str, ...]) -> bytes:
    texts = [part.encode("utf-8", "surrogatepass") for part in parts]
    return b"".join(len(text).to_bytes(8, "big") + text for text in texts)
