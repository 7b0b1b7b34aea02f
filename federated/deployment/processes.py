"""A child process that is kept running, and never outlives this one.

After `keys.openbao_process`, whose rules these are: one thread does all starting and lives as long
as the child, because the kernel's promise to kill a child at its parent's death is tied to the
thread that started it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from federated.errors import DeploymentError
from keys import die_with_parent

_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 10.0
_STABLE_AFTER_S: Final = 30.0
_GRACE_S: Final = 8.0
_LINES_SHOWN: Final = 12
#: Flower asks its makers for updates and tells them of its use unless told not to.
QUIET: Final = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


class ChildProcess:
    """Keeps `python -m MODULE ARGUMENT…` running from `start` to `stop`.

    `log_file` takes what it prints, mode 0600. With `restart` false it is started once.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        *,
        log_file: Path,
        environment: Mapping[str, str] | None = None,
        restart: bool = True,
    ) -> None:
        self.name = name
        self._command = [sys.executable, "-m", module, *arguments]
        self._log_file = log_file
        self._environment = dict(environment or {})
        self._restart = restart
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name=f"{name}-keeper", daemon=True)
        self.exits = 0

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        with self._lock:
            process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Begin. Whether it serves is for the caller to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask it to end, and make it."""
        with self._lock:
            self._stopping.set()
            process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._thread.is_alive():
            self._thread.join()

    def renew(self) -> None:
        """End it so that it is started again at once, with what changed in its files."""
        with self._lock:
            process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)

    def verify_running(self) -> None:
        """Raise `DeploymentError`, with the end of its log, if it ended and was not asked to."""
        if self.exits and not self._stopping.is_set() and self.pid is None:
            raise DeploymentError(
                f"The process {self.name} ended. The last lines of {self._log_file}:\n"
                f"{self.last_lines()}"
            )

    def last_lines(self) -> str:
        """Return the end of what it printed."""
        try:
            with self._log_file.open(encoding="utf-8", errors="replace") as file:
                return "".join(deque(file, maxlen=_LINES_SHOWN)).strip()
        except OSError:
            return "(it printed nothing)"

    def _keep(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._stopping.is_set():
            started = time.monotonic()
            process = self._spawn()
            if process is None:
                return
            process.wait()
            if process.stdin:
                process.stdin.close()
            self.exits += 1
            if not self._restart:
                return
            if time.monotonic() - started > _STABLE_AFTER_S:
                pause_s = _FIRST_PAUSE_S
            self._stopping.wait(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        mode = "kernel" if sys.platform == "linux" else "pipe"
        guarded = [sys.executable, "-I", "-S", die_with_parent.__file__, mode, str(os.getpid())]
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        log = os.open(self._log_file, flags, 0o600)
        try:
            with self._lock:
                if self._stopping.is_set():
                    return None
                self._process = subprocess.Popen(
                    [*guarded, *self._command],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **QUIET, **self._environment},
                    # Ctrl-C at the terminal is for the parent, which stops this in its turn.
                    start_new_session=True,
                )
                return self._process
        finally:
            os.close(log)


def wait_for_port(host: str, port: int, child: ChildProcess, *, timeout_s: float) -> None:
    """Return once somebody listens there. Raises `DeploymentError` if nobody does in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        child.verify_running()
        try:
            with socket.create_connection((host, port), timeout=1.0):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise DeploymentError(
                    f"The process {child.name} did not serve on {host}:{port} within "
                    f"{timeout_s:g} s. Its last lines:\n{child.last_lines()}"
                ) from None
        time.sleep(0.05)
