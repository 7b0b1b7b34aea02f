"""The federation's child processes: Python modules, kept as `keys.kept_process` keeps children."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from federated.errors import DeploymentError
from keys.kept_process import KeptProcess

#: Flower asks its makers for updates and tells them of its use unless told not to.
QUIET: Final = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


class ChildProcess(KeptProcess):
    """Keeps `python -m MODULE ARGUMENT…` running from `start` to `stop`."""

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
        super().__init__(
            name,
            [sys.executable, "-m", module, *arguments],
            log_file=log_file,
            environment={**os.environ, **QUIET, **(environment or {})},
            restart=restart,
        )

    def verify_running(self) -> None:
        """Raise `DeploymentError`, with the end of its log, if it ended and was not asked to."""
        if self.exits and not self.stopping and self.pid is None:
            raise DeploymentError(
                f"The process {self.name} ended. The last lines of {self.log_file}:\n"
                f"{self.last_lines()}"
            )


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
