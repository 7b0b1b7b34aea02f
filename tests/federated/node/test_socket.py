"""The node's socket: whatever one caller does, the next is answered."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from federated.errors import DeploymentError, RefusedError, StoreError
from federated.node import socket as sockets
from federated.node.agent import RunFacts
from federated.node.socket import Asked, ask, serving
from tests.openbao import wait_until

ASKED = Asked(run_id=7, configuration={"study-id": "hours"}, stage="mask", payload=b"request")


class Echo:
    """A service that says back what it was asked."""

    def __init__(self) -> None:
        self.tidied = 0
        self.errors: list[Exception] = []

    def respond(self, facts: RunFacts, stage: str, payload: bytes) -> bytes:
        if self.errors:
            raise self.errors.pop()
        return f"{facts.run_id} {stage} ".encode() + payload

    def tidy(self) -> None:
        self.tidied += 1
        raise StoreError("The disk is full.")


@pytest.fixture
def service() -> Echo:
    return Echo()


@pytest.fixture
def path(tmp_path: Path, service: Echo, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sockets, "_FRAME_S", 0.3)
    monkeypatch.setattr(sockets, "_TIDY_S", 0.05)
    place = tmp_path / "socket"
    monkeypatch.setenv(sockets.VARIABLE, str(place))
    with serving(place, service) as ready:
        assert ready.wait(30)
        yield place


def connected(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(60)
    made.connect(str(path))
    return made


def framed(content: bytes) -> bytes:
    return len(content).to_bytes(4) + content


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\x00",
        b"\xff\xff\xff\xff",
        framed(b"")[:4],
        framed(b"\xc1"),
        framed(msgspec.msgpack.encode(5)),
        # Text that is no UTF-8, and nesting deeper than any parser's stack.
        framed(b"\x84\xa6run_id\x07\xadconfiguration\x80\xa5stage\xa2\xff\xfe\xa7payload\xc4\x00"),
        framed(b"\x91" * 100_000),
        framed(msgspec.msgpack.encode({"run_id": 1, "configuration": {}, "stage": "s"})),
    ],
)
def test_a_bad_frame_ends_its_own_connection_alone(path: Path, bad: bytes) -> None:
    with connected(path) as caller:
        caller.sendall(bad)
        caller.shutdown(socket.SHUT_WR)
        assert caller.recv(100) == b""
    assert ask(ASKED) == b"7 mask request"


@pytest.mark.parametrize("sent", [b"", b"\x00\x00", framed(b"x" * 100)[:20]])
def test_a_caller_that_stalls_does_not_keep_the_next_waiting(path: Path, sent: bytes) -> None:
    with connected(path) as caller:
        caller.sendall(sent)
        assert ask(ASKED) == b"7 mask request"
        assert caller.recv(100) == b""


def test_a_caller_that_sends_byte_by_byte_does_not_keep_the_next_waiting(path: Path) -> None:
    """Each byte in time, and never the whole."""
    ended = threading.Event()

    def dribble(caller: socket.socket) -> None:
        try:
            while not ended.wait(0.02):
                caller.sendall(b"\x00")
        except OSError:
            ended.set()

    with connected(path) as caller:
        caller.sendall(b"\x00\x7f\xff\xff")
        thread = threading.Thread(target=dribble, args=(caller,))
        thread.start()
        assert ask(ASKED) == b"7 mask request"
        assert ended.wait(60)
        thread.join()


@pytest.mark.parametrize("error", [RefusedError("no", rule="consent"), RuntimeError("slept 3.0")])
def test_what_is_refused_says_nothing_but_that(path: Path, service: Echo, error: Exception) -> None:
    service.errors.append(error)
    with pytest.raises(DeploymentError, match="refused"):
        ask(ASKED)
    assert ask(ASKED) == b"7 mask request"


def test_gives_up_rounds_while_nobody_calls_and_outlives_that_this_fails(
    path: Path, service: Echo
) -> None:
    wait_until(lambda: service.tidied > 2)
    assert ask(ASKED) == b"7 mask request"


class Aborting:
    """A listening socket whose first callers go away before they are taken."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self.left = 3

    def accept(self) -> tuple[socket.socket, object]:
        if self.left:
            self.left -= 1
            raise OSError(errno.ECONNABORTED, "gone")
        return self._listening.accept()


def test_a_caller_that_goes_away_before_it_is_taken_ends_nothing(
    tmp_path: Path, service: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = sockets._serve

    def serve(listening: socket.socket, *rest: object) -> None:
        original(Aborting(listening), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(sockets, "_serve", serve)
    monkeypatch.setenv(sockets.VARIABLE, str(tmp_path / "socket"))
    with serving(tmp_path / "socket", service) as ready:
        assert ready.wait(30)
        assert ask(ASKED) == b"7 mask request"


def test_an_answer_that_is_none_is_an_error_of_the_deployment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "socket"
    monkeypatch.setenv(sockets.VARIABLE, str(place))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(place))
        listening.listen()

        def hang_up() -> None:
            connection, _ = listening.accept()
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(DeploymentError, match="cannot be reached"):
            ask(ASKED)
        thread.join()
