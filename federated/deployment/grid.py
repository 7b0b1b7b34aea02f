"""Messages to nodes and back, by stage and deadline, over Flower's Runtime API.

Flower's own grid sleeps for three seconds between looks, tries again for ever, sends each message
in parts and imports the SuperLink's database. `RuntimeGrid` is Flower's `Grid`, spoken over the
same calls, without that: messages and replies travel whole (`lean_state` keeps and hands them out
so), and a reply is handed out again until it is not asked for any more. A stage ends when all have
answered or its time is over, whatever nodes and SuperLink do: no call of a stage outlives it
(`timely`).
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import httpx
import structlog
from flwr.app import Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import (
    Message as MessageProto,
)
from flwr.proto.message_pb2 import (
    ObjectTree,
    PullObjectRequest,
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
from federated.deployment.timely import TimelyTransport, within
from federated.errors import DeploymentError
from federated.study_run import Patience

_LOG = structlog.get_logger("federated.grid")
_FIRST_LOOK_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 0.4
_TIMEOUT_S: Final = 5.0
_MOST_OBJECTS: Final = 8
_MOST_AT_ONCE: Final = 16
_BATCH_BYTES: Final = 1024 * 1024


class RuntimeGrid(Grid):
    """Flower's grid for one run. Methods raise `httpx.HTTPError` if the SuperLink is away."""

    def __init__(self, address: str, *, tls: ssl.SSLContext, token: str) -> None:
        self.client = RuntimeHttpClient(
            f"https://{address}",
            interceptors=[Headers({**version_headers("flwr-serverapp"), TASK_TOKEN_HEADER: token})],
            verify=tls,
            timeout=_TIMEOUT_S,
        )
        self.client._client.close()  # noqa: SLF001 - Flower's takes no transport
        self.client._client = httpx.Client(  # noqa: SLF001
            transport=TimelyTransport(tls=tls, call_s=_TIMEOUT_S), timeout=_TIMEOUT_S
        )
        self._node = Node(node_id=SUPERLINK_NODE_ID)
        self._run: Run | None = None
        self._unreadable: set[str] = set()

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
        """Send messages, all in one call; return their ids, empty for one that was not taken."""
        sent = list(messages)
        with no_object_id_recompute():
            for message in sent:
                message.metadata.__dict__["_message_id"] = message.object_id
            answer = self.client.PushMessages(
                PushAppMessagesRequest(
                    messages_list=[message_to_proto(message) for message in sent],
                    message_object_trees=[get_object_tree(message) for message in sent],
                )
            )
        return [str(id_) for id_ in answer.message_ids]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there to these messages; whole ones only.

        A reply that cannot be had now is left for the next look, one that cannot be read is as if
        it had not come, and is not asked for again: what is, is handed out before what came since.
        """
        wanted = [id_ for id_ in message_ids if id_ not in self._unreadable]
        answer = self.client.PullMessages(PullAppMessagesRequest(message_ids=wanted))
        replies = []
        for head, tree in zip(answer.messages_list, answer.message_object_trees, strict=False):
            try:
                reply = self._read(head, tree)
            except (httpx.HTTPError, OSError) as error:
                _LOG.warning("federated.grid.reply_delayed", error=type(error).__name__)
                continue
            # What Flower raises for what it cannot read is of any kind; one node must not end a
            # run, nor take others' replies with it.
            except Exception as error:  # noqa: BLE001
                _LOG.warning("federated.grid.reply_unreadable", error=type(error).__name__)
                self._unreadable.add(head.metadata.reply_to_message_id)
                continue
            if reply is not None:
                replies.append(reply)
        return replies

    def _read(self, head: MessageProto, tree: ObjectTree) -> Message | None:
        """Return a reply: from its head if it came whole, else (Flower's SuperNode) from parts."""
        if head.HasField("error") or head.content.ByteSize():
            return message_from_proto(head)
        ids = [one.object_id for one in iterate_object_tree(tree)]
        if len(ids) > _MOST_OBJECTS:
            return None
        contents = {}
        for object_id in ids:
            content = self._object(object_id)
            if content is None:
                return None
            contents[object_id] = content
        reply = inflate_object_from_contents(head.metadata.message_id, contents)
        return reply if isinstance(reply, Message) else None

    def _object(self, object_id: str) -> bytes | None:
        """The content of that id, or None: a node that is still sending it is asked again later."""
        request = PullObjectRequest(node=self._node, run_id=self.run.run_id, object_id=object_id)
        answer = self.client.PullObject(request)
        content = bytes(answer.object_content)
        whole = answer.object_available and get_object_id(content) == object_id
        return content if whole else None

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
        self.away = False
        """Whether the SuperLink was away when it was last called."""

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
        while waiting and self._pause(pause_s, deadline):
            came = self._look(waiting, deadline)
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

    def _pause(self, pause_s: float, deadline: float) -> bool:
        """Let time pass, never past the deadline; return whether any is left."""
        self._sleep(max(0.0, min(pause_s, deadline - self._clock())))
        return self._clock() < deadline

    def _push(self, messages: Mapping[int, Message], deadline: float) -> dict[str, int]:
        """Return message id → node for what the SuperLink took.

        A few at a time, so that nodes can begin while others' messages are still on their way.
        """
        taken: dict[str, int] = {}
        for nodes in _batches({node: len(_payload(one)) for node, one in messages.items()}):
            ids = self._push_some([messages[node] for node in nodes], deadline)
            taken |= {id_: node for id_, node in zip(ids, nodes, strict=False) if id_}
        return taken

    def _push_some(self, messages: Sequence[Message], deadline: float) -> Sequence[str]:
        """Send, again and again while the SuperLink is away: the same id is taken once."""
        while self._clock() < deadline:
            try:
                with within(deadline, self._clock):
                    taken = list(self._grid.push_messages(messages))
            except (httpx.HTTPError, OSError, ValueError) as error:
                self.away = True
                _LOG.warning("federated.grid.push_failed", error=type(error).__name__)
            else:
                self.away = False
                return taken
            self._pause(_LONGEST_PAUSE_S, deadline)
        return []

    def _look(self, waiting: Iterable[str], deadline: float) -> list[Message]:
        try:
            with within(deadline, self._clock):
                found = list(self._grid.pull_messages(list(waiting)))
        except (httpx.HTTPError, OSError, ValueError, TypeError) as error:
            # Away for a moment, or restarted; what it has in its database it still has.
            self.away = True
            _LOG.warning("federated.grid.pull_failed", error=type(error).__name__)
            return []
        self.away = False
        return found


def _batches(sizes: Mapping[int, int]) -> Iterator[list[int]]:
    """Nodes in groups whose messages go out in one call."""
    batch: list[int] = []
    size = 0
    for node, more in sizes.items():
        if batch and (len(batch) == _MOST_AT_ONCE or size + more > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(node)
        size += more
    if batch:
        yield batch


def _payload(message: Message) -> bytes:
    return payload_of(message.content)[1]


def _read(message: Message, stage: str) -> bytes | None:
    if message.has_error():
        return None
    try:
        answered, payload = payload_of(message.content)
    except (ValueError, TypeError):
        return None
    return payload if answered == stage else None
