from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from federated.errors import LedgerError, RefusedError, StoreError
from federated.node.budget import Budget, Cap
from federated.node.enrolment import enrol, remembered
from federated.node.keeper import FileKeeper
from federated.node.store import Store
from federated.study_log import make_bundle
from tests.federated.node.ledgers import adding, contact
from tests.federated.node.tables import fill
from tests.federated.node.world import SpiedStore, World
from tests.federated.studies import ORIGIN

ROOT = Path(__file__).resolve().parents[3]


def pause(world: World) -> None:
    world.store.set_state(world.store.person("me"), "paused", now=world.now)


def leave(world: World) -> None:
    world.store.set_state(world.store.person("me"), "left", now=world.now)


def withdraw(world: World) -> None:
    world.store.withdraw(world.store.person("me"), world.study().id, now=world.now)


def revoke(world: World) -> None:
    world.consents.revoke(world.store.person("me"), now=world.now)


def lower_the_cap(world: World) -> None:
    world.budget.set_cap(Cap(epsilon=0.1, delta=1e-4))


def enrol_anew(world: World) -> None:
    enrol(world.store, world.enrolment(minimum_cohort=50))


def see_more_of_the_log(world: World) -> None:
    with pytest.raises(RefusedError):
        world.admit(world.request(world.study()), world.study(), {"another": 1})
    assert remembered(world.store, ORIGIN).size


def erase_somebody(world: World) -> None:
    world.store.erase_person(world.store.person("other"))


def reserve(world: World) -> None:
    world.budget.reserve([world.store.person("me")], contact("elsewhere"), now=world.now)


def spend(world: World) -> None:
    world.budget.spend([1])


CHANGES: list[Callable[[World], None]] = [
    pause, leave, withdraw, revoke, lower_the_cap, enrol_anew, see_more_of_the_log,
    erase_somebody, reserve, spend, World.consent,
]  # fmt: skip


def reopened(world: World, keeper: FileKeeper) -> None:
    world.store.close()
    opened = SpiedStore.open(world.store.database.path, keeper)
    assert isinstance(opened, SpiedStore)
    world.store, world.budget = opened, Budget(opened, adding)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_of_before_any_change_that_matters_is_refused_for_good(
    world: World, keeper: FileKeeper, change: Callable[[World], None]
) -> None:
    fill(world.store, {"other": {"mood": [1.0], "sleep_hours": [7.0]}})
    world.budget.reserve([world.store.person("other")], contact("before"), now=world.now)
    asked, path = world.study(), world.store.database.path
    index = world.publish(asked)
    before = path.read_bytes()
    change(world)
    world.budget.ready()
    world.store.close()
    path.write_bytes(before)
    for _ in range(2):
        reopened(world, keeper)
        with pytest.raises(LedgerError, match="older copy"):
            world.budget.ready()
        with pytest.raises(RefusedError) as caught:
            world.admit(world.request(asked, index=index), asked)
        assert caught.value.rule == "ledger"
        assert world.store.reads == 0
        with pytest.raises(LedgerError, match="older copy"):
            pause(world)
        for name in ("me", "new"):
            with pytest.raises(LedgerError, match="older copy"):
                fill(world.store, {name: {"mood": [1.0] * 9}})


def test_an_older_copy_can_still_be_erased(store: Store, keeper: FileKeeper) -> None:
    fill(store, {"a": {"mood": [1.0]}, "b": {"mood": [2.0]}})
    before = store.database.path.read_bytes()
    store.set_state(store.person("a"), "paused", now=1)
    store.close()
    store.database.path.write_bytes(before)
    older = Store.open(store.database.path, keeper)
    older.erase_person(older.person("a"))
    assert [person.name for person in older.people()] == ["b"]
    with pytest.raises(LedgerError, match="older copy"):
        older.generations.verify()
    older.erase()
    assert not list(store.database.path.parent.glob("device*"))


def test_of_two_copies_that_go_on_alone_only_one_can(store: Store, keeper: FileKeeper) -> None:
    """The second is as many changes far as the keeper, and still not the same."""
    fill(store, {"me": {"mood": [1.0]}})
    other = store.database.path.with_name("other.store")
    for suffix in ("", ".keys"):
        shutil.copy(f"{store.database.path}{suffix}", f"{other}{suffix}")
    kept = keeper.get("counter")
    assert kept
    copied = Store.open(other, keeper)
    copied.set_state(copied.person("me"), "paused", now=1)
    with pytest.raises(LedgerError, match="older copy"):
        store.set_state(store.person("me"), "taking_part", now=1)
    keeper.set("counter", kept)
    store.set_state(store.person("me"), "left", now=1)
    with pytest.raises(LedgerError, match="older copy"):
        copied.generations.verify()
    store.generations.verify()
    copied.close()


def test_a_keeper_one_change_behind_is_mended_and_two_behind_is_not(
    store: Store, keeper: FileKeeper
) -> None:
    fill(store, {"me": {"mood": [1.0]}})
    seen = [keeper.get("counter") or ""]
    for number in range(2):
        store.set_state(store.person("me"), "paused", now=number)
        seen.append(keeper.get("counter") or "")
    keeper.set("counter", seen[1])
    store.generations.verify()
    assert keeper.get("counter") == seen[2]
    keeper.set("counter", seen[0])
    with pytest.raises(LedgerError, match="another one went on"):
        store.generations.verify()


