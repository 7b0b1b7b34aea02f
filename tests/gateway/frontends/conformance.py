"""One site behind either frontend, for tests that both must pass: real handlers, scripted persons.

Run as a program it serves; `standing(...)` starts that. What the log keeps and what is to fail at
which entry is told over the program's output and the header `x-test-fail` (`intent`, `outcome`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from audit.entry import parse_entry
from audit.errors import AuditError
from audit.model import Entry
from audit.recorder import Act, AsyncRecorder, Begun, End
from gateway.content.handler import ContentHandler
from gateway.core.commands import Facts
from gateway.core.exchange import Site, exchange
from gateway.core.messages import RequestHead
from gateway.fhir.handler import FHIRHandler
from gateway.fhir.links import Pager
from gateway.frontends.driver import Client, Services, drive
from gateway.frontends.ingress import Ingress
from gateway.frontends.serve import serve
from gateway.frontends.upstream import Upstreams
from gateway.identity.model import Identified, NotIdentified
from gateway.routes import Route, compile_routes
from gateway.settings import GatewaySettings, LimitSettings, RouteSettings, RuleSettings
from tests.audit.records import LocalSealer, MemoryLog, make_async_recorder
from tests.gateway.core.world import PlainSealer, clinician, in_force
from tests.gateway.frontends.misbehaving import ANSWERS, OK, App, misbehaving
from tests.gateway.frontends.served import ROOT, Certificate, Running, certify, free_port

LIMITS = LimitSettings(
    body_timeout_s=1.0, inspected_request_bytes=100_000, streamed_bytes=3_000_000
)
MINE, OTHER = "1", "2"
PIECES = 40
#: With the app's own address, which nobody outside may learn.
_AWAY = b"HTTP/1.1 302 Found\r\nLocation: %s/app/there\r\nContent-Length: 0\r\n\r\n"


# --- The program ----------------------------------------------------------------------------------


class UnwritableError(AuditError):
    code = "audit.unwritable"


class TellingLog(MemoryLog):
    async def append_async(self, entry: bytes) -> Any:
        place = await super().append_async(entry)
        print("ENTRY", entry.decode(), flush=True)  # noqa: T201 - the test reads it
        return place


class FailingRecorder:
    def __init__(self, inner: AsyncRecorder, stage: str | None) -> None:
        self._inner = inner
        self._stage = stage

    async def intent(self, act: Act) -> Begun:
        if self._stage == "intent":
            raise UnwritableError("full")
        return await self._inner.intent(act)

    async def outcome(self, begun: Begun, end: End) -> int:
        if self._stage == "outcome":
            raise UnwritableError("full")
        return await self._inner.outcome(begun, end)


class Persons:
    async def identify(self, head: RequestHead, route: Route) -> Identified | NotIdentified:
        shown = head.headers.get("authorization")
        if shown is None:
            return NotIdentified(reason="no_credentials")
        if shown != "Bearer clinician":
            return NotIdentified(reason="bad_token", credentials_given=True)
        who = clinician()
        assurance = replace(who.principal.assurance, second_factor_at=time.time() - 60)
        return replace(who, principal=replace(who.principal, assurance=assurance))


class Known:
    async def load(self, route: Route, who: Identified, patients: frozenset[str]) -> Facts:
        return Facts(care_team=patients & {MINE}, consents=dict.fromkeys(patients, ()))

    async def statement(self, route: Route, identified: Identified) -> bytes:
        return b"signed.statement.here"

    async def answer(self, head: RequestHead, body: bytes) -> Any:
        raise RuntimeError("no own pages here")


class NoKeys:
    async def load(self, persons: frozenset[str], texts: tuple[str, ...]) -> None:
        pass

    async def make_ready(self, name: tuple[str, str] | None) -> None:
        pass


class SiteApp:
    def __init__(self) -> None:
        upstream = os.environ["HAVENGATE_TEST_UPSTREAM"]
        fhir = RouteSettings(
            name="ehr", kind="ehr", upstream=f"{upstream}/fhir", path="/fhir", content="fhir",
            strip_path=True, patient_facts="upstream",
        )  # fmt: skip
        opaque = RouteSettings(
            name="files", kind="elearning", upstream=upstream, path="/app", timeout_s=2.0,
            rules=(RuleSettings(path="/{rest*}", methods=METHODS, type="Page"),),
        )  # fmt: skip
        down = RouteSettings(
            name="down", kind="elearning", upstream=f"http://127.0.0.1:{free_port()}", path="/down"
        )
        told = RouteSettings(
            name="told", kind="elearning", upstream=upstream, path="/told", timeout_s=60.0,
            rules=(RuleSettings(path="/{rest*}", methods=METHODS, type="Page"),),
        )  # fmt: skip
        settings = [fhir, opaque, down, told]
        routes = compile_routes(settings)
        self.recorder = make_async_recorder(TellingLog(), LocalSealer())
        self.upstreams = Upstreams(routes)
        self.site = Site(
            tenant="clinic",
            routes=routes,
            handlers={
                "ehr": FHIRHandler(fhir, pager=Pager(bytes(32))),
                "files": ContentHandler(opaque),
                "down": ContentHandler(down),
                "told": ContentHandler(told),
            },
            in_force=in_force,
            sealer=PlainSealer(),
            limits=LIMITS,
            strip=lambda headers: headers.without(("cookie", "authorization")),
            clock=time.time,
        )

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        await self.upstreams.close()

    async def exchange(self, head: RequestHead, client: Client) -> None:
        recorder: Any = FailingRecorder(self.recorder, head.headers.get("x-test-fail"))
        known = Known()
        services = Services(
            identifier=Persons(), facts=known, assertions=known, recorder=recorder,
            keys=NoKeys(), upstreams=self.upstreams, pages=known,
        )  # fmt: skip
        await drive(exchange(head, self.site, request="r-1"), services, client)


METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")


def app() -> Ingress:
    return Ingress(SiteApp(), LIMITS, port=int(os.environ["HAVENGATE_TEST_PORT"]))


def main() -> None:
    frontend, certificate, key = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    port = int(os.environ["HAVENGATE_TEST_PORT"])
    if frontend == "ingress":
        serve(
            GatewaySettings(port=port, limits=LIMITS),
            target="tests.gateway.frontends.conformance:app",
            certificate=certificate, key=key, workers=1,
        )  # fmt: skip
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from gateway.frontends.intercept_reverse import Reverse
    with Reverse(SiteApp(), LIMITS, port=port, certificate=certificate, key=key) as running:
        while running.alive:
            time.sleep(0.1)


# --- For tests ------------------------------------------------------------------------------------


def observation(patient: str) -> bytes:
    text = json.dumps(
        {
            "resourceType": "Observation", "id": f"o{patient}", "status": "final",
            "code": {"text": "SECRET of the record"},
            "subject": {"reference": f"Patient/{patient}"},
        }
    ).encode()  # fmt: skip
    fields = b"Content-Type: application/fhir+json\r\nServer: leaky/1.0\r\n"
    return OK + fields + b"Content-Length: %d\r\n\r\n" % len(text) + text


ANSWERS.update(
    {
        f"/fhir/Observation/o{MINE}": observation(MINE),
        f"/fhir/Observation/o{OTHER}": observation(OTHER),
        "/cookies": OK
        + b"Set-Cookie: theirs=1\r\nSet-Cookie: __Host-havengate=forged\r\n"
        + b"Content-Length: 2\r\n\r\nok",
        "/unchanged": b'HTTP/1.1 304 Not Modified\r\nETag: "1"\r\n\r\n',
        "/hops": OK
        + b"Connection: x-hop\r\nX-Hop: 1\r\nHavengate-Identity: forged\r\n"
        + b"Content-Length: 2\r\n\r\nok",
        "/odd": OK
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + b"".join(b"%x\r\n%s\r\n" % (size, b"x" * size) for size in range(1, PIECES))
        + b"0\r\n\r\n",
        "/endless": OK + b"Content-Length: 100000000\r\n\r\n" + b"x" * 1_000_000,
        "/too-much": OK + b"Content-Length: 4000000\r\n\r\n" + b"x" * 4_000_000,
    }
)  # fmt: skip


class Behind:
    """The app behind, in a thread of its own."""

    def __enter__(self) -> App:
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._ready.wait(5)
        return self.app

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        async def run() -> None:
            async with misbehaving() as made:
                own = f"http://127.0.0.1:{made.port}".encode()
                ANSWERS["/away"] = _AWAY % own
                self.app = made
                self._ready.set()
                await self._stop.wait()

        self._loop.run_until_complete(run())
        self._loop.close()


class Standing:
    """A frontend that serves."""

    def __init__(self, frontend: str, running: Running, behind: App) -> None:
        self.frontend = frontend
        self.running = running
        self.behind = behind

    def entries(self, since: int = 0) -> list[Entry]:
        lines = self.running.said()[since:].splitlines()
        return [parse_entry(one.removeprefix("ENTRY ").encode()) for one in lines if _told(one)]

    def acts(self, since: int = 0) -> list[str]:
        """`allow` or `deny` of each intent, and each outcome."""
        return [str(one.outcome or one.decision) for one in self.entries(since)]


def _told(line: str) -> bool:
    return line.startswith("ENTRY ")


@contextlib.contextmanager
def standing(frontend: str, directory: Path) -> Iterator[Standing]:
    files: Certificate = certify(directory)
    port = free_port()
    output = directory / "output.txt"
    with Behind() as behind, output.open("wb") as sink:
        upstream = f"http://127.0.0.1:{behind.port}"
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.gateway.frontends.conformance", frontend,
             str(files.certificate), str(files.key)],
            cwd=ROOT,
            env={
                **os.environ, "HAVENGATE_TEST_PORT": str(port), "HAVENGATE_TEST_UPSTREAM": upstream
            },
            stdout=sink,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        running = Running(process=process, port=port, output=output, certificate=files)
        try:
            _wait(running)
            yield Standing(frontend, running, behind)
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(running: Running) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and running.process.poll() is None:
        with contextlib.suppress(OSError):
            running.connect().close()
            return
        time.sleep(0.05)
    raise AssertionError(f"It does not serve: {running.said()}")


if __name__ == "__main__":
    main()
