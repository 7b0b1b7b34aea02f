"""Secrets that all worker processes share, held by the key server and made when first needed."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from typing import Final

from gateway.errors import UnavailableError
from gateway.identity.database import DirectoryDatabase
from gateway.identity.totp import SecretStore

_BYTES: Final = 32


class SharedSecret:
    """A key for message authentication codes. `label` keeps one use apart from another."""

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
        texts = [part.encode("utf-8", "surrogatepass") for part in (label, *parts)]
        framed = b"".join(len(text).to_bytes(8, "big") + text for text in texts)
        code = hmac.digest(self._key, framed, hashlib.sha256)
        return base64.urlsafe_b64encode(code).rstrip(b"=").decode("ascii")

    def matches(self, code: str, label: str, *parts: str) -> bool:
        """Whether a code is the one for these parts, compared in constant time."""
        wanted = self.mac(label, *parts).encode("ascii")
        return hmac.compare_digest(code.encode("utf-8", "surrogatepass"), wanted)
