"""Our side of the ingress benchmark: a gateway as an operator runs it, and what it stands before.

The standard exchange: a signed-in clinician searches eight Observations of a patient whom she
treats; two elements of each are sealed; one of the eight loses its note to an obligation; all
built-in rules are in force; intent and outcome are durable.

The sealed answer is made by the gateway itself: it is started before the example clinic, the
Observations are written through it, and what the clinic then holds is served from files, on the
same port, by an app that is too fast to be what is measured.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from benchmarks.ingress_load import fetch, free_port, running, serving_files
from gateway.identity.credentials import SESSION_COOKIE
from gateway.identity.directory import Directory
from gateway.settings import SessionSettings

OBSERVATIONS = 8
SEARCH = "/fhir/Observation?patient=1"
_VALUE, _NOTE = "Slept four hours, woke at three", "Speaks of the brother for the first time"

_CONFIGURATION = """
tenant = "bench"

[gateway]
port = {port}
admin_port = {admin_port}

[[gateway.routes]]
name = "records"
kind = "ehr"
path = "/fhir"
upstream = "http://127.0.0.1:{upstream_port}"
content = "fhir"
patient_facts = "upstream"
fields = [
  {{ path = "Observation.valueString", seal = true }},
  {{ path = "Observation.note.text", seal = true }},
]

[policies]
directory = "policies"
"""
#: Beside all the built-in ones: a record that speaks of violence is released without its note.
_RULE = """
@id("bench.note")
@title("Observations about violence are shown without their note")
@cites("the standard exchange of the benchmark")
@grants("nothing")
@obligation_redact("Observation.note")
permit (
  principal is User in Role::"clinician",
  action in [Action::"read", Action::"search"],
  resource is Record in Label::"SDV"
);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """A running gateway. `headers` carry a session."""

    url: str
    upstream: str
    headers: dict[str, str] = field(repr=False)
    directory: Path
    pid: int

    def vault_calls(self) -> tuple[int, int]:
        """Requests that the key server has written to its own audit log until now.

        Those for exchanges, and the signatures of the log's checkpoints: one a second, however many
        exchanges there are.
        """
        log = self.directory / "var" / "openbao" / "audit.log"
        exchanges = checkpoints = 0
        with log.open(encoding="utf-8") as lines:
            for line in lines:
                entry = json.loads(line)
                if entry.get("type") == "request":
                    signed = str(entry["request"].get("path", "")).endswith("/sign/audit-log")
                    checkpoints += signed
                    exchanges += not signed
        return exchanges, checkpoints

    def resident_bytes(self) -> int:
        """Memory of the gateway and its workers, without the key server."""
        own = psutil.Process(self.pid)
        family = [own, *own.children(recursive=True)]
        return sum(one.memory_info().rss for one in family if "bao" not in one.name())


@contextmanager
def start_gateway(directory: Path) -> Iterator[Gateway]:
    """Run `havengate up` in `directory`; before it, an app that serves the sealed searchset.

    Raises `RuntimeError` if the exchange is not the one that this module describes.
    """
    port, admin_port, upstream_port = _ports()
    (directory / "policies").mkdir()
    (directory / "policies" / "bench.cedar").write_text(_RULE)
    (directory / "havengate.toml").write_text(
        _CONFIGURATION.format(port=port, admin_port=admin_port, upstream_port=upstream_port)
    )
    url = f"https://127.0.0.1:{port}"
    headers = {"accept": "application/fhir+json", "sec-fetch-site": "same-origin"}
    headers["cookie"] = f"{SESSION_COOKIE}={_session(directory)}"
    command: list[str | Path] = [Path(sys.executable).with_name("havengate"), "up"]
    with ExitStack() as stack:
        clinic = stack.enter_context(_clinic(directory, upstream_port))
        process = stack.enter_context(
            running(
                command,
                f"http://127.0.0.1:{admin_port}/readyz",
                log=directory / "gateway.log",
                cwd=directory,
            )
        )
        files = _record(url, headers, f"http://127.0.0.1:{upstream_port}")
        clinic.close()
        empty = json.dumps({"resourceType": "Bundle", "type": "searchset", "total": 0}).encode()
        upstream = stack.enter_context(
            serving_files(files, empty, upstream_port, directory / "upstream")
        )
        verify_exchange(url, headers)
        yield Gateway(
            url=url, upstream=upstream, headers=headers, directory=directory, pid=process.pid
        )


