"""One run: what is asked of whom, in which order, and what becomes of nodes that misbehave."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from federated.errors import (
    BudgetExhaustedError,
    CohortError,
    FederatedError,
    LedgerError,
)
from federated.node.budget import Budget, Cap
from federated.node.consent import Consents
from federated.rounds import sign_reply
from federated.study_run import STAGES
from tests.federated.deployment.federation import accountant
from tests.federated.ledgers import make_ledger
from tests.federated.runs import RUN, World, gone, opened


@pytest.fixture
def minimum_cohort() -> int:
    return 6


@pytest.fixture
def world(tmp_path: Path, minimum_cohort: int) -> Iterator[World]:
    with opened(tmp_path, minimum_cohort=minimum_cohort) as made:
        yield made


def test_reserves_before_anybody_is_asked_and_spends_before_the_answer(world: World) -> None:
    outcome = world.run()
    assert (outcome.nodes, outcome.people) == (5, 25)
    assert world.asked == list(STAGES)
    assert world.spent()
    assert world.receipts("node-1") == ["allowed"]


@pytest.mark.parametrize("stage", STAGES)
def test_goes_on_without_a_node_that_stops_answering(world: World, stage: str) -> None:
    for later in STAGES[STAGES.index(stage) :]:
        world.faults["node-2", later] = gone
    outcome = world.run()
    assert outcome.nodes == (5 if stage in {"consistency", "unmask"} else 4)
    assert world.spent()


@pytest.mark.parametrize("stage", STAGES[1:])
def test_releases_nothing_when_two_vanish_and_what_was_reserved_stays(
    world: World, stage: str
) -> None:
    for name in ("node-2", "node-3"):
        for later in STAGES[STAGES.index(stage) :]:
            world.faults[name, later] = gone
    with pytest.raises(CohortError):
        world.run()
    assert world.reserved()
    assert not world.spent()


def test_reserves_nothing_when_too_few_are_there(world: World) -> None:
    for name in ("node-2", "node-3"):
        world.faults[name, "greet"] = gone
    with pytest.raises(CohortError, match="are there"):
        world.run()
    assert not world.reserved()


@pytest.mark.parametrize("minimum_cohort", [26])
def test_reserves_nothing_when_too_few_people_would_take_part(world: World) -> None:
    with pytest.raises(CohortError, match="at least 26"):
        world.run()
    assert world.asked == ["greet"]
    assert not world.reserved()


@pytest.mark.parametrize("minimum_cohort", [21])
def test_releases_nothing_when_too_few_people_survive(world: World) -> None:
    world.faults["node-2", "share"] = gone
    with pytest.raises(CohortError, match="20 people"):
        world.run()
    assert world.reserved()
    assert not world.spent()
    # With so few no node is asked for a vector any more.
    assert "mask" not in world.asked


FAULTS = ["noise", "empty", "huge", "unsigned", "nan", "wrong-shape"]


@pytest.mark.parametrize(
    ("stage", "fault"),
    [*((stage, "noise") for stage in STAGES), *(("mask", fault) for fault in FAULTS[1:])],
)
def test_counts_a_node_that_answers_garbage_as_gone(world: World, stage: str, fault: str) -> None:
    def broken(reply: bytes, request: bytes) -> bytes:
        answer = reply[64:]
        match fault:
            case "noise":
                return world.sign("node-2", os.urandom(300), stage, request)
            case "empty":
                return b""
            case "huge":
                return world.sign("node-2", bytes(9 * 1024 * 1024), stage, request)
            case "unsigned":
                return os.urandom(64) + answer
            case "nan":
                return world.sign(
                    "node-2", msgspec.msgpack.encode([float("nan")] * 3), stage, request
                )
            case _:
                return world.sign("node-2", answer[:-3], stage, request)

    world.faults["node-2", stage] = broken
    outcome = world.run()
    assert outcome.nodes == (5 if stage in {"consistency", "unmask"} else 4)


def test_a_node_cannot_answer_for_another(world: World) -> None:
    other = Ed25519PrivateKey.generate()

    def forged(reply: bytes, request: bytes) -> bytes:
        return sign_reply(other, reply[64:], run_id=RUN, stage="mask", request=request)

    world.faults["node-2", "mask"] = forged
    assert world.run().nodes == 4


def test_a_reply_to_another_stage_or_request_does_not_count(world: World) -> None:
    kept: list[bytes] = []

    def keep(reply: bytes, request: bytes) -> bytes:
        kept.append(reply)
        return reply

    world.faults["node-2", "share"] = keep
    world.faults["node-2", "mask"] = lambda *_: kept[0]
    assert world.run().nodes == 4


def test_asks_nobody_whose_budget_would_not_do(world: World, tmp_path: Path) -> None:
    world.ledger = make_ledger(f"sqlite:///{tmp_path / 'small.sqlite3'}", world.recorded, cap=0.5)
    with pytest.raises(BudgetExhaustedError):
        world.run()
    assert world.asked == ["greet"]
    assert not world.reserved()


def test_never_dispatches_the_same_round_twice(world: World) -> None:
    for name in ("node-2", "node-3"):
        world.faults[name, "share"] = gone
    with pytest.raises(CohortError):
        world.run()
    world.faults.clear()
    before = list(world.asked)
    with pytest.raises(CohortError, match="0 of 5 nodes"):
        world.run()
    assert world.asked == [*before, "greet"]


def test_never_reserves_the_same_round_twice(world: World) -> None:
    """Not even where every node would answer it again."""
    world.run()
    for node in world.nodes.values():
        with node.store.database.transaction():
            node.store.generations.advance()
            node.store.database.run("DELETE FROM spends")
    before = list(world.asked)
    with pytest.raises(FederatedError) as caught:
        world.run()
    assert isinstance(caught.value, LedgerError | BudgetExhaustedError)
    assert world.asked == [*before, "greet"]


def test_dispatches_nothing_when_the_ledger_fails(world: World) -> None:
    def failing(**named: object) -> None:
        raise LedgerError("away")

    world.ledger.reserve = failing  # type: ignore[method-assign, assignment]
    with pytest.raises(LedgerError):
        world.run()
    assert world.asked == ["greet"]


def test_gives_no_answer_out_when_it_cannot_be_spent(world: World) -> None:
    def failing(reservation: object) -> None:
        raise LedgerError("away")

    world.ledger.spend = failing  # type: ignore[method-assign]
    with pytest.raises(LedgerError):
        world.run()
    assert world.reserved()


def test_a_run_of_another_id_gets_no_answer(world: World) -> None:
    with pytest.raises(CohortError):
        world.run(run_id=RUN + 1)


def test_a_changed_run_configuration_gets_no_answer(world: World) -> None:
    world.configuration = {**world.configuration, "study-id": "other"}
    with pytest.raises(CohortError):
        world.run()
    assert world.receipts("node-1") == ["refused"]


def test_people_whose_own_budget_is_used_up_are_not_asked(world: World) -> None:
    for name in ("node-2", "node-3"):
        Budget(world.nodes[name].store, accountant).set_cap(Cap(epsilon=0.5, delta=1e-4))
    with pytest.raises(CohortError):
        world.run()
    assert world.receipts("node-2") == ["refused"]


def test_people_are_told_of_a_round_that_nobody_went_on_with(world: World) -> None:
    for name in ("node-2", "node-3"):
        world.faults[name, "share"] = gone
    with pytest.raises(CohortError):
        world.run()
    service = world.nodes["node-1"].service
    service.tidy()
    assert world.receipts("node-1") == ["reserved"]
    late = time.monotonic() + 10_000
    service._ports = replace(service._ports, ticks=lambda: late)
    service.tidy()
    assert world.receipts("node-1") == ["failed"]


def test_consent_that_was_taken_back_is_respected(world: World) -> None:
    store = world.nodes["node-2"].store
    for person in store.people():
        Consents(store).revoke(person, now=int(time.time()))
    outcome = world.run()
    assert outcome.nodes == 4
    assert outcome.dropped == {"node-2": "greet: no answer"}
    assert world.receipts("node-2") == ["refused"]
