"""mitmproxy in reverse mode: a second frontend for requests to the apps, over the same core.

It stands where a protocol has to be understood that the ingress does not speak; today it serves
HTTP/1.1 over TLS, as the ingress does, and passes the same conformance tests
(`tests/gateway/frontends/conformance.py`). mitmproxy accepts connections, speaks TLS and reads and
writes HTTP/1.1. It never connects to anything: the app is reached by the core's own commands, and
a server connection of mitmproxy's is refused. Its flows hold whole bodies, so the layer that makes
flows is left out, and requests go from the reader of HTTP/1.1 straight to a `Conversation`; both
directions pass in pieces. HTTP/2 and trailers of requests are not offered.

Beside: `intercept_conversation` (one request), `intercept_guard` (that every hook fails closed).
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any, Final, Protocol

import structlog
from mitmproxy import http, tls
from mitmproxy.connection import Client
from mitmproxy.net import tls as net_tls
from mitmproxy.net.http import http1
from mitmproxy.options import Options
from mitmproxy.proxy import commands as wire
from mitmproxy.proxy import context, events, layer, server_hooks
from mitmproxy.proxy.layers import ClientTLSLayer, modes
from mitmproxy.proxy.layers.http import _events as http_events
from mitmproxy.proxy.layers.http._base import HttpEvent, ReceiveHttp
from mitmproxy.proxy.layers.http._http1 import Http1Server
from OpenSSL import SSL

from gateway.core.messages import RequestHead
from gateway.errors import BadRequestError, GatewayConfigurationError
from gateway.frontends.driver import Client as CoreClient
from gateway.frontends.intercept_conversation import (
    MISTAKE,
    Conversation,
    problem,
    raw_response,
    request_head,
)
from gateway.frontends.intercept_guard import RefusedHookError
from gateway.frontends.intercept_thread import InterceptMaster, ProxyThread
from gateway.settings import LimitSettings

_log = structlog.get_logger("gateway")

_ALPN: Final = b"http/1.1"
#: mitmproxy wants an address behind a reverse proxy. Nothing ever connects there.
_NOWHERE: Final = "reverse:http://127.0.0.1:9"
_HOOK_TIMEOUT_S: Final = 15.0
#: TLS wants the rest of a ClientHello, and a connection its next request, within this.
_IDLE_S: Final = 60.0


class App(Protocol):
    """What is served (`gateway.app.Gateway`)."""

    async def start(self) -> None:
        """Get ready, in the proxy's event loop, before the first request."""
        ...

    async def exchange(self, head: RequestHead, client: CoreClient) -> object:
        """Carry one request to its end. Must answer through `client`."""
        ...

    async def stop(self) -> None:
        """The last exchange is over."""
        ...


class Reverse(ProxyThread):
    """The running frontend. A context manager, or `start` and `close`. One in a process.

    `app` is used in this frontend's own event loop, and may be shared with nobody.
    """

    name = "havengate-reverse"

    def __init__(
        self,
        app: App,
        limits: LimitSettings,
        *,
        host: str = "127.0.0.1",
        port: int,
        certificate: Path,
        key: Path,
        idle_s: float = _IDLE_S,
    ) -> None:
        super().__init__()
        self._app = app
        self._where = (host, port)
        self._idle_s = idle_s
        self._shown = (certificate, key)
        self._hall = Hall(app, limits, idle_s)

    def start(self) -> None:
        """Serve in a thread. Raises `GatewayConfigurationError` if it cannot."""
        tls_context = server_context(*self._shown)
        self._hall.tls_context = tls_context
        host, port = self._where
        self.begin(f"The reverse frontend cannot start, or not listen on {host}:{port}.")

    async def serve(self) -> None:
        """Run until `close`."""
        await self._app.start()
        try:
            master = InterceptMaster(self._options(), hook_timeout_s=_HOOK_TIMEOUT_S)
            self._hall.attach(master)
            master.guard.add(master.proxyserver, self._hall)  # type: ignore[no-untyped-call]
            await self.listen(master, self._hall.end_all)
        finally:
            await self._app.stop()

    def _options(self) -> Options:
        host, port = self._where
        options = Options(
            mode=[_NOWHERE],
            listen_host=host,
            listen_port=port,
            http2=False,
            http3=False,
            websocket=False,
            rawtcp=False,
            tcp_timeout=max(1, math.ceil(self._idle_s)),
        )
        options.update_defer(connection_strategy="lazy")  # type: ignore[no-untyped-call]
        return options


