"""The fake key server and the real one keep the same contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from keys.ports import KeyWrapper
from keys.transit import TransitKeyWrapper
from keys.vault import VaultClient
from tests.keys.fakes import FakeKeyServer
from tests.keys.wrapper_contract import KeyWrapperContract


class TestFake(KeyWrapperContract):
    @pytest.fixture
    def gateway(self) -> KeyWrapper:
        return FakeKeyServer()

    @pytest.fixture
    def operator(self, gateway: KeyWrapper) -> KeyWrapper:
        return gateway


class TestOpenBao(KeyWrapperContract):
    @pytest.fixture
    def gateway(self, vault: Callable[[str], VaultClient]) -> KeyWrapper:
        return TransitKeyWrapper(vault("gateway"))

    @pytest.fixture
    def operator(self, vault: Callable[[str], VaultClient]) -> KeyWrapper:
        return TransitKeyWrapper(vault("operator"))
