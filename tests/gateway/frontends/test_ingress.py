from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import psutil  # type: ignore[import-untyped]
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, DataReceived, ResponseReceived, StreamEnded, StreamReset
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BadRequestError
from gateway.frontends.framing import canonical_path
from gateway.routes import check_path
from tests.gateway.frontends.misbehaving import App, misbehaving
from tests.gateway.frontends.served import LIMITS, Running, running


class Behind:
    """The app behind, in a thread of its own."""

    def __init__(self) -> None:
        self.app = App()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> App:
        self._thread.start()
        self._ready.wait(5)
        return self.app

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        async def serve() -> None:
            async with misbehaving() as app:
                self.app = app
                self._ready.set()
                await self._stop.wait()

        self._loop.run_until_complete(serve())
        self._loop.close()


@pytest.fixture(scope="module")
def behind() -> Iterator[App]:
    with Behind() as app:
        yield app


@pytest.fixture(scope="module")
def ingress(tmp_path_factory: pytest.TempPathFactory, behind: App) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("ingress")
    upstream = f"http://127.0.0.1:{behind.port}"
    with running(directory, HAVENGATE_TEST_UPSTREAM=upstream, HAVENGATE_TEST_IDLE_S="2") as one:
        yield one


def exchange(ingress: Running, data: bytes, *, wait_s: float = 5.0) -> bytes:
    """Send bytes and read until the connection is closed. Fails if it stays open."""
    with ingress.connect() as one:
        one.sendall(data)
        return until_closed(one, wait_s)


def until_closed(one: socket.socket, wait_s: float = 5.0) -> bytes:
    one.settimeout(wait_s)
    with one:
        return read_to_end(one)[0]


def read_to_end(one: socket.socket) -> tuple[bytes, bool]:
    """What came until the connection closed, and whether it closed as it should."""
    answer = bytearray()
    try:
        while piece := one.recv(1_048_576):
            answer += piece
    except (ConnectionError, ssl.SSLError):
        return bytes(answer), False
    return bytes(answer), True


def get(path: str, *lines: str, method: str = "GET", body: bytes = b"") -> bytes:
    fields = "".join(f"{line}\r\n" for line in ("Host: localhost", "Connection: close", *lines))
    return f"{method} {path} HTTP/1.1\r\n{fields}\r\n".encode() + body


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def content(answer: bytes) -> Any:
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def eventually(true: Callable[[], bool], within_s: float = 5.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.05)
    return False


# --- HTTP/1.1: what is and is not a request -------------------------------------------------------


def test_a_request_arrives_as_it_was_sent(ingress: Running) -> None:
    data = get("/a%20b?x=%2F&x=1", "Content-Length: 3", "X-A: 1", "X-A: 2", method="POST")
    seen = content(exchange(ingress, data + b"abc"))
    assert (seen["method"], seen["path"], seen["query"]) == ("POST", "/a%20b", "x=%2F&x=1")
    assert (seen["authority"], seen["body"]) == ("localhost", "abc")
    assert [value for name, value in seen["headers"] if name == "x-a"] == ["1", "2"]
    assert ["x-forwarded-for", "127.0.0.1"] in seen["headers"]


