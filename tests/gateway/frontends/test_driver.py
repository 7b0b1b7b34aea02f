"""How one exchange ends when the client leaves or the worker must stop, and one request's edges."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

import pytest

from audit.recorder import Begun
from gateway import metrics
from gateway.core.commands import Failed, OpenUpstream, Signal
from gateway.core.exchange import Summary, exchange
from gateway.core.messages import RequestHead, ResponseHead
from gateway.frontends.driver import Services, drive
from gateway.frontends.ingress import Client, Ingress
from gateway.frontends.upstream import Upstreams
from gateway.routes import compile_routes
from gateway.settings import LimitSettings
from tests.gateway.core.test_exchange import PAGES, pages
from tests.gateway.core.world import clinician, get

# --- Clients that leave, workers that stop --------------------------------------------------------


class _Stream:
    """An app that answers with one piece and then with nothing for a long time."""

    def __init__(self) -> None:
        self.closed = 0
        self.waiting = asyncio.Event()
        self._pieces = [b"first"]

    async def send(self, data: bytes | None) -> Signal | Failed:
        return Signal.DONE

    async def head(self) -> ResponseHead | Failed:
        return ResponseHead(status=200)

    async def receive(self) -> bytes | Signal | Failed:
        if self._pieces:
            return self._pieces.pop()
        self.waiting.set()
        await asyncio.sleep(60)
        raise AssertionError

    async def close(self) -> None:
        self.closed += 1


class _Caller:
    """A client that reads what comes."""

    def __init__(self) -> None:
        self.left = False
        self.broken: bool | None = None

    async def receive_all(self, limit: int) -> bytes | Signal | Failed:
        return b""

    async def receive(self) -> bytes | Signal | Failed:
        return Signal.END

    async def respond(self, head: ResponseHead, body: bytes) -> Signal:
        return Signal.DONE

    async def start(self, head: ResponseHead) -> Signal:
        return Signal.DONE

    async def release(self, data: bytes) -> Signal:
        return Signal.DONE

    async def end(self, broken: bool) -> None:  # noqa: FBT001 - the command's field
        self.broken = broken


def _services(stream: _Stream) -> Services:
    async def given(value: Any) -> Any:
        return value

    def always(value: Any) -> Callable[..., Any]:
        return lambda *_: given(value)

    begun = Begun(request="0" * 32, index=1, act=None, sealed={})  # type: ignore[arg-type]
    parts: dict[str, Any] = {
        "identifier": SimpleNamespace(identify=always(clinician())),
        "facts": SimpleNamespace(),
        "assertions": SimpleNamespace(statement=always(b"a.b.c")),
        "recorder": SimpleNamespace(intent=always(begun), outcome=always(1)),
        "keys": SimpleNamespace(),
        "upstreams": SimpleNamespace(open=always(stream)),
        "pages": SimpleNamespace(),
    }
    return Services(**parts)


async def _interrupted(caller: _Caller, stream: _Stream, *, left: bool) -> asyncio.Task[Summary]:
    steps = exchange(get("/a"), pages(), request="1")
    task = asyncio.create_task(drive(steps, _services(stream), caller))
    await asyncio.wait_for(stream.waiting.wait(), 5)
    caller.left = left
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    return task


async def test_a_client_that_leaves_is_told_apart_from_a_worker_that_stops() -> None:
    caller, stream = _Caller(), _Stream()
    task = await _interrupted(caller, stream, left=True)
    assert not task.cancelled()
    assert task.result().failure == "gateway.client_gone"
    assert caller.broken is True
    assert stream.closed


async def test_an_exchange_that_is_stopped_ends_before_the_cancellation_goes_on() -> None:
    caller, stream = _Caller(), _Stream()
    task = await _interrupted(caller, stream, left=False)
    assert task.cancelled()
    assert caller.broken is True
    assert stream.closed


class _SlowLog:
    """A log that has taken an entry, and takes its time to say so."""

    def __init__(self, slow: str) -> None:
        self.written: list[str] = []
        self.taken = asyncio.Event()
        self.go = asyncio.Event()
        self._slow = slow

    async def intent(self, act: Any) -> Begun:
        await self._write("intent")
        return Begun(request="0" * 32, index=1, act=act, sealed={})

    async def outcome(self, begun: Begun, end: Any) -> int:
        await self._write(f"outcome {end.outcome}")
        return 2

    async def _write(self, what: str) -> None:
        self.written.append(what)
        if what.startswith(self._slow):
            self.taken.set()
            await self.go.wait()


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(
    ("slow", "end"), [("intent", "outcome failed"), ("outcome", "outcome success")]
)
async def test_what_is_being_written_is_written_to_its_end_and_no_intent_stays_open(
    slow: str, end: str, *, left: bool
) -> None:
    caller, stream, log = _Caller(), _Stream(), _SlowLog(slow)
    services = replace(_services(stream), recorder=log)  # type: ignore[arg-type]
    steps = exchange(get("/a"), pages(), request="1")
    task = asyncio.create_task(drive(steps, services, caller))
    await asyncio.wait_for(log.taken.wait(), 5)
    caller.left = left
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    log.go.set()
    await asyncio.wait({task}, timeout=5)
    assert log.written == ["intent", end]
    assert task.cancelled() is not left
    if left:
        assert task.result().failure in {"gateway.client_gone", "gateway.stopping"}
    # Nothing was asked of the app after somebody had given up.
    assert stream.closed == (slow == "outcome")


async def test_a_page_of_our_own_is_answered_to_its_end() -> None:
    log, done = _SlowLog("intent"), []

    async def answer(head: RequestHead, body: bytes) -> Any:
        begun = await log.intent(None)
        await log.outcome(begun, SimpleNamespace(outcome="success"))
        done.append(head.path)
        return Failed(code="gateway.test")

    services = replace(_services(_Stream()), pages=SimpleNamespace(answer=answer))
    steps = exchange(get("/.havengate/sign-in"), pages(), request="1")
    task = asyncio.create_task(drive(steps, services, _Caller()))
    await asyncio.wait_for(log.taken.wait(), 5)
    task.cancel()
    await asyncio.sleep(0)
    log.go.set()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()
    assert log.written == ["intent", "outcome success"]
    assert done == ["/.havengate/sign-in"]


async def test_what_is_open_is_closed_even_if_the_core_breaks() -> None:
    stream = _Stream()

    def steps() -> Any:
        yield OpenUpstream(route=compile_routes([PAGES])[0], head=get("/a"), has_body=False)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await drive(steps(), _services(stream), _Caller())
    assert stream.closed


# --- What the server hands in ---------------------------------------------------------------------


class _Headers(dict[str, str]):
    """Header fields as the server shows them."""


class _Broken:
    """A protocol whose connection is in no state to answer."""

    def response_bytes(self, *_: object) -> None:
        raise RuntimeError("SECRET")

    response_empty = response_bytes


class _App:
    def __init__(self) -> None:
        self.heads: list[RequestHead] = []

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def exchange(self, head: RequestHead, client: Client) -> None:
        self.heads.append(head)


def _scope(client: str) -> Any:
    return SimpleNamespace(
        proto="http",
        method="GET",
        authority=None,
        path="/",
        query_string="",
        headers=_Headers(host="localhost"),
        client=client,
        scheme="https",
        http_version="1.1",
    )


async def _served(ingress: Ingress, client: str) -> None:
    with contextlib.suppress(RuntimeError):
        await ingress.__rsgi__(_scope(client), _Broken())


@pytest.mark.parametrize(
    ("shown", "address"),
    [("192.0.2.7:4711", "192.0.2.7"), ("[2001:db8::7]:4711", "2001:db8::7")],
)
async def test_the_address_of_a_client_is_one_that_the_log_takes(shown: str, address: str) -> None:
    app = _App()
    await _served(Ingress(app, LimitSettings(), port=1), shown)
    assert app.heads[0].client == address
    assert str(ip_address(address)) == address


async def test_a_connection_that_takes_no_answer_keeps_no_place() -> None:
    app = _App()
    ingress = Ingress(app, LimitSettings(concurrent=2), port=1)
    for _ in range(4):
        await _served(ingress, "192.0.2.7:4711")
    assert len(app.heads) == 4


class _Sink:
    def response_bytes(self, *_: object) -> None:
        pass


async def test_what_is_sent_is_counted() -> None:
    class Answering(_App):
        async def exchange(self, head: RequestHead, client: Client) -> None:
            await client.respond(ResponseHead(status=200), b"12345")

    counter = metrics.BYTES.labels("sent")
    before = counter._value.get()
    ingress = Ingress(Answering(), LimitSettings(), port=1)
    await ingress.__rsgi__(_scope("192.0.2.7:4711"), _Sink())
    assert counter._value.get() == before + 5


async def test_an_app_that_does_not_answer_is_counted() -> None:
    counter = metrics.UPSTREAM_FAILURES.labels("pages", "gateway.upstream_unreachable")
    before = counter._value.get()
    route = compile_routes([PAGES])[0]
    upstreams = Upstreams([route])
    assert isinstance(await upstreams.fetch(route, get("/a"), b"", 10), Failed)
    await upstreams.close()
    assert counter._value.get() == before + 1
