"""The process on a device: asks the SuperLink for messages, answers with what is installed here.

It speaks Flower's Fleet protocol (`federated.deployment.fleet`) and runs Havengate's own ClientApp
in this warm process. **Nothing that arrives is executed**: the bundle of a run is not even fetched;
its hash must be that of the app installed here, else every message of the run is refused. What a
message asks is decided by the service behind the ClientApp (`federated.node.service`): the guard
first, then consent, budget and rows.

Looks begin 100 to 400 ms apart while a round is on, and up to a second after that; our SuperLink
keeps a look open for as long where nothing has come, and answers at once when it does. A SuperLink
that is away or was restarted is tried again, with growing pauses, until SIGTERM.
"""

from __future__ import annotations

import secrets
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import structlog
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from federated.app.bundle import installed_bundle
from federated.app.client_app import Configuration, client_app
from federated.deployment.fleet import FleetAccess, FleetConnection, heartbeats
from federated.errors import DeploymentError, FederatedError, ProtocolError, RefusedError

_LOG = structlog.get_logger("federated.agent")
_KNOWN_RUNS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What the SuperLink says a run is. A claim, to be held against the signed study."""

    run_id: int
    configuration: Mapping[str, bool | int | float | str]


class Service(Protocol):
    """What answers on this device. One call at a time."""

    def respond(self, facts: RunFacts, stage: str, payload: bytes) -> bytes:
        """Answer one stage. Raises `FederatedError`: then the coordinator hears only `refused`."""
        ...

    def tidy(self) -> None:
        """Called when nothing is to be done: give up a round that nobody goes on with."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Pauses between looks, in seconds.

    The first after a message, the longest while a round may be on (`round_s` after the last
    message), the longest in a quiet time, the growth between them, and the longest between attempts
    to reach a SuperLink that is away.
    """

    first_s: float = 0.1
    in_round_s: float = 0.4
    round_s: float = 30.0
    longest_s: float = 1.0
    growth: float = 1.4
    away_s: float = 10.0


class Agent:
    """One node. `run` returns after `stop`, which any thread and any signal handler may call."""

    def __init__(self, access: FleetAccess, service: Service, *, pace: Pace | None = None) -> None:
        self._access = access
        self._service = service
        self._pace = pace or Pace()
        self._stopping = threading.Event()
        self._runs: OrderedDict[int, RunFacts | None] = OrderedDict()

    def stop(self, *_: object) -> None:
        """Finish the message in hand, if any, and end."""
        self._stopping.set()

    def run(self) -> None:
        """Serve until stopped. Raises nothing that the network does."""
        pause_s = self._pace.first_s
        while not self._stopping.is_set():
            connection = FleetConnection(self._access)
            try:
                node_id = connection.activate()
                _LOG.info("federated.agent.connected", node_id=node_id)
                pause_s = self._pace.first_s
                self._serve(connection, node_id)
            except DeploymentError as error:
                _LOG.warning("federated.agent.away", error=str(error))
            finally:
                connection.close()
            # Not all at once after a restart of the SuperLink.
            self._stopping.wait(pause_s * (0.5 + secrets.randbelow(1000) / 1000))
            pause_s = min(pause_s * 2, self._pace.away_s)

    def _serve(self, connection: FleetConnection, node_id: int) -> None:
        lost = threading.Event()
        pause_s, last = self._pace.first_s, float("-inf")
        with heartbeats(connection, lost):
            while not self._stopping.is_set() and not lost.is_set():
                began = time.monotonic()
                if self._one(connection, node_id):
                    pause_s, last = self._pace.first_s, time.monotonic()
                    continue
                # A SuperLink that kept the question open for so long has waited in our place.
                self._stopping.wait(max(0.0, pause_s - (time.monotonic() - began)))
                in_round = time.monotonic() - last < self._pace.round_s
                longest_s = self._pace.in_round_s if in_round else self._pace.longest_s
                pause_s = min(pause_s * self._pace.growth, longest_s)

    def _one(self, connection: FleetConnection, node_id: int) -> bool:
        """Answer the next message; return whether there was one. Raises `DeploymentError` alone."""
        try:
            return self._next(connection, node_id)
        except DeploymentError:
            raise
        except FederatedError as error:
            _LOG.warning("federated.agent.malformed", **error.diagnostics())
            return isinstance(error, ProtocolError)
        except Exception as error:  # noqa: BLE001 - a node that dies takes all its people with it
            # What Flower makes of a hostile answer is of any kind. It pauses as if nothing came.
            _LOG.error("federated.agent.bug", error=type(error).__name__)
            return False

    def _next(self, connection: FleetConnection, node_id: int) -> bool:
        message = connection.pull()
        if message is None:
            self._service.tidy()
            return False
        connection.push(self._answer(connection, node_id, message))
        return True

    def _answer(self, connection: FleetConnection, node_id: int, message: Message) -> Message:
        run_id = message.metadata.run_id
        facts = self._facts(connection, run_id)
        if facts is None:
            _LOG.warning("federated.agent.other_code", run_id=run_id)
            return _refusal(message)

        def respond(run_id: int, configuration: Configuration, stage: str, payload: bytes) -> bytes:
            facts = RunFacts(run_id=run_id, configuration=configuration)
            return self._service.respond(facts, stage, payload)

        context = Context(
            run_id=run_id,
            node_id=node_id,
            node_config={},
            state=RecordDict(),
            run_config=dict(facts.configuration),
        )
        try:
            return client_app(respond)(message, context)
        except RefusedError as error:
            _LOG.info("federated.agent.refused", rule=error.rule)
        except FederatedError as error:
            _LOG.warning("federated.agent.failed", **error.diagnostics())
        except (ValueError, TypeError):
            _LOG.warning("federated.agent.malformed")
        except Exception as error:  # noqa: BLE001 - a node that dies takes all its people with it
            # Never the text: it may hold what the service was working on.
            _LOG.error("federated.agent.bug", error=type(error).__name__)
        return _refusal(message)

    def _facts(self, connection: FleetConnection, run_id: int) -> RunFacts | None:
        """Return what a run is, or None if it is not of the app that is installed here."""
        if run_id not in self._runs:
            run = connection.run(run_id)
            ours = run.run_id == run_id and run.fab_hash == installed_bundle().hash
            configuration = dict(run.override_config)
            self._runs[run_id] = (
                RunFacts(run_id=run_id, configuration=configuration) if ours else None
            )
            while len(self._runs) > _KNOWN_RUNS:
                self._runs.popitem(last=False)
        return self._runs[run_id]


def _refusal(message: Message) -> Message:
    """The one answer to everything that is not answered: why is for the person's receipt."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "refused"), reply_to=message)


def serve(access: FleetAccess, service: Service, *, pace: Pace | None = None) -> None:
    """Run an agent as this process's only work: SIGTERM and SIGINT end it in good order."""
    agent = Agent(access, service, pace=pace)
    signal.signal(signal.SIGTERM, agent.stop)
    signal.signal(signal.SIGINT, agent.stop)
    agent.run()
