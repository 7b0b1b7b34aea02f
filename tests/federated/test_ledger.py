"""The ledger: nobody's budget is overspent, whatever crashes, races or is restored."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Inspector, inspect, text

from audit.errors import LogUnavailableError
from federated.accounting import Accountant
from federated.database import StudyDatabase
from federated.errors import BudgetExhaustedError, LedgerError
from federated.ledger import Ledger, Reservation
from federated.ledger_rows import encode_cost, parse_cost
from federated.model import NoisePlan, PrivacyCost, Sensitivity
from federated.schema import MIGRATIONS, metadata
from tests.federated.ledgers import (
    OTHER_STUDY,
    STUDY,
    MemoryLog,
    close_all,
    cost,
    entries_in,
    make_ledger,
)
from tests.federated.studies import ORIGIN, StudyLog
from tests.postgres import running_postgres

ROOT = Path(__file__).parents[2]
PEOPLE = ["a", "b", "c"]


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/studies.sqlite3"
    server: str = request.getfixturevalue("postgres")
    clear(server)
    return server


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog()


def reserve(
    ledger: Ledger, name: str, epsilon: float = 0.25, people: list[str] | None = None
) -> Reservation:
    return ledger.reserve(
        study=STUDY, round_id=name, participants=people or PEOPLE, cost=cost(epsilon)
    )


def test_what_is_reserved_counts_as_spent(url: str, log: MemoryLog) -> None:
    ledger = make_ledger(url, log)
    reservation = reserve(ledger, "one")
    assert ledger.balance("a").epsilon == 0.25
    assert not ledger.is_spent(reservation)
    ledger.spend(reservation)
    ledger.spend(reservation)
    assert ledger.is_spent(reservation)
    assert ledger.balance("a").epsilon == 0.25
    assert ledger.balance("stranger").epsilon == 0
    assert ledger.balance("a").left == 0.75
    assert ledger.verify(log.entries) == 2


def test_refuses_what_would_exceed_anybodys_budget_and_charges_nobody(
    url: str, log: MemoryLog
) -> None:
    ledger = make_ledger(url, log)
    for number in range(4):
        reserve(ledger, f"a{number}", people=["a"])
    with pytest.raises(BudgetExhaustedError, match="1 or more of 3"):
        reserve(ledger, "all")
    assert ledger.balance("b").epsilon == 0
    assert reserve(ledger, "others", people=["b", "c"]).participants == 2
    outcomes = [entry.outcome for entry in log.entries if entry.stage == "outcome"]
    assert outcomes == ["success"] * 4 + ["denied", "success"]


def test_the_whole_budget_can_be_used(url: str, log: MemoryLog) -> None:
    ledger = make_ledger(url, log)
    reserve(ledger, "all", epsilon=1.0)
    with pytest.raises(BudgetExhaustedError):
        reserve(ledger, "more", epsilon=0.001)


def test_a_lower_budget_of_one_counts_for_all(url: str, log: MemoryLog) -> None:
    ledger = make_ledger(url, log, lower={"b": 0.2})
    with pytest.raises(BudgetExhaustedError, match=r"above their budget of 0\.2"):
        reserve(ledger, "one")
    reserve(ledger, "two", people=["a", "c"])


def test_studies_share_one_budget(url: str, log: MemoryLog) -> None:
    ledger = make_ledger(url, log)
    reserve(ledger, "one", epsilon=0.7)
    with pytest.raises(BudgetExhaustedError):
        ledger.reserve(study=OTHER_STUDY, round_id="one", participants=["a"], cost=cost(0.7))


def test_a_round_is_reserved_once(url: str, log: MemoryLog) -> None:
    ledger = make_ledger(url, log)
    first = reserve(ledger, "one")
    with pytest.raises(LedgerError, match="reserved before"):
        reserve(ledger, "one")
    assert ledger.reservation(study=STUDY, round_id="one") == first
    assert ledger.reservation(study=STUDY, round_id="two") is None


def test_a_cost_that_is_no_number_is_more_than_any_budget(url: str, log: MemoryLog) -> None:
    ledger = make_ledger(url, log)
    with pytest.raises((BudgetExhaustedError, LedgerError)):
        reserve(ledger, "one", epsilon=float("inf"))
    assert ledger.balance("a").epsilon == 0


def test_refuses_names_that_are_none(url: str, log: MemoryLog) -> None:
    ledger = make_ledger(url, log)
    for people in ([], ["*"], [""], ["a b"], ["x" * 129]):
        with pytest.raises(LedgerError):
            ledger.reserve(study=STUDY, round_id="one", participants=people, cost=cost())
    for study, name in ((STUDY, ""), (STUDY, "a b"), ("short", "one")):
        with pytest.raises(LedgerError):
            ledger.reserve(study=study, round_id=name, participants=PEOPLE, cost=cost())
    with pytest.raises(LedgerError, match="A round has"):
        ledger.reserve(study=STUDY, round_id="one", participants="abc", cost=cost())


def test_nothing_is_reserved_that_the_log_does_not_take(url: str) -> None:
    class Away(MemoryLog):
        def append(self, entry: bytes) -> MemoryLog.Place:
            raise LogUnavailableError("The log is away, as the test wants it.")

    ledger = make_ledger(url, Away())
    with pytest.raises(LogUnavailableError):
        reserve(ledger, "one")
    assert ledger.balance("a").epsilon == 0


def test_what_the_log_did_not_confirm_counts_and_is_not_dispatched(url: str) -> None:
    class AwayLater(MemoryLog):
        def append(self, entry: bytes) -> MemoryLog.Place:
            if self.raw:
                raise LogUnavailableError("The log is away, as the test wants it.")
            return super().append(entry)

    ledger = make_ledger(url, AwayLater())
    with pytest.raises(LogUnavailableError):
        reserve(ledger, "one")
    assert ledger.balance("a").epsilon == 0.25


def test_the_log_says_everything_but_who(url: str, log: MemoryLog) -> None:
    ledger = make_ledger(url, log)
    reserve(ledger, "one", people=["device-of-somebody"])
    assert not any(b"device-of-somebody" in raw for raw in log.raw)
    (intent, outcome) = log.entries
    assert (intent.action, intent.stage) == ("study.reserve", "intent")
    assert outcome.details["study"] == STUDY
    assert outcome.counts == {"participants": 1, "sequence": 1}


def test_real_costs_are_composed_over_all_releases(tmp_path: Path, log: MemoryLog) -> None:
    ledger = make_ledger(f"sqlite:///{tmp_path}/l.sqlite3", log)
    ledger._accountant = Accountant(delta=1e-6, adaptive=True)  # the real one
    reserve(ledger, "one", epsilon=0.4)
    reserve(ledger, "two", epsilon=0.4)
    with pytest.raises(BudgetExhaustedError):
        reserve(ledger, "three", epsilon=0.4)
    assert 0.79 < ledger.balance("a").epsilon < 0.81


def test_a_delta_that_is_used_up_is_a_budget_that_is_used_up(
    tmp_path: Path, log: MemoryLog
) -> None:
    ledger = make_ledger(f"sqlite:///{tmp_path}/l.sqlite3", log, cap=100.0)
    ledger._accountant = Accountant(delta=1e-6, adaptive=True)
    half = PrivacyCost(
        epsilon=0.1,
        delta=6e-7,
        noise=NoisePlan(mechanism="discrete_gaussian", scale=100.0),
        sensitivity=Sensitivity(l1=1.0, l2=1.0),
    )
    ledger.reserve(study=STUDY, round_id="one", participants=PEOPLE, cost=half)
    with pytest.raises(BudgetExhaustedError, match="beyond what can be bounded"):
        ledger.reserve(study=STUDY, round_id="two", participants=PEOPLE, cost=half)
    assert ledger.balance("a").releases == 1


costs = st.builds(cost, st.floats(min_value=1e-9, max_value=1e9))


@given(costs)
@settings(deadline=None)
def test_a_cost_is_read_as_it_was_written(one: object) -> None:
    assert parse_cost(encode_cost(one)) == one  # type: ignore[arg-type]


def test_an_unreadable_cost_is_an_error() -> None:
    for bad in ("", "{}", "[]", '{"epsilon":"x"}'):
        with pytest.raises(LedgerError):
            parse_cost(bad)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 60)), max_size=30))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_nobody_ever_exceeds_the_budget_and_nothing_falls(asked: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ledger = make_ledger(f"sqlite:///{folder}/l.sqlite3", MemoryLog())
        spent = dict.fromkeys("abcd", 0.0)
        for number, (who, hundredths) in enumerate(asked):
            before = ledger.balance(who).epsilon
            fits = before + hundredths / 100 <= 1 + 1e-9
            try:
                reserve(ledger, f"r{number}", hundredths / 100, [who])
                spent[who] += hundredths / 100
                assert fits
            except BudgetExhaustedError:
                assert not fits
            assert before <= ledger.balance(who).epsilon <= 1
        for who, epsilon in spent.items():
            assert ledger.balance(who).epsilon == pytest.approx(epsilon)


# Tampering


def filled(url: str, log: MemoryLog) -> Ledger:
    ledger = make_ledger(url, log, cap=10.0)
    for number in range(4):
        reservation = reserve(ledger, f"r{number}")
        if number != 2:
            ledger.spend(reservation)
    assert ledger.verify(log.entries) == 7
    return ledger


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE ledger_rows SET cost = replace(cost, '0.25', '0.01') WHERE sequence = 3",
        "UPDATE ledger_rows SET participants = 2 WHERE sequence = 3",
        "UPDATE ledger_rows SET kind = 'spend' WHERE sequence = 5",
        "UPDATE ledger_rows SET at_us = at_us + 1 WHERE sequence = 7",
        "UPDATE ledger_rows SET hash = previous WHERE sequence = 7",
        "UPDATE ledger_rows SET round = 'r9' WHERE sequence = 1",
        "DELETE FROM ledger_charges WHERE sequence = 3 AND participant = 'b'",
        "UPDATE ledger_charges SET participant = 'z' WHERE sequence = 3 AND participant = 'b'",
        "DELETE FROM ledger_charges WHERE sequence = 7; DELETE FROM ledger_rows WHERE sequence = 6",
        "DELETE FROM ledger_charges WHERE sequence = 1; DELETE FROM ledger_rows WHERE sequence = 1",
        """UPDATE ledger_rows SET sequence = 99 WHERE sequence = 2;
           UPDATE ledger_rows SET sequence = 2 WHERE sequence = 4;
           UPDATE ledger_rows SET sequence = 4 WHERE sequence = 99""",
    ],
)
def test_finds_any_changed_removed_or_reordered_row(
    change: str, tmp_path: Path, log: MemoryLog
) -> None:
    path = tmp_path / "l.sqlite3"
    ledger = filled(f"sqlite:///{path}", log)
    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.executescript(change)
    with pytest.raises(LedgerError, match="not as it was written"):
        ledger.verify()
    with pytest.raises(LedgerError, match="restore a whole backup"):
        ledger.mend(log.entries)


def test_finds_a_chain_that_was_written_anew(tmp_path: Path, log: MemoryLog) -> None:
    filled(f"sqlite:///{tmp_path}/true.sqlite3", log)
    forged = make_ledger(f"sqlite:///{tmp_path}/forged.sqlite3", MemoryLog(), cap=10.0)
    for number in range(4):
        forged.spend(reserve(forged, f"r{number}", 0.01))
    assert forged.verify() == 8
    with pytest.raises(LedgerError, match="older backup"):
        forged.verify(log.entries)


def test_finds_newest_rows_that_were_cut_off(tmp_path: Path, log: MemoryLog) -> None:
    path = tmp_path / "l.sqlite3"
    ledger = filled(f"sqlite:///{path}", log)
    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.executescript("DELETE FROM ledger_rows WHERE sequence = 7")
    assert ledger.verify() == 6
    with pytest.raises(LedgerError, match="recorded a spend in row 7"):
        ledger.verify(log.entries)


# A restored backup


def backed_up(tmp_path: Path, log: MemoryLog) -> tuple[Path, Ledger]:
    path = tmp_path / "l.sqlite3"
    ledger = make_ledger(f"sqlite:///{path}", log)
    ledger.spend(reserve(ledger, "before", 0.1))
    ledger._database.close()  # as for a backup, or a restore
    shutil.copy(path, tmp_path / "backup")
    ledger.spend(reserve(ledger, "after", 0.3, ["a", "b"]))
    ledger.spend(reserve(ledger, "last", 0.3, ["b"]))
    assert ledger.balance("b").epsilon == pytest.approx(0.7)
    ledger._database.close()  # as above
    for file in tmp_path.glob("l.sqlite3*"):
        file.unlink()
    shutil.copy(tmp_path / "backup", path)
    return path, make_ledger(f"sqlite:///{path}", log)


def test_a_restored_backup_is_found_and_mended_upward(tmp_path: Path, log: MemoryLog) -> None:
    _, ledger = backed_up(tmp_path, log)
    assert ledger.balance("b").epsilon == 0.1
    assert ledger.verify() == 2
    with pytest.raises(LedgerError, match="backup was restored"):
        ledger.verify(log.entries)
    added = ledger.mend(log.entries, rosters=[["a", "b", "c"], ["a", "b"], ["b"]])
    assert len(added) == 4
    ledger.verify(log.entries)
    assert ledger.balance("a").epsilon == pytest.approx(0.4)
    assert ledger.balance("b").epsilon == pytest.approx(0.7)
    assert ledger.balance("c").epsilon == pytest.approx(0.1)
    assert ledger.mend(log.entries) == []


def test_who_was_charged_is_unknown_then_everybody_is(tmp_path: Path, log: MemoryLog) -> None:
    _, ledger = backed_up(tmp_path, log)
    ledger.mend(log.entries, rosters=[["a", "b"]])
    for who in ("a", "b", "c", "somebody-enrolled-later"):
        assert ledger.balance(who).epsilon >= 0.3
    assert ledger.balance("a").epsilon == pytest.approx(0.7)
    with pytest.raises(BudgetExhaustedError):
        reserve(ledger, "new", 0.8, ["somebody-enrolled-later"])


def test_a_lost_round_cannot_be_reserved_again(tmp_path: Path, log: MemoryLog) -> None:
    _, ledger = backed_up(tmp_path, log)
    ledger.mend(log.entries)
    with pytest.raises(LedgerError, match="reserved before"):
        reserve(ledger, "after", 0.1)


def test_rows_written_before_a_restore_was_noticed_stay(tmp_path: Path, log: MemoryLog) -> None:
    _, ledger = backed_up(tmp_path, log)
    ledger.spend(reserve(ledger, "unaware", 0.2))
    with pytest.raises(LedgerError, match="backup was restored"):
        ledger.verify(log.entries)
    ledger.mend(log.entries, rosters=[["a", "b"], ["b"]])
    ledger.verify(log.entries)
    assert ledger.balance("b").epsilon == pytest.approx(0.9)


def test_a_mended_ledger_that_is_restored_again_is_mended_again(
    tmp_path: Path, log: MemoryLog
) -> None:
    path, ledger = backed_up(tmp_path, log)
    ledger.mend(log.entries, rosters=[["a", "b"], ["b"]])
    ledger._database.close()  # as for a restore
    for file in tmp_path.glob("l.sqlite3*"):
        file.unlink()
    shutil.copy(tmp_path / "backup", path)
    again = make_ledger(f"sqlite:///{path}", log)
    again.mend(log.entries, rosters=[["a", "b"], ["b"]])
    again.verify(log.entries)
    assert again.balance("b").epsilon >= 0.7


# A log that was pruned


def test_what_the_pruned_log_no_longer_says_is_found(tmp_path: Path, log: MemoryLog) -> None:
    _, ledger = backed_up(tmp_path, log)
    sequences = [entry.counts.get("sequence", 0) for entry in log.entries]
    pruned = log.entries[sequences.index(3) + 1 :]
    assert [one.counts["sequence"] for one in pruned if one.outcome] == [4, 5, 6]
    with pytest.raises(LedgerError, match=r"1 row\(s\) from row 3 on are lost"):
        ledger.verify(pruned)
    with pytest.raises(LedgerError, match="cannot be mended"):
        ledger.mend(pruned)
    assert ledger.balance("b").epsilon == 0.1


def test_a_whole_ledger_outlives_its_log(tmp_path: Path, log: MemoryLog) -> None:
    ledger = filled(f"sqlite:///{tmp_path}/l.sqlite3", log)
    for start in range(0, len(log.entries), 2):
        assert ledger.verify(log.entries[start:]) == 7


def test_what_is_lost_is_mended_while_the_log_reaches_back(tmp_path: Path, log: MemoryLog) -> None:
    _, ledger = backed_up(tmp_path, log)
    sequences = [entry.counts.get("sequence", 0) for entry in log.entries]
    pruned = log.entries[sequences.index(2) + 1 :]
    assert len(ledger.mend(pruned, rosters=[["a", "b"], ["b"]])) == 4
    ledger.verify(pruned)
    assert ledger.balance("b").epsilon == pytest.approx(0.7)


# What one study may cost


def test_all_that_a_study_cost_is_counted_over_its_runs(url: str, log: MemoryLog) -> None:
    ledger = make_ledger(url, log, cap=10.0)
    ledger.spend(reserve(ledger, "1-0", 0.25))
    reserve(ledger, "2-0", 0.5, ["c"])
    ledger.reserve(study=OTHER_STUDY, round_id="1-0", participants=["a"], cost=cost(0.125))
    found = [(one.round, one.cost.epsilon) for one in ledger.charges(STUDY)]
    assert found == [("1-0", 0.25), ("2-0", 0.5)]
    assert ledger.charges("00" * 32) == []


def test_a_round_beyond_what_the_study_may_have_charges_nobody(url: str, log: MemoryLog) -> None:
    ledger = make_ledger(url, log, cap=10.0)
    seen: list[list[float]] = []

    def within(costs: Sequence[PrivacyCost]) -> None:
        seen.append([one.epsilon for one in costs])
        if len(costs) > 2:
            raise BudgetExhaustedError("Two rounds were approved, as the test wants it.")

    for name in ("1-0", "1-1"):
        ledger.reserve(
            study=STUDY, round_id=name, participants=PEOPLE, cost=cost(0.25), within=within
        )
    with pytest.raises(BudgetExhaustedError, match="Two rounds"):
        ledger.reserve(
            study=STUDY, round_id="2-0", participants=PEOPLE, cost=cost(0.5), within=within
        )
    assert seen == [[0.25], [0.25, 0.25], [0.25, 0.25, 0.5]]
    assert ledger.balance("a").epsilon == 0.5
    assert ledger.verify(log.entries) == 2
    assert log.entries[-1].outcome == "denied"


def test_what_was_mended_counts_for_the_study(tmp_path: Path, log: MemoryLog) -> None:
    _, ledger = backed_up(tmp_path, log)
    ledger.mend(log.entries)
    assert {one.round for one in ledger.charges(STUDY)} == {"before", "after", "last"}


# Crashes


@pytest.fixture(scope="module")
def worker() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.federated.ledger_worker"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def test_a_kill_at_any_write_only_over_counts(
    tmp_path: Path, worker: subprocess.Popen[str]
) -> None:
    out, log, database = tmp_path / "out", tmp_path / "log", tmp_path / "l.sqlite3"
    job = {
        "out": str(out),
        "log": str(log),
        "url": f"sqlite:///{database}",
        "cap": 100.0,
        "epsilon": 0.5,
        "participants": PEOPLE,
        "rounds": 1,
    }
    assert worker.stdin is not None
    assert worker.stdout is not None
    for at in range(1, 500):
        worker.stdin.write(json.dumps({**job, "at": at, "name": f"k{at}"}) + "\n")
        worker.stdin.flush()
        status = int(worker.stdout.readline())
        dispatched = [line for line in out.read_text().splitlines() if line.startswith("k")]
        ledger = make_ledger(job["url"], MemoryLog())  # type: ignore[arg-type]
        ledger.verify(entries_in(log))
        assert ledger.balance("a").epsilon >= 0.5 * len(dispatched)
        assert ledger.balance("a").releases <= at
        ledger._database.close()  # the next coordinator is another process
        if status == 0:
            break
        assert status == -signal.SIGKILL
    else:
        pytest.fail("The coordinator never got to its end.")
    assert at > 20
    assert f"writes {at - 1}" in out.read_text()


@pytest.mark.parametrize(("kind", "studies"), [("sqlite", "50"), ("postgresql", "20")])
def test_many_studies_at_once_never_overspend(
    kind: str, studies: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{tmp_path}/l.sqlite3"
    if kind == "postgresql":
        url = request.getfixturevalue("postgres")
        clear(url)
    socket, out = tmp_path / "s" / "log.sock", tmp_path / "out"
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.audit.serving_writer", str(tmp_path / "log"), str(socket)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.federated.ledger_rivals",
                url,
                str(socket),
                str(out),
                studies,
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        writer.terminate()
    assert done.stdout == "0\n", done.stderr[-3000:]
    ledger = make_ledger(url, MemoryLog())
    assert len(out.read_text().splitlines()) == 10
    assert ledger.balance("a").epsilon == ledger.balance("b").epsilon == 1.0
    assert ledger.verify(entries_in(tmp_path / "log")) == 20


def clear(url: str) -> None:
    database = StudyDatabase(url)
    with database.writing() as connection:
        names = ", ".join(table.name for table in metadata.sorted_tables)
        connection.execute(text(f"TRUNCATE {names}"))
    database.close()


# The database


def test_the_tables_are_what_the_migrations_make(url: str) -> None:
    database = StudyDatabase(url)
    with database.reading() as connection:
        inspector = inspect(connection)
        verify_tables(inspector)
    database.close()


def verify_tables(inspector: Inspector) -> None:
    for table in metadata.sorted_tables:
        columns = {
            column["name"]: column["nullable"] for column in inspector.get_columns(table.name)
        }
        assert list(columns) == [column.name for column in table.columns]
        primary = inspector.get_pk_constraint(table.name)["constrained_columns"]
        assert primary == [column.name for column in table.primary_key.columns]


def test_refuses_a_database_that_is_newer(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/l.sqlite3"
    database = StudyDatabase(url)
    with database.writing() as connection:
        version = len(MIGRATIONS) + 1
        connection.execute(text("INSERT INTO study_version VALUES (:v)"), {"v": version})
    database.close()
    with pytest.raises(LedgerError, match="newer one"):
        StudyDatabase(url)


@pytest.mark.parametrize("url", ["nonsense", "sqlite://", "mysql://u:secret@h/d"])
def test_refuses_other_databases_without_repeating_the_url(url: str) -> None:
    with pytest.raises(LedgerError) as caught:
        StudyDatabase(url)
    assert "secret" not in str(caught.value)


def test_the_file_is_closed_to_others(tmp_path: Path) -> None:
    StudyDatabase(f"sqlite:///{tmp_path}/l.sqlite3").close()
    assert (tmp_path / "l.sqlite3").stat().st_mode & 0o777 == 0o600


def test_the_entries_of_the_ledger_stand_in_a_real_log(tmp_path: Path) -> None:
    log = StudyLog(tmp_path)
    with log.writer() as writer:
        ledger = make_ledger(f"sqlite:///{tmp_path}/l.sqlite3", writer)
        ledger.spend(reserve(ledger, "one"))
    assert ledger.verify(entries_in(log.directory)) == 2
    assert ORIGIN
