"""Load and static servers of the ingress benchmark: wrk, nginx, mitmproxy, and their files.

wrk does not check certificates. Every program listens on loopback and ends with its block.
"""

from __future__ import annotations

import datetime as dt
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from shutil import which
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

CONNECTIONS = 16
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

# The script of wrk: headers from a file, and what was measured as one line of JSON.
_SCRIPT = """
for line in io.lines(os.getenv("HEADERS")) do
  local name, value = line:match("^([^:]+): (.*)$")
  wrk.headers[name] = value
end
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    'RESULT {"requests": %d, "seconds": %.6f, "p50_ms": %.6f, "p99_ms": %.6f, "errors": %d}\\n',
    summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What wrk saw in one round."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    errors: int

    @property
    def per_s(self) -> float:
        """Answers a second."""
        return self.requests / self.seconds


def measure(
    url: str,
    headers: Mapping[str, str],
    *,
    directory: Path,
    seconds: int,
    connections: int = CONNECTIONS,
) -> Measured:
    """Load `url` with one thread. Raises `RuntimeError` if any answer was not a success."""
    script, given = directory / "load.lua", directory / "headers"
    script.write_text(_SCRIPT)
    given.write_text("".join(f"{name}: {value}\n" for name, value in headers.items()))
    given.chmod(0o600)
    command = [program("wrk"), "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script), url]
    said = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HEADERS": str(given)},
    ).stdout
    line = next(line for line in said.splitlines() if line.startswith("RESULT "))
    measured = Measured(**json.loads(line.removeprefix("RESULT ")))
    if measured.errors or not measured.requests:
        raise RuntimeError(f"expected only successes, got {measured.errors} errors: see its log")
    return measured


def program(name: str) -> str:
    """Where a program is. Raises `FileNotFoundError` if it is not installed."""
    found = which(name, path=_PATH)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed: run `make apt`")
    return found


def fetch(
    url: str,
    headers: Mapping[str, str] = {},
    *,
    method: str = "GET",
    body: bytes | None = None,
) -> tuple[int, bytes]:
    """One request. Certificates are not checked, as wrk checks none: all of this is loopback."""
    parts = urlsplit(url)
    if parts.scheme == "https":
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            parts.netloc, timeout=30, context=context
        )
    else:
        connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    try:
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request(method, target, body=body, headers=dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def free_port() -> int:
    """A port of loopback that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str | Path], url: str, *, log: Path, cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program until the block ends; it begins once `url` answers below 500."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=cwd, start_new_session=True
        )
    try:
        _wait(process, url, log)
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    last = "no answer"
    while process.poll() is None and time.monotonic() < deadline:
        try:
            status, body = fetch(url)
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)
            continue
        if status < http.HTTPStatus.INTERNAL_SERVER_ERROR:
            return
        last = f"{status}: {body[:500].decode(errors='replace')}"
        time.sleep(0.05)
    said = log.read_text(errors="replace")[-3000:]
    raise RuntimeError(f"expected {url} to be ready, got {last}\n{said}")


# --- nginx, as the app and as a peer --------------------------------------------------------------

_NGINX = """
daemon off; master_process off; error_log {home}/error.log warn; pid {home}/pid;
events {{ worker_connections 1024; }}
http {{
  access_log off; default_type application/fhir+json; keepalive_requests 1000000000;
  client_body_temp_path {home}/body; proxy_temp_path {home}/proxy; fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
  {inside}
}}
"""


@contextmanager
def serving_files(
    files: Mapping[str, bytes], otherwise: bytes, port: int, home: Path
) -> Iterator[str]:
    """The app as a peer sees it: prepared answers by path, whatever the query."""
    home.mkdir()
    (home / "otherwise.json").write_bytes(otherwise)
    places = []
    for number, (path, content) in enumerate(files.items()):
        (home / f"{number}.json").write_bytes(content)
        places.append(f"location = {path} {{ try_files /{number}.json =404; }}")
    inside = (
        f"open_file_cache max=64; server {{ listen 127.0.0.1:{port}; root {home}; "
        f"{' '.join(places)} location / {{ try_files /otherwise.json =404; }} }}"
    )
    with _nginx(inside, f"http://127.0.0.1:{port}/", home):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def nginx_proxy(upstream: str, certificate: Path, key: Path, home: Path) -> Iterator[str]:
    """Peer: TLS in front, plain HTTP behind, connections kept on both sides, bytes as they are."""
    home.mkdir()
    port = free_port()
    inside = (
        f"upstream app {{ server {urlsplit(upstream).netloc}; keepalive 64; "
        "keepalive_requests 1000000000; } "
        f"server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {certificate}; "
        f"ssl_certificate_key {key}; ssl_protocols TLSv1.2 TLSv1.3; location / {{ "
        'proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; '
        "proxy_set_header Host $host; } }"
    )
    with _nginx(inside, f"https://127.0.0.1:{port}/", home):
        yield f"https://127.0.0.1:{port}"


@contextmanager
def _nginx(inside: str, url: str, home: Path) -> Iterator[None]:
    configuration = home / "nginx.conf"
    configuration.write_text(_NGINX.format(home=home, inside=inside))
    command: list[str | Path] = [
        program("nginx"),
        "-p",
        home,
        "-c",
        configuration,
        "-e",
        home / "error.log",
    ]
    with running(command, url, log=home / "log"):
        yield


# --- mitmproxy as a peer --------------------------------------------------------------------------


@contextmanager
def mitmproxy_proxy(upstream: str, certificate: Path, key: Path, home: Path) -> Iterator[str]:
    """Peer: mitmproxy as a library with what it needs to pass bytes on, and nothing else."""
    home.mkdir()
    port = free_port()
    both = home / "both.pem"
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    both.chmod(0o600)
    script = Path(__file__).with_name("ingress_mitmproxy.py")
    command: list[str | Path] = [sys.executable, script, str(port), upstream, both, home]
    with running(command, f"https://127.0.0.1:{port}/", log=home / "log"):
        yield f"https://127.0.0.1:{port}"


def write_certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate of its own for localhost, P-256, for a week; and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    names: list[x509.GeneralName] = [
        x509.DNSName("localhost"),
        x509.IPAddress(IPv4Address("127.0.0.1")),
    ]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(days=7))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = directory / "certificate.pem", directory / "key.pem"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.touch(mode=0o600)
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate_file, key_file
