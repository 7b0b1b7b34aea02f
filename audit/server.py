"""The server's end of the socket on which other processes hand in their entries.

Lives here: who may connect, and what a slow or hostile client can do, which is nothing to others.
The frames and the clients stand in `audit.transport`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self, cast

from audit.entry import parse_entry
from audit.errors import AuditConfigurationError, AuditError
from audit.files import FILE_MODE, make_directory
from audit.log import LogWriter
from audit.tiles import MAX_ENTRY_BYTES
from audit.transport import LENGTH, REQUEST, REQUEST_HEAD, encode_answer, peer_uid
from audit.waiting import AsyncWaiter

#: Entries of one connection that wait at a time; no more is read from it until some are answered.
MAX_IN_FLIGHT = 1024
MAX_CONNECTIONS = 256


class LogServer:
    """Serves one writer on a Unix socket, in the running event loop. Start it, close it.

    What `check` refuses with an `AuditError` is not appended: one entry that does not read as one
    would stop searches and exports for good, and cannot be taken back.
    Only processes of the same user, or root, are served. A connection that sends anything but
    frames is dropped; one that does not read its answers is not read from.
    """

    def __init__(
        self, writer: LogWriter, path: Path, *, check: Callable[[bytes], object] = parse_entry
    ) -> None:
        self.writer = writer
        self.check = check
        self._path = path
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()

    async def start(self) -> Self:
        """Listen. Raises `AuditConfigurationError` if the socket cannot be made safely."""
        listener = _listen(self._path)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(partial(_Connection, self), sock=listener)
        return self

    async def close(self) -> None:
        """Stop listening and break the connections; what waits is still written."""
        if self._server is not None:
            self._server.close()
            for connection in list(self._connections):
                connection.drop()
            await self._server.wait_closed()
            self._path.unlink(missing_ok=True)
            self._server = None

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def admit(self, connection: _Connection, peer: int) -> bool:
        """Whether to serve a new connection."""
        if peer not in {0, os.geteuid()} or len(self._connections) >= MAX_CONNECTIONS:
            return False
        self._connections.add(connection)
        return True

    def forget(self, connection: _Connection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)


def _listen(path: Path) -> socket.socket:
    """A listening socket at `path`, 0600, that takes the place of one left by a dead writer."""
    try:
        make_directory(path.parent)
        if path.parent.stat().st_mode & 0o022:
            raise AuditConfigurationError(
                f"{path.parent} can be written by others, who could put their own socket there. "
                f"chmod 700 {path.parent}."
            )
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.unlink(missing_ok=True)
            listener.bind(str(temporary))
            temporary.chmod(FILE_MODE)
            temporary.replace(path)
            listener.listen(MAX_CONNECTIONS)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise AuditConfigurationError(f"The socket {path} cannot be made: {error}.") from error
    return listener


class _Connection(asyncio.Protocol):
    """One client, at the server's end."""

    def __init__(self, server: LogServer) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._in_flight = 0
        self._answers: list[bytes] = []
        self._full = False
        self._reading = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Serve it if it may be served."""
        # Not every loop's transports are subclasses of asyncio's.
        connection = cast("asyncio.Transport", transport)
        if not self._server.admit(self, peer_uid(connection.get_extra_info("socket"))):
            connection.abort()
            return
        self._transport = connection

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Forget it; its entries that wait are written all the same."""
        self._transport = None
        self._server.forget(self)

    def drop(self) -> None:
        """Break it."""
        if self._transport is not None:
            self._transport.abort()

    def pause_writing(self) -> None:
        """The client does not read: read no more from it either."""
        self._full = True

    def resume_writing(self) -> None:
        """It reads again."""
        self._full = False
        self._take()

    def data_received(self, data: bytes) -> None:
        """Take what came, as far as there is room."""
        self._buffer += data
        self._take()

    def _take(self) -> None:
        """Hand in the whole frames of the buffer, then read on or not."""
        at, buffer = 0, self._buffer
        while self._transport is not None and not self._full and self._in_flight < MAX_IN_FLIGHT:
            if len(buffer) - at < REQUEST.size:
                break
            length, number, key = REQUEST.unpack_from(buffer, at)
            if not REQUEST_HEAD < length <= REQUEST_HEAD + MAX_ENTRY_BYTES:
                self.drop()
                return
            end = at + LENGTH.size + length
            if end > len(buffer):
                break
            self._submit(number, key, bytes(buffer[at + REQUEST.size : end]))
            at = end
        del buffer[:at]
        self._read(wanted=not self._full and self._in_flight < MAX_IN_FLIGHT)

    def _read(self, *, wanted: bool) -> None:
        if self._transport is None or wanted == self._reading:
            return
        self._reading = wanted
        if wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _submit(self, number: int, key: bytes, entry: bytes) -> None:
        self._in_flight += 1
        try:
            self._server.check(entry)
            waiter = self._server.writer.append_async(entry, key=key)
        except AuditError as error:
            self._answer(encode_answer(number, error))
        else:
            waiter.add_done_callback(partial(self._done, number))

    def _done(self, number: int, waiter: AsyncWaiter) -> None:
        error = waiter.exception()
        if error is None:
            self._answer(encode_answer(number, waiter.result()))
        elif isinstance(error, AuditError):
            self._answer(encode_answer(number, error))

    def _answer(self, frame: bytes) -> None:
        # One write for all answers of a batch.
        if not self._answers:
            self._loop.call_soon(self._flush)
        self._answers.append(frame)

    def _flush(self) -> None:
        frames, self._answers = self._answers, []
        self._in_flight -= len(frames)
        if self._transport is not None:
            self._transport.write(b"".join(frames))
            self._take()
