"""A node's connection to the SuperLink: Flower's Fleet protocol, spoken by our own process.

Flower's own connection exits the process when it cannot connect, waits three seconds between looks
and takes 2 GiB. What is the same here: its protobuf messages, its node authentication (each call
carries a timestamp signed with the node's ECDSA key), its chunked objects where a SuperLink does
not hand out messages whole, as ours does (`lean_state`). What comes from the other side is hostile:
sizes are bounded, ids of parts are checked against contents.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.common.serde import message_from_proto, message_to_proto, run_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.run import Run

from federated.deployment.headers import NodeSignature
from federated.errors import DeploymentError, ProtocolError

_CALL_TIMEOUT_S: Final = 10.0
#: Flower takes a node for offline when twice this passes without a heartbeat.
HEARTBEAT_S: Final = 15.0
LARGEST_MESSAGE_BYTES: Final = 16 * 1024 * 1024
#: A message of ours is a message, its records and one record.
_MOST_OBJECTS: Final = 8
_PARTS_S: Final = 10.0
_PARTS_PAUSE_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetAccess:
    """Where the SuperLink is and who this node is. `ca` is the PEM of the authority to trust."""

    address: str
    ca: bytes
    key: ec.EllipticCurvePrivateKey = field(repr=False)


class FleetConnection:
    """One open connection. Methods raise `DeploymentError` if the SuperLink is away or refuses."""

    def __init__(self, access: FleetAccess) -> None:
        self._public = public_key_to_bytes(access.key.public_key())
        options = [
            ("grpc.max_send_message_length", LARGEST_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", LARGEST_MESSAGE_BYTES),
        ]
        # A plain channel that never retries by itself: the agent's loop knows when to stop.
        plain = grpc.secure_channel(
            access.address, grpc.ssl_channel_credentials(access.ca), options=options
        )
        self._channel = plain
        self._stub: Any = FleetStub(grpc.intercept_channel(plain, NodeSignature(access.key)))
        self._node = Node()

    def activate(self) -> int:
        """Tell the SuperLink that this node is here; return the id that it knows it by."""
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_S)
        answer = self._call("ActivateNode", request)
        self._node = Node(node_id=answer.node_id)
        return int(answer.node_id)

    def heartbeat(self) -> None:
        """Say that this node is still here."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_S)
        if not self._call("SendNodeHeartbeat", request).success:
            raise DeploymentError("The SuperLink does not know this node any more.")

    def pull(self) -> Message | None:
        """Return the next message with its content, or None. Raises `ProtocolError` too."""
        answer = self._call("PullMessages", PullMessagesRequest(node=self._node))
        if not answer.messages_list:
            return None
        try:
            head = message_from_proto(answer.messages_list[0])
            tree = answer.message_object_trees[0]
        # What Flower raises for what it cannot read is of any kind.
        except Exception as error:
            raise ProtocolError("What came is no message.") from error
        run_id, message_id = head.metadata.run_id, head.metadata.message_id
        if head.has_content() and len(head.content):
            return head
        # From a SuperLink that hands out messages in parts, as Flower's own does.
        ids = [one.object_id for one in iterate_object_tree(tree)]
        if len(ids) > _MOST_OBJECTS or message_id not in ids:
            raise ProtocolError("A message has more parts than any of ours, or not its own.")
        contents = {id_: self._object(run_id, id_) for id_ in ids}
        request = ConfirmMessageReceivedRequest(
            node=self._node, run_id=run_id, message_object_id=message_id
        )
        self._call("ConfirmMessageReceived", request)
        try:
            message = inflate_object_from_contents(message_id, contents)
        except Exception as error:
            raise ProtocolError("A message's parts do not fit together.") from error
        if not isinstance(message, Message):
            raise ProtocolError("What came is not a message.")
        message.metadata.__dict__["_message_id"] = message_id
        return message

    def _object(self, run_id: int, object_id: str) -> bytes:
        request = PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
        # A message can be seen before its sender has finished sending its parts.
        deadline = time.monotonic() + _PARTS_S
        pause_s = _PARTS_PAUSE_S
        while True:
            answer = self._call("PullObject", request)
            if answer.object_available or time.monotonic() > deadline:
                break
            time.sleep(pause_s)
            pause_s *= 1.5
        content = bytes(answer.object_content)
        if not answer.object_available or get_object_id(content) != object_id:
            raise ProtocolError("A part of a message is missing, or is another than was named.")
        return content

    def run(self, run_id: int) -> Run:
        """Return what the SuperLink says a run is: bundle hash and configuration."""
        answer = self._call("GetRun", GetRunRequest(node=self._node, run_id=run_id))
        try:
            return run_from_proto(answer.run)
        except Exception as error:
            raise ProtocolError("What came is no run.") from error

    def push(self, reply: Message) -> None:
        """Send a reply, whole."""
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects = get_all_nested_objects(reply)
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(reply)],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[0.0],
            )
            answer = self._call("PushMessages", request)
            # Our own SuperLink has all of it now; another asks for parts.
            for object_id in answer.objects_to_push:
                part = PushObjectRequest(
                    node=self._node,
                    run_id=reply.metadata.run_id,
                    object_id=object_id,
                    object_content=objects[object_id].deflate(),
                    session_id=answer.session_id,
                )
                self._call("PushObject", part)

    def close(self) -> None:
        """Say good-bye if the SuperLink is there, and close."""
        try:
            if self._node.node_id:
                self._stub.DeactivateNode(
                    DeactivateNodeRequest(node_id=self._node.node_id), timeout=1.0
                )
        except grpc.RpcError:
            pass
        finally:
            self._channel.close()

    def _call(self, method: str, request: Any) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            status = error.code().name if isinstance(error, grpc.Call) else "UNKNOWN"
            raise DeploymentError(f"The SuperLink did not take {method} ({status}).") from error
        except ValueError as error:
            # The channel was closed meanwhile, by a stop.
            raise DeploymentError(f"The connection is closed ({method}).") from error


@contextmanager
def heartbeats(connection: FleetConnection, lost: threading.Event) -> Iterator[None]:
    """Send heartbeats beside whatever else is done; set `lost` when one fails."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S * 0.6):
            try:
                connection.heartbeat()
            except DeploymentError:
                lost.set()
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
