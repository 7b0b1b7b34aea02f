"""The log's public keys, as the key server knows them.

Apart from `havengate.wiring`: whoever verifies a log needs no database, and loading one takes
longer than most verifications.
"""

from __future__ import annotations

from collections.abc import Mapping

from audit.note import VerifierKey
from audit.ports import Signer
from audit.settings import AuditSettings
from havengate.configuration import Configuration
from keys.layout import AUDIT_SIGNING_KEY
from keys.server import open_vault
from keys.signing import VaultSigner


def log_verifier_keys(settings: AuditSettings, signer: Signer) -> tuple[VerifierKey, ...]:
    """Return the log's keys, all versions, as the key server knows them."""
    keys = signer.public_keys()
    return tuple(VerifierKey.ed25519(settings.origin, keys[version]) for version in sorted(keys))


def read_verifier_keys(
    settings: Configuration, environ: Mapping[str, str]
) -> tuple[VerifierKey, ...]:
    """Ask the key server for the log's public keys. Raises a `KeysError`."""
    with open_vault(settings.keys, "audit", environ=environ) as client:
        return log_verifier_keys(settings.audit, VaultSigner(client, AUDIT_SIGNING_KEY))
