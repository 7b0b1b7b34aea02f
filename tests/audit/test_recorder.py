"""Recording: persons are sealed first, nothing is written half, parts and streams, key events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from audit.entry import join_parts, parse_entry
from audit.errors import LogUnavailableError, MalformedEntryError
from audit.recorder import (
    ACTOR_FIELD,
    CLIENT_FIELD,
    PATIENT_FIELD,
    End,
    KeyEventLog,
    Who,
    clock_step_entry,
    repair_entry,
)
from keys.errors import PersonErasedError, VaultUnavailableError
from keys.ports import KeyEvent
from tests.audit.records import (
    LocalSealer,
    MemoryLog,
    Ticker,
    make_act,
    make_async_recorder,
    make_recorder,
)


def test_an_exchange_says_who_did_what_with_persons_sealed() -> None:
    log, sealer = MemoryLog(), LocalSealer()
    recorder = make_recorder(log, sealer)
    begun = recorder.intent(make_act())
    index = recorder.outcome(
        begun,
        End(
            outcome="success",
            status=200,
            resources=("Patient/eve", "Condition/c1"),
            labels=("ETH",),
            counts={"resources": 2},
            bytes_out=10,
            duration_us=99,
        ),
    )
    intent, outcome = (parse_entry(raw) for raw in log.held)
    assert (begun.index, index) == (0, 1)
    assert (intent.stage, outcome.stage) == ("intent", "outcome")
    assert intent.request == outcome.request == begun.request
    assert outcome.labels == ("R", "PSY", "ETH")
    assert [(r.type, r.id) for r in outcome.resources] == [
        ("Observation", "obs-1"),
        ("Patient", None),
        ("Condition", "c1"),
    ]
    opened = [
        sealer.open_for_person(tenant="clinic-1", field=PATIENT_FIELD, text=text)
        for text in outcome.patients
    ]
    assert opened == [b"Patient/bob", b"Patient/eve"]
    assert outcome.actor.sealed is not None
    assert outcome.client is not None
    assert (
        sealer.open_for_person(tenant="clinic-1", field=ACTOR_FIELD, text=outcome.actor.sealed)
        == b"Practitioner/ada"
    )
    assert (
        sealer.open_for_person(tenant="clinic-1", field=CLIENT_FIELD, text=outcome.client)
        == b"192.0.2.7"
    )


def test_no_byte_of_the_log_names_a_person() -> None:
    log = MemoryLog()
    recorder = make_recorder(log, LocalSealer())
    act = make_act(resources=("Patient/bob", "RelatedPerson/mum", "Observation/o1"))
    begun = recorder.intent(act)
    recorder.outcome(begun, End(outcome="success", resources=("Person/kim",)))
    written = b"".join(log.held)
    for name in (b"ada", b"bob", b"mum", b"kim", b"192.0.2.7"):
        assert name not in written


def test_what_is_in_clear_does_not_show_in_repr() -> None:
    begun = make_recorder(MemoryLog(), LocalSealer()).intent(make_act())
    shown = repr(begun) + repr(make_act()) + repr(End(outcome="success", patients=("Patient/x",)))
    for name in ("ada", "bob", "192.0.2.7", "Patient/x"):
        assert name not in shown


def test_later_stages_need_no_key_for_names_already_sealed() -> None:
    log, sealer = MemoryLog(), LocalSealer()
    recorder = make_recorder(log, sealer)
    begun = recorder.intent(make_act())
    calls = sealer.calls
    sealer.fail = VaultUnavailableError("down")
    recorder.outcome(begun, End(outcome="failed", status=503))
    assert sealer.calls == calls
    with pytest.raises(VaultUnavailableError):
        recorder.outcome(begun, End(outcome="success", patients=("Patient/new",)))
    assert len(log.held) == 2


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_nothing_is_appended_when_a_name_cannot_be_sealed(failing: int) -> None:
    class FailingLate(LocalSealer):
        def seal_for_person(self, **given: Any) -> str:
            if self.calls + 1 == failing:
                raise VaultUnavailableError("down")
            return super().seal_for_person(**given)

    log = MemoryLog()
    recorder = make_recorder(log, FailingLate())
    with pytest.raises(VaultUnavailableError):
        recorder.intent(make_act())
    with pytest.raises(VaultUnavailableError):
        asyncio.run(make_async_recorder(log, FailingLate()).intent(make_act()))
    assert log.held == []


def test_a_refused_append_raises_in_every_stage() -> None:
    log = MemoryLog()
    recorder = make_recorder(log, LocalSealer())
    begun = recorder.intent(make_act())
    log.fail = LogUnavailableError("full")
    end = End(outcome="success")
    calls: list[Callable[[], object]] = [
        lambda: recorder.intent(make_act()),
        lambda: recorder.opened(make_act()),
        lambda: recorder.outcome(begun, end),
        lambda: recorder.message(begun, make_act(), sequence=1),
        lambda: recorder.closed(begun, end, sequence=1),
    ]
    for call in calls:
        with pytest.raises(LogUnavailableError):
            call()
    waiting = make_async_recorder(log, LocalSealer())
    waits: list[Callable[[], Awaitable[object]]] = [
        lambda: waiting.intent(make_act()),
        lambda: waiting.opened(make_act()),
        lambda: waiting.outcome(begun, end),
        lambda: waiting.message(begun, make_act(), sequence=1),
        lambda: waiting.closed(begun, end, sequence=1),
    ]

    async def run(wait: Callable[[], Awaitable[object]]) -> None:
        await wait()

    for wait in waits:
        with pytest.raises(LogUnavailableError):
            asyncio.run(run(wait))
    assert len(log.held) == 1


def test_parts_of_which_one_was_refused_do_not_make_an_outcome() -> None:
    log = MemoryLog()
    recorder = make_recorder(log, LocalSealer())
    begun = recorder.intent(make_act())
    many = tuple(f"Patient/p{n}" for n in range(3000))
    log.fail, log.fail_at = LogUnavailableError("full"), 2
    with pytest.raises(LogUnavailableError):
        recorder.outcome(begun, End(outcome="success", patients=many))
    written = [parse_entry(raw) for raw in log.held[1:]]
    assert len(written) == 2
    with pytest.raises(MalformedEntryError):
        join_parts(written)
    log.fail = None
    first = recorder.outcome(begun, End(outcome="success", patients=many))
    assert len(join_parts([parse_entry(raw) for raw in log.held[first:]]).patients) == 3001


async def test_async_and_blocking_write_the_same() -> None:
    one, two = MemoryLog(), MemoryLog()
    begun = make_recorder(one, LocalSealer()).intent(make_act())
    recorder = make_async_recorder(two, LocalSealer())
    begun_async = await recorder.intent(make_act())
    await recorder.outcome(begun_async, End(outcome="success"))
    entry, twin = parse_entry(one.held[0]), parse_entry(two.held[0])
    assert begun.request == begun_async.request
    assert (entry.stage, entry.time, entry.labels) == (twin.stage, twin.time, twin.labels)


def test_a_stream_is_opened_numbered_and_closed() -> None:
    log = MemoryLog()
    recorder = make_recorder(log, LocalSealer())
    begun = recorder.opened(make_act(action="connect"))
    for number in (1, 2):
        recorder.message(begun, make_act(bytes_in=number), sequence=number)
    recorder.closed(begun, End(outcome="aborted", reason="session-revoked"), sequence=2)
    entries = [parse_entry(raw) for raw in log.held]
    assert [(e.stage, e.sequence) for e in entries] == [
        ("opened", None),
        ("message", 1),
        ("message", 2),
        ("closed", 2),
    ]
    assert {e.request for e in entries} == {begun.request}


def test_an_erased_person_can_still_be_recorded_under_a_new_key() -> None:
    log, sealer = MemoryLog(), LocalSealer()
    recorder = make_recorder(log, sealer)
    begun = recorder.intent(make_act())
    sealer.erase(tenant="clinic-1", person="Practitioner/ada")
    sealer.erase(tenant="clinic-1", person="Patient/bob")
    recorder.outcome(begun, End(outcome="success"))
    recorder.intent(make_act())
    before, _, after = (parse_entry(raw).actor.sealed for raw in log.held)
    assert before is not None
    assert after is not None
    with pytest.raises(PersonErasedError):
        sealer.open_for_person(tenant="clinic-1", field=ACTOR_FIELD, text=before)
    opened = sealer.open_for_person(tenant="clinic-1", field=ACTOR_FIELD, text=after)
    assert opened == b"Practitioner/ada"


@pytest.mark.parametrize(
    ("who", "expected"),
    [
        (Who(kind="anonymous", address="::FFFF:192.0.2.1"), "192.0.2.1"),
        (Who(kind="anonymous", address="2001:DB8::1"), "2001:db8::1"),
        (Who(kind="service", name="ehr-sync", address="fe80::1%eth0"), "fe80::1"),
        (Who(kind="system", name="havengate"), None),
    ],
)
def test_addresses_of_others_than_persons_stay_in_clear(who: Who, expected: str | None) -> None:
    log = MemoryLog()
    make_recorder(log, LocalSealer()).intent(make_act(who=who))
    assert parse_entry(log.held[0]).client == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"who": Who(kind="person")},
        {"who": Who(kind="service", person="Practitioner/ada")},
        {"who": Who(kind="person", person="a", address="not an address")},
        {"resources": ("Observation/a?b=c",)},
        {"resources": ("Observation/a/b",)},
        {"reason": "free text here"},
    ],
)
def test_a_malformed_act_is_refused_before_anything_is_written(changes: dict[str, Any]) -> None:
    log = MemoryLog()
    with pytest.raises(MalformedEntryError):
        make_recorder(log, LocalSealer()).intent(make_act(**changes))
    assert log.held == []


def event(**changes: Any) -> KeyEvent:
    values: dict[str, Any] = {
        "action": "keys.person.erase",
        "stage": "intent",
        "request_id": "erase-1",
        "tenant": "clinic-1",
        "actor": "officer@clinic.example",
        "key_ids": ("AAAAAAAAAAAA", "-A_AAAAAAAAA"),
        "detail": {"proof": "keys.person_erased", "keys": 2},
    }
    return KeyEvent(**values | changes)


def test_key_events_are_entries_with_their_actor_sealed() -> None:
    log, sealer = MemoryLog(), LocalSealer()
    recorder = KeyEventLog(log, sealer=sealer, clock=Ticker(), tenant="clinic-1")
    assert recorder.record(event()) == 0
    assert recorder.record(event(stage="outcome", succeeded=True)) == 1
    assert recorder.record(event(stage="outcome", succeeded=False, actor="havengate")) == 2
    intent, outcome, failed = (parse_entry(raw) for raw in log.held)
    assert (intent.details, intent.counts) == ({"proof": "keys.person_erased"}, {"keys": 2})
    assert intent.key_ids == ("AAAAAAAAAAAA", "-A_AAAAAAAAA")
    assert (outcome.outcome, failed.outcome) == ("success", "failed")
    assert failed.actor.name == "havengate"
    assert b"officer" not in b"".join(log.held)
    assert intent.actor.sealed is not None
    opened = sealer.open_for_person(tenant="clinic-1", field=ACTOR_FIELD, text=intent.actor.sealed)
    assert opened == b"officer@clinic.example"


def test_what_concerns_the_keys_of_all_tenants_is_recorded_for_the_one_whose_staff_did_it() -> None:
    log = MemoryLog()
    recorder = KeyEventLog(log, sealer=LocalSealer(), clock=Ticker(), tenant="clinic-1")
    recorder.record(event(action="keys.epoch.roll", tenant="", key_ids=(), detail={"epoch": 2}))
    assert parse_entry(log.held[0]).tenant == "clinic-1"


def test_a_crash_that_was_mended_is_an_entry() -> None:
    entry = parse_entry(repair_entry(cut_bytes=17, time_s=1_000_000.0))
    assert (entry.stage, entry.action, entry.counts) == ("log", "log.repair", {"cut_bytes": 17})


def test_key_events_that_cannot_be_written_raise() -> None:
    log, sealer = MemoryLog(), LocalSealer()
    recorder = KeyEventLog(log, sealer=sealer, clock=Ticker(), tenant="clinic-1")
    with pytest.raises(MalformedEntryError):
        recorder.record(event(detail={"note": "says who and why"}))
    sealer.fail = VaultUnavailableError("down")
    with pytest.raises(VaultUnavailableError):
        recorder.record(event())
    sealer.fail = None
    log.fail = LogUnavailableError("full")
    with pytest.raises(LogUnavailableError):
        recorder.record(event())
    assert log.held == []


def test_a_step_of_the_clock_is_an_entry() -> None:
    entry = parse_entry(clock_step_entry(1_000_010.0, 1_000_000.0))
    assert (entry.stage, entry.action) == ("log", "log.clock")
    assert entry.counts == {"stepped_back_us": 10_000_000}
    assert entry.time == 1_000_000_000_000


def test_an_act_is_not_changed_by_recording_it() -> None:
    act = make_act()
    copy = replace(act)
    make_recorder(MemoryLog(), LocalSealer()).intent(act)
    assert act == copy


@pytest.mark.parametrize("other", [{"tenant": "clinic-2"}, {"person": "Practitioner/eve"}])
def test_what_was_sealed_for_one_person_or_tenant_is_not_used_for_another(
    other: dict[str, str],
) -> None:
    """A message of a stream may come from somebody else behind the same address."""
    log, sealer = MemoryLog(), LocalSealer()
    recorder = make_recorder(log, sealer)
    begun = recorder.opened(make_act())
    act = make_act()
    if "tenant" in other:
        act = replace(act, tenant=other["tenant"])
    else:
        act = replace(act, who=replace(act.who, person=other["person"]))
    recorder.message(begun, act, sequence=1)
    sealer.erase(tenant="clinic-1", person="Practitioner/ada")
    sealer.erase(tenant="clinic-1", person="Patient/bob")
    message = parse_entry(log.held[1])
    assert message.client is not None
    opened = sealer.open_for_person(tenant=message.tenant, field=CLIENT_FIELD, text=message.client)
    assert opened == b"192.0.2.7"
