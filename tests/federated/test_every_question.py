"""Every kind of question is asked of real nodes, and answered as their people's data say."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from federated.analytics.declare import KINDS
from federated.code_hash import installed_code_hash
from federated.database import StudyDatabase
from federated.draft import parse_draft
from federated.ledger import Ledger
from federated.manifest import Study
from federated.node.consent import Consents, Scope
from federated.planning import plan_study
from federated.study_run import Deadlines
from tests.federated.deployment.federation import PEOPLE, Running, agree, ledger_over
from tests.federated.node.tables import fill

DRAFT = """
id = "every-question-NUMBER"
title = "Every question"
question = "Does each kind of question come back with an answer?"
valid_from = FROM
minimum_cohort = 6

[aggregation]
threshold = 4
"""
ASKED = {
    "count": 'column = "phq9_total", at_least = 10.0',
    "histogram": 'column = "phq9_total", edges = [0.0, 10.0, 27.0]',
    "mean": 'column = "mood", low = 0.0, high = 10.0',
    "variance": 'column = "mood", low = 0.0, high = 10.0',
    "quantiles": 'column = "mood", low = 0.0, high = 10.0',
    "association": 'x = { column = "sleep_hours" }, '
    'y = { column = "mood", low = 0.0, high = 10.0 }, spread_x = 2.0, spread_y = 2.5, days = 14',
    "split": 'outcome = "mood", less_than = 5.0, by = "sleep_hours"',
    "contrast": 'outcome = { column = "phq9_total" }',
    "groups": 'outcome = { column = "phq9_total" }, by = { column = "sleep_hours" }, '
    "edges = [0.0, 7.0, 24.0]",
    "trend": 'column = "mood", low = 0.0, high = 10.0, weeks = 2',
}  # fmt: skip
COLUMNS = frozenset({"mood", "sleep_hours", "phq9_total", "arm"})
DAYS = 14


@pytest.fixture
def asked_about(federation: Running) -> Iterator[Running]:
    """A federation whose people have moods, nights and scores, and agree to everything."""
    federation.wait_whole()
    rng = np.random.default_rng(7)
    scope = Scope(kinds=frozenset(KINDS), columns=COLUMNS, purposes=frozenset({"HRESCH"}))
    stores = [federation.open_store(name) for name in federation.names]
    try:
        for store in stores:
            people = {}
            for place, name in enumerate(PEOPLE):
                slept = 7.0 + rng.choice([-1.5, 1.5], DAYS)
                people[name] = {
                    "sleep_hours": slept.tolist(),
                    # Better by a point for each hour more.
                    "mood": (5.0 + (slept - 7.0) + rng.normal(0.0, 0.3, DAYS)).tolist(),
                    "phq9_total": [4.0 if place % 2 else 14.0],
                    "arm": [float(place % 2)],
                }
            fill(store, people)
            Consents(store).give(store.people(), scope, now=int(time.time()))
        yield federation
    finally:
        for store in stores:
            agree(store)
            store.close()


def study_of(federation: Running, kind: str, number: int) -> Study:
    """A study of one question, at the most that a study may cost: there are few people."""
    draft = DRAFT.replace("FROM", str(int(time.time()) - 60)).replace("NUMBER", str(number))
    ask = f'kind = "{kind}", name = "{kind}", {ASKED[kind]}'
    draft += f"[[queries]]\nepsilon = 16.0\nask = {{ {ask} }}\n"
    plan = plan_study(
        parse_draft(draft.encode()),
        people=25,
        level=0.95,
        roster=federation.roster.hash,
        code_hash=installed_code_hash(),
    )
    return plan.study


@pytest.mark.timeout(1200)
def test_every_kind_of_question_is_answered(asked_about: Running, tmp_path: Path) -> None:
    assert ASKED.keys() == KINDS.keys()
    database = StudyDatabase(f"sqlite:///{tmp_path / 'ledger.sqlite3'}")
    try:
        found = answers(asked_about, ledger_over(database, asked_about.log, cap=400.0))
    finally:
        database.close()
    assert found.keys() == KINDS.keys()
    # Three of five people at each node score 14, the others 4; moods follow the nights.
    assert next(iter(found["count"].values())) == pytest.approx(15.0, abs=5.0)
    assert 3.0 < next(iter(found["mean"].values())) < 7.0
    assert found["contrast"]["effect"] == pytest.approx(-10.0, abs=5.0)
    assert found["association"]["slope"] == pytest.approx(1.0, abs=0.7)


def answers(asked_about: Running, ledger: Ledger) -> dict[str, dict[str, float]]:
    """By question: what is estimated, and the estimate."""
    found: dict[str, dict[str, float]] = {}
    for number, kind in enumerate(ASKED):
        study = study_of(asked_about, kind, number)
        signed = asked_about.parties.sign(study)
        asked_about.log.append_published(study)
        patience = Deadlines(greet_s=30.0, stage_s=90.0, stragglers_s=30.0)
        outcome = asked_about.coordinator(patience, ledger).run(signed)
        assert not outcome.failures
        [one] = outcome.answers
        assert (one.people, one.nodes) == (25, 5)
        found[one.query] = {each.name: each.value for each in one.answer.estimates}
        round_id = f"{outcome.run_id}-0"
        assert ledger.reservation(study=study.study_hash, round_id=round_id)
    return found
