"""Erasing a person: gone now, proven, dated, in the log, and safe to repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from keys.errors import (
    KeysError,
    KeyTableError,
    PersonErasedError,
    VaultRejectedError,
    VaultUnavailableError,
)
from keys.model import KeyOwner
from keys.ports import KeyEvent
from keys.pseudonyms import Pseudonymiser
from keys.sealed import parse_sealed
from keys.store import wrapped_key
from tests.keys.fakes import FakeClock, FakeKeyServer, LogDownError
from tests.keys.workbench import TENANT, Workbench, database_files, workbench

DAY_S = 86_400.0


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    with workbench(tmp_path / "keys.sqlite3", clock=FakeClock(at("2027-01-15"))) as made:
        yield made


def at(day: str) -> float:
    return datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()


def erase(bench: Workbench, person: str = "ada") -> object:
    return bench.eraser.erase(tenant=TENANT, person=person, actor="officer")


def stages(bench: Workbench) -> list[tuple[str, bool | None]]:
    return [
        (event.stage, event.succeeded)
        for event in bench.recorder.events
        if event.action == "keys.person.erase"
    ]


def test_what_was_sealed_for_an_erased_person_never_opens(bench: Workbench) -> None:
    texts, other = [bench.seal("ada") for _ in range(3)], bench.seal("bob")
    receipt = bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    for text in texts:
        with pytest.raises(PersonErasedError):
            bench.unseal("ada", text)
    assert bench.unseal("bob", other) == b"text"
    assert receipt.key_ids == (parse_sealed(texts[0]).key_id,)
    assert receipt.proof == "keys.person_erased"
    assert receipt.destroyed_at == bench.clock()
    assert not receipt.already_erased
    outcome = bench.recorder.events[receipt.log_index]
    assert (outcome.stage, outcome.succeeded) == ("outcome", True)
    assert outcome.key_ids == receipt.key_ids
    assert outcome.detail["proof"] == receipt.proof
    assert outcome.detail["backups_dead_by"] == receipt.backups_dead_by.isoformat()


def test_every_version_of_the_key_is_destroyed(tmp_path: Path) -> None:
    with workbench(tmp_path / "k", seals_per_key=2, seals_per_reservation=1) as bench:
        texts = [bench.seal("ada") for _ in range(9)]
        receipt = bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
        assert len(receipt.key_ids) >= 5
        assert {parse_sealed(text).key_id for text in texts} <= set(receipt.key_ids)
        for text in texts:
            with pytest.raises(PersonErasedError):
                bench.unseal("ada", text)


def test_nothing_of_the_person_is_left_in_the_files(bench: Workbench, tmp_path: Path) -> None:
    bench.seal("ada")
    owner = bench.keyring.owner(TENANT, "ada")
    [row] = bench.table.versions(owner)
    sought = [owner.name.encode(), wrapped_key(row).text.encode()]
    files = database_files(tmp_path / "keys.sqlite3")
    assert all(any(text in content for content in files.values()) for text in sought)
    erase(bench)
    for name, content in database_files(tmp_path / "keys.sqlite3").items():
        assert not any(text in content for text in sought), name


def test_a_new_life_begins_with_a_key_that_opens_nothing_old(bench: Workbench) -> None:
    old = bench.seal("ada")
    erase(bench)
    new = bench.seal("ada", b"new")
    assert bench.unseal("ada", new) == b"new"
    assert parse_sealed(new).key_id != parse_sealed(old).key_id
    with pytest.raises(PersonErasedError):
        bench.unseal("ada", old)
    with pytest.raises(KeysError):
        bench.unseal("ada", new[:16] + old[16:])


# --- Dates ----------------------------------------------------------------------------------------


def test_the_date_covers_the_next_roll_the_trim_and_the_servers_backups(bench: Workbench) -> None:
    bench.epochs.status()  # the epoch begins on 15 January
    bench.seal("ada")
    bench.clock.advance(10 * DAY_S)
    receipt = bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    # Roll after 90 days, trim 30 days later, backups of the server for another 30, then a whole
    # day.
    assert receipt.backups_dead_by == date(2027, 1, 15) + timedelta(days=90 + 30 + 30 + 1)


def test_an_overdue_roll_makes_the_date_later_not_earlier(bench: Workbench) -> None:
    bench.epochs.status()
    bench.seal("ada")
    bench.clock.advance(200 * DAY_S)
    receipt = bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    today = date(2027, 1, 15) + timedelta(days=200)
    assert receipt.backups_dead_by == today + timedelta(days=30 + 30 + 1)


def test_on_that_date_every_backup_is_dead_if_epochs_are_kept_on_schedule(
    bench: Workbench,
) -> None:
    """The worst case: backups of table and server taken in the last moment each existed."""
    bench.epochs.status()
    bench.seal("ada")
    bench.clock.advance(47 * DAY_S)
    table_backup = bench.table.versions(bench.keyring.owner(TENANT, "ada"))
    server_backups = [(bench.clock(), dict(bench.server.epoch_keys))]
    receipt = bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    dead_by = at(receipt.backups_dead_by.isoformat())
    while bench.clock() < dead_by:
        overdue = bench.epochs.status().overdue
        if "trim" in overdue:
            bench.epochs.trim(actor="operator")
        if "roll" in overdue:
            bench.epochs.rotate(actor="operator")
        server_backups.append((bench.clock(), dict(bench.server.epoch_keys)))
        bench.clock.advance(DAY_S / 4)
    kept = [keys for taken, keys in server_backups if taken > bench.clock() - 30 * DAY_S]
    assert kept
    for epoch_keys in [bench.server.epoch_keys, *kept]:
        with pytest.raises(VaultRejectedError):
            FakeKeyServer(epoch_keys=dict(epoch_keys)).unwrap(
                [wrapped_key(row) for row in table_backup]
            )


def test_a_rotation_during_an_erasure_makes_the_date_later(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys were moved to a new epoch just before they were destroyed: it is that one's end."""
    bench.epochs.status()
    bench.seal("ada")
    bench.clock.advance(80 * DAY_S)
    real = bench.recorder.record
    rotated: list[bool] = []

    def record(event: KeyEvent) -> int:
        index = real(event)
        if event.action == "keys.person.erase" and not rotated:
            rotated.append(True)
            bench.epochs.rotate(actor="operator")
        return index

    monkeypatch.setattr(bench.recorder, "record", record)
    receipt = bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    today = date(2027, 1, 15) + timedelta(days=80)
    assert receipt.backups_dead_by == today + timedelta(days=90 + 30 + 30 + 1)
    again = bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    assert again.backups_dead_by == receipt.backups_dead_by


