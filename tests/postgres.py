"""A private PostgreSQL for tests: its own cluster, in a directory, on a Unix socket only."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

_PROGRAMS = Path("/usr/lib/postgresql")


@contextmanager
def running_postgres(directory: Path) -> Iterator[str]:
    """Start a server with its data in `directory`; yield the SQLAlchemy URL of an empty database.

    PostgreSQL refuses to run as root, so root runs it as user `postgres`, and then outside of
    `directory`: pytest closes the directories of all its sessions to other users whenever one
    begins. Skips the test if the server is not installed (`make apt` installs it).
    """
    programs = _find_programs()
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    prefix = as_user if os.geteuid() == 0 else []
    # A socket's path may have 107 bytes: directories of tests are longer.
    with tempfile.TemporaryDirectory(prefix="hgpg", dir="/tmp") as short:
        home = Path(short)
        data = (home if prefix else directory) / "data"
        data.mkdir(parents=True)
        if prefix:
            for path in (home, data):
                shutil.chown(path, "postgres", "postgres")
        options = f"-c listen_addresses='' -c unix_socket_directories={home} -c fsync=off"
        _run([*prefix, programs / "initdb", "-D", data, "-A", "trust", "-U", "havengate", "-N"])
        control: list[str | Path] = [*prefix, programs / "pg_ctl", "-D", data, "-w"]
        _run([*control, "-l", home / "log", "-o", options, "start"])
        try:
            yield f"postgresql+psycopg://havengate@/postgres?host={home}"
        finally:
            _run([*control, "-m", "immediate", "stop"])


def _find_programs() -> Path:
    found = sorted(_PROGRAMS.glob("*/bin/pg_ctl"))
    if not found:
        pytest.skip("PostgreSQL is not installed: run `make apt`")
    return found[-1].parent


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, f"{command[-1]}: {done.stderr[-2000:]}"
