from __future__ import annotations

import base64
import dataclasses
import json
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from federated.errors import AccountingError, ProtocolError, RefusedError, StoreError
from federated.manifest import DeclaredQuery, Study, canonical_json
from federated.model import PrivacyCost
from federated.node.budget import Cap
from federated.node.consent import Scope
from federated.node.contact import ContactRequest, parse_request
from federated.node.enrolment import enrol, enrolled, remembered
from federated.node.guard import GuardPorts
from federated.node.keeper import FileKeeper
from federated.node.receipts import Receipts
from federated.node.store import ImportRecord, erase_at
from federated.signed_study import SignedStudy, sign_study
from federated.study_log import make_bundle
from tests.federated.node.tables import fill
from tests.federated.node.world import ROSTER, SpiedStore, World, price
from tests.federated.studies import ORIGIN, MemorySigner, StudyLog

RECORD = ImportRecord(at=0, format="t", content="", people=0, readings=0, bad=0)


def assert_refuses(
    world: World,
    rule: str,
    request: ContactRequest | bytes,
    of: Study,
    *,
    configuration: object = None,
    receipt: bool = True,
) -> RefusedError:
    """Refused by this rule, no row read, nothing spent on anybody, and a receipt that says so."""
    people = world.store.people()
    before = [world.budget.spends(person) for person in people]
    with pytest.raises(RefusedError) as caught:
        world.admit(request, of, configuration)
    assert caught.value.rule == rule
    assert world.store.reads == 0
    assert [world.budget.spends(person) for person in people] == before
    if receipt:
        last = world.receipts()[-1]
        assert (last.outcome, last.told.rule) == ("refused", rule)
        assert "nothing of yours was read" in last.words()
    return caught.value


def test_lets_in_what_is_in_order_and_reads_only_what_was_asked(world: World) -> None:
    asked = world.study()
    admission = world.admit(world.request(asked), asked)
    assert world.store.reads == 0
    (spend,) = world.budget.spends(world.store.person("me"))
    assert spend.state == "reserved"
    ((person, rows),) = world.guard.rows(admission, now=world.now)
    assert person.name == "me"
    assert set(rows.values) == {"sleep_hours"}
    (spend,) = world.budget.spends(person)
    assert spend.cost is not None
    assert (spend.state, spend.cost.epsilon) == ("spent", 0.5)
    (receipt,) = world.receipts()
    words = receipt.words()
    for expected in (
        "Sleep and mood",
        "How does mood differ",
        "time asleep",
        "0.5",
        "3.5 are left",
    ):
        assert expected in words


def test_lets_in_what_came_as_bytes(world: World) -> None:
    asked = world.study()
    request = world.request(asked)
    assert parse_request(request.encode()) == request
    world.admit(request.encode(), asked)


def test_spends_before_the_first_row_is_read(world: World) -> None:
    asked = world.study()
    admission = world.admit(world.request(asked), asked)
    states: list[str] = []
    original = SpiedStore.rows

    def look(self: SpiedStore, *args: object) -> object:
        states.extend(one.state for one in world.budget.spends(self.person("me")))
        states.append(str(self.database._depth))
        return original(self, *args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpiedStore, "rows", look)
        list(world.guard.rows(admission, now=world.now))
    # Durable by then: no transaction is open.
    assert states == ["spent", "0"]


# --- Each rule alone refuses ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 10, 1_000_000, 30_000_000])
def test_refuses_bytes_that_are_no_request(world: World, size: int) -> None:
    assert_refuses(world, "manifest", b"\xc1" * size, world.study())


def test_refuses_a_manifest_that_is_malformed(world: World) -> None:
    asked = world.study()
    request = world.request(asked)
    assert_refuses(world, "manifest", replace(request, study=request.study[:-1]), asked)
    assert_refuses(world, "manifest", replace(request, query="\x1b[2J"), asked)
    assert_refuses(world, "manifest", replace(request, query="weight"), asked)
    assert_refuses(world, "manifest", replace(request, round_number=-1), asked)


def without(signed: SignedStudy, role: str, site: str = "") -> SignedStudy:
    left = [one for one in signed.signatures if (one.role, one.site) != (role, site)]
    assert len(left) == len(signed.signatures) - 1
    return replace(signed, signatures=tuple(left))


