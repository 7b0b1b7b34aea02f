from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway import metrics
from gateway.frontends.admin import Admin, Check
from tests.gateway.frontends.served import ROOT


def ask(admin: Admin, path: str, host: str = "127.0.0.1", method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", admin.port, timeout=5)
    try:
        connection.request(method, path, headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def admin(*checks: Check, count: Any = lambda: b"# none\n") -> Admin:
    return Admin(port=0, checks=checks, metrics=count)


@pytest.fixture
def plain() -> Iterator[Admin]:
    with admin() as one:
        yield one


def test_says_that_it_lives_while_nothing_is_ready() -> None:
    with admin(Check(name="keys", run=lambda: "sealed: run `havengate keys unseal`")) as one:
        assert ask(one, "/healthz") == (200, b"ok\n")
        status, body = ask(one, "/readyz")
    assert status == 503
    assert json.loads(body) == {"keys": "sealed: run `havengate keys unseal`"}


def test_is_ready_when_all_checks_pass() -> None:
    checks = [Check(name=name, run=lambda: None) for name in ("keys", "log", "rules")]
    with admin(*checks) as one:
        status, body = ask(one, "/readyz")
    assert (status, set(json.loads(body).values())) == (200, {"ok"})


def test_a_check_that_raises_fails_and_says_nothing_secret() -> None:
    def raises() -> None:
        raise ValueError("postgres://user:password@host")

    with admin(Check(name="directory", run=raises)) as one:
        status, body = ask(one, "/readyz")
    assert status == 503
    assert json.loads(body) == {"directory": "failed (ValueError)"}


def test_a_check_that_hangs_fails_in_time_and_is_not_started_again() -> None:
    started: list[int] = []
    release = threading.Event()

    def hangs() -> None:
        started.append(1)
        release.wait(10)

    good = Check(name="log", run=lambda: None)
    with admin(Check(name="keys", run=hangs, timeout_s=0.1), good) as one:
        for _ in range(3):
            before = time.monotonic()
            status, body = ask(one, "/readyz")
            assert status == 503
            assert json.loads(body) == {"keys": "no answer within 0.1 s", "log": "ok"}
            assert time.monotonic() - before < 3
        assert ask(one, "/healthz")[0] == 200
        release.set()
    assert len(started) == 1


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", ""])
def test_refuses_other_names_than_loopback(plain: Admin, host: str) -> None:
    assert ask(plain, "/metrics", host=host)[0] == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1:8444", "[::1]:8444"])
def test_accepts_the_names_of_loopback(plain: Admin, host: str) -> None:
    assert ask(plain, "/metrics", host=host)[0] == 200


def test_listens_on_loopback_only(plain: Admin) -> None:
    assert plain._server.server_address[0] == "127.0.0.1"


def test_knows_three_paths_and_one_method(plain: Admin) -> None:
    assert ask(plain, "/")[0] == 404
    assert ask(plain, "/healthz", method="POST")[0] == 501


def test_metrics_that_break_are_an_error_without_details() -> None:
    def breaks() -> bytes:
        raise RuntimeError("SECRET")

    with admin(count=breaks) as one:
        status, body = ask(one, "/metrics")
    assert status == 500
    assert b"SECRET" not in body


_COUNTS = """
from gateway import metrics
metrics.exchanged(service="ehr", action="read", status=204, decision="allow", failure=None,
                  duration_s=0.02)
metrics.exchanged(service="ehr", action="read", status=502, decision="allow",
                  failure="gateway.upstream_broken", duration_s=0.02)
metrics.IN_FLIGHT.inc()
"""


def test_adds_up_what_workers_counted_and_forgets_what_dead_ones_had_in_flight(
    tmp_path: Path,
) -> None:
    for _ in range(2):
        subprocess.run(
            [sys.executable, "-c", _COUNTS],
            cwd=ROOT,
            env={**os.environ, metrics.DIRECTORY_VARIABLE: str(tmp_path)},
            check=True,
        )
    text = metrics.exposition(tmp_path).decode()
    exchanges = (
        'havengate_exchanges_total{action="read",decision="allow",service="ehr",status="2xx"} 2.0'
    )
    assert exchanges in text
    assert 'havengate_failures_total{code="gateway.upstream_broken"} 2.0' in text
    assert 'havengate_exchange_duration_seconds_count{service="ehr"} 4.0' in text
    assert "havengate_exchanges_in_flight 1.0" not in text
    assert "havengate_exchanges_in_flight 2.0" not in text
