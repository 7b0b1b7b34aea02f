"""`havengate policy`, and past decisions read from the log."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from audit.log import LogWriter
from audit.model import Assurance
from audit.reader import LogReader
from audit.recorder import Act, Recorder, Who
from havengate.recorded import TrailDecision, recorded_decisions
from policies.errors import RecordsUnavailableError
from tests.audit.records import LocalSealer
from tests.havengate.command import run, run_json

ORIGIN = "test.example/log"


def record(directory: Path, *acts: Act) -> LogReader:
    with LogWriter.open(directory, origin=ORIGIN) as writer:
        numbers = iter(range(1000))
        recorder = Recorder(
            writer, sealer=LocalSealer(), clock=time.time, ids=lambda: f"r{next(numbers)}"
        )
        for act in acts:
            recorder.intent(act)
    return LogReader(directory)


def decisions(log: LogReader, since: int) -> Iterator[TrailDecision]:
    return recorded_decisions(log, since, retention_days=2192)


def act(**changes: object) -> Act:
    values: dict[str, object] = {
        "tenant": "clinic",
        "who": Who(
            kind="person",
            person="Practitioner/1",
            role="security-officer",
            assurance=Assurance(level="totp", age_s=10),
        ),
        "action": "read",
        "service": "ehr",
        "purpose": "HOPERAT",
        "resources": ("AuditEvent/7",),
        "decision": "deny",
        "details": {"kind": "ehr"},
    }
    return Act(**values | changes)  # type: ignore[arg-type]


def test_what_the_log_holds_of_a_decision_can_be_asked_again(tmp_path: Path) -> None:
    (found,) = decisions(record(tmp_path / "log", act(labels=("PSY",))), 0)
    assert (found.index, found.allowed) == (0, False)
    request = found.request
    assert request is not None
    assert request.principal.roles == {"security-officer"}
    assert request.principal.assurance.second_factor == "totp"
    assert (request.action, request.context.purpose) == ("read", "HOPERAT")
    assert (request.resource.kind, request.resource.type) == ("ehr", "AuditEvent")
    assert request.resource.labels == {"PSY"}


@pytest.mark.parametrize(
    "changes",
    [
        {"details": {}},
        {"purpose": None},
        {"break_glass": "no-other-way"},
        {"consent": "Consent/1"},
        {"resources": ("Observation/1", "Condition/2")},
        {"action": "login"},
    ],
)
def test_a_record_that_says_too_little_is_no_question(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    (found,) = decisions(record(tmp_path / "log", act(**changes)), 0)
    assert found.request is None


def test_only_decisions_count_from_the_given_index_on(tmp_path: Path) -> None:
    log = record(tmp_path / "log", act(), act(decision=None), act())
    assert [found.index for found in decisions(log, 1)] == [2]


def test_a_trail_that_cannot_be_read_is_said_to_be_so(tmp_path: Path) -> None:
    log = record(tmp_path / "log", *[act()] * 257)
    (tmp_path / "log/tile/entries/000").write_bytes(b"\x00\x01")
    with pytest.raises(RecordsUnavailableError):
        list(decisions(log, 0))


def test_a_beginning_that_is_missing_without_having_been_pruned_is_noticed(
    tmp_path: Path,
) -> None:
    log = record(tmp_path / "log", *[act()] * 513)
    for name in ("000", "001"):
        (tmp_path / "log/tile/entries" / name).unlink()
    with pytest.raises(RecordsUnavailableError):
        list(decisions(log, 0))


def test_rules_are_checked_tested_and_replayed_by_command(tmp_path: Path) -> None:
    (tmp_path / "havengate.toml").write_text("")
    assert run_json(tmp_path, "policy", "check")["rules"]
    assert run_json(tmp_path, "policy", "test")["failed"] == []
    record(tmp_path / "var/audit", act(details={}), act(decision=None))
    own = tmp_path / "changed"
    own.mkdir()
    tally = run_json(tmp_path, "policy", "replay", str(own))["tally"]
    assert (tally["seen"], tally["incomplete"]) == (1, 1)


def test_a_wrong_rule_is_named_with_its_file_and_exit_code_2(tmp_path: Path) -> None:
    own = tmp_path / "rules"
    own.mkdir()
    (own / "own.cedar").write_text("permit (principal action resource);")
    (tmp_path / "havengate.toml").write_text('[policies]\ndirectory = "rules"\n')
    code, _, err = run(tmp_path, "policy", "check", "--json")
    assert code == 2
    assert "own.cedar" in json.loads(err)["error"]["message"]
