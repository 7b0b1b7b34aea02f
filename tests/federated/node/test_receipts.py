from __future__ import annotations

from federated.node.receipts import MAX_REFUSALS, Receipt, Receipts, Told
from federated.node.store import Store
from tests.federated.node.tables import RECORD, fill


def told(number: int = 0) -> Told:
    return Told(study=f"study-{number}", rule="consent", reason="You did not agree.")


def test_refusals_that_differ_are_bounded_and_what_was_allowed_stays(store: Store) -> None:
    fill(store, {"me": {"mood": [1.0]}})
    me, receipts = store.person("me"), Receipts(store)
    with store.database.transaction():
        receipts.give([me], "allowed", Told(study="first", title="First"), now=RECORD.at)
        for number in range(MAX_REFUSALS + 50):
            receipts.give([me], "refused", told(number), now=RECORD.at + number)
    found = receipts.of(me)
    assert len(found) == MAX_REFUSALS + 1
    assert found[0].told.study == "first"
    assert found[-1].told.study == f"study-{MAX_REFUSALS + 49}"


def test_a_flood_of_refusals_by_one_rule_leaves_those_of_others_and_what_cost_something(
    store: Store,
) -> None:
    fill(store, {"me": {"mood": [1.0]}})
    me, receipts = store.person("me"), Receipts(store)
    paid = Told(study="paid", title="Paid", epsilon=0.5)
    refused = Told(study="late", rule="cohort", reason="Too late.", epsilon=0.5)
    with store.database.transaction():
        receipts.reserve([me], paid, now=RECORD.at)
        late = receipts.reserve([me], paid, now=RECORD.at)
        receipts.settle([(late[me.number], refused)], "refused", now=RECORD.at)
        receipts.give([me], "refused", told(), now=RECORD.at)
        for number in range(2 * MAX_REFUSALS):
            flood = Told(study="x", rule="cohort", reason=f"Too few people: {number}.")
            receipts.give([me], "refused", flood, now=RECORD.at + number)
    found = receipts.of(me)
    assert [one.outcome for one in found[:3]] == ["reserved", "refused", "refused"]
    assert [one.told.study for one in found[:3]] == ["paid", "late", "study-0"]
    assert len(found) == 3 + MAX_REFUSALS


def test_a_receipt_that_says_what_came_of_it_is_not_changed_again(store: Store) -> None:
    fill(store, {"me": {"mood": [1.0]}})
    me, receipts = store.person("me"), Receipts(store)
    paid = Told(study="paid", title="Paid", epsilon=0.5)
    number = receipts.reserve([me], paid, now=RECORD.at)[me.number]
    receipts.settle([(number, paid)], "refused", now=RECORD.at)
    receipts.settle([(number, paid)], "allowed", now=RECORD.at)
    receipts.fail([number], paid, now=RECORD.at)
    assert [one.outcome for one in receipts.of(me)] == ["refused"]


def test_the_same_refusal_on_another_day_is_told_again(store: Store) -> None:
    fill(store, {"me": {"mood": [1.0]}})
    me, receipts = store.person("me"), Receipts(store)
    for at in (0, 10, 20, 100_000):
        receipts.give([me], "refused", told(), now=RECORD.at + at)
    assert [one.times for one in receipts.of(me)] == [3, 1]


def test_refusals_for_everybody_reach_those_who_were_there(store: Store) -> None:
    fill(store, {"early": {"mood": [1.0]}})
    receipts = Receipts(store)
    receipts.give_all("refused", told(), now=RECORD.at - 10)
    receipts.give_all("refused", told(1), now=RECORD.at + 10)
    assert [one.told.study for one in receipts.of(store.person("early"))] == ["study-1"]


def test_a_receipt_without_a_verified_study_repeats_no_word_of_it() -> None:
    refused = Told(rule="manifest", reason="No study.")
    words = Receipt(number=1, at=0, outcome="refused", told=refused).words()
    assert words.startswith("1970-01-01 00:00 UTC: Somebody asked")
    assert words.endswith("nothing of yours was read: No study.")


def test_a_flood_of_greetings_is_bounded_and_crowds_out_nothing(store: Store) -> None:
    fill(store, {"me": {"mood": [1.0]}})
    me, receipts = store.person("me"), Receipts(store)
    at = int(store.database.all("SELECT joined FROM people")[0][0])
    with store.database.transaction():
        receipts.give_all("refused", told(), now=at)
        for number in range(2 * MAX_REFUSALS):
            receipts.give_all("counted", Told(study=f"study-{number}"), now=at + number)
            receipts.give_all("counted", Told(study=f"study-{number}"), now=at + number)
    found = receipts.of(me)
    assert [one.outcome for one in found] == ["refused"] + ["counted"] * MAX_REFUSALS
    assert {one.times for one in found[1:]} == {2}
