"""The way out: mitmproxy as a library, standing between apps and the hosts that they call.

An app points its `HTTPS_PROXY` here (RFC 9110 sections 9.3.6 and 7.1: CONNECT, and requests in
absolute form). mitmproxy moves bytes and speaks TLS to both sides; what may pass is decided by
`gateway.core.outbound`. Only HTTP/1.1 passes: raw TCP, UDP, DNS, QUIC and WebSockets are refused,
HTTP/2 is not offered. mitmproxy runs in a thread and an event loop of its own, because its master
does not run on uvloop.

Before: `gateway.outbound` (list, apps, addresses), `intercept_tls` (certificates). Beside:
`intercept_hooks` (what each hook answers), `intercept_guard` (that every hook fails closed),
`intercept_calls` (one call).
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import structlog
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.master import Master
from mitmproxy.net import tls as net_tls
from mitmproxy.options import Options

from gateway.core.exchange import Summary
from gateway.core.outbound import Outside
from gateway.errors import GatewayConfigurationError
from gateway.frontends.intercept_calls import Log, Services
from gateway.frontends.intercept_guard import FailClosedAddons
from gateway.frontends.intercept_hooks import TLS, NextLayer, WayOut
from gateway.frontends.intercept_tls import Leaves
from gateway.outbound.addresses import AddressCheck, CheckedResolver
from gateway.outbound.apps import load_apps
from gateway.outbound.listing import compile_listing
from gateway.settings import OutboundSettings
from policies.store import InForce

_log = structlog.get_logger("gateway.outbound")

_START_TIMEOUT_S: Final = 15.0
_STOP_TIMEOUT_S: Final = 5.0


class Intercept:
    """The running proxy. A context manager, or `start` and `close`.

    One at a time in a process: mitmproxy keeps its master in a global, so that an older proxy would
    cut every connection.

    `recorder` must belong to nobody else: it is used in this proxy's event loop. `clock` is Unix
    time in seconds, `new_id` gives ids of exchanges. `on_end` hears of each call (metrics).
    `resolver` stands in for the one that asks the system and checks every address.
    """

    def __init__(
        self,
        settings: OutboundSettings,
        *,
        tenant: str,
        in_force: Callable[[], InForce],
        recorder: Log,
        leaves: Callable[[Callable[[str], bool]], Leaves],
        resolver: AddressCheck | None = None,
        clock: Callable[[], float] = time.time,
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
        on_end: Callable[[Summary], None] = lambda _summary: None,
    ) -> None:
        self._settings = settings
        self._listing = compile_listing(settings)
        self._resolver = resolver or CheckedResolver(self._listing)
        self.leaves = leaves(self._may_stand_for)
        self._way = WayOut(
            outside=Outside(
                tenant=tenant,
                listing=self._listing,
                in_force=in_force,
                max_body_bytes=settings.max_body_bytes,
                clock=clock,
            ),
            services=Services(
                apps=load_apps(settings), log=recorder, log_timeout_s=settings.timeout_s / 2
            ),
            resolver=self._resolver,
            timeout_s=settings.timeout_s,
            new_id=new_id,
            on_end=on_end,
        )
        self._thread: threading.Thread | None = None
        self._master: InterceptMaster | None = None
        self._started = threading.Event()
        self._failure: BaseException | None = None

    def start(self) -> Path:
        """Serve in a thread; return the file with the authority that apps must trust.

        Raises `GatewayConfigurationError` if it cannot listen, a `VaultError` if the authority
        cannot be had.
        """
        authority = self.leaves.write_authority(Path(self._settings.directory))
        self._thread = threading.Thread(target=self._run, name="havengate-outbound", daemon=True)
        self._thread.start()
        if not self._started.wait(_START_TIMEOUT_S) or self._failure is not None:
            self.close()
            raise GatewayConfigurationError(
                f"The way out cannot listen on {self._settings.host}:{self._settings.port}; is the "
                "port taken? Choose another one with gateway.outbound.port."
            ) from self._failure
        return authority

    def close(self) -> None:
        """Stop; calls under way are cut off and end in the log."""
        if self._master is not None and self.alive:
            self._master.shutdown()  # type: ignore[no-untyped-call]
        if self._thread is not None:
            self._thread.join(_START_TIMEOUT_S)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether it serves."""
        return self._thread is not None and self._thread.is_alive() and self._failure is None

    def _may_stand_for(self, host: str) -> bool:
        return any(
            self._listing.look_up(app.name, host, entry.port).purposes
            for app in self._settings.apps
            for entry in self._listing.entries
        )

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: _CheckedLoop(self._resolver)) as runner:
                runner.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - told by `start`, or by `alive`
            self._failure = error
            _log.error("gateway.outbound.stopped", error=type(error).__name__)
        finally:
            self._started.set()

    async def _serve(self) -> None:
        with _quiet():
            master = InterceptMaster(
                _options(self._settings), hook_timeout_s=self._settings.timeout_s
            )
            self._way.attach(master)
            master.guard.add(  # type: ignore[no-untyped-call]
                master.proxyserver, NextLayer(self._way), TLS(self._way, self.leaves), self._way
            )
            self._master = master
            running = asyncio.ensure_future(master.run())
            # Nothing else says that it listens.
            while not (master.proxyserver.is_running or running.done()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            if not master.proxyserver.listen_addrs():
                master.shutdown()  # type: ignore[no-untyped-call]
                await running
                raise OSError("no address could be bound")
            self._started.set()
            await running
            await self._stop(master)

    async def _stop(self, master: InterceptMaster) -> None:
        for server in master.proxyserver.servers:
            await server.stop()
        await self._way.end_all()
        for client_id in list(master.proxyserver.connections):
            master.guard.sever(str(client_id))
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            while master.proxyserver.connections:  # noqa: ASYNC110 - nothing says that it is empty
                await asyncio.sleep(0.01)


class InterceptMaster(Master):
    """mitmproxy's master with hooks that fail closed, and without its log events."""

    def __init__(self, options: Options, *, hook_timeout_s: float) -> None:
        super().__init__(options, asyncio.get_running_loop())
        # It sends every line that any thread logs through the hooks.
        self._legacy_log_events.uninstall()
        self.addons = self.guard = FailClosedAddons(self, hook_timeout_s=hook_timeout_s)
        self.proxyserver = Proxyserver()  # type: ignore[no-untyped-call]


def _options(settings: OutboundSettings) -> Options:
    options = Options(
        mode=["regular"],
        listen_host=settings.host,
        listen_port=settings.port,
        http2=False,
        http3=False,
        websocket=False,
        rawtcp=False,
        ssl_insecure=False,
        upstream_cert=False,
        ssl_verify_upstream_trusted_ca=settings.ca_file or ssl.get_default_verify_paths().cafile,
        tcp_timeout=max(1, math.ceil(settings.timeout_s)),
    )
    options.update_defer(  # type: ignore[no-untyped-call]
        connection_strategy="lazy",
        validate_inbound_headers=True,
        store_streamed_bodies=False,
        body_size_limit=str(settings.max_body_bytes),
    )
    return options


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep mitmproxy from writing what it sees: to its log, and the keys of TLS to a file.

    Its messages quote heads of requests with credentials and queries. It would also write session
    keys wherever the environment's SSLKEYLOGFILE says.
    """
    logger = logging.getLogger("mitmproxy")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.CRITICAL + 1)
    logger.propagate = False
    net_tls.log_master_secret = None
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate


class _CheckedLoop(asyncio.SelectorEventLoop):
    """An event loop in which a name to connect to resolves to checked addresses only."""

    def __init__(self, resolver: AddressCheck) -> None:
        super().__init__()
        self._resolver = resolver

    async def getaddrinfo(self, host: Any, port: Any, **hints: Any) -> Any:
        """Resolve what will be connected to. A host to listen on is the operator's own."""
        if hints.get("flags", 0) & socket.AI_PASSIVE:
            return await super().getaddrinfo(host, port, **hints)
        return [_entry(one, port) for one in await self._resolver(host, port)]


def _entry(address: str, port: int) -> tuple[Any, ...]:
    kind = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
    if ":" in address:
        return (socket.AF_INET6, *kind, (address, port, 0, 0))
    return (socket.AF_INET, *kind, (address, port))
