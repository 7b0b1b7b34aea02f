"""Starts the server in front: Granian with TLS, its worker processes, and what watches over them.

The parent listens to signals, renews the certificate and restarts workers; the workers serve. A
worker ends by itself when its parent has died, so that none goes on with keys and rules that nobody
looks after. SIGTERM or SIGINT: no new connections, exchanges in progress get `GRACE_S` seconds.
SIGHUP, or a changed certificate file: new workers first, then the old ones end in the same way.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import signal
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog
from granian.constants import HTTPModes, Interfaces, Loops, SSLProtocols
from granian.http import HTTP1Settings, HTTP2Settings
from granian.log import LogLevels
from granian.server.mp import MPServer

from gateway.errors import GatewayConfigurationError
from gateway.metrics import DIRECTORY_VARIABLE
from gateway.settings import GatewaySettings

_log = structlog.get_logger("gateway")

#: How long exchanges in progress may take when a worker is to end.
GRACE_S: Final = 30
#: How often the parent looks whether the certificate has changed.
_CERTIFICATE_CHECK_S: Final = 30.0
#: A new worker has this long to get ready; until it is, the old one serves.
_START_S: Final = 60
#: From its start until it accepts connections; also until its end was noticed.
_SETTLE_S: Final = 0.3
_POLL_S: Final = 0.05
_DID_NOT_START: Final = (
    "A new worker did not start, so the old one goes on. See the messages before this one, mend "
    "what they name, and send SIGHUP again."
)
_HEADER_TIMEOUT_MS: Final = 15_000
_STREAMS: Final = 100
#: The server wants at least this much.
_LEAST_BUFFER_BYTES: Final = 8_192


def serve(
    settings: GatewaySettings,
    *,
    target: str,
    certificate: Path,
    key: Path,
    workers: int,
    renew: Callable[[], object] | None = None,
) -> None:
    """Serve until told to stop; return when all workers have ended.

    `target` is `module:function`; the function is called in each worker and returns the RSGI
    application (`gateway.frontends.ingress.Ingress`). `certificate` and `key` are PEM files or
    links to them; if they change, workers with the new ones take over. `renew` is called every 30
    seconds, in a thread, and may change them; what it raises is logged by class.

    Raises `GatewayConfigurationError` for a certificate or key that cannot be used, and
    `SystemExit` with status 1 if workers keep dying.
    """
    check_certificate(certificate, key)
    # Forked workers would share the parent's locks and threads in whatever state they are.
    multiprocessing.set_start_method("spawn", force=True)
    with (
        tempfile.TemporaryDirectory(prefix="havengate-metrics-") as numbers,
        tempfile.TemporaryDirectory(prefix="havengate-ready-") as ready,
    ):
        os.environ.setdefault(DIRECTORY_VARIABLE, numbers)
        server = _server(settings, certificate, key, workers)
        server.ready = Path(ready)
        watch = _CertificateWatch(server, renew)
        threading.Thread(target=watch.run, name="certificate", daemon=True).start()
        try:
            server.serve(target_loader=partial(_load, target, Path(ready)), wrap_loader=False)
        finally:
            watch.stop()


def check_certificate(certificate: Path, key: Path) -> None:
    """Raise `GatewayConfigurationError` unless both are readable and belong together."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise GatewayConfigurationError(
            f"A certificate and its key in PEM files were expected; {certificate} and {key} cannot "
            f"be used ({type(error).__name__}). Check that both exist, may be read, and belong "
            "together."
        ) from error


def _server(settings: GatewaySettings, certificate: Path, key: Path, workers: int) -> _Server:
    limits = settings.limits
    buffer = max(_LEAST_BUFFER_BYTES, limits.header_bytes + limits.target_bytes)
    server = _Server(
        "",
        address=settings.host,
        port=settings.port,
        interface=Interfaces.RSGI,
        workers=workers,
        loop=Loops.uvloop,
        http=HTTPModes.auto,
        # An upgrade is then an ordinary request, which the core refuses in words.
        websockets=False,
        backlog=1_024,
        # Connections of one worker; exchanges have their own bound, and are told so.
        backpressure=max(1_024, 2 * limits.concurrent),
        http1_settings=HTTP1Settings(
            header_read_timeout=_HEADER_TIMEOUT_MS, max_buffer_size=buffer
        ),
        http2_settings=HTTP2Settings(
            keep_alive_interval=20_000,
            keep_alive_timeout=20,
            max_concurrent_streams=_STREAMS,
            max_headers_size=buffer,
        ),
        log_level=LogLevels.warning,
        log_dictconfig=_LOGGING,
        log_access=False,
        ssl_cert=certificate,
        ssl_key=key,
        ssl_protocol_min=(
            SSLProtocols.tls13 if settings.tls.minimum == "1.3" else SSLProtocols.tls12
        ),
        respawn_failed_workers=True,
        workers_kill_timeout=GRACE_S,
    )
    server.certificate, server.key = certificate, key
    return server


