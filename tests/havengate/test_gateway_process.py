"""What a worker holds on to, and what the parent refuses to begin with."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.errors import GatewayConfigurationError
from gateway.frontends.admin import Admin
from gateway.settings import RouteSettings
from havengate import gateway_process
from havengate.checking import check_files, readiness, upstream_problem
from havengate.configuration import FILE_VARIABLE, load
from havengate.gateway_process import handed_down, holding_port
from havengate.wiring import Program


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


# --- Before the first connection ------------------------------------------------------------------


def _configured(home: Path) -> Path:
    file = home / "havengate.toml"
    (home / "policies").mkdir()
    (home / "policies" / "own.cedar").write_text("")
    file.write_text('tenant = "clinic"\n[policies]\ndirectory = "policies"\n')
    return file


@pytest.mark.parametrize("open_one", ["havengate.toml", "policies", "policies/own.cedar"])
def test_nothing_starts_on_rules_that_everybody_may_write(tmp_path: Path, open_one: str) -> None:
    file = _configured(tmp_path)
    settings = load(file, {})
    check_files(settings, file)
    (tmp_path / open_one).chmod(0o777)
    with pytest.raises(GatewayConfigurationError, match="everybody on this machine"):
        check_files(settings, file)


def test_a_port_taken_after_it_was_looked_at_is_told_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(GatewayConfigurationError, match="admin_port"):
            Admin(port=port, metrics=lambda: b"")


def test_one_app_that_is_down_does_not_take_the_others_away(tmp_path: Path) -> None:
    with socket.socket() as nobody, socket.socket() as app:
        for one in (nobody, app):
            one.bind(("127.0.0.1", 0))
        app.listen()
        routes = "".join(
            f'[[gateway.routes]]\nname = "{name}"\nkind = "crisis"\npath = "/{name}"\n'
            f'upstream = "http://127.0.0.1:{one.getsockname()[1]}"\n'
            for name, one in (("down", nobody), ("crisis", app))
        )
        file = tmp_path / "havengate.toml"
        file.write_text(f'tenant = "clinic"\n{routes}')
        checks = [
            check
            for check in readiness(load(file, {}), cast("Program", None))
            if check.name.startswith("app ")
        ]
        with Admin(port=0, checks=checks, metrics=lambda: b"") as admin:
            status, _, body = admin.answer("/readyz")
    assert status == 200
    told = json.loads(body)
    assert told["app crisis"] == "ok"
    assert "refuses connections" in told["app down"]


def test_a_ca_file_that_is_none_is_not_taken_for_a_fault_of_the_app(tmp_path: Path) -> None:
    bad = tmp_path / "ca.pem"
    bad.write_text("no certificate")
    route = RouteSettings(name="app", kind="ehr", upstream="https://127.0.0.1:1", ca_file=str(bad))
    assert "Correct ca_file" in (upstream_problem(route) or "")


# --- One configuration, one gateway ---------------------------------------------------------------


def test_workers_that_start_later_have_the_configuration_of_the_start(tmp_path: Path) -> None:
    file = tmp_path / "havengate.toml"
    file.write_text(
        'tenant = "clinic"\n[gateway]\nport = 9443\n[gateway.identity.purposes]\nnurse = "TREAT"\n'
        '[[gateway.routes]]\nname = "app"\nkind = "ehr"\ncontent = "fhir"\n'
        'upstream = "http://127.0.0.1:1"\nca_file = "ca.pem"\n'
        'fields = [{ path = "Patient.telecom.value", seal = true }]\n'
        '[policies]\ndirectory = "policies"\n'
    )
    environ = {"HAVENGATE_GATEWAY__WORKERS": "3"}
    settings = load(file, environ)
    kept = tmp_path / "run" / "log.sock.configuration.json"
    with handed_down(settings, kept):
        file.write_text('tenant = "another"\n')
        assert load(kept, environ) == settings
        assert load(kept, {}) == settings
        assert kept.stat().st_mode & 0o777 == 0o600
    assert not kept.exists()


def test_what_is_handed_down_replaces_what_a_killed_gateway_left(tmp_path: Path) -> None:
    file = tmp_path / "havengate.toml"
    file.write_text('tenant = "clinic"\n')
    kept = tmp_path / "log.sock.configuration.json"
    for left in (kept, kept.with_suffix(".new")):
        left.write_text("{")
        left.chmod(0o644)
    with handed_down(load(file, {}), kept):
        assert load(kept, {}).tenant == "clinic"
        assert kept.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1"])  # noqa: S104 - as operators write
def test_two_gateways_of_one_user_do_not_share_a_port(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as found:
        try:
            found.bind((host, 0))
        except OSError:
            assert ":" in host  # a machine without IPv6
            return
        port = found.getsockname()[1]
    with holding_port(host, port, "gateway.port"):
        # Our own workers may.
        for _ in range(2):
            with socket.socket(family) as worker:
                for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                    worker.setsockopt(socket.SOL_SOCKET, option, 1)
                worker.bind((host, port))
                worker.listen()
                with (
                    pytest.raises(GatewayConfigurationError, match=r"gateway\.port"),
                    holding_port(host, port, "gateway.port"),
                ):
                    pass
        # Nobody listens yet, and still nobody else gets it.
        with (
            pytest.raises(GatewayConfigurationError, match="Stop what does"),
            holding_port(host, port, "gateway.port"),
        ):
            pass
    with holding_port(host, port, "gateway.port"):
        pass


def test_a_port_is_had_again_at_once_after_a_gateway_has_ended() -> None:
    with socket.socket() as server:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            server.setsockopt(socket.SOL_SOCKET, option, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            # Who closes first keeps the address for a while.
            accepted.close()
            client.recv(1)
    with holding_port("127.0.0.1", port, "gateway.port"):
        pass
