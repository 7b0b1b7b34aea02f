"""The socket: many processes, one writer, and nobody who can disturb the others."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import uvloop
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from audit import server as server_module
from audit import transport
from audit.checkpoint import verifier_keys
from audit.entry import encode_entry
from audit.errors import (
    AuditConfigurationError,
    LogFullError,
    LogTamperedError,
    LogUnavailableError,
    MalformedEntryError,
)
from audit.log import LogWriter
from audit.publish import Publisher
from audit.reader import LogReader
from audit.server import LogServer
from audit.transport import (
    BlockingLogClient,
    LogClient,
    encode_answer,
    encode_request,
    parse_answer,
)
from audit.verify import verify_log
from audit.waiting import Sequenced
from audit.witness import LocalSigner
from tests.audit.conftest import ORIGIN, Log, entry
from tests.audit.killing_writer import SEED
from tests.audit.records import make_entry


@pytest.fixture
async def server(log: Log, tmp_path: Path) -> AsyncIterator[LogServer]:
    async with LogServer(log.open(), tmp_path / "run" / "audit.sock", check=len) as made:
        yield made


@pytest.fixture
def log_on_uvloop(log: Log, tmp_path: Path) -> Iterator[Path]:
    """A server on an event loop of the kind that workers have."""
    path = tmp_path / "run" / "audit.sock"
    server = LogServer(log.open(), path, check=len)
    with uvloop_runner() as runner:
        loop = runner.get_loop()
        thread = threading.Thread(target=loop.run_forever)
        runner.run(server.start())
        thread.start()
        try:
            yield path
        finally:
            asyncio.run_coroutine_threadsafe(server.close(), loop).result(timeout=10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


def uvloop_runner() -> asyncio.Runner:
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


def socket_of(server: LogServer) -> Path:
    return server._path


async def test_tasks_share_one_connection_and_each_gets_its_place(server: LogServer) -> None:
    async with LogClient(socket_of(server)) as client:
        places = await asyncio.gather(*(client.append_async(entry(n)) for n in range(3000)))
    assert sorted(place.index for place in places) == list(range(3000))
    entries = dict(LogReader(server.writer.directory).read())
    for number, place in enumerate(places):
        assert entries[place.index] == entry(number)


async def test_the_blocking_client_gets_the_same(server: LogServer) -> None:
    def several() -> list[Sequenced]:
        with BlockingLogClient(socket_of(server)) as client:
            key = os.urandom(16)
            return [
                client.append(entry(0), key=key),
                client.append(entry(0), key=key),
                client.append(entry(1)),
            ]

    places = await asyncio.to_thread(several)
    assert [place.index for place in places] == [0, 0, 1]


async def test_the_socket_is_for_its_owner_only(server: LogServer) -> None:
    path = socket_of(server)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


async def test_refuses_a_directory_that_others_can_write_to(log: Log, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    writer = log.open()
    with pytest.raises(AuditConfigurationError, match="chmod 700"):
        await LogServer(writer, shared / "audit.sock").start()
    with pytest.raises(AuditConfigurationError, match="cannot be made"):
        await LogServer(writer, tmp_path / ("x" * 200) / "audit.sock").start()


async def test_another_user_is_refused(server: LogServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audit.server.peer_uid", lambda _: os.geteuid() + 1)
    async with LogClient(socket_of(server)) as client:
        with pytest.raises(LogUnavailableError):
            await client.append_async(entry(0))
    assert server.writer.size == 0


def as_another_user(path: Path) -> int:
    """Connect as `nobody`, in a process of its own; what came back."""
    code = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX);"
        "s.connect(sys.argv[1]); s.sendall(bytes.fromhex(sys.argv[2])); print(len(s.recv(100)))"
    )
    request = encode_request(1, os.urandom(16), entry(0)).hex()
    command = [sys.executable, "-c", code, str(path), request]
    done = subprocess.run(command, capture_output=True, check=False, timeout=30)
    return int(done.stdout or b"0")


async def test_the_kernel_tells_who_connects(server: LogServer) -> None:
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    path = socket_of(server)
    # As if an operator had opened the way for everybody.
    path.chmod(0o777)
    for above in [path.parent, *path.parent.parents][:-1]:
        above.chmod(above.stat().st_mode | 0o055)
    assert await asyncio.to_thread(as_another_user, path) == 0
    assert server.writer.size == 0


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff\xff\xff\xff" + bytes(40),
        b"\x00\x00\x00\x00" + bytes(40),
        b"\x00\x00\x00\x18" + bytes(40),
        b"\x00\x01\x00\x18" + bytes(40),
        b"GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: somebody who is lost\r\n\r\n",
    ],
)
async def test_a_malformed_frame_breaks_only_its_connection(
    server: LogServer, frame: bytes
) -> None:
    async with LogClient(socket_of(server)) as client:
        await client.append_async(entry(0))
        reader, writer = await asyncio.open_unix_connection(str(socket_of(server)))
        writer.write(encode_request(1, os.urandom(16), entry(1)) + frame)
        async with asyncio.timeout(10):
            with_answer = await reader.read()
        writer.close()
        assert len(with_answer) <= 53
        await client.append_async(entry(2))


async def test_a_client_that_never_reads_is_not_read_from_and_disturbs_nobody(
    server: LogServer,
) -> None:
    request = encode_request(1, bytes(16), entry(0, size=2000))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as hostile:
        hostile.setblocking(False)
        hostile.connect(str(socket_of(server)))
        sent = 0
        async with LogClient(socket_of(server)) as client:
            for number in range(300):
                for _ in range(200):
                    try:
                        sent += hostile.send(request)
                    except BlockingIOError:
                        break
                async with asyncio.timeout(10):
                    await client.append_async(entry(number))
            (connection,) = [c for c in server._connections if c._full or not c._reading]
            assert len(connection._buffer) < 600_000
            assert connection._in_flight <= 1024
            before = sent
            with pytest.raises(BlockingIOError):
                hostile.send(request)
            assert before == sent


async def test_one_connection_cannot_fill_the_queue(log: Log, server: LogServer) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        one.setblocking(False)
        one.connect(str(socket_of(server)))
        await asyncio.sleep(0.05)
        (connection,) = server._connections
        data = b"".join(encode_request(n, n.to_bytes(16, "big"), entry(n)) for n in range(1, 5000))
        await asyncio.get_running_loop().sock_sendall(one, data[:190_000])
        for _ in range(100):
            assert connection._in_flight <= 1024
            await asyncio.sleep(0)


async def test_more_connections_than_are_served_are_refused(
    server: LogServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("audit.server.MAX_CONNECTIONS", 2)
    async with LogClient(socket_of(server)) as a, LogClient(socket_of(server)) as b:
        await a.append_async(entry(0))
        await b.append_async(entry(1))
        async with LogClient(socket_of(server)) as c:
            with pytest.raises(LogUnavailableError):
                await c.append_async(entry(2))
        await a.append_async(entry(3))


async def test_errors_keep_their_kind_over_the_socket(
    server: LogServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with LogClient(socket_of(server)) as client:
        key = os.urandom(16)
        await client.append_async(entry(0), key=key)
        with pytest.raises(MalformedEntryError, match="another entry"):
            await client.append_async(entry(1), key=key)
        with pytest.raises(MalformedEntryError):
            await client.append_async(b"")
        with pytest.raises(MalformedEntryError):
            await client.append_async(b"x" * 65_536)

        def full(*_: object) -> None:
            raise LogFullError("no room, says the test")

        with monkeypatch.context() as patch:
            patch.setattr(server.writer._journal, "append", full)
            with pytest.raises(LogFullError, match="no room, says the test"):
                await client.append_async(entry(1))
        server.writer.halt(LogTamperedError("gone, says the test"))
        with pytest.raises(LogTamperedError, match="gone, says the test"):
            await client.append_async(entry(1))


async def test_nobody_listening_is_an_error_that_says_so(tmp_path: Path) -> None:
    async with LogClient(tmp_path / "none.sock") as client:
        with pytest.raises(LogUnavailableError, match="No audit log listens"):
            await client.append_async(entry(0))
    with (
        BlockingLogClient(tmp_path / "none.sock") as blocking,
        pytest.raises(LogUnavailableError, match="No audit log listens"),
    ):
        blocking.append(entry(0))


async def test_a_writer_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "deaf.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as deaf:
        deaf.bind(str(path))
        deaf.listen()
        async with LogClient(path, timeout_s=0.1) as client:
            with pytest.raises(LogUnavailableError, match="release nothing"):
                await client.append_async(entry(0))

        def blocking() -> None:
            with BlockingLogClient(path, timeout_s=0.1) as other:
                other.append(entry(0))

        with pytest.raises(LogUnavailableError, match="release nothing"):
            await asyncio.to_thread(blocking)


async def test_what_is_no_log_is_given_up(tmp_path: Path) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"\x00\x00\x00\x02ab" + b"\xff" * 100)
        writer.close()

    path = tmp_path / "babble.sock"
    server = await asyncio.start_unix_server(babble, str(path))
    async with server, LogClient(path) as client:
        with pytest.raises(LogUnavailableError):
            await client.append_async(entry(0))


@settings(max_examples=200)
@given(st.binary(max_size=100))
def test_any_answer_is_read_or_refused(data: bytes) -> None:
    try:
        parse_answer(data)
    except LogUnavailableError:
        return


def test_answers_come_back_as_they_were() -> None:
    place = Sequenced(2**40, bytes(range(32)))
    assert parse_answer(encode_answer(7, place)[4:]) == (7, place)
    number, error = parse_answer(encode_answer(8, LogFullError("ü" * 9000))[4:])
    assert number == 8
    assert isinstance(error, LogFullError)


# --- Processes ---------------------------------------------------------------------------------


def start(module: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", f"tests.audit.{module}", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    try:
        with process:
            yield process
            process.kill()
    finally:
        process.kill()


def start_writer(stack: ExitStack, directory: Path, path: Path) -> subprocess.Popen[str]:
    process = stack.enter_context(ended(start("serving_writer", directory, path)))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def read_all(process: subprocess.Popen[str], said: dict[int, int]) -> threading.Thread:
    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            number, index = line.split()
            said[int(number)] = int(index)

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def check_entries(directory: Path, said: dict[int, int]) -> Counter[str]:
    signer = LocalSigner(Ed25519PrivateKey.from_private_bytes(SEED))
    with LogWriter.open(directory, origin=ORIGIN) as writer, Publisher(writer, signer) as publisher:
        publisher.publish()
    verify_log(directory, verifier_keys(ORIGIN, signer))
    entries = dict(LogReader(directory).read())
    for number, index in said.items():
        assert entries[index] == entry(number)
    return Counter(json.loads(raw)["request"] for raw in entries.values())


def test_many_processes_share_the_writer_and_one_killed_loses_nothing_of_the_others(
    tmp_path: Path,
) -> None:
    said: dict[int, int] = {}
    path, directory = tmp_path / "run" / "a.sock", tmp_path / "log"
    with ExitStack() as stack:
        start_writer(stack, directory, path)
        workers = [
            stack.enter_context(ended(start("worker", path, 100_000 * n, 3000, 0)))
            for n in range(4)
        ]
        threads = [read_all(worker, said) for worker in workers]
        while not any(number < 100_000 for number in said):
            threads[0].join(0.01)
        workers[0].send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert [worker.wait() for worker in workers] == [-signal.SIGKILL, 0, 0, 0]
    numbers = check_entries(directory, said)
    assert set(numbers.values()) == {1}
    assert len(said) >= 9000
    for n in range(1, 4):
        assert all(f"r{100_000 * n + one}" in numbers for one in range(3000))


def test_a_writer_killed_under_load_loses_nothing_acknowledged_and_doubles_nothing(
    tmp_path: Path,
) -> None:
    said: dict[int, int] = {}
    path, directory = tmp_path / "run" / "a.sock", tmp_path / "log"
    with ExitStack() as stack:
        writer = start_writer(stack, directory, path)
        workers = [
            stack.enter_context(ended(start("worker", path, 100_000 * n, 4000, 1000)))
            for n in range(3)
        ]
        threads = [read_all(worker, said) for worker in workers]
        for goal in (1000, 4000, 7000):
            while len(said) < goal:
                threads[0].join(0.01)
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            writer = start_writer(stack, directory, path)
        for thread in threads:
            thread.join()
        assert [worker.wait() for worker in workers] == [0, 0, 0]
    numbers = check_entries(directory, said)
    # Every worker handed in again what it got no answer for: all are there, each of them once.
    assert len(said) == 12_000
    assert numbers == Counter(f"r{100_000 * n + one}" for n in range(3) for one in range(4000))


async def test_what_is_no_entry_never_gets_into_the_log(log: Log, tmp_path: Path) -> None:
    """It could not be taken back, and no search or export could read past it."""
    path = tmp_path / "run" / "audit.sock"
    good = encode_entry(make_entry())
    async with LogServer(log.open(), path), LogClient(path) as client:
        for bad in (b"x", b'{"stage":"intent"}', good.replace(b'"PSY"', b'"in words"'), good[:-1]):
            with pytest.raises(MalformedEntryError):
                await client.append_async(bad)
        assert (await client.append_async(good)).index == 0


async def test_a_stranger_who_listens_is_not_believed(
    server: LogServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever gets the socket's place acknowledges what is never written."""
    monkeypatch.setattr(transport, "peer_uid", lambda _: os.geteuid() + 1)
    path = socket_of(server)
    async with LogClient(path) as client:
        with pytest.raises(LogUnavailableError, match="listens on"):
            await client.append_async(entry(0))
    with (
        BlockingLogClient(path) as blocking,
        pytest.raises(LogUnavailableError, match="listens on"),
    ):
        await asyncio.to_thread(blocking.append, entry(0))
    assert server.writer.size == 0