@pytest.mark.parametrize(
    ("role", "site"), [("coordinator", ""), ("ethics-board", ""), ("site", "south")]
)
def test_refuses_without_each_signature(world: World, role: str, site: str) -> None:
    asked = world.study()
    signed = without(world.parties.sign(asked), role, site)
    assert_refuses(world, "signatures", world.request(asked, signed=signed), asked)


def test_refuses_signatures_by_keys_that_were_not_enrolled(world: World) -> None:
    asked = world.study()
    signed = without(world.parties.sign(asked), "ethics-board")
    stranger = sign_study(asked, MemorySigner(), role="ethics-board")
    signed = replace(signed, signatures=(*signed.signatures, stranger))
    assert_refuses(world, "signatures", world.request(asked, signed=signed), asked)


def test_refuses_a_study_that_was_changed_after_it_was_signed(world: World) -> None:
    asked = world.study()
    changed = world.study({"minimum_cohort = 10": "minimum_cohort = 9"})
    signed = SignedStudy(study=changed, signatures=world.parties.sign(asked).signatures)
    index = world.publish(changed)
    assert_refuses(world, "signatures", world.request(changed, signed=signed, index=index), changed)


def test_refuses_on_a_node_that_is_not_enrolled(world: World) -> None:
    asked = world.study()
    request = world.request(asked)
    with world.store.database.transaction():
        world.store.database.run("DELETE FROM meta WHERE name = 'enrolment'")
    assert_refuses(world, "signatures", request, asked)


def test_refuses_a_study_that_was_not_published(world: World) -> None:
    asked = world.study()
    other = world.study({"Sleep and mood": "Another title"})
    request = world.request(asked, index=world.publish(other))
    assert_refuses(world, "study_log", request, asked)
    only_proposed = world.log.append_published(asked, action="study.propose")
    assert_refuses(world, "study_log", world.request(asked, index=only_proposed), asked)


def test_refuses_a_log_that_no_trusted_witness_cosigned(world: World, tmp_path: Path) -> None:
    asked = world.study()
    request = world.request(asked)
    other = StudyLog(tmp_path / "elsewhere")
    keys = tuple(key.text for key in other.witness_keys)
    enrol(world.store, world.enrolment(witness_keys=keys))
    assert_refuses(world, "study_log", request, asked)


def test_refuses_a_log_that_was_rolled_back(world: World, tmp_path: Path) -> None:
    """The same log key, the same witness key, but a history that is not the one seen."""
    asked = world.study()
    world.log.append_published(world.study({"Sleep and mood": "Earlier"}), others=5)
    world.admit(world.request(asked), asked)
    seen = remembered(world.store, ORIGIN).size
    assert seen > 0
    forged = StudyLog(tmp_path / "forged")
    forged.signer = world.log.signer
    index = forged.append_published(asked, others=seen + 3)
    both = tuple(key.text for key in (*world.log.witness_keys, *forged.witness_keys))
    enrol(world.store, world.enrolment(witness_keys=both))
    proof = make_bundle(forged.directory, index, from_size=seen).encode()
    request = world.request(asked, index=seen - 1, proof=proof, run="run-2")
    world.store.reads = 0
    assert_refuses(world, "study_log", request, asked)
    assert remembered(world.store, ORIGIN).size == seen


def test_refuses_an_older_checkpoint_than_the_one_seen(world: World) -> None:
    asked = world.study()
    old = world.request(asked)
    newer = world.study({"Sleep and mood": "Later"})
    world.admit(world.request(newer), newer)
    assert_refuses(world, "study_log", replace(old, run="run-2"), asked)


def test_remembers_the_newest_checkpoint_even_when_it_refuses(world: World) -> None:
    asked = world.study({"cd" * 32: "ce" * 32})
    assert_refuses(world, "code", world.request(asked), asked)
    assert remembered(world.store, ORIGIN).size == 2


def test_refuses_another_version_of_the_program(world: World) -> None:
    asked = world.study()
    world.ports = replace(world.ports, code_hash="ce" * 32)
    assert_refuses(world, "code", world.request(asked), asked)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: {**c, "more": 1},
        lambda c: {k: v for k, v in c.items() if k != "rounds-timeout"},
        lambda c: {**c, "rounds-timeout": 31},
        lambda c: {**c, "rounds-timeout": 30.0},
        lambda c: {**c, "study-hash": "00" * 32},
    ],
)
def test_refuses_a_changed_run_configuration(
    world: World, change: Callable[[dict[str, object]], dict[str, object]]
) -> None:
    asked = world.study()
    changed = change(dict(asked.run_configuration()))
    request = world.request(asked)
    assert_refuses(world, "run_configuration", request, asked, configuration=changed)


