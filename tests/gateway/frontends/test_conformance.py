"""What both frontends must do alike: Granian's in front, and mitmproxy in reverse mode."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.gateway.frontends.conformance import PIECES, Standing, standing
from tests.gateway.frontends.test_ingress import eventually, get, read_to_end

SIGNED_IN = "Authorization: Bearer clinician"
CHUNKS = "Transfer-Encoding: chunked"
BROWSER = "Accept: text/html"
FHIR = "/fhir/Observation/"
DONE = ["allow", "success"]
DENIED = ["allow", "denied"]
REFUSED = ["deny", "denied"]
FAILED = ["allow", "failed"]


@pytest.fixture(scope="module", params=["ingress", "reverse"])
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Standing]:
    with standing(request.param, tmp_path_factory.mktemp(request.param)) as one:
        yield one


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`sent` in; `status`, `has`, `lacks` of the answer, `acts` of the log, `arrived` at the app.

    `whole`: whether the answer ended as it should; None for either.
    """

    sent: bytes
    status: int
    acts: list[str] = field(default_factory=list)
    has: tuple[bytes, ...] = ()
    lacks: tuple[bytes, ...] = ()
    arrived: int = 0
    whole: bool | None = True


def asked(path: str, *lines: str, method: str = "GET", body: bytes = b"") -> bytes:
    return get(path, SIGNED_IN, *lines, method=method, body=body)


