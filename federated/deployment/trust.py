"""What a SuperLink asks before it starts a run: the signatures that every device asks for too.

Whose word counts stands in the federation's enrolment file (`node.enrolment.Enrolment`), the same
that devices are given. It holds public keys only, but whoever can change it can approve studies, so
it must be closed to others like a secret.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from federated.app.bundle import installed_bundle
from federated.code_hash import installed_code_hash
from federated.deployment.gate import RunConfiguration
from federated.errors import ApprovalError
from federated.manifest import Study
from federated.node.enrolment import parse_enrolment
from federated.signed_study import TrustedKeys, parse_signed_study, verify_study
from keys.private_files import read_private


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovedStudies:
    """The gate's rule: a run is started only for a study that all who must have signed.

    `clock` is Unix time in seconds.
    """

    trusted: TrustedKeys
    clock: Callable[[], float] = time.time

    @classmethod
    def load(cls, path: Path) -> ApprovedStudies:
        """Read the keys once; a SuperLink is restarted when they change.

        Raises `ManifestError` for a file that is malformed, `KeysError` for one open to others.
        """
        # Of what is loaded now, not of what an update may put there later.
        installed_code_hash()
        return cls(trusted=parse_enrolment(read_private(path)).trusted())

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
    if _typed(configuration) != _typed(study.run_configuration()):
        raise ApprovalError(f"The run is configured otherwise than the study {study.id} says.")


def _typed(configuration: RunConfiguration) -> dict[str, tuple[type, bool | int | float | str]]:
    """With the types: True, 1 and 1.0 are equal and not the same setting."""
    return {name: (type(value), value) for name, value in configuration.items()}
