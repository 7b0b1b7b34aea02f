"""What is kept of earlier rounds: sealed, no longer than it is needed, gone with the consent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from federated.errors import StoreError
from federated.node import database as databases
from federated.node.consent import Consents, Scope
from federated.node.keeper import FileKeeper
from federated.node.past import Past, expire
from federated.node.store import Person, Store
from tests.federated.node.tables import fill

STUDY, QUERY = "ab" * 32, "mood"
SCOPE = Scope(
    kinds=frozenset({"train"}), columns=frozenset({"mood"}), purposes=frozenset({"HRESCH"})
)
VECTORS = {3: np.array([5, -7], dtype=np.int64), 5: np.array([2**50, 0], dtype=np.int64)}


@pytest.fixture
def me(store: Store) -> Person:
    fill(store, {"me": {"mood": [1.0]}, "other": {"mood": [2.0]}})
    Consents(store).give(store.people(), SCOPE, now=1)
    return store.person("me")


def past(store: Store, study: str = STUDY, query: str = QUERY) -> Past:
    return Past(store=store, study=study, query=query)


def kept(store: Store, person: Person, dimension: int = 2) -> dict[int, list[int]]:
    return {at: one.tolist() for at, one in past(store).of(person, dimension=dimension).items()}


def rows(store: Store) -> int:
    found = store.database.one("SELECT count(*) FROM past")
    assert found
    return int(found[0])


def test_what_was_brought_is_there_in_the_next_process(
    store: Store, me: Person, keeper: FileKeeper
) -> None:
    past(store).keep({me: VECTORS}, until=9)
    store.close()
    again = Store.open(store.database.path, keeper)
    assert kept(again, me) == {3: [5, -7], 5: [2**50, 0]}
    assert kept(again, again.person("other")) == {}
    assert past(again, study="cd" * 32).of(me, dimension=2) == {}
    assert past(again, query="another").of(me, dimension=2) == {}
    # Of another length it is of no use.
    assert kept(again, me, dimension=3) == {}
    again.close()


def test_it_is_replaced_and_let_go_of(store: Store, me: Person) -> None:
    past(store).keep({me: VECTORS}, until=9)
    past(store).keep({me: {5: VECTORS[5]}}, until=9)
    assert kept(store, me) == {5: [2**50, 0]}
    past(store).keep({me: {}}, until=9)
    assert rows(store) == 0


def test_it_goes_when_the_study_is_over(store: Store, me: Person) -> None:
    past(store).keep({me: VECTORS}, until=9)
    past(store, query="later").keep({me: VECTORS}, until=20)
    expire(store, 8)
    assert rows(store) == 2
    expire(store, 9)
    assert rows(store) == 1
    assert kept(store, me) == {}


@pytest.mark.parametrize(
    "act",
    [
        lambda store, me: Consents(store).revoke(me, now=2),
        lambda store, me: Consents(store).revoke(me, 1, now=2),
        lambda store, me: store.withdraw(me, "study", now=2),
        lambda store, me: store.set_state(me, "left", now=2),
        lambda store, me: store.set_state(me, "paused", now=2),
        lambda store, me: store.erase_person(me),
    ],
    ids=["all consents", "one consent", "withdraw", "leave", "pause", "erase"],
)
def test_it_goes_when_the_person_takes_anything_back_and_others_stays(
    store: Store, me: Person, act: Callable[[Store, Person], object]
) -> None:
    other = store.person("other")
    past(store).keep({me: VECTORS, other: VECTORS}, until=9)
    past(store, query="another").keep({me: VECTORS}, until=9)
    act(store, me)
    assert kept(store, other) == {3: [5, -7], 5: [2**50, 0]}
    assert rows(store) == 1


def test_that_it_was_let_go_of_is_counted_for_each(store: Store, me: Person) -> None:
    """Also where nothing was kept: a round that is under way may be about to keep something."""
    assert store.forgets() == {}
    Consents(store).revoke(me, now=2)
    assert store.forgets() == {me.number: 1}
    Consents(store).give([me], SCOPE, now=3)
    past(store).keep({me: VECTORS}, until=9)
    assert store.forgets() == {me.number: 1}
    store.set_state(store.person("other"), "paused", now=4)
    assert store.forgets() == {me.number: 1, store.person("other").number: 1}
    store.erase_person(me)
    assert me.number not in store.forgets()


def test_it_is_sealed_under_the_persons_own_key_and_bound_to_its_place(
    store: Store, me: Person
) -> None:
    other = store.person("other")
    past(store).keep({me: VECTORS, other: VECTORS}, until=9)
    found = store.database.one("SELECT sealed FROM past WHERE person = ?", [me.number])
    assert found
    assert VECTORS[3].tobytes() not in found[0]
    for change in (
        "UPDATE past SET sealed = (SELECT sealed FROM past WHERE person = 1) WHERE person = 2",
        "UPDATE past SET query = 'x'",
        "UPDATE past SET sealed = x'00'",
    ):
        with contextlib.suppress(StopIteration), store.database.transaction():
            store.database.run(change)
            taken = past(store, query="x" if "query" in change else QUERY)
            assert taken.of(other, dimension=2) == {}
            # Nothing of it stays.
            raise StopIteration
    store.erase_person(me)
    with pytest.raises(StoreError, match="key"):
        store.unseal(me, found[0], "havengate/device/past/v1", STUDY, QUERY)


def test_all_of_it_is_kept_or_nothing(store: Store, me: Person) -> None:
    other = store.person("other")
    store.erase_person(other)
    with pytest.raises(StoreError):
        past(store).keep({me: VECTORS, other: VECTORS}, until=9)
    assert rows(store) == 0


# --- Stores of the version before -----------------------------------------------------------------


def older(store: Store) -> None:
    """Make it what the version before had."""
    with store.database.transaction():
        store.database.run("DROP TABLE past")
        store.database.run("PRAGMA user_version = 2")
    store.close()


def test_a_store_of_the_version_before_is_taken_over_with_all_that_is_in_it(
    store: Store, me: Person, keeper: FileKeeper
) -> None:
    older(store)
    for _ in range(2):
        again = Store.open(store.database.path, keeper)
        assert again.people()[0].name == me.name
        assert again.own_rows(me).values["mood"].tolist() == [1.0]
        again.generations.verify()
        past(again).keep({me: VECTORS}, until=9)
        assert kept(again, me) == {3: [5, -7], 5: [2**50, 0]}
        again.close()


@pytest.mark.parametrize("version", [0, 1, 4, 99])
def test_a_store_of_an_unknown_version_is_left_as_it_is(
    store: Store, me: Person, keeper: FileKeeper, version: int
) -> None:
    del me
    with store.database.transaction():
        store.database.run(f"PRAGMA user_version = {version}")
    store.close()
    before = Path(store.database.path).read_bytes()
    with pytest.raises(StoreError, match="another version"):
        Store.open(store.database.path, keeper)
    assert Path(store.database.path).read_bytes() == before


def test_a_move_to_the_new_version_that_is_cut_short_is_done_anew(
    store: Store, me: Person, keeper: FileKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    older(store)
    run = databases.Database.run

    def stopped(self: databases.Database, statement: str, values: object = ()) -> int:
        if statement.startswith("PRAGMA user_version ="):
            raise KeyboardInterrupt
        return run(self, statement, values)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(databases.Database, "run", stopped)
        with pytest.raises(KeyboardInterrupt):
            Store.open(store.database.path, keeper)
    again = Store.open(store.database.path, keeper)
    past(again).keep({me: VECTORS}, until=9)
    assert rows(again) == 1
    again.close()
