"""`havengate study` with real accounts, a real key server and a real log."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyotp
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.note import VerifierKey
from audit.reader import LogReader
from federated.code_hash import installed_code_hash
from federated.signed_study import verify_study
from havengate import log_keys, studies
from havengate.configuration import load
from tests.havengate.command import run, run_json
from tests.openbao import RunningServer

STUDY = """
id = "sleep-and-mood"
title = "Sleep and mood"
question = "How does mood differ with hours slept?"
valid_from = FROM
minimum_cohort = 10
sites = ["north"]
roster = "ROSTER"
code_hash = "CODE"
aggregation = { threshold = 3 }

[[queries]]
epsilon = 0.5
ask = { kind = "mean", name = "mood", column = "mood" }
""".replace("ROSTER", "ab" * 32).replace("FROM", str(int(time.time()) - 60))


class Clinic:
    """A home directory with people in it who know their passwords and codes."""

    def __init__(self, home: Path, server: Path) -> None:
        self.home = home
        self.people: dict[str, tuple[str, str]] = {}
        self.keys: dict[str, str] = {}
        (home / "havengate.toml").write_text(
            f'tenant = "clinic"\n[keys.embedded]\ndirectory = "{server}"\n'
            '[federated.officers]\nnorth = ["nora"]\n',
            encoding="utf-8",
        )
        (home / "var").mkdir(mode=0o700)
        for name in ("coordinator", "board", "north"):
            file = home / "var" / f"{name}.key"
            self.keys[name] = run_json(home, "study", "key", str(file))["public_key"]
        self.enrol()

    def enrol(self) -> None:
        """Write whose approvals count."""
        witness = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
        settings = load(self.home / "havengate.toml", {})
        places = self.home / "var" / "federated"
        places.mkdir(mode=0o700)
        (places / "federation.json").write_text(
            json.dumps(
                {
                    "node": "all",
                    "coordinator": [self.keys["coordinator"]],
                    "ethics_board": [self.keys["board"]],
                    "sites": {"north": [self.keys["north"]]},
                    "origin": settings.audit.origin,
                    "log_keys": [key.text for key in log_keys.read_verifier_keys(settings, {})],
                    "witness_keys": [VerifierKey.cosigner("witness.example", witness).text],
                }
            )
        )
        (places / "federation.json").chmod(0o600)

    def add(self, name: str, role: str) -> None:
        made = run_json(self.home, "users", "add", name, "--role", role, "--print-second-factor")
        uri = next(value for value in made.values() if str(value).startswith("otpauth://"))
        self.people[name] = (made["password"], parse_qs(urlsplit(uri).query)["secret"][0])

    def answers(self, name: str) -> Iterator[str]:
        password, seed = self.people[name]
        yield from (name, password, pyotp.TOTP(seed).now())


@pytest.fixture
def clinic(tmp_path: Path, openbao: RunningServer) -> Clinic:
    return Clinic(tmp_path, Path(openbao.settings.embedded.directory))


def at_the_desk(patch: pytest.MonkeyPatch, answers: Iterator[str]) -> None:
    patch.setattr(studies, "_ask", lambda _what, _hidden: next(answers))


def entries(clinic: Clinic) -> list[dict[str, Any]]:
    log = LogReader(Path(load(clinic.home / "havengate.toml", {}).audit.directory))
    return [json.loads(raw) for _, raw in log.read()]


def test_people_with_accounts_propose_and_approve(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, role in (("ruth", "researcher"), ("emil", "ethics-board"), ("nora", "site-officer")):
        clinic.add(name, role)
    file, whole = clinic.home / "draft.toml", clinic.home / "study.toml"
    file.write_text(STUDY.replace("CODE", installed_code_hash()))
    run_json(clinic.home, "study", "plan", str(file), "--people", "500", "--out", str(whole))

    at_the_desk(monkeypatch, clinic.answers("ruth"))
    assert run_json(clinic.home, "study", "propose", str(whole))["stage"] == "proposed"
    board = ["--as", "ethics-board", "--key", str(clinic.home / "var" / "board.key")]
    at_the_desk(monkeypatch, clinic.answers("emil"))
    run_json(clinic.home, "study", "approve", "sleep-and-mood", *board)
    north = ["--as", "site", "--site", "north", "--key", str(clinic.home / "var" / "north.key")]
    at_the_desk(monkeypatch, clinic.answers("nora"))
    found = run_json(clinic.home, "study", "approve", "sleep-and-mood", *north)
    assert found["stage"] == "published"
    assert run_json(clinic.home, "study", "ledger") == {"rows": 0, "mended": 0, "balances": {}}

    with studies.open_studies(load(clinic.home / "havengate.toml", {}), {}) as program:
        signed = program.approvals.signed("sleep-and-mood")
        verify_study(signed, program.approvals._trusted)
    said = [one["action"] for one in entries(clinic) if one["action"].startswith("study.")]
    assert [said[at] for at in range(0, 8, 2)] == [
        "study.propose",
        "study.approve",
        "study.approve",
        "study.publish",
    ]
    assert not any(name in json.dumps(entries(clinic)) for name in ("ruth", "emil", "nora"))
    assert not [one for one in entries(clinic) if one.get("outcome") == "failed"]


def test_a_wrong_code_signs_nobody_in(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    clinic.add("ruth", "researcher")
    file, whole = clinic.home / "draft.toml", clinic.home / "study.toml"
    file.write_text(STUDY.replace("CODE", installed_code_hash()))
    run_json(clinic.home, "study", "plan", str(file), "--people", "500", "--out", str(whole))
    password, _ = clinic.people["ruth"]
    for answers in (["ruth", password, "000000"], ["ruth", "wrong", ""], ["nobody", "x", ""]):
        at_the_desk(monkeypatch, iter(answers))
        code, _, err = run(clinic.home, "study", "propose", str(whole))
        assert code == 1
        assert "Name, password or code is wrong" in err
    assert run(clinic.home, "study", "list")[1] == "No study was proposed yet.\n"


def test_says_what_is_missing(clinic: Clinic) -> None:
    (clinic.home / "var" / "federated" / "federation.json").chmod(0o644)
    code, _, err = run(clinic.home, "study", "list")
    assert code == 3
    assert "whose approvals count" in err
    (clinic.home / "var" / "federated" / "federation.json").chmod(0o600)
    (clinic.home / "var" / "coordinator.key").unlink()
    # Looking needs no key, and anything else says how to make one.
    assert run(clinic.home, "study", "list")[0] == 0
    code, _, err = run(clinic.home, "study", "ledger")
    assert "havengate study key" in err
    assert code == 1
    code, _, err = run(clinic.home, "study", "propose", str(clinic.home / "no.toml"))
    assert code == 2
    assert run(clinic.home, "device", "--help")[0] == 0


def test_what_the_guide_says_works_as_it_is_written(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "studies.md").read_text(encoding="utf-8")
    first, draft, model, settings = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    for text in (first, settings):
        (tmp_path / "havengate.toml").write_text(text, encoding="utf-8")
        assert load(tmp_path / "havengate.toml", {}).federated.officers == {"north": ("nora",)}
    (tmp_path / "mood.toml").write_text(draft, encoding="utf-8")
    code, out, err = run(tmp_path, "study", "plan", "mood.toml", "--people", "562")
    assert code == 0, err
    assert "All together cost each person ε = 1" in out
    learning = draft.partition("[[queries]]")[0] + model
    (tmp_path / "model.toml").write_text(learning, encoding="utf-8")
    code, out, err = run(tmp_path, "study", "plan", "model.toml", "--people", "562")
    assert code == 0, err
    assert "12 at most; a person pays once for all of them" in out
    code, _, err = run(
        tmp_path, "study", "plan", "mood.toml", "--people", "562", "--out", "study.toml"
    )
    assert (code, "No node is enrolled here yet" in err) == (2, True)
    # Every command of the guide is one.
    for command in set(re.findall(r"havengate (study|federated) ([a-z-]+)", guide)):
        assert run(tmp_path, *command, "--help")[0] == 0, command
