"""The way out, for real: mitmproxy, TLS to both sides, certificates from OpenBao."""

from __future__ import annotations

import asyncio
import http.client
import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import orjson
import pytest
import structlog

from audit.errors import AuditError
from gateway.errors import GatewayConfigurationError
from gateway.settings import DestinationSettings
from keys.vault import VaultClient
from tests.gateway.frontends.outside import Bench, bench, free_port, make_authority, outside_host
from tests.openbao import wait_until


class Shared:
    """A bench that most tests share. One proxy runs in a process: it makes way for others."""

    def __init__(self, make: Callable[[], AbstractContextManager[Bench]]) -> None:
        self._make = make
        self._held = ExitStack()
        self._bench: Bench | None = None

    def open(self) -> Bench:
        if self._bench is None:
            self._bench = self._held.enter_context(self._make())
        return self._bench

    def close(self) -> None:
        self._bench = None
        self._held.close()


@pytest.fixture(scope="module")
def shared(
    vault: Callable[[str], VaultClient], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    made = Shared(
        lambda: bench(tmp_path_factory.mktemp("way-out"), vault("gateway"), timeout_s=2.0)
    )
    yield made
    made.close()


@pytest.fixture
def alone(shared: Shared) -> None:
    """For tests with a proxy of their own."""
    shared.close()


@pytest.fixture
def way_out(shared: Shared) -> Iterator[Bench]:
    """The shared bench, with nothing remembered."""
    made = shared.open()
    made.idle()
    made.log.before = lambda _stage: None
    made.log.memory.held.clear()
    made.log.memory.fail = None
    made.tape.events.clear()
    for host in (made.outside, made.plain):
        host.requests.clear()
        host.connections = 0
    made.summaries.clear()
    yield made
    assert made.proxy.alive


def untouched(way_out: Bench) -> bool:
    """Whether nothing at all reached anybody outside."""
    return way_out.outside.connections == 0 and way_out.plain.connections == 0


def tunnel_status(way_out: Bench, **where: Any) -> int:
    with pytest.raises(OSError, match="Tunnel connection failed") as refused:
        way_out.call(**where)
    return int(str(refused.value).split(": ")[1].split()[0])


# --- What passes ----------------------------------------------------------------------------------


def test_a_listed_call_passes_between_its_intent_and_its_outcome(way_out: Bench) -> None:
    status, headers, body = way_out.call("POST", "/results?patient=7", body=b"hello")
    assert (status, body) == (200, b"the answer: hello")
    assert headers["x-outside"] == "yes"
    assert way_out.tape.events == [
        "intent:allow",
        "outside:connection",
        "outside:request",
        "outcome:success",
    ]
    method, path, sent, received = way_out.outside.requests[0]
    assert (method, path, received) == ("POST", "/results?patient=7", b"hello")
    assert sent["host"] == f"lab.example.org:{way_out.outside.port}"
    assert not any(name.lower().startswith("proxy-") for name in sent)
    intent, outcome = way_out.log.entries
    assert intent.actor.name == "ehr"
    assert intent.purpose == "TREAT"
    assert intent.rules == ("outbound.listed",)
    assert intent.details["host"] == "lab.example.org"
    assert (outcome.status, outcome.bytes_in, outcome.bytes_out) == (200, 5, 17)


@pytest.mark.parametrize("size", [0, 1, 65_536, 900_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_any_size_and_framing_passes_unchanged(
    way_out: Bench, size: int, *, chunked: bool
) -> None:
    body = bytes(range(256)) * (size // 256) + b"z" * (size % 256)
    pieces = [body[place : place + 7_000] for place in range(0, len(body), 7_000)]
    headers = {"Transfer-Encoding": "chunked"} if chunked else {}
    status, _, answer = way_out.call(
        "POST", "/", body=iter(pieces) if chunked else body, headers=headers, chunked=chunked
    )
    assert status == 200
    assert answer == b"the answer: " + body
    way_out.quiet()
    assert way_out.log.entries[-1].bytes_in == size


def test_several_calls_of_one_connection_are_logged_one_by_one(way_out: Bench) -> None:
    connection = way_out.connect()
    for number in range(3):
        connection.request("GET", f"/{number}")
        assert connection.getresponse().read() == b"the answer: "
    connection.close()
    assert way_out.tape.events.count("outside:connection") == 1
    assert [entry.stage for entry in way_out.log.entries] == ["intent", "outcome"] * 3


def test_nothing_is_kept_of_a_connection_that_has_ended(way_out: Bench) -> None:
    for _ in range(3):
        assert way_out.call("POST", "/", body=b"x")[0] == 200
    way, master = way_out.proxy._way, way_out.proxy._master
    assert master is not None
    wait_until(lambda: not master.proxyserver.connections, timeout_s=10)
    wait_until(lambda: not (master.guard.leads or way._calls or way._tunnels or way.replies))


def test_a_host_below_a_wildcard_passes_and_its_own_labels_are_not_logged(way_out: Bench) -> None:
    status, _, _ = way_out.call(host="a.mail.example.net", app="forum")
    assert status == 200
    assert way_out.log.entries[0].details["host"] == "example.net"


def test_an_answer_without_a_body_passes(way_out: Bench) -> None:
    assert way_out.call("HEAD", "/")[0] == 200
    way_out.quiet()
    assert len(way_out.summaries) == 1


def test_an_answer_that_comes_before_the_body_has_left_passes(way_out: Bench) -> None:
    status, _, _ = way_out.call("POST", "/early", body=b"x" * 300_000)
    assert status == 413
    way_out.quiet()
    assert way_out.log.entries[-1].outcome == "failed"


def test_the_certificate_shown_is_for_one_host_from_an_authority_that_vault_keeps(
    way_out: Bench, vault: Callable[[str], VaultClient]
) -> None:
    connection = way_out.connect()
    connection.connect()
    assert isinstance(connection.sock, ssl.SSLSocket)
    shown = connection.sock.getpeercert()
    connection.close()
    assert shown is not None
    assert shown["subjectAltName"] == (("DNS", "lab.example.org"),)
    gateway = vault("gateway")
    known = gateway.call("GET", f"{gateway.layout.outbound_pki}/cert/ca")["data"]["certificate"]
    assert way_out.authority.read_text().strip() == known.strip()
    kept = [path.name for path in way_out.authority.parent.iterdir()]
    assert kept == ["ca.pem"]


# --- Who ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("app", "key"),
    [(None, None), ("ehr", "wrong"), ("ehr", ""), ("nobody", "wrong"), ("", ""), ("forum", "ehr")],
)
def test_nobody_calls_without_an_apps_own_key(
    way_out: Bench, app: str | None, key: str | None
) -> None:
    shown = way_out.keys.get(key or "", key)
    assert tunnel_status(way_out, app=app, key=shown) == 407
    assert untouched(way_out)
    assert way_out.tape.events == ["intent:deny", "outcome:denied"]


def test_the_refusal_of_credentials_says_what_to_show(way_out: Bench) -> None:
    target = f"lab.example.org:{way_out.outside.port}"
    raw = way_out.exchange(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"407" in head.splitlines()[0]
    assert b'proxy-authenticate: Basic realm="havengate"' in head
    assert b"application/problem+json" in head
    assert orjson.loads(body)["status"] == 407


def test_one_app_cannot_use_what_is_listed_for_another(way_out: Bench) -> None:
    assert tunnel_status(way_out, app="forum") == 403
    assert untouched(way_out)


def test_an_app_calls_for_its_own_purpose_only(way_out: Bench) -> None:
    assert tunnel_status(way_out, host="a.mail.example.net", app="ehr") == 403
    assert untouched(way_out)


# --- Where to -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "other.example.com",
        "example.org",
        "lab.example.org.other.example.com",
        "xlab.example.org",
        "mail.example.net",
        "127.0.0.1",
        "localhost",
        "169.254.169.254",
        "[::1]",
        "[::ffff:127.0.0.1]",
    ],
)
def test_a_host_that_is_not_listed_is_never_called(way_out: Bench, host: str) -> None:
    port = way_out.outside.port
    credentials = way_out.credentials("ehr")["Proxy-Authorization"]
    raw = way_out.exchange(
        f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n"
        f"Proxy-Authorization: {credentials}\r\n\r\n".encode()
    )
    assert b" 403 " in raw.splitlines()[0]
    assert untouched(way_out)
    assert way_out.tape.events == ["intent:deny", "outcome:denied"]


@pytest.mark.parametrize(
    "host", ["lab.example.org.", "127.1", "0x7f.1", "2130706433", "lab.example.org%00", "läb.de"]
)
def test_a_host_in_a_second_spelling_is_refused(way_out: Bench, host: str) -> None:
    port = way_out.outside.port
    credentials = way_out.credentials("ehr")["Proxy-Authorization"]
    raw = way_out.exchange(
        f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n"
        f"Proxy-Authorization: {credentials}\r\n\r\n".encode()
    )
    assert b" 200 " not in raw[:20]
    assert untouched(way_out)


def test_a_listed_host_on_another_port_is_refused(way_out: Bench) -> None:
    assert tunnel_status(way_out, port=free_port()) == 403


@pytest.mark.parametrize(
    ("server_name", "host"),
    [
        ("lab.example.org", "a.mail.example.net"),
        ("a.mail.example.net", "lab.example.org"),
        ("lab.example.org", "lab.example.org:1"),
    ],
)
def test_tunnel_server_name_and_host_header_must_agree(
    way_out: Bench, server_name: str, host: str
) -> None:
    raw = tunnelled(way_out, server_name, f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")
    assert raw.startswith(b"HTTP/1.1 421 ")
    assert untouched(way_out)
    assert way_out.tape.events == ["intent:deny", "outcome:denied"]


def tunnelled(way_out: Bench, server_name: str | None, request: str) -> bytes:
    """Send a request through a tunnel for lab.example.org, with any server name and any head."""
    context = ssl.create_default_context(cafile=str(way_out.authority))
    context.check_hostname = False
    with socket.create_connection(("127.0.0.1", way_out.port), timeout=10) as raw:
        target = f"lab.example.org:{way_out.outside.port}"
        credentials = way_out.credentials("ehr")["Proxy-Authorization"]
        raw.sendall(
            f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"
            f"Proxy-Authorization: {credentials}\r\n\r\n".encode()
        )
        assert b" 200 " in raw.recv(4_096)
        with context.wrap_socket(raw, server_hostname=server_name) as secure:
            secure.sendall(request.encode())
            received = bytearray()
            try:
                while piece := secure.recv(65_536):
                    received += piece
            except (OSError, TimeoutError):
                pass
            return bytes(received)


# --- In clear -------------------------------------------------------------------------------------


def test_nothing_leaves_in_clear(way_out: Bench) -> None:
    target = f"lab.example.org:{way_out.plain.port}"
    credentials = way_out.credentials("ehr")["Proxy-Authorization"]
    raw = way_out.exchange(
        f"GET http://{target}/x HTTP/1.1\r\nHost: {target}\r\n"
        f"Proxy-Authorization: {credentials}\r\n\r\n".encode()
    )
    assert b" 403 " in raw.splitlines()[0]
    assert b"not encrypted" in raw
    assert untouched(way_out)


def test_nothing_leaves_in_clear_through_a_tunnel(way_out: Bench) -> None:
    target = f"lab.example.org:{way_out.plain.port}"
    credentials = way_out.credentials("ehr")["Proxy-Authorization"]
    with socket.create_connection(("127.0.0.1", way_out.port), timeout=10) as raw:
        raw.sendall(
            f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"
            f"Proxy-Authorization: {credentials}\r\n\r\n".encode()
        )
        assert b" 200 " in raw.recv(4_096)
        raw.sendall(f"GET / HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        assert b" 403 " in raw.recv(4_096)
    assert untouched(way_out)


def test_a_request_in_absolute_form_leaves_over_tls(way_out: Bench) -> None:
    target = f"lab.example.org:{way_out.outside.port}"
    credentials = way_out.credentials("ehr")["Proxy-Authorization"]
    raw = way_out.exchange(
        f"GET https://{target}/x HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n"
        f"Proxy-Authorization: {credentials}\r\n\r\n".encode()
    )
    assert raw.startswith(b"HTTP/1.1 200 ")
    assert "Proxy-Authorization" not in way_out.outside.requests[0][2]


# --- Other protocols ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        b"\x00\x01\x02\x03",
        b"SSH-2.0-x\r\n",
        b"\x16\x03\x01\x00\x05hello",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_not_http_1_never_leaves(way_out: Bench, first: bytes) -> None:
    assert b" 200 " not in way_out.exchange(first, timeout_s=0.5)
    target = f"lab.example.org:{way_out.outside.port}"
    credentials = way_out.credentials("ehr")["Proxy-Authorization"]
    opening = (
        f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nProxy-Authorization: {credentials}\r\n\r\n"
    ).encode()
    way_out.exchange(opening + first, timeout_s=0.5)
    assert untouched(way_out)


def test_an_upgrade_is_refused(way_out: Bench) -> None:
    status, _, body = way_out.call(
        headers={
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
        }
    )
    assert status == 501
    assert orjson.loads(body)["status"] == 501
    assert untouched(way_out)


@pytest.mark.parametrize(
    "head",
    [
        "GET / HTTP/1.1\r\nHost: {t}\r\nHost: {t}\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: {t}\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        "PUT / HTTP/1.1\r\nHost: {t}\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
        "POST / HTTP/1.1\r\nHost: {t}\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "TRACE / HTTP/1.1\r\nHost: {t}\r\n\r\n",
        "CONNECT {t} HTTP/1.1\r\nHost: {t}\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_a_request_that_can_be_read_in_two_ways_never_leaves(way_out: Bench, head: str) -> None:
    target = f"lab.example.org:{way_out.outside.port}"
    answer = tunnelled(way_out, "lab.example.org", head.format(t=target))
    assert b" 200 " not in answer[:20]
    assert way_out.outside.requests == []


# --- Sizes ----------------------------------------------------------------------------------------


def test_a_body_that_says_it_is_too_large_never_leaves(way_out: Bench) -> None:
    connection = way_out.connect()
    connection.putrequest("POST", "/")
    connection.putheader("Content-Length", "1000001")
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    assert untouched(way_out)


def test_a_body_that_turns_out_too_large_is_cut_off(way_out: Bench) -> None:
    pieces = iter([b"x" * 50_000] * 30)
    with pytest.raises((OSError, http.client.HTTPException)):
        way_out.call(
            "POST", "/", body=pieces, headers={"Transfer-Encoding": "chunked"}, chunked=True
        )
    way_out.quiet()
    assert way_out.outside.requests == []
    assert way_out.log.entries[-1].outcome == "failed"


def test_an_answer_that_turns_out_too_large_looks_cut_off(way_out: Bench) -> None:
    with pytest.raises((http.client.IncompleteRead, OSError)):
        way_out.call(path="/large/5000000")


def test_a_large_answer_passes_in_pieces(way_out: Bench) -> None:
    assert way_out.call(path="/large/999000")[2] == b"x" * 999_000


def test_heads_without_end_are_not_kept(way_out: Bench) -> None:
    with socket.create_connection(("127.0.0.1", way_out.port), timeout=1) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n")
        sent = 0
        with pytest.raises((TimeoutError, ConnectionError)):  # noqa: PT012 - which piece is no matter
            for _ in range(2_000):
                raw.sendall(b"x: " + b"y" * 60_000 + b"\r\n")
                sent += 60_000
        assert sent < 30_000_000


# --- The log --------------------------------------------------------------------------------------


class UnwritableError(AuditError):
    code = "audit.unavailable"


def fails_at(stage: str) -> Callable[[str], Any]:
    def fail(now: str) -> None:
        if now == stage:
            raise UnwritableError("no log")

    return fail


def test_nothing_leaves_without_a_durable_intent(way_out: Bench) -> None:
    way_out.log.before = fails_at("intent")
    status, _, body = way_out.call("POST", "/", body=b"secret")
    assert status == 503
    assert orjson.loads(body)["status"] == 503
    assert untouched(way_out)


def test_nothing_comes_back_without_a_durable_outcome(way_out: Bench) -> None:
    way_out.log.before = fails_at("outcome")
    status, headers, body = way_out.call("POST", "/", body=b"secret")
    assert status == 503
    assert "x-outside" not in headers
    assert b"answer:" not in body
    assert len(way_out.outside.requests) == 1


def test_a_bodiless_answer_does_not_come_back_without_a_durable_outcome(way_out: Bench) -> None:
    way_out.log.before = fails_at("outcome")
    status, headers, _ = way_out.call("HEAD", "/")
    assert status == 503
    assert "x-outside" not in headers


@pytest.mark.parametrize("stage", ["intent", "outcome"])
def test_nothing_passes_while_the_log_is_slow(way_out: Bench, stage: str) -> None:
    seen: list[tuple[int, bytes]] = []

    def wait(now: str) -> Any:
        async def pause() -> None:
            await asyncio.sleep(0.3)
            seen.append((way_out.outside.connections, b""))

        return pause() if now == stage else None

    way_out.log.before = wait
    connection = way_out.connect()
    connection.request("POST", "/", body=b"x" * 600_000)
    assert connection.getresponse().read() == b"the answer: " + b"x" * 600_000
    connection.close()
    assert seen[0][0] == (0 if stage == "intent" else 1)


def test_a_log_that_never_answers_lets_nothing_out(way_out: Bench) -> None:
    async def never() -> None:
        await asyncio.sleep(60)

    way_out.log.before = lambda stage: never() if stage == "intent" else None
    status, _, _ = way_out.call("POST", "/", body=b"secret")
    assert status == 503
    assert untouched(way_out)


def test_neither_credentials_nor_queries_are_in_any_log(
    way_out: Bench, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "ada-lovelace-1815"
    caplog.set_level(logging.DEBUG)
    with structlog.testing.capture_logs() as lines:
        way_out.call("POST", f"/{secret}?q={secret}", body=secret.encode(), headers={"x": secret})
        way_out.call(path=f"/drop?{secret}", headers={"x": secret})
        tunnel_status(way_out, key=secret)
        tunnel_status(way_out, host=f"{secret}.evil.example")
        way_out.exchange(f"GET /{secret} HTTP/1.1\r\n{secret}".encode(), timeout_s=1)
        way_out.exchange(f"BROKEN {secret}\r\n\r\n".encode(), timeout_s=1)
    written = capsys.readouterr()
    everything = repr(lines) + caplog.text + written.out + written.err + way_out.log.text
    assert secret not in everything
    assert way_out.keys["ehr"] not in everything
    assert repr(way_out.summaries).count(secret) == 0


# --- The outside breaks ---------------------------------------------------------------------------


def test_a_host_that_breaks_off_is_a_bad_gateway(way_out: Bench) -> None:
    status, headers, body = way_out.call(path="/drop")
    assert status == 502
    assert headers["content-type"] == "application/problem+json"
    assert orjson.loads(body)["status"] == 502
    way_out.quiet()
    assert way_out.log.entries[-1].outcome == "failed"


def test_an_app_that_goes_away_leaves_no_open_intent(way_out: Bench) -> None:
    for request in ("GET /slow HTTP/1.1", "POST /slow HTTP/1.1\r\nContent-Length: 10"):
        connection = way_out.connect()
        connection.connect()
        target = f"lab.example.org:{way_out.outside.port}"
        assert connection.sock is not None
        connection.sock.sendall(f"{request}\r\nHost: {target}\r\n\r\n".encode())
        wait_until(lambda: "intent:allow" in way_out.tape.events)
        connection.sock.close()
        connection.close()
        way_out.quiet()
        assert way_out.log.entries[-1].outcome in {"failed", "aborted"}
        way_out.tape.events.clear()


# --- Benches of their own -------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_a_host_that_is_down_is_a_bad_gateway_and_one_that_is_slow_a_time_out(
    vault: Callable[[str], VaultClient], tmp_path: Path
) -> None:
    down = free_port()

    def listed(port: int, _plain: int) -> tuple[DestinationSettings, ...]:
        return tuple(
            DestinationSettings(host="lab.example.org", port=one, purposes=("TREAT",))
            for one in (port, down)
        )

    with bench(tmp_path, vault("gateway"), listed=listed, timeout_s=1.0) as made:
        status, _, body = made.call(port=down)
        assert status == 502
        assert orjson.loads(body)["status"] == 502
        status, _, body = made.call(path="/slow")
        assert status == 504
        assert orjson.loads(body)["status"] == 504
        made.quiet()
        assert [entry.outcome for entry in made.log.entries if entry.stage == "outcome"] == [
            "failed",
            "failed",
        ]


@pytest.mark.usefixtures("alone")
def test_a_host_whose_certificate_is_for_another_is_not_called(
    vault: Callable[[str], VaultClient], tmp_path: Path
) -> None:
    with bench(tmp_path, vault("gateway"), names=("other.example.com",)) as made:
        status, _, _ = made.call("POST", "/", body=b"secret")
        assert status == 502
        assert made.outside.requests == []
        assert made.log.entries[-1].reason == "gateway.upstream_untrusted"


@pytest.mark.usefixtures("alone")
def test_a_host_whose_authority_is_not_trusted_is_not_called(
    vault: Callable[[str], VaultClient], tmp_path: Path
) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    ca_file, _ = make_authority(stranger)
    with bench(tmp_path, vault("gateway"), ca_file=str(ca_file)) as made:
        status, _, _ = made.call("POST", "/", body=b"secret")
        assert status == 502
        assert made.outside.requests == []


@pytest.mark.usefixtures("alone")
def test_a_port_that_is_taken_is_told_at_the_start(
    vault: Callable[[str], VaultClient], tmp_path: Path
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(GatewayConfigurationError, match=r"gateway\.outbound\.port"),
        bench(tmp_path, vault("gateway"), port=taken.getsockname()[1]),
    ):
        pass
    with bench(tmp_path, vault("gateway")) as made:
        assert made.call()[0] == 200


def test_a_second_proxy_in_a_process_is_refused(
    vault: Callable[[str], VaultClient], tmp_path: Path, way_out: Bench
) -> None:
    with (
        pytest.raises(GatewayConfigurationError, match="no other mitmproxy"),
        bench(tmp_path, vault("gateway")),
    ):
        pass
    assert way_out.call()[0] == 200


@pytest.mark.usefixtures("alone")
def test_without_vault_no_certificate_and_no_call(
    vault: Callable[[str], VaultClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench(tmp_path, vault("gateway")) as made:
        monkeypatch.setattr(
            type(made.proxy.leaves), "_issue", lambda *_: (_ for _ in ()).throw(OSError("down"))
        )
        with pytest.raises((OSError, http.client.HTTPException)):
            made.call()
        assert made.outside.connections == 0


def test_no_certificate_is_asked_for_a_host_that_is_not_listed(way_out: Bench) -> None:
    with pytest.raises(GatewayConfigurationError):
        way_out.proxy.leaves.ensure("other.example.com")


@pytest.mark.usefixtures("alone")
def test_stopping_ends_what_is_under_way_in_the_log(
    vault: Callable[[str], VaultClient], tmp_path: Path
) -> None:
    with bench(tmp_path, vault("gateway")) as made:
        connection = made.connect()
        connection.request("GET", "/slow")
        wait_until(lambda: "outside:request" in made.tape.events)
        made.proxy.close()
        assert not made.proxy.alive
        with pytest.raises((OSError, http.client.HTTPException)):
            connection.getresponse()
        connection.close()
        assert [entry.stage for entry in made.log.entries] == ["intent", "outcome"]


def test_another_host_is_never_reached_over_an_open_connection(way_out: Bench) -> None:
    with outside_host(way_out.tape, None) as other:
        raw = tunnelled(
            way_out,
            "lab.example.org",
            f"GET https://lab.example.org:{other.port}/ HTTP/1.1\r\n"
            f"Host: lab.example.org:{other.port}\r\n\r\n",
        )
        assert b" 200 " not in raw[:20]
        assert other.connections == 0
    time.sleep(0)
