from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import Result
from keyring.backends import fail
from typer.testing import CliRunner

from federated.errors import (
    ApprovalError,
    FederatedError,
    ImportDataError,
    LedgerError,
    ManifestError,
    RefusedError,
    StoreError,
)
from federated.node.cli import device_app
from federated.node.keeper import FileKeeper
from federated.node.past import Past
from federated.node.store import Store
from tests.federated.node.importers.exports import APPLE
from tests.federated.node.world import SpiedStore, World

type Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    if not (tmp_path / "ring").exists():
        (tmp_path / "ring").mkdir(mode=0o700)
    place = ["--store", str(tmp_path / "device.store")]
    place += ["--key-file", str(tmp_path / "ring" / "device.keys")]

    def invoke(*words: str, fails: type[FederatedError] | None = None) -> Result:
        result = CliRunner().invoke(device_app, [*place, *words])
        if fails is not None:
            assert isinstance(result.exception, fails), result.output
        else:
            assert result.exit_code == 0, (result.output, result.exception)
        return result

    return invoke


def as_json(result: Result) -> Any:
    return json.loads(result.stdout)


@pytest.fixture
def filled(tmp_path: Path, run: Run) -> Run:
    (tmp_path / "export.xml").write_text(APPLE)
    run("init")
    run("import", str(tmp_path / "export.xml"))
    return run


def test_imports_and_shows_what_there_is_without_a_value(tmp_path: Path, filled: Run) -> None:
    again = as_json(filled("import", str(tmp_path / "export.xml"), "--json"))
    assert (again["changed"], again["bad"], again["readings"]) == (0, 0, 8)
    data = as_json(filled("data", "--json"))
    steps = [row for row in data["data"] if row["column"] == "steps"]
    assert {row["source"] for row in steps} == {"apple-health: Phone", "apple-health: Watch"}
    assert steps[0]["first"] == "2024-01-02"
    assert "350" not in filled("data").stdout
    shown = as_json(filled("data", "--values", "--json"))["values"]
    assert shown["2024-01-02"]["steps"] == 350
    assert "steps 350" in filled("data", "--values").stdout


def test_shows_that_something_is_kept_of_a_training_and_not_what(
    tmp_path: Path, filled: Run
) -> None:
    assert as_json(filled("data", "--json"))["kept"] == []
    store = Store.open(tmp_path / "device.store", FileKeeper(tmp_path / "ring" / "device.keys"))
    past = Past(store=store, study="ab" * 32, query="mood")
    past.keep({store.people()[0]: {3: np.array([7, 4711])}}, until=19_724 * 86_400)
    store.close()
    assert as_json(filled("data", "--json"))["kept"] == [
        {"study_hash": "ab" * 32, "query": "mood", "until": "2024-01-02"}
    ]
    words = filled("data").stdout
    assert "Kept until 2024-01-02: what you brought to the training mood" in words
    assert "4711" not in words


def test_bad_rows_come_out_as_one_error(tmp_path: Path, filled: Run) -> None:
    path = tmp_path / "bad.xml"
    path.write_text(APPLE.replace('unit="mi"', 'unit="furlong"'))
    found = filled("import", str(path), "--format", "apple-health", fails=ImportDataError)
    assert "furlong" in str(found.exception)
    report = as_json(
        filled("import", str(path), "--format", "apple-health", "--skip-bad", "--json")
    )
    assert report["bad"] == 1
    filled("import", str(path), "--time-zone", "Mars/Olympus", fails=ImportDataError)


def test_consent_is_given_shown_and_taken_back(filled: Run) -> None:
    assert "agreed to nothing" in filled("consent", "list").stdout
    words = ["--kind", "mean", "--column", "steps", "--column", "mood", "--purpose", "HRESCH"]
    filled("consent", "give", *words)
    (one,) = as_json(filled("consent", "list", "--json"))["consents"]
    assert one["columns"] == ["mood", "steps"]
    assert one["revoked"] is None
    assert as_json(filled("consent", "revoke", "--json")) == {"revoked": 1}
    assert "taken back" in filled("consent", "list").stdout
    filled("consent", "give", "--kind", "mean", "--column", "diary", "--purpose", "X1",
           fails=StoreError)  # fmt: skip


