"""What `audit` asks of a `PersonSealer`, held against the keyring and the sealer of the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from audit.criteria import Criteria, key_id
from audit.entry import parse_entry
from audit.ports import PersonSealer
from audit.recorder import ACTOR_FIELD, End, KeyEventLog, Recorder
from audit.search import ERASED, read_exchanges, reveal, with_persons
from keys.errors import KeysError, PersonErasedError, UnsealError
from keys.ports import KeyEvent
from tests.audit.records import LocalSealer, MemoryLog, Ticker, make_act
from tests.keys.workbench import workbench

if TYPE_CHECKING:
    from tests.keys.fakes import FakeRecorder

TENANT, PERSON, FIELD = "clinic-1", "Practitioner/ada", "audit.actor"


@dataclass
class Subject:
    sealer: PersonSealer
    erase: Callable[[str], object]
    log: MemoryLog


class LateRecorder:
    """Keys need a recorder, which needs the keyring to seal who did it."""

    target: KeyEventLog | None = None

    def record(self, event: KeyEvent) -> int:
        assert self.target is not None
        return self.target.record(event)


@pytest.fixture(params=["keyring", "local"])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    log = MemoryLog()
    if request.param == "local":
        local = LocalSealer()
        yield Subject(local, lambda person: local.erase(tenant=TENANT, person=person), log)
        return
    late = LateRecorder()
    with workbench(tmp_path / "keys.sqlite3", recorder=cast("FakeRecorder", late)) as bench:
        late.target = KeyEventLog(log, sealer=bench.keyring, clock=Ticker(), tenant=TENANT)

        def erase(person: str) -> object:
            return bench.eraser.erase(tenant=TENANT, person=person, actor=PERSON)

        yield Subject(bench.keyring, erase, log)


def seal(subject: Subject, person: str = PERSON) -> str:
    return subject.sealer.seal_for_person(
        tenant=TENANT, person=person, field=FIELD, plaintext=person.encode()
    )


def test_a_text_opens_without_knowing_whose_it_is(subject: Subject) -> None:
    text = seal(subject)
    opened = subject.sealer.open_for_person(tenant=TENANT, field=FIELD, text=text)
    assert opened == PERSON.encode()
    assert "ada" not in text


def test_a_text_opens_in_no_other_place(subject: Subject) -> None:
    text = seal(subject)
    for tenant, field in (("clinic-2", FIELD), (TENANT, "audit.patient")):
        with pytest.raises(UnsealError):
            subject.sealer.open_for_person(tenant=tenant, field=field, text=text)
    with pytest.raises(KeysError):
        subject.sealer.open_for_person(tenant=TENANT, field=FIELD, text=text[:-2] + "AA")


def test_a_text_carries_the_id_of_a_key_of_that_person_only(subject: Subject) -> None:
    ids = {person: key_id(seal(subject, person)) for person in (PERSON, "Patient/bob")}
    for person, found in ids.items():
        assert found in subject.sealer.key_ids(tenant=TENANT, person=person)
        assert found not in subject.sealer.key_ids(tenant="clinic-2", person=person)
    assert ids[PERSON] != ids["Patient/bob"]


def test_erasure_blinds_what_was_and_a_new_key_begins(subject: Subject) -> None:
    before = seal(subject, "Patient/bob")
    subject.erase("Patient/bob")
    with pytest.raises(PersonErasedError):
        subject.sealer.open_for_person(tenant=TENANT, field=FIELD, text=before)
    after = seal(subject, "Patient/bob")
    assert key_id(after) != key_id(before)
    assert subject.sealer.key_ids(tenant=TENANT, person="Patient/bob") == [key_id(after)]
    opened = subject.sealer.open_for_person(tenant=TENANT, field=FIELD, text=after)
    assert opened == b"Patient/bob"


def test_a_name_opens_to_the_person_and_begins_anew_after_an_erasure(subject: Subject) -> None:
    def name(person: str, field: str = FIELD) -> str:
        return subject.sealer.name_for_person(tenant=TENANT, person=person, field=field)

    before = [name("Patient/bob"), name("Patient/bob")]
    for text in before:
        opened = subject.sealer.open_for_person(tenant=TENANT, field=FIELD, text=text)
        assert opened == b"Patient/bob"
    assert name("Patient/bob", "audit.patient") not in before
    assert key_id(name(PERSON)) != key_id(before[0])
    subject.erase("Patient/bob")
    after = name("Patient/bob")
    assert key_id(after) != key_id(before[0])
    assert subject.sealer.open_for_person(tenant=TENANT, field=FIELD, text=after) == b"Patient/bob"


@pytest.mark.parametrize("erased", ["Patient/bob", PERSON])
def test_an_erased_person_is_blind_in_the_log_and_can_still_be_recorded(
    subject: Subject, erased: str
) -> None:
    numbers = iter(range(100))
    recorder = Recorder(
        subject.log, sealer=subject.sealer, clock=Ticker(), ids=lambda: f"r{next(numbers)}"
    )
    recorder.outcome(recorder.intent(make_act()), End(outcome="success"))
    open_at_erasure = recorder.intent(make_act())
    subject.erase(erased)
    recorder.outcome(open_at_erasure, End(outcome="success"))
    recorder.outcome(recorder.intent(make_act()), End(outcome="success"))
    names = [
        reveal(exchange.newest, subject.sealer)
        for exchange in read_exchanges(subject.log.read())
        if exchange.newest.action == "read"
    ]
    shown = [(n.actor if erased == PERSON else n.patients[0]) for n in names]
    assert shown == [ERASED, ERASED, erased]
    asked = with_persons(Criteria(tenant=TENANT), subject.sealer, actor=None, patient=erased)
    assert len(asked.patients or ()) == 1


def test_an_erasure_is_in_the_log_even_of_the_one_who_ordered_it(subject: Subject) -> None:
    if isinstance(subject.sealer, LocalSealer):
        return
    seal(subject)
    subject.erase(PERSON)
    intent, outcome = (parse_entry(raw) for raw in subject.log.held)
    assert (intent.action, intent.stage) == ("keys.person.erase", "intent")
    assert (outcome.stage, outcome.outcome) == ("outcome", "success")
    assert intent.request == outcome.request
    assert b"ada" not in b"".join(subject.log.held)
    with pytest.raises(PersonErasedError):
        subject.sealer.open_for_person(
            tenant=TENANT, field=ACTOR_FIELD, text=intent.actor.sealed or ""
        )
