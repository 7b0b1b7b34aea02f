"""What tests of the way out share: hosts outside, a log that tells the order, the proxy, apps."""

from __future__ import annotations

import base64
import datetime as dt
import http.client
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

with warnings.catch_warnings():
    # mitmproxy's filter language is written with names that pyparsing deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    import mitmproxy.addons.proxyserver  # noqa: F401

from audit.entry import parse_entry
from audit.model import Entry
from audit.recorder import Act, Begun, End
from gateway.core.exchange import Summary
from gateway.frontends.intercept import Intercept
from gateway.frontends.intercept_tls import Leaves
from gateway.outbound.apps import hash_key, new_key
from gateway.settings import DestinationSettings, OutboundAppSettings, OutboundSettings
from keys.private_files import write_private
from keys.settings import PkiSettings
from keys.vault import VaultClient
from policies.settings import PoliciesSettings
from policies.store import PolicyStore
from tests.audit.records import LocalSealer, MemoryLog, make_async_recorder
from tests.openbao import wait_until

TENANT = "clinic-a"
#: Names that the tests' resolver leads to this machine.
HOSTS = ("lab.example.org", "a.mail.example.net", "other.example.com", "localhost")
STORE = PolicyStore(PoliciesSettings())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Tape:
    """The order in which things happened, whoever saw them."""

    events: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, event: str) -> None:
        with self.lock:
            self.events.append(event)


class TapedLog:
    """The audit log: real entries, kept in memory. `before` may raise or wait at each stage."""

    def __init__(self, tape: Tape) -> None:
        self.memory = MemoryLog()
        self.before: Callable[[str], Any] = lambda _stage: None
        self._recorder = make_async_recorder(self.memory, LocalSealer())
        self._tape = tape

    async def intent(self, act: Act) -> Begun:
        waited = self.before("intent")
        if waited is not None:
            await waited
        begun = await self._recorder.intent(act)
        self._tape(f"intent:{act.decision}")
        return begun

    async def outcome(self, begun: Begun, end: End) -> int:
        waited = self.before("outcome")
        if waited is not None:
            await waited
        index = await self._recorder.outcome(begun, end)
        self._tape(f"outcome:{end.outcome}")
        return index

    @property
    def entries(self) -> list[Entry]:
        return [parse_entry(raw) for raw in self.memory.held]

    @property
    def text(self) -> str:
        return b"\n".join(self.memory.held).decode()


@dataclass
class Outside:
    """A host outside: it keeps what reached it."""

    port: int
    tape: Tape
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    connections: int = 0


def make_handler(outside: Outside) -> type[BaseHTTPRequestHandler]:  # noqa: C901 - one answer for each path
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _body(self) -> bytes:
            if "chunked" in self.headers.get("transfer-encoding", ""):
                pieces = []
                # An end without the last chunk is no end: it raises, and the body did not come.
                while size := int(self.rfile.readline().strip(), 16):
                    pieces.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(pieces)
            length = int(self.headers.get("content-length", 0))
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionError
            return body

        def _answer(self) -> None:
            outside.tape("outside:request")
            if self.path.startswith("/early"):
                self.send_response(413)
                self.send_header("content-length", "0")
                self.end_headers()
                self.wfile.flush()
                self._body()
                return
            body = self._body()
            outside.requests.append((self.command, self.path, dict(self.headers), body))
            if self.path.startswith("/slow"):
                time.sleep(3)
            if self.path.startswith("/drop"):
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if self.path.startswith("/large"):
                self._stream(int(self.path.rpartition("/")[2]))
                return
            answer = b"the answer: " + body
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.send_header("x-outside", "yes")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer)

        def _stream(self, size: int) -> None:
            self.send_response(200)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            piece = b"x" * 65_536
            while size > 0:
                part = piece[:size]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                size -= len(part)
            self.wfile.write(b"0\r\n\r\n")

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_OPTIONS = _answer  # noqa: N815

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    outside: Outside
    context: ssl.SSLContext | None = None

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        self.outside.connections += 1
        self.outside.tape("outside:connection")
        if self.context is not None:
            connection.settimeout(10)
            connection = self.context.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, address

    def handle_error(self, *_: object) -> None:
        pass


