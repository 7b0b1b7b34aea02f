"""`havengate keys` as an operator runs it: real processes, a real key server, a real log."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from audit.errors import LogUnavailableError
from audit.log import LogWriter
from audit.reader import LogReader
from audit.verify import verify_log
from havengate import wiring
from havengate.configuration import Configuration, load
from keys.errors import PersonErasedError
from keys.model import FieldContext
from tests.havengate.command import run, run_json
from tests.openbao import RunningServer

TENANT = "clinic"
ORIGIN = "havengate.internal/log/1"
PERSON = "Patient/erased-by-command"


@pytest.fixture
def home(tmp_path: Path, openbao: RunningServer) -> Path:
    """A directory with a configuration that uses the shared key server."""
    server = openbao.settings.embedded.directory
    (tmp_path / "havengate.toml").write_text(
        f'tenant = "{TENANT}"\n[keys.embedded]\ndirectory = "{server}"\n', encoding="utf-8"
    )
    return tmp_path


def settings_of(home: Path) -> Configuration:
    return load(home / "havengate.toml", {})


def seal_something(home: Path) -> str:
    with wiring.open_program(settings_of(home), {}) as program:
        return program.keys.keyring.seal(context(), b"a note")


def context() -> FieldContext:
    return FieldContext(tenant=TENANT, person=PERSON, service="ehr", field="Observation.note")


def test_a_person_is_erased_with_a_receipt_that_stands_in_the_log(home: Path) -> None:
    text = seal_something(home)
    receipt_file = home / "receipt.json"
    receipt = run_json(home, "keys", "erase", PERSON, "--yes", "--receipt", str(receipt_file))
    assert json.loads(receipt_file.read_text()) == receipt
    assert receipt["decryption_attempted_afterwards"] == "keys.person_erased"
    assert receipt["keys_destroyed"] == [text.split(".")[1]]

    with wiring.open_program(settings_of(home), {}) as program:
        with pytest.raises(PersonErasedError):
            program.keys.keyring.unseal(context(), text)
        keys = program.verifier_keys

    log = Path(settings_of(home).audit.directory)
    entry = json.loads(LogReader(log).entry(receipt["log_index"]))
    assert entry["action"] == "keys.person.erase"
    assert entry["outcome"] == "success"
    assert entry["request"] == receipt["request"]
    assert entry["key_ids"] == receipt["keys_destroyed"]
    assert PERSON not in json.dumps(entry)
    assert verify_log(log, keys).problem_count == 0

    again = run_json(home, "keys", "erase", PERSON, "--yes")
    assert again == receipt | {"already_erased": True}


def test_an_erased_key_that_a_restored_backup_brings_back_is_found_and_erased_again(
    home: Path,
) -> None:
    text = seal_something(home)
    table = home / "var" / "keys.sqlite3"
    backup = home / "backup.sqlite3"
    with sqlite3.connect(table) as source, sqlite3.connect(backup) as target:
        source.backup(target)
    source.close()
    target.close()
    run_json(home, "keys", "erase", PERSON, "--yes")
    for name in ("keys.sqlite3-wal", "keys.sqlite3-shm"):
        (table.parent / name).unlink(missing_ok=True)
    backup.rename(table)
    with wiring.open_program(settings_of(home), {}) as program:
        assert program.keys.keyring.unseal(context(), text) == b"a note"

    code, out, _ = run(home, "keys", "check", "--json")
    assert (code, json.loads(out)["revived"]) == (1, [text.split(".")[1]])
    assert run_json(home, "keys", "erase-again") == {"destroyed": [text.split(".")[1]]}
    assert run_json(home, "keys", "check")["revived"] == []
    with (
        wiring.open_program(settings_of(home), {}) as program,
        pytest.raises(PersonErasedError),
    ):
        program.keys.keyring.unseal(context(), text)


def test_the_installed_command_ends_with_its_exit_code(home: Path) -> None:
    (home / "havengate.toml").write_text("nonsense = 1\n", encoding="utf-8")
    command = [sys.executable, "-m", "havengate", "keys", "status"]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command, cwd=home, env=environ, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


def test_a_misspelt_person_is_no_erasure(home: Path) -> None:
    seal_something(home)
    receipt = home / "receipt.json"
    code, out, err = run(home, "keys", "erase", "Patient 7", "--yes", "--receipt", str(receipt))
    assert (code, out) == (1, "")
    assert "Nothing was erased" in err
    assert "[keys.unknown_person]" in err
    assert not receipt.exists()


def test_nothing_is_erased_without_a_yes(home: Path) -> None:
    text = seal_something(home)
    code, _, err = run(home, "keys", "erase", PERSON)
    assert code == 1
    assert "unreadable for good" in err
    with wiring.open_program(settings_of(home), {}) as program:
        assert program.keys.keyring.unseal(context(), text) == b"a note"


def test_nothing_is_erased_when_the_receipt_cannot_be_written(home: Path) -> None:
    text = seal_something(home)
    missing = str(home / "no-such-directory" / "receipt.json")
    code, _, err = run(home, "keys", "erase", PERSON, "--yes", "--receipt", missing)
    assert code == 2
    assert "nothing was erased" in err
    with wiring.open_program(settings_of(home), {}) as program:
        assert program.keys.keyring.unseal(context(), text) == b"a note"


def test_nothing_is_erased_when_the_log_cannot_be_written(home: Path) -> None:
    text = seal_something(home)
    log = Path(settings_of(home).audit.directory)
    (log / "state").write_bytes(b"overwritten")
    code, _, err = run(home, "keys", "erase", PERSON, "--yes")
    assert code == 3
    assert "state" in err
    with wiring.open_keys(settings_of(home), {}) as keys:
        assert keys.keyring.unseal(context(), text) == b"a note"


def test_rotation_and_trim_keep_every_record_readable(home: Path) -> None:
    text = seal_something(home)
    before = run_json(home, "keys", "status")
    rotated = run_json(home, "keys", "rotate")
    assert rotated["epoch"] == before["current_epoch"] + 1
    trimmed = run_json(home, "keys", "trim", "--before", str(rotated["epoch"]), "--yes")
    assert trimmed["oldest_epoch"] == rotated["epoch"]
    assert run_json(home, "keys", "check")["sound"]
    with wiring.open_program(settings_of(home), {}) as program:
        assert program.keys.keyring.unseal(context(), text) == b"a note"


def test_looking_needs_no_log_and_can_change_nothing(home: Path) -> None:
    text = seal_something(home)
    with LogWriter.open(Path(settings_of(home).audit.directory), origin=ORIGIN):
        # Another process holds the log and does not listen: nothing can be recorded.
        assert run_json(home, "keys", "status")["keys"]["person"] == 1
        assert run_json(home, "keys", "check")["sound"]
        assert run(home, "keys", "rotate")[0] == 3
    with wiring.open_to_look(settings_of(home), {}) as looking:
        with pytest.raises(LogUnavailableError):
            looking.keeper.rotate(actor="operator")
        with pytest.raises(LogUnavailableError):
            looking.eraser.erase(tenant=TENANT, person=PERSON, actor="operator")
    with wiring.open_keys(settings_of(home), {}) as keys:
        assert keys.keyring.unseal(context(), text) == b"a note"


def test_a_mistake_in_the_file_is_one_line_and_exit_code_2(home: Path) -> None:
    (home / "havengate.toml").write_text("[keys.cash]\nmax_age_s = 3\n", encoding="utf-8")
    code, out, err = run(home, "keys", "status")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "Did you mean “cache”?" in err


def test_a_key_server_out_of_reach_is_one_line_and_exit_code_3(home: Path) -> None:
    role = home / "role"
    role.write_text("x")
    role.chmod(0o600)
    files = f"{{role_id_file = '{role}', secret_id_file = '{role}'}}"
    (home / "havengate.toml").write_text(
        "[keys.vault]\naddress = 'http://127.0.0.1:9'\nattempts = 1\n"
        f"[keys.vault.roles]\ngateway = {files}\noperator = {files}\naudit = {files}\n",
        encoding="utf-8",
    )
    code, _, err = run(home, "keys", "status", "--json")
    assert code == 3
    assert json.loads(err)["error"]["code"] == "keys.vault_unavailable"


def test_a_role_without_credentials_is_named(home: Path) -> None:
    code, _, err = run(home, "keys", "status", env={"VAULT_ADDR": "http://127.0.0.1:9"})
    assert code == 2
    assert "[keys.vault.roles.gateway]" in err


def test_set_up_asks_for_a_server_and_a_token(home: Path) -> None:
    code, _, err = run(home, "keys", "set-up", "credentials", env={"VAULT_TOKEN": ""})
    assert (code, "VAULT_TOKEN" in err) == (2, True)
    code, _, err = run(home, "keys", "set-up", "credentials", env={"VAULT_TOKEN": "t"})
    assert (code, "[keys.vault]" in err) == (2, True)


def test_an_existing_server_is_set_up_by_command_and_then_used(
    home: Path, openbao: RunningServer
) -> None:
    address, ca_file = openbao.embedded.address, openbao.embedded.ca_file
    with openbao.embedded.administer() as administrator:
        token = administrator._credentials.token  # type: ignore[union-attr]
        (home / "havengate.toml").write_text(
            f"[keys.vault]\naddress = '{address}'\nca_file = '{ca_file}'\nprefix = 'second'\n"
            + "".join(
                f"[keys.vault.roles.{role}]\n"
                f"role_id_file = 'credentials/{role}.role-id'\n"
                f"secret_id_file = 'credentials/{role}.secret-id'\n"
                for role in ("gateway", "operator", "audit")
            ),
            encoding="utf-8",
        )
        where = str(home / "credentials")
        code, out, err = run(home, "keys", "set-up", where, env={"VAULT_TOKEN": token})
        assert code == 0, err
        assert token not in out + err
        code, again, _ = run(home, "keys", "set-up", where, env={"VAULT_TOKEN": token})
        assert (code, "Everything is in place." in again) == (0, True)
    assert run_json(home, "keys", "status")["current_epoch"] == 1


def test_two_officers_together_learn_who_is_behind_a_pseudonym_and_neither_alone(
    home: Path,
) -> None:
    alice, bob = str(home / "alice"), str(home / "bob")
    run_json(home, "keys", "officer", "alice", alice, "--half", "first")
    run_json(home, "keys", "officer", "bob", bob, "--half", "second")
    code, _, err = run(home, "keys", "officer", "alice", bob, "--half", "second")
    assert (code, "other half" in err) == (1, True)

    made = run_json(home, "keys", "pseudonym", PERSON, "--purpose", "research-7")["pseudonym"]
    other = run_json(home, "keys", "pseudonym", PERSON, "--purpose", "billing")["pseudonym"]
    assert made != other
    first = ("--officer", "alice", "--login", alice)
    second = ("--officer", "bob", "--login", bob)
    step = ("keys", "reidentify")
    asked = run_json(home, *step, "request", made, *first, "--reason", "safety")["request"]
    code, _, err = run(home, *step, "reveal", asked, *first)
    assert (code, "second officer" in err) == (1, True)
    code, _, err = run(home, *step, "approve", asked, *first)
    assert (code, PERSON in err) == (1, False)
    run_json(home, *step, "approve", asked, *second)
    assert run_json(home, *step, "reveal", asked, *first) == {"person": PERSON}
    code, out, _ = run(home, *step, "reveal", asked, *first)
    assert (code, PERSON in out) == (1, False)

    log = LogReader(Path(settings_of(home).audit.directory))
    entries = [json.loads(raw) for _, raw in log.read()]
    steps = [(e["action"].rpartition(".")[2], e["stage"], e.get("outcome")) for e in entries]
    assert ("reveal", "outcome", "success") in steps
    assert ("reveal", "outcome", "failed") in steps
    assert PERSON not in str(entries)


def test_an_index_key_is_rotated_and_destroyed_when_its_window_is_over(home: Path) -> None:
    assert run_json(home, "keys", "rotate-index") == {"index_version": 2}
    trimmed = run_json(home, "keys", "trim")
    assert trimmed["index_keys_destroyed"] == 0
