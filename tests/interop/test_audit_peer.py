"""The bound of a privacy audit is what JAX Privacy computes from the same counts."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.federated.learning.audit_references import REFERENCES
from tests.interop.processes import installed

HERE = Path(__file__).parent / "jax_privacy"


@pytest.fixture(scope="session")
def jax_privacy() -> Path:
    """A folder with the package alone; NumPy, SciPy and dp-accounting are ours."""
    pins = HERE / "requirements.txt"
    with installed("jax_privacy", pins.read_bytes() + sys.version.encode()) as (folder, missing):
        if missing:
            uv = Path(sys.executable).with_name("uv")
            target: list[str | Path] = ["--python", sys.executable, "--target", folder / "packages"]
            pinned: list[str | Path] = ["--quiet", "--require-hashes", "--no-deps", "-r", pins]
            _run([uv, "pip", "install", *target, *pinned])
        return folder / "packages"


def _run(command: list[str | Path], given: str = "") -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{Path(command[0]).name} failed: {done.stderr[-2000:]}"
    return done.stdout


def test_bounds_are_those_of_jax_privacy(jax_privacy: Path) -> None:
    given = json.dumps([asdict(counted) for counted in REFERENCES])
    theirs = json.loads(_run([sys.executable, HERE / "bounds.py", jax_privacy], given))
    assert theirs == pytest.approx([counted.bound() for counted in REFERENCES], abs=1e-3)
    # The table that is checked where nothing can be installed.
    assert theirs == pytest.approx(list(REFERENCES.values()), abs=1e-4)
