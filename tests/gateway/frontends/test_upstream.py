from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.core.commands import Failed, Fetched, Signal
from gateway.core.messages import Headers, RequestHead, ResponseHead
from gateway.errors import GatewayConfigurationError, UpstreamContentError
from gateway.frontends.codings import decode
from gateway.frontends.upstream import Stream, Upstreams
from gateway.routes import Route
from tests.gateway.frontends.misbehaving import App, misbehaving
from tests.gateway.frontends.served import certify, free_port, route

LIMIT = 100_000


@pytest.fixture
async def app() -> AsyncIterator[App]:
    async with misbehaving() as one:
        yield one


@pytest.fixture
async def upstreams() -> AsyncIterator[Upstreams]:
    one = Upstreams()
    yield one
    await one.close()


def behind(app: App, **settings: object) -> Route:
    return route(f"http://127.0.0.1:{app.port}", **{"timeout_s": 0.5, **settings})


def head(path: str, method: str = "GET", *fields: tuple[str, str], query: str = "") -> RequestHead:
    return RequestHead(
        method=method, authority="clinic.example", path=path, query=query, headers=Headers(fields)
    )


async def read(stream: Stream) -> bytes | Failed:
    whole = b""
    while isinstance(piece := await stream.receive(), bytes):
        whole += piece
    return whole if piece is Signal.END else piece if isinstance(piece, Failed) else b"?"


async def opened(upstreams: Upstreams, to: Route, asked: RequestHead, *, body: bool) -> Stream:
    stream = await upstreams.open(to, asked, body)
    assert isinstance(stream, Stream)
    return stream


# --- Whole answers --------------------------------------------------------------------------------


async def test_gives_a_whole_answer_with_repeated_fields(app: App, upstreams: Upstreams) -> None:
    answer = await upstreams.fetch(behind(app), head("/ok"), b"", LIMIT)
    assert isinstance(answer, Fetched)
    assert (answer.head.status, answer.body) == (200, b"ok")
    assert answer.head.headers.all("x-a") == ["1", "2"]


@pytest.mark.parametrize("path", ["/informed", "/trailers", "/until-closed"])
async def test_understands_what_is_unusual_but_right(
    app: App, upstreams: Upstreams, path: str
) -> None:
    answer = await upstreams.fetch(behind(app), head(path), b"", LIMIT)
    assert isinstance(answer, Fetched)
    assert (answer.head.status, answer.body) == (200, b"ok")


BROKEN = {
    "/short": "upstream_broken",
    "/cut-chunks": "upstream_broken",
    "/cut-chunk": "upstream_broken",
    "/bad-chunk": "upstream_broken",
    "/garbage": "upstream_broken",
    "/half-head": "upstream_broken",
    "/close": "upstream_broken",
    "/two-lengths": "upstream_broken",
    "/length-and-chunks": "upstream_content",
    "/switch": "upstream_content",
    "/not-ascii": "upstream_content",
}


@pytest.mark.parametrize("path", BROKEN)
async def test_what_is_not_whole_is_a_failure_and_never_an_answer(
    app: App, upstreams: Upstreams, path: str
) -> None:
    answer = await upstreams.fetch(behind(app), head(path), b"", LIMIT)
    assert isinstance(answer, Failed)
    assert (answer.code, answer.who) == (f"gateway.{BROKEN[path]}", "upstream")
    assert not answer.timed_out


@pytest.mark.parametrize("path", BROKEN)
async def test_what_is_not_whole_never_ends_well_in_pieces(
    app: App, upstreams: Upstreams, path: str
) -> None:
    stream = await opened(upstreams, behind(app), head(path), body=False)
    answer = await stream.head()
    if isinstance(answer, ResponseHead):
        assert isinstance(await read(stream), Failed)
    await stream.close()


