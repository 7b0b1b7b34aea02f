"""Carries out what the core commands. It decides nothing and never raises into the core.

One `Services` per process, one `Client` per exchange. Every failure becomes a `Failed` with a
stable code; what nobody foresaw is told to the operational log by its class only, because its text
may hold what must not be there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from audit.errors import AuditError
from audit.recorder import AsyncRecorder
from gateway.core import commands
from gateway.core.commands import Answer, Command, Facts, Failed, Fetched, Recorded, Signal
from gateway.core.enforcement import Steps
from gateway.core.exchange import Summary
from gateway.core.messages import RequestHead, ResponseHead
from gateway.errors import BadRequestError, GatewayError
from gateway.identity.model import Identified, NotIdentified
from gateway.routes import Route
from keys.errors import KeysError

_log = structlog.get_logger("gateway")


class Identifier(Protocol):
    """Finds out who asks (`gateway.identity`)."""

    async def identify(self, head: RequestHead, route: Route) -> Identified | NotIdentified:
        """Raises a `GatewayError`; a `BadRequestError` for what the client must change."""
        ...


class FactsSource(Protocol):
    """Knows relations and consents (`gateway.facts`)."""

    async def load(
        self, route: Route, identified: Identified, patients: frozenset[str]
    ) -> Facts | Failed:
        """Facts about all of the patients, or a failure."""
        ...


class Assertions(Protocol):
    """Signs statements about who asks (`gateway.identity.assertion`)."""

    async def statement(self, route: Route, identified: Identified) -> bytes:
        """A compact JWT. Raises a `KeysError`."""
        ...


class Keys(Protocol):
    """Brings keys into memory."""

    async def load(self, persons: frozenset[str], texts: tuple[str, ...]) -> None:
        """Raises a `KeysError`."""
        ...

    async def make_ready(self, name: tuple[str, str] | None) -> None:
        """See `commands.MakeReady`. Raises a `KeysError`."""
        ...


class UpstreamStream(Protocol):
    """One request to an app, in pieces (`gateway.frontends.upstream`)."""

    async def send(self, data: bytes | None) -> Signal | Failed:
        """See `commands.SendUpstream`."""
        ...

    async def head(self) -> ResponseHead | Failed:
        """See `commands.ReceiveHead`."""
        ...

    async def receive(self) -> bytes | Signal | Failed:
        """See `commands.ReceiveUpstream`."""
        ...

    async def close(self) -> None:
        """Drop it. May be called more than once."""
        ...


class Upstreams(Protocol):
    """Talks to the apps (`gateway.frontends.upstream`)."""

    async def fetch(
        self, route: Route, head: RequestHead, body: bytes, limit: int
    ) -> Fetched | Failed:
        """See `commands.Fetch`."""
        ...

    async def open(
        self,
        route: Route,
        head: RequestHead,
        has_body: bool,  # noqa: FBT001 - the command's fields in order
    ) -> UpstreamStream | Failed:
        """See `commands.OpenUpstream`."""
        ...


class OwnPages(Protocol):
    """The gateway's own pages (`gateway.identity.pages`)."""

    async def answer(self, head: RequestHead, body: bytes) -> Fetched:
        """Answer a request below `/.havengate/`."""
        ...


class Client(Protocol):
    """The client's side of one exchange, given by the frontend."""

    @property
    def left(self) -> bool:
        """Whether a cancellation means no more than that this client has gone away."""
        ...

    async def receive_all(self, limit: int) -> bytes | Signal | Failed:
        """See `commands.ReceiveAll`."""
        ...

    async def receive(self) -> bytes | Signal | Failed:
        """See `commands.Receive`."""
        ...

    async def respond(self, head: ResponseHead, body: bytes) -> Signal:
        """See `commands.Respond`."""
        ...

    async def start(self, head: ResponseHead) -> Signal:
        """See `commands.StartResponse`."""
        ...

    async def release(self, data: bytes) -> Signal:
        """See `commands.Release`."""
        ...

    async def end(self, broken: bool) -> None:  # noqa: FBT001 - the command's field
        """See `commands.EndResponse`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What all exchanges of a process share."""

    identifier: Identifier
    facts: FactsSource
    assertions: Assertions
    recorder: AsyncRecorder
    keys: Keys
    upstreams: Upstreams
    pages: OwnPages


async def drive(steps: Steps[Summary], services: Services, client: Client) -> Summary:
    """Run one exchange to its end.

    A cancellation is heard as a failure of the command in progress; the exchange still ends in the
    log, and then the cancellation goes on. That of a client who left ends here. What is being
    written into the log is written to its end first, so that the core knows of every intent that
    is there: the next command then fails in place of this one.
    """
    run = _Run(services, client)
    answer: Answer | None = None
    cancelled: asyncio.CancelledError | None = None
    try:
        while True:
            try:
                command = next(steps) if answer is None else steps.send(answer)
            except StopIteration as stop:
                cancelled = cancelled or run.unheard()
                if cancelled is not None:
                    raise cancelled from None
                summary: Summary = stop.value
                return summary
            try:
                answer = await run.perform(command)
            except asyncio.CancelledError as error:
                if client.left:
                    _hear_no_more_of_it()
                    answer = Failed(code="gateway.client_gone", who="caller")
                else:
                    cancelled = error
                    answer = Failed(code="gateway.stopping", who="operator")
    finally:
        await run.close()


def _hear_no_more_of_it() -> None:
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()


