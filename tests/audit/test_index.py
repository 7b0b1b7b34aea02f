"""The index: complete, incremental, safe against crashes and foreign logs, in both databases."""

from __future__ import annotations

import itertools
import random
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from sqlalchemy import create_engine, text

from audit import index as index_module
from audit.criteria import Criteria, code_words, key_id, parse_words
from audit.entry import encode_entry, parse_entry
from audit.errors import (
    AuditConfigurationError,
    IndexUnavailableError,
    MalformedEntryError,
    MalformedQueryError,
)
from audit.index import AuditIndex
from audit.index_store import Rows
from audit.model import Actor, Entry, Resource
from tests.audit.records import OTHER, SEALED, START_US, MemoryLog, make_entry
from tests.postgres import running_postgres


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_postgres(tmp_path_factory.mktemp("postgres")) as running:
        yield running


@pytest.fixture
def postgres_url(postgres: str) -> str:
    name = f"index_{next(_numbers)}"
    engine = create_engine(postgres, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return postgres.replace("/postgres?", f"/{name}?")


_numbers = itertools.count()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/index.sqlite3"
    found: str = request.getfixturevalue("postgres_url")
    return found


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/index.sqlite3"


def some_entry(n: int, choose: random.Random) -> Entry:
    stage = choose.choice(["intent", "outcome", "message", "log"])
    key = choose.choice("ABCD") * 12
    return make_entry(
        stage,  # type: ignore[arg-type] # one of the stages
        request=f"req-{choose.randrange(20)}",
        time=START_US + n * 1000,
        tenant=choose.choice(["clinic-1", "clinic-2"]),
        actor=Actor(kind="person", sealed=f"hg1.{key}.{'b' * 60}"),
        action=choose.choice(["read", "update", "export"]),
        service=choose.choice(["ehr", "forum", None]),
        decision=choose.choice(["allow", "deny", None]),
        outcome=choose.choice(["success", "denied"]) if stage == "outcome" else None,
        labels=tuple(choose.sample(["PSY", "ETH", "HIV"], choose.randrange(3))),
        rules=tuple(choose.sample(["part2-consent", "care.team"], choose.randrange(2))),
        patients=tuple(
            f"hg1.{k * 12}.{'c' * 60}" for k in choose.sample("WXYZ", choose.randrange(4))
        ),
        resources=(Resource(type="Observation", id=f"obs-{n % 7}"), Resource(type="Patient")),
        reason=choose.choice([None, "consent-missing"]),
    )


def some_log(size: int, seed: int = 1) -> MemoryLog:
    choose = random.Random(seed)
    return MemoryLog(held=[encode_entry(some_entry(n, choose)) for n in range(size)])


def answers(log: MemoryLog, asked: Criteria) -> list[int]:
    """What a search has to find, from the entries themselves."""
    return [n for n, raw in reversed(list(log.read())) if asked.matches(parse_entry(raw))]


ASKED = [
    Criteria(),
    Criteria(tenant="clinic-2"),
    Criteria(actors=("A" * 12,)),
    Criteria(actors=("A" * 12, "B" * 12), stage="outcome"),
    Criteria(actors=()),
    Criteria(patients=("W" * 12, "X" * 12)),
    Criteria(patients=("W" * 12,), label="PSY", rule="care.team"),
    Criteria(patients=()),
    Criteria(since_us=START_US + 50_000, until_us=START_US + 90_000),
    Criteria(request="req-3"),
    Criteria(service="forum", action="export"),
    Criteria(decision="deny"),
    Criteria(outcome="denied"),
    Criteria(rule="part2-consent"),
    Criteria(label="ETH", decision="deny"),
    Criteria(words=("obs-3",)),
    Criteria(words=("part2",)),
    Criteria(words=("obs-*", "car*")),
    Criteria(words=("obs-",)),
    Criteria(words=("consent", "psy")),
    Criteria(words=("observation", "eth"), tenant="clinic-1"),
    Criteria(words=("nowhere",)),
]


def test_finds_exactly_what_the_entries_say(url: str) -> None:
    log = some_log(400)
    with AuditIndex(url) as index:
        index.refresh(log)
        for asked in ASKED:
            assert index.find(asked, limit=1000) == answers(log, asked), asked


def test_pages_do_not_overlap_and_miss_nothing(url: str) -> None:
    log = some_log(200)
    with AuditIndex(url) as index:
        index.refresh(log)
        for asked in (Criteria(), Criteria(label="PSY"), Criteria(patients=("W" * 12, "X" * 12))):
            found: list[int] = []
            before: int | None = None
            while page := index.find(asked, before=before, limit=7):
                found += page
                before = page[-1]
            assert found == answers(log, asked)


def test_refreshing_goes_on_where_it_stopped_and_may_be_repeated(url: str) -> None:
    log = some_log(100)
    later = some_log(250)
    with AuditIndex(url) as index:
        assert index.refresh(log).added == 100
        assert index.refresh(log).added == 0
        log.held += later.held[100:]
        report = index.refresh(log)
        assert (report.added, report.position, report.rebuilt) == (150, 250, None)
        assert index.count() == 250
    with AuditIndex(url) as index:
        assert index.refresh(log).added == 0
        assert index.find(Criteria(label="PSY"), limit=1000) == answers(log, Criteria(label="PSY"))


def test_entries_of_an_exchange_are_found_together(url: str) -> None:
    log = some_log(100)
    with AuditIndex(url) as index:
        index.refresh(log)
        found = index.of_requests(["req-1", "req-2", "req-none"])
    for request, indices in found.items():
        assert indices == [
            n
            for n, raw in log.read()
            if parse_entry(raw).request == request and parse_entry(raw).stage != "message"
        ]


@pytest.mark.parametrize("change", ["shorter", "other end", "other origin"])
def test_an_index_of_another_log_is_noticed_and_made_anew(url: str, change: str) -> None:
    log = some_log(120)
    with AuditIndex(url) as index:
        index.refresh(log)
        if change == "shorter":
            other = MemoryLog(held=log.held[:50])
        elif change == "other end":
            other = MemoryLog(held=[*log.held[:60], *some_log(120, seed=2).held[60:]])
        else:
            other = MemoryLog(held=log.held[:], origin="test.example/other")
        report = index.refresh(other)
        assert report.rebuilt is not None
        assert index.find(Criteria(label="PSY"), limit=1000) == answers(
            other, Criteria(label="PSY")
        )
        assert index.refresh(other).rebuilt is None


class PrunedLog(MemoryLog):
    """Refuses to read below `first`."""

    first = 0

    def entry(self, index: int) -> bytes:
        assert index >= self.first
        return super().entry(index)

    def read(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes]]:
        assert start >= self.first
        return super().read(start, end)


