"""A plan that would not protect what it should is none; its hash covers all of it."""

from __future__ import annotations

from typing import Any

import pytest

from federated.aggregation.plan import default_colluding, default_threshold
from federated.errors import ProtocolError
from tests.federated.aggregation.rounds import make_plan, noise, public


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"threshold": 4}, "over two thirds"),
        ({"threshold": 7}, "over two thirds"),
        ({"threshold": 0}, "over two thirds"),
        ({"minimum_survivors": 4}, "survivors"),
        ({"minimum_survivors": 7}, "survivors"),
        ({"colluding": 4}, "two lists of survivors"),
        ({"colluding": -1}, "two lists of survivors"),
        ({"colluding": 0, "noise": noise()}, "knows his own node's noise"),
        ({"dimension": 0}, "no length"),
        ({"bound": 0}, "no length"),
        ({"modulus_bits": 13}, "must have 14 to 64 bits"),
        ({"modulus_bits": 65}, "to 64 bits"),
        ({"bound": 2**63}, "to 64 bits"),
        ({"noise": noise(scale=float("nan"))}, "cannot be shared"),
        ({"noise": noise(scale=float("inf"))}, "cannot be shared"),
        ({"noise": noise(scale=-1.0)}, "cannot be shared"),
        ({"noise": noise(scale=0.0)}, "cannot be shared"),
        ({"noise": noise(scale=2.0**41), "modulus_bits": 64}, "cannot be shared"),
        ({"study": "line\nbreak"}, "id of the plan"),
        ({"round_id": ""}, "id of the plan"),
        ({"roster": {f"node {at}": public(f"{at}") for at in range(6)}}, "id of the plan"),
        ({"roster": {f"node-{at}": public("same") for at in range(6)}}, "same key"),
        ({"roster": {f"node-{at}": bytes([at]) * 3 for at in range(6)}}, "not an Ed25519"),
        ({"roster": {}}, "3 to 1000 nodes"),
        ({"roster": {"a": public("a"), "b": public("b")}, "threshold": 2}, "3 to 1000 nodes"),
        ({"roster": {f"n{at}": at.to_bytes(32) for at in range(1001)}}, "3 to 1000 nodes"),
        ({"minimum_people": 1}, "speak for 0 people"),
        ({"people": {f"node-{at}": 2 for at in range(6)}, "minimum_people": 13}, "for 12 people"),
        ({"people": {"node-0": 20}}, "for each of them"),
        ({"people": {f"node-{at}": 2 for at in range(7)}}, "for each of them"),
    ],
)
def test_refuses_a_plan_that_does_not_protect(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        make_plan(**changes)


def test_a_plan_needs_no_colluding_node_where_nodes_know_no_noise() -> None:
    assert make_plan().colluding == 0
    plan = make_plan(noise=noise(), trust_model="trusted_server", colluding=0)
    assert plan.colluding == 0


@pytest.mark.parametrize("nodes", range(3, 40))
def test_the_defaults_are_a_plan(nodes: int) -> None:
    plan = make_plan(nodes, colluding=default_colluding(nodes), noise=noise())
    assert 3 * plan.threshold > 2 * nodes >= 3 * (plan.threshold - 1)
    assert plan.threshold == default_threshold(nodes)
    assert plan.colluding < 2 * plan.threshold - nodes


@pytest.mark.parametrize(
    "changes",
    [
        {"study": "other"},
        {"question": "other"},
        {"round_id": "2"},
        {"dimension": 6},
        {"bound": 6001},
        {"modulus_bits": 33},
        {"roster": {f"node-{at}": public(f"new-{at}") for at in range(6)}},
        {"roster": {f"nodes-{at}": public(f"node-{at}") for at in range(6)}},
        {"threshold": 6, "minimum_survivors": 6},
        {"minimum_survivors": 6},
        {"colluding": 1},
        {"noise": noise()},
        {"noise": noise(scale=20.000000001)},
        {"noise": noise("discrete_laplace")},
        {"trust_model": "trusted_server"},
        {"people": dict.fromkeys([f"node-{at}" for at in range(6)], 2)},
        {"people": {f"node-{at}": at for at in range(6)}, "minimum_people": 2},
        {"given": "ab" * 32},
    ],
)
def test_the_hash_covers_every_field(changes: dict[str, Any]) -> None:
    others = [make_plan(), make_plan(noise=noise(scale=21.0))]
    assert make_plan(**changes).digest not in {plan.digest for plan in others}


def test_the_hash_does_not_depend_on_the_order_of_the_roster() -> None:
    roster = {f"node-{at}": public(f"node-{at}") for at in range(6)}
    backwards = dict(reversed(roster.items()))
    assert make_plan(roster=roster).digest == make_plan(roster=backwards).digest
    people = {f"node-{at}": at for at in range(6)}
    reversed_people = dict(reversed(people.items()))
    assert make_plan(people=people).digest == make_plan(people=reversed_people).digest
    assert make_plan(people=people).digest != make_plan(people=people | {"node-0": 1}).digest
    # Fixed, so that nodes and coordinators of two versions are not apart without notice.
    assert make_plan().digest.hex()[:16] == "36ec9f2e446690d3"