class _Run:
    """One exchange: its client, and the app's stream if there is one."""

    def __init__(self, services: Services, client: Client) -> None:
        self._services = services
        self._client = client
        self._stream: UpstreamStream | None = None
        #: A cancellation that came while something was written that had to be written to its end.
        self._late: asyncio.CancelledError | None = None

    async def perform(self, command: Command) -> Answer:
        if isinstance(command, _TO_THE_END):
            return await self._to_the_end(self._answer(command))
        if self._late is not None:
            late, self._late = self._late, None
            raise late
        return await self._answer(command)

    def unheard(self) -> asyncio.CancelledError | None:
        """A cancellation that no command has failed for, unless it means only that he left."""
        late, self._late = self._late, None
        if late is not None and self._client.left:
            _hear_no_more_of_it()
            return None
        return late

    async def _to_the_end(self, answer: Coroutine[Any, Any, Answer]) -> Answer:
        """Wait for it whatever comes; a cancellation is kept for the next command."""
        task = asyncio.ensure_future(answer)
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError as error:
                self._late = error
        return task.result()

    async def _answer(self, command: Command) -> Answer:
        try:
            return await _PERFORM[type(command)](self, command)
        except BadRequestError as error:
            return Failed(code=error.code, who="caller", message=str(error))
        except (GatewayError, KeysError, AuditError) as error:
            name = type(command).__name__
            _log.warning("gateway.command_failed", command=name, **error.diagnostics())
            return Failed(code=error.code)
        except Exception as error:  # noqa: BLE001 - it must not get past the core
            _log.error(
                "gateway.command_broke", command=type(command).__name__, error=type(error).__name__
            )
            return Failed(code="gateway.internal")

    async def close(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            await stream.close()

    async def identify(self, command: commands.Identify) -> Answer:
        return await self._services.identifier.identify(command.head, command.route)

    async def load_facts(self, command: commands.LoadFacts) -> Answer:
        load = self._services.facts.load
        return await load(command.route, command.identified, command.patients)

    async def make_statement(self, command: commands.Assert) -> Answer:
        return await self._services.assertions.statement(command.route, command.identified)

    async def record_intent(self, command: commands.RecordIntent) -> Answer:
        return Recorded(begun=await self._services.recorder.intent(command.act))

    async def record_outcome(self, command: commands.RecordOutcome) -> Answer:
        await self._services.recorder.outcome(command.begun, command.end)
        return Signal.DONE

    async def load_keys(self, command: commands.LoadKeys) -> Answer:
        await self._services.keys.load(command.persons, command.texts)
        return Signal.DONE

    async def make_ready(self, command: commands.MakeReady) -> Answer:
        await self._services.keys.make_ready(command.name)
        return Signal.DONE

    async def receive_all(self, command: commands.ReceiveAll) -> Answer:
        return await self._client.receive_all(command.limit)

    async def receive(self, command: commands.Receive) -> Answer:
        del command
        return await self._client.receive()

    async def respond(self, command: commands.Respond) -> Answer:
        return await self._client.respond(command.head, command.body)

    async def start_response(self, command: commands.StartResponse) -> Answer:
        return await self._client.start(command.head)

    async def release(self, command: commands.Release) -> Answer:
        return await self._client.release(command.data)

    async def end_response(self, command: commands.EndResponse) -> Answer:
        await self._client.end(command.broken)
        return Signal.DONE

    async def fetch(self, command: commands.Fetch) -> Answer:
        fetch = self._services.upstreams.fetch
        return await fetch(command.route, command.head, command.body, command.limit)

    async def open_upstream(self, command: commands.OpenUpstream) -> Answer:
        opened = await self._services.upstreams.open(command.route, command.head, command.has_body)
        if isinstance(opened, Failed):
            return opened
        self._stream = opened
        return Signal.DONE

    async def send_upstream(self, command: commands.SendUpstream) -> Answer:
        return await self._opened().send(command.data)

    async def receive_head(self, command: commands.ReceiveHead) -> Answer:
        del command
        return await self._opened().head()

    async def receive_upstream(self, command: commands.ReceiveUpstream) -> Answer:
        del command
        return await self._opened().receive()

    async def close_upstream(self, command: commands.CloseUpstream) -> Answer:
        del command
        await self.close()
        return Signal.DONE

    async def answer_own(self, command: commands.AnswerOwn) -> Answer:
        return await self._services.pages.answer(command.head, command.body)

    def _opened(self) -> UpstreamStream:
        if self._stream is None:
            raise RuntimeError("No request to the app is open.")
        return self._stream


#: What writes entries of its own included. Given up in the middle, an intent would stay open.
_TO_THE_END = (commands.RecordIntent, commands.RecordOutcome, commands.AnswerOwn)

type _Performer = Callable[[_Run, Any], Awaitable[Answer]]

_PERFORM: dict[type, _Performer] = {
    commands.Identify: _Run.identify,
    commands.LoadFacts: _Run.load_facts,
    commands.Assert: _Run.make_statement,
    commands.RecordIntent: _Run.record_intent,
    commands.RecordOutcome: _Run.record_outcome,
    commands.LoadKeys: _Run.load_keys,
    commands.MakeReady: _Run.make_ready,
    commands.ReceiveAll: _Run.receive_all,
    commands.Receive: _Run.receive,
    commands.Respond: _Run.respond,
    commands.StartResponse: _Run.start_response,
    commands.Release: _Run.release,
    commands.EndResponse: _Run.end_response,
    commands.Fetch: _Run.fetch,
    commands.OpenUpstream: _Run.open_upstream,
    commands.SendUpstream: _Run.send_upstream,
    commands.ReceiveHead: _Run.receive_head,
    commands.ReceiveUpstream: _Run.receive_upstream,
    commands.CloseUpstream: _Run.close_upstream,
    commands.AnswerOwn: _Run.answer_own,
}
