"""One call on its way through mitmproxy: the core's commands on one side, events on the other.

mitmproxy does not let itself be pulled: it calls when something has come. A `Crossing` therefore
holds the core's generator and the command that it waits at, and each event must be the answer to
just that command; an event that is not ends the connection. What the core asks of the log and of
the list of apps is carried out in between (`settle`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog
from mitmproxy import http

from audit.errors import AuditError
from audit.recorder import Act, Begun, End
from gateway.core.commands import (
    Answer,
    CloseUpstream,
    EndResponse,
    Failed,
    Receive,
    ReceiveHead,
    ReceiveUpstream,
    Recorded,
    RecordIntent,
    RecordOutcome,
    Release,
    Respond,
    SendUpstream,
    Signal,
    StartResponse,
)
from gateway.core.enforcement import Reply
from gateway.core.messages import Headers, RequestHead, ResponseHead
from gateway.core.outbound import IdentifyApp, OutboundCommand, Steps
from gateway.errors import GatewayError
from gateway.frontends.intercept_guard import RefusedHookError
from gateway.outbound.apps import Apps
from gateway.outbound.listing import Target
from keys.errors import KeysError

_log = structlog.get_logger("gateway.outbound")


class Log(Protocol):
    """The audit log (`audit.recorder.AsyncRecorder`)."""

    async def intent(self, act: Act) -> Begun:
        """Make an intent durable, or raise."""
        ...

    async def outcome(self, begun: Begun, end: End) -> int:
        """Make an outcome durable, or raise."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What all calls share. `log_timeout_s` bounds one entry."""

    apps: Apps
    log: Log
    log_timeout_s: float


class Crossing[T]:
    """See the module. `sever` cuts both connections at once."""

    def __init__(self, steps: Steps[T], services: Services, sever: Callable[[], None]) -> None:
        self._steps = steps
        self._services = services
        self._sever = sever
        self.pending: OutboundCommand | None = next(steps)
        self.result: T | None = None
        self.target: Target | None = None
        self.reply: Reply | None = None
        #: The outside answers while the app still sends: what is left to send is only counted.
        self.early = False
        self.closed = False
        self.deadline: asyncio.TimerHandle | None = None
        self.sent = 0
        self._settling = asyncio.Lock()

    def answer(self, answer: Answer) -> None:
        """Give the core its answer and hold the next command."""
        try:
            self.pending = self._steps.send(answer)
        except StopIteration as stop:
            self.pending = None
            self.result = stop.value

    def expect[C](self, kind: type[C]) -> C:
        """Return the command in waiting. Raises `RefusedHookError` if it is another."""
        if not isinstance(self.pending, kind):
            raise RefusedHookError(f"{kind.__name__} is not what is waited for")
        return self.pending

    async def settle(self) -> None:
        """Carry out what needs no event of mitmproxy, up to the next command that does.

        Two hooks of a connection that breaks can end a call at once; one waits for the other, so
        that nothing is written twice.
        """
        async with self._settling:
            while await self._settled_one():
                pass

    async def _settled_one(self) -> bool:
        match self.pending:
            case IdentifyApp(credentials=credentials):
                self.answer(self._services.apps.identify(credentials))
            case RecordIntent() | RecordOutcome():
                try:
                    answer = await self._record(self.pending)
                except BaseException:
                    # Cancelled: it may have been written, so it is not written again.
                    self.answer(Failed(code="gateway.stopping"))
                    raise
                self.answer(answer)
            case CloseUpstream():
                self.closed = True
                self.answer(Signal.DONE)
            case Respond(head=head, body=body):
                self.reply = Reply(head=head, body=body)
                self.answer(Signal.DONE)
            case EndResponse(broken=broken):
                if broken:
                    self._sever()
                self.answer(Signal.DONE)
            case _:
                return False
        return True

    async def fail(self, failure: Failed | Signal) -> None:
        """Tell the core that what it waits for will not come, until it has ended."""
        self.stop_waiting()
        await self.settle()
        while self.pending is not None:
            self.answer(failure)
            await self.settle()

    def stop_waiting(self) -> None:
        """Drop the deadline of the answer's head."""
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    async def _record(self, command: RecordIntent | RecordOutcome) -> Answer:
        log = self._services.log
        try:
            async with asyncio.timeout(self._services.log_timeout_s):
                if isinstance(command, RecordIntent):
                    return Recorded(begun=await log.intent(command.act))
                await log.outcome(command.begun, command.end)
        except (GatewayError, KeysError, AuditError) as error:
            _log.warning("gateway.outbound.not_recorded", code=error.code)
            return Failed(code=error.code)
        except Exception as error:  # noqa: BLE001 - it must not get past the core
            _log.error("gateway.outbound.not_recorded", error=type(error).__name__)
            return Failed(code="gateway.internal")
        return Signal.DONE

    # --- Bodies: called by mitmproxy between two events, without waiting ------------------------

    def upload(self, data: bytes) -> list[bytes]:
        """A piece of the app's body, or its end: what may go on of it."""
        try:
            return self._upload(data)
        except Exception as error:  # noqa: BLE001 - mitmproxy would go on with the next piece
            return self._cut(error)

    def download(self, data: bytes) -> list[bytes]:
        """A piece of the body from outside, or its end: what may come back of it."""
        try:
            return self._download(data)
        except Exception as error:  # noqa: BLE001 - mitmproxy would go on with the next piece
            return self._cut(error)

    def _cut(self, error: Exception) -> list[bytes]:
        self._sever()
        _log.warning("gateway.outbound.connection_ended", hook="body", error=type(error).__name__)
        return []

    def _upload(self, data: bytes) -> list[bytes]:
        if self.early:
            # The outcome is in the log; cutting the body short would make it another request.
            self.sent += len(data)
            if self.sent > self._limit:
                raise RefusedHookError("more was sent than may pass")
            return [data] if data else []
        self.expect(Receive)
        self.sent += len(data)
        self.answer(data or Signal.END)
        wanted = self.expect(SendUpstream).data
        self.answer(Signal.DONE)
        return [wanted] if wanted else []

    def _download(self, data: bytes) -> list[bytes]:
        self.expect(ReceiveUpstream)
        self.answer(data or Signal.END)
        if not data:
            if self.expect(EndResponse).broken:
                raise RefusedHookError("the answer must look cut off")
            self.answer(Signal.DONE)
            return []
        wanted = self.expect(Release).data
        self.answer(Signal.DONE)
        return [wanted]

    #: Of bytes of a body; set with the way.
    _limit: int = 0

    def limited_to(self, limit: int) -> Crossing[T]:
        """Bound what goes on after an early answer."""
        self._limit = limit
        return self

    # --- The head of the answer ------------------------------------------------------------------

    async def answered(self, head: ResponseHead) -> ResponseHead | None:
        """The head from outside: what may be released of it, or None if `reply` takes its place."""
        self.stop_waiting()
        if isinstance(self.pending, Receive):
            self.early = True
            self.answer(Signal.END)
            self.expect(SendUpstream)
            self.answer(Signal.END)
        self.expect(ReceiveHead)
        self.answer(head)
        await self.settle()
        if self.pending is None:
            return None
        released = self.expect(StartResponse).head
        self.answer(Signal.DONE)
        return released