def test_refuses_a_roster_that_was_not_approved(world: World) -> None:
    asked = world.study()
    request = world.request(asked)
    invented = {**ROSTER, "node-99": bytes(32)}
    swapped = {**ROSTER, "node-1": bytes(32)}
    for roster in (invented, swapped):
        assert_refuses(world, "roster", replace(request, roster=roster), asked)
        request = replace(request, proof=world.request(asked, index=world.last).proof)
    assert_refuses(world, "roster", replace(request, sites={"node-1": "north"}), asked)
    request = replace(request, proof=world.request(asked, index=world.last).proof)
    everybody = dict.fromkeys(ROSTER, 1)
    for taking_part in ({**everybody, "node-99": 1}, {n: 1 for n in ROSTER if n != "node-3"}):
        request = replace(request, proof=world.request(asked, index=world.last).proof)
        assert_refuses(world, "roster", replace(request, taking_part=taking_part), asked)


def test_refuses_to_show_single_answers_unless_the_node_allows_it(world: World) -> None:
    asked = world.study(
        {"minimum_cohort = 10": 'minimum_cohort = 10\ntrust_model = "trusted_server"'}
    )
    assert asked.trust_model == "trusted_server"
    assert_refuses(world, "trust_model", world.request(asked), asked)
    enrol(world.store, world.enrolment(allow_trusted_server=True))
    admission = world.admit(world.request(asked, index=world.last), asked)
    list(world.guard.rows(admission, now=world.now))
    assert "can see it" in world.receipts()[-1].words()


@pytest.mark.parametrize("now", [1_799_989_999, 1_800_990_000, 0])
def test_refuses_outside_of_the_time_that_was_approved(world: World, now: int) -> None:
    asked = world.study()
    request = world.request(asked)
    world.now = now
    assert_refuses(world, "expired", request, asked, receipt=now > 0)


def test_refuses_a_column_that_is_not_in_the_table(world: World) -> None:
    asked = world.study({'["sleep_hours"]': '["diary_text"]'})
    assert_refuses(world, "columns", world.request(asked), asked)


def test_refuses_while_paused_and_after_leaving(world: World) -> None:
    asked = world.study()
    me = world.store.person("me")
    world.store.set_state(me, "paused", now=world.now)
    assert_refuses(world, "paused", world.request(asked), asked)
    world.store.set_state(me, "left", now=world.now)
    assert_refuses(world, "left", world.request(asked, index=world.last), asked)
    world.store.set_state(me, "taking_part", now=world.now)
    world.admit(world.request(asked, index=world.last), asked)


def test_refuses_after_withdrawing_and_what_was_spent_stays_spent(world: World) -> None:
    asked = world.study()
    list(world.guard.rows(world.admit(world.request(asked), asked), now=world.now))
    world.store.reads = 0
    me = world.store.person("me")
    world.store.withdraw(me, asked.id, now=world.now)
    request = world.request(asked, index=world.last, query="mood", round_number=1)
    assert_refuses(world, "withdrawn", request, asked)
    assert world.budget.spent(me, asked.id) == 0.5
    # Another study is another matter.
    other = world.study({'"sleep-and-mood"': '"sleep-again"'})
    world.admit(world.request(other), other)


def test_refuses_without_any_consent(world: World) -> None:
    asked = world.study()
    assert world.consents.revoke(world.store.person("me"), now=world.now) == 1
    assert_refuses(world, "consent", world.request(asked), asked)


@pytest.mark.parametrize(
    "narrower",
    [
        {"kinds": frozenset({"histogram"})},
        {"columns": frozenset({"mood"})},
        {"purposes": frozenset({"TREAT"})},
    ],
)
def test_refuses_unless_question_data_and_purpose_are_all_covered(
    world: World, narrower: dict[str, frozenset[str]]
) -> None:
    asked = world.study()
    me = world.store.person("me")
    world.consents.revoke(me, now=world.now)
    scope = Scope(
        kinds=frozenset({"mean"}),
        columns=frozenset({"sleep_hours"}),
        purposes=frozenset({"HRESCH"}),
    )
    world.consent(dataclasses.replace(scope, **narrower))  # type: ignore[arg-type]
    assert_refuses(world, "consent", world.request(asked), asked)
    world.consent(scope)
    world.admit(world.request(asked, index=world.last), asked)


