"""A training over real processes: it loses a node, it is stopped, and it goes on where it was."""

from __future__ import annotations

import itertools
import time

import pytest

from federated.code_hash import installed_code_hash
from federated.draft import parse_draft
from federated.manifest import Study
from federated.node.budget import Budget
from federated.planning import plan_study
from federated.study_run import Deadlines
from tests.federated.deployment.federation import Running, accountant, entries_of

FAULTY = "node-1"
ROUNDS = 5
DRAFT = """
id = "training-ID"
title = "Low mood after short nights"
question = "Does sleep tell low mood?"
valid_from = FROM
minimum_cohort = 15
sites = ["north", "south"]

[aggregation]
threshold = 4
colluding = 1
minimum_survivors = 4

[[queries]]
epsilon = 8.0
delta = 1e-7
[queries.ask]
kind = "train"
name = "mood"
features = [{ column = "sleep_hours", low = 4.0, high = 10.0 }]
label = { column = "mood", below = 0.0 }
rounds = 5
held_out = 0.2
canaries = 100
"""
_ids = itertools.count(1)


def training(federation: Running) -> Study:
    """A new study of the nodes that are there."""
    text = DRAFT.replace("ID", str(next(_ids))).replace("FROM", str(int(time.time()) - 60))
    return plan_study(
        parse_draft(text.encode()),
        people=25,
        level=0.95,
        roster=federation.roster.hash,
        code_hash=installed_code_hash(),
        nodes=5,
    ).study


def test_a_training_that_loses_a_node_and_is_stopped_goes_on_and_is_paid_once(
    federation: Running,
) -> None:
    federation.wait_whole()
    signed = federation.agreed(training(federation))
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
