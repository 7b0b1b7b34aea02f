"""A round is planned only if its noise is as close to the plan's as was paid for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated import rounds
from federated.aggregation.plan import LARGEST_ROSTER, RoundPlan
from federated.aggregation.schedule import noise_schedule
from federated.errors import ProtocolError
from federated.model import NoisePlan
from federated.questions import declared_question
from federated.rounds import CLOSENESS, Roster, round_plan
from tests.federated.studies import MemorySigner, study


def planned() -> RoundPlan:
    asked = study()
    declared = asked.queries[0]
    keys = {f"node-{k}": MemorySigner(bytes([k]) * 32).public for k in range(1, 5)}
    return round_plan(
        asked,
        declared,
        declared_question(declared.ask),
        round_id="1-0",
        taking_part=Roster(keys=keys, people=dict.fromkeys(keys, 10)),
    )


def test_a_round_is_planned_as_approved() -> None:
    assert planned().noise == study().queries[0].noise


def test_refuses_when_shares_are_further_from_the_noise_than_was_accounted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rounds, "CLOSENESS", 0.0)
    with pytest.raises(ProtocolError, match="close"):
        planned()


@settings(deadline=None, max_examples=150)
@given(data=st.data(), scale=st.floats(2.0**-7, 1e6))
def test_every_round_that_may_be_planned_is_as_close_as_is_accounted(
    data: st.DataObject, scale: float
) -> None:
    nodes = data.draw(st.integers(3, LARGEST_ROSTER))
    threshold = data.draw(st.integers(2 * nodes // 3 + 1, nodes))
    schedule = noise_schedule(
        NoisePlan(mechanism="discrete_gaussian", scale=scale),
        nodes=nodes,
        minimum_survivors=data.draw(st.integers(threshold, nodes)),
        colluding=data.draw(st.integers(0, min(threshold, 2 * threshold - nodes) - 1)),
    )
    # |P - Q| summed over outputs is at most e^ratio - 1, twice the total variation distance.
    assert schedule.log_ratio <= CLOSENESS
