"""Talks to the apps behind, over hyper. Every failure is a value that says what to look at.

An answer is given only if it is whole: what is cut off, or has more or other bytes than it says, is
a failure. Nothing is followed, kept or sent anywhere else: no redirects, cookies or proxies of the
environment. The text of the library's errors holds the URL, so none of it is passed on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Final, Literal

import structlog
from pyreqwest.client import Client, ClientBuilder
from pyreqwest.exceptions import PoolTimeoutError, PyreqwestError, RequestTimeoutError
from pyreqwest.http import Url
from pyreqwest.request import RequestBuilder, StreamRequest
from pyreqwest.response import Response

from gateway import metrics
from gateway.core.commands import Failed, Fetched, Signal
from gateway.core.messages import Headers, RequestHead, ResponseHead
from gateway.errors import GatewayConfigurationError, UpstreamContentError
from gateway.frontends.codings import decode
from gateway.routes import Route

_log = structlog.get_logger("gateway")

#: Methods that may be sent again (RFC 9110 section 9.2.2); of the idempotent ones only those that
#: never have a body.
_REPEATABLE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
#: Written by the library, or by us for the app at hand.
_NOT_COPIED: Final = frozenset({"host", "content-length", "transfer-encoding"})
_NOT_FETCHED: Final = _NOT_COPIED | {"accept-encoding"}
_MAY_HAVE_BODY: Final = frozenset({"POST", "PUT", "PATCH"})
_FIRST_FINAL_STATUS = 200
_IDLE_S = 20
_CERTIFICATE_END = "-----END CERTIFICATE-----"


@dataclass(frozen=True, slots=True)
class _Link:
    """The client of one route, with what is the same for all its requests."""

    client: Client
    route: Route
    timeout: timedelta

    def request(self, head: RequestHead, dropped: frozenset[str]) -> RequestBuilder:
        """Begin a request. Raises `UpstreamContentError` if the URL would be read otherwise."""
        route = self.route
        url = Url(f"{route.upstream_scheme}://{route.upstream_authority}{head.target}")
        if url.path != head.path:
            raise UpstreamContentError("The target has characters that must be percent-encoded.")
        fields = [pair for pair in head.headers.fields if pair[0] not in dropped]
        if route.settings.preserve_host:
            fields.append(("host", head.authority))
        return self.client.request(head.method, url).headers(fields)


class Upstreams:
    """All apps. One client for each route, which keeps its connections; close it at the end."""

    def __init__(self, routes: Sequence[Route] = ()) -> None:
        """Raises `GatewayConfigurationError` for a `ca_file` that cannot be used."""
        self._links: dict[str, _Link] = {}
        for route in routes:
            self._link(route)

    async def close(self) -> None:
        """Close all connections. What is in progress fails."""
        links, self._links = self._links, {}
        for link in links.values():
            await link.client.close()

    async def fetch(
        self, route: Route, head: RequestHead, body: bytes, limit: int
    ) -> Fetched | Failed:
        """Send a whole request and read the whole answer within `timeout_s`.

        Content codings are undone. `limit` bounds the bytes on the wire and the bytes they stand
        for.
        """
        link = self._link(route)
        try:
            again = head.method in _REPEATABLE and not body
            while True:
                request = link.request(head, _NOT_FETCHED).header("accept-encoding", "identity")
                if body:
                    request = request.body_bytes(body)
                elif head.method in _MAY_HAVE_BODY:
                    request = request.header("content-length", "0")
                try:
                    async with request.timeout(link.timeout).build_streamed() as response:
                        return await _whole(response, head.method, limit)
                except PyreqwestError as error:
                    if not again or not _closed_unanswered(error):
                        raise
                    again = False
        except (PyreqwestError, UpstreamContentError, ValueError) as error:
            return _failed(route, error)

    async def open(
        self,
        route: Route,
        head: RequestHead,
        has_body: bool,  # noqa: FBT001 - the command's fields in order
    ) -> Stream | Failed:
        """Begin a request whose body, if any, is given to `Stream.send`. Codings are left alone."""
        link = self._link(route)
        try:
            return Stream(link, head, has_body=has_body)
        except (PyreqwestError, UpstreamContentError, ValueError) as error:
            return _failed(route, error)

    def _link(self, route: Route) -> _Link:
        link = self._links.get(route.name)
        if link is None or link.route is not route:
            timeout = timedelta(seconds=route.settings.timeout_s)
            link = _Link(client=_client(route), route=route, timeout=timeout)
            self._links[route.name] = link
        return link


class Stream:
    """One request in pieces: head and pieces are given as the app sends them.

    At most one piece of the request waits; each step has `timeout_s`.
    """

    def __init__(self, link: _Link, head: RequestHead, *, has_body: bool) -> None:
        self._link = link
        self._route = link.route
        self._timeout_s = link.route.settings.timeout_s
        self._response: Response | None = None
        self._request: StreamRequest | None = None
        self._pieces: asyncio.Queue[bytes | Literal[Signal.GONE] | None] = asyncio.Queue(maxsize=1)
        length = head.headers.get("content-length") if has_body else None
        self._left = int(length) if length is not None else None
        first = self._build(head, has_body=has_body)
        self._task = asyncio.create_task(self._enter(first, head, again=not has_body))

    async def send(self, data: bytes | None) -> Signal | Failed:
        """See `commands.SendUpstream`. A body of another length than announced is a failure."""
        if self._left is not None:
            self._left -= len(data or b"")
            if self._left < 0 or (data is None and self._left):
                await self.close()
                return _failure(
                    self._route, "upstream_content", "was to get a body of other length"
                )
        if data == b"":
            return Signal.DONE
        if not self._task.done() and self._pieces.full():
            put = asyncio.ensure_future(self._pieces.put(data))
            done, _ = await asyncio.wait(
                {self._task, put}, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if put in done:
                return Signal.DONE
            put.cancel()
            if not done:
                return _timed_out(self._route)
        if self._task.done():
            answer = self._task.result()
            return answer if isinstance(answer, Failed) else Signal.END
        self._pieces.put_nowait(data)
        return Signal.DONE

    async def head(self) -> ResponseHead | Failed:
        """See `commands.ReceiveHead`."""
        done, _ = await asyncio.wait({self._task}, timeout=self._timeout_s)
        return self._task.result() if done else _timed_out(self._route)

    async def receive(self) -> bytes | Signal | Failed:
        """See `commands.ReceiveUpstream`. `Signal.END` only if the answer is whole."""
        if self._response is None:
            return _failure(self._route, "upstream_broken", "has not answered")
        try:
            async with asyncio.timeout(self._timeout_s):
                piece = await self._response.body_reader.read_chunk()
        except TimeoutError:
            return _timed_out(self._route)
        except PyreqwestError as error:
            return _failed(self._route, error)
        return Signal.END if piece is None else bytes(piece)

    async def close(self) -> None:
        """Drop the request. A body that is not at its end must never look so to the app."""
        if not self._task.done():
            if self._pieces.full():
                self._pieces.get_nowait()
            self._pieces.put_nowait(Signal.GONE)
            self._task.cancel()
            await asyncio.wait({self._task})
        self._response = None
        if self._request is not None:
            request, self._request = self._request, None
            await request.__aexit__(None, None, None)

    def _build(self, head: RequestHead, *, has_body: bool) -> StreamRequest:
        # Otherwise the head waits for the first 64 KiB of the content, or its end. As it is, one
        # piece waits here and one in the library.
        request = self._link.request(head, _NOT_COPIED).streamed_read_buffer_limit(0)
        if has_body:
            if self._left is not None:
                request = request.header("content-length", str(self._left))
            request = request.body_stream(self._body())
        elif head.method in _MAY_HAVE_BODY:
            request = request.header("content-length", "0")
        return request.build_streamed()

    async def _body(self) -> AsyncIterator[bytes]:
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, Signal):
                raise ConnectionAbortedError
            yield piece

    async def _enter(
        self, request: StreamRequest, head: RequestHead, *, again: bool
    ) -> ResponseHead | Failed:
        try:
            try:
                response = await request.__aenter__()
            except PyreqwestError as error:
                if not again or head.method not in _REPEATABLE or not _closed_unanswered(error):
                    raise
                request = self._build(head, has_body=False)
                response = await request.__aenter__()
            self._request = request
            answer = _head(response)
        except (PyreqwestError, UpstreamContentError, ValueError, ConnectionError) as error:
            return _failed(self._route, error)
        self._response = response
        return answer


def _client(route: Route) -> Client:
    settings = route.settings
    builder = (
        ClientBuilder()
        .no_proxy()
        .follow_redirects(False)
        .referer(False)
        .default_cookie_store(False)
        .gzip(False)
        .brotli(False)
        .zstd(False)
        .deflate(False)
        .user_agent("Havengate")
        .min_tls_version("TLSv1.2")
        .max_connections(settings.max_connections)
        .connect_timeout(timedelta(seconds=settings.connect_timeout_s))
        .pool_timeout(timedelta(seconds=settings.connect_timeout_s))
        .pool_idle_timeout(timedelta(seconds=_IDLE_S))
    )
    if not settings.ca_file:
        return builder.build()
    try:
        pem = Path(settings.ca_file).read_text("ascii")
        for one in pem.split(_CERTIFICATE_END)[:-1]:
            builder = builder.add_root_certificate_pem((one + _CERTIFICATE_END).encode())
        if _CERTIFICATE_END not in pem:
            raise ValueError("no certificate")  # noqa: TRY301 - one message for all
        return builder.build()
    except (OSError, ValueError, PyreqwestError) as error:
        raise GatewayConfigurationError(
            f"The ca_file of route {settings.name!r} must be a PEM file with at least one "
            f"certificate; {settings.ca_file} is not. Check the path and what is in it."
        ) from error


# --- Answers --------------------------------------------------------------------------------------


def _head(response: Response) -> ResponseHead:
    """Raises `UpstreamContentError` for a head that two readers could understand differently."""
    status = response.status
    if status < _FIRST_FINAL_STATUS:
        raise UpstreamContentError("The app switched to another protocol, which nobody asked for.")
    try:
        fields = tuple(response.headers.items())
    except ValueError as error:
        raise UpstreamContentError("The app sent a header that is not ASCII.") from error
    headers = Headers(fields)
    if headers.get("content-length") is not None and headers.get("transfer-encoding") is not None:
        raise UpstreamContentError("The app sent both Content-Length and Transfer-Encoding.")
    return ResponseHead(status=status, headers=headers)


async def _whole(response: Response, method: str, limit: int) -> Fetched:
    head = _head(response)
    length = head.headers.get("content-length")
    if method == "HEAD":
        return Fetched(head=head, body=b"")
    if length is not None and int(length) > limit:
        raise UpstreamContentError(f"The app's answer is larger than {limit} bytes.")
    reader = response.body_reader
    if length is not None:
        body = bytes(await reader.bytes())
    else:
        pieces, size = [], 0
        while (piece := await reader.read_chunk()) is not None:
            size += len(piece)
            if size > limit:
                raise UpstreamContentError(f"The app's answer is larger than {limit} bytes.")
            pieces.append(piece)
        body = b"".join(pieces)
    codings = head.headers.all("content-encoding")
    if codings:
        body = decode(body, ",".join(codings), limit)
        head = replace(head, headers=head.headers.without({"content-encoding", "content-length"}))
    return Fetched(head=head, body=body)


# --- Failures -------------------------------------------------------------------------------------

#: What the library's causes begin with or contain → code and what an operator should look at.
_CAUSES: Final[tuple[tuple[str, str, str], ...]] = (
    ("dns error", "upstream_unreachable", "has a host name that is not found: check `upstream`"),
    ("Connection refused", "upstream_unreachable",
     "refused the connection: is it running, and is the port in `upstream` right?"),
    ("certificate has expired", "upstream_tls", "shows a certificate that has expired: renew it"),
    ("certificate expired", "upstream_tls", "shows a certificate that has expired: renew it"),
    ("Expired", "upstream_tls", "shows a certificate that has expired: renew it"),
    ("UnknownIssuer", "upstream_tls",
     "shows a certificate that is not trusted: name its authority's file as `ca_file`"),
    ("not valid for", "upstream_tls", "shows a certificate for another name than `upstream` says"),
    ("NotValidForName", "upstream_tls",
     "shows a certificate for another name than `upstream` says"),
    ("CaUsedAsEndEntity", "upstream_tls",
     "shows an authority's certificate as its own: issue it one with basicConstraints CA:FALSE"),
    ("invalid peer certificate", "upstream_tls",
     "shows a certificate that is not trusted: check it and the route's `ca_file`"),
    ("InvalidContentType", "upstream_tls",
     "does not speak TLS on this port: should `upstream` begin with http:// ?"),
    ("corrupt message", "upstream_tls",
     "does not speak TLS on this port: should `upstream` begin with http:// ?"),
    ("tcp connect error", "upstream_unreachable", "cannot be reached: check address and network"),
    ("client error (Connect)", "upstream_unreachable", "cannot be reached: check its log"),
    ("early end, expected", "upstream_content", "was to get a body of other length"),
    ("connection closed before", "upstream_broken",
     "closed the connection without an answer: see its log"),
    ("end of file", "upstream_broken", "broke off in the middle of its answer: see its log"),
    ("unexpected EOF", "upstream_broken", "broke off in the middle of its answer: see its log"),
)  # fmt: skip
_UNKNOWN: Final = ("upstream_broken", "gave an answer that is no HTTP, or broke off: see its log")


def _failed(route: Route, error: Exception) -> Failed:
    causes = _causes(error)
    match error:
        case PoolTimeoutError():
            text = "has as many requests in progress as `max_connections` allows"
            return _failure(route, "upstream_busy", text, timed_out=True)
        case RequestTimeoutError():
            connecting = "client error (Connect)" in causes
            text = "could not be connected to in time: check address and firewall"
            return (
                _failure(route, "upstream_timeout", text, timed_out=True)
                if connecting
                else (_timed_out(route))
            )
        case UpstreamContentError():
            return _failure(route, "upstream_content", f"cannot be asked or heard: {error}")
        case PyreqwestError():
            known = ((code, text) for sign, code, text in _CAUSES if sign in causes)
            return _failure(route, *next(known, _UNKNOWN))
        case _:
            return _failure(route, *_UNKNOWN)


def _timed_out(route: Route) -> Failed:
    text = f"did not answer within {route.settings.timeout_s:g} s: is it overloaded?"
    return _failure(route, "upstream_timeout", text, timed_out=True)


def _failure(route: Route, code: str, text: str, *, timed_out: bool = False) -> Failed:
    message = f"The app of route {route.name!r} at {route.upstream_authority} {text}"
    metrics.UPSTREAM_FAILURES.labels(route.name, f"gateway.{code}").inc()
    _log.warning("gateway.upstream_failed", service=route.name, code=code, message=message)
    return Failed(code=f"gateway.{code}", who="upstream", message=message, timed_out=timed_out)


def _causes(error: Exception) -> str:
    details = getattr(error, "details", None) or {}
    return "\n".join(cause["message"] for cause in details.get("causes") or ())


def _closed_unanswered(error: PyreqwestError) -> bool:
    """Say whether the connection ended before an answer began, as kept ones do now and then."""
    causes = _causes(error)
    return "client error (SendRequest)" in causes and (
        "connection closed before message completed" in causes
        or "Connection reset by peer" in causes
        or "Broken pipe" in causes
    )
