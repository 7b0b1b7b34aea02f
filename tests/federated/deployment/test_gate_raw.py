"""Past the gate by the form of a request: over a raw socket, with all proofs that there are.

Each call carries the coordinator's certificate and secret and an approved study. What comes in any
form but one is answered with a refusal, and starts nothing.
"""

from __future__ import annotations

import base64
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import pytest
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab

from federated.app.bundle import installed_bundle
from federated.coordinator import link_access
from federated.deployment.gate import START_RUN, STUDY_HEADER
from tests.federated.deployment.federation import Running

STUDY = STUDY_HEADER.decode()


@dataclass
class Call:
    """A request, part by part."""

    body: bytes
    headers: list[tuple[str, str]]
    line: str = f"POST {START_RUN} HTTP/1.1"
    trailers: list[tuple[str, str]] = field(default_factory=list)
    chunks: list[int] | None = None

    def without(self, name: str) -> str:
        """Take a header out; return its value."""
        (value,) = [text for key, text in self.headers if key == name]
        self.headers = [pair for pair in self.headers if pair[0] != name]
        return value

    def encode(self) -> bytes:
        lines = [self.line, *(f"{name}: {value}" for name, value in self.headers)]
        body = self.body
        if self.chunks is None:
            lines.append(f"content-length: {len(body)}")
        else:
            lines.append("transfer-encoding: chunked")
            body = self._chunked(self.chunks)
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body

    def _chunked(self, sizes: list[int]) -> bytes:
        out, rest = b"", self.body
        for size in [*sizes, len(self.body)]:
            part, rest = rest[:size], rest[size:]
            if part:
                out += f"{len(part):x}\r\n".encode() + part + b"\r\n"
        ends = "".join(f"{name}: {value}\r\n" for name, value in self.trailers)
        return out + b"0\r\n" + ends.encode() + b"\r\n"


@pytest.fixture
def call(federation: Running) -> Call:
    bundle, signed = installed_bundle(), federation.approved()
    request = StartRunRequest(
        fab=Fab(hash_str=bundle.hash, content=bundle.content),
        override_config=user_config_to_proto(dict(signed.study.run_configuration())),
    )
    return Call(
        request.SerializeToString(deterministic=True),
        [
            ("host", "localhost"),
            ("content-type", "application/protobuf"),
            ("accept", "application/protobuf"),
            ("authorization", f"Bearer {federation.places.control_secret.read_bytes().hex()}"),
            ("x-flwr-none", "1"),
            (STUDY, base64.b64encode(signed.encode()).decode()),
        ],
    )


@pytest.fixture
def wire(federation: Running) -> Iterator[ssl.SSLSocket]:
    address = f"127.0.0.1:{federation.federation.ports.http}"
    context = link_access(federation.places, address=address).tls()
    plain = socket.create_connection(("127.0.0.1", federation.federation.ports.http), timeout=60)
    with closing(context.wrap_socket(plain, server_hostname="localhost")) as secured:
        yield secured


def status(wire: ssl.SSLSocket, data: bytes) -> int:
    """The status of the answer, 0 where the connection was closed instead."""
    wire.sendall(data)
    head = b""
    while b"\r\n" not in head:
        more = wire.recv(4096)
        if not more:
            return 0
        head += more
    return int(head.split()[1])


def test_the_call_itself_passes_the_gate(call: Call, wire: ssl.SSLSocket) -> None:
    """Else nothing below would show anything. Flower then looks at its own headers."""
    assert status(wire, call.encode()) not in {0, 401, 403, 404, 413}


def test_a_chunked_call_is_read_whole(call: Call, wire: ssl.SSLSocket) -> None:
    call.chunks = [1, 7, 100]
    assert status(wire, call.encode()) not in {0, 401, 403, 404, 413}


@pytest.mark.parametrize(
    "line",
    [
        f"POST /{START_RUN} HTTP/1.1",
        "POST /v1/control%2Fstart-run HTTP/1.1",
        "POST /v1/control/start%2drun HTTP/1.1",
        "POST /v1/control/../control/start-run HTTP/1.1",
        "POST /v1/./control/start-run HTTP/1.1",
        f"POST {START_RUN}/ HTTP/1.1",
        f"POST {START_RUN}?x=1 HTTP/1.1",
        f"POST {START_RUN};x HTTP/1.1",
        f"POST {START_RUN}%00 HTTP/1.1",
        f"POST {START_RUN.upper()} HTTP/1.1",
        f"POST {START_RUN} HTTP/1.0",
        f"PUT {START_RUN} HTTP/1.1",
        f"post {START_RUN} HTTP/1.1",
        f"PoSt {START_RUN} HTTP/1.1",
        f"GET {START_RUN} HTTP/1.1",
        "PRI * HTTP/2.0",
    ],
)
def test_a_call_by_another_name_is_not_served(call: Call, wire: ssl.SSLSocket, line: str) -> None:
    call.line = line
    assert status(wire, call.encode()) in {0, 400, 404, 405}


@pytest.mark.parametrize(
    "more",
    [
        ("content-encoding", "gzip"),
        ("content-encoding", "identity"),
        ("content-encoding", ""),
        ("Content-Encoding", "gzip"),
        ("grpc-encoding", "gzip"),
        ("content-type", "application/json"),
        ("content-type", "application/protobuf"),
        ("authorization", "Bearer x"),
        (STUDY, ""),
    ],
)
@pytest.mark.parametrize("times", [1, 2])
def test_a_header_that_could_be_read_in_two_ways_is_read_in_none(
    call: Call, wire: ssl.SSLSocket, more: tuple[str, str], times: int
) -> None:
    call.headers += [more] * times
    assert status(wire, call.encode()) in {401, 404}


@pytest.mark.parametrize("name", ["authorization", STUDY, "content-type"])
def test_what_stands_behind_the_body_proves_nothing(
    call: Call, wire: ssl.SSLSocket, name: str
) -> None:
    value = call.without(name)
    call.chunks, call.trailers = [], [(name, value)]
    assert status(wire, call.encode()) in {0, 400, 401, 403, 404}


@pytest.mark.parametrize("name", ["authorization", STUDY, "content-type"])
@pytest.mark.parametrize(
    "alike", [lambda n: n.replace("-", "_"), lambda n: f"{n} ", lambda n: f" {n}"]
)
def test_a_header_of_nearly_the_name_proves_nothing(
    call: Call, wire: ssl.SSLSocket, name: str, alike: Callable[[str], str]
) -> None:
    value = call.without(name)
    if alike(name) != name:
        call.headers.append((alike(name), value))
    assert status(wire, call.encode()) in {0, 400, 401, 403, 404}


@pytest.mark.parametrize(
    "more",
    [
        ("transfer-encoding", "chunked"),
        ("transfer-encoding", "gzip"),
        ("content-length", "5"),
        ("content-length", "+5"),
    ],
)
def test_a_body_of_two_lengths_is_refused(
    call: Call, wire: ssl.SSLSocket, more: tuple[str, str]
) -> None:
    call.headers.append(more)
    assert status(wire, call.encode()) in {0, 400, 404}


@pytest.mark.parametrize(
    ("path", "size", "refused"),
    [(START_RUN, 2 << 20, 413), ("/v1/control/list-nodes", 1 << 20, 413)],
)
def test_a_body_larger_than_any_is_not_kept(
    call: Call, wire: ssl.SSLSocket, path: str, size: int, refused: int
) -> None:
    call.line, call.body = f"POST {path} HTTP/1.1", bytes(size)
    assert status(wire, call.encode()) == refused
