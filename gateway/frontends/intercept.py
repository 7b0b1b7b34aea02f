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
import math
import socket
import ssl
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mitmproxy.options import Options

from gateway.core.exchange import Summary
from gateway.core.outbound import Outside
from gateway.frontends.intercept_calls import Log, Services
from gateway.frontends.intercept_hooks import TLS, NextLayer, WayOut
from gateway.frontends.intercept_thread import InterceptMaster, ProxyThread
from gateway.frontends.intercept_tls import Leaves
from gateway.outbound.addresses import AddressCheck, CheckedResolver
from gateway.outbound.apps import load_apps
from gateway.outbound.listing import compile_listing
from gateway.settings import OutboundSettings
from policies.store import InForce


class Intercept(ProxyThread):
    """The running proxy. A context manager, or `start` and `close`.

    One at a time in a process: mitmproxy keeps its master in a global, so that an older proxy would
    cut every connection.

    `recorder` must belong to nobody else: it is used in this proxy's event loop. `clock` is Unix
    time in seconds, `new_id` gives ids of exchanges. `on_end` hears of each call (metrics).
    `resolver` stands in for the one that asks the system and checks every address.
    """

    name = "havengate-outbound"

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
        super().__init__()
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

    def start(self) -> Path:
        """Serve in a thread; return the file with the authority that apps must trust.

        Raises `GatewayConfigurationError` if it cannot listen, a `VaultError` if the authority
        cannot be had.
        """
        authority = self.leaves.write_authority(Path(self._settings.directory))
        self.begin(
            f"The way out cannot listen on {self._settings.host}:{self._settings.port}; is the "
            "port taken? Choose another one with gateway.outbound.port."
        )
        return authority

    def _may_stand_for(self, host: str) -> bool:
        return any(
            self._listing.look_up(app.name, host, entry.port).purposes
            for app in self._settings.apps
            for entry in self._listing.entries
        )

    def make_loop(self) -> asyncio.AbstractEventLoop:
        """Return a loop that connects to checked addresses only."""
        return _CheckedLoop(self._resolver)

    async def serve(self) -> None:
        """Run until `close`."""
        master = InterceptMaster(_options(self._settings), hook_timeout_s=self._settings.timeout_s)
        self._way.attach(master)
        master.guard.add(  # type: ignore[no-untyped-call]
            master.proxyserver, NextLayer(self._way), TLS(self._way, self.leaves), self._way
        )
        await self.listen(master, self._way.end_all)


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
