"""CSV, and what all exports share: formulas are harmless, the export is recorded first."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.criteria import Criteria
from audit.entry import encode_entry, parse_entry
from audit.errors import LogUnavailableError
from audit.export import FORMATS, Export, run_export
from audit.export.csv import COLUMNS, CSV, harmless, rfc3339
from audit.recorder import End, Recorder, Who
from audit.search import ERASED, Exchange, Names
from tests.audit.records import OTHER, START_US, LocalSealer, MemoryLog, make_act, make_entry
from tests.audit.records import make_recorder as make

OFFICER = Who(kind="person", person="Practitioner/officer", role="security-officer")


def cells(raw: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(raw.decode(), newline="")))


def exported(log: MemoryLog, recorder: Recorder, **given: Any) -> bytes:
    values: dict[str, Any] = {
        "format": FORMATS["csv"],
        "criteria": Criteria(),
        "tenant": "clinic-1",
        "who": OFFICER,
    }
    return b"".join(run_export(Export(**values | given), log, recorder))


def filled(exchanges: int = 3) -> tuple[MemoryLog, LocalSealer, Recorder]:
    log, sealer = MemoryLog(), LocalSealer()
    recorder = make(log, sealer)
    for _ in range(exchanges):
        recorder.outcome(recorder.intent(make_act()), End(outcome="success", status=200))
    return log, sealer, recorder


def test_every_line_has_the_documented_columns() -> None:
    log, _, recorder = filled()
    head, *lines = cells(exported(log, recorder))
    assert tuple(head) == COLUMNS
    assert len(lines) == 3
    for number, line in enumerate(lines):
        row = dict(zip(COLUMNS, line, strict=True))
        assert (row["intent"], row["log_index"]) == (str(2 * number), str(2 * number + 1))
        assert (row["action"], row["outcome"], row["status"]) == ("read", "success", "200")
        assert row["actor"].startswith("hg1.")
        assert row["patients"].startswith("hg1.")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_cell_begins_a_formula(start: str) -> None:
    assert harmless(f"{start}cmd|' /C calc'!A0").startswith("'")
    names = Names(actor=f"{start}1+1", client=None, patients=(f"{start}2",))
    exchange = Exchange.of([(0, make_entry("outcome"))])
    (line,) = CSV().rows(exchange, names, "x")
    for cell in cells(line)[0]:
        assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_name_survives_quoting(name: str) -> None:
    exchange = Exchange.of([(0, make_entry("outcome"))])
    (line,) = CSV().rows(exchange, Names(actor=name, client=None, patients=()), "x")
    (row,) = cells(line)
    assert len(row) == len(COLUMNS)
    assert row[COLUMNS.index("actor")].removeprefix("'") == name.removeprefix("'")


def test_times_are_utc_and_never_fail() -> None:
    assert rfc3339(START_US) == "2027-01-15T08:00:00.000Z"
    assert rfc3339(2**53 - 1) == "2255-06-05T23:47:34.740Z"


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_the_export_is_durable_in_the_log_before_its_first_byte(name: str) -> None:
    log, sealer, recorder = filled()
    before = log.size()
    wanted = Export(
        format=FORMATS[name], criteria=Criteria(), tenant="clinic-1", who=OFFICER, sealer=sealer
    )
    stream = run_export(wanted, log, recorder)
    assert log.size() == before
    next(stream)
    intent = parse_entry(log.held[-1])
    assert log.size() == before + 1
    assert (intent.stage, intent.action) == ("intent", "export")
    assert intent.details == {"format": name, "names": "revealed"}
    lines = len(list(stream))
    end = parse_entry(log.held[-1])
    assert (end.stage, end.outcome, end.counts["lines"]) == ("outcome", "success", lines)
    assert end.request == intent.request


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_no_byte_leaves_when_the_export_cannot_be_recorded(name: str) -> None:
    log, _sealer, recorder = filled()
    log.fail = LogUnavailableError("full")
    with pytest.raises(LogUnavailableError):
        exported(log, recorder, format=FORMATS[name])


def test_an_export_that_breaks_off_is_recorded_as_such() -> None:
    log, _sealer, recorder = filled()
    wanted = Export(format=FORMATS["csv"], criteria=Criteria(), tenant="clinic-1", who=OFFICER)
    stream = run_export(wanted, log, recorder)
    next(stream)
    next(stream)
    stream.close()
    assert parse_entry(log.held[-1]).outcome == "aborted"
    log.held[1] = b"damaged"
    with pytest.raises(Exception, match="canonical"):
        exported(log, recorder)
    assert parse_entry(log.held[-1]).outcome == "failed"


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_names_stay_sealed_unless_they_are_opened(name: str) -> None:
    log, sealer, recorder = filled()
    sealed = exported(log, recorder, format=FORMATS[name])
    for secret in (b"/ada", b"/bob", b"192.0.2.7"):
        assert secret not in sealed
    opened = exported(log, recorder, format=FORMATS[name], sealer=sealer)
    for secret in (b"Practitioner/ada", b"Patient/bob", b"192.0.2.7"):
        assert secret in opened
    sealer.erase(tenant="clinic-1", person="Patient/bob")
    erased = exported(log, recorder, format=FORMATS[name], sealer=sealer)
    assert b"/bob" not in erased
    assert ERASED.encode() in erased


def test_only_what_was_asked_for_is_exported() -> None:
    log, _sealer, recorder = filled()
    recorder.outcome(
        recorder.intent(make_act(action="delete")), End(outcome="denied", decision="deny")
    )
    recorder.intent(make_act(action="update"))
    _, *lines = cells(exported(log, recorder, criteria=Criteria(outcome="denied")))
    assert [line[COLUMNS.index("action")] for line in lines] == ["delete"]
    _, *dangling = cells(exported(log, recorder, criteria=Criteria(action="update")))
    assert dangling[0][COLUMNS.index("outcome")] == ""


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    class Endless(MemoryLog):
        taken = 0

        def size(self) -> int:
            return 10**9

        def read(self, start: int = 0, end: int | None = None) -> Any:
            for index in range(start, end or 0):
                self.taken = index
                yield index, encode_entry(make_entry("message", sequence=1, patients=(OTHER,)))

    log = Endless()
    wanted = Export(format=FORMATS["csv"], criteria=Criteria(), tenant="clinic-1", who=OFFICER)
    stream = run_export(wanted, log, make(log, LocalSealer()))
    for _ in range(100):
        next(stream)
    assert log.taken < 200
    stream.close()
