"""An approver's, or the coordinator's, own Ed25519 key in a file that only its owner reads.

Why the key server does not hold these keys stands in `federated.approvals`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from federated.errors import ApprovalError
from keys.errors import KeysError
from keys.private_files import make_private_directory, read_private, write_private

_KEY_BYTES: Final = 32


class FileSigner:
    """An approver's or coordinator's Ed25519 key: 32 bytes in a file that only its owner reads."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def load(cls, path: Path) -> FileSigner:
        """Read the key. Raises `ApprovalError` if it is missing, open to others, or no key."""
        try:
            raw = read_private(path)
        except KeysError as error:
            raise ApprovalError(f"{error} `havengate study key {path}` makes a new one.") from error
        if len(raw) != _KEY_BYTES:
            raise ApprovalError(f"{path} must hold the {_KEY_BYTES} bytes of an Ed25519 key.")
        return cls(Ed25519PrivateKey.from_private_bytes(raw))

    @classmethod
    def create(cls, path: Path) -> FileSigner:
        """Make a key. Raises `ApprovalError` if there is a file already."""
        if path.exists():
            raise ApprovalError(f"{path} is there already: name another file.")
        key = Ed25519PrivateKey.generate()
        try:
            if not path.parent.exists():
                make_private_directory(path.parent)
            write_private(path, key.private_bytes_raw())
        except (OSError, KeysError) as error:
            raise ApprovalError(f"{path} cannot be written: {error}.") from error
        return cls(key)

    @property
    def public_key(self) -> bytes:
        """The raw 32 bytes that others are enrolled with."""
        return self._key.public_key().public_bytes_raw()

    def public_keys(self) -> Mapping[int, bytes]:
        """As `signed_study.Signer` says; there is one version."""
        return {1: self.public_key}

    def sign(self, message: bytes) -> tuple[int, bytes]:
        """As `signed_study.Signer` says."""
        return 1, self._key.sign(message)
