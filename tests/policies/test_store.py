"""New rules take their place whole or not at all, between two requests."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from policies import store as stores
from policies import tables
from policies.cases import BUILT_IN, load_cases
from policies.errors import BundleError, PoliciesError
from policies.model import Allowed, Denied
from policies.settings import PoliciesSettings
from policies.store import PolicyStore

CLOSED = (
    '@id("own.closed") @title("t") @cites("c") @reason("closed") @remedy("administrator")\n'
    "forbid(principal, action, resource);"
)
READ = next(
    case.request for case in load_cases([BUILT_IN]) if case.decides == "role.clinician.read"
)


def test_a_valid_new_bundle_replaces_the_old(tmp_path: Path) -> None:
    store = PolicyStore(PoliciesSettings(directory=str(tmp_path)))
    before = store.current
    assert isinstance(before.engine.decide(READ), Allowed)
    (tmp_path / "own.cedar").write_text(CLOSED)
    assert store.reload()
    assert isinstance(store.current.engine.decide(READ), Denied)
    assert store.current.hash != before.hash
    assert isinstance(before.engine.decide(READ), Allowed), "a request under way keeps its rules"
    assert not store.reload(), "the same files are no change"


def test_an_invalid_bundle_is_refused_and_the_old_stays(tmp_path: Path) -> None:
    (tmp_path / "own.cedar").write_text(CLOSED)
    store = PolicyStore(PoliciesSettings(directory=str(tmp_path)))
    before = store.current
    (tmp_path / "own.cedar").write_text(CLOSED + "\nforbid(principal")
    with pytest.raises(BundleError, match=r"own\.cedar:3"):
        store.reload()
    assert store.current is before
    assert isinstance(store.last_error, BundleError)
    assert isinstance(store.current.engine.decide(READ), Denied)
    (tmp_path / "own.cedar").write_text(CLOSED)
    store.reload()
    assert store.last_error is None


def test_nothing_starts_without_rules(tmp_path: Path) -> None:
    with pytest.raises(PoliciesError):
        PolicyStore(PoliciesSettings(directory=str(tmp_path / "nowhere")))


def test_new_tables_are_noticed(tmp_path: Path) -> None:
    store = PolicyStore(PoliciesSettings(tables_directory=str(tmp_path)))
    coding = {"system": "http://clinic.example", "code": "N1"}
    assert store.current.labeller.label(coding).whole.codes == frozenset()
    text = 'systems = ["http://clinic.example"]\nmatch = "exact"\n[labels]\nHIV = ["N1"]\n'
    (tmp_path / "own.toml").write_text(text)
    assert store.reload()
    assert store.current.labeller.label(coding).whole.codes == {"HIV"}


def test_requests_during_reloads_get_the_old_or_the_new_answer(tmp_path: Path) -> None:
    own = tmp_path / "own.cedar"
    own.write_text(CLOSED)
    store = PolicyStore(PoliciesSettings(directory=str(tmp_path)))
    stop = threading.Event()
    wrong: list[object] = []

    def ask() -> None:
        while not stop.is_set():
            decision = store.current.engine.decide(READ)
            if isinstance(decision, Denied) and decision.rules != ("own.closed",):
                wrong.append(decision)

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    for number in range(8):
        own.write_text(CLOSED if number % 2 else "")
        store.reload()
    stop.set()
    for thread in asking:
        thread.join()
    assert not wrong


TABLE = 'systems = ["http://clinic.example"]\nmatch = "exact"\n[labels]\nHIV = ["N1"]\n'


def test_tables_that_change_while_they_are_read_are_not_put_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their hash would name others than those that decide."""
    store = PolicyStore(PoliciesSettings(tables_directory=str(tmp_path)))
    before = store.current

    def late(folders: Sequence[Path]) -> tables.Tables:
        loaded = load_tables(folders)
        (tmp_path / "own.toml").write_text(TABLE)
        return loaded

    load_tables = tables.load_tables
    monkeypatch.setattr(tables, "load_tables", late)
    with pytest.raises(BundleError, match="changed while"):
        store.reload()
    assert store.current is before
    monkeypatch.undo()
    assert store.reload()


def test_of_two_reloads_at_once_the_newer_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PolicyStore(PoliciesSettings(directory=str(tmp_path)))
    load, has_read, go_on = stores.load_in_force, threading.Event(), threading.Event()

    def slow(settings: PoliciesSettings) -> stores.InForce:
        loaded = load(settings)
        if not has_read.is_set():
            has_read.set()
            go_on.wait(5)
        return loaded

    monkeypatch.setattr(stores, "load_in_force", slow)
    first = threading.Thread(target=store.reload)
    first.start()
    has_read.wait(5)
    (tmp_path / "own.cedar").write_text(CLOSED)
    second = threading.Thread(target=store.reload)
    second.start()
    second.join(1)
    go_on.set()
    first.join()
    second.join()
    assert isinstance(store.current.engine.decide(READ), Denied)
