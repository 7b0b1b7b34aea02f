"""What stands in front of the apps: requests from Granian (RSGI) in, answers out.

Turns the server's view of a request into a `RequestHead` and a `Client`, and decides nothing but
two things: how many exchanges there may be at once, and that whatever goes wrong further in becomes
a plain answer of our own or a connection that visibly breaks. Before: `gateway.frontends.serve`
starts the server. After: whatever `App` does, usually `gateway.frontends.driver`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any, Final, Protocol

import orjson
import structlog

from gateway import metrics
from gateway.core.commands import Failed, Signal
from gateway.core.headers import OWN_HEADERS
from gateway.core.messages import Headers, RequestHead, ResponseHead
from gateway.errors import BadRequestError
from gateway.frontends.connections import Outflow, Sweeper, cut
from gateway.frontends.framing import canonical_path
from gateway.settings import LimitSettings

_log = structlog.get_logger("gateway")

#: Whole answers larger than this are sent in pieces, as fast as the client takes them.
_PIECE_BYTES: Final = 262_144
#: RFC 9110 sections 6.4.1 and 15.4.5: answers that never have content.
_BODILESS: Final = frozenset({204, 205, 304})
_SERVER: Final = ("server", "Havengate")
#: The server sets these by itself.
_NOT_SENT: Final = frozenset({"content-length", "transfer-encoding", "connection", "server"})
_LONGEST_SWEEP_S: Final = 5.0
_RECEIVED: Final = metrics.BYTES.labels("received").inc
_SENT: Final = metrics.BYTES.labels("sent").inc
#: A body that comes more slowly than this keeps a place from others, and is given up.
_LEAST_BYTES_PER_S: Final = 4_096


class App(Protocol):
    """What is served."""

    async def start(self) -> None:
        """Get ready, in the worker, before the first request. If it raises, the worker ends."""
        ...

    async def exchange(self, head: RequestHead, client: Client) -> object:
        """Carry one request to its end. Must answer through `client`."""
        ...

    async def stop(self) -> None:
        """The last exchange is over."""
        ...


class Ingress:
    """An RSGI application (RSGI 1.6). One per worker process."""

    def __init__(self, app: App, limits: LimitSettings, *, port: int, idle_s: float = 60.0) -> None:
        """`port` is where clients connect to; `idle_s` how long a connection may ask nothing."""
        self._app = app
        self._limits = limits
        self._running = 0
        self._outflow = Outflow(stall_s=limits.body_timeout_s)
        self._sweeper = Sweeper(idle_s=idle_s)
        self._port = port
        self._sweep_s = min(_LONGEST_SWEEP_S, idle_s / 2)
        self._sweeping: asyncio.TimerHandle | None = None

    def __rsgi_init__(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.run_until_complete(self._app.start())
        self._sweeping = loop.call_later(self._sweep_s, self._sweep, loop)

    def __rsgi_del__(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        loop.run_until_complete(self._app.stop())

    async def __rsgi__(self, scope: Any, protocol: Any) -> None:
        """Serve one request. Never raises: the server would write the text of it to its log."""
        if scope.proto != "http":
            protocol.close(HTTPStatus.NOT_IMPLEMENTED)
            return
        client = Client(scope, protocol, self._limits, self._outflow, self._port)
        if self._running >= self._limits.concurrent:
            client.refuse(503, "Too many requests are in progress. Come again in a moment.")
            return
        self._running += 1
        self._sweeper.begin(scope.client)
        try:
            await self._app.exchange(_head(scope), client)
        except BadRequestError as error:
            client.refuse(error.status, str(error))
        except asyncio.CancelledError:
            client.fail()
        except Exception as error:  # noqa: BLE001 - nothing of it may reach the client or a log
            _log.error("gateway.exchange_broke", error=type(error).__name__)
            client.fail()
        finally:
            # Counted first: whatever breaks after it must not keep a place for ever.
            self._running -= 1
            self._sweeper.end(scope.client, time.monotonic())
            client.finish()
            _RECEIVED(client.bytes_in)
            _SENT(client.bytes_out)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        ended = self._sweeper.sweep(self._port, time.monotonic())
        if ended:
            _log.info("gateway.idle_connections_ended", count=ended)
        self._sweeping = loop.call_later(self._sweep_s, self._sweep, loop)


def _head(scope: Any) -> RequestHead:
    """What the server understood. Raises `BadRequestError` for what it may have misunderstood."""
    try:
        fields = tuple(scope.headers.items())
    except (ValueError, UnicodeError) as error:
        raise BadRequestError("The value of a header field is not ASCII.") from error
    headers = Headers(fields)
    authority = scope.authority
    return RequestHead(
        method=scope.method,
        authority=(headers.get("host") or "") if authority is None else authority,
        path=canonical_path(scope.path),
        query=scope.query_string,
        headers=headers,
        # An IPv6 address stands in brackets before its port, and nowhere else.
        client=scope.client.rpartition(":")[0].strip("[]"),
        scheme=scope.scheme,
        http_version=scope.http_version,
    )


class Client:
    """The client's side of one exchange: `gateway.frontends.driver.Client`.

    Each piece of a body must come, and each piece of an answer be taken, within `body_timeout_s`.
    All pieces of a body together may keep us waiting for as long, and a second for each 4096 bytes
    that came. `left` says that the client has gone while an answer was flowing.
    """

    __slots__ = (
        "_bodiless",
        "_body",
        "_flowing",
        "_left",
        "_limits",
        "_outflow",
        "_peer",
        "_port",
        "_protocol",
        "_scope",
        "_started",
        "_transport",
        "_watch",
        "bytes_in",
        "bytes_out",
        "left",
    )  # fmt: skip

    def __init__(
        self, scope: Any, protocol: Any, limits: LimitSettings, outflow: Outflow, port: int
    ) -> None:
        self._scope = scope
        self._protocol = protocol
        self._limits = limits
        self._outflow = outflow
        self._peer: str = scope.client
        self._bodiless = scope.method == "HEAD"
        self._port = port
        self._body: _Body | None = None
        self._started = False
        self._transport: Any = None
        self._flowing = False
        self._left: int | None = None
        self._watch: asyncio.Task[None] | None = None
        self.left = False
        #: Of content, as far as it was received and handed to the server.
        self.bytes_in = 0
        self.bytes_out = 0

    # --- The request's body ---------------------------------------------------------------------

    async def receive(self) -> bytes | Signal | Failed:
        """The next piece; `Signal.END` only if the body came whole."""
        if self._body is None:
            self._body = _Body(self._scope, self._protocol, self._limits.body_timeout_s)
        piece = await self._body.next()
        if isinstance(piece, bytes):
            self.bytes_in += len(piece)
        return piece

    async def receive_all(self, limit: int) -> bytes | Signal | Failed:
        """The whole body. What announces itself as larger than `limit` is not read at all."""
        announced = self._scope.headers.get("content-length")
        if announced is not None and announced.isdigit() and int(announced) > limit:
            return _too_large(limit)
        pieces: list[bytes] = []
        size = 0
        while isinstance(piece := await self.receive(), bytes):
            size += len(piece)
            if size > limit:
                return _too_large(limit)
            pieces.append(piece)
        return b"".join(pieces) if piece is Signal.END else piece

    # --- The answer -----------------------------------------------------------------------------

    async def respond(self, head: ResponseHead, body: bytes = b"") -> Signal:
        """Send a whole answer; return when it is on its way."""
        if len(body) <= _PIECE_BYTES or self._bodiless:
            self._whole(head, body)
            return Signal.DONE
        with_length = ResponseHead(
            status=head.status, headers=head.headers.with_("content-length", str(len(body)))
        )
        await self.start(with_length)
        for at in range(0, len(body), _PIECE_BYTES):
            if await self.release(body[at : at + _PIECE_BYTES]) is Signal.GONE:
                await self.end(broken=True)
                return Signal.GONE
        await self.end(broken=False)
        return Signal.DONE

    async def start(self, head: ResponseHead) -> Signal:
        """Send the head of an answer in pieces. From here on a client that goes ends the task."""
        length = head.headers.get("content-length")
        if self._bodiless or head.status in _BODILESS:
            self._whole(head, b"")
            self._bodiless = True
            return Signal.DONE
        fields = _sent(head)
        if length is not None and length.isdecimal():
            self._left = int(length)
            fields.append(("content-length", length))
        self._transport = self._protocol.response_stream(head.status, fields)
        self._started = True
        self._outflow.begin(self._peer, self._port)
        self._flowing = True
        self._watch = asyncio.create_task(self._end_when_gone(asyncio.current_task()))
        return Signal.DONE

    async def release(self, data: bytes) -> Signal:
        """Send a piece, once the client has taken enough of those before."""
        if self._transport is None or not data:
            return Signal.DONE
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                self._cut()
                return Signal.GONE
        if not await self._outflow.take(self._peer, len(data)):
            self._cut()
            return Signal.GONE
        try:
            await self._transport.send_bytes(data)
        except RuntimeError:
            return Signal.GONE
        self.bytes_out += len(data)
        return Signal.DONE

    async def end(self, broken: bool) -> None:  # noqa: FBT001 - the command's field
        """The answer is complete, or must look cut off."""
        if broken or self._left:
            self._cut()
        self._let_go()

    # --- For the ingress ------------------------------------------------------------------------

    def refuse(self, status: int, detail: str) -> None:
        """Answer with a problem of the gateway's own (RFC 9457), if nothing was sent yet."""
        if self._started:
            self.fail()
            return
        title = HTTPStatus(status).phrase
        body = orjson.dumps({"title": title, "status": status, "detail": detail})
        fields = [("content-type", "application/problem+json"), *OWN_HEADERS]
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            fields.append(("retry-after", "1"))
        self._whole(ResponseHead(status=status, headers=Headers(tuple(fields))), body)

    def fail(self) -> None:
        """The exchange broke: say so if that is still possible, or else end the connection."""
        if not self._started:
            self.refuse(500, "The gateway made a mistake and released nothing. Tell the operator.")
        elif self._transport is not None:
            self._cut()

    def finish(self) -> None:
        """The exchange is over. An answer that nobody ended looks cut off; none at all is a 500."""
        if not self._started or self._transport is not None:
            self.fail()
        self._let_go()

    # --- Inside ---------------------------------------------------------------------------------

    def _let_go(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._flowing:
            self._flowing = False
            self._outflow.end(self._peer)
        self._transport = None

    def _whole(self, head: ResponseHead, body: bytes) -> None:
        if self._started:
            raise RuntimeError("An exchange has one answer.")
        fields = _sent(head)
        status = head.status
        if status in _BODILESS or self._bodiless:
            length = head.headers.get("content-length") or (str(len(body)) if body else None)
            if length is not None and status not in _BODILESS:
                fields.append(("content-length", length))
            self._protocol.response_empty(status, fields)
        else:
            fields.append(("content-length", str(len(body))))
            self._protocol.response_bytes(status, fields, body)
            self.bytes_out += len(body)
        self._started = True

    def _cut(self) -> None:
        self._left = None
        cut(self._peer, self._port)

    async def _end_when_gone(self, task: asyncio.Task[Any] | None) -> None:
        await self._protocol.client_disconnect()
        if task is not None and self._flowing:
            self.left = True
            task.cancel()


class _Body:
    """The pieces of a request's body, and whether it came whole.

    The server ends its pieces in the same way after the last one and after an error. So what was
    announced is counted; the end of a chunked body is known by the server's giving one empty piece
    there, and two after an error; and an HTTP/2 body of unannounced length is refused.
    """

    __slots__ = (
        "_empty",
        "_gone",
        "_left",
        "_patience_s",
        "_pieces",
        "_protocol",
        "_timeout_s",
        "_unannounced",
    )  # fmt: skip

    def __init__(self, scope: Any, protocol: Any, timeout_s: float) -> None:
        length = scope.headers.get("content-length")
        self._left = int(length) if length is not None and length.isdigit() else None
        self._unannounced = length is None and scope.http_version not in {"1", "1.0", "1.1"}
        self._protocol = protocol
        self._timeout_s = timeout_s
        #: How long we go on waiting, in all.
        self._patience_s = timeout_s
        self._pieces: AsyncIterator[bytes] = aiter(protocol)
        self._empty = 0
        self._gone: asyncio.Future[None] | None = None

    async def next(self) -> bytes | Signal | Failed:
        if self._left == 0:
            return Signal.END
        while True:
            try:
                piece = await self._piece()
            except TimeoutError:
                return Failed(
                    code="gateway.too_slow",
                    who="caller",
                    message="The body came too slowly. Send it again over a faster line.",
                )
            if piece is None:
                whole = self._left in {0, None} and self._empty < 2  # noqa: PLR2004 - see the class
                return Signal.END if whole else Signal.GONE
            if not piece:
                self._empty += 1
                continue
            self._empty = 0
            self._patience_s += len(piece) / _LEAST_BYTES_PER_S
            if self._unannounced:
                return Failed(
                    code="gateway.length_required",
                    who="caller",
                    message="The length of the body must be announced: send Content-Length.",
                )
            if self._left is not None:
                self._left -= len(piece)
                if self._left < 0:
                    return Signal.GONE
            return piece

    async def _piece(self) -> bytes | None:
        """The next one, None after the last or when the client has gone."""
        piece = asyncio.ensure_future(self._next())
        if self._gone is None:
            self._gone = asyncio.ensure_future(self._protocol.client_disconnect())
        began = time.monotonic()
        done, _ = await asyncio.wait(
            {piece, self._gone},
            timeout=min(self._timeout_s, max(0.0, self._patience_s)),
            return_when=asyncio.FIRST_COMPLETED,
        )
        self._patience_s -= time.monotonic() - began
        if piece in done:
            return piece.result()
        piece.cancel()
        if not done:
            raise TimeoutError
        self._empty = 2
        return None

    async def _next(self) -> bytes | None:
        """As `anext` with a default does, which the server's iterator does not survive."""
        try:
            return await self._pieces.__anext__()
        except StopAsyncIteration:
            return None


def _sent(head: ResponseHead) -> list[tuple[str, str]]:
    fields = [pair for pair in head.headers.fields if pair[0] not in _NOT_SENT]
    fields.append(_SERVER)
    return fields


def _too_large(limit: int) -> Failed:
    return Failed(
        code="gateway.too_large",
        who="caller",
        message=f"The body is larger than {limit} bytes, which is the most that is looked into.",
    )