def test_a_change_that_is_taken_back_leaves_the_keeper_as_it_was(
    store: Store, keeper: FileKeeper
) -> None:
    fill(store, {"me": {"mood": [1.0]}})
    before = keeper.get("counter")

    def fails() -> None:
        with store.database.transaction():
            store.set_state(store.person("me"), "paused", now=1)
            store.generations.verify()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert keeper.get("counter") == before
    store.generations.verify()
    store.set_state(store.person("me"), "paused", now=1)
    assert keeper.get("counter") != before


def test_many_changes_in_one_transaction_are_one_step(store: Store, keeper: FileKeeper) -> None:
    fill(store, {"me": {"mood": [1.0]}})
    number = int((keeper.get("counter") or "").split()[0])
    with store.database.transaction():
        for study in ("a", "b", "c"):
            store.withdraw(store.person("me"), study, now=1)
            store.generations.verify()
    assert (keeper.get("counter") or "").startswith(f"{number + 1} ")


def test_a_keeper_that_fails_after_a_change_is_mended_when_it_works_again(
    store: Store, keeper: FileKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, {"me": {"mood": [1.0]}})

    def fail(name: str, value: str) -> None:
        raise StoreError("The key ring is locked.")

    with monkeypatch.context() as patch:
        patch.setattr(store.keeper, "set", fail)
        for _ in range(3):
            with pytest.raises(StoreError, match="locked"):
                store.set_state(store.person("me"), "paused", now=1)
    store.generations.verify()
    store.set_state(store.person("me"), "left", now=1)
    assert store.person("me").state == "left"


def test_processes_on_one_store_at_once_never_lock_each_other_out(
    store: Store, keeper: FileKeeper
) -> None:
    fill(store, {"me": {"mood": [1.0]}})
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.federated.node.hammer", "change",
             str(store.database.path), str(keeper._path), name],
            cwd=ROOT, stderr=subprocess.PIPE,
        )
        for name in ("a", "b", "c")
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()[-2000:]
    Budget(store, adding).verify()
    for name in ("a", "b", "c"):
        assert len(store.withdrawn(f"{name}-11")) == 1
    assert {one.state for one in Budget(store, adding).spends(store.person("me"))} == {"spent"}


def test_the_log_does_not_go_back_with_the_file(world: World, keeper: FileKeeper) -> None:
    """A log that hides what this node saw already would pass in an older copy."""
    asked = world.study()
    index = world.publish(asked)
    path = world.store.database.path
    before = path.read_bytes()
    early = make_bundle(world.log.directory, index, from_size=0).encode()
    other = world.study({'"sleep-and-mood"': '"other"'})
    world.admit(world.request(other), other)
    path.write_bytes(before)
    reopened(world, keeper)
    request = replace(world.request(asked, index=index), proof=early)
    with pytest.raises(RefusedError) as caught:
        world.admit(request, asked)
    assert caught.value.rule == "ledger"


@pytest.mark.parametrize("text", ["", "5", "1 2", "x y 0 -", "-1 ab 0 -"])
def test_a_keeper_that_says_nothing_clear_is_refused(
    store: Store, keeper: FileKeeper, text: str
) -> None:
    keeper.set("counter", text)
    with pytest.raises(LedgerError, match="emptied"):
        store.generations.verify()


def test_the_last_row_of_the_ledger_cannot_be_taken_away(store: Store, keeper: FileKeeper) -> None:
    fill(store, {"me": {"mood": [1.0]}})
    budget = Budget(store, adding)
    for run in ("a", "b"):
        budget.reserve([store.person("me")], contact(run), now=1)
    with store.database.transaction():
        store.database.run("DELETE FROM spends WHERE number = 2")
    with pytest.raises(LedgerError, match="Row 2"):
        budget.ready()


def test_what_is_not_reserved_is_not_spent(store: Store, keeper: FileKeeper) -> None:
    fill(store, {"me": {"mood": [1.0]}})
    budget = Budget(store, adding)
    numbers: Any = budget.reserve([store.person("me")], contact("a"), now=1)
    for wrong in ([*numbers, 99], [*numbers, *numbers]):
        with pytest.raises(LedgerError, match="nothing is read"):
            budget.spend(wrong)
    assert [one.state for one in budget.spends(store.person("me"))] == ["reserved"]
    budget.spend(numbers)
    with pytest.raises(LedgerError, match="nothing is read"):
        budget.spend(numbers)


def test_nothing_is_spent_or_read_in_an_older_copy(world: World, keeper: FileKeeper) -> None:
    """Put back between the reservation and the reading, under the open store."""
    asked = world.study()
    admission = world.admit(world.request(asked), asked)
    path = world.store.database.path
    before = path.read_bytes()
    revoke(world)
    path.write_bytes(before)
    reopened(world, keeper)
    with pytest.raises(LedgerError, match="older copy"):
        list(world.guard.rows(admission, now=world.now))
    assert world.store.reads == 0
