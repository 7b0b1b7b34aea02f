"""Flower's state in SQLite, without what a round pays for and nobody reads.

Flower asks its database four to eight times for each call of a node: who the caller is, whether the
run still runs, which tasks are dead, how many bytes went by. A round of ten nodes is some thousand
calls. What is kept here in memory is only what this one process writes itself and can therefore
know: it is the database's only writer. Messages, runs and nodes stay in the database as they were,
so that a SuperLink that was killed goes on where it stopped.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Final

from flwr.app import Message
from flwr.common.constant import Status
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.run import RunStatus

#: For so long a run that runs is taken to go on running, and dead tasks go unnoticed.
_BELIEVED_S: Final = 0.5
_MOST_NODES: Final = 10_000


class LeanLinkState(SqlLinkState):
    """As `SqlLinkState`, cheaper."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._guard = threading.Lock()
        self._looked = float("-inf")
        self._running: dict[int, tuple[float, RunStatus]] = {}
        self._nodes: dict[bytes, int] = {}
        self._sent: dict[int, int] = {}
        self._empty: dict[int, int] = {}

    def store_message_ins(self, message: Message) -> str | None:
        """Remember that there is something for its receiver."""
        stored = super().store_message_ins(message)
        with self._guard:
            node = message.metadata.dst_node_id
            self._sent[node] = self._sent.get(node, 0) + 1
        return stored

    def get_message_ins(
        self, node_id: int, limit: int | None, *, run_id: int | None = None
    ) -> list[Message]:
        """Do not take the database's write lock for a node for which nothing has come since."""
        with self._guard:
            sent = self._sent.get(node_id, 0)
            if run_id is None and self._empty.get(node_id) == sent:
                return []
        found = super().get_message_ins(node_id, limit, run_id=run_id)
        if not found and run_id is None:
            with self._guard:
                self._empty[node_id] = sent
        return found

    def get_node_id_by_public_key(self, public_key: bytes) -> int | None:
        """A node keeps its id until it is expelled, which goes through `delete_node`."""
        with self._guard:
            known = self._nodes.get(public_key)
        if known is not None:
            return known
        found = super().get_node_id_by_public_key(public_key)
        if found is not None:
            with self._guard:
                if len(self._nodes) >= _MOST_NODES:
                    self._nodes.clear()
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
            self._nodes.clear()

    def get_run_status(self, run_ids: set[int]) -> dict[int, RunStatus]:
        """Ask the database only when the last answer is half a second old, or was not `running`."""
        now = time.monotonic()
        with self._guard:
            known = {id_: self._running.get(id_) for id_ in run_ids}
        if all(found and now - found[0] < _BELIEVED_S for found in known.values()):
            return {id_: found[1] for id_, found in known.items() if found}
        statuses = super().get_run_status(run_ids)
        with self._guard:
            self._running = {
                id_: (now, status)
                for id_, status in statuses.items()
                if status.status == Status.RUNNING
            }
        return statuses

    def finish_task(self, *arguments: Any, **named: Any) -> bool:
        """A run that ends has ended at once."""
        ended = super().finish_task(*arguments, **named)
        with self._guard:
            self._running.clear()
        return ended

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
