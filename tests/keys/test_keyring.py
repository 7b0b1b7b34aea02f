"""Sealing and opening fields: places, erasure, caches, budgets, several processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.ports import PersonSealer
from keys.errors import (
    InvalidContextError,
    KeyTableError,
    MalformedSealedTextError,
    PersonErasedError,
    UnknownKeyError,
    UnsealError,
    VaultError,
    VaultRejectedError,
    VaultUnavailableError,
)
from keys.model import FieldContext, KeyOwner, KeyRow
from keys.sealed import parse_sealed
from keys.settings import CacheSettings
from tests.keys.fakes import FakeClock, FakeKeyServer
from tests.keys.processes import in_processes, seal_many, shared_server
from tests.keys.workbench import TENANT, Workbench, context_of, database_files, workbench


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    with workbench(tmp_path / "keys.sqlite3") as made:
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    with workbench(tmp_path_factory.mktemp("shared") / "keys.sqlite3") as made:
        yield made


def calls(bench: Workbench) -> int:
    return sum(bench.server.calls.values())


# --- Places ---------------------------------------------------------------------------------------


@given(
    st.binary(max_size=300),
    st.tuples(
        *[st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)] * 4
    ),
)
def test_opens_in_its_place(shared: Workbench, plaintext: bytes, names: tuple[str, ...]) -> None:
    tenant, person, service, field = names
    context = FieldContext(tenant=tenant, person=person, service=service, field=field)
    text = shared.keyring.seal(context, plaintext)
    assert text.isascii()
    assert shared.keyring.unseal(context, text) == plaintext


@pytest.mark.parametrize("part", ["tenant", "person", "service", "field"])
def test_a_text_that_was_moved_does_not_open(bench: Workbench, part: str) -> None:
    text = bench.seal("ada")
    with pytest.raises(UnsealError):
        bench.keyring.unseal(context_of("ada", **{part: "elsewhere"}), text)


def test_a_text_under_the_id_of_another_key_does_not_open(bench: Workbench) -> None:
    ours, theirs = bench.seal("ada"), bench.seal("bob")
    relabelled = theirs[:16] + ours[16:]
    for person in ("ada", "bob"):
        with pytest.raises(UnsealError):
            bench.unseal(person, relabelled)


def test_an_older_version_of_the_key_is_bound_into_its_texts(bench: Workbench) -> None:
    text = bench.seal("ada")
    key = bench.store.by_id(parse_sealed(text).key_id)
    key.version_part = b"\0\0\0\x012"
    with pytest.raises(UnsealError):
        bench.unseal("ada", text)


def test_a_text_that_names_a_system_key_does_not_open(bench: Workbench) -> None:
    text = bench.seal("ada")
    [system] = bench.table.owners("system")
    system_id = bench.table.versions(system)[0].key_id
    with pytest.raises(UnsealError):
        bench.unseal("ada", f"hg1.{system_id}{text[16:]}")
    with pytest.raises(UnsealError):
        bench.keyring.open_for_person(
            tenant=TENANT, field="who", text=f"hg1.{system_id}{text[16:]}"
        )


@given(st.data())
def test_any_change_of_a_text_fails(shared: Workbench, data: st.DataObject) -> None:
    text = shared.seal("ada", b"some text")
    at = data.draw(st.integers(0, len(text) - 1))
    new = data.draw(st.sampled_from("AQgw_-.0Z"))
    changed = text[:at] + new + text[at + 1 :]
    if changed != text:
        with pytest.raises((UnsealError, UnknownKeyError)):
            shared.unseal("ada", changed)


def test_the_same_text_is_never_sealed_alike(bench: Workbench) -> None:
    assert len({bench.seal("ada", b"same") for _ in range(500)}) == 500


def test_a_wrapped_key_moved_to_another_row_does_not_open(bench: Workbench) -> None:
    """Somebody who may write to the table but not use the key server gains nothing."""
    ada, bob = bench.seal("ada"), bench.seal("bob")
    ids = [parse_sealed(text).key_id for text in (ada, bob)]
    rows = bench.table.by_ids(ids)
    with bench.database.writing() as connection:
        for ours, theirs in (ids, ids[::-1]):
            connection.exec_driver_sql(
                "UPDATE data_keys SET wrapped = ? WHERE key_id = ?", (rows[theirs].wrapped, ours)
            )
    bench.store.empty()
    with pytest.raises(VaultRejectedError):
        bench.unseal("ada", ada)


@pytest.mark.parametrize("name", ["", "a\0b", "\ud800", "x" * 1025])
def test_a_name_that_cannot_be_bound_is_refused(name: str) -> None:
    for part in ("tenant", "person", "service", "field"):
        with pytest.raises(InvalidContextError) as caught:
            context_of("ada", **{part: name})
        assert "x" * 1025 not in str(caught.value)


def test_nothing_about_a_person_is_shown(bench: Workbench, tmp_path: Path) -> None:
    context = context_of("Ada-Example-1815")
    text = bench.keyring.seal(context, b"depression, moderate")
    assert "Ada-Example" not in repr(context)
    with pytest.raises(UnsealError) as caught:
        bench.unseal("bob", text)
    assert "Ada" not in str(caught.value)
    for content in database_files(tmp_path / "keys.sqlite3").values():
        assert b"Ada-Example" not in content
        assert b"depression" not in content


def test_two_installations_give_one_person_different_tags(tmp_path: Path) -> None:
    tags = set()
    for name in ("one", "two"):
        with workbench(tmp_path / name) as bench:
            tags.add(bench.keyring.owner(TENANT, "ada").name)
    assert len(tags) == 2


def test_an_unknown_key_is_named_as_such(bench: Workbench) -> None:
    text = bench.seal("ada")
    with pytest.raises(UnknownKeyError):
        bench.unseal("ada", "hg1.AAAAAAAAAAAA" + text[16:])
    with pytest.raises(MalformedSealedTextError):
        bench.unseal("ada", "Ada Example")


# --- Key server away ------------------------------------------------------------------------------


def test_without_the_key_server_nothing_is_sealed_and_nothing_in_clear(bench: Workbench) -> None:
    text = bench.seal("ada")
    bench.server.available = False
    assert bench.unseal("ada", text) == b"text"  # warm: still opens
    with pytest.raises(VaultUnavailableError):
        bench.seal("bob")
    bench.store.empty()
    with pytest.raises(VaultUnavailableError):
        bench.unseal("ada", text)
    bench.server.available = True
    assert bench.unseal("ada", text) == b"text"


def test_when_the_table_cannot_be_asked_cached_keys_serve_no_longer_than_agreed(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = bench.seal("ada")

    def down() -> int:
        raise KeyTableError("down")

    monkeypatch.setattr(bench.table, "generation", down)
    bench.clock.advance(0.9)
    assert bench.unseal("ada", text) == b"text"
    bench.clock.advance(0.1)
    with pytest.raises(KeyTableError):
        bench.unseal("ada", text)


# --- Caching --------------------------------------------------------------------------------------


def test_a_thousand_warm_fields_need_no_call_of_the_key_server(bench: Workbench) -> None:
    text = bench.seal("ada")
    before = calls(bench)
    for _ in range(500):
        bench.seal("ada")
        bench.unseal("ada", text)
    assert calls(bench) == before


def test_two_hundred_persons_are_loaded_with_one_call(bench: Workbench) -> None:
    persons = [f"person-{number}" for number in range(200)]
    before = calls(bench)
    bench.keyring.prefetch(TENANT, persons, create=True)
    assert bench.server.calls == {"wrap": 2, "unwrap": 2}  # one each for the tag key
    texts = {person: bench.seal(person) for person in persons}
    assert calls(bench) == before + 4
    bench.store.empty()
    before = calls(bench)
    bench.keyring.prefetch_texts(texts.values())
    bench.keyring.prefetch(TENANT, persons)
    after = calls(bench)
    assert after - before <= 3
    for person, text in texts.items():
        assert bench.unseal(person, text) == b"text"
    assert calls(bench) == after


def test_reading_ahead_makes_no_keys(bench: Workbench) -> None:
    bench.seal("ada")
    bench.keyring.prefetch(TENANT, ["ada", "bob", "eve"])
    assert bench.keyring.key_ids(tenant=TENANT, person="bob") == []


def test_reading_ahead_passes_over_what_cannot_be_read(bench: Workbench) -> None:
    good, erased = bench.seal("ada"), bench.seal("bob")
    bench.eraser.erase(tenant=TENANT, person="bob", actor="officer")
    bench.keyring.prefetch_texts([good, erased, "hg1.AAAAAAAAAAAA.AAAA", "plain"])
    assert bench.unseal("ada", good) == b"text"


def test_one_poisoned_row_does_not_keep_the_others_from_loading(bench: Workbench) -> None:
    texts = {person: bench.seal(person) for person in ("ada", "bob", "eve")}
    with bench.database.writing() as connection:
        connection.exec_driver_sql(
            "UPDATE data_keys SET wrapped = 'vault:v1:AAAA' WHERE key_id = ?",
            (parse_sealed(texts["bob"]).key_id,),
        )
    bench.store.empty()
    bench.keyring.prefetch_texts(texts.values())
    assert bench.unseal("ada", texts["ada"]) == b"text"
    with pytest.raises(VaultRejectedError):
        bench.unseal("bob", texts["bob"])


def test_another_process_notices_an_erasure_within_the_agreed_time(tmp_path: Path) -> None:
    path, server, clock = tmp_path / "keys.sqlite3", FakeKeyServer(), FakeClock()
    with (
        workbench(path, server=server, clock=clock) as ours,
        workbench(path, server=server, clock=clock) as theirs,
    ):
        text = ours.seal("ada")
        assert theirs.unseal("ada", text) == b"text"
        ours.eraser.erase(tenant=TENANT, person="ada", actor="officer")
        clock.advance(CacheSettings().refresh_s)
        with pytest.raises(PersonErasedError):
            theirs.unseal("ada", text)


def test_a_clock_that_steps_back_does_not_delay_that(tmp_path: Path) -> None:
    path, server, clock = tmp_path / "keys.sqlite3", FakeKeyServer(), FakeClock()
    with (
        workbench(path, server=server, clock=FakeClock()) as ours,
        workbench(path, server=server, clock=clock) as theirs,
    ):
        text = ours.seal("ada")
        assert theirs.unseal("ada", text) == b"text"
        ours.eraser.erase(tenant=TENANT, person="ada", actor="officer")
        clock.advance(-3600)
        with pytest.raises(PersonErasedError):
            theirs.unseal("ada", text)


def test_the_table_is_asked_at_most_once_in_the_agreed_time(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.seal("ada")
    asked: list[float] = []
    real = bench.table.generation

    def generation() -> int:
        asked.append(bench.clock())
        return real()

    monkeypatch.setattr(bench.table, "generation", generation)
    for _ in range(100):
        bench.clock.advance(0.1)
        bench.seal("ada")
    assert len(asked) <= 11


def test_a_clock_that_steps_back_has_the_table_asked_again(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.seal("ada")

    def down() -> int:
        raise KeyTableError("asked")

    monkeypatch.setattr(bench.table, "generation", down)
    bench.clock.advance(-3600)
    with pytest.raises(KeyTableError, match="asked"):
        bench.seal("ada")


def test_an_erasure_while_a_key_is_being_loaded_wins(bench: Workbench) -> None:
    """The row was read before the erasure, its key arrives after it: it must not be used."""
    text = bench.seal("ada")
    bench.store.empty()
    bench.keyring.owner(TENANT, "ada")  # the tag key is loaded: the next call is for ada's
    erased: list[bool] = []

    def erase_meanwhile(name: str) -> None:
        if name == "unwrap" and not erased:
            erased.append(True)
            ids = bench.keyring.key_ids(tenant=TENANT, person="ada")
            bench.table.destroy(ids, now=0.0)
            bench.store.empty()

    bench.server.after_call = erase_meanwhile
    with pytest.raises(PersonErasedError):
        bench.unseal("ada", text)
    assert erased
    with pytest.raises(PersonErasedError):
        bench.unseal("ada", text)


def test_seals_and_opens_while_keys_are_emptied_all_the_time(bench: Workbench) -> None:
    stop = threading.Event()

    def disturb() -> None:
        while not stop.wait(0.002):
            bench.store.empty()

    def work(person: str) -> None:
        for number in range(100):
            plaintext = f"{person} {number}".encode()
            assert bench.unseal(person, bench.seal(person, plaintext)) == plaintext

    with ThreadPoolExecutor(5) as pool:
        disturbing = pool.submit(disturb)
        try:
            for worker in [pool.submit(work, f"person-{number}") for number in range(4)]:
                worker.result()
        finally:
            stop.set()
        disturbing.result()


def test_a_seal_that_waits_for_one_who_only_reads_ahead_makes_the_key_itself(
    bench: Workbench,
) -> None:
    owner = bench.keyring.owner(TENANT, "ada")
    inside, go_on = threading.Event(), threading.Event()
    real = bench.table.newest

    def slow(owners: Collection[KeyOwner]) -> dict[KeyOwner, KeyRow]:
        inside.set()
        go_on.wait(10)
        return real(owners)

    with pytest.MonkeyPatch.context() as patched, ThreadPoolExecutor(2) as pool:
        patched.setattr(bench.table, "newest", slow)
        reading = pool.submit(bench.store.prefetch, [owner])
        inside.wait(10)
        sealing = pool.submit(bench.seal, "ada")
        threading.Event().wait(0.05)
        go_on.set()
        reading.result(10)
        assert bench.unseal("ada", sealing.result(10)) == b"text"


def test_a_key_that_appears_while_it_is_looked_for_is_not_called_erased(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = bench.seal("ada")
    bench.store.empty()
    real, asked = bench.table.by_ids, 0

    def late(key_ids: Collection[str]) -> dict[str, KeyRow]:
        nonlocal asked
        asked += 1
        return {} if asked == 1 else real(key_ids)

    bench.keyring.owner(TENANT, "ada")
    monkeypatch.setattr(bench.table, "by_ids", late)
    assert bench.unseal("ada", text) == b"text"


def test_an_idle_process_drops_keys_that_are_too_old(tmp_path: Path) -> None:
    with workbench(tmp_path / "k", cache=CacheSettings(max_age_s=0.2)) as bench:
        bench.seal("ada")
        assert bench.store.cached_keys() > 0
        bench.clock.advance(0.2)
        for _ in range(500):  # nobody asks for a key from now on
            if bench.store.cached_keys() == 0:
                break
            time.sleep(0.02)
        assert bench.store.cached_keys() == 0


def test_a_closed_store_holds_no_key_and_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with workbench(tmp_path / "k") as bench:
        bench.seal("ada")
        assert threading.active_count() == before + 1
    assert bench.store.cached_keys() == 0
    assert threading.active_count() == before


# --- Nonce budget ---------------------------------------------------------------------------------


def test_a_key_that_is_used_up_gets_a_successor_and_still_opens(tmp_path: Path) -> None:
    with workbench(tmp_path / "k", seals_per_key=10, seals_per_reservation=4) as bench:
        texts = [bench.seal("ada", str(number).encode()) for number in range(50)]
        by_key = Counter(parse_sealed(text).key_id for text in texts)
        assert max(by_key.values()) <= 10
        assert len(by_key) >= 5
        assert set(bench.keyring.key_ids(tenant=TENANT, person="ada")) >= set(by_key)
        for number, text in enumerate(texts):
            assert bench.unseal("ada", text) == str(number).encode()


def test_eviction_does_not_waste_reservations(tmp_path: Path) -> None:
    cache = CacheSettings(max_entries=2)
    with workbench(tmp_path / "k", cache=cache, seals_per_reservation=100) as bench:
        for _ in range(10):
            for person in ("ada", "bob", "eve"):
                bench.seal(person)
        for person in ("ada", "bob", "eve"):
            [row] = bench.table.versions(bench.keyring.owner(TENANT, person))
            assert row.reserved == 100


def test_threads_together_never_pass_the_budget(tmp_path: Path) -> None:
    with workbench(tmp_path / "k", seals_per_key=40, seals_per_reservation=7) as bench:
        with ThreadPoolExecutor(6) as pool:
            texts = list(pool.map(lambda _: bench.seal("ada"), range(300)))
        by_key = Counter(parse_sealed(text).key_id for text in texts)
        assert max(by_key.values()) <= 40
        assert all(bench.unseal("ada", text) == b"text" for text in texts)


def test_processes_together_never_pass_the_budget_and_share_the_first_key(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'keys.sqlite3'}"
    with workbench(url, server=shared_server()):
        pass  # the tables are there
    results = in_processes(3, seal_many, url, "ada", 120, 50, 8)
    by_key = Counter(parse_sealed(text).key_id for texts in results for text in texts)
    assert max(by_key.values()) <= 50
    with workbench(url, server=shared_server(), seals_per_key=50) as bench:
        rows = bench.table.versions(bench.keyring.owner(TENANT, "ada"))
        assert [row.version for row in rows] == list(range(1, len(rows) + 1))
        assert all(by_key[row.key_id] <= row.reserved <= 50 for row in rows)
        for texts in results:
            for number, text in enumerate(texts):
                assert bench.unseal("ada", text) == str(number).encode()


def test_processes_that_make_the_first_key_at_once_converge_on_one(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'keys.sqlite3'}"
    results = in_processes(4, seal_many, url, "ada", 3, 2**32, 100)
    assert len({parse_sealed(text).key_id for texts in results for text in texts}) == 1


def test_a_crash_only_over_counts(tmp_path: Path) -> None:
    server = FakeKeyServer()
    for _ in range(3):
        # Left without using up what was reserved, like a process that dies.
        with workbench(tmp_path / "k", server=server, seals_per_reservation=10) as bench:
            bench.seal("ada")
            [row] = bench.table.versions(bench.keyring.owner(TENANT, "ada"))
    assert row.reserved == 30


# --- For the audit log ----------------------------------------------------------------------------


def test_the_keyring_is_what_the_audit_log_needs(bench: Workbench) -> None:
    sealer: PersonSealer = bench.keyring
    text = sealer.seal_for_person(tenant=TENANT, person="ada", field="actor", plaintext=b"Ada")
    assert sealer.open_for_person(tenant=TENANT, field="actor", text=text) == b"Ada"
    assert list(sealer.key_ids(tenant=TENANT, person="ada")) == [parse_sealed(text).key_id]
    for tenant, field in (("other", "actor"), (TENANT, "patient")):
        with pytest.raises(UnsealError):
            sealer.open_for_person(tenant=tenant, field=field, text=text)


def test_a_name_is_sealed_once_and_anew_once_another_process_erased(tmp_path: Path) -> None:
    server = FakeKeyServer()
    with (
        workbench(tmp_path / "k", server=server) as here,
        workbench(tmp_path / "k", server=server) as elsewhere,
    ):

        def name() -> str:
            return here.keyring.name_for_person(tenant=TENANT, person="ada", field="actor")

        first = name()
        assert name() == first
        elsewhere.eraser.erase(tenant=TENANT, person="ada", actor="officer")
        here.clock.advance(here.store.refresh_s + 1)
        assert parse_sealed(name()).key_id != parse_sealed(first).key_id


def test_many_fields_open_together(bench: Workbench) -> None:
    texts = [bench.seal("ada"), bench.seal("bob"), bench.seal("ada")]
    context = {one: context_of(one) for one in ("ada", "bob")}
    located = [
        bench.keyring.locate(context[one], text)
        for one, text in zip(("ada", "bob", "ada"), texts, strict=True)
    ]
    assert bench.keyring.unseal_located(located) == [
        bench.unseal(one, text) for one, text in zip(("ada", "bob", "ada"), texts, strict=True)
    ]
    bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    with pytest.raises(PersonErasedError):
        bench.keyring.unseal_located(located)
    assert bench.keyring.unseal_located(located[1:2])


def test_each_of_many_fields_counts_as_a_use_of_the_key(bench: Workbench) -> None:
    text = bench.seal("ada")
    located = [bench.keyring.locate(context_of("ada"), text)] * 5
    key = bench.store.by_id(parse_sealed(text).key_id)
    before = key.uses
    bench.keyring.unseal_located(located)
    assert key.uses == before + 5


def test_a_located_text_opens_for_its_own_person_only(bench: Workbench) -> None:
    located = bench.keyring.locate(context_of("bob"), bench.seal("ada"))
    with pytest.raises(UnsealError):
        bench.keyring.unseal_located([located])


def test_a_field_of_an_app_does_not_open_as_part_of_the_log(bench: Workbench) -> None:
    with pytest.raises(UnsealError):
        bench.keyring.open_for_person(tenant=TENANT, field="Patient.name", text=bench.seal("ada"))


def test_an_erased_person_is_erased_in_the_log(bench: Workbench) -> None:
    text = bench.keyring.seal_for_person(
        tenant=TENANT, person="ada", field="actor", plaintext=b"Ada"
    )
    bench.eraser.erase(tenant=TENANT, person="ada", actor="officer")
    with pytest.raises(PersonErasedError):
        bench.keyring.open_for_person(tenant=TENANT, field="actor", text=text)


def test_protections_do_not_depend_on_assertions() -> None:
    """`python -O` removes assertions: none of the protections may be one."""
    program = (
        "import tempfile\n"
        "from tests.keys.workbench import workbench\n"
        "from keys.errors import UnsealError\n"
        "with tempfile.TemporaryDirectory() as d, workbench(d + '/k') as b:\n"
        "    t = b.seal('ada')\n"
        "    try:\n"
        "        b.unseal('bob', t)\n"
        "    except UnsealError:\n"
        "        print('refused')\n"
    )
    program = program.replace("workbench(d + '/k')", "workbench('sqlite:///' + d + '/k')")
    done = subprocess.run(
        [sys.executable, "-O", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "refused"


def test_every_error_is_one_of_ours(bench: Workbench) -> None:
    bench.server.available = False
    with pytest.raises(VaultError):
        bench.seal("nobody yet")