# --- Repeating, crashing, failing -----------------------------------------------------------------


def test_a_second_erasure_says_so_and_destroys_nothing(bench: Workbench) -> None:
    bench.seal("ada")
    first = bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    second = bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    assert second.already_erased
    assert (second.key_ids, second.log_index) == (first.key_ids, first.log_index)
    assert len(stages(bench)) == 2


def test_a_person_nobody_knew_gets_a_receipt_without_keys(bench: Workbench) -> None:
    receipt = bench.eraser.erase(tenant=TENANT, person="nobody", actor="officer")
    assert (receipt.key_ids, receipt.proof, receipt.already_erased) == ((), None, False)


def test_a_person_who_came_back_can_be_erased_again(bench: Workbench) -> None:
    bench.seal("ada")
    first = bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    text = bench.seal("ada")
    second = bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    assert not second.already_erased
    assert second.key_ids == (parse_sealed(text).key_id,) != first.key_ids


def test_without_a_record_nothing_is_destroyed(bench: Workbench) -> None:
    text = bench.seal("ada")
    bench.recorder.fail_at = 0
    with pytest.raises(LogDownError):
        erase(bench)
    assert bench.unseal("ada", text) == b"text"


def test_an_erasure_whose_outcome_was_not_recorded_is_finished_by_the_next(
    bench: Workbench,
) -> None:
    text = bench.seal("ada")
    bench.recorder.fail_at = 1
    with pytest.raises(LogDownError):
        erase(bench)
    with pytest.raises(PersonErasedError):
        bench.unseal("ada", text)
    assert bench.epochs.check().unfinished_erasures == 1
    bench.recorder.fail_at = None
    receipt = bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    assert receipt.key_ids == (parse_sealed(text).key_id,)
    assert receipt.proof == "keys.person_erased"
    assert stages(bench) == [("intent", None), ("outcome", True)]
    assert len({event.request_id for event in bench.recorder.events}) == 1
    assert bench.epochs.check().sound