CHUNKS = "Transfer-Encoding: chunked"
REFUSED = {
    "two lengths": get("/", "Content-Length: 1", "Content-Length: 2", method="POST", body=b"ab"),
    "a list of lengths": get("/", "Content-Length: 2, 2", method="POST", body=b"ab"),
    "a length with a sign": get("/", "Content-Length: +2", method="POST", body=b"ab"),
    "an unknown coding": get("/", "Transfer-Encoding: xchunked", method="POST", body=b"0\r\n\r\n"),
    "two codings": get("/", "Transfer-Encoding: gzip, chunked", method="POST", body=b"0\r\n\r\n"),
    "chunks in HTTP/1.0": b"POST / HTTP/1.0\r\nHost: localhost\r\n" + CHUNKS.encode() + b"\r\n\r\n",
    "a folded line": get("/", "X: a\r\n b"),
    "a bare CR": get("/", "X: a\rb"),
    "a NUL": get("/", "X: a\0b"),
    "a space before the colon": get("/", "X : a"),
    "a name that is no token": get("/", "X(: a"),
    "no Host": b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n",
    "two Hosts": get("/", "Host: evil.example"),
    "another host in the target": get("http://evil.example/"),
    "no path": get("echo"),
    "an asterisk": get("*", method="OPTIONS"),
    "our own name with underscores": get("/", "havengate_identity: x"),
    "a framing field with underscores": get("/", "content_length: 5"),
    "a length named by Connection": get("/", "Connection: content-length"),
    "large fields": get("/", "X: " + "a" * 60_000),
    "many fields": get("/", *["X: a"] * 101),
    "a long target": get("/" + "a" * 9_000),
    "an unknown expectation": get("/", "Expect: wonders"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_cannot_be_understood_in_one_way(ingress: Running, name: str) -> None:
    answer = exchange(ingress, REFUSED[name])
    assert status(answer) in {400, 414, 417, 431, 501}, answer


def test_a_request_hidden_behind_two_framings_is_never_carried_out(ingress: Running) -> None:
    hidden = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for fields in (
        ("Content-Length: 6", CHUNKS), (CHUNKS, f"Content-Length: {5 + len(hidden)}"),
        (CHUNKS, "Content-Length: 5"),
    ):  # fmt: skip
        lines = "".join(f"{line}\r\n" for line in fields)
        data = f"POST /first HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n0\r\n\r\n".encode()
        answer = exchange(ingress, data + hidden)
        assert answer.count(b"HTTP/1.1 ") == 1
        assert b"/hidden" not in answer


def test_an_ordinary_pipelined_request_is_carried_out(ingress: Running) -> None:
    first = b"GET /first HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert exchange(ingress, first + get("/second")).count(b"HTTP/1.1 200") == 2


def test_connect_is_refused(ingress: Running) -> None:
    answer = exchange(ingress, b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n")
    assert not answer.startswith(b"HTTP/1.1 2")


def test_a_client_that_expects_to_be_asked_for_the_body_is(ingress: Running) -> None:
    with ingress.connect() as one:
        one.sendall(get("/", "Expect: 100-continue", "Content-Length: 3", method="POST"))
        assert one.recv(100).startswith(b"HTTP/1.1 100")
        one.sendall(b"abc")
        assert content(until_closed(one))["body"] == "abc"


# --- Paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/a/../b", "/a/%2e%2e/b", "/a/.%2E", "/./a", "/a//b", "//a", "/a%5Cb", "/a\\b", "/a%00",
     "/a%0Ab", "/a%252Fb", "/a%252e%252e", "/a/..;x/b", "/a/..%3Bx/b", "/%FF", "/a%2F%2Fb",
     "/a%2F..%2Fb", "/;x/a/.;"],
)  # fmt: skip
def test_refuses_a_path_that_the_app_could_see_differently(ingress: Running, path: str) -> None:
    assert status(exchange(ingress, get(path))) == 400


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        ("/a%2Fb", "/a/b"),
        ("/%66hir", "/fhir"),
        ("/a;b=1", "/a%3Bb=1"),
        ("/%C3%A9", "/%C3%A9"),
        ("/é", "/%C3%A9"),
        ("/a%3Fb%23c", "/a%3Fb%23c"),
        ("/Patient/1/$everything", "/Patient/1/$everything"),
    ],
)
def test_a_path_is_seen_in_one_form_by_us_and_the_app(
    ingress: Running, behind: App, sent: str, seen: str
) -> None:
    assert content(exchange(ingress, get(sent)))["path"] == seen
    exchange(ingress, get("/app" + sent))
    assert behind.heads[-1].startswith(f"GET /app{seen} ")


@given(st.text())
def test_a_canonical_path_means_the_path_it_was_made_of_and_one_thing_only(text: str) -> None:
    try:
        path = canonical_path("/" + text)
    except BadRequestError:
        return
    check_path(path)

    assert unquote(path, errors="strict") == "/" + text
    assert canonical_path(unquote(path)) == path


