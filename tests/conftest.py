"""What all tests share: a real OpenBao for each worker, and no silent skips in CI."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack

import pytest

from keys.vault import VaultClient
from tests.openbao import RunningServer, running_server


@pytest.fixture(scope="session")
def openbao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that all tests of this worker share. Leave it running and unsealed."""
    with running_server(tmp_path_factory.mktemp("openbao")) as server:
        yield server


@pytest.fixture(scope="session")
def vault(openbao: RunningServer) -> Iterator[Callable[[str], VaultClient]]:
    """Return one client for each role: `vault("gateway")`."""
    clients: dict[str, VaultClient] = {}
    with ExitStack() as stack:

        def client(role: str) -> VaultClient:
            if role not in clients:
                clients[role] = stack.enter_context(openbao.client(role))
            return clients[role]

        yield client


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure where CI=true: there, everything that tests need is installed."""
    report = yield
    if not hasattr(report, "wasxfail"):
        _forbid_skip(report, item.nodeid)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Do the same for a module that skips itself as a whole."""
    report = yield
    _forbid_skip(report, collector.nodeid)
    return report


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport, name: str) -> None:
    if os.environ.get("CI") == "true" and report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{name} was skipped, which CI does not allow: {reason}"