@pytest.mark.parametrize("step", ["scrub", "prove", "empty"])
def test_a_crash_at_any_step_is_finished_by_the_next_call(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    text = bench.seal("ada")

    def die(*_: object, **__: object) -> None:
        raise KeyTableError("died")

    with monkeypatch.context() as patched:
        owner: dict[str, tuple[object, str]] = {
            "scrub": (bench.database, "scrub"),
            "prove": (bench.eraser, "_prove"),
            "empty": (bench.store, "empty"),
        }
        patched.setattr(*owner[step], die)
        with pytest.raises(KeyTableError):
            erase(bench)
    receipt = bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    assert receipt.key_ids == (parse_sealed(text).key_id,)
    with pytest.raises(PersonErasedError):
        bench.unseal("ada", text)


def test_a_transaction_that_fails_destroys_nothing_and_can_be_repeated(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = bench.seal("ada")

    def fail(*_: object, **__: object) -> list[str]:
        raise KeyTableError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("keys.erasure.destroy_keys", fail)
        with pytest.raises(KeyTableError):
            erase(bench)
    assert bench.unseal("ada", text) == b"text"
    erase(bench)
    # The first intent has no outcome: whoever verifies the log is shown it.
    assert stages(bench) == [("intent", None), ("intent", None), ("outcome", True)]


def test_a_probe_that_still_opens_is_an_alarm_and_recorded_as_failed(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.seal("ada")
    opens: Callable[..., bytes] = lambda *_: b"still there"  # noqa: E731 (typed for the patch)
    monkeypatch.setattr(bench.keyring, "unseal", opens)
    with pytest.raises(KeysError, match="fault"):
        erase(bench)
    assert stages(bench)[-1] == ("outcome", False)


def test_an_erasure_without_the_key_server_destroys_nothing(bench: Workbench) -> None:
    text = bench.seal("ada")
    bench.store.empty()
    bench.server.available = False
    with pytest.raises(KeysError):
        erase(bench)
    bench.server.available = True
    assert bench.unseal("ada", text) == b"text"


def test_after_a_restore_the_log_is_enough_to_erase_again(tmp_path: Path) -> None:
    import shutil

    server, path = FakeKeyServer(), tmp_path / "keys.sqlite3"
    with workbench(path, server=server) as bench:
        text = bench.seal("ada")
        bench.database.scrub()
        shutil.copy(path, tmp_path / "backup")
        receipt = bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    with workbench(tmp_path / "backup", server=server) as restored:
        assert restored.unseal("ada", text) == b"text"  # until the epoch is trimmed, it is back
        again = restored.eraser.erase_again(key_ids=list(receipt.key_ids), actor="operator")
        assert again == list(receipt.key_ids)
        with pytest.raises(PersonErasedError):
            restored.unseal("ada", text)


def test_erasing_again_after_a_restore_deletes_pseudonyms_too(tmp_path: Path) -> None:
    import shutil

    server, path = FakeKeyServer(), tmp_path / "keys.sqlite3"
    with workbench(path, server=server) as bench:
        pseudonym_of(bench, "ada")
        pseudonym_of(bench, "bob")
        bench.database.scrub()
        shutil.copy(path, tmp_path / "backup")
        receipt = bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    with workbench(tmp_path / "backup", server=server) as restored:
        owners = "SELECT owner_name FROM pseudonyms"
        with restored.database.reading() as connection:
            assert len(connection.exec_driver_sql(owners).all()) == 2
        restored.eraser.erase_again(key_ids=list(receipt.key_ids), actor="operator")
        with restored.database.reading() as connection:
            left = connection.exec_driver_sql(owners).scalars().all()
        assert left == [restored.keyring.owner(TENANT, "bob").name]


def pseudonym_of(bench: Workbench, person: str) -> str:
    made = Pseudonymiser(
        bench.keyring, database=bench.database, halves=SealingHalves(), recorder=bench.recorder
    )
    return made.pseudonym(tenant=TENANT, purpose="study-1", person=person)


class SealingHalves:
    """Encrypts for nobody: these tests take no way back. Or fails, like a key server away."""

    def __init__(self, *, away: bool = False) -> None:
        self._away = away

    def encrypt(self, half: str, *, context: bytes, plaintext: bytes) -> str:
        if self._away:
            raise VaultUnavailableError("no answer")
        return f"{half} {len(context)} {len(plaintext)}"


def test_a_key_made_for_a_pseudonym_that_never_was_is_destroyed_too(bench: Workbench) -> None:
    """A second erasure must not answer "erased already" while a key of the person lives."""
    bench.seal("ada")
    erase(bench)
    halves = SealingHalves(away=True)
    made = Pseudonymiser(
        bench.keyring, database=bench.database, halves=halves, recorder=bench.recorder
    )
    with pytest.raises(VaultUnavailableError):
        made.pseudonym(tenant=TENANT, purpose="study-1", person="ada")
    receipt = bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    assert not receipt.already_erased
    assert receipt.proof == "keys.person_erased"
    owner = bench.keyring.owner(TENANT, "ada")
    assert bench.table.versions(KeyOwner("pseudonym", TENANT, owner.name)) == []


def test_neither_events_nor_receipts_name_the_person(bench: Workbench) -> None:
    bench.seal("Ada-Example")
    receipt = bench.eraser.erase(tenant=TENANT, person="Ada-Example", actor="officer")
    shown = f"{receipt} {[(e.detail, e.key_ids, e.request_id) for e in bench.recorder.events]}"
    assert "Ada" not in shown
