"""Stores, keepers and where the public data lies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from federated.node.keeper import FileKeeper
from federated.node.store import Store
from tests.federated.node.world import SpiedStore, World


@pytest.fixture
def keeper(tmp_path: Path) -> FileKeeper:
    return FileKeeper(tmp_path / "ring" / "device.keys")


@pytest.fixture
def store(tmp_path: Path, keeper: FileKeeper) -> Iterator[Store]:
    (tmp_path / "ring").mkdir(mode=0o700)
    opened = Store.create(tmp_path / "device.store", keeper)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(__file__).resolve().parents[3].parent / "shared" / "data"
    assert folder.is_dir(), f"{folder} must hold the public data sets that the tests read."
    return folder


@pytest.fixture
def world(tmp_path: Path, keeper: FileKeeper) -> Iterator[World]:
    (tmp_path / "ring").mkdir(mode=0o700, exist_ok=True)
    spied = SpiedStore.create(tmp_path / "device.store", keeper)
    assert isinstance(spied, SpiedStore)
    yield World(tmp_path, spied)
    spied.close()
