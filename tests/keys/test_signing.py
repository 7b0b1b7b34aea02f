"""Signatures by keys on a real server."""

from __future__ import annotations

from collections.abc import Callable

from keys.layout import AUDIT_SIGNING_KEY
from keys.signing import VaultSigner
from keys.vault import VaultClient


def test_signature_is_raw_ed25519(vault: Callable[[str], VaultClient]) -> None:
    signer = VaultSigner(vault("audit"), AUDIT_SIGNING_KEY)
    version, signature = signer.sign(b"checkpoint")
    assert len(signature) == 64
    assert len(signer.public_keys()[version]) == 32