CASES = {
    "an allowed read": Case(
        sent=asked(FHIR + "o1"), status=200, acts=DONE, arrived=1,
        has=(b"SECRET of the record", b"no-store", b"nosniff"), lacks=(b"leaky",),
    ),
    "a hidden record": Case(
        sent=asked(FHIR + "o2"), status=404, acts=DENIED, arrived=1,
        has=(b"OperationOutcome",), lacks=(b"SECRET",),
    ),
    "a denied read": Case(
        sent=asked("/fhir/Observation?patient=2"), status=403, acts=REFUSED,
        has=(b"OperationOutcome",),
    ),
    "nobody signed in, a program": Case(
        sent=get(FHIR + "o1"), status=401, acts=REFUSED, has=(b"www-authenticate: Bearer",),
    ),
    "nobody signed in, a browser": Case(
        sent=get("/app/ok", BROWSER), status=303, acts=REFUSED, has=(b"location: /.havengate/",),
    ),
    "a wrong token": Case(
        sent=get(FHIR + "o1", "Authorization: Bearer forged"), status=401, acts=REFUSED,
    ),
    "an error as problem details": Case(
        sent=asked("/nowhere"), status=404, has=(b"application/problem+json", b'"status":404'),
    ),
    "an error as a page": Case(
        sent=asked("/nowhere", BROWSER), status=404, has=(b"text/html", b"<h1>"),
    ),
    "fields of one hop, in the gateway's name": Case(
        sent=asked("/app/hops"), status=200, acts=DONE, arrived=1,
        lacks=(b"x-hop", b"havengate-identity", b"forged"),
    ),
    "a cookie in the gateway's name": Case(
        sent=asked("/app/cookies"), status=200, acts=DONE, arrived=1,
        has=(b"set-cookie: theirs=1",), lacks=(b"forged",),
    ),
    "a redirection to the app itself": Case(
        sent=asked("/app/away"), status=302, acts=DONE, arrived=1,
        has=(b"location: /app/there\r\n",), lacks=(b"127.0.0.1",),
    ),
    "a head": Case(
        sent=asked("/app/ok", method="HEAD"), status=200, acts=DONE, arrived=1,
        has=(b"content-length: 2",), lacks=(b"\r\n\r\nok",),
    ),
    "unchanged": Case(
        sent=asked("/app/unchanged"), status=304, acts=DONE, arrived=1, has=(b'etag: "1"',),
    ),
    "an answer in odd pieces": Case(
        sent=asked("/app/odd"), status=200, acts=DONE, arrived=1,
        has=(b"transfer-encoding: chunked",),
    ),
    "an app that is down": Case(sent=asked("/down/x"), status=502, acts=FAILED),
    "an app that is slow": Case(sent=asked("/app/slow"), status=504, acts=FAILED, arrived=1),
    "an app that breaks off before": Case(
        sent=asked("/app/half-head"), status=502, acts=FAILED, arrived=2
    ),
    "an app that breaks off in the middle": Case(
        sent=asked("/app/endless"), status=200, acts=DONE, arrived=1, whole=False,
    ),
    "an answer that is too large": Case(
        sent=asked("/app/too-much"), status=200, acts=DONE, arrived=1, whole=False,
    ),
    "an upgrade": Case(
        sent=asked("/app/ok", "Connection: upgrade", "Upgrade: websocket"), status=501, whole=None,
    ),
    "another Host in the target": Case(sent=asked("http://evil.example/app/ok"), status=400),
    "two Hosts": Case(sent=asked("/app/ok", "Host: evil.example"), status=400),
    "a body of the gateway's looking that announces too much": Case(
        sent=asked(FHIR, "Content-Length: 10000000", method="POST"), status=413,
        acts=REFUSED,
    ),
    "a body of the gateway's looking that turns out too large": Case(
        sent=asked(FHIR, CHUNKS, method="POST", body=b"30d40\r\n" + b"x" * 200_000 + b"\r\n"),
        status=413, acts=REFUSED,
    ),
    "an ambiguous path": Case(sent=asked("/app/%2e%2e/fhir/Observation/o2"), status=400),
    "a log without room for the intent": Case(
        sent=asked("/app/ok", "X-Test-Fail: intent"), status=503, lacks=(b"\r\n\r\nok",),
    ),
    "a log without room for the outcome": Case(
        sent=asked("/app/ok", "X-Test-Fail: outcome"), status=503, acts=["allow"], arrived=1,
        lacks=(b"\r\n\r\nok",),
    ),
    "a log without room for the outcome of a record": Case(
        sent=asked(FHIR + "o1", "X-Test-Fail: outcome"), status=503, acts=["allow"], arrived=1,
        lacks=(b"SECRET",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_both_frontends_give_the_same_answer_and_write_the_same_log(
    site: Standing, name: str
) -> None:
    case = CASES[name]
    said, heads = len(site.running.said()), len(site.behind.heads)
    with site.running.connect() as one:
        one.settimeout(10)
        one.sendall(case.sent)
        answer, whole = read_to_end(one)
    status = int(answer.split(b" ", 2)[1])
    assert status == case.status, answer
    head, _, body = answer.partition(b"\r\n\r\n")
    seen = head.lower() + b"\r\n\r\n" + body
    for part in case.has:
        low = part if part in seen else part.lower()
        assert low in seen, answer
    for part in case.lacks:
        assert part not in seen, answer
    assert case.whole in {None, whole}
    assert eventually(lambda: len(site.acts(said)) >= len(case.acts))
    assert site.acts(said) == case.acts
    assert len(site.behind.heads) - heads == case.arrived
    assert "Traceback" not in site.running.said()


def test_what_an_outsider_says_in_the_gateways_name_never_arrives(site: Standing) -> None:
    fields = ("Havengate-Identity: me", "X-Hop: 1", "Connection: x-hop", "Proxy-X: 1")
    with site.running.connect() as one:
        one.sendall(asked("/app/ok", *fields))
        assert b" 200 " in read_to_end(one)[0][:20]
    arrived = site.behind.heads[-1].lower()
    assert "havengate-identity: signed.statement.here" in arrived
    for part in (": me", "x-hop", "proxy-x", "authorization", "bearer"):
        assert part not in arrived


def test_a_request_behind_two_framings_is_never_carried_out(site: Standing) -> None:
    hidden = b"GET /app/hidden HTTP/1.1\r\nHost: localhost\r\n" + SIGNED_IN.encode() + b"\r\n\r\n"
    heads = len(site.behind.heads)
    for fields in (
        ("Content-Length: 6", CHUNKS),
        (CHUNKS, f"Content-Length: {5 + len(hidden)}"),
        ("Content-Length: 5", f"Content-Length: {5 + len(hidden)}"),
    ):
        lines = "".join(f"{line}\r\n" for line in (SIGNED_IN, *fields))
        first = f"POST /app/ok HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n0\r\n\r\n".encode()
        with site.running.connect() as one:
            one.settimeout(5)
            one.sendall(first + hidden)
            answer, _ = read_to_end(one)
        assert answer.count(b"HTTP/1.1 ") <= 1
    time.sleep(0.1)
    assert not [head for head in site.behind.heads[heads:] if "hidden" in head]


def test_nothing_after_an_early_refusal_is_carried_out(site: Standing) -> None:
    hidden = b"GET /app/hidden HTTP/1.1\r\nHost: localhost\r\n" + SIGNED_IN.encode() + b"\r\n\r\n"
    data = get("/app/ok", "Content-Length: 500", method="POST").replace(
        b"Connection: close\r\n", b""
    )
    heads = len(site.behind.heads)
    with site.running.connect() as one:
        one.settimeout(5)
        one.sendall(data + hidden)
        answer, _ = read_to_end(one)
    assert b" 401 " in answer[:20]
    time.sleep(0.1)
    assert len(site.behind.heads) == heads


@pytest.mark.parametrize("sizes", [(1,) * 50, (1, 70_000, 3, 65_536), (900_000,)])
@pytest.mark.parametrize("framed", ["length", "chunks"])
def test_an_upload_in_any_pieces_arrives_as_it_was_sent(
    site: Standing, sizes: tuple[int, ...], framed: str
) -> None:
    pieces = [bytes([65 + at % 26]) * size for at, size in enumerate(sizes)]
    body = b"".join(pieces)
    length = f"Content-Length: {len(body)}"
    with site.running.connect() as one:
        one.settimeout(10)
        one.sendall(asked("/app/ok", length if framed == "length" else CHUNKS, method="POST"))
        for piece in pieces:
            one.sendall(piece if framed == "length" else b"%x\r\n%s\r\n" % (len(piece), piece))
        if framed == "chunks":
            one.sendall(b"0\r\n\r\n")
        answer, _ = read_to_end(one)
    assert b" 200 " in answer[:20]
    assert site.behind.bodies[-1] == body


def test_an_upload_that_was_cut_never_looks_whole_to_the_app(site: Standing) -> None:
    said, bodies = len(site.running.said()), len(site.behind.bodies)
    acts = 0
    for framing, part in (("Content-Length: 10", b"abc"), (CHUNKS, b"3\r\nabc\r\n")):
        with site.running.connect() as one:
            one.sendall(asked("/app/ok", framing, method="POST", body=part))
            # Cut when it is under way.
            assert eventually(lambda: len(site.acts(said)) > acts)  # noqa: B023 - asked at once
            time.sleep(0.2)
        acts += 2
        assert eventually(lambda: len(site.acts(said)) >= acts)  # noqa: B023 - asked at once
    assert site.acts(said) == ["allow", "aborted"] * 2
    assert all(body is None for body in site.behind.bodies[bodies:])


def test_a_body_without_end_is_refused(site: Standing) -> None:
    said = len(site.running.said())
    with site.running.connect() as one:
        one.settimeout(10)
        one.sendall(asked("/app/ok", CHUNKS, method="POST"))
        piece = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
        sent = 0
        try:
            while sent < 20_000_000:
                one.sendall(piece)
                sent += len(piece)
        except OSError:
            pass
    assert sent < 20_000_000
    assert eventually(lambda: site.acts(said) == FAILED)


def unchunked(raw: bytes) -> bytes:
    """As much content as there is in a part of a chunked body."""
    body = b""
    while b"\r\n" in raw:
        size, _, raw = raw.partition(b"\r\n")
        body += raw[: int(size, 16)]
        raw = raw[int(size, 16) + 2 :]
    return body


def test_an_answer_in_odd_pieces_is_the_same_bytes(site: Standing) -> None:
    with site.running.connect() as one:
        one.sendall(asked("/app/odd"))
        raw = read_to_end(one)[0].partition(b"\r\n\r\n")[2]
    assert unchunked(raw) == b"x" * sum(range(1, PIECES))


def test_a_slow_answer_passes_as_it_comes(site: Standing) -> None:
    said = len(site.running.said())
    with site.running.connect() as one:
        one.settimeout(30)
        one.sendall(asked("/told"))
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += one.recv(100_000) or pytest.fail("cut off")
        assert answer.startswith(b"HTTP/1.1 200")
        assert eventually(lambda: site.acts(said) == DONE)
        told = b""
        for piece in (b"data: first\n\n", b"data: second\n\n", b"x" * 100_000, b"!"):
            site.behind.told.append(piece)
            told += piece
            # Nothing more is told before this has arrived.
            while unchunked(answer.partition(b"\r\n\r\n")[2]) != told:
                answer += one.recv(100_000) or pytest.fail("cut off")
        site.behind.told.append(b"")
        assert read_to_end(one)[1]


def test_a_client_that_goes_away_is_in_the_log(site: Standing) -> None:
    said = len(site.running.said())
    with site.running.connect() as one:
        one.sendall(asked("/app/slow"))
        time.sleep(0.2)
    assert eventually(lambda: len(site.acts(said)) == 2)


def test_a_connection_is_used_again(site: Standing) -> None:
    again = asked("/app/ok").replace(b"Connection: close\r\n", b"")
    with site.running.connect() as one:
        one.settimeout(5)
        for _ in range(3):
            one.sendall(again)
            answer = b""
            while not answer.endswith(b"\r\n\r\nok"):
                answer += one.recv(10_000)
            assert answer.startswith(b"HTTP/1.1 200")
        one.sendall(again + asked("/app/ok"))
        assert read_to_end(one)[0].count(b"HTTP/1.1 200") == 2


def test_neither_credentials_nor_records_are_in_what_the_program_says(site: Standing) -> None:
    with site.running.connect() as one:
        one.sendall(asked(FHIR + "o1?_secret=QUERYSECRET"))
        read_to_end(one)
    said = site.running.said()
    for secret in ("Bearer clinician", "SECRET of the record", "QUERYSECRET"):
        assert secret not in said
