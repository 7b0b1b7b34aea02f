"""Signatures by keys on a real server."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from keys.errors import VaultDeniedError, VaultRejectedError
from keys.layout import AUDIT_SIGNING_KEY, IDENTITY_SIGNING_KEY, KEK
from keys.signing import VaultSigner
from keys.vault import VaultClient
from tests.openbao import RunningServer


@pytest.fixture
def audit(openbao: RunningServer) -> Iterator[VaultClient]:
    with openbao.client("audit") as client:
        yield client


@pytest.mark.parametrize("message", [b"", b"checkpoint\n", bytes(100_000)])
def test_a_signature_is_raw_ed25519_over_the_message(audit: VaultClient, message: bytes) -> None:
    signer = VaultSigner(audit, AUDIT_SIGNING_KEY)
    version, signature = signer.sign(message)
    assert version == max(signer.public_keys())
    assert len(signature) == 64
    Ed25519PublicKey.from_public_bytes(signer.public_keys()[version]).verify(signature, message)


def test_a_rotated_key_signs_as_its_new_version_and_the_old_can_still_be_verified(
    audit: VaultClient, vault: Callable[[str], VaultClient]
) -> None:
    signer = VaultSigner(audit, AUDIT_SIGNING_KEY)
    old_version, old_signature = signer.sign(b"before")
    operator = vault("operator")
    operator.call(
        "POST", f"{operator.layout.transit}/keys/{AUDIT_SIGNING_KEY}/rotate", {}, idempotent=False
    )
    new_version, _ = signer.sign(b"after")
    assert new_version == old_version + 1 == max(signer.public_keys())
    old_key = Ed25519PublicKey.from_public_bytes(signer.public_keys()[old_version])
    old_key.verify(old_signature, b"before")


def test_public_keys_are_read_once(audit: VaultClient, monkeypatch: pytest.MonkeyPatch) -> None:
    signer = VaultSigner(audit, AUDIT_SIGNING_KEY)
    paths: list[str] = []
    call = audit.call

    def counting(method: str, path: str, *rest: dict[str, str]) -> dict[str, object]:
        paths.append(path)
        return call(method, path, *rest)

    monkeypatch.setattr(audit, "call", counting)
    for _ in range(3):
        signer.sign(b"checkpoint")
    assert sum("/keys/" in path for path in paths) == 1


def test_two_keys_differ(vault: Callable[[str], VaultClient]) -> None:
    gateway = vault("gateway")
    identity = VaultSigner(gateway, IDENTITY_SIGNING_KEY)
    log = VaultSigner(gateway, AUDIT_SIGNING_KEY)
    assert identity.public_keys()[1] != log.public_keys()[1]
    with pytest.raises(VaultDeniedError):
        log.sign(b"a forged checkpoint")


def answer_with(signature: str) -> Callable[..., dict[str, object]]:
    def call(_: str, path: str, *rest: object) -> dict[str, object]:
        if "/sign/" in path:
            return {"data": {"signature": signature}}
        own = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw()
        encoded = base64.b64encode(own).decode()
        return {"data": {"type": "ed25519", "keys": {"1": {"public_key": encoded}}}}

    return call


def signature_of(message: bytes, *, version: int = 1) -> str:
    signature = Ed25519PrivateKey.from_private_bytes(bytes(32)).sign(message)
    return f"vault:v{version}:{base64.b64encode(signature).decode()}"


def test_the_forger_of_the_next_test_can_sign(
    audit: VaultClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "call", answer_with(signature_of(b"message")))
    assert VaultSigner(audit, AUDIT_SIGNING_KEY).sign(b"message")[0] == 1


@pytest.mark.parametrize(
    "signature",
    [
        "",
        "vault:v1:",
        "vault:v1:AAAA",
        "vault:v1:not base64",
        f"vault:v1:{base64.b64encode(bytes(64)).decode()}",
        f"vault:v1:{base64.b64encode(bytes(65)).decode()}",
        signature_of(b"another message"),
        signature_of(b"message", version=2),
        signature_of(b"message").replace("vault:v1", "vault:1"),
    ],
)
def test_what_is_not_a_signature_of_the_message_is_never_returned(
    audit: VaultClient, monkeypatch: pytest.MonkeyPatch, signature: str
) -> None:
    monkeypatch.setattr(audit, "call", answer_with(signature))
    with pytest.raises(VaultRejectedError):
        VaultSigner(audit, AUDIT_SIGNING_KEY).sign(b"message")


def test_a_key_of_another_kind_is_refused(vault: Callable[[str], VaultClient]) -> None:
    with pytest.raises(VaultRejectedError, match="ed25519"):
        VaultSigner(vault("operator"), KEK).public_keys()
