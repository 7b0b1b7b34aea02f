"""An app behind that can be told by the path how to misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

OK = b"HTTP/1.1 200 OK\r\n"
WHOLE = OK + b"X-A: 1\r\nX-A: 2\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
BOMB = gzip.compress(b"\0" * 50_000_000)

#: Path → what is sent before the connection is closed.
ANSWERS: dict[str, bytes] = {
    "/short": OK + b"Content-Length: 10\r\n\r\nab",
    "/cut-chunks": CHUNKED + b"2\r\nab\r\n",
    "/cut-chunk": CHUNKED + b"5\r\nab",
    "/bad-chunk": CHUNKED + b"zz\r\nab\r\n",
    "/garbage": b"garbage\r\n\r\n",
    "/half-head": b"HTTP/1.1 200 O",
    "/two-lengths": OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
    "/length-and-chunks": OK
    + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "/switch": b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nraw",
    "/not-ascii": OK + b"X-L: caf\xe9\r\nContent-Length: 0\r\n\r\n",
    "/informed": b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + WHOLE,
    "/trailers": CHUNKED + b"2\r\nok\r\n0\r\nX-Trailer: 1\r\n\r\n",
    "/until-closed": OK + b"Connection: close\r\n\r\nok",
    "/moved": b"HTTP/1.1 302 Found\r\nLocation: /ok\r\nContent-Length: 0\r\n\r\n",
    "/cookie": OK + b"Set-Cookie: sid=1\r\nContent-Length: 2\r\n\r\nok",
    "/refused": b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno",
    "/bomb": OK
    + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB)
    + BOMB,
    "/gzip": OK
    + b"Content-Encoding: gzip\r\nConnection: close\r\n\r\n"
    + gzip.compress(b"unpacked", mtime=0),
    "/cut-gzip": OK
    + b"Content-Encoding: gzip\r\nConnection: close\r\n\r\n"
    + gzip.compress(b"unpacked", mtime=0)[:-9],
    "/brotli": OK + b"Content-Encoding: br\r\nContent-Length: 2\r\n\r\nok",
}  # fmt: skip


@dataclass(slots=True)
class App:
    """`heads` and `bodies` are what arrived; a body is None if its end never came.

    `/told` sends its head at once, and then whatever is put into `told`, until that is empty bytes.
    """

    port: int = 0
    heads: list[str] = field(default_factory=list)
    bodies: list[bytes | None] = field(default_factory=list)
    connections: int = 0
    told: deque[bytes] = field(default_factory=deque)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while await self._one(reader, writer):
                pass
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        self.heads.append(head)
        path = head.split(" ")[1].partition("?")[0].removeprefix("/app")
        match path:
            case "/close":
                return False
            case "/close-once" if sum(" /close-once" in one for one in self.heads) == 1:
                return False
            case "/slow":
                await asyncio.sleep(5)
            case "/slow-body":
                writer.write(OK + b"Content-Length: 10\r\n\r\nab")
                await asyncio.sleep(5)
            case "/told" | "/told/":
                await self._as_told(writer)
                return True
            case "/more":
                # A second answer that nobody asked for, in the same packet.
                writer.write(WHOLE + OK + b"Content-Length: 6\r\n\r\nPOISON")
                await writer.drain()
                return True
            case _ if path in ANSWERS:
                writer.write(ANSWERS[path])
                await writer.drain()
                return False
        self.bodies.append(None)
        self.bodies[-1] = await _body(reader, head)
        writer.write(WHOLE if not head.startswith("HEAD") else WHOLE[:-2])
        await writer.drain()
        return True

    async def _as_told(self, writer: asyncio.StreamWriter) -> None:
        """Whoever tells may do so from another thread."""
        writer.write(CHUNKED)
        piece: bytes | None = None
        while piece != b"":
            await writer.drain()
            while not self.told:  # noqa: ASYNC110 - told from another thread  # noqa: ASYNC110 - told from another thread
                await asyncio.sleep(0.01)
            piece = self.told.popleft()
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        await writer.drain()


async def _body(reader: asyncio.StreamReader, head: str) -> bytes:
    lower = head.lower()
    if "transfer-encoding: chunked" in lower:
        whole = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            whole += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
        return whole
    if "content-length: " in lower:
        return await reader.readexactly(int(lower.partition("content-length: ")[2].split()[0]))
    return b""


@contextlib.asynccontextmanager
async def misbehaving(context: ssl.SSLContext | None = None) -> AsyncIterator[App]:
    app = App()
    tasks: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        task = asyncio.ensure_future(app.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(_ended(tasks, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
    app.port = server.sockets[0].getsockname()[1]
    try:
        yield app
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # What nobody took is dropped, and the loop gets its turn to close the sockets.
        for writer in writers:
            # A transport that is closed already has no loop any more, and asyncio no word for that.
            with contextlib.suppress(AttributeError):
                writer.transport.abort()
        await asyncio.sleep(0.01)


def _ended(
    tasks: set[asyncio.Task[None]], writer: asyncio.StreamWriter
) -> Callable[[asyncio.Task[None]], None]:
    def ended(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        writer.close()

    return ended
