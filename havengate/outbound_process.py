"""The way out as a process of its own: started, watched and ended by `havengate up`.

mitmproxy keeps its state in globals and does not run on uvloop, so it shares a process with nobody.
The child reads the same configuration, joins the key server and hands its entries to the writer's
socket, as a worker does. It lives for as long as the parent holds the other end of its input: also
a parent that was killed leaves no way out behind that nobody watches. While it is down nothing gets
out.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, Self

import structlog

from audit.errors import AuditError
from gateway.errors import GatewayConfigurationError, GatewayError
from gateway.frontends.admin import Check
from gateway.outbound.apps import AUTHORITY_FILE, load_apps
from gateway.outbound.listing import compile_listing
from gateway.settings import OutboundSettings
from havengate.configuration import FILE_VARIABLE, Configuration, load
from havengate.operational_log import configure
from keys.errors import KeysError
from policies.errors import PoliciesError
from policies.store import PolicyStore

_log = structlog.get_logger("gateway.outbound")

_READY: Final = "ready"
_START_S: Final = 60.0
_STOP_S: Final = 20.0
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 30.0
_RELOAD_EVERY_S: Final = 2.0
_CONNECT_S: Final = 1.0


def check_outbound(settings: OutboundSettings) -> None:
    """Raise `GatewayConfigurationError` for what is wrong with the list or the apps' keys."""
    compile_listing(settings)
    load_apps(settings)


class WayOut:
    """The child, seen from the parent. A context manager.

    Entering returns when it serves, and raises `GatewayConfigurationError` with what it said if it
    does not. One that dies is started again, after a pause that doubles up to half a minute.
    """

    def __init__(
        self,
        settings: OutboundSettings,
        environ: Mapping[str, str],
        *,
        first_pause_s: float = _FIRST_PAUSE_S,
    ) -> None:
        self._settings = settings
        self._environ = dict(environ)
        self._first_pause_s = first_pause_s
        self._process: subprocess.Popen[str] | None = None
        self._serves = False
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="outbound-watch", daemon=True)

    def __enter__(self) -> Self:
        wrong = self._start()
        if wrong is not None:
            self._end()
            raise GatewayConfigurationError(f"The way out does not start: {wrong}")
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._end()
        self._watcher.join(_STOP_S)

    @property
    def check(self) -> Check:
        """For `/readyz`. Who asks the apps behind needs no way out, so it is not essential."""
        return Check(name="way out", run=self.problem, essential=False)

    @property
    def says(self) -> str:
        """One line for whoever starts the gateway."""
        where = f"http://NAME:KEY@{self._settings.host}:{self._settings.port}"
        ca_file = Path(self._settings.directory) / AUTHORITY_FILE
        return f"Apps call out with HTTPS_PROXY={where} and trust {ca_file}"

    def problem(self) -> str | None:
        """One line on what is wrong, or None."""
        if not self._serves:
            return "the way out does not run; it is started again, see the log for the reason"
        host, port = self._settings.host, self._settings.port
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared
        try:
            socket.create_connection((host, port), timeout=_CONNECT_S).close()
        except OSError:
            return f"nothing listens on {host}:{port}"
        return None

    def _start(self) -> str | None:
        """Start it and wait for its first line. Return what is wrong, if anything is."""
        process = subprocess.Popen(
            [sys.executable, "-m", "havengate.outbound_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environ,
            text=True,
        )
        self._process = process
        assert process.stdout is not None  # noqa: S101 - for the type checker
        timer = threading.Timer(_START_S, process.kill)
        timer.start()
        try:
            said = process.stdout.readline().strip()
        finally:
            timer.cancel()
        self._serves = said == _READY
        return None if self._serves else said or "it ended without a word; see the log"

    def _watch(self) -> None:
        pause_s = self._first_pause_s
        while not self._closing.is_set():
            process = self._process
            started = time.monotonic()
            if process is not None:
                process.wait()
            self._serves = False
            if self._closing.is_set():
                return
            if time.monotonic() - started > _LONGEST_PAUSE_S:
                pause_s = self._first_pause_s
            _log.error("gateway.outbound.died", starts_again_in_s=pause_s)
            if self._closing.wait(pause_s):
                return
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            self._end()
            wrong = self._start()
            if wrong is not None:
                _log.error("gateway.outbound.not_started", reason=wrong)
            if self._closing.is_set():
                self._end()

    def _end(self) -> None:
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._serves = False


@contextmanager
def way_out(settings: Configuration, environ: Mapping[str, str]) -> Iterator[WayOut | None]:
    """Run the way out for the length of the block, if the configuration has apps for it."""
    outbound = settings.gateway.outbound
    if not outbound.apps:
        yield None
        return
    with WayOut(outbound, environ) as running:
        yield running


# --- The child ------------------------------------------------------------------------------------


def main() -> int:
    """Serve until the input ends. The first line of the output says `ready`, or what is wrong."""
    configure()
    # Ctrl-C reaches the whole group of processes; the parent says when it is time.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    threading.Thread(target=_wait_for_parent, args=(over,), daemon=True).start()
    try:
        settings = load(Path(os.environ[FILE_VARIABLE]), os.environ)
        with ExitStack() as stack:
            _serve(settings, stack, over)
    except (GatewayError, KeysError, AuditError, PoliciesError) as error:
        _say(str(error))
        return 1
    return 0


def _serve(settings: Configuration, stack: ExitStack, over: threading.Event) -> None:
    # The parent needs none of these.
    from audit.recorder import AsyncRecorder
    from audit.transport import LogClient
    from gateway import metrics
    from gateway.app import _Folders
    from gateway.core.exchange import Summary
    from gateway.frontends.intercept import Intercept
    from gateway.frontends.intercept_tls import Leaves
    from gateway.protection import sealing_ready
    from havengate.wiring import new_request_id, open_keys

    keys = stack.enter_context(open_keys(settings, os.environ))
    policies = PolicyStore(settings.policies)

    def count(summary: Summary) -> None:
        status = f"{summary.status // 100}xx"
        names = (summary.service, summary.action, status, summary.decision)
        metrics.EXCHANGES.labels(*names).inc()
        if summary.failure is not None:
            metrics.FAILURES.labels(summary.failure).inc()

    proxy = Intercept(
        settings.gateway.outbound,
        tenant=settings.tenant,
        in_force=lambda: policies.current,
        recorder=AsyncRecorder(
            LogClient(Path(settings.audit.socket)),
            sealer=keys.keyring,
            clock=time.time,
            ids=new_request_id,
            ready=sealing_ready(keys.keyring),
        ),
        leaves=lambda may: Leaves(
            keys.client, settings=settings.keys.pki, may_stand_for=may, clock=time.time
        ),
        new_id=new_request_id,
        on_end=count,
    )
    stack.enter_context(proxy)
    _say(_READY)
    folders = _Folders(settings.policies)
    while proxy.alive and not over.wait(_RELOAD_EVERY_S):
        if folders.settled():
            folders.taken()
            _reload(policies)


def _reload(policies: PolicyStore) -> None:
    try:
        policies.reload()
    except PoliciesError as error:
        _log.error("policies.refused", **error.diagnostics())


def _say(line: str) -> None:
    print(" ".join(line.split()), flush=True)  # noqa: T201 - to the parent


def _wait_for_parent(over: threading.Event) -> None:
    sys.stdin.read()
    over.set()


if __name__ == "__main__":
    sys.exit(main())
