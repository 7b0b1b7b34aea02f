"""A stage ends when its time is over, whatever SuperLink and nodes do."""

from __future__ import annotations

import datetime as dt
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.task_identity import TaskIdentity

from federated.app.client_app import content_of
from federated.deployment.grid import GridExchange, RuntimeGrid
from federated.deployment.link import task_heartbeat
from federated.deployment.timely import LARGEST_ANSWER_BYTES, TimelyTransport, time_left, within
from federated.study_run import Patience
from keys.loopback_tls import ensure_loopback_tls

PATIENCE = Patience(timeout_s=10.0, enough=99, stragglers_s=5.0)


@pytest.fixture(autouse=True)
def identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1


class Clock:
    """Monotonic, and moved by whoever lets time pass."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


class SlowLink:
    """A SuperLink whose every call takes `call_s`, or what is left of the stage if that is less."""

    def __init__(self, clock: Clock, call_s: float, *, takes: bool = True) -> None:
        self._clock = clock
        self._call_s = call_s
        self._takes = takes
        self.begun: list[float] = []

    def _pass(self) -> None:
        self.begun.append(self._clock.now)
        left_s = time_left()
        assert left_s > 0
        self._clock.sleep(min(self._call_s, left_s))
        if left_s < self._call_s:
            raise httpx.ReadTimeout("time is over")

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self._pass()
        if not self._takes:
            raise httpx.ConnectError("away")
        return [str(message.metadata.dst_node_id) for message in messages]

    def pull_messages(self, _: Iterable[str]) -> list[Message]:
        self._pass()
        return []


@pytest.mark.parametrize("takes", [True, False])
@pytest.mark.parametrize("call_s", [0.1, 4.0, 1000.0])
def test_a_stage_of_many_slow_nodes_ends_at_its_deadline(takes: bool, call_s: float) -> None:  # noqa: FBT001
    clock = Clock()
    link = SlowLink(clock, call_s, takes=takes)
    exchange = GridExchange(cast("Any", link), clock=clock, sleep=clock.sleep)
    assert exchange.ask("mask", dict.fromkeys(range(1, 200), b"x"), PATIENCE) == {}
    assert clock.now == pytest.approx(1010.0)
    assert max(link.begun) < 1010.0


def test_replies_of_one_look_survive_the_loss_of_the_next() -> None:
    clock = Clock()
    looks = iter([[1, 2], None, [3]])

    class Losing(SlowLink):
        def pull_messages(self, _: Iterable[str]) -> list[Message]:
            came = next(looks)
            if came is None:
                raise httpx.ReadTimeout("lost")
            return [reply_of(node) for node in came]

    exchange = GridExchange(cast("Any", Losing(clock, 0.0)), clock=clock, sleep=clock.sleep)
    answers = exchange.ask("mask", dict.fromkeys((1, 2, 3), b"x"), PATIENCE)
    assert answers == {1: b"answer", 2: b"answer", 3: b"answer"}


def reply_of(node: int) -> Message:
    asked = Message(content_of("mask", b"x"), node, "query")
    asked.metadata.__dict__["_message_id"] = str(node)
    return Message(content_of("mask", b"answer"), reply_to=asked)


@contextmanager
def server(folder: Path, serve: Callable[[ssl.SSLSocket], None]) -> Iterator[httpx.Client]:
    """A TLS server that does `serve` with each connection, and a client with a second a call."""
    tls = ensure_loopback_tls(folder, dt.datetime.now(dt.UTC))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate_file, tls.key_file)
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        try:
            plain, _ = listener.accept()
            with context.wrap_socket(plain, server_side=True) as secured:
                serve(secured)
        except OSError:
            return

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    trusted = ssl.create_default_context(cafile=str(tls.ca_file))
    port = listener.getsockname()[1]
    with httpx.Client(
        transport=TimelyTransport(tls=trusted, call_s=1.0),
        base_url=f"https://127.0.0.1:{port}",
        timeout=1.0,
    ) as client:
        yield client
    with suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(30)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n"


@pytest.mark.parametrize("head", [b"", HEAD], ids=["in its head", "in its body"])
def test_a_call_ends_however_slowly_it_is_answered(tmp_path: Path, head: bytes) -> None:
    over = threading.Event()

    def dribble(connection: ssl.SSLSocket) -> None:
        connection.sendall(head or b"HTTP/1.1 200 OK\r\nx-slow: ")
        while not over.wait(0.2):
            connection.sendall(b"x")

    try:
        with (
            server(tmp_path, dribble) as client,
            pytest.raises(httpx.TimeoutException),
        ):
            client.post("/")
    finally:
        over.set()


def test_a_call_never_outlives_its_stage(tmp_path: Path) -> None:
    clock = Clock()
    with (
        server(tmp_path, lambda _: None) as client,
        within(clock.now, clock),
        pytest.raises(httpx.TimeoutException),
    ):
        client.post("/")


def test_an_answer_larger_than_any_is_not_read_to_its_end(tmp_path: Path) -> None:
    def pour(connection: ssl.SSLSocket) -> None:
        size = LARGEST_ANSWER_BYTES * 4
        connection.sendall(f"HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n".encode())
        for _ in range(size // 65_536):
            connection.sendall(bytes(65_536))

    with server(tmp_path, pour) as client, pytest.raises(httpx.HTTPError):
        client.post("/")


def test_an_answer_is_read_as_it_came(tmp_path: Path) -> None:
    def answer(connection: ssl.SSLSocket) -> None:
        connection.recv(65_536)
        connection.sendall(b"HTTP/1.1 418 no\r\nx-a: b\r\ncontent-length: 5\r\n\r\nhello")

    with server(tmp_path, answer) as client:
        found = client.post("/")
    assert (found.status_code, found.headers["x-a"], found.content) == (418, "b", b"hello")


def test_time_left_is_that_of_the_nearest_end() -> None:
    clock = Clock()
    with within(1010.0, clock), within(1005.0, clock), within(1020.0, clock):
        assert time_left() == 5.0
    assert time_left() == float("inf")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 401 no\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nxyz",
    ],
    ids=["token unknown", "run is over", "garbage"],
)
def test_a_run_that_the_superlink_forgot_keeps_its_answers(tmp_path: Path, answer: bytes) -> None:
    answered = threading.Event()

    def refuse(connection: ssl.SSLSocket) -> None:
        connection.recv(65_536)
        connection.sendall(answer)
        answered.set()
        connection.recv(65_536)

    with server(tmp_path, refuse) as client:
        authority = ensure_loopback_tls(tmp_path, dt.datetime.now(dt.UTC)).ca_file
        trusted = ssl.create_default_context(cafile=str(authority))
        grid = RuntimeGrid(client.base_url.netloc.decode(), tls=trusted, token="x")
        heartbeat = HeartbeatSender(task_heartbeat(grid.client))
        heartbeat.start()
        assert answered.wait(30)
        assert not task_heartbeat(grid.client)()
        assert heartbeat.is_running
        # Flower's raises where its thread has ended, and takes the answers with it.
        heartbeat.stop()
        grid.close()