def verify_exchange(url: str, headers: dict[str, str]) -> None:
    """Raise `RuntimeError` unless the answer is eight opened Observations, one without a note."""
    status, body = fetch(url + SEARCH, headers)
    if status != 200:
        raise RuntimeError(f"expected the searchset, got status {status}")
    entries = json.loads(body).get("entry", [])
    opened = body.decode().count(_VALUE)
    notes = body.decode().count(_NOTE)
    if (len(entries), opened, notes) != (OBSERVATIONS, OBSERVATIONS, OBSERVATIONS - 1):
        raise RuntimeError(
            f"expected {OBSERVATIONS} entries, as many opened values and one note less, "
            f"got {len(entries)}, {opened} and {notes}"
        )


def _ports() -> tuple[int, int, int]:
    return free_port(), free_port(), free_port()


def _session(directory: Path) -> str:
    """The token of a session of a clinician who has just shown her second factor."""
    (directory / "var").mkdir(mode=0o700)
    url = f"sqlite:///{directory / 'var' / 'gateway.sqlite3'}"
    people = Directory.open(url, settings=SessionSettings(), clock=time.time)
    try:
        account = people.accounts.add(
            login="clinician",
            password_hash="unusable",  # noqa: S106 - nobody signs in with it
            roles=frozenset({"clinician", "staff"}),
            references=frozenset({"Practitioner/1"}),
        )
        people.accounts.second_factor_set(account.id)
        token, _ = people.sessions.begin(account.id, second_factor="totp")
    finally:
        people.close()
    return token


@contextmanager
def _clinic(directory: Path, port: int) -> Iterator[ExitStack]:
    """The example clinic with one patient and her team; close what is yielded to stop it."""
    base = f"http://127.0.0.1:{port}/fhir"
    command = [sys.executable, "-m", "examples.clinic", "--port", str(port)]
    command += ["--database", str(directory / "clinic.sqlite3")]
    root = Path(__file__).resolve().parent.parent
    with ExitStack() as stack:
        stack.enter_context(
            running(command, f"{base}/metadata", log=directory / "clinic.log", cwd=root)
        )
        for resource in (
            {"resourceType": "Patient", "id": "1", "name": [{"family": "Roth"}]},
            {
                "resourceType": "CareTeam",
                "id": "1",
                "status": "active",
                "subject": {"reference": "Patient/1"},
                "participant": [{"member": {"reference": "Practitioner/1"}}],
            },
        ):
            _put(base, {}, resource)
        yield stack


def _record(url: str, headers: dict[str, str], upstream: str) -> dict[str, bytes]:
    """Write the Observations through the gateway; return what the app then answers, by path."""
    for number in range(1, OBSERVATIONS + 1):
        _put(f"{url}/fhir", headers, _observation(number))
    files: dict[str, bytes] = {}
    # What the gateway asks about relations and consents has its answers here, too.
    for path in ("/fhir/Patient/1", "/fhir/Patient?_id=1", "/fhir/CareTeam?patient=1", SEARCH):
        status, body = fetch(upstream + path)
        if status != 200:
            raise RuntimeError(f"expected {path} from the clinic, got status {status}")
        files[path.partition("?")[0]] = body
    sealed = files["/fhir/Observation"].decode()
    if _VALUE in sealed or _NOTE in sealed:
        raise RuntimeError("expected sealed elements in the app, got readable ones")
    return files


def _put(base: str, headers: dict[str, str], resource: dict[str, Any]) -> None:
    place = f"{resource['resourceType']}/{resource['id']}"
    sent = {**headers, "content-type": "application/fhir+json"}
    body = json.dumps(resource).encode()
    status, answer = fetch(f"{base}/{place}", sent, method="PUT", body=body)
    if status not in {200, 201}:
        raise RuntimeError(f"expected {place} to be stored, got {status}: {answer[:500]!r}")


def _observation(number: int) -> dict[str, Any]:
    label = {"system": "http://terminology.hl7.org/CodeSystem/v3-ActCode", "code": "SDV"}
    return {
        "resourceType": "Observation",
        "id": str(number),
        **({"meta": {"security": [label]}} if number == OBSERVATIONS else {}),
        "status": "final",
        "code": {"coding": [{"system": "http://loinc.org", "code": "44261-6"}]},
        "subject": {"reference": "Patient/1"},
        "effectiveDateTime": f"2026-11-{number:02}T09:30:00Z",
        "performer": [{"reference": "Practitioner/1"}],
        "valueString": f"{_VALUE} ({number})",
        "note": [{"text": f"{_NOTE} ({number})"}],
    }
