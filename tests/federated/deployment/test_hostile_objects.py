"""What cannot be read is one message less: it ends neither a run nor a node."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.common.serde import recorddict_to_proto
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata, ObjectTree, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_object_id

from federated.app.client_app import content_of
from federated.deployment.fleet import FleetConnection
from federated.deployment.grid import RuntimeGrid
from federated.errors import ProtocolError


def made(kind: str, body: bytes) -> bytes:
    """An object in Flower's form, whose body is no such thing."""
    return f"{kind}  {len(body)}".encode() + b"\0" + body


BROKEN = [
    made(kind, body)
    for kind in ("Message", "RecordDict", "ConfigRecord", "Array")
    for body in (b"\xff\xff\xff", b"[1]", b"{", b"null")
]


def head(content: bytes, **more: Any) -> MessageProto:
    return MessageProto(metadata=Metadata(run_id=1, message_id=get_object_id(content), **more))


class Hostile(FleetConnection):
    """A connection to a SuperLink that sends one object of its own making."""

    def __init__(self, content: bytes, *, trees: bool = True) -> None:
        self._node = Node(node_id=5)
        self._content, self._trees = content, trees

    def _call(self, method: str, _request: Any) -> Any:
        if method == "PullMessages":
            tree = ObjectTree(object_id=get_object_id(self._content))
            return PullMessagesResponse(
                messages_list=[
                    head(
                        self._content, src_node_id=1, dst_node_id=5, message_type="query",
                        ttl=9.0, created_at=1.0, group_id="g",
                    )
                ],
                message_object_trees=[tree] if self._trees else [],
            )  # fmt: skip
        if method == "PullObject":
            return PullObjectResponse(
                object_found=True, object_available=True, object_content=self._content
            )
        return SimpleNamespace(run=None)


@pytest.mark.parametrize("content", BROKEN)
def test_a_node_refuses_a_message_that_cannot_be_read(content: bytes) -> None:
    with pytest.raises(ProtocolError):
        Hostile(content).pull()


def test_a_node_refuses_a_message_without_its_parts() -> None:
    with pytest.raises(ProtocolError):
        Hostile(BROKEN[0], trees=False).pull()


def test_a_node_refuses_a_run_that_cannot_be_read() -> None:
    with pytest.raises(ProtocolError):
        Hostile(BROKEN[0]).run(1)


def grid_of(heads: list[MessageProto], pull: Any) -> RuntimeGrid:
    """A grid of a run to which the SuperLink says that these replies are there."""
    grid = RuntimeGrid.__new__(RuntimeGrid)
    grid._unreadable = set()
    grid._node = Node(node_id=1)
    grid._run = SimpleNamespace(run_id=1)  # type: ignore[assignment]
    grid.client = SimpleNamespace(
        PullMessages=lambda _: PullAppMessagesResponse(
            messages_list=heads,
            message_object_trees=[ObjectTree(object_id=one.metadata.message_id) for one in heads],
        ),
        PullObject=pull,
    )  # type: ignore[assignment]
    return grid


def object_of(content: bytes) -> PullObjectResponse:
    return PullObjectResponse(object_found=True, object_available=True, object_content=content)


def whole(number: int) -> MessageProto:
    """A reply that came with its content."""
    reply = head(
        str(number).encode(), reply_to_message_id=str(number), src_node_id=number, dst_node_id=1,
        message_type="query", ttl=9.0, created_at=1.0,
    )  # fmt: skip
    reply.content.CopyFrom(recorddict_to_proto(content_of("mask", b"answer")))
    return reply


@pytest.mark.parametrize("content", BROKEN)
def test_a_run_goes_on_without_a_reply_that_cannot_be_read(content: bytes) -> None:
    heads = [whole(1), head(content), whole(2)]
    replies = list(grid_of(heads, lambda _: object_of(content)).pull_messages(["1", "2"]))
    assert [reply.metadata.reply_to_message_id for reply in replies] == ["1", "2"]


@pytest.mark.parametrize("content", BROKEN)
def test_a_reply_that_cannot_be_read_is_not_asked_for_again(content: bytes) -> None:
    """What is asked for again is handed out again, before what came since."""
    asked: list[list[str]] = []
    broken = head(content, reply_to_message_id="2")
    grid = grid_of([whole(1), broken], lambda _: object_of(content))
    pull = grid.client.PullMessages

    def noted(request: PullAppMessagesRequest) -> Any:
        asked.append(sorted(request.message_ids))
        return pull(request)

    grid.client.PullMessages = noted  # type: ignore[method-assign]
    for _ in range(2):
        list(grid.pull_messages(["1", "2", "3"]))
    assert asked == [["1", "2", "3"], ["1", "3"]]


@pytest.mark.parametrize("error", [httpx.ReadTimeout("slow"), OSError("reset"), ValueError("x")])
def test_a_reply_that_cannot_be_had_now_takes_no_others_with_it(error: Exception) -> None:
    def pull(_: Any) -> Any:
        raise error

    heads = [whole(1), head(b"in parts"), whole(2)]
    replies = list(grid_of(heads, pull).pull_messages(["1", "2", "3"]))
    assert [reply.metadata.reply_to_message_id for reply in replies] == ["1", "2"]


def test_a_reply_with_more_parts_than_any_is_not_fetched() -> None:
    grid = grid_of([], lambda _: pytest.fail("nothing is fetched"))
    tree = ObjectTree(children=[ObjectTree(object_id=str(one)) for one in range(1000)])
    assert grid._read(head(b"x"), tree) is None