class Hall:
    """Where requests arrive: the hooks, and what goes on at once."""

    name = "reverse"

    def __init__(self, app: App, limits: LimitSettings, idle_s: float) -> None:
        self._idle_s = idle_s
        self.tls_context: SSL.Context | None = None
        self._app = app
        self._limits = limits
        self._open: dict[str, set[Conversation]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._master: InterceptMaster | None = None

    def attach(self, master: InterceptMaster) -> None:
        """Say whose hooks these are."""
        self._master = master

    @property
    def master(self) -> InterceptMaster:
        """Whose hooks these are."""
        if self._master is None:
            raise RuntimeError("Not attached to a proxy.")
        return self._master

    async def end_all(self) -> None:
        """End what is under way, in the log too."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # --- Hooks: each may raise, and the connection then ends ------------------------------------

    def client_connected(self, client: Client) -> None:
        """Take a connection on its lead."""
        connections = self.master.proxyserver.connections
        if len(connections) > self._limits.concurrent:
            raise RefusedHookError("too many connections")
        transport: Any = connections[client.id].transports[client]
        transport.reader = self.master.guard.lead(client).take(transport.reader)

    def client_disconnected(self, client: Client) -> None:
        """Tell what was under way."""
        for conversation in self._open.pop(client.id, ()):
            conversation.gone()

    def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        """Never: the app is reached by the core."""
        raise RefusedHookError(f"nothing is connected to from here: {type(data).__name__}")

    def next_layer(self, nextlayer: layer.NextLayer) -> None:
        """TLS, and HTTP/1.1 in it. Nothing else."""
        ctx = nextlayer.context
        data = nextlayer.data_client()  # type: ignore[no-untyped-call]
        if ctx.client.transport_protocol != "tcp":
            raise RefusedHookError("not TCP")
        if not ctx.layers or not isinstance(ctx.layers[0], modes.ReverseProxy):
            raise RefusedHookError("a mode that is not offered")
        if ctx.client.tls_established:
            if ctx.client.alpn not in {None, b"", _ALPN}:
                raise RefusedHookError("not HTTP/1.1")
            nextlayer.layer = Reception(ctx, self)
        elif data:
            if not net_tls.starts_like_tls_record(data):
                raise RefusedHookError("not TLS")
            nextlayer.layer = PoliteTLS(ctx)

    def tls_clienthello(self, data: tls.ClientHelloData) -> None:
        """Speak TLS with the client, and with nobody else."""
        data.ignore_connection = False
        data.establish_server_tls_first = False

    def tls_start_client(self, data: tls.TlsData) -> None:
        """Show the certificate."""
        if data.is_dtls or self.tls_context is None:
            raise RefusedHookError("no TLS that is offered")
        connection = SSL.Connection(self.tls_context)
        connection.set_accept_state()
        data.ssl_conn = connection

    # --- Requests -------------------------------------------------------------------------------

    def begin(self, client: Client, request: http.Request, stream_id: int) -> Conversation:
        """A request has come: start its exchange."""
        line = ClientLine(self.master, client)
        conversation = Conversation(request, stream_id, line, self._limits)
        self._open.setdefault(client.id, set()).add(conversation)
        task = asyncio.get_running_loop().create_task(self._converse(conversation, client, request))
        conversation.task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return conversation

    async def _converse(
        self, conversation: Conversation, client: Client, request: http.Request
    ) -> None:
        """Never raises, and never leaves a request without an answer or a cut connection."""
        handler: Any = self.master.proxyserver.connections.get(client.id)
        if handler is None:
            return
        awake = asyncio.get_running_loop().create_task(self._keep_awake(handler))
        try:
            # Tasks begin at once here; what came with the head is heard first.
            await asyncio.sleep(0)
            await self._exchange(conversation, client, request)
        except asyncio.CancelledError:
            self.master.guard.sever(client.id)
        except Exception as error:  # noqa: BLE001 - mitmproxy would log its text
            _log.error("gateway.exchange_broke", error=type(error).__name__)
            self.master.guard.sever(client.id)
        finally:
            awake.cancel()
            self._open.get(client.id, set()).discard(conversation)

    async def _keep_awake(self, handler: Any) -> None:
        """An app may be slower than a connection may be idle."""
        while True:
            handler.timeout_watchdog.register_activity()
            await asyncio.sleep(self._idle_s / 4)

    async def _exchange(
        self, conversation: Conversation, client: Client, request: http.Request
    ) -> None:
        if len(self._tasks) > self._limits.concurrent:
            await conversation.refuse(
                503, "Too many requests are in progress. Come again in a moment."
            )
            return
        try:
            head = request_head(request, client=str(client.peername[0]), scheme="https")
            await self._app.exchange(head, conversation)
        except BadRequestError as error:
            await conversation.refuse(error.status, str(error))
        except Exception as error:  # noqa: BLE001 - its text may hold what must not be there
            _log.error("gateway.exchange_broke", error=type(error).__name__)
            await conversation.refuse(500, MISTAKE)
        await conversation.finish()


class ClientLine:
    """A client's connection: `intercept_conversation.Line`."""

    def __init__(self, master: InterceptMaster, client: Client) -> None:
        self._master = master
        self._client = client

    async def say(self, event: HttpEvent) -> None:
        """Send a part of an answer. Nothing happens on a connection that has gone."""
        handler = self._master.proxyserver.connections.get(self._client.id)
        if handler is not None:
            await handler.server_event(event)

    async def taken(self) -> None:
        """Wait until most of what was sent is on the wire."""
        handler: Any = self._master.proxyserver.connections.get(self._client.id)
        if handler is None or self._client not in handler.transports:
            raise ConnectionError("gone")
        await handler.drain_writers()

    def progressed(self) -> None:
        """Read on."""
        lead = self._master.guard.leads.get(self._client.id)
        if lead is not None:
            lead.progressed()

    def sever(self) -> None:
        """End the connection, without TLS's own sign of an end."""
        self._master.guard.sever(self._client.id)


class Reception(layer.Layer):
    """HTTP/1.1 with one client, without mitmproxy's flows.

    What the reader of HTTP/1.1 understood goes to a conversation; what a conversation says comes as
    an event and goes to the writer. An exception ends the connection: mitmproxy would only log it.
    """

    def __init__(self, ctx: context.Context, hall: Hall) -> None:
        super().__init__(ctx)
        self._hall = hall
        self._http = Http1Server(ctx.fork())
        self._current: Conversation | None = None
        self._refused = False

    def _handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        try:
            if isinstance(event, HttpEvent):
                yield from self._said(event)
            else:
                yield from self._heard(event)
        except Exception as error:  # noqa: BLE001 - see the class
            _log.warning("gateway.connection_ended", error=type(error).__name__)
            if self._current is not None:
                self._current.gone()
            self._hall.master.guard.sever(self.context.client.id)

    def _said(self, event: HttpEvent) -> layer.CommandGenerator[None]:
        if event.stream_id != self._http.stream_id:
            raise RefusedHookError("an answer to another request")
        early = isinstance(event, http_events.ResponseEndOfMessage) and not self._http.request_done
        for command in self._http.handle_event(event):
            yield from self._passed(command)
        if early:
            yield wire.CloseConnection(self.context.client)

    def _heard(self, event: events.Event) -> layer.CommandGenerator[None]:
        for command in self._http.handle_event(event):
            if isinstance(command, wire.SendData):
                # What it cannot read it answers with a page that quotes it.
                self._refused = True
                head, body = problem(400, "The first lines of the request cannot be understood.")
                fields = [*head.headers.fields, ("content-length", str(len(body)))]
                response = raw_response(head.status, [*fields, ("connection", "close")])
                command.data = http1.assemble_response_head(response) + body  # type: ignore[no-untyped-call]
            yield from self._passed(command)

    def _passed(self, command: wire.Command) -> layer.CommandGenerator[None]:
        if isinstance(command, ReceiveHttp):
            self._received(command.event)
        elif isinstance(command, wire.SendData | wire.CloseConnection):
            yield command
        elif not isinstance(command, wire.Log):
            raise RefusedHookError(type(command).__name__)

    def _received(self, event: HttpEvent) -> None:
        match event:
            case http_events.RequestHeaders(request=request):
                if not self._refused:
                    self._current = self._hall.begin(self.context.client, request, event.stream_id)
            case _ if self._current is None:
                pass
            case http_events.RequestData(data=data):
                self._current.came(data)
            case http_events.RequestEndOfMessage():
                self._current.ended()
            case _:
                self._current.gone()


class PoliteTLS(ClientTLSLayer):
    """TLS that says when it ends (RFC 8446 section 6.1): an end without that was cut off."""

    def send_close(self, command: wire.CloseConnection) -> layer.CommandGenerator[None]:
        """Send close_notify, then close."""
        if self.tls is not None:
            try:
                self.tls.shutdown()
            except SSL.Error:
                _log.debug("gateway.tls_ended_early")
            yield from self.tls_interact()
        yield from super().send_close(command)


def server_context(certificate: Path, key: Path) -> SSL.Context:
    """TLS 1.2 or newer with one certificate (and its chain). Raises `GatewayConfigurationError`."""
    made = SSL.Context(SSL.TLS_SERVER_METHOD)
    made.set_min_proto_version(SSL.TLS1_2_VERSION)
    made.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION)
    try:
        made.use_certificate_chain_file(str(certificate))
        made.use_privatekey_file(str(key))
        made.check_privatekey()
    except SSL.Error as error:
        raise GatewayConfigurationError(
            f"Expected a certificate and its key in PEM in {certificate} and {key}, got something "
            "else. Check both files."
        ) from error
    made.set_alpn_select_callback(_select_protocol)
    return made


def _select_protocol(connection: SSL.Connection, offered: list[bytes]) -> Any:
    del connection
    return _ALPN if _ALPN in offered else SSL.NO_OVERLAPPING_PROTOCOLS
