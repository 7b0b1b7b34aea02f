"""What `havengate federated` works with: places, certificates, whose word counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from federated.approvals import FileSigner
from federated.deployment.certificates import Certificates
from federated.deployment.cli import StudyLogKeys
from federated.deployment.places import Places
from havengate import log_keys, wiring
from havengate.configuration import Configuration


def open_places(settings: Configuration) -> Places:
    """Return where this machine's federation lies: absolute, for its processes are told paths."""
    return Places(directory=Path(settings.federated.directory).resolve())


@contextmanager
def open_certificates(
    settings: Configuration, environ: Mapping[str, str]
) -> Iterator[Certificates]:
    """Have the key server issue what is missing or due, and keep it at hand for renewals."""
    places = open_places(settings)
    places.prepare()
    with (
        wiring.open_keys(settings, environ) as keys,
        keys.server.client("coordinator") as client,
    ):
        yield Certificates.open(
            places, server=keys.client, client=client, settings=settings.keys.pki
        )


def study_log_keys(settings: Configuration, environ: Mapping[str, str]) -> StudyLogKeys:
    """Ask the key server for the log's keys; the witnesses' stand in the configuration."""
    return StudyLogKeys(
        origin=settings.audit.origin,
        log_keys=[key.text for key in log_keys.read_verifier_keys(settings, environ)],
        witness_keys=[item.verifier_key for item in settings.audit.witnesses],
    )


def coordinator_key(settings: Configuration) -> str:
    """Return the coordinator's public key in hex; make the key if there is none."""
    path = Path(settings.federated.coordinator_key_file)
    signer = FileSigner.load(path) if path.exists() else FileSigner.create(path)
    return signer.public_key.hex()