@dataclass(slots=True, kw_only=True)
class Substitute:
    """Gives an answer of the gateway's own in place of a body from outside that is not released."""

    body: bytes
    given: bool = field(default=False)

    def __call__(self, data: bytes) -> list[bytes]:
        """Swallow what comes; say what is to be said once."""
        del data
        if self.given:
            return []
        self.given = True
        return [self.body]


def request_head(flow: http.HTTPFlow) -> RequestHead:
    """A request of mitmproxy's as the core sees it. Raises `UnicodeError` for what is not text."""
    request = flow.request
    path, _, query = _text(request.data.path).partition("?")
    fields = _fields(request.headers)
    host, port = request.host, request.port
    return RequestHead(
        method=_text(request.data.method),
        authority=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        path=path,
        query=query,
        headers=Headers(fields),
        client=str(flow.client_conn.peername[0]),
        scheme=request.scheme,
        http_version=request.http_version.removeprefix("HTTP/"),
    )


def response_head(response: http.Response) -> ResponseHead:
    """An answer of mitmproxy's as the core sees it."""
    return ResponseHead(status=response.status_code, headers=Headers(_fields(response.headers)))


def own_response(reply: Reply) -> http.Response:
    """An answer of the gateway's own as mitmproxy sends it; the connection ends with it."""
    headers = raw_headers(reply.head.headers)
    headers["connection"] = "close"
    headers["content-length"] = str(len(reply.body))
    return http.Response.make(reply.head.status, reply.body, headers)


def raw_headers(headers: Headers, framing: Any = None) -> http.Headers:
    """Header fields for mitmproxy, with the framing of the message that they came with.

    Bodies pass as they are framed, so what frames them must not be changed on the way.
    """
    pairs = [
        (name.encode("latin-1"), value.encode("latin-1"))
        for name, value in headers
        if framing is None or name not in _FRAMING
    ]
    for name in _FRAMING if framing is not None else ():
        pairs += [(name.encode(), value.encode("latin-1")) for value in framing.get_all(name)]
    return http.Headers(pairs)


_FRAMING = ("content-length", "transfer-encoding")


def _fields(headers: http.Headers) -> tuple[tuple[str, str], ...]:
    return tuple(
        (raw_name.decode("ascii").lower(), raw_value.decode("latin-1"))
        for raw_name, raw_value in headers.fields
    )


def _text(raw: bytes) -> str:
    return raw.decode("ascii")
