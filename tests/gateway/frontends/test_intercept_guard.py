"""Every hook of mitmproxy fails closed: one that raises, hangs or is unknown lets nothing pass."""

from __future__ import annotations

import asyncio
import http.client
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    # mitmproxy's filter language is written with names that pyparsing deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    import mitmproxy.addons.proxyserver  # noqa: F401

from mitmproxy import hooks
from mitmproxy.connection import Client
from mitmproxy.proxy import server_hooks

from gateway.frontends import intercept_guard
from gateway.frontends.intercept import Intercept
from gateway.frontends.intercept_guard import (
    HOOKS,
    MAX_UNDEALT_BYTES,
    FailClosedAddons,
    Lead,
    RefusedHookError,
    client_of,
)
from gateway.frontends.intercept_hooks import TLS, WayOut
from keys.vault import VaultClient
from tests.gateway.frontends.outside import bench

#: Hooks of the proxy itself, which no data goes through, and one of mitmproxy's own log.
LIFE = {"load", "configure", "running", "done", "update", "add_log"}
#: Every hook that mitmproxy calls between the first byte of a call that is let out and its answer.
CALLED = (
    "client_connected", "next_layer", "http_connect", "http_connected", "tls_clienthello",
    "tls_start_client", "tls_established_client", "requestheaders", "server_connect",
    "server_connected", "tls_start_server", "tls_established_server", "request", "responseheaders",
)  # fmt: skip
#: Before these have agreed nothing has gone out.
BEFORE_OUT = CALLED[: CALLED.index("tls_established_server") + 1]


class Saboteur:
    """An addon of which one hook does what it should not."""

    def __init__(self, hook: str, deed: Callable[[], Any]) -> None:
        self.reached = 0

        def sabotage(_data: Any) -> Any:
            self.reached += 1
            return deed()

        setattr(self, hook, sabotage)


def sabotaged(proxy: Intercept, hook: str, deed: Callable[[], Any]) -> Saboteur:
    """Put the saboteur first, where an exception would keep all others from being asked."""
    saboteur = Saboteur(hook, deed)
    attach = proxy._way.attach

    def attached(master: Any) -> None:
        attach(master)
        master.guard.add(saboteur)

    proxy._way.attach = attached  # type: ignore[method-assign]
    return saboteur


def explode() -> None:
    raise RuntimeError("a mistake that nobody foresaw")


def test_every_hook_of_mitmproxy_is_either_answered_or_refused() -> None:
    # All that may be answered is what the way out or mitmproxy's own parts have answers for.
    known = set(hooks.all_hooks)
    assert known >= HOOKS
    refused = known - HOOKS - LIFE
    assert refused == {
        "tcp_start", "tcp_message", "tcp_end", "tcp_error",
        "udp_start", "udp_message", "udp_end", "udp_error",
        "dns_request", "dns_response", "dns_error",
        "websocket_start", "websocket_message", "websocket_end",
        "quic_start_client", "quic_start_server", "socks5_auth", "http_connect_upstream",
    }  # fmt: skip
    answered = {
        name for name in HOOKS if callable(getattr(WayOut, name, None) or getattr(TLS, name, None))
    }
    assert set(CALLED) - {"http_connected", "next_layer", "tls_established_client"} <= answered


@pytest.mark.parametrize("hook", CALLED)
def test_a_hook_that_raises_lets_nothing_pass(
    vault: Callable[[str], VaultClient], tmp_path: Path, hook: str
) -> None:
    saboteurs: list[Saboteur] = []
    with bench(
        tmp_path,
        vault("gateway"),
        prepare=lambda proxy: saboteurs.append(sabotaged(proxy, hook, explode)),
    ) as made:
        with pytest.raises((OSError, http.client.HTTPException)):
            made.call("POST", "/", body=b"secret")
            # Not reached: a whole answer would have been one too many.
        assert saboteurs[0].reached
        if hook in BEFORE_OUT:
            assert made.outside.requests == []
        made.quiet()
        # What follows on a new connection is not spoilt by it.
        assert made.proxy.alive


def test_an_error_hook_that_raises_lets_nothing_pass(
    vault: Callable[[str], VaultClient], tmp_path: Path
) -> None:
    with bench(
        tmp_path,
        vault("gateway"),
        prepare=lambda proxy: sabotaged(proxy, "error", explode),
    ) as made:
        with pytest.raises((OSError, http.client.HTTPException)):
            made.call(path="/drop")
        made.quiet()
        assert made.log.entries[-1].outcome == "failed"


def test_a_hook_that_hangs_lets_nothing_pass(
    vault: Callable[[str], VaultClient], tmp_path: Path
) -> None:
    with bench(
        tmp_path,
        vault("gateway"),
        timeout_s=1.0,
        prepare=lambda proxy: sabotaged(proxy, "requestheaders", lambda: asyncio.sleep(60)),
    ) as made:
        with pytest.raises((OSError, http.client.HTTPException)):
            made.call("POST", "/", body=b"secret")
        assert made.outside.connections == 0


