"""An ingress of its own process over a small app, for tests: `running(...)` starts it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import multiprocessing
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from pathlib import Path

import orjson
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from gateway.core.commands import Failed, Fetched, Signal
from gateway.core.headers import check_request, clean_request, clean_response
from gateway.core.messages import Headers, RequestHead, ResponseHead
from gateway.frontends.ingress import Client, Ingress
from gateway.frontends.serve import serve
from gateway.frontends.upstream import Stream, Upstreams
from gateway.routes import Route
from gateway.settings import GatewaySettings, LimitSettings, RouteSettings, TLSSettings

ROOT = Path(__file__).parents[3]
LIMITS = LimitSettings(concurrent=40, body_timeout_s=1.0, inspected_request_bytes=100_000)


def route(upstream: str, **settings: object) -> Route:
    scheme, _, authority = upstream.partition("://")
    return Route(
        settings=RouteSettings(name="app", kind="ehr", upstream=upstream, **settings),  # type: ignore[arg-type]
        name="app",
        base="",
        upstream_scheme=scheme,
        upstream_authority=authority,
        upstream_base="",
    )


class SmallApp:
    """Answers by path. Everything below `/app/` goes to the app behind."""

    def __init__(self) -> None:
        upstream = os.environ.get("HAVENGATE_TEST_UPSTREAM")
        self.route = route(upstream) if upstream else None
        self.upstreams = Upstreams()

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        await self.upstreams.close()

    async def exchange(self, head: RequestHead, client: Client) -> None:
        check_request(head)
        if head.path.startswith("/app/"):
            await self._pass(head, client)
            return
        name = head.path.strip("/").replace("-", "_") or "echo"
        await getattr(self, f"_{name}", self._echo)(head, client)

    async def _echo(self, head: RequestHead, client: Client) -> None:
        body = await client.receive_all(LIMITS.inspected_request_bytes)
        content = {
            "method": head.method,
            "path": head.path,
            "query": head.query,
            "authority": head.authority,
            "version": head.http_version,
            "headers": list(clean_request(head).headers),
            "body": body.decode("latin-1") if isinstance(body, bytes) else repr(body),
        }
        status = 200
        if isinstance(body, Failed):
            status = 413 if body.code == "gateway.too_large" else 408
        elif body is Signal.GONE:
            print("GONE", flush=True)  # noqa: T201 - the test reads it
        await client.respond(_head(status, "application/json"), orjson.dumps(content))

    async def _raise(self, head: RequestHead, client: Client) -> None:
        raise RuntimeError("SECRET of Patient/7")

    async def _nothing(self, head: RequestHead, client: Client) -> None:
        pass

    async def _raise_midway(self, head: RequestHead, client: Client) -> None:
        await client.start(_head(200))
        await client.release(b"first part")
        raise RuntimeError("SECRET of Patient/7")

    async def _return_midway(self, head: RequestHead, client: Client) -> None:
        await client.start(_head(200))
        await client.release(b"first part")

    async def _broken(self, head: RequestHead, client: Client) -> None:
        await client.start(_head(200))
        await client.release(b"first part")
        await client.end(True)

    async def _short(self, head: RequestHead, client: Client) -> None:
        await client.start(_head(200, length=100))
        await client.release(b"first part")
        await client.end(False)

    async def _long(self, head: RequestHead, client: Client) -> None:
        await client.start(_head(200, length=5))
        await client.release(b"first part")
        await client.end(False)

    async def _pieces(self, head: RequestHead, client: Client) -> None:
        await client.start(_head(200))
        for number in range(10):
            await client.release(b"%d" % number)
        await client.end(False)

    async def _no_content(self, head: RequestHead, client: Client) -> None:
        await client.respond(_head(204), b"never to be seen")

    async def _slow(self, head: RequestHead, client: Client) -> None:
        print("slow has begun", flush=True)  # noqa: T201 - tests read it
        await asyncio.sleep(1.5)
        await client.respond(_head(200), b"slow but whole")

    async def _large(self, head: RequestHead, client: Client) -> None:
        await client.respond(_head(200), b"x" * 40_000_000)

    async def _torrent(self, head: RequestHead, client: Client) -> None:
        await client.start(_head(200))
        sent = 0
        piece = b"x" * 65_536
        while sent < 400_000_000:
            if await client.release(piece) is Signal.GONE:
                break
            sent += len(piece)
        print(f"TORRENT {sent}", flush=True)  # noqa: T201 - the test reads it
        await client.end(False)

    async def _wait(self, head: RequestHead, client: Client) -> None:
        try:
            await client.start(_head(200))
            await client.release(b"begun")
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            print("CANCELLED", flush=True)  # noqa: T201 - the test reads it
            raise

    async def _pass(self, head: RequestHead, client: Client) -> None:
        assert self.route is not None
        opened = await self.upstreams.open(
            self.route, clean_request(head), head.method not in {"GET", "HEAD"}
        )
        if isinstance(opened, Failed):
            await client.respond(_head(502), opened.code.encode())
            return
        try:
            await self._through(opened, head, client)
        finally:
            await opened.close()

    async def _through(self, stream: Stream, head: RequestHead, client: Client) -> None:
        if head.method not in {"GET", "HEAD"}:
            while isinstance(piece := await client.receive(), bytes):
                if await stream.send(piece) is not Signal.DONE:
                    break
            if piece is Signal.GONE:
                return
            await stream.send(None)
        answer = await stream.head()
        if isinstance(answer, Failed):
            await client.respond(_head(502), answer.code.encode())
            return
        await client.start(clean_response(answer))
        while isinstance(part := await stream.receive(), bytes):
            if await client.release(part) is Signal.GONE:
                return
        await client.end(part is not Signal.END)


def _head(status: int, kind: str = "text/plain", length: int | None = None) -> ResponseHead:
    fields = [("content-type", kind)]
    if length is not None:
        fields.append(("content-length", str(length)))
    return ResponseHead(status=status, headers=Headers(tuple(fields)))


class Reserialiser(SmallApp):
    """Fetches a bundle, parses it and writes it anew: the least that looking into costs."""

    async def exchange(self, head: RequestHead, client: Client) -> None:
        assert self.route is not None
        check_request(head)
        fetched = await self.upstreams.fetch(self.route, clean_request(head), b"", 33_554_432)
        if not isinstance(fetched, Fetched):
            await client.respond(_head(502), fetched.code.encode())
            return
        body = orjson.dumps(orjson.loads(fetched.body))
        await client.respond(clean_response(fetched.head), body)


class StartedByTheDead(Ingress):
    """Begins to serve two seconds after its parent was killed, between two runs of its loop."""

    def __rsgi_init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__rsgi_init__(loop)
        parent = multiprocessing.parent_process()
        assert parent is not None
        print("orphan to be", flush=True)  # noqa: T201 - the test reads it
        parent.join()
        time.sleep(2)


def app() -> Ingress:
    ingress = StartedByTheDead if os.environ.get("HAVENGATE_TEST_APP") == "orphan" else Ingress
    kind = Reserialiser if os.environ.get("HAVENGATE_TEST_APP") == "reserialise" else SmallApp
    port = int(os.environ["HAVENGATE_TEST_PORT"])
    idle_s = float(os.environ.get("HAVENGATE_TEST_IDLE_S", "60"))
    return ingress(kind(), LIMITS, port=port, idle_s=idle_s)


# --- For tests ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    certificate: Path
    key: Path


def certify(
    directory: Path, *, name: str = "localhost", days: int = 1, stem: str = "server"
) -> Certificate:
    """Make a certificate that is its own authority. Negative days: it has expired."""
    directory.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    names = [x509.DNSName(name), x509.IPAddress(ip_address("127.0.0.1"))]
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=10))
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName(names[: 2 if name == "localhost" else 1]), False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    files = Certificate(certificate=directory / f"{stem}.pem", key=directory / f"{stem}.key")
    files.certificate.write_bytes(built.public_bytes(Encoding.PEM))
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    process: subprocess.Popen[bytes]
    port: int
    output: Path
    certificate: Certificate

    def context(self, *protocols: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.certificate.certificate)
        context.set_alpn_protocols(list(protocols or ("http/1.1",)))
        return context

    def connect(self, *protocols: str) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        return self.context(*protocols).wrap_socket(
            # An end without TLS's own sign of it is then an error, as it should be.
            plain,
            server_hostname="localhost",
            suppress_ragged_eofs=False,
        )

    def said(self) -> str:
        return self.output.read_text("utf-8", "replace")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def running(
    directory: Path,
    *,
    certificate: Certificate | None = None,
    workers: int = 1,
    serving: bool = True,
    **environment: str,
) -> Iterator[Running]:
    """Start one; `serving`: wait until it answers."""
    files = certificate or certify(directory)
    port = free_port()
    output = directory / "output.txt"
    options = {
        "port": port,
        "workers": workers,
        **{name: str(path) for name, path in asdict(files).items()},
    }
    with output.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.gateway.frontends.served", json.dumps(options)],
            cwd=ROOT,
            env={**os.environ, "HAVENGATE_TEST_PORT": str(port), **environment},
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    one = Running(process=process, port=port, output=output, certificate=files)
    try:
        if serving:
            _wait_until_serving(one)
        yield one
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_serving(one: Running) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            one.connect().close()
        except OSError:
            if one.process.poll() is not None:
                break
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"It does not serve: {one.said()}")


def main() -> None:
    options = json.loads(sys.argv[1])
    settings = GatewaySettings(port=options["port"], tls=TLSSettings(), limits=LIMITS)
    serve(
        settings,
        target="tests.gateway.frontends.served:app",
        certificate=Path(options["certificate"]),
        key=Path(options["key"]),
        workers=options["workers"],
    )


if __name__ == "__main__":
    main()
