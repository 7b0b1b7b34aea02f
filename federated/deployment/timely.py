"""Calls that end when their time is over, however slowly the other side answers.

The time-outs of HTTP libraries hold for each read: whoever sends a byte now and then keeps a call
open for ever. Here every read, write and connection of a call is given what is left of the call's
time, and of the stage's that it belongs to (`within`).
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import httpcore
import httpx

#: All replies of a look are in one answer; the SuperLink hands out 16 MiB at a time.
LARGEST_ANSWER_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limit:
    until: float
    clock: Callable[[], float]


_LIMITS: Final[ContextVar[tuple[_Limit, ...]]] = ContextVar("limits", default=())


@contextmanager
def within(until: float, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Let no call of this thread go on after `until`, in seconds of the monotonic `clock`."""
    token = _LIMITS.set((*_LIMITS.get(), _Limit(until=until, clock=clock)))
    try:
        yield
    finally:
        _LIMITS.reset(token)


def time_left() -> float:
    """Seconds that this thread's calls still have; infinite outside `within`."""
    return min((limit.until - limit.clock() for limit in _LIMITS.get()), default=float("inf"))


def _shorter(timeout_s: float | None, error: type[Exception]) -> float | None:
    left_s = time_left()
    if left_s <= 0:
        raise error("The time of this call is over.")
    return timeout_s if left_s == float("inf") else min(left_s, timeout_s or left_s)


class _Stream(httpcore.NetworkStream):
    """A connection whose reads and writes are given only the time that is left."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _shorter(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _shorter(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        left_s = _shorter(timeout, httpcore.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left_s))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore.SyncBackend):
    """Opens such connections."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        left_s = _shorter(timeout, httpcore.ConnectTimeout)
        stream = super().connect_tcp(host, port, left_s, local_address, socket_options)
        return _Stream(stream)


class TimelyTransport(httpx.HTTPTransport):
    """Httpx's transport, each request at most `call_s` seconds from beginning to end."""

    def __init__(self, *, tls: ssl.SSLContext, call_s: float) -> None:
        super().__init__(verify=tls)
        self._call_s = call_s
        self._pool = httpcore.ConnectionPool(ssl_context=tls, network_backend=_Backend())

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send, and return the answer once it is here to its last byte.

        Raises `httpx.HTTPError` when time is over, and for an answer larger than any is.
        """
        with within(time.monotonic() + self._call_s):
            response = super().handle_request(request)
            content = bytearray()
            try:
                for chunk in response.iter_raw():
                    content += chunk
                    if len(content) > LARGEST_ANSWER_BYTES:
                        raise httpx.ReadError("The answer is larger than any is.", request=request)
            finally:
                response.close()
        return httpx.Response(
            response.status_code,
            headers=response.headers,
            content=bytes(content),
            extensions=response.extensions,
        )