# --- Bodies ---------------------------------------------------------------------------------------


def test_a_chunked_body_arrives_whole(ingress: Running) -> None:
    data = get("/", CHUNKS, method="POST", body=b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n")
    assert content(exchange(ingress, data))["body"] == "abcde"


CUT = {
    "a cut length": get("/", "Content-Length: 10", method="POST", body=b"abc"),
    "cut chunks": get("/", CHUNKS, method="POST", body=b"3\r\nabc\r\n"),
    "a cut chunk": get("/", CHUNKS, method="POST", body=b"30\r\nabc"),
    "a bad chunk": get("/", CHUNKS, method="POST", body=b"3\r\nabc\r\nzz\r\n"),
    "a chunk longer than it says": get(
        "/", CHUNKS, method="POST", body=b"3\r\nabcdef\r\n0\r\n\r\n"
    ),
}


@pytest.mark.parametrize("name", CUT)
def test_a_body_that_was_cut_is_never_taken_for_whole(
    ingress: Running, behind: App, name: str
) -> None:
    said = ingress.said().count("GONE")
    with ingress.connect() as one:
        one.sendall(CUT[name])
        time.sleep(0.1)
    assert eventually(lambda: ingress.said().count("GONE") > said)
    before = len(behind.bodies)
    with ingress.connect() as one:
        one.sendall(CUT[name].replace(b"POST / ", b"POST /app/ok "))
        time.sleep(0.1)
    time.sleep(0.2)
    assert all(body is None for body in behind.bodies[before:])


def test_a_body_larger_than_the_limit_is_refused_without_reading_it(ingress: Running) -> None:
    data = get("/", "Content-Length: 10000000", method="POST")
    assert status(exchange(ingress, data)) == 413
    chunk = b"%x\r\n" % 200_000 + b"x" * 200_000 + b"\r\n"
    assert status(exchange(ingress, get("/", CHUNKS, method="POST", body=chunk))) == 413


def test_a_body_that_comes_too_slowly_is_given_up(ingress: Running) -> None:
    data = get("/", "Content-Length: 10", method="POST", body=b"abc")
    assert status(exchange(ingress, data)) == 408


def test_a_body_that_comes_byte_by_byte_is_given_up_as_well(ingress: Running) -> None:
    with ingress.connect() as one:
        one.sendall(get("/", "Content-Length: 100", method="POST"))
        one.settimeout(0.3)
        for _ in range(20):
            one.sendall(b"a")
            try:
                answer = one.recv(65_536)
            except TimeoutError:
                continue
            assert status(answer) == 408
            return
    raise AssertionError("It is still waited for.")


# --- Answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/raise", "/nothing"])
def test_a_mistake_is_a_plain_answer_that_says_nothing(ingress: Running, path: str) -> None:
    answer = exchange(ingress, get(path))
    assert status(answer) == 500
    assert b"application/problem+json" in answer
    assert b"SECRET" not in answer
    assert "SECRET" not in ingress.said()


@pytest.mark.parametrize(
    "path",
    ["/raise-midway", "/return-midway", "/broken", "/short", "/long", "/app/short",
     "/app/cut-chunks", "/app/bad-chunk"],
)  # fmt: skip
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_an_answer_that_broke_off_never_looks_complete(
    ingress: Running, path: str, version: str
) -> None:
    with ingress.connect() as one:
        one.sendall(get(path).replace(b"HTTP/1.1", f"HTTP/{version}".encode()))
        answer, ended_well = read_to_end(one)
    # Where the app broke off before anything was sent on, that is told instead.
    assert not ended_well or (path.startswith("/app/") and status(answer) == 502)
    assert not answer.endswith(b"0\r\n\r\n")


def test_an_answer_that_did_not_break_off_ends_well(ingress: Running) -> None:
    with ingress.connect() as one:
        one.sendall(get("/pieces"))
        assert read_to_end(one)[1]


def test_an_answer_in_pieces_is_whole(ingress: Running) -> None:
    answer = exchange(ingress, get("/pieces"))
    assert b"transfer-encoding: chunked" in answer
    assert b"".join(re.findall(rb"\r\n(\d)\r\n", answer)) != b""
    assert answer.endswith(b"0\r\n\r\n")


def test_head_and_no_content_have_no_body(ingress: Running) -> None:
    answer = exchange(ingress, get("/", method="HEAD"))
    assert answer.endswith(b"\r\n\r\n")
    assert int(answer.partition(b"content-length: ")[2].split()[0]) > 100
    answer = exchange(ingress, get("/no-content"))
    assert answer.endswith(b"\r\n\r\n")
    assert b"content-length" not in answer


def test_a_large_answer_arrives_whole(ingress: Running) -> None:
    head, _, body = exchange(ingress, get("/large"), wait_s=20).partition(b"\r\n\r\n")
    assert len(body) == 40_000_000
    assert b"content-length: 40000000" in head


def test_the_server_behind_is_not_named(ingress: Running) -> None:
    answer = exchange(ingress, get("/"))
    assert b"granian" not in answer.lower()


# --- Clients that are slow, gone, or too many -----------------------------------------------------


def test_a_client_that_goes_away_ends_what_was_flowing(ingress: Running) -> None:
    said = ingress.said().count("CANCELLED")
    with ingress.connect() as one:
        one.sendall(get("/wait"))
        assert b"200" in one.recv(1000)
    assert eventually(lambda: ingress.said().count("CANCELLED") > said)


def test_a_client_that_does_not_read_costs_no_memory(ingress: Running) -> None:
    before = memory(ingress)
    said = ingress.said().count("TORRENT")
    with ingress.connect() as one:
        one.sendall(get("/torrent"))
        assert eventually(lambda: ingress.said().count("TORRENT") > said, 8)
        assert memory(ingress) - before < 40_000_000
    sent = int(ingress.said().split("TORRENT ")[-1].split()[0])
    assert sent < 20_000_000


def memory(ingress: Running) -> int:
    children = psutil.Process(ingress.process.pid).children(recursive=True)
    return sum(int(child.memory_info().rss) for child in children)


def test_too_many_exchanges_at_once_are_told_to_come_again(ingress: Running) -> None:
    held = []
    for _ in range(LIMITS.concurrent):
        one = ingress.connect()
        one.sendall(get("/slow"))
        held.append(one)
    time.sleep(0.3)
    answer = exchange(ingress, get("/"))
    assert status(answer) == 503
    assert b"retry-after: 1" in answer
    assert all(until_closed(one).endswith(b"slow but whole") for one in held)
    assert status(exchange(ingress, get("/"))) == 200


def test_a_connection_that_asks_nothing_is_ended(ingress: Running) -> None:
    silent = socket.create_connection(("127.0.0.1", ingress.port))
    half = socket.create_connection(("127.0.0.1", ingress.port))
    half.sendall(b"\x16\x03\x01")
    idle = ingress.connect("h2")
    busy = ingress.connect()
    for one in (silent, half, idle):
        until_closed(one, wait_s=15)
        one.close()
    busy.close()


# --- HTTP/2 ---------------------------------------------------------------------------------------


class Http2:
    """One connection, driven frame by frame."""

    def __init__(self, ingress: Running) -> None:
        self.socket = ingress.connect("h2")
        self.socket.settimeout(5)
        config = H2Configuration(
            header_encoding="utf-8",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
        self.connection = H2Connection(config)
        self.connection.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self.socket.sendall(self.connection.data_to_send())

    def ask(
        self, path: str, *fields: tuple[str, str], method: str = "POST", end: bool = False
    ) -> None:
        head = [(":method", method), (":path", path), (":scheme", "https")]
        head.append((":authority", "localhost"))
        self.connection.send_headers(1, [*head, *fields], end_stream=end)
        self.flush()

    def answer(self) -> tuple[int | None, bytes, bool]:
        """Status, body, and whether the stream ended well."""
        answered, body = None, b""
        try:
            while data := self.socket.recv(65_536):
                for event in self.connection.receive_data(data):
                    match event:
                        case ResponseReceived():
                            fields = {str(name): value for name, value in event.headers or []}
                            answered = int(fields[":status"])
                        case DataReceived():
                            body += event.data or b""
                        case StreamEnded():
                            return answered, body, True
                        case StreamReset() | ConnectionTerminated():
                            return answered, body, False
                        case _:
                            pass
                self.flush()
        except (ConnectionError, ssl.SSLError):
            pass
        return answered, body, False


@pytest.fixture
def http2(ingress: Running) -> Iterator[Http2]:
    one = Http2(ingress)
    yield one
    one.socket.close()


def test_http_2_is_spoken(http2: Http2) -> None:
    http2.ask("/a", ("content-length", "3"))
    http2.connection.send_data(1, b"abc", end_stream=True)
    http2.flush()
    answered, body, _ = http2.answer()
    seen = json.loads(body)
    assert (answered, seen["body"], seen["version"]) == (200, "abc", "2")
    assert ["via", "2 havengate"] in seen["headers"]


@pytest.mark.parametrize(
    "field",
    [("connection", "keep-alive"), ("transfer-encoding", "chunked"), ("keep-alive", "1"),
     ("upgrade", "x"), ("proxy-connection", "x"), ("te", "gzip"), ("host", "evil.example"),
     ("Upper", "x"), ("x", "a\r\nb: c"), (":protocol", "websocket")],
)  # fmt: skip
def test_http_2_refuses_fields_of_a_connection_and_other_tricks(
    http2: Http2, field: tuple[str, str]
) -> None:
    http2.ask("/", field, method="GET", end=True)
    answered, _, _ = http2.answer()
    assert answered in {None, 400}


def test_http_2_body_that_was_reset_or_is_short_is_never_taken_for_whole(
    ingress: Running, behind: App
) -> None:
    for end in ("reset", "short", "close"):
        before = len(behind.bodies)
        one = Http2(ingress)
        one.ask("/app/ok", ("content-length", "10"))
        one.connection.send_data(1, b"abc", end_stream=end == "short")
        one.flush()
        time.sleep(0.1)
        if end == "reset":
            one.connection.reset_stream(1)
            one.flush()
            time.sleep(0.1)
        one.socket.close()
        time.sleep(0.2)
        assert all(body is None for body in behind.bodies[before:])


def test_http_2_body_must_be_announced(http2: Http2) -> None:
    http2.ask("/")
    http2.connection.send_data(1, b"abc", end_stream=True)
    http2.flush()
    _, body, _ = http2.answer()
    assert b"gateway.length_required" in body


def test_http_2_may_end_an_empty_body_late(http2: Http2) -> None:
    http2.ask("/")
    http2.connection.send_data(1, b"", end_stream=True)
    http2.flush()
    assert http2.answer()[0] == 200


@pytest.mark.parametrize("path", ["/raise-midway", "/return-midway", "/broken", "/short"])
def test_http_2_answer_that_broke_off_never_looks_complete(http2: Http2, path: str) -> None:
    http2.ask(path, method="GET", end=True)
    assert http2.answer()[2] is False


def test_http_2_stream_that_is_not_read_costs_no_memory(ingress: Running, http2: Http2) -> None:
    before = memory(ingress)
    said = ingress.said().count("TORRENT")
    http2.ask("/torrent", method="GET", end=True)
    assert eventually(lambda: ingress.said().count("TORRENT") > said, 8)
    assert memory(ingress) - before < 40_000_000


def test_files_that_were_opened_are_closed_again(ingress: Running, tmp_path: Path) -> None:
    for _ in range(3):
        exchange(ingress, get("/pieces"))
        exchange(ingress, get("/broken"))
    worker = max(psutil.Process(ingress.process.pid).children(), key=lambda child: child.num_fds())
    before = worker.num_fds()
    for _ in range(20):
        exchange(ingress, get("/pieces"))
        exchange(ingress, get("/broken"))
    assert eventually(lambda: worker.num_fds() <= before + 3)
