"""Virtual environments of peers, made when they are first needed and kept in a cache folder.

A peer's requirements may contradict the project's (`pfl` and `flwr[dp]` want different versions of
dp-accounting), so each has a Python of its own. The uv is the one that made the project's.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.metadata import requires
from pathlib import Path

#: Installing torch takes its time.
_INSTALL_S = 1800


def python_of(name: str, requirements: Sequence[str], *, beside: bool = False) -> Path:
    """The Python of an environment with these requirements, which is made if it is not there.

    `beside`: it also finds all that this Python has installed, and adds what is missing without
    changing a version. Raises `RuntimeError` with what uv said if it cannot be made.
    """
    pinned = _pinned() if beside else ""
    wanted = "\n".join((sys.version, sys.prefix if beside else "", *requirements, pinned))
    folder = _cache() / f"{name}-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists() and python.exists():
        return python
    _uv("venv", "--clear", "--python", sys.executable, str(folder))
    constraints = folder / "constraints.txt"
    constraints.write_text(pinned)
    _uv(
        "pip", "install", "--python", str(python), "--constraint", str(constraints),
        *requirements,
    )  # fmt: skip
    if beside:
        own = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        path = Path(own.stdout.strip()) / "beside.pth"
        path.write_text(sysconfig.get_path("purelib") + "\n")
    ready.touch()
    return python


def ray_python() -> Path:
    """A Python with all that this one has, and the Ray that its Flower asks for."""
    wanted = {
        one.split(";")[0].strip() for one in requires("flwr") or () if one.startswith("ray==")
    }
    return python_of("ray", sorted(wanted), beside=True)


def _pinned() -> str:
    """What is installed here, as constraints: no paths, no editable projects."""
    frozen = _uv("pip", "freeze", "--python", sys.executable).splitlines()
    return "\n".join(line for line in frozen if "==" in line and " @ " not in line) + "\n"


def _uv(*arguments: str) -> str:
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        raise RuntimeError(f"There is no uv beside {sys.executable}; `make bench` installs it.")
    done = subprocess.run(
        [uv, *arguments], capture_output=True, text=True, check=False, timeout=_INSTALL_S
    )
    if done.returncode:
        raise RuntimeError(f"uv {arguments[0]} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _cache() -> Path:
    own = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(own) if own else Path.home() / ".cache") / "havengate" / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
