"""What the way out answers to mitmproxy's hooks. It decides nothing: `gateway.core.outbound` does.

Each hook may raise: `intercept_guard` then ends the connection. HTTP/1.1 carries one call at a time
on a connection, so the state of a call is kept by its client's connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final

from mitmproxy import http, tls
from mitmproxy.addons.tlsconfig import TlsConfig
from mitmproxy.connection import Client, ConnectionState
from mitmproxy.net import tls as net_tls
from mitmproxy.net.http import http1
from mitmproxy.proxy import commands as wire
from mitmproxy.proxy import context, layer, server_hooks
from mitmproxy.proxy.layers import ClientTLSLayer, HttpLayer, ServerTLSLayer, modes
from mitmproxy.proxy.layers.http import HTTPMode
from mitmproxy.proxy.layers.http._events import HttpEvent, ResponseProtocolError
from mitmproxy.proxy.layers.http._http1 import Http1Server
from OpenSSL import SSL

from gateway.core import outbound
from gateway.core.answers import Refusal
from gateway.core.commands import Failed, ReceiveHead, Signal
from gateway.core.enforcement import Reply
from gateway.core.exchange import Summary
from gateway.core.messages import RequestHead
from gateway.core.outbound import OpenOutside, Outside, Tunnel, Way
from gateway.frontends.intercept_calls import (
    Crossing,
    Services,
    Substitute,
    own_response,
    raw_headers,
    request_head,
    response_head,
)
from gateway.frontends.intercept_guard import RefusedHookError, cut
from gateway.frontends.intercept_tls import Leaf, Leaves
from gateway.outbound.addresses import AddressCheck
from gateway.outbound.listing import Target

if TYPE_CHECKING:
    from gateway.frontends.intercept_thread import InterceptMaster

#: Connections of apps at once; further ones are closed.
MAX_CONNECTIONS: Final = 512
#: A refused request's body up to this is read and dropped, so that every client hears the answer.
DRAINED_BYTES: Final = 65_536
_SUBSTITUTED = "havengate.substituted"
_ALPN = b"http/1.1"
_UNKNOWN_HEAD = RequestHead(method="GET", authority="", path="/")
_BROKEN = "The host outside cannot be reached, cannot be trusted, or broke off."


class WayOut:
    """The addon that carries calls through the core."""

    def __init__(
        self,
        *,
        outside: Outside,
        services: Services,
        resolver: AddressCheck,
        timeout_s: float,
        new_id: Callable[[], str],
        on_end: Callable[[Summary], None],
    ) -> None:
        self.replies: dict[str, Reply] = {}
        self._outside = outside
        self._services = services
        self._resolver = resolver
        self._timeout_s = timeout_s
        self._new_id = new_id
        self._on_end = on_end
        self._tunnels: dict[str, Tunnel] = {}
        self._calls: dict[str, Crossing[Summary]] = {}
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

    def tunnel(self, client: Client) -> Tunnel:
        """What was agreed with this client. Raises `RefusedHookError` if nothing was."""
        tunnel = self._tunnels.get(client.id)
        if tunnel is None:
            raise RefusedHookError("nothing was agreed with this client")
        return tunnel

    async def end_all(self) -> None:
        """End every call that is under way, in the log too."""
        for client_id in list(self._calls):
            await self._end(client_id, Failed(code="gateway.stopping"))
        if self._tasks:
            await asyncio.wait(self._tasks)

    # --- Connections ----------------------------------------------------------------------------

    def client_connected(self, client: Client) -> None:
        """Take a new connection on its lead."""
        connections = self.master.proxyserver.connections
        if len(connections) > MAX_CONNECTIONS:
            raise RefusedHookError("too many connections")
        self._take_on_lead(client, client)

    async def client_disconnected(self, client: Client) -> None:
        """End what the client left open."""
        await self._end(client.id, Signal.GONE)
        self._tunnels.pop(client.id, None)
        self.replies.pop(client.id, None)

    def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        """Let a connection be made only where a call goes whose intent is durable."""
        target = self.target(data.client)
        server = data.server
        fits = (
            server.address is not None
            and server.address[:2] == (target.host, target.port)
            and server.tls == target.encrypted
            and server.transport_protocol == "tcp"
            and server.via is None
            and data.client.transport_protocol == "tcp"
        )
        if not fits:
            raise RefusedHookError("no call goes there")
        if _is_address(target.host):
            self._resolver.verify(target.host, target.port, target.host)

    def server_connected(self, data: server_hooks.ServerConnectionHookData) -> None:
        """Look where the connection really went, before a byte is sent on it."""
        target = self.target(data.client)
        peer = data.server.peername
        if peer is None:
            raise RefusedHookError("a connection to nowhere")
        self._resolver.verify(target.host, target.port, str(peer[0]))
        self._take_on_lead(data.client, data.server)

    def _take_on_lead(self, client: Client, side: Any) -> None:
        transport = self.master.proxyserver.connections[client.id].transports[side]
        reader: Any = transport.reader
        led: Any = self.master.guard.lead(client).take(reader)
        transport.reader = led

    def target(self, client: Client) -> Target:
        """Where the call goes that is open. Raises `RefusedHookError` if none is."""
        call = self._calls.get(client.id)
        if call is None or call.target is None or call.closed or call.pending is None:
            raise RefusedHookError("no call of this client is open")
        return call.target

    # --- One call, in order ---------------------------------------------------------------------

    async def http_connect(self, flow: http.HTTPFlow) -> None:
        """Open a tunnel, or say why not."""
        client = flow.client_conn
        if client.id in self._tunnels or client.tls:
            raise RefusedHookError("a tunnel inside a tunnel")
        head = request_head(flow)
        steps = outbound.open_tunnel(head, self._outside, request=self._new_id())
        crossing = Crossing(steps, self._services, lambda: self._sever(client.id))
        await crossing.settle()
        self._progressed(client)
        if crossing.pending is None and crossing.reply is None and crossing.result is not None:
            self._tunnels[client.id] = crossing.result
            return
        if crossing.reply is None:
            raise RefusedHookError("neither agreed nor refused")
        flow.response = own_response(crossing.reply)

    async def requestheaders(self, flow: http.HTTPFlow) -> None:
        """Identify, decide, record the intent; only then may mitmproxy connect and send."""
        if flow.error is not None:
            # mitmproxy answers 400 and goes no further.
            return
        client = flow.client_conn
        if client.id in self._calls or flow.is_replay:
            raise RefusedHookError("a call inside a call")
        head = request_head(flow)
        steps = outbound.call(head, self._way_of(flow), self._outside, request=self._new_id())
        crossing = Crossing(steps, self._services, lambda: self._sever(client.id))
        self._calls[client.id] = crossing.limited_to(self._outside.max_body_bytes)
        await crossing.settle()
        self._progressed(client)
        if crossing.reply is not None:
            self._refuse(flow, crossing.reply)
            return
        opening = crossing.expect(OpenOutside)
        self._let_out(flow, crossing, opening)

    def _let_out(
        self, flow: http.HTTPFlow, crossing: Crossing[Summary], opening: OpenOutside
    ) -> None:
        target, client_id = opening.target, flow.client_conn.id
        if (flow.request.host.lower(), flow.request.port) != (target.host, target.port):
            raise RefusedHookError("mitmproxy would go elsewhere")
        flow.request.data.host = target.host
        host = flow.request.headers.get("host") or opening.head.authority
        flow.request.headers = raw_headers(opening.head.headers, flow.request.headers)
        flow.request.headers.insert(0, "host", host)
        crossing.target = target
        crossing.answer(Signal.DONE)
        if opening.has_body:
            flow.request.stream = lambda data: self._moved(client_id, crossing.upload(data))
        crossing.deadline = asyncio.get_running_loop().call_later(
            self._timeout_s, self._too_late, client_id, crossing
        )

    def _refuse(self, flow: http.HTTPFlow, reply: Reply) -> None:
        length = flow.request.headers.get("content-length", "0")
        small = length.isdecimal() and int(length) <= DRAINED_BYTES
        if small and "transfer-encoding" not in flow.request.headers:
            flow.response = own_response(reply)
            return
        # mitmproxy answers only when the body has come; this way it answers now and hangs up.
        self.replies[flow.client_conn.id] = reply
        flow.kill()  # type: ignore[no-untyped-call]

    def request(self, flow: http.HTTPFlow) -> None:
        """The request is complete; what has no body goes out after this."""
        crossing = self._call(flow)
        flow.request.trailers = None
        if crossing.reply is not None:
            return
        if crossing.target is None or flow.request.raw_content:
            raise RefusedHookError("a request that was not let out")
        if not crossing.early:
            crossing.expect(ReceiveHead)

    async def responseheaders(self, flow: http.HTTPFlow) -> None:
        """Record the outcome; only then may the answer go to the app."""
        crossing = self._call(flow)
        if crossing.pending is None and crossing.reply is not None:
            return
        if flow.response is None or crossing.target is None:
            raise RefusedHookError("an answer to nothing")
        released = await crossing.answered(response_head(flow.response))
        self._progressed(flow.client_conn)
        client_id = flow.client_conn.id
        if released is None:
            self._substitute(flow, crossing)
            return
        flow.response.headers = raw_headers(released.headers, flow.response.headers)
        if crossing.early:
            flow.response.headers["connection"] = "close"
        flow.response.stream = lambda data: self._moved(client_id, crossing.download(data))

    def _substitute(self, flow: http.HTTPFlow, crossing: Crossing[Summary]) -> None:
        if crossing.reply is None:
            raise RefusedHookError("no answer")
        flow.response = own_response(crossing.reply)
        flow.response.stream = Substitute(body=crossing.reply.body)
        flow.metadata[_SUBSTITUTED] = flow.response.stream

    async def response(self, flow: http.HTTPFlow) -> None:
        """The answer is complete."""
        crossing = self._call(flow)
        if flow.response is None or flow.websocket is not None:
            raise RefusedHookError("no answer")
        flow.response.trailers = None
        substitute = flow.metadata.pop(_SUBSTITUTED, None)
        await crossing.settle()
        if substitute is not None:
            # A body that mitmproxy kept, because the outside sent none, or because it came first.
            flow.response.raw_content = b"" if substitute.given else substitute.body
        elif crossing.pending is not None:
            if flow.response.raw_content:
                raise RefusedHookError("an answer that was not released")
            crossing.download(b"")
            await crossing.settle()
        if crossing.pending is not None:
            raise RefusedHookError("an answer that is not complete")
        self._finish(flow.client_conn.id, crossing)

    async def error(self, flow: http.HTTPFlow) -> None:
        """Something broke off: say so in the log, and to the app if it has no answer yet."""
        client_id = flow.client_conn.id
        crossing = self._calls.get(client_id)
        if crossing is None:
            return
        message = flow.error.msg if flow.error else ""
        code = "gateway.upstream"
        if "ertificate verify failed" in message:
            code = "gateway.upstream_untrusted"
        await self._end(client_id, Failed(code=code, who="upstream"))

    # --- Small things -----------------------------------------------------------------------------

    def _way_of(self, flow: http.HTTPFlow) -> Way:
        client = flow.client_conn
        tunnel = self._tunnels.get(client.id)
        encrypted = flow.request.scheme == "https"
        if tunnel is not None:
            encrypted = encrypted and client.tls_established and flow.server_conn.tls
        return Way(encrypted=encrypted, tunnel=tunnel, server_name=client.sni)

    def _call(self, flow: http.HTTPFlow) -> Crossing[Summary]:
        crossing = self._calls.get(flow.client_conn.id)
        if crossing is None:
            raise RefusedHookError("no call is under way")
        return crossing

    def _moved(self, client_id: str, pieces: list[bytes]) -> list[bytes]:
        lead = self.master.guard.leads.get(client_id)
        if lead is not None:
            lead.progressed()
        return pieces

    def _progressed(self, client: Client) -> None:
        self.master.guard.lead(client).progressed()

    def _sever(self, client_id: str) -> None:
        self.master.guard.sever(client_id)

    async def _end(self, client_id: str, failure: Failed | Signal) -> None:
        crossing = self._calls.get(client_id)
        if crossing is None:
            return
        await crossing.fail(failure)
        if crossing.reply is not None:
            self.replies[client_id] = crossing.reply
        self._finish(client_id, crossing)

    def _finish(self, client_id: str, crossing: Crossing[Summary]) -> None:
        crossing.stop_waiting()
        self._calls.pop(client_id, None)
        if crossing.result is not None:
            self._on_end(crossing.result)

    def _too_late(self, client_id: str, crossing: Crossing[Summary]) -> None:
        """No answer in time: end the call, then the connection that it waits on."""

        async def end() -> None:
            if self._calls.get(client_id) is crossing:
                late = Failed(code="gateway.upstream_timeout", who="upstream", timed_out=True)
                await self._end(client_id, late)
            handler = self.master.proxyserver.connections.get(client_id)
            for side, transport in list(handler.transports.items()) if handler else ():
                if not isinstance(side, Client):
                    cut(transport)

        task = asyncio.get_running_loop().create_task(end())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class NextLayer:
    """Says which protocol follows: HTTP/1.1, plain or over TLS, and nothing else."""

    name = "nextlayer"

    def __init__(self, way: WayOut) -> None:
        self._way = way

    def next_layer(self, nextlayer: layer.NextLayer) -> None:
        """Choose. Raises `RefusedHookError` for what is neither."""
        ctx = nextlayer.context
        data = nextlayer.data_client()  # type: ignore[no-untyped-call]
        greeting = nextlayer.data_server()  # type: ignore[no-untyped-call]
        if ctx.client.transport_protocol != "tcp" or greeting:
            raise RefusedHookError("not a request over TCP")
        if not isinstance(ctx.layers[0], modes.HttpProxy):
            raise RefusedHookError("a mode that is not offered")
        if not data:
            return
        if len(ctx.layers) == 1:
            nextlayer.layer = self._http(ctx, data, HTTPMode.regular)
            return
        self._way.tunnel(ctx.client)
        if net_tls.starts_like_tls_record(data) and not ctx.client.tls:
            outer = ServerTLSLayer(ctx)
            outer.child_layer = ClientTLSLayer(ctx)
            nextlayer.layer = outer
            return
        nextlayer.layer = self._http(ctx, data, HTTPMode.transparent)

    def _http(self, ctx: context.Context, data: bytes, mode: HTTPMode) -> HttpLayer:
        if not data[:1].isalpha() or ctx.client.alpn not in {None, b"", _ALPN}:
            raise RefusedHookError("not HTTP/1.1")
        http_layer = HttpLayer(ctx, mode)
        http_layer.connections[ctx.client] = ProblemServer(ctx.fork(), self._way.replies)
        return http_layer


class ProblemServer(Http1Server):
    """mitmproxy's HTTP/1 towards the app, with problem details where it would write a page."""

    def __init__(self, ctx: context.Context, replies: dict[str, Reply]) -> None:
        super().__init__(ctx)
        self._replies = replies

    def send(self, event: HttpEvent) -> layer.CommandGenerator[None]:
        """Send an event; for a failure before any answer, the answer that the core gave."""
        if not isinstance(event, ResponseProtocolError) or self.response:
            yield from super().send(event)
            return
        reply = self._replies.pop(self.context.client.id, None)
        status = event.code.http_status_code()
        if reply is None and status is not None:
            reply = outbound.refused(Refusal(status=status, detail=_BROKEN), _UNKNOWN_HEAD, "none")
        if reply is not None and self.conn.state & ConnectionState.CAN_WRITE:
            raw = http1.assemble_response(own_response(reply))  # type: ignore[no-untyped-call]
            yield wire.SendData(self.conn, raw)
        yield wire.CloseConnection(self.conn)


