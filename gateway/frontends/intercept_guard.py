"""What keeps mitmproxy shut: every hook through one door, every connection on a short lead.

mitmproxy logs an exception of a hook and goes on as if the hook had agreed; hooks that nobody
answers pass by default; and it reads from the network for as long as somebody sends. Here a hook
that raises, takes too long or is not in `HOOKS` ends the connection that it belongs to, and each
side is read only as far as what was read has been dealt with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Protocol

import structlog
from mitmproxy import flow as mitm_flow
from mitmproxy import hooks
from mitmproxy.addonmanager import AddonManager
from mitmproxy.connection import Client
from mitmproxy.master import Master
from mitmproxy.proxy.layer import NextLayer
from mitmproxy.proxy.server_hooks import ServerConnectionHookData
from mitmproxy.tls import ClientHelloData, TlsData

_log = structlog.get_logger("gateway.outbound")

#: Hooks that an exchange goes through. All others, those of later versions included, are refused.
HOOKS: Final = frozenset({
    "client_connected", "client_disconnected", "next_layer",
    "server_connect", "server_connected", "server_connect_error", "server_disconnected",
    "http_connect", "http_connected", "http_connect_error",
    "requestheaders", "request", "responseheaders", "response", "error",
    "tls_clienthello", "tls_start_client", "tls_start_server",
    "tls_established_client", "tls_established_server", "tls_failed_client", "tls_failed_server",
})  # fmt: skip
#: So much may have been read from either side without having been dealt with.
MAX_UNDEALT_BYTES: Final = 131_072


class RefusedHookError(Exception):
    """Something that does not pass here: its protocol, its state, or its moment."""


class Reader(Protocol):
    """What mitmproxy reads from."""

    async def read(self, n: int, /) -> bytes:
        """Return at most `n` bytes; none at the end."""
        ...


class Lead:
    """How far the sides of one client's connection may run ahead.

    Nothing is read while a hook is at work, nor from a side of which `MAX_UNDEALT_BYTES` lie
    unattended. What then never moves on is ended by mitmproxy's time-out for idle connections.
    """

    def __init__(self) -> None:
        self.severed = False
        self._at_work = 0
        self._readers: list[LedReader] = []

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold all sides while a hook is at work."""
        self._at_work += 1
        self._settle()
        try:
            yield
        finally:
            self._at_work -= 1
            self._settle()

    def progressed(self) -> None:
        """Note that what was read has been dealt with."""
        for reader in self._readers:
            reader.undealt = 0
        self._settle()

    def sever(self) -> None:
        """Let the readers see the end that comes."""
        self.severed = True
        self._settle()

    def take(self, inner: Reader) -> LedReader:
        """Take one more side on this lead."""
        reader = LedReader(inner, self)
        self._readers = [one for one in self._readers if not one.ended]
        self._readers.append(reader)
        self._settle()
        return reader

    def _settle(self) -> None:
        for reader in self._readers:
            reader.hold(self._at_work > 0 and not self.severed)


class LedReader:
    """Reads one side of a connection on its lead."""

    def __init__(self, inner: Reader, lead: Lead) -> None:
        self.undealt = 0
        self.ended = False
        self._inner = inner
        self._lead = lead
        self._free = asyncio.Event()

    def hold(self, held: bool) -> None:  # noqa: FBT001 - the lead's word, nothing else
        """Stop or go on reading."""
        if (held or self.undealt > MAX_UNDEALT_BYTES) and not self._lead.severed:
            self._free.clear()
        else:
            self._free.set()

    async def read(self, size: int) -> bytes:
        """Return at most `size` bytes; none at the end, or when the connection was severed."""
        await self._free.wait()
        data = b"" if self._lead.severed else await self._inner.read(size)
        if self._lead.severed:
            data = b""
        self.ended = not data
        self.undealt += len(data)
        if self.undealt > MAX_UNDEALT_BYTES and not self._lead.severed:
            self._free.clear()
        return data


