"""Flower's state in SQLite, without what a round pays for and nobody reads.

Flower moves a message as three objects, each pushed, asked for and pulled by a call of its own, and
asks its database four to eight times for each call: who the caller is, whether the run still runs,
which tasks are dead, how many bytes went by. Here:

- a message that comes with its content is kept and handed out whole, in the row that Flower has for
  it; its parts are stored beside it for Flower's own SuperNode, which asks for them;
- a node for which there is nothing waits for a moment instead of asking again and again;
- a reply is handed out again until the coordinator does not ask for it any more, so that an answer
  lost on its way costs nobody their place in a round;
- what is kept in memory is only what this one process writes itself and can therefore know: it is
  the database's only writer (`superlink` holds a lock). Messages, runs and nodes stay in the
  database as they were, so that a SuperLink that was killed goes on where it stopped.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID, Status
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import RunStatus
from flwr.supercore.utils import uint64_to_int64

#: For so long a run that runs is taken to go on running, and dead tasks go unnoticed.
_BELIEVED_S: Final = 0.5
_MOST_NODES: Final = 10_000
#: A node for which nothing is there is answered after so long; each waits in a thread of its own.
HOLD_S: Final = 1.0
_MOST_HELD: Final = 200
#: Replies that are handed out at a time, by the size of their contents; one is always.
_LARGEST_LOOK_BYTES: Final = 16 * 1024 * 1024
#: How often, while no reply comes, those of nodes that went away are made up by Flower.
_ABSENT_EVERY_S: Final = 1.0
_MOST_RUNS: Final = 16

_WAITING: Final = (
    "SELECT reply_to_message_id AS id, coalesce(length(content), 0) AS size FROM message_res "
    "WHERE run_id = :run AND delivered_at = ''"
)


class LeanLinkState(SqlLinkState):
    """As `SqlLinkState`, cheaper. Thread-safe."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._guard = threading.Lock()
        self._looked = float("-inf")
        self._running: dict[int, tuple[float, RunStatus]] = {}
        self._nodes: dict[bytes, int] = {}
        #: Counted up when something is forgotten: what was read before that is not kept.
        self._forgotten = 0
        self._sent: dict[int, int] = {}
        self._empty: dict[int, int] = {}
        self._bells: dict[int, threading.Event] = {}
        self._handed_out: OrderedDict[int, dict[str, Message]] = OrderedDict()
        self._absent_due: dict[int, float] = {}

    # --- Messages to nodes -----------------------------------------------------------------------

    def store_message_ins(self, message: Message) -> str | None:
        """Remember that there is something for its receiver."""
        stored = super().store_message_ins(message)
        with self._guard:
            node = message.metadata.dst_node_id
            self._sent[node] = self._sent.get(node, 0) + 1
        return stored

    def store_message_and_object_tree(
        self, message: Message, object_tree: ObjectTree, session_id: str
    ) -> tuple[bool, list[str]]:
        """Store a message; of one that came whole, nothing has to be pushed any more."""
        missing: list[str] = []
        if _is_whole(message):
            stored = self._store_whole(message)
        else:
            stored, missing = super().store_message_and_object_tree(
                message, object_tree, session_id
            )
        if stored:
            with self._guard:
                bell = self._bells.pop(message.metadata.dst_node_id, None)
            # Now, not at `store_message_ins`: only here it is in the database for others to see.
            if bell is not None:
                bell.set()
        return stored, missing

    def _store_whole(self, message: Message) -> bool:
        """Store all or nothing, in one transaction: a run that ends meanwhile leaves no parts."""
        metadata, store = message.metadata, self.object_store
        with self.session():
            if metadata.reply_to_message_id:
                if self.store_message_res(message) is None:
                    return False
                # Of a reply nobody asks for parts, but Flower looks whether it is known.
                store.preregister(metadata.run_id, ObjectTree(object_id=metadata.message_id))
                # Who answers has what he was asked.
                store.delete(metadata.reply_to_message_id)
                return True
            if self.store_message_ins(message) is None:
                return False
            store.preregister(metadata.run_id, get_object_tree(message))
            for object_id, part in get_all_nested_objects(message).items():
                store.put(object_id, part.deflate())
            return True

    def get_message_ins(
        self, node_id: int, limit: int | None, *, run_id: int | None = None
    ) -> list[Message]:
        """Return what is there for a node; wait a moment where nothing has come since the last.

        The database's write lock is taken only for a node for which something came.
        """
        if node_id == SUPERLINK_NODE_ID:
            # Only Flower's agents are sent anything there, and none is served.
            return []
        with self._guard:
            sent = self._sent.get(node_id, 0)
            known = run_id is None and self._empty.get(node_id) == sent
        if known and not self._wait_for_one(node_id, sent):
            return []
        with self._guard:
            sent = self._sent.get(node_id, 0)
        found = super().get_message_ins(node_id, limit, run_id=run_id)
        if not found and run_id is None:
            with self._guard:
                self._empty[node_id] = sent
        return found

    def _wait_for_one(self, node_id: int, sent: int) -> bool:
        """Return whether something came for a node within `HOLD_S`."""
        with self._guard:
            if self._sent.get(node_id, 0) != sent:
                return True
            if len(self._bells) >= _MOST_HELD or node_id in self._bells:
                return False
            bell = self._bells[node_id] = threading.Event()
        bell.wait(HOLD_S)
        with self._guard:
            if self._bells.get(node_id) is bell:
                del self._bells[node_id]
            return self._sent.get(node_id, 0) != sent

    # --- Replies ---------------------------------------------------------------------------------

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Message]:
        """Return replies, those first that were handed out and are asked for again.

        A reply that is not asked for any more has arrived and is forgotten. One whose parts are
        still on their way holds up no other.
        """
        with self._guard:
            handed_out = self._handed_out.get(run_id, {})
            arrived = [handed_out.pop(id_) for id_ in handed_out.keys() - message_ids]
            again = list(handed_out.values())
        for one in arrived:
            self.object_store.delete(one.metadata.message_id)
        if any(map(_carries, again)):
            return again
        new = message_ids - {one.metadata.reply_to_message_id for one in again}
        wanted = self._due(new, run_id)
        found = super().get_message_res(wanted, run_id) if wanted else []
        with self._guard:
            kept = self._handed_out.setdefault(run_id, {})
            kept.update({one.metadata.reply_to_message_id: one for one in found})
            while len(self._handed_out) > _MOST_RUNS:
                self._handed_out.popitem(last=False)
        return [*again, *found]

    def _due(self, message_ids: set[str], run_id: int) -> set[str]:
        """Return which to look for: those that are there, now and then all of them."""
        now = time.monotonic()
        with self._guard:
            absent_due = now >= self._absent_due.get(run_id, float("-inf"))
            if absent_due:
                if len(self._absent_due) >= _MOST_RUNS:
                    self._absent_due.clear()
                self._absent_due[run_id] = now + _ABSENT_EVERY_S
        chosen: set[str] = set()
        size = 0
        for row in self.query(_WAITING, {"run": uint64_to_int64(run_id)}):
            if row["id"] not in message_ids:
                continue
            size += int(row["size"])
            if chosen and size > _LARGEST_LOOK_BYTES:
                return chosen
            chosen.add(row["id"])
        return chosen if chosen or not absent_due else set(message_ids)

    # --- Who is there, what runs -----------------------------------------------------------------

    def get_node_id_by_public_key(self, public_key: bytes) -> int | None:
        """A node keeps its id until it is expelled, which goes through `delete_node`."""
        with self._guard:
            known, forgotten = self._nodes.get(public_key), self._forgotten
        if known is not None:
            return known
        found = super().get_node_id_by_public_key(public_key)
        if found is not None:
            with self._guard:
                if len(self._nodes) >= _MOST_NODES:
                    self._nodes.clear()
                # It may have been expelled since it was found.
                if self._forgotten == forgotten:
                    self._nodes[public_key] = found
        return found

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        """Let a node that crashed come back at once.

        Flower takes it for online until its heartbeats have stayed away for long enough, and
        refuses it until then.
        """
        if super().activate_node(node_id, heartbeat_interval):
            return True
        return self.deactivate_node(node_id) and super().activate_node(node_id, heartbeat_interval)

    def delete_node(self, owner_aid: str, node_id: int) -> None:
        """Forget whom keys belong to, after the database has."""
        super().delete_node(owner_aid, node_id)
        with self._guard:
            self._forgotten += 1
            self._nodes.clear()
            for known in (self._sent, self._empty):
                known.pop(node_id, None)

    def get_run_status(self, run_ids: set[int]) -> dict[int, RunStatus]:
        """Ask the database only when the last answer is half a second old, or was not `running`."""
        now = time.monotonic()
        with self._guard:
            known, forgotten = {id_: self._running.get(id_) for id_ in run_ids}, self._forgotten
        if all(found and now - found[0] < _BELIEVED_S for found in known.values()):
            return {id_: found[1] for id_, found in known.items() if found}
        statuses = super().get_run_status(run_ids)
        self._believe(statuses, now, forgotten)
        return statuses

    def _believe(self, statuses: Mapping[int, RunStatus], now: float, forgotten: int) -> None:
        with self._guard:
            # A run may have ended since they were read.
            if self._forgotten != forgotten:
                return
            self._running = {
                id_: (now, status)
                for id_, status in statuses.items()
                if status.status == Status.RUNNING
            }

    def finish_task(self, *arguments: Any, **named: Any) -> bool:
        """A run that ends has ended at once."""
        ended = super().finish_task(*arguments, **named)
        self._forget_runs()
        return ended

    def _on_task_tokens_expired(self, *arguments: Any) -> None:
        """Nor is a run believed whose coordinator was silent for too long."""
        super()._on_task_tokens_expired(*arguments)
        self._forget_runs()

    def _forget_runs(self) -> None:
        with self._guard:
            self._forgotten += 1
            self._running.clear()

    def cleanup_run(self, run_id: int) -> None:
        """Forget the replies of a run with the run."""
        with self._guard:
            self._handed_out.pop(run_id, None)
            self._absent_due.pop(run_id, None)
        super().cleanup_run(run_id)

    def store_traffic(self, run_id: int, *, bytes_sent: int, bytes_recv: int) -> None:
        """Nobody reads it, and it is a write for each call."""

    def add_clientapp_runtime(self, run_id: int, runtime: float) -> None:
        """Nor this."""

    def _cleanup_expired_task_tokens(self) -> None:
        """Twice a second instead of at every call: a task is dead after a minute of silence."""
        now = time.monotonic()
        with self._guard:
            if now - self._looked < _BELIEVED_S:
                return
            self._looked = now
        super()._cleanup_expired_task_tokens()


def _is_whole(message: Message) -> bool:
    """Whether a message came with what it carries, and under its own id."""
    return _carries(message) and message.object_id == message.metadata.message_id


def _carries(message: Message) -> bool:
    """Whether a message came with what it carries."""
    return bool(message.has_error() or (message.has_content() and len(message.content) > 0))
