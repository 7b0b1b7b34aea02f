"""The real thing, as processes: the example clinic, `havengate up` in front of it, and people.

Everything lies in one directory with a short name: the path of the log's socket is bounded (107
bytes on Linux). Commands run in this process (`tests.havengate.command`): each start of the program
costs seconds.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from examples.clinic import load
from examples.visitor import Answer, Visitor
from tests.havengate.command import run_json
from tests.interop.processes import REPOSITORY, free_port, get

EXAMPLE = REPOSITORY / "examples" / "clinic"
START_S = 90.0


@contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose name leaves room for the log's socket; gone at the end."""
    home = Path(tempfile.mkdtemp(prefix="hg-", dir="/tmp"))
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


class Program:
    """A process of its own, started and stopped at will. Its words go to `words_file`."""

    def __init__(
        self, command: list[str], *, ready: str, home: Path, words_file: Path, **environment: str
    ) -> None:
        self._command = command
        self._ready = ready
        self._home = home
        self._environment = environment
        self.words_file = words_file
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> psutil.Process:
        """The process, while it runs."""
        assert self._process is not None, "it was not started"
        return psutil.Process(self._process.pid)

    @property
    def words(self) -> str:
        """What it has said, in all its starts."""
        return self.words_file.read_text(encoding="utf-8", errors="replace")

    def start(self) -> None:
        """Start it, and return once it is ready; fail with its words if it is not in time."""
        with self.words_file.open("ab") as words:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                cwd=self._home,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), **self._environment},
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while not is_ready(self._ready):
            late = time.monotonic() > deadline
            if late or self._process.poll() is not None:
                self.kill()
                raise AssertionError(f"It did not start:\n{self.words[-4_000:]}")
            time.sleep(0.05)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it by a signal; its exit code. Fail if it, or what it started, is still there."""
        assert self._process is not None
        children = self.process.children(recursive=True)
        self._process.send_signal(number)
        code = self._process.wait(timeout=60)
        _, left = psutil.wait_procs(children, timeout=5)
        assert not left, f"still there: {left}"
        return code

    def kill(self) -> None:
        """End it with everything that it started, if it runs."""
        if self._process is None or self._process.poll() is not None:
            return
        children = self.process.children(recursive=True)
        self._process.kill()
        for child in children:
            if child.is_running():
                child.kill()
        self._process.wait()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It answers nothing for the length of the block."""
        self.process.suspend()
        try:
            yield
        finally:
            self.process.resume()


class Gateway(Program):
    """`havengate up` on the configuration in `home`."""

    def __init__(self, home: Path, *, port: int, admin_port: int) -> None:
        self.base = f"https://localhost:{port}"
        self.admin = f"http://127.0.0.1:{admin_port}"
        self.ca_file = home / "var/tls/current/ca.pem"
        command = [
            sys.executable,
            "-m",
            "havengate",
            "--config",
            str(home / "havengate.toml"),
            "up",
        ]
        super().__init__(
            command,
            ready=f"{self.admin}/readyz",
            home=home,
            words_file=home / "gateway.words",
            PYTHONUNBUFFERED="1",
        )

    def workers(self) -> list[psutil.Process]:
        """The processes that serve."""
        return [one for one in self.process.children() if "spawn_main" in " ".join(one.cmdline())]

    def key_server(self) -> psutil.Process:
        """The OpenBao that it keeps."""
        (found,) = [
            one for one in self.process.children(recursive=True) if one.name().startswith("bao")
        ]
        return found

    def worker_of(self, visitor: Visitor) -> int:
        """Which worker holds this visitor's connection."""
        assert visitor._connection is not None
        own: int = visitor._connection.sock.getsockname()[1]
        for worker in self.workers():
            for one in worker.net_connections(kind="tcp"):
                if one.raddr and one.raddr.port == own:
                    return int(worker.pid)
        raise AssertionError("no worker holds the connection")

    @contextmanager
    def unable_to_write(self) -> Iterator[None]:
        """No file of the process that writes the log can grow, as on a full disk.

        Permissions would not do: tests may run as root.
        """
        limits = self.process.rlimit(resource.RLIMIT_FSIZE)
        self.process.rlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            yield
        finally:
            self.process.rlimit(resource.RLIMIT_FSIZE, limits)


class Courses:
    """An app that can be slow, and counts.

    Paths that end in `/slow` wait until `go` is set; `/trickle` goes on until `dry` is set.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.asked: list[tuple[str, str]] = []
        self.go = threading.Event()
        self.dry = threading.Event()
        courses = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                self.rfile.read(int(self.headers.get("content-length") or 0))
                courses.asked.append((self.command, self.path))
                if self.path.endswith("/slow"):
                    courses.go.wait(30)
                if self.path.endswith("/trickle"):
                    self._trickle()
                    return
                content = b"a course"
                self.send_response(200)
                self.send_header("content-type", "text/plain")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _trickle(self) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/plain")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                while not courses.dry.wait(0.1):
                    self.wfile.write(b"8000\r\n" + b"pulse+++" * 4_096 + b"\r\n")
                self.wfile.write(b"0\r\n\r\n")

            do_GET = do_POST = _answer  # noqa: N815 - the base's names

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's
                """Say nothing."""

            def handle_one_request(self) -> None:
                # Whoever waited too long has hung up.
                try:
                    super().handle_one_request()
                except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
                    self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            # A handshake that fails ends in the thread of its connection.
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop it."""
        self.go.set()
        self.dry.set()
        self._server.shutdown()
        self._server.server_close()


