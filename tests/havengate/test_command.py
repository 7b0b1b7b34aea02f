"""The command as a whole: what it loads, where it refuses to begin, and how Ctrl-C ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.havengate.command import run

ROOT = Path(__file__).parents[2]
#: What takes long to load, and no help needs.
HEAVY = ("sqlalchemy", "hvac", "requests", "mitmproxy", "granian", "jinja2", "cryptography.x509")


def environment(*before: Path) -> dict[str, str]:
    """Without settings of this process; `before` is looked through first for libraries."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HAVENGATE_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, (*before, ROOT)))}


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "havengate", *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_does_not_wait_for_libraries_that_it_does_not_need() -> None:
    code = (
        "import sys; from havengate.cli import build; build(); "
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "words",
    [
        ("keys", "status"),
        ("keys", "erase", "Patient/1"),
        ("audit", "search"),
        ("audit", "verify"),
        ("audit", "key"),
        ("users", "list"),
        ("check",),
        ("up",),
    ],
)
def test_in_a_folder_without_a_configuration_nothing_is_begun(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    done = command(tmp_path, *words)
    assert done.returncode == 2, done.stderr
    assert "There is no havengate.toml in" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_built_in_rules_can_be_looked_at_anywhere(tmp_path: Path) -> None:
    done = command(tmp_path, "policy", "check")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_libraries_load_is_one_line(tmp_path: Path) -> None:
    # A library that takes for ever, found before the real one.
    slow = tmp_path / "typer.py"
    slow.write_text("import time\nprint('loading', flush=True)\ntime.sleep(600)\n")
    # Tests that run in the background of a shell have Ctrl-C ignored, and so would what they start.
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    heard += "os.execv(sys.executable, [sys.executable, '-m', 'havengate', '--help'])"
    with subprocess.Popen(
        [sys.executable, "-c", heard],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == "loading\n"
            running.send_signal(signal.SIGINT)
            _, err = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 130
    assert err == "havengate: interrupted before it began\n"


@pytest.mark.parametrize("words", [("device", "receipts"), ("federated", "up"), ("study", "list")])
def test_a_gateway_without_the_libraries_of_studies_says_what_to_install(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    (tmp_path / "havengate.toml").write_text("")
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['numpy', 'flwr', 'sqlcipher3']))\n"
        f"sys.argv = ['havengate', *{words!r}]\n"
        "from havengate.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
    assert "install havengate[federated]" in done.stderr


def test_nothing_in_an_error_steers_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "enrolment.json").write_text('{"\\u001b[2J\\u009b2J\\u202e": 1}')
    place = ["--store", str(tmp_path / "s"), "--key-file", str(tmp_path / "k")]
    code, _, err = run(tmp_path, "device", *place, "enrol", str(tmp_path / "enrolment.json"))
    assert code
    assert "malformed" in err
    assert err.replace("\n", "").isprintable(), ascii(err)