# --- On the event loop that workers have ----------------------------------------------------------


def test_both_ends_work_on_uvloop(log_on_uvloop: Path) -> None:
    async def hand_in() -> None:
        async with LogClient(log_on_uvloop) as client:
            # More than a connection may have in flight: it is paused and goes on.
            entries = [entry(number) for number in range(server_module.MAX_IN_FLIGHT + 500)]
            places = await asyncio.gather(*(client.append_async(one) for one in entries))
            assert sorted(place.index for place in places) == list(range(len(entries)))

    with uvloop_runner() as runner:
        runner.run(hand_in())


def test_a_connection_that_breaks_on_uvloop_is_made_again(log_on_uvloop: Path) -> None:
    async def hand_in() -> None:
        async with LogClient(log_on_uvloop) as client:
            first = await client.append_async(entry(0))
            assert client._link is not None
            waiting = asyncio.gather(*(client.append_async(entry(n)) for n in range(1, 20)))
            await asyncio.sleep(0)
            client._link._abort()
            places = await waiting
            assert first.index == 0
            assert sorted(place.index for place in places) == list(range(1, 20))

    with uvloop_runner() as runner:
        runner.run(hand_in())


def test_a_stranger_who_listens_is_not_believed_on_uvloop_either(
    log_on_uvloop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "peer_uid", lambda _: 65_534)

    async def hand_in() -> None:
        async with LogClient(log_on_uvloop) as client:
            with pytest.raises(LogUnavailableError, match="65534"):
                await client.append_async(entry(0))

    with uvloop_runner() as runner:
        runner.run(hand_in())