@contextmanager
def outside_host(tape: Tape, context: ssl.SSLContext | None) -> Iterator[Outside]:
    server = _Server(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.outside = Outside(port=server.server_address[1], tape=tape)
    server.RequestHandlerClass = make_handler(server.outside)
    server.context = context
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.outside
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def make_authority(directory: Path, names: tuple[str, ...] = HOSTS) -> tuple[Path, ssl.SSLContext]:
    """An authority outside that has nothing to do with ours, and a server's context from it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "the outside")])
    now = dt.datetime.now(dt.UTC)

    def build(subject: x509.Name, public: Any) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=1))
        )

    root = (
        build(name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    leaf_key = ec.generate_private_key(ec.SECP256R1())
    leaf = (
        build(x509.Name([]), leaf_key.public_key())
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(one) for one in names]), critical=True
        )
        .sign(key, hashes.SHA256())
    )
    ca_file, leaf_file = directory / "outside-ca.pem", directory / "outside-leaf.pem"
    ca_file.write_bytes(root.public_bytes(Encoding.PEM))
    leaf_file.write_bytes(
        leaf.public_bytes(Encoding.PEM)
        + leaf_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(leaf_file)
    return ca_file, context


@dataclass
class Bench:
    """A proxy with two apps, a host outside over TLS and one in clear."""

    proxy: Intercept
    port: int
    authority: Path
    keys: dict[str, str]
    outside: Outside
    plain: Outside
    log: TapedLog
    tape: Tape
    summaries: list[Summary]
    resolved: dict[str, list[str]]

    def credentials(self, app: str | None, key: str | None = None) -> dict[str, str]:
        if app is None:
            return {}
        text = f"{app}:{key if key is not None else self.keys.get(app, '')}".encode()
        return {"Proxy-Authorization": f"Basic {base64.b64encode(text).decode()}"}

    def connect(
        self,
        host: str = "lab.example.org",
        *,
        app: str | None = "ehr",
        key: str | None = None,
        port: int | None = None,
    ) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=str(self.authority))
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=15, context=context
        )
        connection.set_tunnel(host, port or self.outside.port, self.credentials(app, key))
        return connection

    def call(
        self,
        method: str = "GET",
        path: str = "/",
        *,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        chunked: bool = False,
        **where: Any,
    ) -> tuple[int, dict[str, str], bytes]:
        connection = self.connect(**where)
        try:
            connection.request(
                method, path, body=body, headers=dict(headers or {}), encode_chunked=chunked
            )
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()
        finally:
            connection.close()

    def quiet(self) -> None:
        """Wait until the log has an outcome for every intent."""
        deadline = time.monotonic() + 10
        while True:
            stages = [entry.stage for entry in self.log.entries]
            if stages.count("intent") == stages.count("outcome"):
                return
            assert time.monotonic() < deadline, stages
            time.sleep(0.02)

    def idle(self) -> None:
        """Wait until no call is under way."""
        wait_until(lambda: not self.proxy._way._calls, timeout_s=10)

    def exchange(self, raw: bytes, *, timeout_s: float = 10) -> bytes:
        """Send bytes to the proxy and return all that comes back until it hangs up."""
        received = bytearray()
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as connection:
            connection.sendall(raw)
            try:
                while piece := connection.recv(65_536):
                    received += piece
            except (ConnectionError, TimeoutError):
                pass
        return bytes(received)


@contextmanager
def bench(
    directory: Path,
    gateway: VaultClient,
    *,
    listed: Callable[[int, int], tuple[DestinationSettings, ...]] | None = None,
    prepare: Callable[[Intercept], object] = lambda _proxy: None,
    names: tuple[str, ...] = HOSTS,
    **settings: Any,
) -> Iterator[Bench]:
    """Everything, running. `listed` makes the list from the ports of the two hosts."""
    tape = Tape()
    log = TapedLog(tape)
    summaries: list[Summary] = []
    ca_file, context = make_authority(directory, names)
    keys = {"ehr": new_key(), "forum": new_key()}
    for app, key in keys.items():
        write_private(directory / app, hash_key(key).encode())
    resolved = {host: ["127.0.0.1"] for host in HOSTS}

    class Resolver:
        """Leads the tests' names to this machine, as if that were outside."""

        async def __call__(self, host: str, port: int) -> list[str]:
            del port
            return resolved[host]

        def verify(self, host: str, port: int, address: str) -> None:
            assert host in resolved

    with outside_host(tape, context) as outside, outside_host(tape, None) as plain:
        port = settings.pop("port", None) or free_port()
        proxy = Intercept(
            OutboundSettings(
                port=port,
                apps=(
                    OutboundAppSettings(name="ehr", key_hash_file=str(directory / "ehr")),
                    OutboundAppSettings(
                        name="forum", key_hash_file=str(directory / "forum"), purpose="HOPERAT"
                    ),
                ),
                destinations=(listed or default_list)(outside.port, plain.port),
                directory=str(directory / "for-apps"),
                **{
                    "ca_file": str(ca_file),
                    "timeout_s": 5.0,
                    "max_body_bytes": 1_000_000,
                    **settings,
                },
            ),
            tenant=TENANT,
            in_force=lambda: STORE.current,
            recorder=log,
            leaves=lambda may: Leaves(
                gateway, settings=PkiSettings(), may_stand_for=may, clock=time.time
            ),
            resolver=Resolver(),
            on_end=summaries.append,
        )
        prepare(proxy)
        try:
            authority = proxy.start()
            yield Bench(
                proxy=proxy,
                port=port,
                authority=authority,
                keys=keys,
                outside=outside,
                plain=plain,
                log=log,
                tape=tape,
                summaries=summaries,
                resolved=resolved,
            )
        finally:
            proxy.close()


def default_list(port: int, plain_port: int) -> tuple[DestinationSettings, ...]:
    return (
        DestinationSettings(host="lab.example.org", port=port, purposes=("TREAT",), apps=("ehr",)),
        DestinationSettings(host="*.mail.example.net", port=port, purposes=("HOPERAT",)),
        DestinationSettings(host="lab.example.org", port=plain_port, purposes=("TREAT",)),
    )