def test_states_change_and_every_command_speaks_json(filled: Run) -> None:
    assert as_json(filled("pause", "--json")) == {"state": "paused"}
    assert as_json(filled("data", "--json"))["state"] == "paused"
    assert as_json(filled("resume", "--json")) == {"state": "taking_part"}
    assert as_json(filled("withdraw", "sleep-study", "--json")) == {"state": "withdrawn"}
    assert "has asked here yet" in filled("withdraw", "slep-study").stdout
    assert as_json(filled("leave", "--yes", "--json")) == {"state": "left"}
    assert "stays spent" in filled("leave", "--yes").stdout
    assert as_json(filled("receipts", "--json")) == {"receipts": []}
    assert as_json(filled("check", "--json")) == {"sound": True}
    assert as_json(filled("columns", "--json"))[0]["name"] == "mood"


def test_a_higher_cap_asks_first_and_a_lower_one_does_not(filled: Run) -> None:
    assert as_json(filled("cap", "--epsilon", "2", "--json"))["epsilon"] == 2
    assert "ε = 0 of 2" in filled("budget").stdout
    assert as_json(filled("cap", "--epsilon", "3", "--yes", "--json"))["epsilon"] == 3
    with pytest.raises(AssertionError):
        # Nobody answers the question.
        filled("cap", "--epsilon", "4", "--json")
    assert as_json(filled("budget", "--json"))["epsilon"] == 3


def test_erases_everything(tmp_path: Path, filled: Run) -> None:
    assert as_json(filled("erase", "--yes", "--json")) == {"state": "erased"}
    assert not list(tmp_path.glob("device.store*"))
    filled("data", fails=StoreError)
    filled("init")


def test_at_a_site_says_whose(tmp_path: Path, run: Run) -> None:
    (tmp_path / "t.csv").write_text("who,day,m\na,2024-01-02,3\nb,2024-01-02,4\n")
    (tmp_path / "m.toml").write_text(
        'source = "t"\nperson = "who"\n[day]\ncolumn = "day"\n'
        '[columns.worry]\ntake = ["m"]\nunit = "{score}"\n'
    )
    run("init")
    run("import", str(tmp_path / "t.csv"), "--mapping", str(tmp_path / "m.toml"))
    assert [one["person"] for one in as_json(run("data", "--json"))["people"]] == ["a", "b"]
    run("pause", fails=StoreError)
    run("pause", "--person", "a")
    words = ["--kind", "mean", "--column", "worry", "--purpose", "HRESCH", "--everybody"]
    assert as_json(run("consent", "give", *words, "--json")) == {"people": 2}
    run("erase", "--person", "a", "--yes")
    assert as_json(run("data", "--json"))["person"] == "b"


def test_agrees_to_a_study_as_it_is_and_reads_the_receipt(
    tmp_path: Path, run: Run, world: World
) -> None:
    """The store that `run` works on is the world's: one person, enrolled."""
    asked = world.study()
    world.consents.revoke(world.store.person("me"), now=world.now)
    (tmp_path / "enrolment.json").write_bytes(msgspec.json.encode(world.enrolment()))
    assert as_json(run("enrol", str(tmp_path / "enrolment.json"), "--json"))["node"] == "node-3"
    (tmp_path / "study.json").write_bytes(world.parties.sign(asked).encode())
    with pytest.raises(RefusedError):
        world.admit(world.request(asked), asked)
    shown = run("consent", "study", str(tmp_path / "study.json"), "--yes").stdout
    assert "How does mood differ" in shown
    assert "at most ε = 1" in shown
    admission = world.admit(world.request(asked, index=world.last), asked)
    list(world.guard.rows(admission, now=world.now))
    (allowed, refused) = as_json(run("receipts", "--json"))["receipts"]
    assert (allowed["outcome"], refused["rule"]) == ("allowed", "consent")
    assert "Sleep and mood" in run("receipts", "--last", "1").stdout
    found = as_json(run("budget", "--json"))
    assert found["studies"] == {"sleep-and-mood": pytest.approx(0.5)}


