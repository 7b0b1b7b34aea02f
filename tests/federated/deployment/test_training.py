"""A training over real processes: it loses a node, it is stopped, and it goes on where it was."""

from __future__ import annotations

import itertools

import pytest

from federated.node.budget import Budget
from federated.study_run import Deadlines
from tests.federated.deployment.federation import Running, accountant, entries_of

FAULTY = "node-1"
ROUNDS = 5


def test_a_training_that_loses_a_node_and_is_stopped_goes_on_and_is_paid_once(
    federation: Running,
) -> None:
    federation.wait_whole()
    signed = federation.agreed(federation.training())
    coordinator = federation.coordinator(Deadlines(greet_s=30.0, stage_s=60.0, stragglers_s=4.0))
    looks = itertools.count()

    def still() -> None:
        """Before the run, then before each round: a node is told to die, later Ctrl-C comes."""
        look = next(looks)
        if look == 2:
            (federation.places.node(FAULTY) / "fault").write_text("die mask")
        if look == 4:
            raise KeyboardInterrupt

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        coordinator.run(signed, say=said.append, still=still)
    assert [line for line in said if "round 2 of 5" in line]
    federation.wait_whole()
    outcome = coordinator.run(signed, say=said.append)
    assert not outcome.failures
    (model,) = outcome.models
    assert (model.asked, model.summed, model.nodes, model.people) == (ROUNDS, ROUNDS, 4, 20)
    assert model.noise is not None
    assert model.noise.passed
    (charge,) = federation.ledger.charges(signed.study.study_hash)
    assert charge.cost == model.cost
    federation.ledger.verify(entries_of(federation.log))
    store = federation.open_store("node-2")
    try:
        rows = [
            one
            for one in Budget(store, accountant).spends(store.people()[0])
            if one.study == signed.study.id
        ]
    finally:
        store.close()
    assert [one.cost is not None for one in rows] == [True] + [False] * (ROUNDS - 1)
