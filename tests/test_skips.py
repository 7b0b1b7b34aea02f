"""In continuous integration nothing is skipped silently."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SKIPPING_TEST = """
import pytest
def test_that_skips():
    pytest.skip("no such program")
"""
SKIPPING_MODULE = """
import pytest
pytest.skip("no such program", allow_module_level=True)
"""
EXPECTED_FAILURE = """
import pytest
@pytest.mark.xfail(reason="known")
def test_that_fails():
    raise AssertionError
"""


def run(tmp_path: Path, source: str, *, ci: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "test_it.py"
    path.write_text(source)
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-c", os.devnull, "-p", "tests.conftest", str(path)],
        cwd=root,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("source", [SKIPPING_TEST, SKIPPING_MODULE])
def test_a_skip_is_a_failure_in_ci_and_says_why(tmp_path: Path, source: str) -> None:
    result = run(tmp_path, source, ci="true")
    assert result.returncode != 0
    assert "CI does not allow" in result.stdout
    assert "no such program" in result.stdout


@pytest.mark.parametrize("source", [SKIPPING_TEST, SKIPPING_MODULE])
def test_a_skip_is_a_skip_elsewhere(tmp_path: Path, source: str) -> None:
    result = run(tmp_path, source, ci="")
    assert "1 skipped" in result.stdout


def test_an_expected_failure_is_no_skip(tmp_path: Path) -> None:
    assert run(tmp_path, EXPECTED_FAILURE, ci="true").returncode == 0
