"""Messages to nodes and back, by stage and deadline, over Flower's Runtime API.

Flower's own grid sleeps for three seconds between looks, tries again for ever, pushes all of a
stage before any node can begin, and imports the SuperLink's database. `RuntimeGrid` is Flower's
`Grid`, spoken over the same calls, without that; a stage ends when all have answered or its time is
over.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import httpx
import structlog
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.message_pb2 import (
    Message as MessageProto,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    GetNodesRequest,
    PullAppMessagesRequest,
    PushAppMessagesRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient

from federated.app.client_app import content_of, payload_of
from federated.deployment.headers import Headers, version_headers
from federated.errors import DeploymentError
from federated.study_run import Patience

_LOG = structlog.get_logger("federated.grid")
_FIRST_LOOK_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 0.4
_TIMEOUT_S: Final = 5.0
_SENDERS: Final = 4
_MOST_OBJECTS: Final = 8
_MOST_TRIES: Final = 20


class RuntimeGrid(Grid):
    """Flower's grid for one run. Methods raise `httpx.HTTPError` if the SuperLink is away."""

    def __init__(self, address: str, *, tls: ssl.SSLContext, token: str) -> None:
        self.client = RuntimeHttpClient(
            f"https://{address}",
            interceptors=[Headers({**version_headers("flwr-serverapp"), TASK_TOKEN_HEADER: token})],
            verify=tls,
            timeout=_TIMEOUT_S,
        )
        self._node = Node(node_id=SUPERLINK_NODE_ID)
        self._run: Run | None = None

    def set_run(self, run: Run) -> None:
        """Say which run this is the grid of."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        if self._run is None:
            raise DeploymentError("The grid was not told its run.")
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message; Flower deprecates it in favour of `Message` itself."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes that are online."""
        return [int(node.node_id) for node in self.client.GetNodes(GetNodesRequest()).nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages with their contents; return their ids, empty for one that was not taken."""
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            objects = get_all_nested_objects(message)
            answer = self.client.PushMessages(
                PushAppMessagesRequest(
                    messages_list=[message_to_proto(remove_content_from_message(message))],
                    message_object_trees=[get_object_tree(message)],
                )
            )
            for object_id in answer.objects_to_push:
                self.client.PushObject(
                    PushObjectRequest(
                        node=self._node,
                        run_id=self.run.run_id,
                        object_id=object_id,
                        object_content=objects[object_id].deflate(),
                        session_id=answer.session_id,
                    )
                )
        return str(next(iter(answer.message_ids), ""))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there to these messages; whole ones only."""
        answer = self.client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
        pairs = zip(answer.messages_list, answer.message_object_trees, strict=True)
        replies = [self._pull(head, tree) for head, tree in pairs]
        return [reply for reply in replies if reply is not None]

    def _pull(self, head: MessageProto, tree: ObjectTree) -> Message | None:
        message_id = head.metadata.message_id
        ids = [one.object_id for one in iterate_object_tree(tree)]
        contents = {}
        for object_id in ids[:_MOST_OBJECTS]:
            content = self._object(object_id)
            if content is None:
                return None
            contents[object_id] = content
        self.client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._node, run_id=self.run.run_id, message_object_id=message_id
            )
        )
        try:
            reply = inflate_object_from_contents(message_id, contents)
        # What Flower raises for parts that do not fit is of any kind; one node must not end a run.
        except Exception:  # noqa: BLE001
            return None
        return reply if isinstance(reply, Message) else None

    def _object(self, object_id: str) -> bytes | None:
        """The content of that id, waiting a little for a node that is still sending it."""
        request = PullObjectRequest(node=self._node, run_id=self.run.run_id, object_id=object_id)
        pause_s = _FIRST_LOOK_S
        for _ in range(_MOST_TRIES):
            answer = self.client.PullObject(request)
            if answer.object_available:
                content = bytes(answer.object_content)
                return content if get_object_id(content) == object_id else None
            if not answer.object_found:
                return None
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)
        return None

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send, and return what is answered within `timeout` seconds, an hour by default."""
        waiting = {id_ for id_ in self.push_messages(messages) if id_}
        deadline = time.monotonic() + (3600.0 if timeout is None else timeout)
        found: list[Message] = []
        while waiting and time.monotonic() < deadline:
            time.sleep(_LONGEST_PAUSE_S)
            replies = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in replies}
            found += replies
        return found

    def close(self) -> None:
        """Close the connection."""
        self.client.close()


class GridExchange:
    """Asks nodes, by Flower's ids. `clock` and `sleep` are in seconds, the clock monotonic."""

    def __init__(
        self,
        grid: Grid,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._grid = grid
        self._clock = clock
        self._sleep = sleep

    def ask(
        self, stage: str, payloads: Mapping[int, bytes], patience: Patience
    ) -> dict[int, bytes]:
        """Send each node its bytes and return what came back in time.

        Never raises for what a node does, or for a SuperLink that is away: who did not answer, or
        answered with an error or in another form, is not in what is returned.
        """
        deadline = self._clock() + patience.timeout_s
        ttl_s = patience.timeout_s + 1.0
        messages = {
            node: Message(content_of(stage, payload), node, "query", ttl=ttl_s, group_id=stage)
            for node, payload in payloads.items()
        }
        waiting = self._push(messages, deadline)
        answers: dict[int, bytes] = {}
        pause_s, reached = _FIRST_LOOK_S, False
        while waiting and self._clock() < deadline:
            self._sleep(min(pause_s, max(0.0, deadline - self._clock())))
            came = self._look(waiting)
            for message in came:
                node = waiting.pop(message.metadata.reply_to_message_id, None)
                payload = _read(message, stage)
                if node is not None and payload is not None:
                    answers[node] = payload
            if not reached and len(answers) >= patience.enough:
                reached = True
                deadline = min(deadline, self._clock() + patience.stragglers_s)
            pause_s = _FIRST_LOOK_S if came else min(pause_s * 1.5, _LONGEST_PAUSE_S)
        return answers

    def _push(self, messages: Mapping[int, Message], deadline: float) -> dict[str, int]:
        """Return message id → node for what the SuperLink took.

        One by one, so that a node can begin while others' messages are still on their way.
        """
        with ThreadPoolExecutor(max_workers=_SENDERS) as pool:
            ids = list(pool.map(lambda one: self._push_one(one, deadline), messages.values()))
        return {id_: node for id_, node in zip(ids, messages, strict=True) if id_}

    def _push_one(self, message: Message, deadline: float) -> str:
        """Send one, again and again while the SuperLink is away: the same id is taken once."""
        while True:
            try:
                return next(iter(self._grid.push_messages([message])), "")
            except (httpx.HTTPError, OSError, ValueError) as error:
                _LOG.warning("federated.grid.push_failed", error=type(error).__name__)
            if self._clock() >= deadline:
                return ""
            self._sleep(_LONGEST_PAUSE_S)

    def _look(self, waiting: Iterable[str]) -> list[Message]:
        try:
            return list(self._grid.pull_messages(list(waiting)))
        except (httpx.HTTPError, OSError, ValueError, TypeError) as error:
            # Away for a moment, or restarted; what it has in its database it still has.
            _LOG.warning("federated.grid.pull_failed", error=type(error).__name__)
            return []


def _read(message: Message, stage: str) -> bytes | None:
    if message.has_error():
        return None
    try:
        answered, payload = payload_of(message.content)
    except (ValueError, TypeError):
        return None
    return payload if answered == stage else None