async def test_a_second_answer_is_never_taken_for_the_next_ones(
    app: App, upstreams: Upstreams
) -> None:
    to = behind(app)
    for _ in range(10):
        await upstreams.fetch(to, head("/more"), b"", LIMIT)
        answer = await upstreams.fetch(to, head("/ok"), b"", LIMIT)
        assert isinstance(answer, Fetched)
        assert answer.body == b"ok"


@pytest.mark.parametrize("path", ["/slow", "/slow-body"])
async def test_a_slow_app_times_out(app: App, upstreams: Upstreams, path: str) -> None:
    answer = await upstreams.fetch(behind(app), head(path), b"", LIMIT)
    assert isinstance(answer, Failed)
    assert answer.timed_out
    assert answer.code == "gateway.upstream_timeout"


@pytest.mark.parametrize("path", ["/slow", "/slow-body"])
async def test_a_slow_app_times_out_in_pieces(app: App, upstreams: Upstreams, path: str) -> None:
    stream = await opened(upstreams, behind(app), head(path), body=False)
    answer = await stream.head()
    if isinstance(answer, ResponseHead):
        assert await stream.receive() == b"ab"
        failed = await stream.receive()
        assert isinstance(failed, Failed)
        assert failed.timed_out
    else:
        assert answer.timed_out
    await stream.close()


async def test_head_and_pieces_are_given_as_the_app_sends_them(
    app: App, upstreams: Upstreams
) -> None:
    stream = await opened(upstreams, behind(app, timeout_s=30), head("/told"), body=False)
    assert isinstance(await stream.head(), ResponseHead)
    for piece in (b"a", b"b" * 1000, b"c"):
        app.told.append(piece)
        came = b""
        while came != piece:
            more = await stream.receive()
            assert isinstance(more, bytes)
            came += more
    app.told.append(b"")
    assert await stream.receive() is Signal.END
    await stream.close()
    answer = await upstreams.fetch(stream._link.route, head("/ok"), b"", LIMIT)
    assert isinstance(answer, Fetched)
    assert app.connections == 1


async def test_what_nobody_reads_does_not_pile_up(app: App, upstreams: Upstreams) -> None:
    stream = await opened(upstreams, behind(app, timeout_s=30), head("/told"), body=False)
    assert isinstance(await stream.head(), ResponseHead)
    pieces = 400
    app.told.extend([b"x" * 65_536] * pieces)
    # Once the buffers of the system are full the app cannot go on.
    left = -1
    while left != len(app.told):
        left = len(app.told)
        await asyncio.sleep(0.5)
    assert left > pieces / 4
    await stream.close()


async def test_follows_no_redirect_and_keeps_no_cookie(app: App, upstreams: Upstreams) -> None:
    answer = await upstreams.fetch(behind(app), head("/moved"), b"", LIMIT)
    assert isinstance(answer, Fetched)
    assert answer.head.status == 302
    to = behind(app)
    await upstreams.fetch(to, head("/cookie"), b"", LIMIT)
    await upstreams.fetch(to, head("/ok"), b"", LIMIT)
    assert "cookie" not in app.heads[-1].lower()


