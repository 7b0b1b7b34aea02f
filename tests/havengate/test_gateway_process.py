"""What a worker holds on to, and what the parent refuses to begin with."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from havengate import gateway_process
from havengate.configuration import FILE_VARIABLE


async def _nothing(*_: object) -> None:
    pass


def test_a_worker_keeps_its_keys_open_until_its_last_exchange_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []

    @contextmanager
    def keys(*_: object) -> Iterator[object]:
        yield object()
        closed.append("keys")

    file = tmp_path / "havengate.toml"
    file.write_text('tenant = "clinic"\n')
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    monkeypatch.setattr(gateway_process, "open_keys", keys)
    monkeypatch.setattr(gateway_process, "configure", lambda: None)
    monkeypatch.setattr(gateway_process, "foundations", lambda *_: None)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(gc, "set_threshold", lambda *_: None)

    async def stop() -> None:
        closed.append("gateway")

    gateway: Any = SimpleNamespace(start=_nothing, exchange=_nothing, stop=stop)
    monkeypatch.setattr(gateway_process, "Gateway", lambda *_: gateway)
    ingress = gateway_process.load_worker()
    gc.collect()
    assert closed == []
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        ingress.__rsgi_init__(loop)
        ingress.__rsgi_del__(loop)
    assert closed == ["gateway", "keys"]
