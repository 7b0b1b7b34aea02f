"""Apps that we did not write work as they are: what the same clients see through the gateway."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.interop import drive_kolibri, drive_medplum
from tests.interop.processes import free_port, started


def test_a_fhir_server_of_others_is_driven_directly(medplum_server: str) -> None:
    assert drive_medplum.drive(medplum_server) == list(drive_medplum.EXPECTED)


def test_the_example_clinic_is_no_different(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "examples.clinic", "--port", str(port)]
    base = f"http://127.0.0.1:{port}/fhir"
    with started([*command, "--database", str(tmp_path / "clinic.sqlite3")], f"{base}/metadata"):
        assert drive_medplum.drive(base) == list(drive_medplum.EXPECTED)


def test_a_learning_platform_of_others_is_driven_directly(kolibri_server: str) -> None:
    assert drive_kolibri.drive(kolibri_server) == list(drive_kolibri.EXPECTED)
