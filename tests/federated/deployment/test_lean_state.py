"""What the SuperLink keeps in memory never hides what its database holds."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID, Status, SubStatus
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.run import RunStatus
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager

from federated.app.client_app import content_of, payload_of
from federated.deployment import lean_state
from federated.deployment.lean_state import LeanLinkState
from tests.openbao import wait_until


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


def message_to(node: int, run: int, task: int, stage: str = "mask") -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id = run, SUPERLINK_NODE_ID
    TaskIdentity.task_id = task
    message = Message(content_of(stage, b"x"), node, "query", ttl=60.0)
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


def send(state: LeanLinkState, node: int, run: int, task: int, stage: str = "mask") -> Message:
    """What the coordinator sends, whole."""
    message = message_to(node, run, task, stage)
    assert store(state, message) == (True, [])
    return message


def store(state: LeanLinkState, message: Message) -> tuple[bool, list[str]]:
    session = state.start_session(message.metadata.run_id)
    return state.store_message_and_object_tree(message, get_object_tree(message), session)


def answer_to(message: Message, payload: bytes = b"answer") -> Message:
    reply = Message(content_of("mask", payload), reply_to=message)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    return reply


def ids(replies: list[Message]) -> set[str]:
    return {reply.metadata.reply_to_message_id for reply in replies}


def pull(state: LeanLinkState, run: int, *asked: Message) -> set[str]:
    """As Flower's handler does for the coordinator: what is handed out it deletes."""
    found = state.get_message_res({one.metadata.message_id for one in asked}, run)
    state.delete_messages(ids(found))
    for one in found:
        state.object_store.get_object_tree(one.metadata.message_id)
        assert payload_of(one.content) == ("mask", b"answer")
    return ids(found)


def test_a_message_is_handed_out_with_what_it_carries(state: LeanLinkState) -> None:
    node, _ = new_node(state)
    run, task = new_run(state)
    send(state, node, run, task)
    (got,) = state.get_message_ins(node, 1)
    assert payload_of(got.content) == ("mask", b"x")


def test_flowers_supernode_finds_the_parts_of_a_message_that_came_whole(
    state: LeanLinkState,
) -> None:
    node, _ = new_node(state)
    run, task = new_run(state)
    message = send(state, node, run, task)
    tree = state.object_store.get_object_tree(message.metadata.message_id)
    contents = {
        part.object_id: state.get_object(run, part.object_id) or b""
        for part in iterate_object_tree(tree)
    }
    rebuilt = inflate_object_from_contents(message.metadata.message_id, contents)
    assert isinstance(rebuilt, Message)
    assert payload_of(rebuilt.content) == ("mask", b"x")


def test_a_node_is_told_at_once_what_comes_while_it_waits(state: LeanLinkState) -> None:
    node, _ = new_node(state)
    run, task = new_run(state)
    assert not state.get_message_ins(node, 1)
    with ThreadPoolExecutor() as pool:
        looks = pool.submit(lambda: [state.get_message_ins(node, 1) for _ in range(2)])
        wait_until(lambda: node in state._bells)
        send(state, node, run, task)
        assert [len(found) for found in looks.result(60)] == [1, 0]


def test_only_so_many_nodes_wait_at_a_time(
    state: LeanLinkState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lean_state, "_MOST_HELD", 0)
    monkeypatch.setattr(lean_state, "HOLD_S", 600.0)
    node, _ = new_node(state)
    assert not state.get_message_ins(node, 1)
    assert not state.get_message_ins(node, 1)


def test_a_reply_is_handed_out_until_it_is_not_asked_for_any_more(state: LeanLinkState) -> None:
    run, task = new_run(state)
    first, second = (send(state, new_node(state)[0], run, task) for _ in range(2))
    reply = answer_to(first)
    store(state, reply)
    wanted = {first.metadata.message_id}
    # Twice the answer was lost on its way.
    assert pull(state, run, first, second) == wanted
    assert pull(state, run, first, second) == wanted
    assert pull(state, run, second) == set()
    assert reply.metadata.message_id not in state.object_store


