"""Ed25519 signatures (RFC 8032) by keys that never leave the key server.

`VaultSigner` is `keys.ports.Signer` over one transit key. What is signed is decided by the caller:
a checkpoint of the audit log, or a statement about an identity.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from keys.errors import VaultRejectedError
from keys.vault import VaultClient
from keys.vault_answers import data_of, decode_base64

_PUBLIC_KEY_BYTES = 32
_SIGNATURE_BYTES = 64


class VaultSigner:
    """Signs with the newest version of one key (`keys.layout` names them). Thread-safe.

    Public keys are read once and again when the server signs with a version not seen before.
    """

    def __init__(self, client: VaultClient, key: str) -> None:
        self._client = client
        self._key = key
        self._lock = threading.Lock()
        self._public_keys: Mapping[int, bytes] = {}

    def public_keys(self) -> Mapping[int, bytes]:
        """Raw 32-byte public keys by version; the greatest number is the one that signs.

        A version that was made since and has signed nothing here yet is missing until `refresh`.
        """
        with self._lock:
            known = self._public_keys
        return known or self.refresh()

    def refresh(self) -> Mapping[int, bytes]:
        """Read the public keys again."""
        path = f"{self._client.layout.transit}/keys/{self._key}"
        keys = MappingProxyType(_parse_public_keys(self._client.call("GET", path)))
        with self._lock:
            self._public_keys = keys
        return keys

    def sign(self, message: bytes) -> tuple[int, bytes]:
        """Return the version used and the 64-byte signature, which has been verified here.

        Raises a `VaultError`; `VaultRejectedError` also if what came back is not a signature of
        `message` by that key.
        """
        text = base64.b64encode(message).decode("ascii")
        path = f"{self._client.layout.transit}/sign/{self._key}"
        answer = self._client.call("POST", path, {"input": text})
        version, signature = _parse_signature(answer)
        public_key = self.public_keys().get(version) or self.refresh().get(version)
        if public_key is None:
            raise VaultRejectedError(
                f"The key server signed with version {version} of {self._key}, whose public key it "
                "does not show."
            )
        try:
            Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
        except InvalidSignature as error:
            raise VaultRejectedError(
                f"The key server's signature by {self._key} version {version} does not verify; do "
                "not publish anything until its operator has looked into it."
            ) from error
        return version, signature


def _parse_public_keys(answer: Mapping[str, Any]) -> dict[int, bytes]:
    data = data_of(answer)
    if data.get("type") != "ed25519":
        raise VaultRejectedError(f"Expected an ed25519 key, found {data.get('type')!r}.")
    try:
        keys = {
            int(version): decode_base64(details["public_key"])
            for version, details in data["keys"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise VaultRejectedError(
            "The key server described the versions of a key in a form that it never has."
        ) from error
    if not keys or any(len(key) != _PUBLIC_KEY_BYTES for key in keys.values()):
        raise VaultRejectedError(
            "The key server showed no public key, or one that has not 32 bytes."
        )
    return keys


def _parse_signature(answer: Mapping[str, Any]) -> tuple[int, bytes]:
    match str(data_of(answer).get("signature", "")).split(":"):
        case ["vault", version, encoded] if version[:1] == "v" and version[1:].isdecimal():
            signature = decode_base64(encoded)
            if len(signature) == _SIGNATURE_BYTES:
                return int(version[1:]), signature
    raise VaultRejectedError(
        "Expected a signature of the form vault:v<version>:<base64 of 64 bytes>, got something "
        "else."
    )
