"""The blind index: equal values match, within one field and within the window, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keys.errors import InvalidContextError, VaultUnavailableError
from keys.settings import CacheSettings
from tests.keys.fakes import FakeClock, FakeKeyServer, LogDownError
from tests.keys.workbench import TENANT, Workbench, workbench

DAY_S = 86_400.0
PLACE = {"tenant": TENANT, "service": "ehr", "field": "Patient.identifier"}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    with workbench(tmp_path / "keys.sqlite3") as made:
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    with workbench(tmp_path_factory.mktemp("shared") / "keys.sqlite3") as made:
        yield made


def write(bench: Workbench, value: bytes, **place: str) -> str:
    return bench.index.token_for_write(**{**PLACE, **place}, value=value)


def search(bench: Workbench, value: bytes, **place: str) -> list[str]:
    return bench.index.tokens_for_search(**{**PLACE, **place}, value=value)


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_a_value_is_found_by_an_equal_one_only(shared: Workbench, a: bytes, b: bytes) -> None:
    assert (write(shared, a) in search(shared, b)) == (a == b)


@pytest.mark.parametrize("part", ["tenant", "service", "field"])
def test_equal_values_of_different_places_have_different_tokens(
    bench: Workbench, part: str
) -> None:
    assert write(bench, b"1815-12-10") != write(bench, b"1815-12-10", **{part: "elsewhere"})


def test_parts_of_the_place_cannot_run_into_each_other(bench: Workbench) -> None:
    assert write(bench, b"v", service="ab", field="c") != write(
        bench, b"v", service="a", field="bc"
    )


def test_a_token_is_short_and_shows_its_version_only(bench: Workbench) -> None:
    token = write(bench, b"x" * 1000)
    assert token.startswith("hgi1.1.")
    assert len(token) == len("hgi1.1.") + 22


def test_two_installations_give_different_tokens(tmp_path: Path) -> None:
    tokens = set()
    for name in ("one", "two"):
        with workbench(tmp_path / name) as bench:
            tokens.add(write(bench, b"value"))
    assert len(tokens) == 2


def test_old_and_new_values_both_match_within_the_window(bench: Workbench) -> None:
    old = write(bench, b"value")
    assert bench.index.rotate(tenant=TENANT, actor="operator") == 2
    new = write(bench, b"value")
    assert new != old
    assert search(bench, b"value") == [new, old]
    bench.clock.advance(30 * DAY_S - 1)
    assert search(bench, b"value") == [new, old]
    bench.clock.advance(1)
    assert search(bench, b"value") == [new]


def test_several_rotations_within_a_window_all_match(bench: Workbench) -> None:
    tokens = [write(bench, b"value")]
    for _ in range(3):
        bench.clock.advance(DAY_S)
        bench.index.rotate(tenant=TENANT, actor="operator")
        tokens.append(write(bench, b"value"))
    assert search(bench, b"value") == tokens[::-1]


def test_after_the_window_the_old_key_is_destroyed(bench: Workbench) -> None:
    write(bench, b"value")
    other = write(bench, b"value", tenant="clinic-b")
    bench.index.rotate(tenant=TENANT, actor="operator")
    assert bench.index.retire(actor="operator") == []
    bench.clock.advance(30 * DAY_S)
    [destroyed] = bench.index.retire(actor="operator")
    assert bench.table.by_ids([destroyed])[destroyed].wrapped is None
    assert bench.index.retire(actor="operator") == []
    assert search(bench, b"value") == [write(bench, b"value")]
    assert search(bench, b"value", tenant="clinic-b") == [other]


def test_another_process_writes_with_the_new_version_within_the_agreed_time(
    tmp_path: Path,
) -> None:
    path, server, clock = tmp_path / "keys.sqlite3", FakeKeyServer(), FakeClock()
    with (
        workbench(path, server=server, clock=clock) as ours,
        workbench(path, server=server, clock=clock) as theirs,
    ):
        assert write(ours, b"v") == write(theirs, b"v")
        ours.index.rotate(tenant=TENANT, actor="operator")
        clock.advance(CacheSettings().refresh_s)
        assert write(theirs, b"v") == write(ours, b"v")
        assert write(theirs, b"v").startswith("hgi1.2.")


def test_whatever_a_process_writes_during_a_rotation_every_other_finds(tmp_path: Path) -> None:
    """Also those that have not heard of the new version, and one that has just started."""
    path, server, clock = tmp_path / "keys.sqlite3", FakeKeyServer(), FakeClock()
    written: set[str] = set()
    with (
        workbench(path, server=server, clock=clock) as ours,
        workbench(path, server=server, clock=clock) as theirs,
    ):

        def look(benches: list[Workbench]) -> None:
            written.update(write(bench, b"v") for bench in benches)
            for bench in benches:
                assert written <= set(search(bench, b"v"))

        def watch(seconds: float) -> None:
            for _ in range(8):
                with workbench(path, server=server, clock=clock) as new:
                    look([ours, theirs, new])
                clock.advance(seconds / 8)

        look([ours, theirs])
        ours.index._sleep = watch
        assert ours.index.rotate(tenant=TENANT, actor="operator") == 2
        assert {write(bench, b"v")[:7] for bench in (ours, theirs)} == {"hgi1.2."}
        assert {token[:7] for token in written} == {"hgi1.1.", "hgi1.2."}
        clock.advance(30 * DAY_S - 1)  # the whole window, from when the rotation was done
        look([ours, theirs])


def test_an_interrupted_rotation_misses_nothing_and_is_finished_by_the_next(
    bench: Workbench,
) -> None:
    old = write(bench, b"v")

    def interrupt(_seconds: float) -> None:
        raise InterruptedError

    go_on, bench.index._sleep = bench.index._sleep, interrupt
    with pytest.raises(InterruptedError):
        bench.index.rotate(tenant=TENANT, actor="operator")
    bench.index._sleep = go_on
    bench.clock.advance(60 * DAY_S)
    assert write(bench, b"v") == old
    assert old in search(bench, b"v")
    assert bench.index.rotate(tenant=TENANT, actor="operator") == 2
    assert search(bench, b"v") == [write(bench, b"v"), old]


def test_a_warm_search_reads_no_database(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = search(bench, b"v")

    def read() -> None:
        raise AssertionError("the table was read")

    monkeypatch.setattr(bench.database, "reading", read)
    assert search(bench, b"v") == expected
    assert [write(bench, b"v")] == expected


def test_a_version_destroyed_by_another_process_is_passed_over(bench: Workbench) -> None:
    write(bench, b"v")
    bench.index.rotate(tenant=TENANT, actor="operator")
    search(bench, b"v")
    known = dict(bench.index._known)
    [first, _] = known[TENANT]
    bench.table.destroy([first.key_id], now=bench.clock())
    bench.store.empty()
    bench.index._known = known  # read just before
    assert search(bench, b"v") == [write(bench, b"v")]


def test_a_rotation_is_recorded_first_or_does_not_happen(bench: Workbench) -> None:
    write(bench, b"value")
    bench.recorder.fail_at = 0
    with pytest.raises(LogDownError):
        bench.index.rotate(tenant=TENANT, actor="operator")
    assert write(bench, b"value").startswith("hgi1.1.")
    bench.recorder.fail_at = None
    bench.index.rotate(tenant=TENANT, actor="operator")
    stages = [(event.action, event.stage) for event in bench.recorder.events]
    assert stages == [("keys.index.rotate", "intent"), ("keys.index.rotate", "outcome")]


def test_destroying_is_recorded_first_or_does_not_happen(bench: Workbench) -> None:
    write(bench, b"value")
    bench.index.rotate(tenant=TENANT, actor="operator")
    bench.clock.advance(31 * DAY_S)
    bench.recorder.fail_at = len(bench.recorder.events)
    with pytest.raises(LogDownError):
        bench.index.retire(actor="operator")
    assert len(bench.table.versions(bench.table.owners("index")[0])) == 2


def test_without_the_key_server_there_is_no_token(bench: Workbench) -> None:
    bench.server.available = False
    with pytest.raises(VaultUnavailableError):
        write(bench, b"value")


def test_a_place_without_a_name_is_refused(bench: Workbench) -> None:
    with pytest.raises(InvalidContextError):
        write(bench, b"value", field="")