class FailClosedAddons(AddonManager):
    """mitmproxy's hooks, each of which ends its connection unless every part agrees in time.

    `hook_timeout_s` bounds all parts of one hook together.
    """

    def __init__(self, master: Master, *, hook_timeout_s: float) -> None:
        super().__init__(master)  # type: ignore[no-untyped-call]
        self._hook_timeout_s = hook_timeout_s
        self.leads: dict[str, Lead] = {}

    async def handle_lifecycle(self, event: hooks.Hook) -> None:
        """Run one hook of a connection. Returns without an exception, or the connection is gone."""
        try:
            if event.name not in HOOKS:
                raise RefusedHookError(event.name)  # noqa: TRY301 - one way out for all refusals
            client = client_of(event.args()[0])
            with self.lead(client).working():
                async with asyncio.timeout(self._hook_timeout_s):
                    for addon in self.chain:
                        await self.invoke_addon(addon, event)
        except BaseException as error:
            self.refuse(event)
            kind, where = type(error).__name__, event.name
            _log.warning("gateway.outbound.connection_ended", hook=where, error=kind)
            # A cancellation is the connection's own end; what ends the process goes on.
            if not isinstance(error, Exception):
                raise
        finally:
            self._let_go(event.args()[0])

    def _let_go(self, message: object) -> None:
        """Forget the lead of a client that has gone; its servers may be heard of after it."""
        with suppress(RefusedHookError):
            client = client_of(message)
            if client.timestamp_end is not None:
                self.leads.pop(client.id, None)

    async def trigger_event(self, event: hooks.Hook) -> None:
        """Run a hook of the proxy itself (start, stop); its exceptions go on."""
        for addon in self.chain:
            await self.invoke_addon(addon, event)

    def trigger(self, event: hooks.Hook) -> None:
        """As `trigger_event`, for hooks that do not wait."""
        for addon in self.chain:
            self.invoke_addon_sync(addon, event)

    def lead(self, client: Client) -> Lead:
        """The lead of a client's connection."""
        return self.leads.setdefault(client.id, Lead())

    def refuse(self, event: hooks.Hook) -> None:
        """Say no in the way in which the hook can be told, and cut the connection besides.

        What belongs to no connection that is known stops the proxy: no data may go on unseen.
        """
        message = event.args()[0] if event.args() else None
        match message:
            case mitm_flow.Flow():
                message.error = mitm_flow.Error(mitm_flow.Error.KILLED_MESSAGE)
                message.live = False
            case ServerConnectionHookData():
                message.server.error = "refused"
            case Client():
                message.error = "refused"
            case NextLayer():
                message.layer = None
            case ClientHelloData():
                message.ignore_connection = False
            case TlsData():
                message.ssl_conn = None
        try:
            client = client_of(message)
        except RefusedHookError:
            self.master.shutdown()
            return
        self.sever(client.id)

    def sever(self, client_id: str) -> None:
        """Cut a client's connection and all that were made for it. Nothing waiting is sent."""
        if (lead := self.leads.get(client_id)) is not None:
            lead.sever()
        handler = self.master.proxyserver.connections.get(client_id)
        if handler is not None:
            for side in list(handler.transports.values()):
                cut(side)


def cut(side: Any) -> None:
    """End one connection of mitmproxy's now, or its being made."""
    if side.writer is not None:
        side.writer.transport.abort()
    elif side.handler is not None and side.handler is not asyncio.current_task():
        side.handler.cancel("severed")


def client_of(message: object) -> Client:
    """The client's connection that what a hook is told of belongs to. Raises `RefusedHookError`."""
    match message:
        case Client():
            return message
        case mitm_flow.Flow():
            return message.client_conn
        case ServerConnectionHookData():
            return message.client
        case NextLayer() | ClientHelloData() | TlsData():
            return message.context.client
    raise RefusedHookError(type(message).__name__)
