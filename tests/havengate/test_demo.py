"""`make demo` does what it says, and its log verifies without us and without the key server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import aics_tlog
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.note import VerifierKey
from tests.havengate.command import run, run_json

#: The whole demo runs in the fixture, on a machine that may have much else to do.
pytestmark = pytest.mark.timeout(1200)

ROOT = Path(__file__).parents[2]
ORIGIN = "havengate.internal/log/1"
#: A valid key of the right name that has signed nothing here.
STRANGER = VerifierKey.ed25519(ORIGIN, Ed25519PrivateKey.generate().public_key().public_bytes_raw())


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory that the demo made for itself, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/demo.py"), "--once", "--any-ports"],
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return folder / "var/demo", done.stdout


def test_the_demo_tells_its_whole_story(played: tuple[Path, str]) -> None:
    _, told = played
    for expected in (
        "24 synthetic patients",
        "stands in front at https://localhost:",
        "Patient/2: You are not on this patient's care team.",
        "the app keeps     hg1.",
        "finds Patient/1; the app's database does not hold it",
        "another clinician and the patient are told that there is none (404)",
        "of the whole record is refused: No rule allows this.",
        "no sign-in (401), a forged token (401), a forged header (401), a crooked path (400)",
        "Dr Dorn opens Patient/3 with a reason, for an hour; Patient/6 stays closed",
        "sound: every byte is what the checkpoint says",
        "answered, 5,068 people at 4 nodes",
        "each person ε = 1, δ = 0",
        "var/demo/study/var/reports/sleep-and-mood/report.html",
        "trained, 5,068 people at 4 nodes in 10 of 10 rounds",
        "asked of people whom it never saw",
        "each person ε = 2 at δ = 1e-05 for the model, ε = 0.9 to judge it",
        "guesses right: ε is at least",
        "var/demo/study/var/reports/phq9-model/report.html",
        "without privacy",
    ):
        assert expected in told


def test_what_the_demo_sealed_is_nowhere_on_disk(played: tuple[Path, str]) -> None:
    home, _ = played
    for path in home.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"Slept well for the first time" not in content, path
            assert b"555 0199" not in content, path
            # Reasons are for those who review, in the database of accounts; not in the log.
            if path.parent.name != "demo" and not path.name.startswith("gateway.sqlite3"):
                assert b"Found unconscious" not in content, path


def test_the_log_verifies_by_command_with_and_without_the_key_server(
    played: tuple[Path, str],
) -> None:
    home, _ = played
    found = run_json(home, "audit", "verify")
    assert found["sound"]
    assert found["dangling_count"] == 0
    # Other tests of this worker may have rotated the key: all its versions count.
    keys = run_json(home, "audit", "key")["verifier_keys"]
    (home / "log.keys").write_text("\n".join(keys), encoding="utf-8")
    log = str(home / "var/audit")
    alone = run_json(home, "audit", "verify", "--log", log, "--key", str(home / "log.keys"))
    assert alone["sound"]
    assert run(home, "audit", "verify", "--log", log, "--key", STRANGER.text)[0] == 1
    code, _, err = run(home, "audit", "verify", "--log", log)
    assert (code, "pass --key" in err) == (2, True)


def test_an_independent_program_accepts_the_log(played: tuple[Path, str]) -> None:
    home, _ = played
    log = home / "var/audit"
    note = aics_tlog.parse_note((log / "checkpoint").read_bytes())
    keys = run_json(home, "audit", "key")["verifier_keys"]
    tried = [
        aics_tlog.verify_checkpoint(note, aics_tlog.parse_vkey(key), expected_origin=ORIGIN)
        for key in keys
    ]
    (found,) = [result for result in tried if result.ok]
    assert found.size is not None
    assert found.root is not None
    files = aics_tlog.FileSystemTileReader(log)
    assert aics_tlog.audit_tiles(files, found.size, found.root).size == found.size


def test_an_export_whose_reader_goes_away_still_has_its_outcome_in_the_log(
    played: tuple[Path, str],
) -> None:
    home, _ = played
    command = f"{sys.executable} -m havengate audit export --format balp | head -n 1"
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout, done.stderr
    assert json.loads(done.stdout)["resourceType"] == "AuditEvent"
    assert "Traceback" not in done.stderr
    assert run_json(home, "audit", "verify")["dangling_count"] == 0