async def test_asks_no_proxy_of_the_environment(
    app: App, upstreams: Upstreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    answer = await upstreams.fetch(behind(app), head("/ok"), b"", LIMIT)
    assert isinstance(answer, Fetched)


async def test_uses_connections_again(app: App, upstreams: Upstreams) -> None:
    to = behind(app)
    for _ in range(5):
        await upstreams.fetch(to, head("/ok"), b"", LIMIT)
    assert app.connections == 1


async def test_sends_the_target_as_it_is(app: App, upstreams: Upstreams) -> None:
    asked = head("/a%3Bb/$every/%252F", query="a=%2F&b=O%27B&c=|{}")
    await upstreams.fetch(behind(app), asked, b"", LIMIT)
    assert app.heads[-1].startswith("GET /a%3Bb/$every/%252F?a=%2F&b=O%27B&c=|{} HTTP/1.1\r\n")


@pytest.mark.parametrize("path", ["/a/../b", "/a/%2e%2e/b", "/a\\b", "/a/./b"])
async def test_refuses_a_path_that_the_library_would_change(
    app: App, upstreams: Upstreams, path: str
) -> None:
    answer = await upstreams.fetch(behind(app), head(path), b"", LIMIT)
    assert isinstance(answer, Failed)
    assert app.heads == []


@pytest.mark.parametrize(("preserve", "name"), [(True, "clinic.example"), (False, "127.0.0.1")])
async def test_the_app_gets_its_own_name_unless_it_wants_the_clients(
    app: App,
    upstreams: Upstreams,
    preserve: bool,  # noqa: FBT001
    name: str,
) -> None:
    to = behind(app, preserve_host=preserve)
    await upstreams.fetch(to, head("/ok", "GET", ("host", "evil.example")), b"", LIMIT)
    hosts = [one for one in app.heads[-1].lower().split("\r\n") if one.startswith("host:")]
    assert len(hosts) == 1
    assert name in hosts[0]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
async def test_an_empty_body_is_announced(app: App, upstreams: Upstreams, method: str) -> None:
    asked = head("/ok", method, ("content-length", "99"))
    answer = await upstreams.fetch(behind(app), asked, b"", LIMIT)
    assert isinstance(answer, Fetched)
    assert app.heads[-1].lower().count("content-length: 0") == 1


async def test_a_body_is_sent_whole(app: App, upstreams: Upstreams) -> None:
    asked = head("/ok", "POST", ("content-length", "99"), ("transfer-encoding", "chunked"))
    await upstreams.fetch(behind(app), asked, b"x" * 50_000, LIMIT)
    assert app.bodies == [b"x" * 50_000]
    assert "chunked" not in app.heads[-1]


async def test_head_has_no_body(app: App, upstreams: Upstreams) -> None:
    answer = await upstreams.fetch(behind(app), head("/ok", "HEAD"), b"", LIMIT)
    assert isinstance(answer, Fetched)
    assert (answer.body, answer.head.headers.get("content-length")) == (b"", "2")


# --- Bounds and codings ---------------------------------------------------------------------------


async def test_an_answer_larger_than_the_limit_is_a_failure(app: App, upstreams: Upstreams) -> None:
    for path in ("/ok", "/trailers"):
        answer = await upstreams.fetch(behind(app), head(path), b"", 1)
        assert isinstance(answer, Failed)
        assert answer.code == "gateway.upstream_content"


async def test_undoes_gzip(app: App, upstreams: Upstreams) -> None:
    answer = await upstreams.fetch(behind(app), head("/gzip"), b"", LIMIT)
    assert isinstance(answer, Fetched)
    assert answer.body == b"unpacked"
    assert answer.head.headers.get("content-encoding") is None


@pytest.mark.parametrize("path", ["/bomb", "/cut-gzip", "/brotli"])
async def test_a_bomb_a_cut_and_an_unknown_coding_are_failures(
    app: App, upstreams: Upstreams, path: str
) -> None:
    answer = await upstreams.fetch(behind(app), head(path), b"", LIMIT)
    assert isinstance(answer, Failed)
    assert answer.code == "gateway.upstream_content"


def test_unpacking_never_holds_more_than_the_limit() -> None:
    import tracemalloc

    bomb = gzip.compress(b"\0" * 30_000_000)
    tracemalloc.start()
    with pytest.raises(UpstreamContentError, match="larger than"):
        decode(bomb, "gzip", 1_000_000)
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()


def test_unpacks_several_members_and_both_kinds_of_deflate() -> None:
    assert decode(gzip.compress(b"a") + gzip.compress(b"b"), "gzip", 9) == b"ab"
    raw = zlib.compressobj(wbits=-15)
    assert decode(raw.compress(b"ab") + raw.flush(), "deflate", 9) == b"ab"
    assert decode(zlib.compress(b"ab"), "deflate", 9) == b"ab"


async def test_pieces_pass_with_their_coding(app: App, upstreams: Upstreams) -> None:
    asked = head("/gzip", "GET", ("accept-encoding", "gzip, br"))
    stream = await opened(upstreams, behind(app), asked, body=False)
    answer = await stream.head()
    assert isinstance(answer, ResponseHead)
    assert answer.headers.get("content-encoding") == "gzip"
    assert await read(stream) == gzip.compress(b"unpacked", mtime=0)
    assert "accept-encoding: gzip, br" in app.heads[-1].lower()
    await stream.close()


# --- Once or twice --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_what_changes_nothing_is_asked_again_once(
    app: App, upstreams: Upstreams, method: str
) -> None:
    answer = await upstreams.fetch(behind(app), head("/close-once", method), b"", LIMIT)
    assert isinstance(answer, Fetched)
    await upstreams.fetch(behind(app), head("/close", method), b"", LIMIT)
    assert len(app.heads) == 4


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("body", [b"", b"x"])
async def test_nothing_else_is_ever_sent_twice(
    app: App, upstreams: Upstreams, method: str, body: bytes
) -> None:
    answer = await upstreams.fetch(behind(app), head("/close-once", method), body, LIMIT)
    assert isinstance(answer, Failed)
    stream = await opened(upstreams, behind(app), head("/close", method), body=bool(body))
    if body:
        await stream.send(body)
        await stream.send(None)
    assert isinstance(await stream.head(), Failed)
    await stream.close()
    assert len(app.heads) == 2


