"""A child process that is kept running, and never outlives this one.

The kernel's promise to kill a child at its parent's death (`die_with_parent`) is tied to the
*thread* that started it. So one thread does all starting and lives as long as the child. Whether a
child that runs also serves is for the caller to ask.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from keys import die_with_parent

_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 10.0
#: A process that ran for so long had started well: the next restart is quick again.
_STABLE_AFTER_S: Final = 30.0
_GRACE_S: Final = 10.0
_LARGEST_LOG_BYTES: Final = 16 * 1024 * 1024
_LINES_SHOWN: Final = 12


class KeptProcess:
    """Keeps a command running from `start` to `stop`, started again with growing pauses.

    `environment` is all of its environment. `log_file` takes what it prints, mode 0600; a long one
    is put aside at a start. With `restart` false it is started once.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log_file: Path,
        environment: Mapping[str, str],
        directory: Path | None = None,
        restart: bool = True,
    ) -> None:
        self.name = name
        self.log_file = log_file
        self.exits = 0
        self._command = list(command)
        self._environment = dict(environment)
        self._directory = directory
        self._restart = restart
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name=f"{name}-keeper", daemon=True)

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        process = self._running()
        return process.pid if process else None

    @property
    def stopping(self) -> bool:
        """Whether it was asked to end."""
        return self._stopping.is_set()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Ask it to end, and make it."""
        with self._lock:
            self._stopping.set()
        process = self._running()
        if process:
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
        process = self._running()
        if process:
            process.send_signal(signal.SIGTERM)

    def last_lines(self) -> str:
        """Return the end of what it printed."""
        try:
            with self.log_file.open(encoding="utf-8", errors="replace") as file:
                return "".join(deque(file, maxlen=_LINES_SHOWN)).strip()
        except OSError:
            return "(it printed nothing)"

    def _running(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            process = self._process
        return process if process is not None and process.poll() is None else None

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
        _shorten(self.log_file)
        mode = "kernel" if sys.platform == "linux" else "pipe"
        guarded = [sys.executable, "-I", "-S", die_with_parent.__file__, mode, str(os.getpid())]
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        log = os.open(self.log_file, flags, 0o600)
        try:
            with self._lock:
                if self._stopping.is_set():
                    return None
                self._process = subprocess.Popen(
                    [*guarded, *self._command],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    cwd=self._directory,
                    env=self._environment,
                    # Ctrl-C at the terminal is for the parent, which stops this in its turn.
                    start_new_session=True,
                )
                return self._process
        finally:
            os.close(log)


def _shorten(log: Path) -> None:
    if log.exists() and log.stat().st_size > _LARGEST_LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