def test_two_narrow_consents_do_not_add_up_to_a_wide_one(world: World) -> None:
    asked = world.study()
    world.consents.revoke(world.store.person("me"), now=world.now)
    for name in ("mood", "sleep_hours"):
        world.consent(
            Scope(
                kinds=frozenset({"mean"}), columns=frozenset({name}), purposes=frozenset({"HRESCH"})
            )
        )
    assert_refuses(world, "consent", world.request(asked, query="mood"), asked)


def test_a_consent_to_a_study_holds_for_its_hash_alone(world: World) -> None:
    asked = world.study()
    changed = world.study({"Sleep and mood": "Sleep and moods"})
    world.consents.revoke(world.store.person("me"), now=world.now)
    world.consent(
        Scope(
            study=asked.study_hash,
            columns=frozenset(asked.columns),
            purposes=frozenset({"HRESCH"}),
        )
    )
    assert_refuses(world, "consent", world.request(changed), changed)
    world.admit(world.request(asked), asked)


def test_consent_that_is_taken_back_during_a_round_counts_at_once(world: World) -> None:
    asked = world.study()
    admission = world.admit(world.request(asked), asked)
    me = world.store.person("me")
    world.consents.revoke(me, now=world.now)
    assert list(world.guard.rows(admission, now=world.now)) == []
    assert world.store.reads == 0
    assert world.receipts()[-1].told.rule == "consent"
    # It was reserved, and what is reserved is never given back.
    assert world.budget.spent(me) == 0.5


def test_refuses_below_the_minimum_cohort(world: World) -> None:
    asked = world.study()
    nine = {f"node-{number}": 1 for number in range(9)}
    request = world.request(asked, taking_part=nine)
    assert_refuses(world, "cohort", request, asked)
    enrol(world.store, world.enrolment(minimum_cohort=100))
    assert_refuses(world, "cohort", world.request(asked, index=world.last), asked)


def test_refuses_fewer_nodes_than_promised_however_many_people_are_claimed(world: World) -> None:
    asked = world.study()
    two = {"node-3": 1, "node-4": 1_000_000}
    assert_refuses(world, "cohort", world.request(asked, taking_part=two), asked)


STANDING = Scope(
    kinds=frozenset({"mean"}),
    columns=frozenset({"mood", "sleep_hours"}),
    purposes=frozenset({"HRESCH"}),
)


def of_three(world: World, *, agreed: Sequence[str]) -> None:
    """A site of three people, of whom these agreed."""
    fill(world.store, {name: {"sleep_hours": [7.0], "mood": [1.0]} for name in ("you", "he")})
    for person in world.store.people():
        world.consents.revoke(person, now=world.now)
    people = [world.store.person(name) for name in agreed]
    world.consents.give(people, STANDING, now=world.now)


@pytest.mark.parametrize("claimed", [1, 2, 4, 40])
def test_refuses_a_cohort_that_counts_more_or_fewer_people_here_than_would_answer(
    world: World, claimed: int
) -> None:
    """Fewer: whether an answer comes would tell of rows. More: who hides nobody is counted."""
    asked = world.study()
    of_three(world, agreed=["me", "you", "he"])
    taking_part = {**dict.fromkeys(ROSTER, 1), "node-3": claimed}
    assert_refuses(world, "cohort", world.request(asked, taking_part=taking_part), asked)
    three = {**dict.fromkeys(ROSTER, 1), "node-3": 3}
    admission = world.admit(world.request(asked, taking_part=three, index=world.last), asked)
    assert len(admission.people) == 3


def test_counts_those_who_agreed_toward_the_cohort_and_nobody_else(world: World) -> None:
    asked = world.study()
    of_three(world, agreed=["me"])
    everybody = {**dict.fromkeys(ROSTER, 1), "node-3": 3}
    assert_refuses(world, "cohort", world.request(asked, taking_part=everybody), asked)
    one = dict.fromkeys(ROSTER, 1)
    admission = world.admit(world.request(asked, taking_part=one, index=world.last), asked)
    assert [person.name for person in admission.people] == ["me"]


