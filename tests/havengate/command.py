"""The command `havengate`, run in this process: importing everything anew costs seconds."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from havengate.cli import main


def run(home: Path, *words: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Run the command in this process; its exit code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        arguments = ["havengate", "--config", str(home / "havengate.toml"), *words]
        patch.setattr(sys, "argv", arguments)
        patch.setattr(sys, "stdin", io.StringIO())
        patch.chdir(home)
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main()
    code = ended.value.code
    assert isinstance(code, int)
    return code, out.getvalue(), err.getvalue()


def run_json(home: Path, *words: str) -> dict[str, Any]:
    code, out, err = run(home, *words, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found
