from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from federated.accounting import Accountant
from federated.errors import AccountingError, LedgerError, StoreError
from federated.node.budget import Budget, Cap, decode_cost, encode_cost
from federated.node.keeper import FileKeeper
from federated.node.store import Store
from tests.federated.node.ledgers import adding, contact
from tests.federated.node.tables import fill

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def budget(store: Store) -> Budget:
    fill(store, {"me": {"mood": [1.0]}})
    return Budget(store, adding)


def reserve(store: Store, budget: Budget, run: str, epsilon: float = 0.1) -> tuple[int, ...]:
    return budget.reserve([store.person("me")], contact(run, epsilon), now=1)


def test_a_reservation_without_a_spend_counts_as_spent(store: Store, budget: Budget) -> None:
    reserve(store, budget, "a")
    assert budget.spent(store.person("me")) == pytest.approx(0.1)
    budget.spend(reserve(store, budget, "b"))
    assert budget.left(store.person("me")) == pytest.approx(3.8)
    assert [one.state for one in budget.spends(store.person("me"))] == ["reserved", "spent"]


@pytest.mark.parametrize("extra", ["again", "never reserved"])
def test_spends_nothing_when_one_of_the_costs_is_not_reserved_any_more(
    store: Store, budget: Budget, extra: str
) -> None:
    spent = reserve(store, budget, "a")
    budget.spend(spent)
    (fresh,) = reserve(store, budget, "b")
    with pytest.raises(LedgerError, match="nothing is read"):
        budget.spend([fresh, *(spent if extra == "again" else [fresh + 1])])
    assert [one.state for one in budget.spends(store.person("me"))] == ["spent", "reserved"]


def test_a_round_that_was_seen_here_is_nobodys_any_more(store: Store, budget: Budget) -> None:
    """Whoever the people are, whichever question it is, and whoever of them is still there."""
    fill(store, {"other": {"mood": [1.0]}})
    reserve(store, budget, "a")
    store.erase_person(store.person("me"))
    other = store.person("other")
    for query in ("q", "another"):
        again = replace(contact("a"), query=query)
        verdict = budget.judge([other], again, epsilon=9.0, delta=0.5, questions=1, answers=9)
        assert verdict == {other.number: "repeat"}
        with pytest.raises(LedgerError, match="answered once"):
            budget.reserve([other], again, now=1)
    for new in (
        contact("b"), replace(contact("a"), round_number=1), replace(contact("a"), study="b"),
        replace(contact("a"), study_hash="1" * 64),
    ):  # fmt: skip
        assert budget.judge([other], new, epsilon=9.0, delta=0.5, questions=1, answers=9) == {}
        budget.reserve([other], new, now=1)
    assert len(budget.spends(other)) == 4


def test_a_cost_survives_the_ledger_exactly() -> None:
    cost = contact("a", epsilon=0.1 + 0.2).cost
    assert decode_cost(encode_cost(cost)) == cost