def test_counts_those_who_can_pay_toward_the_cohort_and_nobody_else(world: World) -> None:
    before, asked = world.study({'"sleep-and-mood"': '"before"'}), world.study()
    world.budget.set_cap(Cap(epsilon=0.7, delta=1e-4))
    world.admit(world.request(before), before)
    of_three(world, agreed=["me", "you", "he"])
    everybody = {**dict.fromkeys(ROSTER, 1), "node-3": 3}
    request = world.request(asked, taking_part=everybody)
    with pytest.raises(RefusedError) as caught:
        world.admit(request, asked)
    assert caught.value.rule == "cohort"
    two = {**everybody, "node-3": 2}
    admission = world.admit(world.request(asked, taking_part=two, index=world.last), asked)
    assert [person.name for person in admission.people] == ["you", "he"]


def dearer(asked: Study, query: DeclaredQuery) -> PrivacyCost:
    return replace(price(asked, query), epsilon=query.epsilon * 1.01)


def other_noise(asked: Study, query: DeclaredQuery) -> PrivacyCost:
    return replace(price(asked, query), noise=replace(query.noise, scale=1.0))


def unbounded(asked: Study, query: DeclaredQuery) -> PrivacyCost:
    raise AccountingError("No bound is known.")


def free(asked: Study, query: DeclaredQuery) -> PrivacyCost:
    return replace(price(asked, query), epsilon=0.0)


def no_number(asked: Study, query: DeclaredQuery) -> PrivacyCost:
    return replace(price(asked, query), epsilon=math.nan)


def no_delta(asked: Study, query: DeclaredQuery) -> PrivacyCost:
    return replace(price(asked, query), delta=math.nan)


@pytest.mark.parametrize("pricing", [dearer, other_noise, unbounded, free, no_number, no_delta])
def test_refuses_what_costs_more_than_promised_or_nobody_knows_what(
    world: World, pricing: Callable[[Study, DeclaredQuery], PrivacyCost]
) -> None:
    asked = world.study()
    world.ports = GuardPorts(price=pricing, rounds=lambda _: 1, code_hash=world.ports.code_hash)
    assert_refuses(world, "cost", world.request(asked), asked)


def test_refuses_to_answer_the_same_round_twice(world: World) -> None:
    asked = world.study()
    world.admit(world.request(asked), asked)
    assert_refuses(world, "repeat", world.request(asked, index=world.last), asked)


def test_refuses_a_round_that_was_seen_here_for_whoever_came_since(world: World) -> None:
    """Two answers to one round, over two sets of people, would differ by who came in between."""
    asked = world.study()
    list(world.guard.rows(world.admit(world.request(asked), asked), now=world.now))
    world.store.reads = 0
    fill(world.store, {"new": {"sleep_hours": [7.0], "mood": [1.0]}})
    world.consents.give([world.store.person("new")], STANDING, now=world.now)
    for query in ("sleep", "mood"):
        for claimed in (1, 2):
            again = world.request(
                asked, index=world.last, query=query,
                taking_part={**dict.fromkeys(ROSTER, 1), "node-3": claimed},
            )  # fmt: skip
            assert_refuses(world, "repeat", again, asked)
    assert world.budget.spends(world.store.person("new")) == ()


def test_refuses_a_round_that_was_seen_here_after_everybody_of_it_was_erased(world: World) -> None:
    asked = world.study()
    world.admit(world.request(asked), asked)
    world.store.erase_person(world.store.person("me"))
    fill(world.store, {"new": {"sleep_hours": [7.0], "mood": [1.0]}})
    world.consent()
    with pytest.raises(RefusedError) as caught:
        world.admit(world.request(asked, index=world.last), asked)
    assert caught.value.rule == "repeat"


def test_refuses_more_answers_than_the_study_announced(world: World) -> None:
    asked = world.study({"epsilon = 1.0": "epsilon = 1.0\nrounds = 2"})
    for run in ("run-1", "run-2"):
        world.ports = replace(world.ports, price=cheap)
        world.admit(world.request(asked, run=run), asked)
    assert_refuses(world, "rounds", world.request(asked, index=world.last, run="run-3"), asked)


def cheap(asked: Study, query: DeclaredQuery) -> PrivacyCost:
    return replace(price(asked, query), epsilon=0.01)


