"""Programs that tests start: a free port, a process that ends with its test, a plain request."""

from __future__ import annotations

import fcntl
import http.client
import os
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

REPOSITORY = Path(__file__).resolve().parents[2]
#: Where apps that we did not write are installed; left by `git`, made again when their pins change.
CACHE = REPOSITORY / ".cache" / "interop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """An answer as it came."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


def free_port() -> int:
    """A port of loopback that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(
    url: str,
    *,
    method: str = "GET",
    body: bytes | None = None,
    headers: Mapping[str, str] = {},
    trust: ssl.SSLContext | None = None,
) -> Answered:
    """One request, the path sent as it is written; `trust` checks an `https` server."""
    parts = urlsplit(url)
    connection = (
        http.client.HTTPSConnection(parts.netloc, timeout=30, context=trust)
        if parts.scheme == "https"
        else http.client.HTTPConnection(parts.netloc, timeout=30)
    )
    try:
        target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        connection.connect()
        if connection.sock.getsockname() == connection.sock.getpeername():
            # Nobody listens yet, and the system gave this end the very port that it asked for.
            raise ConnectionRefusedError(f"{parts.netloc} is connected to itself.")
        connection.request(method, target, body=body, headers=dict(headers))
        answer = connection.getresponse()
        named = {name.lower(): value for name, value in answer.getheaders()}
        return Answered(status=answer.status, headers=named, body=answer.read())
    finally:
        connection.close()


@contextmanager
def started(
    command: Sequence[str | Path],
    url: str,
    *,
    environment: Mapping[str, str] = {},
    timeout_s: float = 60.0,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program until the block ends; it begins once `url` answers anything below 500."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            _wait(process, url, timeout_s, output.fileno())
            yield process
        finally:
            # The whole group: some programs have children.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, timeout_s: float, output: int) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if get(url).status < 500:
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.05)
    said = os.pread(output, 4_000, max(0, os.fstat(output).st_size - 4_000)).decode(
        errors="replace"
    )
    raise AssertionError(f"{url} did not answer within {timeout_s:.0f} s:\n{said}")


@contextmanager
def installed(name: str, pins: bytes) -> Iterator[tuple[Path, bool]]:
    """Yield the folder of an app and whether it must be installed, with others locked out.

    What is there counts only if it was installed whole, from these pins.
    """
    folder = CACHE / name
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "installed-from"
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = not mark.exists() or mark.read_bytes() != pins
        if missing:
            mark.unlink(missing_ok=True)
        yield folder, missing
        if missing:
            mark.write_bytes(pins)
