"""`make demo`: a gateway in front of an app, a scripted morning, and a study over four sites.

Starts on loopback, as processes of their own: the example clinic (`examples.clinic`) and `havengate
up` with its key server. Everything lies below `./var/demo`. Then it drives what a clinic sees in a
morning through the gateway, says what to open, and stays up until Ctrl-C. `--once` ends by itself.
The patients are synthetic (package `carebundle`, Apache-2.0) and are nobody.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

# Run as a file, so that `make demo` needs nothing on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.markup import escape

from examples import study
from examples.visitor import Answer, Visitor, secret_of

ROOT = Path(__file__).resolve().parent.parent
HOME = Path("var/demo")
EXAMPLE = ROOT / "examples" / "clinic"
START_S = 180.0
#: Name at sign-in, and what `havengate users add` is told.
PEOPLE = {
    "adler": ("--role", "clinician", "--role", "staff", "--reference", "Practitioner/1"),
    "dorn": ("--role", "clinician", "--role", "staff", "--reference", "Practitioner/4"),
    "patient-1": ("--patient", "1"),
}
#: Who they are, for whoever signs in as one of them.
ROLES = {
    "adler": "a clinician who treats Patient/1",
    "dorn": "a clinician who treats nobody here",
    "patient-1": "Patient/1 herself",
}

console = Console(highlight=False)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="A gateway, a clinic, a morning.")
    parser.add_argument("--once", action="store_true", help="end after the morning")
    parser.add_argument("--any-ports", action="store_true", help="do not try the usual ports")
    words = parser.parse_args()
    once = words.once
    # Stopping from outside must stop what was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started_at = time.monotonic()
    played_before = (HOME / "var/gateway.sqlite3").exists()
    HOME.mkdir(parents=True, exist_ok=True)
    console.print("[bold]Havengate[/]: a gateway in front of a clinic that knows nothing of it\n")
    with ExitStack() as stack:
        ports = free_ports(usual=not words.any_ports)
        configure(ports)
        # Both at once: each has a second of its own to load, and the gateway waits for no app.
        clinic = stack.enter_context(clinic_process(ports["clinic"]))
        gateway = stack.enter_context(gateway_process())
        clinic.wait_for(f"http://127.0.0.1:{ports['clinic']}/fhir/metadata")
        say(
            "the clinic",
            f"24 synthetic patients at http://127.0.0.1:{ports['clinic']}, open to all",
        )
        gateway.wait_for(f"http://127.0.0.1:{ports['admin']}/readyz")
        base = f"https://localhost:{ports['gateway']}"
        say("the gateway", f"stands in front at {base}; keys, log and rules are ready")
        people = accounts(played_before=played_before)
        visitors = sign_in(base, people)
        morning(visitors, base)
        verdict = havengate("audit", "verify").strip().splitlines()[-1]
        say("the log", f"is sound: {verdict.removeprefix('Sound').strip()}")
        console.print(f"\nThe morning took {time.monotonic() - started_at:.0f} s.")
        console.print("\n[bold]A study[/]: one question to 5,068 people at four sites\n")
        study.play(HOME / "study", say)
        if once:
            return
        show_doors(base, people, ports)
        try:
            signal.pause()
        except KeyboardInterrupt:
            console.print("\nStopping …")


# --- Starting -------------------------------------------------------------------------------------


def free_ports(*, usual: bool) -> dict[str, int]:
    """The usual ports, or others where those are taken."""
    return {
        name: port if usual and is_free(port) else any_free()
        for name, port in (("gateway", 8443), ("admin", 8444), ("clinic", 8090))
    }


def is_free(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def any_free() -> int:
    """A port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def configure(ports: dict[str, int]) -> None:
    """Put the example's configuration and rules below `HOME`."""
    text = (EXAMPLE / "havengate.toml").read_text(encoding="utf-8")
    for name, usual in (("gateway", 8443), ("admin", 8444), ("clinic", 8090)):
        text = text.replace(str(usual), str(ports[name]))
    (HOME / "havengate.toml").write_text(text, encoding="utf-8")
    shutil.copytree(EXAMPLE / "policies", HOME / "policies", dirs_exist_ok=True)


class Started:
    """A process on its way up. Its words go into a file."""

    def __init__(self, name: str, command: list[str]) -> None:
        self._name = name
        self._log = HOME / f"{name}.log"
        with self._log.open("wb") as words:
            self._running = subprocess.Popen(
                command,
                stdout=words,
                stderr=words,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )

    def wait_for(self, ready: str) -> None:
        """Return once `ready` answers. Ends the demo, with the process's words, if it does not."""
        deadline = time.monotonic() + START_S
        with console.status(f"starting the {self._name} …"):
            while not answers(ready):
                if self._running.poll() is not None or time.monotonic() > deadline:
                    console.print(escape(self._log.read_text(errors="replace")[-2000:]))
                    raise SystemExit(f"The {self._name} did not start; see {self._log}.")
                time.sleep(0.1)

    def end(self) -> None:
        """Let it end by itself; if it does not, make it."""
        self._running.terminate()
        try:
            self._running.wait(timeout=40)
        except subprocess.TimeoutExpired:
            self._running.kill()