@pytest.mark.parametrize("method", ["upload", "download"])
def test_a_piece_of_a_body_at_which_something_raises_does_not_pass(
    vault: Callable[[str], VaultClient],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    monkeypatch.setattr(
        f"gateway.frontends.intercept_calls.Crossing._{method}", lambda *_: explode()
    )
    with bench(tmp_path, vault("gateway")) as made:
        with pytest.raises((OSError, http.client.HTTPException)):
            made.call("POST", "/", body=b"secret")
        assert made.outside.requests == [] or method == "download"
        made.quiet()


class Proxyserver:
    def __init__(self) -> None:
        self.connections: dict[str, Any] = {}


class Master:
    """As much of mitmproxy's master as the guard needs."""

    def __init__(self) -> None:
        self.options = self
        self.changed = self
        self.proxyserver = Proxyserver()
        self.stopped = False

    def connect(self, _listener: Any) -> None:
        """Take a listener for options."""

    def shutdown(self) -> None:
        self.stopped = True


class Side:
    """One connection of mitmproxy's, and whether it was cut."""

    def __init__(self) -> None:
        self.cut = False
        self.writer = self
        self.transport = self
        self.transports = {"client": self}
        self.handler = None

    def abort(self) -> None:
        self.cut = True


def guard() -> tuple[FailClosedAddons, Client, Side]:
    master: Any = Master()
    made = FailClosedAddons(master, hook_timeout_s=1.0)
    client = Client(peername=("127.0.0.1", 1), sockname=("127.0.0.1", 2))
    side = Side()
    master.proxyserver.connections[client.id] = side
    return made, client, side


def messages(client: Client) -> dict[str, Any]:
    """For every hook something like what mitmproxy would tell it."""
    from mitmproxy import dns, tcp, tls, udp
    from mitmproxy.net.dns import types  # noqa: F401
    from mitmproxy.options import Options
    from mitmproxy.proxy.context import Context
    from mitmproxy.proxy.layer import NextLayer
    from mitmproxy.test import tflow

    ctx = Context(client, Options())
    flow = tflow.tflow(client_conn=client, ws=False)
    data = tls.TlsData(client, ctx)
    hello: Any = object()
    made: dict[str, Any] = {
        "client_connected": client,
        "client_disconnected": client,
        "next_layer": NextLayer(ctx),
        "tls_clienthello": tls.ClientHelloData(ctx, hello),
    }
    for name in hooks.all_hooks:
        kind = name.partition("_")[0]
        if name.startswith("server_"):
            made[name] = server_hooks.ServerConnectionHookData(server=ctx.server, client=client)
        elif kind in {"tls", "quic"}:
            made.setdefault(name, data)
        elif kind == "tcp":
            made[name] = tcp.TCPFlow(client, ctx.server)
        elif kind == "udp":
            made[name] = udp.UDPFlow(client, ctx.server)
        elif kind == "dns":
            made[name] = dns.DNSFlow(client, ctx.server)
        else:
            made.setdefault(name, flow)
    return made


def event(name: str, message: Any) -> Any:
    class Event:
        def args(self) -> list[Any]:
            return [message]

    made = Event()
    made.name = name  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("name", sorted(set(hooks.all_hooks) - LIFE))
async def test_whichever_hook_raises_its_connection_is_cut(name: str) -> None:
    made, client, side = guard()
    made.chain = [Saboteur(name, explode)]
    await made.handle_lifecycle(event(name, messages(client)[name]))
    assert side.cut


@pytest.mark.parametrize("name", [*sorted(set(hooks.all_hooks) - HOOKS - LIFE), "a_later_hook"])
async def test_a_hook_that_nobody_foresaw_cuts_its_connection(name: str) -> None:
    made, client, side = guard()
    await made.handle_lifecycle(event(name, messages(client).get(name, client)))
    assert side.cut


async def test_what_belongs_to_no_connection_stops_the_proxy() -> None:
    made, _, _ = guard()
    await made.handle_lifecycle(event("requestheaders", object()))
    assert made.master.stopped
    with pytest.raises(RefusedHookError):
        client_of(object())


class Endless:
    """A side that always has more."""

    def __init__(self) -> None:
        self.read_bytes = 0

    async def read(self, size: int) -> bytes:
        self.read_bytes += size
        return b"x" * size


async def test_no_more_is_read_than_is_dealt_with() -> None:
    lead, endless = Lead(), Endless()
    reader = lead.take(endless)

    async def read_on() -> None:
        while await reader.read(65_535):
            pass

    task = asyncio.ensure_future(read_on())
    for _ in range(20):
        await asyncio.sleep(0)
    assert endless.read_bytes <= MAX_UNDEALT_BYTES + 65_535
    held = endless.read_bytes
    with lead.working():
        lead.progressed()
        for _ in range(20):
            await asyncio.sleep(0)
        assert endless.read_bytes <= held + 65_535
    for _ in range(5):
        await asyncio.sleep(0)
    assert endless.read_bytes > held
    lead.sever()
    await asyncio.wait_for(task, 1)


async def test_one_side_that_runs_ahead_does_not_hold_the_other() -> None:
    lead = Lead()
    ahead, other = lead.take(Endless()), lead.take(Endless())
    while ahead.undealt <= intercept_guard.MAX_UNDEALT_BYTES:
        await ahead.read(65_535)
    assert await asyncio.wait_for(other.read(10), 1)


def test_the_last_hook_raises_only_after_the_outcome_is_durable(
    vault: Callable[[str], VaultClient], tmp_path: Path
) -> None:
    with bench(
        tmp_path,
        vault("gateway"),
        prepare=lambda proxy: sabotaged(proxy, "response", explode),
    ) as made:
        made.log.before = lambda stage: explode() if stage == "outcome" else None
        with pytest.raises((OSError, http.client.HTTPException)):
            made.call("HEAD", "/")
