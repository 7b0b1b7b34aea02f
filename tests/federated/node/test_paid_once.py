"""An answer of several rounds is paid whole in a person's first, and asked no oftener than said."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from federated.accounting import Accountant
from federated.errors import AccountingError, LedgerError, RefusedError
from federated.manifest import DeclaredQuery, Study
from federated.model import PrivacyCost
from federated.node.budget import Budget, Cap, Contact
from federated.node.consent import Scope
from federated.node.contact import ContactRequest
from federated.node.guard import Admission
from federated.node.keeper import FileKeeper
from federated.node.receipts import Receipts
from federated.node.store import Person, Store
from tests.federated.node.ledgers import adding, contact
from tests.federated.node.tables import fill
from tests.federated.node.world import NODE, ROSTER, World, price

ROUNDS = 3
STANDING = Scope(
    kinds=frozenset({"mean"}),
    columns=frozenset({"mood", "sleep_hours"}),
    purposes=frozenset({"HRESCH"}),
)


@pytest.fixture
def budget(store: Store) -> Budget:
    fill(store, {"me": {"mood": [1.0]}})
    return Budget(store, adding)


def round_of(run: str, number: int = 0, *, query: str = "q", rounds: int = ROUNDS) -> Contact:
    """A round of an answer that costs ε = 1, all rounds together."""
    return replace(contact(run, 1.0), round_number=number, query=query, rounds=rounds)


def ask(budget: Budget, whom: Person, asked: Contact, *, answers: int = 9) -> str:
    """Reserve it as the guard does; or say by which rule not."""
    found = budget.judge([whom], asked, epsilon=9.0, delta=0.5, questions=9, answers=answers)
    if not found:
        budget.reserve([whom], asked, now=1)
    return found.get(whom.number, "")


def paid(budget: Budget, whom: Person) -> list[float | None]:
    return [one.cost.epsilon if one.cost else None for one in budget.spends(whom)]


# --- The ledger ----------------------------------------------------------------------------------


def test_all_rounds_of_an_answer_are_paid_for_in_the_first(store: Store, budget: Budget) -> None:
    me = store.person("me")
    # What is paid is paid: that nothing is left afterwards ends no training.
    budget.set_cap(Cap(epsilon=1.0, delta=0.0))
    assert budget.paid([me], round_of("a")) == frozenset()
    assert [ask(budget, me, round_of("a", number)) for number in range(ROUNDS)] == [""] * ROUNDS
    assert paid(budget, me) == [1.0, None, None]
    assert budget.paid([me], round_of("a", 9)) == {me.number}
    assert budget.spent(me) == budget.spent(me, "study") == pytest.approx(1.0)
    assert ask(budget, me, round_of("b", query="another")) == "budget"
    budget.verify()


def test_nobody_is_asked_oftener_than_there_are_rounds_under_whatever_run_and_number(
    store: Store, budget: Budget
) -> None:
    me = store.person("me")
    for run, number in (("a", 0), ("b", 1), ("a", 7)):
        assert ask(budget, me, round_of(run, number)) == ""
    for run, number in (("a", 2), ("b", 2), ("c", 9), ("c", 2**31 - 1)):
        assert ask(budget, me, round_of(run, number)) == "rounds"
    # Nor when another node or version would count more of them.
    assert ask(budget, me, round_of("d", 3, rounds=2)) == "rounds"
    assert paid(budget, me) == [1.0, None, None]


def test_each_of_an_answers_rounds_is_answered_once_in_whatever_run(
    store: Store, budget: Budget
) -> None:
    """Its number says what a person brings to it: twice would be dearer than what was paid."""
    me = store.person("me")
    assert ask(budget, me, round_of("a", 1)) == ""
    fill(store, {"late": {"mood": [1.0]}})
    for whom in (me, store.person("late")):
        for run in ("a", "b"):
            assert ask(budget, whom, round_of(run, 1)) == "repeat"
    with pytest.raises(LedgerError, match="answered once"):
        budget.reserve([me], round_of("b", 1), now=1)
    # Another question's round of that number is another, and so is an amended study's.
    assert ask(budget, me, round_of("b", 1, query="another")) == ""
    assert ask(budget, me, replace(round_of("c", 1), study_hash="1" * 64)) == ""


@pytest.mark.parametrize("change", [{"query": "another"}, {"study_hash": "1" * 64}, {"study": "b"}])
def test_another_question_or_an_amended_study_is_paid_for_anew(
    store: Store, budget: Budget, change: Mapping[str, str]
) -> None:
    me = store.person("me")
    budget.set_cap(Cap(epsilon=1.5, delta=0.0))
    assert ask(budget, me, round_of("a")) == ""
    other = replace(round_of("b"), **change)  # type: ignore[arg-type]
    assert budget.paid([me], other) == frozenset()
    assert ask(budget, me, other) == "budget"
    budget.set_cap(Cap(epsilon=2.0, delta=0.0))
    assert ask(budget, me, other) == ""
    assert paid(budget, me) == [1.0, 1.0]


def test_an_answer_of_one_round_is_paid_for_each_time(store: Store, budget: Budget) -> None:
    me = store.person("me")
    for run in ("a", "b"):
        assert budget.paid([me], round_of(run, rounds=1)) == frozenset()
        assert ask(budget, me, round_of(run, rounds=1)) == ""
    assert paid(budget, me) == [1.0, 1.0]


def test_a_training_counts_once_towards_the_answers_that_were_announced(
    store: Store, budget: Budget
) -> None:
    """Paid rounds are neither an answer each, nor do they make room for one more."""
    me = store.person("me")
    judging = [round_of(run, query="judge", rounds=1) for run in ("x", "y")]
    for number in range(ROUNDS):
        assert ask(budget, me, round_of("a", number), answers=2) == ""
    assert [ask(budget, me, one, answers=2) for one in judging] == ["", "rounds"]
    assert ask(budget, me, round_of("b", query="third"), answers=2) == "rounds"


def test_who_comes_late_pays_whole_and_is_counted_alone(store: Store, budget: Budget) -> None:
    me = store.person("me")
    assert ask(budget, me, round_of("a", 0)) == ""
    fill(store, {"late": {"mood": [1.0]}})
    late = store.person("late")
    for number in (1, 2):
        together = round_of("a", number)
        assert (
            budget.judge([me, late], together, epsilon=9.0, delta=0.5, questions=9, answers=9) == {}
        )
        budget.reserve([me, late], together, now=1)
    last = budget.judge(
        [me, late], round_of("a", 3), epsilon=9.0, delta=0.5, questions=9, answers=9
    )
    assert last == {me.number: "rounds"}
    assert (paid(budget, me), paid(budget, late)) == ([1.0, None, None], [1.0, None])


def test_who_comes_late_and_cannot_pay_is_not_let_in_with_those_who_paid(
    store: Store, budget: Budget
) -> None:
    me = store.person("me")
    assert ask(budget, me, round_of("a", 0)) == ""
    fill(store, {"late": {"mood": [1.0]}})
    budget.set_cap(Cap(epsilon=0.5, delta=0.0))
    found = budget.judge(
        [me, store.person("late")], round_of("a", 1),
        epsilon=9.0, delta=0.5, questions=9, answers=9,
    )  # fmt: skip
    assert found == {store.person("late").number: "budget"}


def test_who_is_erased_and_comes_back_comes_back_to_the_rounds_that_are_left(
    store: Store, budget: Budget
) -> None:
    for number in range(2):
        assert ask(budget, store.person("me"), round_of("a", number)) == ""
    store.erase_person(store.person("me"))
    fill(store, {"me": {"mood": [5.0]}})
    me = store.person("me")
    assert budget.paid([me], round_of("b")) == {me.number}
    assert [ask(budget, me, round_of("b", number)) for number in range(4)] == [
        "repeat", "repeat", "", "rounds",
    ]  # fmt: skip
    assert paid(budget, me) == [1.0, None, None]


def test_a_round_that_was_seen_is_a_repeat_for_who_paid_for_all(
    store: Store, budget: Budget
) -> None:
    me = store.person("me")
    assert ask(budget, me, round_of("a")) == ""
    assert ask(budget, me, round_of("a")) == "repeat"
    assert ask(budget, me, round_of("a", query="another")) == "repeat"
    with pytest.raises(LedgerError, match="answered once"):
        budget.reserve([me], round_of("a"), now=1)


def test_rounds_at_once_are_counted_together_and_paid_once(
    store: Store, budget: Budget, keeper: FileKeeper
) -> None:
    """Each from a connection of its own, as two processes have them."""
    me = store.person("me")
    verdicts: list[str] = []

    def rival(run: str, first: int) -> None:
        own = Store.open(store.database.path, keeper)
        for number in (first, first + 1):
            with own.database.transaction():
                verdicts.append(ask(Budget(own, adding), me, round_of(run, number)))
        own.close()

    rivals = [
        threading.Thread(target=rival, args=(run, 2 * place)) for place, run in enumerate("abc")
    ]
    for one in rivals:
        one.start()
    for one in rivals:
        one.join()
    assert sorted(verdicts) == [""] * ROUNDS + ["rounds"] * ROUNDS
    assert paid(budget, me) == [1.0, None, None]
    budget.verify()


def test_an_older_copy_lets_nobody_in_free_of_charge(
    tmp_path: Path, store: Store, budget: Budget, keeper: FileKeeper
) -> None:
    me = store.person("me")
    assert ask(budget, me, round_of("a", 0)) == ""
    copy = tmp_path / "copy"
    shutil.copy(store.database.path, copy)
    assert ask(budget, me, round_of("a", 1)) == ""
    store.close()
    shutil.copy(copy, store.database.path)
    restored = Store.open(store.database.path, keeper)
    with pytest.raises(LedgerError, match="older copy"):
        Budget(restored, adding).reserve([me], round_of("a", 2), now=1)
    restored.close()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE spends SET cost = '' WHERE number = 1",
        "UPDATE spends SET query = 'x' WHERE number = 1",
        "UPDATE spends SET study = 'x' WHERE number = 1",
        "UPDATE spends SET round = 9 WHERE number = 2",
    ],
)
def test_a_row_that_was_made_free_or_anothers_is_found(
    store: Store, budget: Budget, change: str
) -> None:
    for number in range(2):
        assert ask(budget, store.person("me"), round_of("a", number)) == ""
    budget.verify()
    with store.database.transaction():
        assert store.database.run(change) == 1
    with pytest.raises(LedgerError, match="was changed"):
        budget.verify()


def test_a_question_that_is_asked_again_is_added_up_though_others_were_not_asked(
    store: Store,
) -> None:
    """Which of its questions a study asks twice may follow from the first answer."""
    fill(store, {"me": {"mood": [1.0]}})
    real = Budget(store, lambda delta, adaptive: Accountant(delta=delta, adaptive=adaptive))
    me = store.person("me")
    real.set_cap(Cap(epsilon=99.0, delta=1e-2))
    asked = [replace(contact(f"r{number}", 0.1), query=f"q{number}") for number in range(50)]
    with store.database.transaction():
        for one in asked:
            real.reserve([me], one, now=1)
    fresh, again = (replace(contact("last", 0.1), query=name) for name in ("new", "q7"))
    promised = Accountant(delta=1e-6).compose([fresh.cost, *(one.cost for one in asked)])
    assert promised < 4.5
    for one, verdict in ((fresh, {}), (again, {me.number: "study_budget"})):
        found = real.judge([me], one, epsilon=4.5, delta=1e-6, questions=99, answers=99)
        assert found == verdict


# --- The guard -----------------------------------------------------------------------------------


@pytest.fixture
def training(world: World) -> Study:
    """Its first question takes three rounds, and the first was answered here."""
    world.ports = replace(world.ports, rounds=lambda _: ROUNDS)
    asked = world.study()
    list(world.guard.rows(world.admit(world.request(asked), asked), now=world.now))
    world.store.reads = 0
    return asked


def following(world: World, of: Study, number: int = 1, **changes: object) -> ContactRequest:
    return world.request(of, index=world.last, round_number=number, **changes)  # type: ignore[arg-type]


def paused(world: World) -> None:
    world.store.set_state(world.store.person("me"), "paused", now=world.now)


def left(world: World) -> None:
    world.store.set_state(world.store.person("me"), "left", now=world.now)


def withdrawn(world: World) -> None:
    world.store.withdraw(world.store.person("me"), world.study().id, now=world.now)


def consent(world: World) -> None:
    world.consents.revoke(world.store.person("me"), now=world.now)


def expired(world: World) -> None:
    world.now += 10**7


def dearer(asked: Study, query: DeclaredQuery) -> PrivacyCost:
    return replace(price(asked, query), epsilon=query.epsilon * 1.01)


def cost(world: World) -> None:
    world.ports = replace(world.ports, price=dearer)


def code(world: World) -> None:
    world.ports = replace(world.ports, code_hash="ef" * 32)


@pytest.mark.parametrize("rule", [paused, left, withdrawn, consent, expired, cost, code])
def test_who_paid_before_is_let_in_by_no_rule_the_less(
    world: World, training: Study, rule: Callable[[World], None]
) -> None:
    rule(world)
    with pytest.raises(RefusedError) as caught:
        world.admit(following(world, training), training)
    assert caught.value.rule == rule.__name__
    assert world.store.reads == 0
    assert paid(world.budget, world.store.person("me")) == [0.5]
    last = world.receipts()[-1]
    assert (last.outcome, last.told.rule, last.told.epsilon) == ("refused", rule.__name__, 0.0)


def test_who_paid_before_counts_in_a_cohort_that_is_as_large_as_ever(
    world: World, training: Study
) -> None:
    for whom in ({**dict.fromkeys(ROSTER, 1), NODE: 2}, {NODE: 1}):
        with pytest.raises(RefusedError) as caught:
            world.admit(following(world, training, taking_part=whom), training)
        assert caught.value.rule == "cohort"
    assert paid(world.budget, world.store.person("me")) == [0.5]


def test_the_guard_asks_nobody_oftener_than_announced(world: World, training: Study) -> None:
    for number, run in ((1, "run-1"), (2, "run-2")):
        world.admit(following(world, training, number, run=run), training)
    for number, rule in ((0, "repeat"), (1, "repeat"), (3, "rounds")):
        with pytest.raises(RefusedError) as caught:
            world.admit(following(world, training, number, run="run-3"), training)
        assert caught.value.rule == rule
    assert paid(world.budget, world.store.person("me")) == [0.5, None, None]


def test_receipts_say_what_was_paid_once_and_that_no_more_is(world: World, training: Study) -> None:
    admission = world.admit(following(world, training), training)
    me = world.store.person("me")
    assert (admission.told_to(me.number).epsilon, admission.told.epsilon) == (0.0, 0.5)
    assert "earlier round had paid" in world.receipts()[-1].words()
    list(world.guard.rows(admission, now=world.now))
    first, second = (one for one in world.receipts() if one.outcome == "allowed")
    assert (first.told.epsilon, second.told.epsilon) == (0.5, 0.0)
    assert "nothing more" in second.words()
    assert first.told.left == second.told.left == pytest.approx(3.5)


def test_consent_that_is_taken_back_and_given_again_neither_pays_twice_nor_asks_oftener(
    world: World, training: Study
) -> None:
    me = world.store.person("me")
    admission = world.admit(following(world, training), training)
    world.consents.revoke(me, now=world.now)
    assert list(world.guard.rows(admission, now=world.now)) == []
    world.consents.give([me], STANDING, now=world.now)
    world.admit(following(world, training, 2), training)
    # What was reserved and not read counts as asked.
    with pytest.raises(RefusedError) as caught:
        world.admit(following(world, training, 3), training)
    assert caught.value.rule == "rounds"
    assert paid(world.budget, me) == [0.5, None, None]


def test_who_comes_late_hears_what_they_paid_and_the_others_that_they_paid_before(
    world: World, training: Study
) -> None:
    fill(world.store, {"late": {"mood": [1.0], "sleep_hours": [6.0]}})
    world.consents.give([world.store.person("late")], STANDING, now=world.now)
    admission: Admission = world.admit(
        following(world, training, taking_part={**dict.fromkeys(ROSTER, 1), NODE: 2}), training
    )
    list(world.guard.rows(admission, now=world.now))
    told = {
        name: Receipts(world.store).of(world.store.person(name))[-1].told.epsilon
        for name in ("me", "late")
    }
    assert told == {"me": 0.0, "late": 0.5}
    assert paid(world.budget, world.store.person("late")) == [0.5]


def unknown(_: DeclaredQuery) -> int:
    raise AccountingError("Nobody knows.")


@pytest.mark.parametrize("rounds", [unknown, lambda _: 0, lambda _: -1])
def test_refuses_what_would_be_asked_nobody_knows_how_often(
    world: World, rounds: Callable[[DeclaredQuery], int]
) -> None:
    asked = world.study()
    world.ports = replace(world.ports, rounds=rounds)
    with pytest.raises(RefusedError) as caught:
        world.admit(world.request(asked), asked)
    assert caught.value.rule == "cost"
    assert world.budget.spends(world.store.person("me")) == ()
