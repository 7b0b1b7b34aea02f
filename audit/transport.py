"""Entries from other processes: the frames on the Unix socket, and the clients.

Lives here: what a client does when the writer goes away. Not here: the end that listens
(`audit.server`), what sequenced means (`audit.log`).

    request   u32 length ‖ u64 number ‖ 16 bytes idempotency key ‖ entry
    answer    u32 length ‖ u64 number ‖ 0x00 ‖ u64 index ‖ 32 bytes leaf hash
              u32 length ‖ u64 number ‖ 0x01 ‖ error code ‖ 0x0A ‖ message

big-endian; answers come in any order. A client whose connection breaks does not know whether its
entries were written. It sends them once more with the same keys, which is harmless, and then gives
up.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Self, cast

from audit.errors import (
    AuditError,
    LogFullError,
    LogTamperedError,
    LogUnavailableError,
    MalformedEntryError,
)
from audit.journal import KEY_BYTES
from audit.tiles import MAX_ENTRY_BYTES
from audit.waiting import AsyncWaiter, Sequenced

#: Entries that one client lets wait.
MAX_PENDING = 8192

#: Length of what follows, in front of every frame.
LENGTH = struct.Struct(">I")
#: What stands before the entry in a request: length, number, key.
REQUEST = struct.Struct(f">IQ{KEY_BYTES}s")
REQUEST_HEAD = REQUEST.size - LENGTH.size
_ANSWER = struct.Struct(">IQB")
_ANSWER_HEAD = _ANSWER.size - LENGTH.size
_PLACE = struct.Struct(">Q32s")
_DONE, _FAILED = 0, 1
_MAX_ANSWER_BYTES = 4096
_ERRORS: dict[str, type[AuditError]] = {
    error.code: error
    for error in (LogUnavailableError, LogFullError, LogTamperedError, MalformedEntryError)
}
#: What a client raises when it cannot know whether its entry was written.
_LOST = "The connection to the audit log broke; release nothing. See that its writer runs."


def encode_request(number: int, key: bytes, entry: bytes) -> bytes:
    """The frame that hands in an entry."""
    return REQUEST.pack(REQUEST_HEAD + len(entry), number, key) + entry


def encode_answer(number: int, outcome: Sequenced | AuditError) -> bytes:
    """The frame that answers it."""
    if isinstance(outcome, Sequenced):
        status, body = _DONE, _PLACE.pack(outcome.index, outcome.leaf_hash)
    else:
        text = f"{outcome.code}\n{outcome}".encode()
        status, body = _FAILED, text[: _MAX_ANSWER_BYTES - _ANSWER_HEAD]
    return _ANSWER.pack(_ANSWER_HEAD + len(body), number, status) + body


def parse_answer(frame: bytes) -> tuple[int, Sequenced | AuditError]:
    """Read an answer without its length. Raises `LogUnavailableError` if it is none."""
    try:
        number, status = struct.unpack_from(">QB", frame)
        body = frame[_ANSWER_HEAD:]
        if status == _DONE:
            return number, Sequenced(*_PLACE.unpack(body))
        code, _, message = body.decode(errors="replace").partition("\n")
        return number, _ERRORS.get(code, LogUnavailableError)(message)
    except struct.error as error:
        raise LogUnavailableError("What answers on the socket is not an audit log.") from error


def peer_uid(connection: socket.socket) -> int:
    """User id of the process at the other end of a Unix socket, as the kernel knows it."""
    if sys.platform == "darwin":
        # struct xucred: version, uid, …
        return int(struct.unpack_from("II", connection.getsockopt(0, socket.LOCAL_PEERCRED, 76))[1])
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("iII", credentials)[1])


def verify_writer(path: Path, connection: socket.socket) -> None:
    """See that who listens may be believed: root, this user, or who owns the socket's directory.

    Anybody else could answer "written" and write nothing. Raises `LogUnavailableError`.
    """
    peer = peer_uid(connection)
    if peer not in {0, os.geteuid(), path.parent.stat().st_uid}:
        raise LogUnavailableError(
            f"User {peer} listens on {path}, who is neither this user nor the owner of "
            f"{path.parent}: nothing was handed in. Find out who that is; start the writer there."
        )


class _ConnectionLostError(LogUnavailableError):
    """The connection broke before the answer came."""


class LogClient:
    """Hands entries to the writer from an event loop; any number of tasks share one connection.

    Connects when it is first used, and again when the writer was restarted.
    """

    def __init__(self, path: Path, *, timeout_s: float = 10.0) -> None:
        """`timeout_s`: an answer that takes longer counts as a broken connection."""
        self._path = path
        self._timeout_s = timeout_s
        self._link: _Link | None = None
        self._connecting = asyncio.Lock()

    async def append_async(self, entry: bytes, *, key: bytes | None = None) -> Sequenced:
        """Hand in an entry and wait until it is sequenced.

        Raises what `LogWriter.append` raises. When it raises `LogUnavailableError` the entry may
        have been written: calling again with the same `key` (16 random bytes) never writes it
        twice.
        """
        if not 0 < len(entry) <= MAX_ENTRY_BYTES:
            raise MalformedEntryError(
                f"An entry has 1 to {MAX_ENTRY_BYTES} bytes, not {len(entry)}."
            )
        key = os.urandom(KEY_BYTES) if key is None else key
        try:
            return await (await self._connected()).request(key, entry)
        except _ConnectionLostError:
            return await (await self._connected()).request(key, entry)

    async def _connected(self) -> _Link:
        link = self._link
        if link is not None and link.alive:
            return link
        async with self._connecting:
            if self._link is not None and self._link.alive:
                return self._link
            loop = asyncio.get_running_loop()
            try:
                async with asyncio.timeout(self._timeout_s):
                    transport, link = await loop.create_unix_connection(
                        partial(_Link, self._timeout_s), str(self._path)
                    )
            except (OSError, TimeoutError) as error:
                raise _unreachable(self._path) from error
            try:
                verify_writer(self._path, transport.get_extra_info("socket"))
            except OSError as error:
                await link.close()
                raise _unreachable(self._path) from error
            except LogUnavailableError:
                await link.close()
                raise
            self._link = link
            return link

    async def close(self) -> None:
        """Break the connection. Appends that wait raise."""
        if self._link is not None:
            await self._link.close()
            self._link = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Link(asyncio.Protocol):
    """One connection, at the client's end."""

    def __init__(self, timeout_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._pending: dict[int, tuple[AsyncWaiter, float]] = {}
        self._frames: list[bytes] = []
        self._number = 0
        self._closed = self._loop.create_future()
        self._watch: asyncio.TimerHandle | None = None

    @property
    def alive(self) -> bool:
        """Whether requests can be made."""
        return self._transport is not None and not self._transport.is_closing()

    def request(self, key: bytes, entry: bytes) -> AsyncWaiter:
        """Send an entry; the future is done when its answer came."""
        if not self.alive:
            raise _ConnectionLostError(_LOST)
        if len(self._pending) >= MAX_PENDING:
            raise LogUnavailableError(f"{MAX_PENDING} entries of this process wait already.")
        self._number += 1
        waiter: AsyncWaiter = self._loop.create_future()
        self._pending[self._number] = waiter, self._loop.time()
        if not self._frames:
            self._loop.call_soon(self._flush)
        self._frames.append(encode_request(self._number, key, entry))
        return waiter

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ready."""
        # Not every loop's transports are subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        """Give answers to those who wait for them."""
        self._buffer += data
        buffer, at = self._buffer, 0
        while len(buffer) - at >= LENGTH.size:
            (length,) = LENGTH.unpack_from(buffer, at)
            end = at + LENGTH.size + length
            if length > _MAX_ANSWER_BYTES:
                self._abort()
                return
            if end > len(buffer):
                break
            try:
                number, outcome = parse_answer(bytes(buffer[at + LENGTH.size : end]))
            except LogUnavailableError:
                self._abort()
                return
            self._settle(number, outcome)
            at = end
        del buffer[:at]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Nobody knows what became of those that wait."""
        self._transport = None
        if self._watch is not None:
            self._watch.cancel()
        for number in list(self._pending):
            self._settle(number, _ConnectionLostError(_LOST))
        if not self._closed.done():
            self._closed.set_result(None)

    async def close(self) -> None:
        """Break the connection and wait until it is gone."""
        if self._transport is not None:
            self._abort()
            await self._closed

    def _settle(self, number: int, outcome: Sequenced | AuditError) -> None:
        waiter, _ = self._pending.pop(number, (None, 0.0))
        if waiter is None or waiter.done():
            return
        if isinstance(outcome, Sequenced):
            waiter.set_result(outcome)
        else:
            waiter.set_exception(outcome)

    def _flush(self) -> None:
        frames, self._frames = self._frames, []
        if self._transport is not None:
            self._transport.write(b"".join(frames))

    def _look(self) -> None:
        """Break the connection if the oldest request has waited too long."""
        oldest = next(iter(self._pending.values()), None)
        if oldest is not None and self._loop.time() - oldest[1] > self._timeout_s:
            self._abort()
            return
        self._watch = self._loop.call_later(self._timeout_s / 4, self._look)

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class BlockingLogClient:
    """Hands entries to the writer from threads or a command; they take turns on one connection."""

    def __init__(self, path: Path, *, timeout_s: float = 10.0) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._number = 0

    def connect(self) -> None:
        """Connect now. Raises `LogUnavailableError` if nobody listens."""
        with self._lock:
            self._connected()

    def append(self, entry: bytes, *, key: bytes | None = None) -> Sequenced:
        """As `LogClient.append`, for threads."""
        if not 0 < len(entry) <= MAX_ENTRY_BYTES:
            raise MalformedEntryError(
                f"An entry has 1 to {MAX_ENTRY_BYTES} bytes, not {len(entry)}."
            )
        key = os.urandom(KEY_BYTES) if key is None else key
        with self._lock:
            try:
                outcome = self._exchange(key, entry)
            except _ConnectionLostError:
                outcome = self._exchange(key, entry)
        if isinstance(outcome, AuditError):
            raise outcome
        return outcome

    def close(self) -> None:
        """Break the connection."""
        with self._lock:
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, key: bytes, entry: bytes) -> Sequenced | AuditError:
        connection = self._connected()
        self._number += 1
        try:
            connection.sendall(encode_request(self._number, key, entry))
            (length,) = LENGTH.unpack(self._receive(connection, LENGTH.size))
            if length > _MAX_ANSWER_BYTES:
                raise ConnectionError("not an answer")
            number, outcome = parse_answer(self._receive(connection, length))
            if number != self._number:
                raise ConnectionError("an answer to something else")
        except OSError as error:
            self._drop()
            raise _ConnectionLostError(_LOST) from error
        return outcome

    def _connected(self) -> socket.socket:
        if self._socket is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(self._timeout_s)
            try:
                connection.connect(str(self._path))
                verify_writer(self._path, connection)
            except OSError as error:
                connection.close()
                raise _unreachable(self._path) from error
            except LogUnavailableError:
                connection.close()
                raise
            self._socket = connection
        return self._socket

    @staticmethod
    def _receive(connection: socket.socket, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = connection.recv(count - len(data))
            if not more:
                raise ConnectionError("closed")
            data += more
        return data

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _unreachable(path: Path) -> LogUnavailableError:
    return LogUnavailableError(
        f"No audit log listens on {path}. Start it, or set [audit] socket to where it listens."
    )
