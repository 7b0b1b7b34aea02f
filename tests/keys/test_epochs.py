"""Epochs: rolled, rewrapped and trimmed without losing a key, whatever interrupts it."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from keys.errors import (
    KeyConfigurationError,
    KeyTableError,
    PersonErasedError,
    UnknownKeyError,
    VaultRejectedError,
)
from keys.model import KeyRow
from keys.sealed import parse_sealed
from keys.store import wrapped_key
from tests.keys.fakes import FakeClock, FakeKeyServer, FakeRecorder, LogDownError
from tests.keys.workbench import TENANT, Workbench, workbench

DAY_S = 86_400.0
ACTOR = "operator"


class CrashError(Exception):
    """The process died here."""


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    with workbench(tmp_path / "keys.sqlite3") as made:
        yield made


def fill(bench: Workbench, count: int = 450) -> dict[str, str]:
    persons = [f"person-{number}" for number in range(count)]
    bench.keyring.prefetch(TENANT, persons, create=True)
    return {person: bench.seal(person) for person in persons[:10]}


def crash_after(server: FakeKeyServer, name: str, nth: int) -> None:
    """Let the n-th answer of that call never arrive."""
    seen = 0

    def count(call: str) -> None:
        nonlocal seen
        seen += call == name
        if call == name and seen == nth:
            raise CrashError

    server.after_call = count


def actions(recorder: FakeRecorder) -> list[str]:
    return [
        f"{event.action.removeprefix('keys.epoch.')} {event.stage}"
        + ("" if event.succeeded is not False else " failed")
        for event in recorder.events
    ]


# --- Rotating -------------------------------------------------------------------------------------


def test_rotating_moves_every_key_and_loses_none(bench: Workbench) -> None:
    texts = fill(bench)
    moved: list[int] = []
    report = bench.epochs.rotate(actor=ACTOR, progress=moved.append)
    assert (report.epoch, report.rewrapped, report.resumed) == (2, 451, False)
    assert moved == [200, 400, 451]
    assert bench.epochs.status().keys_by_epoch == {2: 451}
    assert bench.store.cached_keys() == 0
    for person, text in texts.items():
        assert bench.unseal(person, text) == b"text"


def test_rotating_is_recorded_before_each_step(bench: Workbench) -> None:
    fill(bench, 1)
    bench.epochs.rotate(actor=ACTOR)
    assert actions(bench.recorder) == [
        "roll intent",
        "roll outcome",
        "rewrap intent",
        "rewrap outcome",
    ]
    intent, outcome = bench.recorder.events[:2]
    assert intent.request_id == outcome.request_id
    assert outcome.detail["epoch"] == 2


@pytest.mark.parametrize("fail_at", [0, 1, 2, 3])
def test_when_the_log_fails_the_step_is_not_taken_and_the_next_call_goes_on(
    bench: Workbench, fail_at: int
) -> None:
    texts = fill(bench, 20)
    bench.recorder.fail_at = fail_at
    with pytest.raises(LogDownError):
        bench.epochs.rotate(actor=ACTOR)
    assert max(bench.server.epoch_keys) == (1 if fail_at == 0 else 2)
    if fail_at <= 2:
        assert bench.epochs.status().keys_by_epoch == {1: 21}
    bench.recorder.fail_at = None
    report = bench.epochs.rotate(actor=ACTOR)
    assert bench.epochs.status().keys_by_epoch == {report.epoch: 21}
    assert report.epoch <= 3
    for person, text in texts.items():
        assert bench.unseal(person, text) == b"text"


@pytest.mark.parametrize(
    ("call", "nth"), [("roll", 1), ("rewrap", 1), ("rewrap", 2), ("rewrap", 3)]
)
def test_a_rotation_that_died_is_finished_not_begun_again(
    tmp_path: Path, call: str, nth: int
) -> None:
    server, path = FakeKeyServer(), tmp_path / "keys.sqlite3"
    with workbench(path, server=server) as bench:
        texts = fill(bench)
        crash_after(server, call, nth)
        with pytest.raises(CrashError):
            bench.epochs.rotate(actor=ACTOR)
        server.after_call = None
    with workbench(path, server=server) as bench:
        for person, text in texts.items():
            assert bench.unseal(person, text) == b"text"
        report = bench.epochs.rotate(actor=ACTOR)
        assert (report.epoch, report.resumed) == (2, True)
        assert bench.epochs.status().keys_by_epoch == {2: 451}
        assert bench.epochs.rotate(actor=ACTOR).epoch == 3
        for person, text in texts.items():
            assert bench.unseal(person, text) == b"text"


def test_asking_for_the_status_does_not_hide_an_interrupted_rotation(tmp_path: Path) -> None:
    server, path = FakeKeyServer(), tmp_path / "keys.sqlite3"
    with workbench(path, server=server) as bench:
        bench.epochs.status()
        fill(bench, 5)
        crash_after(server, "roll", 1)
        with pytest.raises(CrashError):
            bench.epochs.rotate(actor=ACTOR)
        server.after_call = None
        assert "rewrap" in bench.epochs.status().overdue
        assert bench.epochs.rotate(actor=ACTOR).resumed


def test_a_key_made_while_rotating_does_not_stop_the_next_rotation(bench: Workbench) -> None:
    fill(bench, 5)
    bench.epochs.rotate(actor=ACTOR)
    with bench.database.writing() as connection:  # one that arrived late, of the old epoch
        connection.exec_driver_sql("UPDATE data_keys SET epoch = 1 WHERE kind = 'system'")
    report = bench.epochs.rotate(actor=ACTOR)
    assert (report.epoch, report.resumed) == (3, False)


def test_sealing_goes_on_while_epochs_roll_and_are_trimmed(bench: Workbench) -> None:
    stop = threading.Event()
    texts: list[tuple[str, str]] = []

    def seal_on() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            person = f"new-{number % 40}-{threading.get_ident()}"
            texts.append((person, bench.seal(person)))

    with ThreadPoolExecutor(3) as pool:
        sealing = [pool.submit(seal_on) for _ in range(3)]
        try:
            for _ in range(200):
                bench.epochs.rotate(actor=ACTOR)
                _, current = bench.server.epochs()
                bench.epochs.trim(actor=ACTOR, oldest=current)
                if current > 6 and len(texts) > 100:
                    break
        finally:
            stop.set()
        for worker in sealing:
            worker.result()
    bench.store.empty()
    assert len(texts) > 20
    assert all(bench.unseal(person, text) == b"text" for person, text in texts)
    assert bench.epochs.check().sound


# --- Trimming -------------------------------------------------------------------------------------


def test_trims_what_was_superseded_long_enough_and_not_before(bench: Workbench) -> None:
    fill(bench, 5)
    bench.epochs.rotate(actor=ACTOR)
    assert bench.epochs.trim(actor=ACTOR).trimmed == 0
    bench.clock.advance(30 * DAY_S - 1)
    assert bench.epochs.trim(actor=ACTOR).trimmed == 0
    bench.clock.advance(1)
    report = bench.epochs.trim(actor=ACTOR)
    assert (report.oldest, report.trimmed) == (2, 1)
    assert set(bench.server.epoch_keys) == {2}
    assert bench.epochs.check().sound


def test_after_a_trim_the_keys_in_an_old_backup_are_dead(bench: Workbench) -> None:
    texts = fill(bench, 5)
    backup = bench.table.by_ids([parse_sealed(text).key_id for text in texts.values()])
    bench.epochs.rotate(actor=ACTOR)
    assert bench.server.unwrap([wrapped_key(row) for row in backup.values()])
    bench.clock.advance(31 * DAY_S)
    bench.epochs.trim(actor=ACTOR)
    for row in backup.values():
        with pytest.raises(VaultRejectedError):
            bench.server.unwrap([wrapped_key(row)])
    for person, text in texts.items():
        assert bench.unseal(person, text) == b"text"


def test_a_key_that_cannot_be_moved_keeps_its_epoch_from_being_destroyed(
    bench: Workbench,
) -> None:
    texts = fill(bench, 5)
    bad = parse_sealed(texts["person-0"]).key_id
    with bench.database.writing() as connection:
        connection.exec_driver_sql(
            "UPDATE data_keys SET wrapped = 'vault:v1:AAAA' WHERE key_id = ?", (bad,)
        )
    report = bench.epochs.rotate(actor=ACTOR)
    assert report.rewrapped == 5
    bench.clock.advance(31 * DAY_S)
    with pytest.raises(KeyTableError, match="check"):
        bench.epochs.trim(actor=ACTOR)
    assert 1 in bench.server.epoch_keys
    assert bench.epochs.check().broken == (bad,)
    bench.eraser.erase_again(key_ids=[bad], actor=ACTOR)
    assert bench.epochs.trim(actor=ACTOR).trimmed == 1


def test_trimming_first_moves_keys_that_were_left_behind(tmp_path: Path) -> None:
    server, path = FakeKeyServer(), tmp_path / "keys.sqlite3"
    with workbench(path, server=server) as bench:
        texts = fill(bench, 5)
        crash_after(server, "roll", 1)
        with pytest.raises(CrashError):
            bench.epochs.rotate(actor=ACTOR)
        server.after_call = None
        bench.epochs.trim(actor=ACTOR, oldest=2)
        assert set(server.epoch_keys) == {2}
        for person, text in texts.items():
            assert bench.unseal(person, text) == b"text"


def test_a_trim_that_died_between_fence_and_server_is_finished_by_the_next(
    bench: Workbench,
) -> None:
    texts = fill(bench, 5)
    bench.epochs.rotate(actor=ACTOR)

    def die(call: str) -> None:
        if call == "trim":
            raise CrashError

    bench.server.before_call = die
    with pytest.raises(CrashError):
        bench.epochs.trim(actor=ACTOR, oldest=2)
    bench.server.before_call = None
    bench.seal("somebody new")
    assert bench.epochs.trim(actor=ACTOR, oldest=2).trimmed == 1
    for person, text in texts.items():
        assert bench.unseal(person, text) == b"text"


def test_a_key_wrapped_before_a_trim_and_stored_after_it_is_wrapped_again(
    bench: Workbench,
) -> None:
    """Without the fence this key would be dead at birth, and what it sealed lost."""
    bench.seal("somebody")
    overtaken: list[bool] = []

    def overtake(call: str) -> None:
        if call == "wrap" and not overtaken:
            overtaken.append(True)
            bench.epochs.rotate(actor=ACTOR)
            _, current = bench.server.epochs()
            bench.epochs.trim(actor=ACTOR, oldest=current)

    bench.server.after_call = overtake
    text = bench.seal("ada")
    bench.store.empty()
    assert overtaken
    assert bench.unseal("ada", text) == b"text"


def test_a_key_read_before_a_trim_and_unwrapped_after_it_is_read_again(bench: Workbench) -> None:
    texts = fill(bench, 3)
    bench.store.empty()
    bench.keyring.owner(TENANT, "person-0")
    overtaken: list[bool] = []

    def overtake(call: str) -> None:
        if call == "unwrap" and not overtaken:
            overtaken.append(True)
            bench.epochs.rotate(actor=ACTOR)
            bench.epochs.trim(actor=ACTOR, oldest=2)

    bench.server.before_call = overtake
    assert bench.unseal("person-0", texts["person-0"]) == b"text"
    assert overtaken


def test_the_current_epoch_cannot_be_trimmed_away(bench: Workbench) -> None:
    fill(bench, 1)
    with pytest.raises(KeyConfigurationError):
        bench.epochs.trim(actor=ACTOR, oldest=2)


def test_trimming_is_recorded_first_or_does_not_happen(bench: Workbench) -> None:
    fill(bench, 1)
    bench.epochs.rotate(actor=ACTOR)
    bench.recorder.fail_at = len(bench.recorder.events)
    with pytest.raises(LogDownError):
        bench.epochs.trim(actor=ACTOR, oldest=2)
    assert set(bench.server.epoch_keys) == {1, 2}
    bench.recorder.fail_at = None
    bench.epochs.trim(actor=ACTOR, oldest=2)
    assert actions(bench.recorder)[-2:] == ["trim intent", "trim outcome"]


def test_a_step_that_fails_is_recorded_as_failed(bench: Workbench) -> None:
    fill(bench, 1)

    def refuse(call: str) -> None:
        if call == "roll":
            raise VaultRejectedError("no")

    bench.server.before_call = refuse
    with pytest.raises(VaultRejectedError):
        bench.epochs.rotate(actor=ACTOR)
    assert actions(bench.recorder) == ["roll intent", "roll outcome failed"]
    assert bench.recorder.events[-1].detail["error"] == "keys.vault_rejected"


# --- Status and check -----------------------------------------------------------------------------


def test_says_when_rolling_and_trimming_are_due(bench: Workbench) -> None:
    fill(bench, 3)
    start = bench.clock()
    status = bench.epochs.status()
    assert (status.roll_due_at, status.trim_due_at) == (start + 90 * DAY_S, None)
    assert status.overdue == ()
    bench.clock.advance(90 * DAY_S)
    assert bench.epochs.status().overdue == ("roll",)
    bench.epochs.rotate(actor=ACTOR)
    status = bench.epochs.status()
    assert status.overdue == ()
    assert status.trim_due_at == start + 120 * DAY_S
    bench.clock.advance(30 * DAY_S)
    assert bench.epochs.status().overdue == ("trim",)
    bench.epochs.trim(actor=ACTOR)
    status = bench.epochs.status()
    assert (status.oldest_epoch, status.current_epoch, status.overdue) == (2, 2, ())
    assert status.keys == {"person": 3, "system": 1}


def test_checking_finds_every_key_that_does_not_open(bench: Workbench) -> None:
    texts = fill(bench)
    bad = {parse_sealed(texts[f"person-{number}"]).key_id for number in (0, 3, 7)}
    for key_id in bad:
        with bench.database.writing() as connection:
            connection.exec_driver_sql(
                "UPDATE data_keys SET wrapped = 'vault:v1:AAAA' WHERE key_id = ?", (key_id,)
            )
    progress: list[int] = []
    report = bench.epochs.check(progress=progress.append)
    assert set(report.broken) == bad
    assert report.checked == 451
    assert progress == [200, 400, 451]
    assert not report.sound


def test_checking_finds_a_table_older_than_the_last_trim(bench: Workbench) -> None:
    fill(bench, 3)
    bench.server.roll()
    bench.server.trim(2)
    report = bench.epochs.check()
    assert len(report.below_oldest) == 4
    assert not report.sound


# --- Ledger of epochs -----------------------------------------------------------------------------


class Ledger(RuleBasedStateMachine):
    """Seal, rotate, crash, trim, erase, back up and restore in any order."""

    @initialize()
    def start(self) -> None:
        self.stack = ExitStack()
        self.directory = Path(self.stack.enter_context(TemporaryDirectory()))
        self.server = FakeKeyServer()
        self.clock = FakeClock()
        self.recorder = FakeRecorder()
        self.live: dict[str, str] = {}  # text -> person
        self.dead: dict[str, str] = {}
        self.backups: list[tuple[Path, int]] = []  # file, newest epoch of its time
        self.open()

    def open(self) -> None:
        self.process = ExitStack()
        self.bench = self.process.enter_context(
            workbench(
                self.directory / "keys.sqlite3",
                server=self.server,
                clock=self.clock,
                recorder=self.recorder,
                seals_per_key=3,
                seals_per_reservation=1,
            )
        )

    def teardown(self) -> None:
        if hasattr(self, "process"):
            self.process.close()
            self.stack.close()

    persons = st.sampled_from(["ada", "bob", "eve"])
    crashes = st.none() | st.tuples(
        st.sampled_from(["roll", "rewrap", "trim", "unwrap", "wrap"]), st.sampled_from([1, 2])
    )

    def attempt(self, crash: tuple[str, int] | None, work: Callable[[], object]) -> bool:
        if crash is not None:
            crash_after(self.server, *crash)
        try:
            work()
        except CrashError:
            return False
        else:
            return True
        finally:
            self.server.after_call = None
            if crash is not None:
                self.process.close()
                self.open()

    @rule(person=persons, crash=crashes)
    def seal(self, person: str, crash: tuple[str, int] | None) -> None:
        self.attempt(crash, lambda: self.live.setdefault(self.bench.seal(person), person))

    @rule(crash=crashes)
    def rotate(self, crash: tuple[str, int] | None) -> None:
        self.attempt(crash, lambda: self.bench.epochs.rotate(actor=ACTOR))

    @rule(crash=crashes)
    def trim(self, crash: tuple[str, int] | None) -> None:
        self.attempt(crash, lambda: self.bench.epochs.trim(actor=ACTOR))

    @rule()
    def trim_all(self) -> None:
        _, current = self.server.epochs()
        self.bench.epochs.trim(actor=ACTOR, oldest=current)

    @rule(days=st.sampled_from([1, 31, 95]))
    def wait(self, days: int) -> None:
        self.clock.advance(days * DAY_S)

    @rule(person=persons, crash=crashes)
    def erase(self, person: str, crash: tuple[str, int] | None) -> None:
        def work() -> None:
            self.bench.eraser.erase(tenant=TENANT, person=person, actor=ACTOR)

        if not self.attempt(crash, work):
            work()
        for text in [text for text, whose in self.live.items() if whose == person]:
            self.dead[text] = self.live.pop(text)

    @rule()
    def back_up(self) -> None:
        target = self.directory / f"backup-{len(self.backups)}"
        with (
            closing(sqlite3.connect(self.directory / "keys.sqlite3")) as ours,
            closing(sqlite3.connect(target)) as theirs,
        ):
            ours.backup(theirs)
        self.backups.append((target, self.server.epochs()[1]))

    @precondition(lambda self: self.backups and self.restorable())
    @rule()
    def restore(self) -> None:
        backup, _ = self.backups[-1]
        self.process.close()
        with (
            closing(sqlite3.connect(backup)) as theirs,
            closing(sqlite3.connect(self.directory / "keys.sqlite3")) as ours,
        ):
            theirs.backup(ours)
        self.open()
        # What the operator does after a restore: erase again whatever the log says was erased.
        erased = [
            key_id
            for event in self.recorder.events
            if event.action == "keys.person.erase" and event.stage == "outcome"
            for key_id in event.key_ids
        ]
        self.bench.eraser.erase_again(key_ids=erased, actor=ACTOR)
        # Keys made after the backup are gone with what they sealed.
        known = self.bench.table.by_ids([parse_sealed(text).key_id for text in self.live])
        self.live = {
            text: person for text, person in self.live.items() if parse_sealed(text).key_id in known
        }

    def restorable(self) -> bool:
        """Whether the newest backup is not older than the last trim."""
        return all(
            row["epoch"] >= min(self.server.epoch_keys) for row in live_rows(self.backups[-1][0])
        )

    @invariant()
    def live_data_opens(self) -> None:
        for text, person in getattr(self, "live", {}).items():
            assert self.bench.unseal(person, text) == b"text"

    @invariant()
    def erased_data_never_opens(self) -> None:
        for text, person in getattr(self, "dead", {}).items():
            with pytest.raises((PersonErasedError, UnknownKeyError)):
                self.bench.unseal(person, text)

    @invariant()
    def trimmed_backups_are_dead(self) -> None:
        for backup, newest in getattr(self, "backups", []):
            if newest < min(self.server.epoch_keys):
                for row in live_rows(backup):
                    with pytest.raises(VaultRejectedError):
                        self.server.unwrap([wrapped_key(KeyRow(**dict(row)))])


def live_rows(path: Path) -> list[sqlite3.Row]:
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        return connection.execute("SELECT * FROM data_keys WHERE erased_at IS NULL").fetchall()


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
