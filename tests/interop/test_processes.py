"""Apps of others are installed once, whole, and from the pins that are there now."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop import processes
from tests.interop.processes import installed


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "CACHE", tmp_path)


def test_what_is_installed_is_used_until_its_pins_change() -> None:
    asked = []
    for pins in (b"1", b"1", b"2", b"2", b"1"):
        with installed("app", pins) as (_, missing):
            asked.append(missing)
    assert asked == [True, False, True, False, True]


def test_an_installation_that_broke_off_is_made_again() -> None:
    def break_off(pins: bytes) -> None:
        with installed("app", pins) as (_, missing):
            assert missing
            raise KeyboardInterrupt

    with installed("app", b"1"):
        pass
    for pins in (b"2", b"1", b"2"):
        with pytest.raises(KeyboardInterrupt):
            break_off(pins)