@dataclass(kw_only=True)
class Site:
    """A clinic behind its gateway."""

    home: Path
    gateway: Gateway
    clinic: Program
    courses: Courses
    accounts: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    service_keys: dict[str, str] = field(default_factory=dict, repr=False)
    visitors: list[Visitor] = field(default_factory=list, repr=False)

    def add_account(self, name: str, *details: str) -> None:
        """Make an account as an operator does, with a second factor."""
        words = ("users", "add", name, *details, "--print-second-factor")
        self.accounts[name] = run_json(self.home, *words)

    def command(self, *words: str) -> Any:
        """What an operator's command says, as JSON."""
        found: Any = run_json(self.home, *words)
        return found

    def stranger(self) -> Visitor:
        """Somebody who has not signed in."""
        visitor = Visitor(self.gateway.base, self.gateway.ca_file)
        self.visitors.append(visitor)
        return visitor

    def signed_in(self, name: str) -> Visitor:
        """Somebody who has. Each code is good for once, so a second call waits for the next one."""
        account = self.accounts[name]
        at = max(int(time.time()), account.get("next_code_at", 0))
        # The gateway takes the code of the step before and after this one.
        while at > time.time() + 30:
            time.sleep(0.2)
        visitor = self.stranger()
        visitor.sign_in(name, account["password"], account["second_factor_uri"], at=at)
        account["next_code_at"] = (at // 30 + 1) * 30
        return visitor

    def step_up(self, name: str, visitor: Visitor) -> Answer:
        """Show the second factor again."""
        account = self.accounts[name]
        at = max(int(time.time()), account["next_code_at"])
        while at > time.time() + 30:
            time.sleep(0.2)
        account["next_code_at"] = (at // 30 + 1) * 30
        return visitor.step_up(account["second_factor_uri"], at=at)

    def as_service(self, name: str, method: str, target: str, body: Any = None) -> Answer:
        """One request of a program."""
        headers = {"authorization": f"Bearer {self.service_keys[name]}"}
        return self.stranger().ask(method, target, body=body, headers=headers)

    def stored(self, query: str, *values: str) -> str:
        """One value of the clinic's own database."""
        with closing(sqlite3.connect(self.home / "clinic.sqlite3")) as connection:
            (value,) = connection.execute(query, values).fetchone()
        return str(value)

    def files_with(self, secret: str, *, below: str = "") -> list[Path]:
        """The files in which these words stand, byte by byte, whatever their format."""
        wanted = secret.encode()
        files = [one for one in (self.home / below).rglob("*") if one.is_file()]
        return [one for one in files if one.name != "havengate.toml" and wanted in _bytes_of(one)]


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        # The log goes on being published: new tiles are written beside their place and moved there.
        return b""


def is_ready(url: str) -> bool:
    """Whether an address answers with 200."""
    try:
        return get(url).status == 200
    except OSError:
        return False


@contextmanager
def running_site(*, workers: int = 2) -> Iterator[Site]:
    """The example's three routes and a fourth to an app that can be slow; a few people."""
    with short_directory() as home:
        port, admin_port, clinic_port = free_port(), free_port(), free_port()
        database = home / "clinic.sqlite3"
        command = [sys.executable, "-m", "examples.clinic", "--port", str(clinic_port)]
        command += ["--database", str(database)]
        clinic = Program(
            command,
            ready=f"http://127.0.0.1:{clinic_port}/fhir/metadata",
            home=REPOSITORY,
            words_file=home / "clinic.words",
        )
        courses = Courses()
        site = Site(
            home=home,
            gateway=Gateway(home, port=port, admin_port=admin_port),
            clinic=clinic,
            courses=courses,
        )
        ports = {"8443": port, "8444": admin_port, "8090": clinic_port}
        _configure(site, ports, workers)
        try:
            load(database, people=9)
            clinic.start()
            site.gateway.start()
            yield site
        finally:
            for visitor in site.visitors:
                visitor.close()
            site.gateway.kill()
            clinic.kill()
            courses.close()


def _configure(site: Site, ports: Mapping[str, int], workers: int) -> None:
    """The example's own file, with other ports and what tests need beside."""
    text = (EXAMPLE / "havengate.toml").read_text(encoding="utf-8")
    for usual, port in ports.items():
        text = text.replace(usual, str(port))
    text = text.replace("[gateway]\n", f"{_HASTE}\n[gateway]\nworkers = {workers}\n")
    text += _COURSES.replace("PORT", str(site.courses.port))
    for name, scopes in SERVICES.items():
        made = run_json(site.home, "users", "add", name, "--service")
        site.service_keys[name] = made["key"]
        file = site.home / f"{name}.sha256"
        file.write_text(made["key_sha256"], encoding="ascii")
        file.chmod(0o600)
        text += (
            f'\n[[gateway.identity.service_accounts]]\nname = "{name}"\n'
            f'key_hash_file = "{file.name}"\nscopes = {json.dumps(scopes)}\n'
        )
    (site.home / "havengate.toml").write_text(text, encoding="utf-8")
    shutil.copytree(EXAMPLE / "policies", site.home / "policies")


#: Programs and the scopes that they were given.
SERVICES: dict[str, tuple[str, ...]] = {"labs": ("system/Observation.crs",)}

#: What is away is found to be away sooner.
_HASTE = """
[keys.vault]
timeout_s = 1.0
deadline_s = 2.0
"""

_COURSES = """
[[gateway.routes]]
name = "courses"
kind = "elearning"
path = "/courses"
upstream = "http://127.0.0.1:PORT"
content = "opaque"
timeout_s = 1.0

[[gateway.routes]]
name = "watch"
kind = "wearable"
path = "/watch"
upstream = "http://127.0.0.1:PORT"
content = "opaque"
patient_facts = "records"

[[gateway.routes.rules]]
path = "/{patient}/trickle"
type = "Observation"
"""
