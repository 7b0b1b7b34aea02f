"""Whose word counts: the keys of coordinator, ethics board and sites, as one file, and what a
SuperLink asks before it starts a run.

The same file is given to every device at enrolment. It holds public keys only, but whoever can
change it can approve studies, so it must be closed to others like a secret.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from federated.app.bundle import installed_bundle
from federated.code_hash import installed_code_hash
from federated.deployment.gate import RunConfiguration
from federated.errors import ApprovalError, DeploymentError
from federated.manifest import Study
from federated.signed_study import SignedStudy, TrustedKeys, parse_signed_study, verify_study
from keys.private_files import read_private, write_private


class _Keys(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    coordinator: list[str]
    ethics_board: list[str]
    sites: dict[str, list[str]] = {}
    own_site: str = ""


def write_trust(path: Path, trusted: TrustedKeys) -> None:
    """Write the file, mode 0600."""
    keys = _Keys(
        coordinator=sorted(key.hex() for key in trusted.coordinator),
        ethics_board=sorted(key.hex() for key in trusted.ethics_board),
        sites={name: sorted(k.hex() for k in some) for name, some in trusted.sites.items()},
        own_site=trusted.own_site,
    )
    write_private(path, msgspec.json.format(msgspec.json.encode(keys)))


def read_trust(path: Path) -> TrustedKeys:
    """Read the file. Raises `DeploymentError` if it is malformed, `KeysError` if open to others."""
    try:
        keys = msgspec.json.decode(read_private(path), type=_Keys)
        return TrustedKeys(
            coordinator=_parse(keys.coordinator),
            ethics_board=_parse(keys.ethics_board),
            sites={name: _parse(some) for name, some in keys.sites.items()},
            own_site=keys.own_site,
        )
    except (msgspec.DecodeError, ValueError) as error:
        raise DeploymentError(f"{path} does not hold the keys of who may approve: {error}") from (
            error
        )


def _parse(keys: list[str]) -> frozenset[bytes]:
    raw = frozenset(bytes.fromhex(key) for key in keys)
    if any(len(key) != 32 for key in raw):  # noqa: PLR2004 - Ed25519
        raise ValueError("a key is not 32 bytes in hex")
    return raw


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovedStudies:
    """The gate's rule: a run is started only for a study that all who must have signed.

    `clock` is Unix time in seconds.
    """

    trusted: TrustedKeys
    clock: Callable[[], float] = time.time

    @classmethod
    def load(cls, path: Path) -> ApprovedStudies:
        """Read the keys once; a SuperLink is restarted when they change."""
        return cls(trusted=read_trust(path))

    def verify_start(
        self, evidence: bytes, *, bundle_hash: str, configuration: RunConfiguration
    ) -> None:
        """Raise `FederatedError` unless this run is exactly what was approved, and in time."""
        signed = parse_signed_study(evidence)
        verify_study(signed, self.trusted)
        verify_run(signed.study, bundle_hash=bundle_hash, configuration=configuration)
        if not signed.study.valid_from <= self.clock() < signed.study.valid_until:
            raise ApprovalError(f"The study {signed.study.id} is not valid at this time.")


def verify_run(study: Study, *, bundle_hash: str, configuration: RunConfiguration) -> None:
    """Raise `ApprovalError` unless run and installed code are the study's, whole."""
    if bundle_hash != installed_bundle().hash:
        raise ApprovalError("The run's bundle is not the app that is installed here.")
    if study.code_hash != installed_code_hash():
        raise ApprovalError(f"The study {study.id} was approved for other code than is installed.")
    if dict(configuration) != study.run_configuration():
        raise ApprovalError(f"The run is configured otherwise than the study {study.id} says.")


def encode_evidence(signed: SignedStudy) -> bytes:
    """What the coordinator shows the gate."""
    return signed.encode()