def test_a_study_that_is_not_signed_is_not_even_asked_about(
    tmp_path: Path, run: Run, world: World
) -> None:
    signed = world.parties.sign(world.study())
    cut = replace(signed, signatures=signed.signatures[1:])
    (tmp_path / "study.json").write_bytes(cut.encode())
    run("consent", "study", str(tmp_path / "study.json"), "--yes", fails=ApprovalError)
    (tmp_path / "study.json").write_bytes(b'{"manifest":"\xff"}')
    run("consent", "study", str(tmp_path / "study.json"), "--yes", fails=ManifestError)


def test_the_key_file_is_never_made_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keyring.get_keyring", fail.Keyring)
    result = CliRunner().invoke(device_app, ["--store", str(tmp_path / "s"), "init"])
    assert isinstance(result.exception, StoreError)
    assert not list(tmp_path.iterdir())


def test_opens_what_the_library_made(tmp_path: Path, run: Run) -> None:
    run("init")
    keeper = FileKeeper(tmp_path / "ring" / "device.keys")
    store = Store.open(tmp_path / "device.store", keeper)
    assert store.people() == ()
    assert not isinstance(store, SpiedStore)
    store.close()


@pytest.fixture
def older(tmp_path: Path, filled: Run) -> Run:
    """A store of which an older copy was put back: in it nobody has paused."""
    before = (tmp_path / "device.store").read_bytes()
    filled("pause")
    (tmp_path / "device.store").write_bytes(before)
    return filled


@pytest.mark.parametrize(
    "words",
    [["consent", "list"], ["budget"], ["check"], ["resume"], ["withdraw", "study"],
     ["cap", "--epsilon", "2"], ["leave", "--yes"], ["consent", "revoke"]],
    ids=" ".join,
)  # fmt: skip
def test_an_older_copy_neither_shows_as_current_nor_changes(older: Run, words: list[str]) -> None:
    assert "older copy" in str(older(*words, fails=LedgerError).exception)


def test_an_older_copy_can_be_read_and_says_so_and_can_be_erased(
    tmp_path: Path, older: Run
) -> None:
    for words in (["data"], ["receipts"]):
        shown = older(*words, "--json")
        assert as_json(shown)
        assert "older copy" in shown.stderr
    older("erase", "--person", "me", "--yes")
    older("erase", "--yes")
    assert not list(tmp_path.glob("device.store*"))


def test_commands_at_once_on_one_store_all_count(tmp_path: Path, filled: Run) -> None:
    place = ["--store", str(tmp_path / "device.store")]
    place += ["--key-file", str(tmp_path / "ring" / "device.keys")]
    main = "from federated.node.cli import device_app; device_app()"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", main, *place, "withdraw", f"study-{number}"],
            cwd=Path(__file__).resolve().parents[3], stdout=subprocess.DEVNULL,
        )
        for number in range(4)
    ]  # fmt: skip
    assert [process.wait(timeout=240) for process in processes] == [0] * 4
    filled("check")
    opened = Store.open(tmp_path / "device.store", FileKeeper(tmp_path / "ring" / "device.keys"))
    assert all(opened.withdrawn(f"study-{number}") for number in range(4))
    opened.close()


#: Clears a screen (by an escape, by a C1 control), rings, turns a line round.
STEERING = "a\x1b[2J\x9b2J\x07\u202eb"


