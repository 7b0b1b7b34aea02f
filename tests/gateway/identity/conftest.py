"""What tests of identity share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.identity.workbench import Bench, Browser, bench


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Bench]:
    """One gateway process."""
    made = bench(tmp_path)
    yield made
    made.identity.close()


@pytest.fixture
def browser(one: Bench) -> Browser:
    return Browser(one)
