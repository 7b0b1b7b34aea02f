"""New rules take their place whole or not at all, between two requests."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

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
