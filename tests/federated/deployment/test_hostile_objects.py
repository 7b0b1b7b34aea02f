"""What cannot be read is one message less: it ends neither a run nor a node."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata, ObjectTree, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_object_id

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


@pytest.mark.parametrize("content", BROKEN)
def test_a_run_goes_on_without_a_reply_that_cannot_be_read(content: bytes) -> None:
    grid = RuntimeGrid.__new__(RuntimeGrid)
    grid._node = Node(node_id=1)
    grid._run = SimpleNamespace(run_id=1)  # type: ignore[assignment]
    grid.client = SimpleNamespace(
        PullObject=lambda _: PullObjectResponse(
            object_found=True, object_available=True, object_content=content
        ),
        ConfirmMessageReceived=lambda _: None,
    )  # type: ignore[assignment]
    assert grid._pull(head(content), ObjectTree(object_id=get_object_id(content))) is None
