"""What a command does when something fails around it: it neither lies, nor leaks, nor loses."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from audit.publish import Publisher
from audit.reader import LogReader
from havengate import wiring
from havengate.configuration import load
from havengate.operational_log import configure
from keys.errors import VaultUnavailableError
from keys.model import FieldContext
from tests.havengate.command import run
from tests.openbao import RunningServer, running_server

PERSON = "Patient/faults"


@pytest.fixture
def home(tmp_path: Path, openbao: RunningServer) -> Path:
    """A directory with a configuration that uses the shared key server."""
    server = openbao.settings.embedded.directory
    (tmp_path / "havengate.toml").write_text(
        f'[keys.embedded]\ndirectory = "{server}"\n', encoding="utf-8"
    )
    return tmp_path


def seal_something(home: Path) -> None:
    with wiring.open_program(load(home / "havengate.toml", {}), {}) as program:
        context = FieldContext(tenant="clinic", person=PERSON, service="ehr", field="Note.text")
        program.keys.keyring.seal(context, b"a note")


def test_a_sealed_key_server_is_shown_as_sealed(tmp_path: Path) -> None:
    with running_server(tmp_path / "server") as server:
        roles = ""
        for role in ("gateway", "operator", "audit"):
            files = server.embedded.credentials(role)
            roles += (
                f"[keys.vault.roles.{role}]\n"
                f"role_id_file = '{files.role_id_file}'\n"
                f"secret_id_file = '{files.secret_id_file}'\n"
            )
        (tmp_path / "havengate.toml").write_text(
            f"[keys.vault]\naddress = '{server.embedded.address}'\n"
            f"ca_file = '{server.embedded.ca_file}'\nattempts = 1\n{roles}",
            encoding="utf-8",
        )
        server.seal()
        code, out, err = run(tmp_path, "keys", "status")
        assert code == 3
        assert out.rstrip().endswith(", sealed")
        assert "is sealed; unseal it" in err


def test_a_receipt_is_printed_even_if_the_checkpoint_cannot_be_signed_just_then(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: Publisher) -> None:
        raise VaultUnavailableError("away")

    seal_something(home)
    monkeypatch.setattr(Publisher, "publish", away)
    code, out, err = run(home, "keys", "erase", PERSON, "--yes", "--json")
    assert code == 0, err
    assert json.loads(out)["log_index"] >= 0


def test_no_empty_receipt_is_left_when_nothing_was_erased(home: Path) -> None:
    seal_something(home)
    receipt = home / "receipt.json"
    words = ("keys", "erase", PERSON, "--yes", "--receipt", str(receipt))
    code, _, _ = run(home, *words, env={"VAULT_ADDR": "http://127.0.0.1:9"})
    assert code == 2
    assert not receipt.exists()
    code, _, err = run(home, *words)
    assert code == 0, err
    assert json.loads(receipt.read_text())["log_index"] >= 0


def test_who_makes_officers_stands_in_the_log(home: Path) -> None:
    words = ("keys", "officer", "carol", str(home / "carol"), "--half")
    assert run(home, *words, "first")[0] == 0
    assert run(home, *words, "second")[0] == 1
    entries = [json.loads(raw) for _, raw in LogReader(home / "var" / "audit").read()]
    made = [entry for entry in entries if entry["action"] == "keys.officer.create"]
    assert [(entry["stage"], entry.get("outcome")) for entry in made] == [
        ("intent", None),
        ("outcome", "success"),
        ("intent", None),
        ("outcome", "failed"),
    ]
    assert "carol" not in str(entries)


def test_no_officer_is_made_when_the_log_cannot_be_written(home: Path) -> None:
    seal_something(home)
    assert run(home, "keys", "erase", PERSON, "--yes")[0] == 0
    (home / "var" / "audit" / "state").write_bytes(b"overwritten")
    code, _, _ = run(home, "keys", "officer", "dave", str(home / "dave"), "--half", "first")
    assert code == 3
    assert not (home / "dave").exists()


def test_a_user_without_a_name_can_run_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4_242_424)
    assert wiring.current_user({}) == "operator/uid-4242424"


def test_a_value_in_place_of_a_section_is_named(tmp_path: Path) -> None:
    (tmp_path / "havengate.toml").write_text("keys = 3\n", encoding="utf-8")
    variable = "HAVENGATE_KEYS__VAULT__ADDRESS"
    code, _, err = run(tmp_path, "keys", "status", env={variable: "https://vault"})
    assert (code, variable in err) == (2, True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def operational_log(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[io.StringIO]:
    out: io.StringIO = request.param()
    monkeypatch.setattr(sys, "stderr", out)
    configure()
    yield out
    structlog.reset_defaults()


@pytest.mark.parametrize("operational_log", [Terminal, io.StringIO], indirect=True)
def test_no_variable_of_a_failed_call_is_ever_logged(operational_log: io.StringIO) -> None:
    # Made at run time: a traceback shows lines of the source.
    token = f"hvs.{id(operational_log)}"
    try:
        int("not a number")
    except ValueError:
        structlog.get_logger().exception("something.failed")
    assert "something.failed" in operational_log.getvalue()
    assert "test_faults.py" in operational_log.getvalue()
    assert token not in operational_log.getvalue()
