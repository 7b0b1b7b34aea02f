"""`havengate up` with an app that calls out: the way out as a process, as an operator has it."""

from __future__ import annotations

import base64
import http.client
import json
import signal
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.e2e.running import Gateway, short_directory
from tests.gateway.frontends.outside import (
    Outside,
    Tape,
    free_port,
    make_authority,
    outside_host,
)
from tests.havengate.command import run, run_json
from tests.interop.processes import get
from tests.openbao import wait_until

_CONFIGURATION = """\
tenant = "clinic"

[gateway]
port = {port}
admin_port = {admin_port}

[[gateway.routes]]
name = "app"
kind = "elearning"
path = "/"
upstream = "http://127.0.0.1:{app_port}"

[gateway.outbound]
port = {out_port}
ca_file = "{ca_file}"
timeout_s = 5.0
"""


def ways_out(gateway: Gateway) -> list[psutil.Process]:
    """Processes of the way out that live."""
    found = []
    for one in gateway.process.children():
        try:
            if "havengate.outbound_process" in " ".join(one.cmdline()):
                found.append(one)
        except psutil.Error:
            continue
    return found


@dataclass
class Running:
    home: Path
    gateway: Gateway
    outside: Outside
    port: int
    key: str
    ca_file: Path

    @property
    def child(self) -> psutil.Process:
        # One that died is gone for a moment, until the next is started.
        wait_until(lambda: len(ways_out(self.gateway)) == 1, timeout_s=30)
        (found,) = ways_out(self.gateway)
        return found

    def call(self, port: int, *, key: str | None = None, body: bytes | None = None) -> int:
        """The status of a call, or of the tunnel if that was refused."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=15, context=context
        )
        shown = base64.b64encode(f"records:{key or self.key}".encode()).decode()
        connection.set_tunnel("localhost", port, {"Proxy-Authorization": f"Basic {shown}"})
        try:
            connection.request("POST" if body else "GET", "/", body=body)
            answer = connection.getresponse()
            answer.read()
        except OSError as error:
            return int(str(error).split(":")[1].split()[0])
        finally:
            connection.close()
        return answer.status


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with standing() as one:
        yield one


@contextmanager
def standing() -> Iterator[Running]:
    with short_directory() as home:
        ca_file, context = make_authority(home, ("localhost",))
        ports = {"port": free_port(), "admin_port": free_port(), "out_port": free_port()}
        file = home / "havengate.toml"
        text = _CONFIGURATION.format(**ports, app_port=free_port(), ca_file=ca_file)
        file.write_text(text, encoding="utf-8")
        made = run_json(home, "outbound", "add", "records")
        with outside_host(Tape(), context) as outside:
            lines = made["configuration"].replace(
                'host = "api.example.org"', f'host = "localhost"\nport = {outside.port}'
            )
            file.write_text(f"{text}\n{lines}", encoding="utf-8")
            gateway = Gateway(home, port=ports["port"], admin_port=ports["admin_port"])
            gateway.start()
            try:
                yield Running(
                    home=home,
                    gateway=gateway,
                    outside=outside,
                    port=ports["out_port"],
                    key=made["key"],
                    ca_file=home / "var/outbound/ca.pem",
                )
            finally:
                gateway.kill()


def test_an_app_calls_what_is_listed_and_nothing_else(running: Running) -> None:
    assert running.call(running.outside.port, body=b"an order") == 200
    assert [one[3] for one in running.outside.requests] == [b"an order"]
    connections = running.outside.connections
    assert running.call(free_port()) == 403
    assert running.call(running.outside.port, key="wrong") == 407
    assert running.outside.connections == connections


def test_calls_and_refusals_are_in_the_log_that_the_gateway_writes(running: Running) -> None:
    running.call(running.outside.port)
    running.call(free_port())
    words = ""
    for outcome in ("success", "denied"):
        _, found, _ = run(running.home, "audit", "search", "--outcome", outcome, "--json")
        assert json.loads(found)["exchanges"], outcome
        words += found
    assert '"connect"' in words
    assert running.key not in words
    assert running.key not in running.gateway.words


def test_readiness_tells_of_the_way_out(running: Running) -> None:
    assert json.loads(get(f"{running.gateway.admin}/readyz").body)["way out"] == "ok"


def test_apps_of_other_users_can_read_the_authority(running: Running) -> None:
    assert running.ca_file.stat().st_mode & 0o777 == 0o644
    assert running.ca_file.parent.stat().st_mode & 0o777 == 0o755
    assert (running.home / "outbound-records.key").stat().st_mode & 0o777 == 0o600


def test_a_way_out_that_dies_is_started_again(running: Running) -> None:
    before = running.child
    before.kill()
    wait_until(lambda: running.child.pid != before.pid, timeout_s=30)
    wait_until(lambda: is_open(running), timeout_s=30)
    assert running.call(running.outside.port) == 200


def test_a_second_key_for_an_app_is_refused(running: Running) -> None:
    code, _, err = run(running.home, "outbound", "add", "records")
    assert code == 2
    assert "has a key already" in err
    code, _, err = run(running.home, "outbound", "add", "../records")
    assert code == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_way_out_outlives_its_gateway(running: Running, number: signal.Signals) -> None:
    child = running.child
    if number == signal.SIGTERM:
        running.gateway.stop()
        assert not child.is_running()
        running.gateway.start()
        return
    others = [one for one in running.gateway.process.children(recursive=True) if one != child]
    running.gateway.process.kill()
    try:
        wait_until(lambda: not child.is_running(), timeout_s=20)
    finally:
        for one in others:
            if one.is_running():
                one.kill()


def is_open(running: Running) -> bool:
    time.sleep(0.1)
    checks = json.loads(get(f"{running.gateway.admin}/readyz").body)
    return bool(checks["way out"] == "ok")
