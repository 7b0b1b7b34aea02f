"""A federation of real processes that all tests of a run share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.federated.deployment.federation import Running, running
from tests.openbao import RunningServer


@pytest.fixture(scope="session")
def federation(
    openbao: RunningServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """SuperLink and five nodes over TLS. Leave it whole: what a test breaks it mends."""
    with running(openbao, tmp_path_factory.mktemp("federation"), nodes=5) as started:
        yield started
