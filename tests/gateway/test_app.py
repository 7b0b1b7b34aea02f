"""Rules that change while a worker runs: none is in force half-written, none is overlooked."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway import app
from gateway.app import Gateway, _Folders
from gateway.metrics import RULES_REFUSED
from policies.errors import BundleError
from policies.settings import PoliciesSettings


def folders(path: Path) -> _Folders:
    return _Folders(PoliciesSettings(directory=str(path)))


def test_a_file_that_is_still_being_written_is_not_read(tmp_path: Path) -> None:
    watched = folders(tmp_path)
    rules = tmp_path / "own.cedar"
    for size in range(5):
        rules.write_text("x" * size)
        assert not watched.settled()
    assert watched.settled()
    watched.taken()
    assert not watched.settled()


def test_a_change_stays_due_until_it_was_taken(tmp_path: Path) -> None:
    watched = folders(tmp_path)
    (tmp_path / "own.cedar").write_text("x")
    watched.settled()
    assert watched.settled()
    assert watched.settled()


def _gateway(reload: Any, path: Path) -> Gateway:
    gateway = object.__new__(Gateway)
    gateway._watched = folders(path)
    current = SimpleNamespace(hash="h", engine=SimpleNamespace(bundle=SimpleNamespace(rules=())))
    gateway._policies = SimpleNamespace(reload=reload, current=current)  # type: ignore[assignment]
    return gateway


async def _keep_house(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "RELOAD_EVERY_S", 0.01)
    task = asyncio.create_task(gateway._keep_house())
    await asyncio.sleep(0.3)
    task.cancel()


async def test_what_could_not_be_read_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def reload() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise OSError("too many open files")

    gateway = _gateway(reload, tmp_path)
    (tmp_path / "own.cedar").write_text("x")
    await _keep_house(gateway, monkeypatch)
    assert len(tries) == 3


async def test_the_operator_is_told_while_rules_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good: list[int] = []

    def reload() -> None:
        if not good:
            raise BundleError("own.cedar", "is no rule")

    gateway = _gateway(reload, tmp_path)
    (tmp_path / "own.cedar").write_text("x")
    await _keep_house(gateway, monkeypatch)
    assert RULES_REFUSED._value.get() == 1
    good.append(1)
    (tmp_path / "own.cedar").write_text("better")
    await _keep_house(gateway, monkeypatch)
    assert RULES_REFUSED._value.get() == 0