def test_refuses_to_spend_more_on_a_study_than_it_promised(world: World) -> None:
    asked = world.study({"epsilon = 1.0": "epsilon = 1.0\nrounds = 9"})
    for run in ("run-1", "run-2"):
        world.admit(world.request(asked, run=run), asked)
    assert_refuses(
        world, "study_budget", world.request(asked, index=world.last, run="run-3"), asked
    )


def test_refuses_to_spend_more_than_the_persons_budget(world: World) -> None:
    asked = world.study()
    world.budget.set_cap(Cap(epsilon=0.7, delta=1e-4))
    world.admit(world.request(asked), asked)
    request = world.request(asked, index=world.last, query="mood", round_number=1)
    assert_refuses(world, "budget", request, asked)
    # Across studies as well.
    other = world.study({'"sleep-and-mood"': '"sleep-again"'})
    assert_refuses(world, "budget", world.request(other), other)


def test_a_delta_that_is_used_up_refuses_too(world: World) -> None:
    asked = world.study()
    world.budget.set_cap(Cap(epsilon=100.0, delta=6e-7))
    world.admit(world.request(asked), asked)
    request = world.request(asked, index=world.last, query="mood", round_number=1)
    assert_refuses(world, "budget", request, asked)


def test_refuses_everything_once_the_store_is_an_older_copy(
    world: World, keeper: FileKeeper
) -> None:
    asked = world.study()
    path = world.store.database.path
    copy = path.read_bytes()
    world.admit(world.request(asked), asked)
    path.write_bytes(copy)
    restored = SpiedStore.open(path, keeper)
    assert isinstance(restored, SpiedStore)
    world.store.close()
    world.store, world.budget = restored, type(world.budget)(restored, world.budget._accountant_at)
    assert_refuses(world, "ledger", world.request(asked, index=world.last, run="run-2"), asked)
    restored.close()


# --- Rows ----------------------------------------------------------------------------------------


def test_the_rows_of_an_admission_are_read_once(world: World) -> None:
    asked = world.study()
    admission = world.admit(world.request(asked), asked)
    assert len(list(world.guard.rows(admission, now=world.now))) == 1
    with pytest.raises(RefusedError) as caught:
        list(world.guard.rows(admission, now=world.now))
    assert caught.value.rule == "repeat"
    assert world.store.reads == 1


def test_two_readers_of_one_admission_get_the_rows_once(world: World) -> None:
    asked = world.study()
    admission = world.admit(world.request(asked), asked)
    got: list[int] = []

    def read() -> None:
        try:
            got.append(len(list(world.guard.rows(admission, now=world.now))))
        except RefusedError:
            got.append(0)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [0, 0, 0, 1]


def test_a_store_that_is_erased_while_it_is_open_answers_no_more(
    world: World, keeper: FileKeeper
) -> None:
    """The node's process still has the file and the keys in memory; the person erased the store."""
    asked = world.study()
    request = world.request(asked)
    admission = world.admit(request, asked)
    erase_at(world.store.database.path, keeper)
    with pytest.raises(StoreError, match="erased"):
        list(world.guard.rows(admission, now=world.now))
    with pytest.raises(StoreError, match="erased"):
        world.admit(replace(request, run="run-2"), asked)
    assert world.store.reads == 0


def test_a_store_that_is_erased_between_two_rows_gives_no_second(
    world: World, keeper: FileKeeper
) -> None:
    fill(world.store, {"other": {"sleep_hours": [6.0]}})
    world.consent()
    asked = world.study()
    rows = world.guard.rows(world.admit(world.request(asked), asked), now=world.now)
    next(rows)
    erase_at(world.store.database.path, keeper)
    with pytest.raises(StoreError):
        next(rows)


