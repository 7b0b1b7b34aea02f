"""Trying a training out: the study's own noise, the same people for all ways, nothing hidden."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from federated.errors import ManifestError
from federated.learning.round_query import TrainQuery
from federated.research import Asked, choose, declared, draft_of, plan, try_out
from federated.research.trials import CENTRALISED, CURATOR, LAST_VALUE, OWN_MEAN, STUDY
from tests.federated.research.made_up import TRAINING, people

DELTA = 1e-4
PEOPLE = people(300)


def training(**changes: Any) -> TrainQuery:
    query = declared({**TRAINING, **changes})
    assert isinstance(query, TrainQuery)
    return query


def test_each_way_is_judged_and_privacy_costs_more_at_a_smaller_epsilon() -> None:
    found = try_out(training(), PEOPLE, epsilon=4.0, delta=DELTA, repeats=3)
    assert set(found.scores) == {STUDY, CURATOR, CENTRALISED}
    assert set(found.past) == {STUDY, CURATOR, CENTRALISED, OWN_MEAN, LAST_VALUE}
    assert all(len(one) == 3 for one in (*found.scores.values(), *found.past.values()))
    assert found.figure == "AUC"
    assert found.mean(STUDY) > 0.85
    assert abs(found.mean(STUDY) - found.mean(CURATOR)) < 0.05
    # Moods follow the day's sleep alone: the past says nothing.
    assert 0.4 < found.past[OWN_MEAN].mean() < 0.6
    loud = try_out(training(), PEOPLE, epsilon=0.02, delta=DELTA, repeats=3)
    assert loud.mean(STUDY) < found.mean(STUDY) - 0.05
    assert np.isclose(loud.mean(CENTRALISED), found.mean(CENTRALISED))


def test_the_noise_is_that_of_the_study_that_would_be_planned() -> None:
    query = training()
    text = draft_of(
        Asked(question=query, epsilon=2.0, delta=DELTA), study="low-mood", title="b", question="c",
        valid_from=dt.date(2026, 12, 1), minimum_cohort=100, threshold=3,
    )  # fmt: skip
    (planned,) = plan(text, people=300).found.queries
    found = try_out(query, PEOPLE, epsilon=2.0, delta=DELTA, repeats=1)
    assert found.noise == planned.noise


def test_a_training_by_turns_is_tried_out_with_its_turns_and_its_noise() -> None:
    query = training(rounds=16, turns={"gap": 4, "bands": 8})
    assert query.turns is not None
    assert len(query.turns.factors) == 8
    found = try_out(query, PEOPLE, epsilon=4.0, delta=DELTA, repeats=2)
    assert found.mean(STUDY) > 0.8
    everybody = try_out(training(rounds=16), PEOPLE, epsilon=4.0, delta=DELTA, repeats=1)
    norm = query.factors.squared_sensitivity(query.participation) ** 0.5
    assert found.noise.scale / everybody.noise.scale == pytest.approx(norm / 4, rel=1e-2)


def test_noise_that_colluding_nodes_may_tell_comes_on_top_in_the_study_alone() -> None:
    calm, loud = (
        try_out(
            training(), PEOPLE, epsilon=0.5, delta=DELTA, repeats=4, nodes=10, colluding=colluding
        )
        for colluding in (0, 9)
    )
    assert loud.noise == calm.noise
    assert loud.scores[CURATOR].tolist() == calm.scores[CURATOR].tolist()
    assert loud.mean(STUDY) < calm.mean(STUDY)


def test_the_same_seed_gives_the_same_figures_and_another_others() -> None:
    first, same, other = (
        try_out(training(), PEOPLE, epsilon=1.0, delta=DELTA, repeats=2, seed=seed).scores[STUDY]
        for seed in (b"a", b"a", b"b")
    )
    assert first.tolist() == same.tolist()
    assert first.tolist() != other.tolist()


def test_a_number_is_judged_by_its_mean_absolute_error_in_its_own_unit() -> None:
    label = {"column": "mood", "low": -6.0, "high": 6.0}
    query = training(model="linear", label=label, work={"rate": 0.4}, clip=0.5, rounds=12)
    found = try_out(query, PEOPLE, epsilon=8.0, delta=DELTA, repeats=1)
    assert found.figure == "mean absolute error"
    # Noise of deviation 1 is missed by 0.8 on average, and no model can do better.
    assert 0.7 < found.mean(CENTRALISED) < 1.1
    assert found.mean(STUDY) < 1.5
    assert np.isnan(found.spread())


def test_people_who_are_one_example_have_no_past() -> None:
    features = [{"column": "sleep_hours", "low": 4.0, "high": 10.0}]
    query = training(per="person", features=features)
    found = try_out(query, PEOPLE, epsilon=4.0, delta=DELTA, repeats=1)
    assert found.past == {}
    assert "days with a past" not in str(found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adaptive": {}}, "not simulated"),
        ({"personal": {}}, "not simulated"),
        ({"held_out": 0.0}, "nobody is held out"),
    ],
)
def test_refuses_what_it_would_simulate_wrongly(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ManifestError, match=words):
        try_out(training(**changes), PEOPLE, epsilon=1.0, delta=DELTA)
    with pytest.raises(ManifestError, match=words):
        choose(
            training(**changes), PEOPLE, clips=[1.0], rates=[1.0], rounds=[2], epsilon=1.0,
            delta=DELTA,
        )  # fmt: skip


def test_refuses_too_few_people_and_counts_that_are_none() -> None:
    with pytest.raises(ManifestError, match="too few"):
        try_out(training(), PEOPLE[:1], epsilon=1.0, delta=DELTA)
    with pytest.raises(ManifestError, match="too few"):
        try_out(training(), [], epsilon=1.0, delta=DELTA)
    for repeats, colluding in ((0, 1), (1, 4)):
        with pytest.raises(ManifestError, match="fewer colluding nodes"):
            try_out(
                training(), PEOPLE, epsilon=1.0, delta=DELTA, repeats=repeats, colluding=colluding
            )


def test_the_best_choice_is_a_question_that_can_be_written_down() -> None:
    found = choose(
        training(), PEOPLE, clips=list(np.array([0.02, 1.0])), rates=[4.0],
        rounds=list(np.array([3])), epsilon=2.0, delta=DELTA, repeats=2,
    )  # fmt: skip
    assert len(found.tried) == 2
    assert found.tried[0].score >= found.tried[1].score
    query = found.query
    assert (query.rounds, type(query.rounds), type(query.spec.clip)) == (3, int, float)
    assert replace(query, spec=training().spec) == training()
    assert "clip" in str(found)
    assert "<table>" in found._repr_html_()


def test_refuses_rounds_that_the_strategy_does_not_fit_before_it_starts() -> None:
    query = training(strategy={"kind": "fedavg", "average_from": 4})
    with pytest.raises(ManifestError, match="average_from"):
        choose(query, PEOPLE, clips=[1.0], rates=[1.0], rounds=[4, 3], epsilon=1.0, delta=DELTA)
