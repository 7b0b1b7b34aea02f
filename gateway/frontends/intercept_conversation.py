"""One request that came through mitmproxy: the client's side of an exchange over it.

The layers of mitmproxy tell a `Conversation` what the client sent; the core asks it for that and
has it answer. Bodies pass in pieces in both directions: a client is read only as far as the core
asks for more (`intercept_guard.Lead`), and a piece of an answer waits until those before it were
taken. Before: `intercept_reverse`, which listens. After: `gateway.frontends.driver`.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Final, Protocol
from urllib.parse import unquote

import orjson
from mitmproxy import http
from mitmproxy.net.http.validate import validate_headers
from mitmproxy.proxy.layers.http._base import HttpEvent
from mitmproxy.proxy.layers.http._events import ResponseData, ResponseEndOfMessage, ResponseHeaders

from gateway.core.commands import Failed, Signal
from gateway.core.headers import OWN_HEADERS
from gateway.core.messages import Headers, RequestHead, ResponseHead
from gateway.errors import BadRequestError
from gateway.frontends.framing import canonical_path
from gateway.settings import LimitSettings

#: RFC 9110 sections 6.4.1 and 15.4.5: answers that never have content.
_BODILESS: Final = frozenset({204, 205, 304})
#: Written here, for this connection.
_NOT_SENT: Final = frozenset({"content-length", "transfer-encoding", "connection", "server"})
#: A body that comes more slowly than this is given up.
_LEAST_BYTES_PER_S: Final = 4_096
_ENCODED_WRONG = re.compile(rb"%(?![0-9A-Fa-f]{2})").search


class Line(Protocol):
    """The connection that a request came on."""

    async def say(self, event: HttpEvent) -> None:
        """Send a part of an answer."""
        ...

    async def taken(self) -> None:
        """Wait until the client took most of what was sent. Raises `OSError` if it has gone."""
        ...

    def progressed(self) -> None:
        """Read on: what was read has been dealt with."""
        ...

    def sever(self) -> None:
        """End the connection now, so that the client sees that something is missing."""
        ...


def request_head(request: http.Request, *, client: str, scheme: str) -> RequestHead:
    """A request as the core sees it. Raises `BadRequestError` for what two could read as two."""
    try:
        validate_headers(request)
        data = request.data
        raw_path, mark, query = data.path.partition(b"?")
        if _ENCODED_WRONG(raw_path) or b"#" in raw_path:
            raise ValueError("percent signs")  # noqa: TRY301 - one answer for all
        fields = tuple(
            (name.decode("ascii").lower(), value.decode("ascii"))
            for name, value in request.headers.fields
        )
        headers = Headers(fields)
        authority = data.authority.decode("ascii") or headers.get("host") or ""
        return RequestHead(
            method=data.method.decode("ascii"),
            authority=authority,
            path=canonical_path(unquote(raw_path.decode("utf-8"))),
            query=query.decode("ascii") if mark else "",
            headers=headers,
            client=client,
            scheme=scheme,
            http_version=data.http_version.decode("ascii").removeprefix("HTTP/"),
        )
    except ValueError as error:
        raise BadRequestError(
            "The request's framing, target or header fields can be read in more than one way, or "
            "are not ASCII."
        ) from error


class Conversation:
    """`gateway.frontends.driver.Client`, for one request on a `Line`.

    Each piece of a body must come, and each piece of an answer be taken, within `body_timeout_s`;
    all pieces of a body together may keep us waiting for as long, and a second for each 4096 bytes
    that came. `left` says that the client has gone while an answer was flowing.
    """

    def __init__(
        self, request: http.Request, stream_id: int, line: Line, limits: LimitSettings
    ) -> None:
        self.left = False
        self.over = False
        self.task: asyncio.Task[None] | None = None
        self._line = line
        self._limits = limits
        self._stream_id = stream_id
        self._head_only = request.data.method == b"HEAD"
        self._old = request.http_version != "HTTP/1.1"
        self._expects = request.headers.get("expect", "").lower() == "100-continue"
        length = request.headers.get("content-length")
        self._announced = int(length) if length is not None and length.isdecimal() else None
        self._pieces: deque[bytes] = deque()
        self._news = asyncio.Event()
        self._whole = False
        self._gone = False
        self._patience_s = limits.body_timeout_s
        self._started = False
        self._flowing = False
        self._left_to_send: int | None = None

    # --- What the layers tell -------------------------------------------------------------------

    def came(self, data: bytes) -> None:
        """A piece of the body came."""
        self._pieces.append(data)
        self._news.set()

    def ended(self) -> None:
        """The body came whole."""
        self._whole = True
        self._news.set()

    def gone(self) -> None:
        """The client has gone, or what it sent cannot be read on."""
        if self._gone:
            return
        self._gone = True
        self._news.set()
        if self._flowing and self.task is not None:
            self.left = True
            self.task.cancel()

    # --- The request's body ---------------------------------------------------------------------

    async def receive(self) -> bytes | Signal | Failed:
        """The next piece; `Signal.END` only if the body came whole."""
        if self._expects and not self._pieces and not self._whole:
            await self._say_head(100, [])
        self._expects = False
        while not self._pieces:
            if self._whole:
                return Signal.END
            if self._gone:
                return Signal.GONE
            self._news.clear()
            self._line.progressed()
            if not await self._news_in_time():
                return Failed(
                    code="gateway.too_slow",
                    who="caller",
                    message="The body came too slowly. Send it again over a faster line.",
                )
        piece = self._pieces.popleft()
        self._patience_s += len(piece) / _LEAST_BYTES_PER_S
        return piece

    async def _news_in_time(self) -> bool:
        began = time.monotonic()
        try:
            async with asyncio.timeout(
                min(self._limits.body_timeout_s, max(0.0, self._patience_s))
            ):
                await self._news.wait()
        except TimeoutError:
            return False
        self._patience_s -= time.monotonic() - began
        return True

    async def receive_all(self, limit: int) -> bytes | Signal | Failed:
        """The whole body. What announces itself as larger than `limit` is not read at all."""
        if self._announced is not None and self._announced > limit:
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
        if self._started:
            raise RuntimeError("An exchange has one answer.")
        if self._gone:
            self._started = True
            return Signal.GONE
        fields = _sent(head)
        if head.status in _BODILESS or self._head_only:
            length = head.headers.get("content-length") or (str(len(body)) if body else None)
            if length is not None and head.status not in _BODILESS:
                fields.append(("content-length", length))
            body = b""
        else:
            fields.append(("content-length", str(len(body))))
        await self._say_head(head.status, fields)
        if body:
            await self._line.say(ResponseData(self._stream_id, body))
        return await self._finished()

    async def start(self, head: ResponseHead) -> Signal:
        """Send the head of an answer in pieces. From here on a client that goes ends the task."""
        if self._started:
            raise RuntimeError("An exchange has one answer.")
        if self._gone:
            self._started = True
            return Signal.GONE
        length = head.headers.get("content-length")
        fields = _sent(head)
        bodiless = self._head_only or head.status in _BODILESS
        if length is not None and length.isdecimal() and head.status not in _BODILESS:
            fields.append(("content-length", length))
            self._left_to_send = None if bodiless else int(length)
        elif not bodiless and not self._old:
            fields.append(("transfer-encoding", "chunked"))
        await self._say_head(head.status, fields)
        if bodiless:
            return await self._finished()
        self._flowing = True
        return Signal.DONE

    async def release(self, data: bytes) -> Signal:
        """Send a piece, once the client has taken enough of those before."""
        if not self._flowing or not data:
            return Signal.GONE if self._gone else Signal.DONE
        if self._left_to_send is not None:
            self._left_to_send -= len(data)
        if self._gone or (self._left_to_send or 0) < 0:
            self._cut()
            return Signal.GONE
        try:
            await self._line.say(ResponseData(self._stream_id, data))
            async with asyncio.timeout(self._limits.body_timeout_s):
                await self._line.taken()
        except (OSError, TimeoutError):
            self._cut()
            return Signal.GONE
        return Signal.DONE

    async def end(self, broken: bool) -> None:  # noqa: FBT001 - the command's field
        """The answer is complete, or must look cut off."""
        if not self._flowing:
            return
        if broken or self._left_to_send or self._gone:
            self._cut()
            return
        await self._finished()

    # --- For the one who listens ----------------------------------------------------------------

    async def refuse(self, status: int, detail: str) -> None:
        """Answer with a problem of the gateway's own (RFC 9457), or cut off what has begun."""
        if self._started:
            self._cut()
            return
        head, body = problem(status, detail)
        await self.respond(head, body)

    async def finish(self) -> None:
        """The exchange is over. An answer that nobody ended looks cut off; none at all is a 500."""
        if not self._started:
            await self.refuse(500, MISTAKE)
        elif self._flowing:
            self._cut()
        self.over = True

    # --- Inside ---------------------------------------------------------------------------------

    async def _say_head(self, status: int, fields: list[tuple[str, str]]) -> None:
        final = status >= HTTPStatus.OK
        self._started = self._started or final
        if final and (not self._whole or status == HTTPStatus.BAD_REQUEST):
            # What follows is not read: in what was not understood another request could hide.
            fields = [*fields, ("connection", "close")]
        await self._line.say(ResponseHeaders(self._stream_id, raw_response(status, fields)))

    async def _finished(self) -> Signal:
        self._flowing = False
        self.over = True
        await self._line.say(ResponseEndOfMessage(self._stream_id))
        self._line.progressed()
        return Signal.GONE if self._gone else Signal.DONE

    def _cut(self) -> None:
        self._flowing = False
        self.over = True
        self._line.sever()