def test_nothing_that_was_imported_or_enrolled_steers_a_terminal(
    tmp_path: Path, run: Run, world: World
) -> None:
    """The store that `run` works on is the world's."""
    enrolment = world.enrolment(node=STEERING, sites={STEERING: world.enrolment().coordinator})
    (tmp_path / "enrolment.json").write_bytes(msgspec.json.encode(enrolment))
    folder = tmp_path / "bundles"
    folder.mkdir()
    (folder / f"{STEERING}.csv").write_text("day,m\n2024-01-02,3\n2024-01-03,x\n")
    (tmp_path / "m.toml").write_text(
        'source = "t"\n[day]\ncolumn = "day"\n[columns.worry]\ntake = ["m"]\nunit = "{score}"\n'
    )
    words = ["import", str(folder / f"{STEERING}.csv"), "--mapping", str(tmp_path / "m.toml")]
    for shown in (
        run("enrol", str(tmp_path / "enrolment.json")),
        run("enrol", str(tmp_path / "enrolment.json"), "--json"),
        run(*words, "--skip-bad"),
        run(*words, "--skip-bad", "--json"),
        run("withdraw", STEERING),
        run("data", "--values"),
    ):
        plain = shown.output.replace("\n", "")
        assert plain.isprintable(), ascii(plain)
    as_data = as_json(run("enrol", str(tmp_path / "enrolment.json"), "--json"))
    assert as_data["node"] == STEERING


def test_where_the_keys_lie_in_a_file_it_is_said(tmp_path: Path, run: Run) -> None:
    shown = run("init").stdout
    assert "mode 0600" in shown
    assert "backup" in shown
    (tmp_path / "t.csv").write_text("day,m\n2024-01-02,3\n")
    (tmp_path / "m.toml").write_text(
        'source = "t"\n[day]\ncolumn = "day"\n[columns.worry]\ntake = ["m"]\nunit = "{score}"\n'
    )
    run("import", str(tmp_path / "t.csv"), "--mapping", str(tmp_path / "m.toml"))
    for words in (["--person", "me"], []):
        erased = run("erase", *words, "--yes").stdout
        assert "copy of the key file" in erased


def test_a_file_name_is_no_markup_on_the_progress_bar(
    tmp_path: Path, filled: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    path = tmp_path / "export[bold]\x1b[2J.xml"
    path.write_text(APPLE)
    shown = filled("import", str(path)).stderr
    assert "export[bold]?[2J.xml" in shown


def test_erasing_with_keys_that_lie_elsewhere_does_not_say_that_they_are_destroyed(
    tmp_path: Path, filled: Run
) -> None:
    """Else a backup still opens, and nobody looks for the keys."""
    del filled
    other = ["--store", str(tmp_path / "device.store"), "--key-file", str(tmp_path / "other")]
    result = CliRunner().invoke(device_app, [*other, "erase", "--yes"])
    assert isinstance(result.exception, StoreError), result.output
    assert "no keys" in str(result.exception)
    assert not list(tmp_path.glob("device.store*"))
    assert FileKeeper(tmp_path / "ring" / "device.keys").get("database")


@pytest.mark.parametrize("name", ["device.store", "device.store.keys", "device.store.lock"])
def test_refuses_a_key_file_in_the_place_of_a_file_of_the_store(tmp_path: Path, name: str) -> None:
    place = ["--store", str(tmp_path / "device.store"), "--key-file", str(tmp_path / name)]
    result = CliRunner().invoke(device_app, [*place, "init"])
    assert isinstance(result.exception, StoreError), result.output
    assert "another name" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_place_for_keys_that_is_refused_leaves_no_store_behind(tmp_path: Path, run: Run) -> None:
    (tmp_path / "ring").chmod(0o770)
    run("init", fails=StoreError)
    (tmp_path / "ring").chmod(0o700)
    run("init")


def test_consent_of_one_person_and_of_everybody_is_asked_for_once_only(filled: Run) -> None:
    words = ["--kind", "mean", "--column", "steps", "--purpose", "HRESCH"]
    filled("consent", "give", *words, "--person", "me", "--everybody", fails=StoreError)
    assert as_json(filled("consent", "list", "--json")) == {"consents": []}


def test_a_budget_that_no_number_can_say_is_json_all_the_same(
    filled: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("federated.node.budget.Budget.spent", lambda *_: float("inf"))
    shown = filled("budget", "--json").stdout
    assert "Infinity" not in shown
    assert json.loads(shown)["spent"] is None