def test_pruned_entries_are_neither_read_nor_found(url: str) -> None:
    log = PrunedLog(held=some_log(120).held)
    with AuditIndex(url) as index:
        index.refresh(log)
        log.first = 64
        index.forget(64)
        assert index.refresh(log, first=64).rebuilt is None
        expected = [n for n in answers(MemoryLog(held=log.held), Criteria()) if n >= 64]
        assert index.find(Criteria(), limit=1000) == expected
        assert all(n >= 64 for n in index.find(Criteria(words=("observation",)), limit=1000))
    with AuditIndex.anew(url) as index:
        index.refresh(log, first=64)
        assert index.find(Criteria(), limit=1000) == expected
        log.held, log.first = some_log(200).held, 150
        assert index.refresh(log, first=150).rebuilt is not None
        assert index.count() == 50


def test_an_interrupted_batch_leaves_nothing_behind(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = some_log(300)
    monkeypatch.setattr(index_module, "BATCH_ROWS", 100)
    with AuditIndex(url) as index:
        real, batches = index._store.insert, 0

        def insert(cursor: object, rows: Rows) -> None:
            nonlocal batches
            batches += 1
            if batches == 3:
                half = Rows()
                half.entries = rows.entries[:10]
                real(cursor, half)
                raise KeyboardInterrupt
            real(cursor, rows)

        monkeypatch.setattr(index._store, "insert", insert)
        with pytest.raises(KeyboardInterrupt):
            index.refresh(log)
        position = index.position()
        assert 0 < position < 300
        assert index.count() == position
        index.refresh(log)
        assert index.find(Criteria(), limit=1000) == answers(log, Criteria())
        assert index.find(Criteria(words=("psy",)), limit=1000) == answers(
            log, Criteria(words=("psy",))
        )


def test_two_may_index_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = some_log(600)
    monkeypatch.setattr(index_module, "BATCH_ROWS", 50)
    with AuditIndex(url) as one, AuditIndex(url) as two:
        one.refresh(MemoryLog(held=log.held[:1]))
        threads = [threading.Thread(target=each.refresh, args=(log,)) for each in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert one.count() == 600
        assert two.find(Criteria(), limit=1000) == answers(log, Criteria())


def test_whoever_is_overtaken_goes_on_from_there(url: str) -> None:
    class Overtaken(MemoryLog):
        def read(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes]]:
            if start < 100:
                other.refresh(MemoryLog(held=self.held[:100], origin=self.origin))
            return super().read(start, end)

    log = Overtaken(held=some_log(250).held)
    with AuditIndex(url) as index, AuditIndex(url) as other:
        other.refresh(MemoryLog(held=log.held[:1]))
        assert index.refresh(log).added == 150
        assert index.count() == 250
        assert index.find(Criteria(), limit=1000) == answers(log, Criteria())


def test_a_damaged_file_is_told_and_made_anew(sqlite_url: str, tmp_path: Path) -> None:
    (tmp_path / "index.sqlite3").write_bytes(b"not a database" * 1000)
    with pytest.raises(IndexUnavailableError, match="rebuild-index"):
        AuditIndex(sqlite_url)
    with AuditIndex.anew(sqlite_url) as index:
        assert index.refresh(some_log(10)).added == 10


def test_the_index_holds_no_sealed_text_and_only_its_owner_reads_it(
    sqlite_url: str, tmp_path: Path
) -> None:
    with AuditIndex(sqlite_url) as index:
        index.refresh(some_log(50))
    path = tmp_path / "index.sqlite3"
    assert path.stat().st_mode & 0o777 == 0o600
    content = path.read_bytes()
    assert b"c" * 60 not in content
    assert b"b" * 60 not in content
    with sqlite3.connect(path) as connection:
        keys = {row[0] for row in connection.execute("SELECT key_id FROM audit_patients")}
    connection.close()
    assert keys == {letter * 12 for letter in "WXYZ"}


def test_what_is_no_entry_is_refused(sqlite_url: str) -> None:
    log = MemoryLog(held=[encode_entry(make_entry()), b'{"x":1}'])
    with AuditIndex(sqlite_url) as index, pytest.raises(MalformedEntryError, match="Entry 1"):
        index.refresh(log)


@pytest.mark.parametrize("wrong", ["", "sqlite://", "mysql://x/y", "nonsense"])
def test_a_wrong_url_is_refused_without_being_repeated(wrong: str) -> None:
    with pytest.raises(AuditConfigurationError, match="index_url"):
        AuditIndex(wrong)


@pytest.mark.parametrize("typed", ['a"b', "a'b", "a*b", "*", "(a)", "a b;", "ü", "a\x00", "x" * 97])
def test_words_are_refused_that_a_database_could_take_for_syntax(typed: str) -> None:
    with pytest.raises(MalformedQueryError):
        parse_words(typed)


@pytest.mark.parametrize(
    "word", ["and", "or", "not", "near", "a:b", "-", "--x", "a/b", "~", "...", "words:psy"]
)
def test_words_of_a_query_language_are_only_words(url: str, word: str) -> None:
    log = some_log(20)
    with AuditIndex(url) as index:
        index.refresh(log)
        asked = Criteria(words=parse_words(word))
        assert index.find(asked, limit=100) == answers(log, asked)


@settings(max_examples=50)
@given(
    st.lists(st.from_regex(r"[a-z]{1,8}([._:/-][a-z0-9]{1,8}){0,2}", fullmatch=True), max_size=4)
)
def test_a_code_is_found_whole_and_by_its_pieces(codes: list[str]) -> None:
    words = code_words(tuple(codes)).split()
    for code in codes:
        assert code in words
        assert all(piece in words for piece in code.replace("_", "-").split("-") if code.isalnum())


def test_key_ids_stand_between_the_dots() -> None:
    assert key_id(SEALED) == "A" * 12
    assert key_id(OTHER) == "B" * 12
    assert key_id(None) is None


def test_upper_and_lower_case_find_the_same() -> None:
    entry = structs.replace(make_entry(), labels=("PSY",))
    assert Criteria(words=parse_words("psy")).matches(entry)
    assert Criteria(words=parse_words("PSY")).matches(entry)
