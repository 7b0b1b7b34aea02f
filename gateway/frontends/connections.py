"""Client connections as sockets: what the HTTP server does not do for us.

Granian (2.8) queues without end what a slow client does not read, ends a chunked answer as if it
were complete when it breaks off, and lets a connection wait for ever before its first request and
between HTTP/2 requests. All three are mended here on the socket, which is found by the client's
address among the files that this process has open. Nothing is read from or written to it.

Counting what was acknowledged needs Linux; elsewhere answers flow unchecked.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: `tcpi_bytes_acked` of `struct tcp_info` (linux/tcp.h, since 4.1): a 64-bit number here.
_ACKED: Final = struct.Struct("=120xQ")
_TCP_INFO: Final[int | None] = getattr(socket, "TCP_INFO", None)
#: Bytes of an answer that may be on their way. More than one round trip of a fast line holds.
WINDOW_BYTES: Final = 1_048_576
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05


@contextmanager
def _opened(peer: str, port: int) -> Iterator[socket.socket | None]:
    """A duplicate of the socket that `peer` (`address:port`) reached our `port` with."""
    found = None
    for one in _sockets():
        if peer_of(one) == peer and _is_accepted(one, port):
            found = one
            break
        one.close()
    try:
        yield found
    finally:
        if found is not None:
            found.close()


def _sockets() -> Iterator[socket.socket]:
    """Duplicates of all stream sockets that this process has open. The caller closes them."""
    for entry in Path("/dev/fd").iterdir():
        one = _duplicate(int(entry.name))
        if one is not None:
            yield one


def _duplicate(number: int) -> socket.socket | None:
    try:
        # Of files nothing may be duplicated: closing the duplicate would drop this process's locks
        # on them (POSIX fcntl), on which SQLite relies.
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            return None
        copy = os.dup(number)
    except OSError:
        return None
    try:
        one = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return None
    if one.family in {socket.AF_INET, socket.AF_INET6} and one.type == socket.SOCK_STREAM:
        return one
    one.close()
    return None


def peer_of(one: socket.socket) -> str | None:
    """`address:port` of the other end, as the server writes it, or None without one."""
    try:
        host, port, *_ = one.getpeername()
    except OSError:
        return None
    return f"{host}:{port}" if one.family == socket.AF_INET else f"[{host}]:{port}"


def cut(peer: str, port: int) -> bool:
    """End a connection at once, without anything that could look like a proper end.

    Return whether it was still there. With HTTP/2 all exchanges on it end.
    """
    with _opened(peer, port) as one:
        return one is not None and _shut(one)


@dataclass(slots=True)
class _Counted:
    """A connection on which answers are flowing."""

    socket: socket.socket
    acked_before: int
    released: int = 0
    users: int = 1


class Outflow:
    """Lets an answer flow only as fast as the client takes it. One per worker process."""

    def __init__(self, *, stall_s: float, window_bytes: int = WINDOW_BYTES) -> None:
        self._stall_s = stall_s
        self._window = window_bytes
        self._counted: dict[str, _Counted] = {}

    def begin(self, peer: str, port: int) -> None:
        """An answer in pieces begins on this connection. Each `begin` needs an `end`."""
        if (known := self._counted.get(peer)) is not None:
            known.users += 1
            return
        with _opened(peer, port) as one:
            acked = _acked(one) if one is not None else None
            if one is not None and acked is not None:
                self._counted[peer] = _Counted(one.dup(), acked)

    async def take(self, peer: str, size: int) -> bool:
        """Wait until the client has taken so much that `size` bytes more may be queued.

        False if it took nothing for `stall_s` seconds.
        """
        counted = self._counted.get(peer)
        if counted is None:
            return True
        counted.released += size
        pause, last, since = _FIRST_PAUSE_S, -1, time.monotonic()
        while True:
            acked = _acked(counted.socket)
            if acked is None or counted.released - (acked - counted.acked_before) <= self._window:
                return True
            if acked != last:
                last, since = acked, time.monotonic()
            elif time.monotonic() - since > self._stall_s:
                return False
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    def end(self, peer: str) -> None:
        """The answer is over."""
        counted = self._counted.get(peer)
        if counted is None:
            return
        counted.users -= 1
        if not counted.users:
            self._counted.pop(peer).socket.close()


def _acked(one: socket.socket) -> int | None:
    if _TCP_INFO is None:
        return None
    try:
        (acked,) = _ACKED.unpack(one.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _ACKED.size))
    except (OSError, struct.error):
        return None
    return int(acked)


class Sweeper:
    """Ends connections on which nothing is asked for. One per worker process.

    `idle_s` bounds the time from connecting to the first request, TLS included, and from one
    request to the next.
    """

    def __init__(self, *, idle_s: float) -> None:
        self._idle_s = idle_s
        self._busy: dict[str, int] = {}
        #: When each connection was last seen with an exchange, or first seen at all.
        self._since: dict[str, float] = {}

    def begin(self, peer: str) -> None:
        """An exchange begins on this connection."""
        self._busy[peer] = self._busy.get(peer, 0) + 1

    def end(self, peer: str, now: float) -> None:
        """It is over."""
        left = self._busy.get(peer, 1) - 1
        if left:
            self._busy[peer] = left
        else:
            self._busy.pop(peer, None)
        self._since[peer] = now

    def sweep(self, port: int, now: float) -> int:
        """End what is idle among the connections to our `port`; return how many."""
        alive: dict[str, float] = {}
        ended = 0
        for one in _sockets():
            with one:
                peer = peer_of(one)
                if peer is None or not _is_accepted(one, port):
                    continue
                since = self._since.get(peer, now)
                alive[peer] = now if peer in self._busy else since
                if peer not in self._busy and now - since > self._idle_s:
                    ended += _shut(one)
        self._since = alive
        return ended


def _is_accepted(one: socket.socket, port: int) -> bool:
    try:
        return bool(one.getsockname()[1] == port)
    except OSError:
        return False


def _shut(one: socket.socket) -> bool:
    try:
        one.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False
    return True
