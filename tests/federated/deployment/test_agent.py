"""The agent: what it never does, and that it comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.supercore.run import Run

from federated.app.bundle import installed_bundle
from federated.app.client_app import RECORD, content_of, payload_of
from federated.deployment.fleet import FleetAccess
from federated.errors import DeploymentError, RefusedError, StoreError
from federated.node.agent import Agent, RunFacts

CONFIGURATION: Mapping[str, str] = {"study-id": "hours", "study-hash": "ab" * 32}


class Connection:
    """A SuperLink that says what a test wants it to say. The real one is in test_run."""

    def __init__(self, *messages: Message, bundle: str = "", run_id: int = 7) -> None:
        self.messages = list(messages)
        self.replies: list[Message] = []
        self.asked: list[int] = []
        self._run = replace(
            Run.create_empty(run_id),
            fab_hash=bundle or installed_bundle().hash,
            override_config=dict(CONFIGURATION),
        )

    def pull(self) -> Message | None:
        return self.messages.pop(0) if self.messages else None

    def run(self, run_id: int) -> Run:
        self.asked.append(run_id)
        return self._run

    def push(self, reply: Message) -> None:
        self.replies.append(reply)


class Recording:
    """A service that notes what reaches it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[RunFacts, str, bytes]] = []
        self._error = error

    def tidy(self) -> None:
        pass

    def respond(self, facts: RunFacts, stage: str, payload: bytes) -> bytes:
        self.calls.append((facts, stage, payload))
        if self._error is not None:
            raise self._error
        return b"answer"


def message(content: RecordDict | None = None, kind: str = "query") -> Message:
    metadata = Metadata(
        run_id=7, message_id="m", src_node_id=1, dst_node_id=2, reply_to_message_id="",
        group_id="", created_at=1.8e9, ttl=60.0, message_type=kind,
    )  # fmt: skip
    return make_message(metadata, content=content or content_of("mask", b"request"))


def answer(connection: Connection, service: Recording) -> Message:
    access = FleetAccess(address="", ca=b"", key=ec.generate_private_key(ec.SECP256R1()))
    assert Agent(access, service)._one(connection, 2)  # type: ignore[arg-type]
    (reply,) = connection.replies
    return reply


def test_hands_the_bytes_to_the_service_with_what_the_run_is() -> None:
    service = Recording()
    reply = answer(Connection(message()), service)
    assert payload_of(reply.content) == ("mask", b"answer")
    assert service.calls == [(RunFacts(run_id=7, configuration=CONFIGURATION), "mask", b"request")]


def test_refuses_a_run_of_other_code_before_anything_else() -> None:
    service = Recording()
    reply = answer(Connection(message(), bundle="00" * 32), service)
    assert reply.has_error()
    assert not service.calls


def test_refuses_a_run_that_is_another_than_was_asked_for() -> None:
    service = Recording()
    reply = answer(Connection(message(), run_id=8), service)
    assert reply.has_error()
    assert not service.calls


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({"other": ConfigRecord({"stage": "mask", "payload": b"x"})}),
        RecordDict({RECORD: ConfigRecord({"stage": "mask"})}),
        RecordDict({RECORD: ConfigRecord({"stage": 1, "payload": b"x"})}),
        RecordDict({RECORD: ConfigRecord({"stage": "mask", "payload": "text"})}),
        RecordDict({RECORD: ConfigRecord({"stage": "m", "payload": b"x", "more": 1})}),
    ],
)
def test_refuses_a_message_of_another_form(content: RecordDict) -> None:
    service = Recording()
    assert answer(Connection(message(content)), service).has_error()
    assert not service.calls


@pytest.mark.parametrize("kind", ["train", "evaluate", "query.other"])
def test_refuses_a_message_of_another_kind(kind: str) -> None:
    service = Recording()
    assert answer(Connection(message(kind=kind)), service).has_error()
    assert not service.calls


@pytest.mark.parametrize(
    "error", [RefusedError("you paused", rule="paused"), RuntimeError("mood was 3.0")]
)
def test_tells_nobody_why_it_did_not_answer(error: Exception) -> None:
    reply = answer(Connection(message()), Recording(error))
    assert reply.has_error()
    assert str(reply.error) == str(reply.error).replace(str(error), "")
    assert reply.error.reason == "refused"


class Breaking(Connection):
    """A SuperLink at which one call fails in a way that nobody foresaw."""

    def __init__(self, at: str, *messages: Message) -> None:
        super().__init__(*messages)
        self.at = at

    def fail(self, at: str) -> None:
        if self.at == at:
            raise KeyError("mood was 3.0")

    def pull(self) -> Message | None:
        self.fail("pull")
        return super().pull()

    def run(self, run_id: int) -> Run:
        self.fail("run")
        return super().run(run_id)

    def push(self, reply: Message) -> None:
        self.fail("push")
        super().push(reply)


@pytest.mark.parametrize("at", ["pull", "run", "push"])
def test_outlives_whatever_flower_makes_of_a_hostile_answer(at: str) -> None:
    connection = Breaking(at, message(), message())
    access = FleetAccess(address="", ca=b"", key=ec.generate_private_key(ec.SECP256R1()))
    agent = Agent(access, Recording())
    # As if nothing had come: there is a pause before the next look.
    assert not agent._one(connection, 2)  # type: ignore[arg-type]
    connection.at = ""
    assert agent._one(connection, 2)  # type: ignore[arg-type]
    assert len(connection.replies) == 1


def test_outlives_a_store_that_cannot_be_written_while_nothing_is_asked() -> None:
    class Full(Recording):
        def tidy(self) -> None:
            raise StoreError("The disk is full.")

    access = FleetAccess(address="", ca=b"", key=ec.generate_private_key(ec.SECP256R1()))
    assert not Agent(access, Full())._one(Connection(), 2)  # type: ignore[arg-type]


def test_a_superlink_that_is_away_is_for_the_loop_to_hear_of() -> None:
    class Away(Connection):
        def pull(self) -> Message | None:
            raise DeploymentError("away")

    access = FleetAccess(address="", ca=b"", key=ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(DeploymentError):
        Agent(access, Recording())._one(Away(), 2)  # type: ignore[arg-type]


def test_asks_once_what_a_run_is() -> None:
    connection = Connection(message(), message())
    access = FleetAccess(address="", ca=b"", key=ec.generate_private_key(ec.SECP256R1()))
    agent = Agent(access, Recording())
    assert agent._one(connection, 2)  # type: ignore[arg-type]
    assert agent._one(connection, 2)  # type: ignore[arg-type]
    assert not agent._one(connection, 2)  # type: ignore[arg-type]
    assert connection.asked == [7]