@contextmanager
def process(name: str, command: list[str]) -> Iterator[Started]:
    """A process that is gone at the end."""
    started = Started(name, command)
    try:
        yield started
    finally:
        started.end()


def clinic_process(port: int) -> AbstractContextManager[Started]:
    """The app behind, with its people loaded anew."""
    for leftover in HOME.glob("clinic.sqlite3*"):
        leftover.unlink()
    command = [sys.executable, "-m", "examples.clinic", "--port", str(port)]
    return process("clinic", [*command, "--database", str(HOME / "clinic.sqlite3"), "--load"])


def gateway_process() -> AbstractContextManager[Started]:
    """`havengate up` in front of it."""
    return process("gateway", [*HAVENGATE, "up"])


def answers(url: str) -> bool:
    """Whether an address answers with 200."""
    try:
        with urlopen(url, timeout=2) as response:  # noqa: S310 - loopback, written above
            return bool(response.status == 200)  # noqa: PLR2004
    except (URLError, OSError):
        return False


HAVENGATE = [
    sys.executable, "-m", "havengate", "--config", str(HOME / "havengate.toml"),
]  # fmt: skip


def havengate(*words: str) -> str:
    """Run the command and return what it says."""
    done = subprocess.run(
        [*HAVENGATE, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode != 0:
        raise SystemExit(f"havengate {' '.join(words)}: {done.stderr.strip() or done.stdout}")
    return done.stdout


def accounts(*, played_before: bool) -> dict[str, dict[str, str]]:
    """One account for each of `PEOPLE`, with a second factor: made, or given a new password."""
    with console.status("making accounts …"):
        listed = json.loads(havengate("users", "list", "--json")) if played_before else []
        known = {account["name"] for account in listed}

        def make(name: str) -> dict[str, str]:
            words = ("reset", name) if name in known else ("add", name, *PEOPLE[name])
            made: dict[str, str] = json.loads(
                havengate("users", *words, "--print-second-factor", "--json")
            )
            return made

        # Most of a command's time is spent on loading libraries.
        with ThreadPoolExecutor() as several:
            made = dict(zip(PEOPLE, several.map(make, PEOPLE), strict=True))
    say("accounts", f"{', '.join(PEOPLE)}, each with a password and a second factor")
    return made


def sign_in(base: str, people: dict[str, dict[str, str]]) -> dict[str, Visitor]:
    """Everybody signs in."""
    visitors = {}
    for name, account in people.items():
        visitors[name] = Visitor(base, HOME / "var/tls/current/ca.pem")
        visitors[name].sign_in(name, account["password"], account["second_factor_uri"])
    return visitors


# --- The morning ----------------------------------------------------------------------------------


def morning(visitors: dict[str, Visitor], base: str) -> None:
    """What happens, in order. Each step says what came of it; a wrong one ends the demo."""
    console.print()
    adler, dorn, patient = visitors["adler"], visitors["dorn"], visitors["patient-1"]
    a_clinician_reads(adler)
    a_patient_writes(patient)
    a_sealed_field_is_searched(adler)
    a_note_stays_closed(adler, dorn, patient)
    an_export_is_refused(adler)
    a_break_in_is_refused(base)
    break_glass_opens_one_record(dorn)


def a_clinician_reads(adler: Visitor) -> None:
    """Her own patient opens, somebody else's does not."""
    record = expect(adler.get("/fhir/Patient/1"), 200).json()
    name = record["name"][0]
    found = expect(adler.get("/fhir/Observation?patient=1&_count=5"), 200).json()
    say(
        "Dr Adler reads", f"{name['given'][0]} {name['family']}, {len(found['entry'])} observations"
    )
    refused = expect(adler.get("/fhir/Patient/2"), 403).json()
    say("… and not", f"Patient/2: {refused['issue'][0]['diagnostics'].partition(' (')[0]}")


def a_patient_writes(patient: Visitor) -> None:
    """What she writes is ciphertext in the app's database, and her own words for her."""
    words = "Slept well for the first time in weeks."
    expect(
        patient.post(
            "/api/moods/1", {"mood": 7, "note": words}, **{"content-type": "application/json"}
        ),
        201,
    )
    kept = database("SELECT note FROM mood WHERE patient = '1' ORDER BY at DESC LIMIT 1")
    mine = expect(patient.get("/api/moods/1"), 200).json()["entries"]
    if words in kept or not any(entry["note"] == words for entry in mine):
        raise SystemExit("The diary entry was not sealed, or did not come back.")
    say("a patient writes", f"“{words}”")
    say("… the app keeps", f"{kept[:48]}…")


def a_sealed_field_is_searched(adler: Visitor) -> None:
    """An exact value is found although the app has only ciphertext and a token of it."""
    record = expect(adler.get("/fhir/Patient/1"), 200).json()
    record["telecom"] = [{"system": "phone", "value": "+43 1 555 0199"}]
    expect(adler.ask("PUT", "/fhir/Patient/1", body=record), 200)
    found = expect(adler.get("/fhir/Patient?phone=%2B43%201%20555%200199"), 200).json()
    if [entry["resource"]["id"] for entry in found["entry"]] != ["1"]:
        raise SystemExit("The sealed telephone number was not found.")
    if "555 0199" in database("SELECT group_concat(body) FROM resource"):
        raise SystemExit("The telephone number stands in the app's database.")
    say("a sealed search", "+43 1 555 0199 finds Patient/1; the app's database does not hold it")


def a_note_stays_closed(adler: Visitor, dorn: Visitor, patient: Visitor) -> None:
    """A psychotherapy note is open to its author, and to nobody else."""
    expect(adler.get("/fhir/DocumentReference/note-1"), 200)
    others = {
        "another clinician": dorn.get("/fhir/DocumentReference/note-1"),
        "the patient": patient.get("/fhir/DocumentReference/note-1"),
    }
    for answer in others.values():
        if answer.status != 404:  # noqa: PLR2004 - as if there were no such note
            raise SystemExit(f"A psychotherapy note was answered with {answer.status}.")
    told = " and ".join(others)
    say("a therapist's note", f"opens for its author; {told} are told that there is none (404)")


def an_export_is_refused(adler: Visitor) -> None:
    """Reading is not taking away."""
    refused = expect(adler.get("/fhir/Patient/1/$everything"), 403).json()
    told = refused["issue"][0]["diagnostics"].partition(" (")[0]
    say("an export", f"of the whole record is refused: {told}")


def a_break_in_is_refused(base: str) -> None:
    """Nobody, somebody with a forged token, and somebody who speaks in the gateway's name."""
    stranger = Visitor(base, HOME / "var/tls/current/ca.pem")
    forged = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZGxlciIsInJvbGVzIjpbImNsaW5pY2lhbiJdfQ."
    attempts = {
        "no sign-in": stranger.get("/fhir/Patient/1"),
        "a forged token": stranger.get("/fhir/Patient/1", authorization=f"Bearer {forged}"),
        "a forged header": stranger.get("/fhir/Patient/1", **{"havengate-identity": forged}),
        "a crooked path": stranger.get("/fhir/%2e%2e/fhir/Patient/1"),
    }
    if any(answer.status < 400 for answer in attempts.values()):  # noqa: PLR2004
        raise SystemExit("A break-in succeeded.")
    told = ", ".join(f"{name} ({answer.status})" for name, answer in attempts.items())
    say("a break-in", f"is refused: {told}")


def break_glass_opens_one_record(dorn: Visitor) -> None:
    """With a reason, for one patient, for an hour; and somebody will look at it afterwards."""
    expect(dorn.get("/fhir/Patient/3"), 403)
    dorn.break_glass("3", "Found unconscious at the station, no card", 60)
    expect(dorn.get("/fhir/Patient/3"), 200)
    expect(dorn.get("/fhir/Patient/6"), 403)
    say("break-glass", "Dr Dorn opens Patient/3 with a reason, for an hour; Patient/6 stays closed")


# --- Telling --------------------------------------------------------------------------------------


def show_doors(base: str, people: dict[str, dict[str, str]], ports: dict[str, int]) -> None:
    """Say what to open, and how."""
    console.print("\n[bold]It is yours now.[/] Open this and sign in:\n")
    console.print(f"  {base}/patients/1", style="bold cyan")
    for name, account in people.items():
        secret = secret_of(account["second_factor_uri"])
        console.print(f"  [bold]{name:<10}[/] {ROLES[name]}", soft_wrap=True)
        console.print(f"             password     {account['password']}", soft_wrap=True)
        console.print(f"             TOTP secret  {secret}", soft_wrap=True)
    console.print("\n  The browser asks about the certificate, because it was issued here.")
    console.print("  Codes: enter the TOTP secret in any authenticator app, or")
    console.print("         oathtool -b --totp SECRET")
    console.print(f"  Health and metrics: http://127.0.0.1:{ports['admin']}/readyz  /metrics")
    command = f".venv/bin/havengate --config {HOME}/havengate.toml"
    for what, words in (
        ("Who saw Patient/1, and by which rule", "audit search --patient Patient/1 --reveal"),
        ("Who opened a record in an emergency, and why", "users break-glass"),
        ("Whether anybody changed the log", "audit verify"),
    ):
        console.print(f"  {what}:\n    {command} {words}", soft_wrap=True)
    console.print("\nCtrl-C stops everything; what was written stays in ./var/demo.")


def say(what: str, words: Any) -> None:
    """One line of the morning."""
    console.print(f"  [green]✓[/] [bold]{what:<19}[/] {escape(str(words))}", soft_wrap=True)


def expect(answer: Answer, status: int) -> Answer:
    """The answer, if it has that status. Otherwise the demo ends."""
    if answer.status != status:
        raise SystemExit(f"Expected {status}, got {answer.status}: {answer.text[:500]}")
    return answer


def database(query: str) -> str:
    """What the app's database holds."""
    with closing(sqlite3.connect(HOME / "clinic.sqlite3")) as connection:
        row = connection.execute(query).fetchone()
        return str(row[0])


if __name__ == "__main__":
    main()