def test_each_person_of_a_site_is_judged_alone(world: World) -> None:
    asked = world.study()
    names = ["willing", "paused", "silent", "gone", "poor"]
    fill(world.store, {name: {"mood": [1.0], "sleep_hours": [6.0]} for name in names})
    world.store.erase_person(world.store.person("me"))
    people = {person.name: person for person in world.store.people()}
    standing = Scope(
        kinds=frozenset({"mean"}),
        columns=frozenset({"mood", "sleep_hours"}),
        purposes=frozenset({"HRESCH"}),
    )
    asked_people = [person for name, person in people.items() if name != "silent"]
    world.consents.give(asked_people, standing, now=world.now)
    world.store.set_state(people["paused"], "paused", now=world.now)
    world.store.withdraw(people["gone"], asked.id, now=world.now)
    world.budget.set_cap(Cap(epsilon=0.6, delta=1e-4))
    before = world.study({'"sleep-and-mood"': '"before"'})
    for name in names:
        if name != "poor" and people[name].name != "silent":
            world.store.set_state(people[name], "paused", now=world.now)
    one = dict.fromkeys(ROSTER, 1)
    world.admit(world.request(before, taking_part=one), before)
    world.store.set_state(people["willing"], "taking_part", now=world.now)
    world.store.set_state(people["gone"], "taking_part", now=world.now)
    admission = world.admit(world.request(asked, taking_part=one), asked)
    assert [person.name for person in admission.people] == ["willing"]
    read = [person.name for person, _ in world.guard.rows(admission, now=world.now)]
    assert read == ["willing"]
    rules = {name: world.receipts(name)[-1].told.rule for name in names}
    assert rules == {
        "willing": "",
        "paused": "paused",
        "silent": "consent",
        "gone": "withdrawn",
        "poor": "budget",
    }


def test_what_is_reserved_has_a_receipt_from_the_same_moment_on(world: World) -> None:
    """A crash right after leaves it: nobody is charged without being told."""
    asked = world.study()
    admission = world.admit(world.request(asked), asked)
    (receipt,) = world.receipts()
    assert (receipt.outcome, receipt.told.epsilon) == ("reserved", 0.5)
    assert "counts as spent" in receipt.words()
    list(world.guard.rows(admission, now=world.now))
    (receipt,) = world.receipts()
    assert (receipt.outcome, receipt.told.left) == ("allowed", 3.5)


def test_neither_a_reservation_nor_its_receipt_is_kept_without_the_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StoreError("The disk is full.")

    asked = world.study()
    request = world.request(asked)
    monkeypatch.setattr(Receipts, "reserve", fail)
    with pytest.raises(StoreError):
        world.admit(request, asked)
    assert world.budget.spends(world.store.person("me")) == ()
    assert world.receipts() == ()


def test_a_round_that_fails_after_rows_were_read_is_told_beside_what_it_read(world: World) -> None:
    asked = world.study()
    admission = world.admit(world.request(asked), asked)
    list(world.guard.rows(admission, now=world.now))
    world.guard.failed(admission, "Too few answered.", now=world.now)
    assert [one.outcome for one in world.receipts()] == ["allowed", "failed"]


def test_who_was_erased_during_a_round_gets_no_receipt_back(world: World) -> None:
    asked = world.study()
    admission = world.admit(world.request(asked), asked)
    world.store.erase_person(world.store.person("me"))
    world.guard.failed(admission, "Too few answered.", now=world.now)
    assert world.store.database.all("SELECT * FROM receipts") == []


def test_reads_nothing_once_the_time_of_the_study_is_over(world: World) -> None:
    asked = world.study()
    admission = world.admit(world.request(asked), asked)
    with pytest.raises(RefusedError) as caught:
        list(world.guard.rows(admission, now=asked.valid_until))
    assert caught.value.rule == "expired"
    assert world.store.reads == 0
    (receipt,) = world.receipts()
    assert (receipt.outcome, receipt.told.rule) == ("refused", "expired")
    assert "stays spent" in receipt.words()
    with pytest.raises(RefusedError):
        list(world.guard.rows(admission, now=world.now))


