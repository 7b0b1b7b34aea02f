"""What the SuperLink keeps in memory never hides what its database holds."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID, Status, SubStatus
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager

from federated.app.client_app import content_of
from federated.deployment.lean_state import LeanLinkState


@contextmanager
def opened(directory: Path) -> Iterator[LeanLinkState]:
    database = str(directory / "state.sqlite3")
    with warnings.catch_warnings():
        # Flower's migrations are configured in a way that its library deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        store = ObjectStoreFactory(database).store()
        made = LeanLinkState(database, NoOpFederationManager(), store)
        made.initialize()
    yield made
    for one in (made, store):
        one._engine.dispose()  # type: ignore[union-attr]
    with warnings.catch_warnings():
        # Flower leaves connections open behind its migrations.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[LeanLinkState]:
    with opened(tmp_path) as made:
        yield made


def new_node(state: LeanLinkState) -> tuple[int, bytes]:
    key = public_key_to_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())
    node = state.create_node("owner", "owner", key, 15.0)
    assert state.activate_node(node, 15.0)
    return node, key


def new_run(state: LeanLinkState) -> tuple[int, int]:
    run = state.create_run(
        "a/b", "1", "00" * 32, {}, NOOP_FEDERATION_ID, None, "owner", TaskType.SERVER_APP
    )
    (task,) = [task for task in state.get_tasks(statuses=[Status.PENDING]) if task.run_id == run]
    assert state.claim_task(task.task_id)
    assert state.activate_task(task.task_id)
    return run, task.task_id


def message_to(node: int, run: int, task: int) -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id = run, SUPERLINK_NODE_ID
    TaskIdentity.task_id = task
    message = Message(content_of("mask", b"x"), node, "query", ttl=60.0)
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def test_a_node_that_found_nothing_finds_what_came_since(state: LeanLinkState) -> None:
    node, _ = new_node(state)
    run, task = new_run(state)
    assert not state.get_message_ins(node, 1)
    assert not state.get_message_ins(node, 1)
    assert state.store_message_ins(message_to(node, run, task))
    assert len(state.get_message_ins(node, 1)) == 1
    assert not state.get_message_ins(node, 1)


def test_what_was_stored_before_a_restart_is_found_after_it(
    state: LeanLinkState, tmp_path: Path
) -> None:
    node, _ = new_node(state)
    run, task = new_run(state)
    state.store_message_ins(message_to(node, run, task))
    with opened(tmp_path) as again:
        assert len(again.get_message_ins(node, 1)) == 1


def test_a_run_that_ended_is_not_taken_for_running(state: LeanLinkState) -> None:
    run, task = new_run(state)
    assert state.get_run_status({run})[run].status == Status.RUNNING
    assert state.finish_task(task, SubStatus.COMPLETED, "")
    assert state.get_run_status({run})[run].status == Status.FINISHED


def test_a_node_that_is_expelled_is_unknown_at_once(state: LeanLinkState) -> None:
    node, key = new_node(state)
    assert state.get_node_id_by_public_key(key) == node
    state.delete_node("owner", node)
    assert state.get_node_id_by_public_key(key) is None
    assert not state.activate_node(node, 15.0)


def test_a_node_that_crashed_comes_back_at_once(state: LeanLinkState) -> None:
    node, _ = new_node(state)
    assert state.activate_node(node, 15.0)
