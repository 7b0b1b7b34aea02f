"""Health, readiness and metrics, for the machine's own monitoring: plain HTTP on loopback.

Lives in the parent process, so that it answers even if every worker is stuck. What is asked about
is given by the caller as named checks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final, Self

import orjson
import structlog

from gateway.errors import GatewayConfigurationError

_log = structlog.get_logger("gateway")

_HOSTS: Final = frozenset({"127.0.0.1", "localhost", "[::1]"})
_TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
_REQUEST_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Something that must work for the gateway to be ready.

    `run` returns None if it does, or one line on what is wrong and what to do. It may block; after
    `timeout_s` it counts as failed. Whatever it raises counts as failed and is named by class only.
    What is not `essential` is told, but a gateway without it is ready for everything else.
    """

    name: str
    run: Callable[[], str | None]
    timeout_s: float = 2.0
    essential: bool = True


class Admin:
    """The server. A context manager: it listens inside and is closed afterwards.

    `/healthz` says that the process lives, `/readyz` which checks fail (503 if an essential one
    does), `/metrics` what `metrics` returns. `port` 0 takes a free one; construction raises
    `GatewayConfigurationError` for one that is taken.
    """

    def __init__(
        self, *, port: int, checks: Sequence[Check] = (), metrics: Callable[[], bytes]
    ) -> None:
        self._checks = tuple(checks)
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(
            max_workers=2 * len(checks) or 1, thread_name_prefix="check"
        )
        self._running: dict[str, Future[str | None]] = {}
        self._lock = threading.Lock()
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        except OSError as error:
            raise GatewayConfigurationError(
                f"Nothing can listen on 127.0.0.1:{port}: {error.strerror}. Stop what does, or "
                "give gateway.admin_port another number."
            ) from error
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]

    def __enter__(self) -> Self:
        thread = threading.Thread(target=self._server.serve_forever, name="admin", daemon=True)
        thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def ready(self) -> dict[str, str]:
        """Run all checks at once; return those that fail, with what is wrong."""
        with self._lock:
            for check in self._checks:
                running = self._running.get(check.name)
                # A check that hangs is not started again on top of itself.
                if running is None or running.done():
                    self._running[check.name] = self._pool.submit(check.run)
            started = dict(self._running)
        failed = {}
        for check in self._checks:
            future = started[check.name]
            wait([future], timeout=check.timeout_s)
            if (wrong := _wrong(future, check)) is not None:
                failed[check.name] = wrong
        return failed

    def answer(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        """Status, content type and content for a path."""
        match path:
            case "/healthz":
                return HTTPStatus.OK, "text/plain; charset=utf-8", b"ok\n"
            case "/readyz":
                failed = self.ready()
                unready = any(one.essential and one.name in failed for one in self._checks)
                status = HTTPStatus.SERVICE_UNAVAILABLE if unready else HTTPStatus.OK
                names = [check.name for check in self._checks]
                content = {name: failed.get(name, "ok") for name in names}
                return status, "application/json", orjson.dumps(content) + b"\n"
            case "/metrics":
                return HTTPStatus.OK, _TEXT, self._metrics()
            case _:
                text = b"There are /healthz, /readyz and /metrics.\n"
                return HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", text


def _wrong(future: Future[str | None], check: Check) -> str | None:
    if not future.done():
        return f"no answer within {check.timeout_s:g} s"
    error = future.exception()
    return future.result() if error is None else f"failed ({type(error).__name__})"


def _handler(admin: Admin) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version = "Havengate"
        sys_version = ""
        timeout = _REQUEST_TIMEOUT_S

        def do_GET(self) -> None:
            # A page in somebody's browser must not reach this by a name that it controls.
            host = (self.headers.get("host") or "").rpartition(":")
            if (host[0] or host[2]) not in _HOSTS:
                self._send(HTTPStatus.FORBIDDEN, "text/plain", b"Ask by 127.0.0.1 or localhost.\n")
                return
            try:
                answer = admin.answer(self.path.partition("?")[0])
            except Exception as error:  # noqa: BLE001 - monitoring gets an answer in any case
                _log.error("gateway.admin_broke", error=type(error).__name__)
                answer = HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", b"This failed.\n"
            self._send(*answer)

        def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
            """Say nothing: monitoring asks every few seconds."""

    return Handler
