"""Search: exchanges once each, checked against the log, whatever the index says."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs

from audit import search as search_module
from audit.checkpoint import verifier_keys
from audit.criteria import Criteria
from audit.entry import encode_entry, encode_parts
from audit.errors import MalformedQueryError, VerificationError
from audit.index import AuditIndex
from audit.log import LogWriter
from audit.model import Actor
from audit.publish import Publisher
from audit.reader import LogReader
from audit.recorder import End
from audit.search import (
    ERASED,
    Exchange,
    Search,
    read_exchanges,
    reveal,
    verify_entries,
    with_persons,
)
from keys.errors import UnsealError
from tests.audit.conftest import MemorySigner
from tests.audit.records import (
    LocalSealer,
    MemoryLog,
    make_act,
    make_entry,
    make_recorder,
)

ORIGIN = "log.example/search"


@pytest.fixture
def index(tmp_path: Path) -> Iterator[AuditIndex]:
    with AuditIndex(f"sqlite:///{tmp_path}/index.sqlite3") as made:
        yield made


def filled(exchanges: int = 20) -> tuple[MemoryLog, LocalSealer]:
    """Of every four exchanges one is denied, one is about eve, one by carl; intents come first."""
    log, sealer = MemoryLog(), LocalSealer()
    recorder = make_recorder(log, sealer)
    for n in range(exchanges):
        who = make_act().who
        act = make_act(
            who=who if n % 4 != 1 else type(who)(kind="person", person="Practitioner/carl"),
            patients=("Patient/eve",) if n % 4 == 2 else ("Patient/bob",),
        )
        begun = recorder.intent(act)
        if n % 4 == 3:
            recorder.outcome(begun, End(outcome="denied", decision="deny", reason="no-consent"))
        else:
            recorder.outcome(begun, End(outcome="success", labels=("ETH",)))
    return log, sealer


def search(index: AuditIndex, log: MemoryLog) -> Search:
    index.refresh(log)
    return Search(index, log)


def test_an_exchange_is_found_once_with_intent_and_outcome(index: AuditIndex) -> None:
    log, _ = filled()
    page = search(index, log).page(Criteria())
    assert [e.log_index for e in page.exchanges] == list(range(39, 0, -2))
    for exchange in page.exchanges:
        assert [entry.stage for _, entry in exchange.entries] == ["intent", "outcome"]
        assert exchange.indices == (exchange.log_index - 1, exchange.log_index)
        assert exchange.ended


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 20, 50])
def test_pages_hold_every_exchange_once(index: AuditIndex, limit: int) -> None:
    log, _ = filled()
    asking = search(index, log)
    found: list[int] = []
    before: int | None = None
    while True:
        page = asking.page(Criteria(label="PSY"), limit=limit, before=before)
        assert len(page.exchanges) <= limit
        found += [exchange.log_index for exchange in page.exchanges]
        if page.before is None:
            break
        before = page.before
    assert found == list(range(39, 0, -2))


def test_an_exchange_without_outcome_is_shown_as_such(index: AuditIndex) -> None:
    log, sealer = filled(2)
    make_recorder(log, sealer).intent(make_act(action="delete"), request="dangling")
    (exchange,) = search(index, log).page(Criteria(action="delete")).exchanges
    assert not exchange.ended


def test_what_only_the_outcome_says_finds_the_whole_exchange(index: AuditIndex) -> None:
    log, _ = filled()
    page = search(index, log).page(Criteria(outcome="denied"))
    assert len(page.exchanges) == 5
    assert all(len(exchange.entries) == 2 for exchange in page.exchanges)
    assert len(search(index, log).page(Criteria(stage="intent")).exchanges) == 20


def test_parts_of_an_outcome_are_one(index: AuditIndex) -> None:
    log, sealer = MemoryLog(), LocalSealer()
    recorder = make_recorder(log, sealer)
    many = tuple(f"Patient/p{n}" for n in range(1500))
    recorder.outcome(recorder.intent(make_act()), End(outcome="success", patients=many))
    assert log.size() == 3
    (exchange,) = search(index, log).page(Criteria()).exchanges
    assert len(exchange.entries) == 2
    assert len(exchange.newest.patients) == 1501
    assert exchange.indices == tuple(range(log.size()))
    last = with_persons(Criteria(tenant="clinic-1"), sealer, actor=None, patient="Patient/p1499")
    assert len(search(index, log).page(last).exchanges) == 1


def test_persons_are_found_by_their_keys_until_they_are_erased(index: AuditIndex) -> None:
    log, sealer = filled()
    asking = search(index, log)

    def count(actor: str | None, patient: str | None, tenant: str = "clinic-1") -> int:
        asked = with_persons(Criteria(tenant=tenant), sealer, actor=actor, patient=patient)
        return len(asking.page(asked).exchanges)

    assert count("Practitioner/carl", None) == 5
    assert count(None, "Patient/eve") == 5
    assert count("Practitioner/ada", "Patient/eve") == 5
    assert count("Practitioner/carl", "Patient/eve") == 0
    assert count("Practitioner/nobody", None) == 0
    assert count("Practitioner/carl", None, tenant="clinic-2") == 0
    sealer.erase(tenant="clinic-1", person="Patient/eve")
    assert count(None, "Patient/eve") == 0
    with pytest.raises(MalformedQueryError):
        with_persons(Criteria(), sealer, actor="Practitioner/ada", patient=None)


def test_names_open_only_for_whoever_has_the_keys_and_erased_ones_are_said_to_be() -> None:
    log, sealer = filled(3)
    outcome = next(iter(list(read_exchanges(log.read()))[2:])).newest
    names = reveal(outcome, sealer)
    assert (names.actor, names.client) == ("Practitioner/ada", "192.0.2.7")
    assert names.patients == ("Patient/eve",)
    sealer.erase(tenant="clinic-1", person="Patient/eve")
    assert reveal(outcome, sealer).patients == (ERASED,)
    moved = structs.replace(outcome, tenant="clinic-2")
    with pytest.raises(UnsealError):
        reveal(moved, sealer)
    service = structs.replace(
        outcome, actor=Actor(kind="service", name="sync"), client="192.0.2.1", patients=()
    )
    assert reveal(service, sealer).actor == "sync"


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("audit_entries", "UPDATE audit_entries SET decision = 'deny' WHERE decision = 'allow'"),
        ("audit_entries", "UPDATE audit_entries SET log_index = log_index + 1000"),
        ("audit_labels", "UPDATE OR IGNORE audit_labels SET label = 'HIV'"),
        ("audit_patients", "UPDATE OR IGNORE audit_patients SET key_id = 'ZZZZZZZZZZZZ'"),
    ],
)
def test_an_altered_index_is_noticed_and_never_shown(
    index: AuditIndex, tmp_path: Path, table: str, change: str
) -> None:
    log, _ = filled()
    asking = search(index, log)
    with sqlite3.connect(tmp_path / "index.sqlite3") as connection:
        connection.execute(change)
    connection.close()
    asked = {
        "audit_entries": Criteria(decision="deny"),
        "audit_labels": Criteria(label="HIV"),
        "audit_patients": Criteria(patients=("ZZZZZZZZZZZZ",)),
    }[table]
    with pytest.raises(VerificationError, match="rebuild-index"):
        asking.page(asked)


def test_what_is_shown_is_proven_by_the_log(tmp_path: Path, index: AuditIndex) -> None:
    memory, _ = filled()
    directory, signer = tmp_path / "log", MemorySigner()
    with (
        LogWriter.open(directory, origin=ORIGIN) as writer,
        Publisher(writer, signer) as publisher,
    ):
        for raw in memory.held:
            writer.append(raw)
        publisher.publish()
        late = encode_entry(make_entry(request="late"))
        late_index = writer.append(late).index
    checkpoint = (directory / "checkpoint").read_bytes()
    keys = verifier_keys(ORIGIN, signer)
    reader = LogReader(directory)
    index.refresh(reader)
    page = Search(index, reader).page(Criteria(outcome="denied"))
    shown = {n: reader.entry(n) for e in page.exchanges for n in e.indices}
    assert verify_entries(directory, checkpoint, keys, shown).checkpoint.size == 40
    changed = shown | {next(iter(shown)): late}
    with pytest.raises(VerificationError):
        verify_entries(directory, checkpoint, keys, changed)
    with pytest.raises(VerificationError, match="not published"):
        verify_entries(directory, checkpoint, keys, {late_index: late})
    with pytest.raises(VerificationError):
        verify_entries(directory, checkpoint, verifier_keys(ORIGIN, MemorySigner()), shown)


def test_reading_through_pairs_what_interleaves_and_leaves_nothing_out() -> None:
    entries = [
        make_entry(request="a"),
        make_entry(request="b"),
        make_entry("opened", request="a", action="connect"),
        make_entry("message", request="a", sequence=1, action="connect"),
        make_entry("outcome", request="b"),
        make_entry("closed", request="a", action="connect"),
        make_entry("outcome", request="a"),
        make_entry("outcome", request="orphan"),
        make_entry(request="dangling"),
        make_entry("log", action="log.repair", actor=Actor(kind="system", name="havengate")),
    ]
    found = list(read_exchanges(enumerate(map(encode_entry, entries))))
    assert [exchange.indices for exchange in found] == [
        (3,),
        (1, 4),
        (2, 5),
        (0, 6),
        (7,),
        (9,),
        (8,),
    ]
    assert [exchange.ended for exchange in found] == [True] * 6 + [False]


def test_reading_through_holds_a_bounded_number_of_open_exchanges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search_module, "MAX_OPEN", 3)
    intents = [make_entry(request=f"r{n}") for n in range(10)]
    outcomes = [make_entry("outcome", request=f"r{n}") for n in range(10)]
    found: list[Exchange] = []
    reading = read_exchanges(enumerate(map(encode_entry, [*intents, *outcomes])))
    for exchange in reading:
        found.append(exchange)  # noqa: PERF402 - one at a time, as an export takes them
    assert sorted(n for exchange in found for n in exchange.indices) == list(range(20))


def test_parts_join_while_reading_through() -> None:
    entry = make_entry("outcome", patients=tuple(f"hg1.{n:012d}.{'d' * 99}" for n in range(1500)))
    raws = [encode_entry(make_entry()), *encode_parts(entry)]
    (exchange,) = read_exchanges(enumerate(raws))
    assert exchange.newest == entry
    cut = list(read_exchanges(enumerate(raws[:-1])))
    assert sum(len(e.newest.patients) for e in cut) < 1500