def test_killed_at_every_line_what_was_said_is_in_the_ledger(
    store: Store, budget: Budget, keeper: FileKeeper
) -> None:
    store.close()
    path = store.database.path
    done = subprocess.run(
        [sys.executable, "-m", "tests.federated.node.crashes", "spend",
         str(path), str(keeper._path)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 60


def test_many_processes_together_never_spend_more_than_the_cap(
    store: Store, budget: Budget, keeper: FileKeeper
) -> None:
    budget.set_cap(Cap(epsilon=1.0, delta=0.0))
    processes = [
        subprocess.Popen(
            [
                sys.executable, "-m", "tests.federated.node.rivals",
                str(store.database.path), str(keeper._path), str(number),
            ],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for number in range(4)
    ]  # fmt: skip
    granted = [int(process.communicate(timeout=240)[0]) for process in processes]
    assert sum(granted) == 10
    budget.verify()
    assert budget.spent(store.person("me")) == pytest.approx(1.0)


def copies(store: Store) -> Iterator[Path]:
    return store.database.path.parent.glob("device.store*")


def test_an_older_copy_of_the_file_is_refused(
    tmp_path: Path, store: Store, budget: Budget, keeper: FileKeeper
) -> None:
    reserve(store, budget, "a")
    backup = tmp_path / "backup"
    backup.mkdir()
    for file in copies(store):
        shutil.copy(file, backup / file.name)
    reserve(store, budget, "b")
    store.close()
    for file in backup.iterdir():
        shutil.copy(file, tmp_path / file.name)
    restored = Store.open(tmp_path / "device.store", keeper)
    with pytest.raises(LedgerError, match="older copy"):
        Budget(restored, adding).ready()
    with pytest.raises(LedgerError, match="older copy"):
        reserve(restored, Budget(restored, adding), "c")
    restored.close()


def test_an_older_copy_that_grew_again_is_still_found(
    tmp_path: Path, store: Store, budget: Budget, keeper: FileKeeper
) -> None:
    """With its keeper's counter put back for a while, so that it could be written to."""
    old_counter = keeper.get("counter")
    assert old_counter
    copy = tmp_path / "copy"
    shutil.copy(store.database.path, copy)
    reserve(store, budget, "a")
    newest = keeper.get("counter")
    assert newest
    store.close()
    shutil.copy(copy, store.database.path)
    keeper.set("counter", old_counter)
    forked = Store.open(store.database.path, keeper)
    for run in ("x", "y", "z"):
        reserve(forked, Budget(forked, adding), run)
    keeper.set("counter", newest)
    with pytest.raises(LedgerError, match="older copy"):
        Budget(forked, adding).ready()
    forked.close()


def test_a_keeper_that_was_emptied_stops_all_spending(
    store: Store, budget: Budget, keeper: FileKeeper
) -> None:
    keeper.delete("counter")
    with pytest.raises(LedgerError, match="emptied"):
        reserve(store, budget, "a")


def test_a_crash_between_ledger_and_keeper_is_mended_upward(
    store: Store, budget: Budget, keeper: FileKeeper
) -> None:
    before = keeper.get("counter")
    assert before
    reserve(store, budget, "a")
    newest = keeper.get("counter")
    keeper.set("counter", before)
    budget.ready()
    assert keeper.get("counter") == newest != before


def test_a_keeper_that_cannot_be_written_lets_nobody_in(
    store: Store, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, value: str) -> None:
        raise StoreError("The key ring is locked.")

    monkeypatch.setattr(store.keeper, "set", fail)
    with pytest.raises(StoreError, match="locked"):
        reserve(store, budget, "a")
    # Over-counted, never under-counted.
    assert budget.spent(store.person("me")) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "change",
    ["UPDATE spends SET cost = replace(cost, '0.1', '0.0') WHERE number = 2",
     "UPDATE spends SET who = 'x' WHERE number = 1", "DELETE FROM spends WHERE number = 1"],
)  # fmt: skip
def test_a_changed_or_removed_row_is_found(store: Store, budget: Budget, change: str) -> None:
    for run in ("a", "b", "c"):
        reserve(store, budget, run)
    budget.verify()
    with store.database.transaction():
        assert store.database.run(change) == 1
    with pytest.raises(LedgerError, match="was changed"):
        budget.verify()


def test_who_is_erased_and_comes_back_comes_back_to_what_was_spent(
    store: Store, budget: Budget
) -> None:
    reserve(store, budget, "a")
    store.erase_person(store.person("me"))
    assert store.people() == ()
    fill(store, {"me": {"mood": [5.0]}, "other": {"mood": [5.0]}})
    assert budget.spent(store.person("me")) == pytest.approx(0.1)
    assert budget.spent(store.person("other")) == 0.0


def test_a_cost_that_nobody_can_compose_counts_as_unbounded(store: Store, budget: Budget) -> None:
    class Lost:
        def compose(self, costs: object) -> float:
            raise AccountingError("No bound.")

    lost = Budget(store, lambda _delta, _adaptive: Lost())
    me = store.person("me")
    verdict = lost.judge([me], contact("a"), epsilon=9.0, delta=0.5, questions=1, answers=9)
    assert verdict == {me.number: "study_budget"}


def test_composes_with_the_real_accountant(store: Store, budget: Budget) -> None:
    real = Budget(store, lambda delta, adaptive: Accountant(delta=delta, adaptive=adaptive))
    me = store.person("me")
    real.set_cap(Cap(epsilon=8.0, delta=1e-4))
    for number in range(8):
        asked = contact(f"r{number}", epsilon=1.0)
        assert real.judge([me], asked, epsilon=100.0, delta=0.0, questions=1, answers=99) == {}
        real.reserve([me], asked, now=1)
    assert real.spent(me) == pytest.approx(8.0)
    asked = contact("one-more", epsilon=0.01)
    verdict = real.judge([me], asked, epsilon=100.0, delta=0.0, questions=1, answers=99)
    assert verdict == {me.number: "budget"}


def test_a_cap_lowered_below_what_was_spent_leaves_nothing(store: Store, budget: Budget) -> None:
    real = Budget(store, lambda delta, adaptive: Accountant(delta=delta, adaptive=adaptive))
    me = store.person("me")
    asked = contact("a", epsilon=1.0)
    asked = replace(asked, cost=replace(asked.cost, delta=1e-5, closeness=1e-6))
    real.reserve([me], asked, now=1)
    real.set_cap(Cap(epsilon=8.0, delta=0.0))
    assert real.spent(me) == float("inf")
    assert real.left(me) == 0.0
    assert real.judge([me], contact("b"), epsilon=9.0, delta=0.5, questions=1, answers=9)


@pytest.mark.parametrize("cap", [Cap(epsilon=0.0), Cap(epsilon=float("inf")), Cap(delta=1.0)])
def test_a_cap_that_caps_nothing_is_refused(budget: Budget, cap: Cap) -> None:
    with pytest.raises(LedgerError):
        budget.set_cap(cap)


def test_who_is_asked_oftener_than_there_are_questions_is_promised_the_sum(
    store: Store, budget: Budget
) -> None:
    """What is asked again is asked knowing earlier answers: the tight bound is not proven then."""
    real = Budget(store, lambda delta, adaptive: Accountant(delta=delta, adaptive=adaptive))
    me = store.person("me")
    real.set_cap(Cap(epsilon=99.0, delta=1e-2))
    asked = [
        replace(contact(f"r{number}", epsilon=0.1), query=f"q{number}") for number in range(51)
    ]
    for one in asked[:50]:
        real.reserve([me], one, now=1)
    promised = Accountant(delta=1e-6).compose([one.cost for one in asked])
    assert promised < 4.5
    for questions, verdict in ((51, {}), (50, {me.number: "study_budget"})):
        found = real.judge(
            [me], asked[50], epsilon=4.5, delta=1e-6, questions=questions, answers=99
        )
        assert found == verdict