async def test_what_timed_out_is_not_asked_again(app: App, upstreams: Upstreams) -> None:
    await upstreams.fetch(behind(app), head("/slow"), b"", LIMIT)
    await upstreams.fetch(behind(app), head("/half-body"), b"", LIMIT)
    assert len([one for one in app.heads if "/slow" in one]) == 1


# --- Bodies in pieces -----------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [(), (("content-length", "6"),)])
async def test_a_body_in_pieces_arrives_whole(
    app: App, upstreams: Upstreams, fields: tuple[tuple[str, str], ...]
) -> None:
    stream = await opened(upstreams, behind(app), head("/ok", "POST", *fields), body=True)
    for piece in (b"ab", b"", b"cd", b"ef", None):
        assert await stream.send(piece) in {Signal.DONE, Signal.END}
    assert isinstance(await stream.head(), ResponseHead)
    assert app.bodies == [b"abcdef"]
    assert await read(stream) == b"ok"
    await stream.close()


@pytest.mark.parametrize("fields", [(), (("content-length", "6"),)])
async def test_a_body_that_was_broken_off_never_looks_whole_to_the_app(
    app: App, upstreams: Upstreams, fields: tuple[tuple[str, str], ...]
) -> None:
    for waits in (0.0, 0.05):
        stream = await opened(upstreams, behind(app), head("/ok", "POST", *fields), body=True)
        await stream.send(b"abc")
        await asyncio.sleep(waits)
        await stream.close()
        await stream.close()
    await asyncio.sleep(0.1)
    assert all(one is None for one in app.bodies)


@pytest.mark.parametrize("pieces", [[b"abc", None], [b"abcdefg"]])
async def test_a_body_of_another_length_than_announced_is_a_failure(
    app: App, upstreams: Upstreams, pieces: list[bytes | None]
) -> None:
    asked = head("/ok", "POST", ("content-length", "6"))
    stream = await opened(upstreams, behind(app), asked, body=True)
    answers = [await stream.send(piece) for piece in pieces]
    assert isinstance(answers[-1], Failed)
    assert app.bodies in ([], [None])


async def test_an_app_that_answers_early_wants_no_more(app: App, upstreams: Upstreams) -> None:
    stream = await opened(upstreams, behind(app), head("/refused", "POST"), body=True)
    answer: Signal | Failed = Signal.DONE
    for _ in range(20):
        answer = await stream.send(b"x" * 1000)
        if answer is not Signal.DONE:
            break
        await asyncio.sleep(0.02)
    assert answer is Signal.END
    said = await stream.head()
    assert isinstance(said, ResponseHead)
    assert said.status == 413
    await stream.close()