MISTAKE: Final = "The gateway made a mistake and released nothing. Tell the operator."


def problem(status: int, detail: str) -> tuple[ResponseHead, bytes]:
    """An answer of the gateway's own (RFC 9457)."""
    body = orjson.dumps({
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
    })  # fmt: skip
    fields = [("content-type", "application/problem+json"), *OWN_HEADERS]
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        fields.append(("retry-after", "1"))
    return ResponseHead(status=status, headers=Headers(tuple(fields))), body


def raw_response(status: int, fields: list[tuple[str, str]]) -> http.Response:
    """The head of an answer as mitmproxy sends it."""
    try:
        reason = HTTPStatus(status).phrase
    except ValueError:
        reason = ""
    raw: Any = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]
    return http.Response(
        b"HTTP/1.1",
        status,
        reason.encode("ascii"),
        http.Headers(raw),
        None,
        None,
        time.time(),
        None,
    )


def _sent(head: ResponseHead) -> list[tuple[str, str]]:
    fields = [pair for pair in head.headers.fields if pair[0] not in _NOT_SENT]
    fields.append(("server", "Havengate"))
    if head.headers.get("date") is None:
        # RFC 9110 section 6.6.1.
        fields.append(("date", formatdate(usegmt=True)))
    return fields


def _too_large(limit: int) -> Failed:
    return Failed(
        code="gateway.too_large",
        who="caller",
        message=f"The body is larger than {limit} bytes, which is the most that is looked into.",
    )
