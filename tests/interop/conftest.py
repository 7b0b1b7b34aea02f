"""Two apps that we did not write, installed from their pins on first use and run for a session."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.interop import drive_kolibri
from tests.interop.processes import REPOSITORY, free_port, installed, started

HERE = Path(__file__).parent
OLDEST_NODE = 20


@pytest.fixture(scope="session")
def medplum_server() -> Iterator[str]:
    """A FHIR server of Medplum's packages, empty; its base URL, without a slash at the end."""
    _need_node()
    source = HERE / "medplum"
    names = ("package.json", "package-lock.json", "server.mjs")
    pins = b"".join((source / name).read_bytes() for name in names)
    with installed("medplum", pins) as (folder, missing):
        if missing:
            for name in names:
                shutil.copy2(source / name, folder / name)
            quiet: list[str | Path] = [
                "--ignore-scripts",
                "--no-audit",
                "--no-fund",
                "--loglevel=error",
            ]
            _run(["npm", "ci", "--prefix", folder, *quiet])
    port = free_port()
    base = f"http://127.0.0.1:{port}/fhir/R4"
    with started(["node", folder / "server.mjs", str(port)], f"{base}/metadata"):
        yield base


@pytest.fixture(scope="session")
def kolibri_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Kolibri with a facility, one account (`drive_kolibri.ACCOUNT`) and nothing else."""
    source = HERE / "kolibri" / "requirements.txt"
    with installed("kolibri", source.read_bytes() + sys.version.encode()) as (folder, missing):
        program, data = folder / "venv" / "bin" / "kolibri", folder / "fresh"
        if missing:
            uv = Path(sys.executable).with_name("uv")
            _run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder / "venv"])
            python = folder / "venv" / "bin" / "python"
            pinned: list[str | Path] = ["--quiet", "--require-hashes", "--no-deps", "-r", source]
            _run([uv, "pip", "install", "--python", python, *pinned])
            shutil.rmtree(data, ignore_errors=True)
            _run([program, "manage", "provisiondevice", "--", *_PROVISION], home=data)
    home = tmp_path_factory.mktemp("kolibri") / "home"
    shutil.copytree(data, home)
    port, zip_port = free_port(), free_port()
    serve: list[str | Path] = [
        program,
        "start",
        "--foreground",
        "--skip-update",
        "--port",
        str(port),
    ]
    base = f"http://127.0.0.1:{port}"
    with started(
        [*serve, "--zip-port", str(zip_port)],
        f"{base}/en/auth/",
        environment=_environment(home),
        timeout_s=120,
    ):
        yield base


_PROVISION = (
    "--facility", "Lindenhof",
    "--superusername", drive_kolibri.ACCOUNT[0],
    "--superuserpassword", drive_kolibri.ACCOUNT[1],
    "--preset", "formal",
    "--language_id", "en",
    "--noinput",
)  # fmt: skip


def _environment(home: Path) -> dict[str, str]:
    """It stays on loopback: no statistics to its makers, no announcement on the network."""
    return {
        "KOLIBRI_HOME": str(home),
        "KOLIBRI_RUN_MODE": "test",
        "KOLIBRI_DISABLE_PING": "true",
        "KOLIBRI_ZEROCONF_ENABLED": "false",
        "KOLIBRI_LISTEN_ADDRESS": "127.0.0.1",
        "KOLIBRI_CHERRYPY_THREAD_POOL": "4",
        "KOLIBRI_NO_FILE_BASED_LOGGING": "1",
    }


def _need_node() -> None:
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("Node.js is not installed: run `make apt`")
    said = _run(["node", "--version"])
    if int(said.removeprefix("v").split(".", maxsplit=1)[0]) < OLDEST_NODE:
        pytest.skip(f"Node.js {OLDEST_NODE} or newer is needed; this is {said.strip()}")


def _run(command: Sequence[str | Path], home: Path | None = None) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env=None if home is None else {**os.environ, **_environment(home)},
    )
    assert done.returncode == 0, f"{Path(command[0]).name} failed: {done.stderr[-2000:]}"
    return done.stdout