async def test_an_app_that_reads_nothing_times_out_and_memory_stays_bounded(
    app: App, upstreams: Upstreams
) -> None:
    stream = await opened(upstreams, behind(app), head("/slow", "POST"), body=True)
    sent = 0
    answer: Signal | Failed = Signal.DONE
    while answer is Signal.DONE and sent < 200_000_000:
        answer = await stream.send(b"x" * 1_000_000)
        sent += 1_000_000
    assert isinstance(answer, Failed)
    assert answer.timed_out
    assert sent < 50_000_000
    await stream.close()


# --- What an operator reads -----------------------------------------------------------------------


async def test_says_that_nothing_listens(upstreams: Upstreams) -> None:
    to = route(f"http://127.0.0.1:{free_port()}")
    answer = await upstreams.fetch(to, head("/"), b"", LIMIT)
    assert isinstance(answer, Failed)
    assert answer.code == "gateway.upstream_unreachable"
    assert "is it running" in answer.message


async def test_says_that_the_name_is_not_found(upstreams: Upstreams) -> None:
    answer = await upstreams.fetch(route("http://nowhere.invalid"), head("/"), b"", LIMIT)
    assert isinstance(answer, Failed)
    assert "host name" in answer.message


async def test_says_that_nobody_accepts_in_time(upstreams: Upstreams) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        to = route(f"http://127.0.0.1:{full.getsockname()[1]}", connect_timeout_s=0.3)
        answer = await upstreams.fetch(to, head("/"), b"", LIMIT)
        for one in waiting:
            one.close()
    assert isinstance(answer, Failed)
    assert answer.timed_out
    assert "connected to in time" in answer.message


@pytest.mark.parametrize(
    ("name", "days", "trusted", "words"),
    [
        ("localhost", 1, True, None),
        ("localhost", 1, False, "not trusted"),
        ("localhost", -1, True, "expired"),
        ("other.example", 1, True, "another name"),
    ],
)
async def test_says_what_is_wrong_with_a_certificate(
    upstreams: Upstreams,
    tmp_path: Path,
    name: str,
    days: int,
    trusted: bool,  # noqa: FBT001
    words: str | None,
) -> None:
    files = certify(tmp_path, name=name, days=days)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    async with misbehaving(context) as app:
        ca_file = str(files.certificate) if trusted else ""
        to = route(f"https://localhost:{app.port}", ca_file=ca_file, timeout_s=3.0)
        answer = await upstreams.fetch(to, head("/ok"), b"", LIMIT)
    if words is None:
        assert isinstance(answer, Fetched)
    else:
        assert isinstance(answer, Failed)
        assert answer.code == "gateway.upstream_tls"
        assert words in answer.message
        assert app.heads == []


async def test_says_that_the_app_speaks_no_tls(app: App, upstreams: Upstreams) -> None:
    to = route(f"https://127.0.0.1:{app.port}", timeout_s=1.0, connect_timeout_s=0.5)
    answer = await upstreams.fetch(to, head("/ok"), b"", LIMIT)
    assert isinstance(answer, Failed)


async def test_no_message_holds_the_query(app: App, upstreams: Upstreams) -> None:
    for path in ("/close", "/short", "/slow", "/garbage"):
        asked = head(path, query="name=Secret")
        answer = await upstreams.fetch(behind(app), asked, b"", LIMIT)
        assert isinstance(answer, Failed)
        assert "Secret" not in repr(answer)


def test_a_ca_file_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    for name in ("empty.pem", "missing.pem"):
        with pytest.raises(GatewayConfigurationError, match="ca_file"):
            Upstreams([route("https://localhost", ca_file=str(tmp_path / name))])