#: The server's own messages go where ours go; it has none about single requests.
_LOGGING: Final[dict[str, Any]] = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler", "stream": "ext://sys.stderr"}},
    "loggers": {
        "_granian": {"handlers": ["console"], "level": logging.WARNING, "propagate": False},
        "granian.access": {"handlers": [], "level": logging.CRITICAL, "propagate": False},
    },
}


def _load(target: str, ready: Path) -> Any:
    """Make the application, in a worker."""
    runs = threading.Event()
    _end_with_parent(runs)
    module, _, name = target.partition(":")
    return _Announced(getattr(importlib.import_module(module), name)(), ready, runs)


class _Announced:
    """An RSGI application that tells when it has started: a file for the parent, `runs` here."""

    def __init__(self, app: Any, ready: Path, runs: threading.Event) -> None:
        self.__rsgi__ = app.__rsgi__
        self.__rsgi_del__ = app.__rsgi_del__
        self._app = app
        self._ready = ready
        self._runs = runs

    def __rsgi_init__(self, loop: Any) -> None:
        self._app.__rsgi_init__(loop)
        loop.call_soon(self._runs.set)
        (self._ready / str(os.getpid())).touch()


def _end_with_parent(runs: threading.Event) -> None:
    """Once the parent is gone, end as if told to; if that takes longer than it may, at once.

    `runs` is set when the loop runs for good.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        end = time.monotonic() + GRACE_S
        # uvloop loses a signal that comes before. A second one would cut off what is in progress.
        runs.wait(GRACE_S)
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(end - time.monotonic())
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


class _Server(MPServer):
    """Granian, but no worker is told to end before the one that takes its place has started.

    The certificate's files are looked for anew each time.
    """

    certificate: Path
    key: Path
    #: A directory in which each started worker leaves a file named after its process.
    ready: Path

    def _reload(self, *arguments: Any) -> None:
        """Restart workers, unless the certificate cannot be used: then the old ones go on."""
        certificate, key = self.certificate, self.key
        try:
            check_certificate(certificate, key)
        except GatewayConfigurationError as error:
            _log.error("gateway.restart_refused", message=str(error))
            self.reload_signal = False
            self.main_loop_interrupt.clear()
            return
        # Links are resolved once, at start; the certificate may be somewhere else by now.
        options: Any = self.ssl_ctx
        files = str(certificate.resolve()), str(key.resolve())
        self.ssl_ctx = (options[0], *files, *options[3:])
        _log.info("gateway.workers_restart")
        super()._reload(*arguments)  # type: ignore[no-untyped-call]

    def _respawn_workers(
        self, workers: list[int], spawn_target: Any, target_loader: Any, delay: float = 0
    ) -> None:
        """Replace workers one by one. `delay` is 0 if they have died already."""
        for index in workers:
            self.respawned_wrks[index] = time.monotonic()
            old: Any = self.wrks[index]
            new: Any = self._spawn_worker(
                idx=index, target=spawn_target, callback_loader=target_loader
            )
            new.start()
            if delay and not self._started(new):
                _log.error("gateway.worker_did_not_start", message=_DID_NOT_START)
                new.kill()
                new.join()
                # It was not one of those that serve: its end is no reason to restart any.
                time.sleep(_SETTLE_S)
                self.interrupt_children = [one for one in self.interrupt_children if one != index]
                continue
            self.wrks[index] = new
            old.terminate()
            old.join(self.workers_kill_timeout)
            if old.is_alive():
                old.kill()
                old.join()

    def _started(self, worker: Any) -> bool:
        file = self.ready / str(worker.inner.pid)
        end = time.monotonic() + _START_S
        while time.monotonic() < end and worker.is_alive():
            if file.exists():
                time.sleep(_SETTLE_S)
                return True
            time.sleep(_POLL_S)
        return False


class _CertificateWatch:
    """Has workers restarted when the certificate is another one."""

    def __init__(self, server: _Server, renew: Callable[[], object] | None) -> None:
        self._server = server
        self._renew = renew
        self._stopped = threading.Event()
        self._seen = self._state()

    def run(self) -> None:
        """Look, until stopped."""
        while not self._stopped.wait(_CERTIFICATE_CHECK_S):
            self.look()

    def look(self) -> None:
        """Renew and compare once."""
        if self._renew is not None:
            try:
                self._renew()
            except Exception as error:  # noqa: BLE001 - the certificate in use may still be good
                _log.warning("gateway.renewal_failed", error=type(error).__name__)
        state = self._state()
        if state is not None and state != self._seen:
            self._seen = state
            self._server.signal_handler_reload()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """End `run`."""
        self._stopped.set()

    def _state(self) -> tuple[tuple[Path, int], ...] | None:
        files = (self._server.certificate.resolve(), self._server.key.resolve())
        try:
            return tuple((file, file.stat().st_mtime_ns) for file in files)
        except OSError:
            return None