class TLS(TlsConfig):
    """TLS to both sides: certificates from Vault for apps, verified ones from outside."""

    name = "tlsconfig"
    #: mitmproxy would make an authority and serve its revocation list; there is none here.
    request = None  # type: ignore[assignment]
    running = None  # type: ignore[assignment]
    quic_start_client = None  # type: ignore[assignment]
    quic_start_server = None  # type: ignore[assignment]

    def __init__(self, way: WayOut, leaves: Leaves) -> None:
        self._way = way
        self._leaves = leaves

    def configure(self, updated: set[str]) -> None:
        """Make no authority."""

    def tls_clienthello(self, data: tls.ClientHelloData) -> None:
        """Speak TLS with the app first: nothing goes outside before a request was decided."""
        self._way.tunnel(data.context.client)
        data.ignore_connection = False
        data.establish_server_tls_first = False

    async def tls_start_client(  # type: ignore[override]
        self, data: tls.TlsData
    ) -> None:
        """Show the app a certificate for the host of its tunnel."""
        tunnel = self._way.tunnel(data.context.client)
        if data.is_dtls:
            raise RefusedHookError("DTLS")
        leaf = self._leaves.get(tunnel.host)
        if leaf is None:
            leaf = await asyncio.to_thread(self._leaves.ensure, tunnel.host)
        connection = SSL.Connection(_server_context(leaf))
        connection.set_accept_state()
        data.ssl_conn = connection

    def tls_start_server(self, data: tls.TlsData) -> None:
        """Verify the host outside: its certificate, for the name that was decided on."""
        target = self._way.target(data.context.client)
        server: Any = data.conn
        if data.is_dtls or server.address[:2] != (target.host, target.port):
            raise RefusedHookError("no call goes there")
        server.sni = target.host
        server.alpn_offers = (_ALPN,)
        super().tls_start_server(data)

    def tls_established_server(self, data: tls.TlsData) -> None:
        """Believe in verification only if it was on."""
        if (
            data.ssl_conn is None
            or data.ssl_conn.get_context().get_verify_mode() == SSL.VERIFY_NONE
        ):
            raise RefusedHookError("an unverified host")


def _server_context(leaf: Leaf) -> SSL.Context:
    made = SSL.Context(SSL.TLS_SERVER_METHOD)
    made.set_min_proto_version(SSL.TLS1_2_VERSION)
    made.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION)
    made.use_certificate(leaf.certificate)
    made.use_privatekey(leaf.key)
    made.set_alpn_select_callback(_select_protocol)
    return made


def _select_protocol(connection: SSL.Connection, offered: list[bytes]) -> Any:
    del connection
    return _ALPN if _ALPN in offered else SSL.NO_OVERLAPPING_PROTOCOLS


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
