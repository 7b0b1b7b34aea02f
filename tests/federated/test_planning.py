"""A plan foresees the errors of the noise that the sum will really carry."""

from __future__ import annotations

import math

import pytest

from federated.analytics.base import BaseQuery
from federated.analytics.plan import plan_query
from federated.draft import parse_draft
from federated.planning import StudyPlan, plan_study
from federated.questions import declared_question

DRAFT = """
id = "mood-2026"
title = "Mood"
question = "How is the mood of the people who take part?"
valid_from = 1799990000
minimum_cohort = 100
TRUST

[aggregation]
threshold = 4
colluding = 2

[[queries]]
epsilon = 0.2
ask = { kind = "mean", name = "mood", column = "mood" }
"""


def planned(nodes: int | None, trust: str = "") -> StudyPlan:
    return plan_study(
        parse_draft(DRAFT.replace("TRUST", trust).encode()),
        people=400,
        level=0.95,
        roster="ab" * 32,
        code_hash="cd" * 32,
        nodes=nodes,
    )


@pytest.mark.parametrize(
    ("nodes", "trust", "weight"),
    [
        (5, "", 5 / 3),
        (500, "", 500 / 498),
        # Not known: as few as may be.
        (None, "", 4 / 2),
        (5, 'trust_model = "trusted_server"', 1.0),
    ],
)
def test_the_part_of_nodes_that_may_collude_is_foreseen(
    nodes: int | None, trust: str, weight: float
) -> None:
    found = planned(nodes, trust)
    query = declared_question(found.study.queries[0].ask)
    assert isinstance(query, BaseQuery)
    expected = plan_query(query, epsilon=0.2, delta=0, people=400, weight=weight)
    assert found.queries[0].expected == expected.expected
    # It costs nobody more, and is not what the study says of its noise.
    assert found.study.queries[0].noise == expected.noise
    assert found.epsilon == pytest.approx(0.2)


def test_an_answer_is_foreseen_to_be_less_sure_among_few_nodes() -> None:
    few, many = (planned(nodes).queries[0].expected[0].half_width for nodes in (5, 500))
    # Noise is nearly all of it here.
    assert few / many == pytest.approx(math.sqrt(5 / 3), rel=0.1)