def test_a_reply_whose_parts_never_come_holds_up_no_other(state: LeanLinkState) -> None:
    run, task = new_run(state)
    slow, quick = (send(state, new_node(state)[0], run, task) for _ in range(2))
    reply = answer_to(slow)
    parts = message_to_proto(reply)
    parts.ClearField("content")
    parts.content.SetInParent()
    stored, missing = state.store_message_and_object_tree(
        message_from_proto(parts), get_object_tree(reply), state.start_session(run)
    )
    assert stored
    assert missing
    asked = {one.metadata.message_id for one in (slow, quick)}
    assert ids(state.get_message_res(asked, run)) == {slow.metadata.message_id}
    store(state, answer_to(quick))
    assert ids(state.get_message_res(asked, run)) == asked
    assert ids(state.get_message_res(asked, run)) == asked


def test_who_answers_has_what_it_was_asked_and_its_parts_are_gone(state: LeanLinkState) -> None:
    run, task = new_run(state)
    message = send(state, new_node(state)[0], run, task)
    store(state, answer_to(message))
    assert message.metadata.message_id not in state.object_store


def test_no_more_is_handed_out_at_a_time_than_fits(
    state: LeanLinkState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lean_state, "_LARGEST_LOOK_BYTES", 1)
    run, task = new_run(state)
    waiting = [send(state, new_node(state)[0], run, task) for _ in range(3)]
    for one in waiting:
        store(state, answer_to(one))
    for _ in range(3):
        (came,) = pull(state, run, *waiting)
        waiting = [one for one in waiting if one.metadata.message_id != came]
    assert not waiting


def test_the_second_of_two_replies_is_not_taken(state: LeanLinkState) -> None:
    run, task = new_run(state)
    message = send(state, new_node(state)[0], run, task)
    assert store(state, answer_to(message))[0]
    assert not store(state, answer_to(message, b"another"))[0]
    assert pull(state, run, message) == {message.metadata.message_id}


def test_a_node_expelled_while_it_is_looked_up_is_unknown_after_that(
    state: LeanLinkState, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, key = new_node(state)
    found = SqlLinkState.get_node_id_by_public_key

    def expelled_meanwhile(self: LeanLinkState, public_key: bytes) -> int | None:
        id_ = found(self, public_key)
        if id_ is not None:
            self.delete_node("owner", node)
        return id_

    monkeypatch.setattr(SqlLinkState, "get_node_id_by_public_key", expelled_meanwhile)
    state.get_node_id_by_public_key(key)
    assert state.get_node_id_by_public_key(key) is None


def test_a_run_that_ends_while_it_is_looked_up_is_not_taken_for_running(
    state: LeanLinkState, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, task = new_run(state)
    found = SqlLinkState.get_run_status

    def ended_meanwhile(self: LeanLinkState, run_ids: set[int]) -> dict[int, RunStatus]:
        statuses = found(self, run_ids)
        self.finish_task(task, SubStatus.COMPLETED, "")
        return statuses

    monkeypatch.setattr(SqlLinkState, "get_run_status", ended_meanwhile)
    state.get_run_status({run})
    assert state.get_run_status({run})[run].status == Status.FINISHED


def test_a_run_deleted_while_messages_arrive_leaves_nothing_behind(state: LeanLinkState) -> None:
    nodes = [new_node(state)[0] for _ in range(3)]
    for _ in range(4):
        run, task = new_run(state)
        asked = [send(state, node, run, task) for node in nodes]
        messages = [message_to(node, run, task, f"more {n}") for n in range(6) for node in nodes]
        replies = [answer_to(one) for one in asked]
        with ThreadPoolExecutor(max_workers=4) as pool:
            arriving = [pool.submit(store, state, one) for one in [*messages, *replies]]
            wait_until(lambda: sum(one.done() for one in arriving) > 2)  # noqa: B023
            assert state.finish_task(task, SubStatus.COMPLETED, "")
            state.cleanup_run(run)
            for one in arriving:
                one.result(60)
        assert state.get_message_ids_from_run_id(run) == set()
        assert not state.num_message_res()
        assert not len(state.object_store)