@pytest.mark.parametrize("error", [ProtocolError("No plan."), ZeroDivisionError("mood was 3.0")])
def test_reserves_nothing_for_a_round_that_cannot_begin(world: World, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    asked = world.study()
    with pytest.raises(RefusedError) as caught:
        world.guard.admit(
            world.request(asked), configuration=asked.run_configuration(), now=world.now,
            prepare=fail,
        )  # fmt: skip
    assert caught.value.rule == "plan"
    assert world.budget.spends(world.store.person("me")) == ()
    (receipt,) = world.receipts()
    assert (receipt.outcome, receipt.told.rule) == ("refused", "plan")
    assert "3.0" not in receipt.words()


def test_a_failed_round_leaves_a_receipt_that_says_it_stays_spent(world: World) -> None:
    asked = world.study()
    admission = world.admit(world.request(asked), asked)
    world.guard.failed(admission, "Too few answered.", now=world.now)
    receipt = world.receipts()[-1]
    assert receipt.outcome == "failed"
    assert "stays spent" in receipt.words()
    assert world.budget.spent(world.store.person("me")) == 0.5


def test_a_server_that_asks_for_ever_cannot_fill_the_disk(world: World) -> None:
    asked = world.study()
    for _ in range(30):
        with pytest.raises(RefusedError):
            world.admit(b"rubbish", asked)
    (receipt,) = world.receipts()
    assert receipt.times == 30
    assert "30 times" in receipt.words()


LURE = "call-555-1234-now"


def unknown_field(world: World, request: ContactRequest) -> ContactRequest:
    words = {**json.loads(world.study().canonical_bytes()), f"\x1b[2J{LURE}": 1}
    manifest = canonical_json(words).decode()
    hostile = json.dumps({"manifest": manifest, "signatures": []}).encode()
    return replace(request, study=hostile)


def unsigned_study(world: World, request: ContactRequest) -> ContactRequest:
    named = world.study({'"sleep-and-mood"': f'"{LURE}"'})
    return replace(request, study=without(world.parties.sign(named), "ethics-board").encode())


def unfitting_signature(world: World, request: ContactRequest) -> ContactRequest:
    named = world.study({'"sleep-and-mood"': f'"{LURE}"'})
    signatures = world.parties.sign(world.study()).signatures
    return replace(request, study=SignedStudy(study=named, signatures=signatures).encode())


def strange_proof(world: World, request: ContactRequest) -> ContactRequest:
    return replace(request, proof=json.dumps({LURE: 1}).encode())


def proof_of_another_log(world: World, request: ContactRequest) -> ContactRequest:
    raw = json.loads(request.proof)
    proof = base64.b64decode(raw["proof"]).replace(ORIGIN.encode(), LURE.encode())
    raw["proof"] = base64.b64encode(proof).decode()
    return replace(request, proof=json.dumps(raw).encode())


@pytest.mark.parametrize(
    "change",
    [unknown_field, unsigned_study, unfitting_signature, strange_proof, proof_of_another_log],
)
def test_no_word_that_nobody_signed_gets_into_a_receipt(
    world: World, change: Callable[[World, ContactRequest], ContactRequest]
) -> None:
    asked = world.study()
    request = change(world, world.request(asked))
    with pytest.raises(RefusedError):
        world.admit(request, asked)
    (receipt,) = world.receipts()
    assert LURE not in receipt.words()
    assert LURE not in str(receipt.plain())
    assert receipt.told.reason.isprintable()


def test_text_that_is_no_utf_8_is_refused_with_a_receipt(world: World) -> None:
    asked = world.study()
    request = world.request(asked)
    hostile = b'{"manifest":"\xff\xfe","signatures":[]}'
    assert_refuses(world, "manifest", replace(request, study=hostile), asked)
    assert_refuses(world, "study_log", replace(request, proof=b'{"\xff":1}'), asked)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_request_with_any_byte_changed_is_never_let_in_as_another(
    world: World, data: st.DataObject
) -> None:
    """Bytes of the study and of the proof: changed ones are refused, and nothing is read."""
    asked = world.study()
    request = getattr(world, "kept_request", None) or world.request(asked)
    world.kept_request = request  # type: ignore[attr-defined]
    part = data.draw(st.sampled_from(["study", "proof"]))
    content = bytearray(getattr(request, part))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RefusedError) as caught:
        world.admit(replace(request, **{part: bytes(content)}), asked)
    assert caught.value.rule in {"manifest", "signatures", "study_log", "run_configuration"}
    assert world.store.reads == 0


def test_the_enrolment_is_read_strictly(world: World) -> None:
    found = enrolled(world.store)
    assert found == world.enrolment()
    for change in (
        {"coordinator": ()},
        {"witness_keys": ()},
        {"witnesses": 0},
        {"coordinator": ("zz",)},
        {"log_keys": found.witness_keys},
    ):
        raw = msgspec.json.encode(world.enrolment(**change))
        enrol(world.store, msgspec.json.decode(raw, type=type(found)))
        asked = world.study()
        assert_refuses(world, "signatures", world.request(asked), asked)
