"""A real OpenBao for tests: started in a directory, killed, stopped, slowed and sealed at will."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from keys.embedded import EmbeddedServer
from keys.errors import VaultUnavailableError
from keys.settings import EmbeddedSettings, KeysSettings, VaultSettings
from keys.vault import FixedToken, VaultClient


@dataclass
class RunningServer:
    """What tests do to a server."""

    settings: KeysSettings
    embedded: EmbeddedServer

    def client(self, role: str) -> VaultClient:
        """Return a client of `role`; the caller closes it."""
        return self.embedded.client(role)

    def kill(self) -> None:
        """End the server with kill -9; it is started again by itself."""
        self._signal(signal.SIGKILL)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let the server take connections and answer nothing."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the server, and start it again on the same port and data."""
        self.embedded.close()
        try:
            yield
        finally:
            self.embedded = EmbeddedServer(self.settings)
            self.embedded.__enter__()

    def reload(self) -> None:
        """Let the server open its audit file again, as after a log rotation."""
        self._signal(signal.SIGHUP)

    def seal(self) -> None:
        """Seal the server. It stays so until it is killed or restarted."""
        token = self.embedded._generate_root()
        with self.embedded._client("administrator", FixedToken(token=token)) as client:
            client.call("POST", "sys/seal", {}, idempotent=False)

    def wait_until_up(self) -> None:
        """Return once the server answers and is unsealed."""
        wait_until(self._is_up)

    def _is_up(self) -> bool:
        try:
            with self.client("gateway") as client:
                health = client.health()
        except VaultUnavailableError:
            return False
        return not health.sealed and not health.standby

    def _signal(self, number: signal.Signals) -> None:
        pid = self.embedded.pid
        assert pid is not None
        os.kill(pid, number)


@contextmanager
def running_server(
    directory: Path, *, vault: VaultSettings | None = None
) -> Iterator[RunningServer]:
    """Start a server of its own in `directory`, set up with all roles, and stop it at the end."""
    settings = KeysSettings(
        table_url=f"sqlite:///{directory / 'keys.sqlite3'}",
        vault=vault or VaultSettings(),
        embedded=EmbeddedSettings(directory=str(directory / "openbao"), start_timeout_s=60.0),
    )
    server = RunningServer(settings=settings, embedded=EmbeddedServer(settings))
    server.embedded.__enter__()
    try:
        yield server
    finally:
        server.embedded.close()


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    """Return once `condition` holds; fail the test if it does not within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)
