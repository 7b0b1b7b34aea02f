"""Declaring, planning and writing a study: what a notebook makes is what the commands take."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from typer.testing import CliRunner

from federated.analytics.base import BaseQuery
from federated.cli import StudyCommands, build
from federated.draft import parse_draft
from federated.errors import ManifestError
from federated.learning.declare import complete
from federated.learning.evaluate import EvaluateQuery
from federated.learning.round_query import TrainQuery
from federated.questions import question_from
from federated.research import Asked, declared, draft_of, plan
from federated.settings import FederatedSettings
from tests.federated.research.made_up import EVALUATION, MEAN, TRAINING


def written(**changes: object) -> str:
    training, evaluation, mean = declared(TRAINING), declared(EVALUATION), declared(MEAN)
    values = {
        "study": "low-mood",
        "title": 'Low mood "after" short nights',
        "question": "Does sleep tell low mood?",
        "valid_from": dt.date(2026, 12, 1),
        "minimum_cohort": 100,
        "threshold": 3,
        "sites": ["north"],
        **changes,
    }
    return draft_of(
        Asked(question=training, epsilon=2.0, delta=1e-6),
        Asked(question=evaluation, epsilon=1.0),
        Asked(question=mean, epsilon=0.5),
        **values,  # type: ignore[arg-type]
    )


def test_declares_trainings_evaluations_and_statistics_from_text_and_mapping() -> None:
    assert isinstance(declared(TRAINING), TrainQuery)
    assert isinstance(declared(EVALUATION), EvaluateQuery)
    assert isinstance(declared(MEAN), BaseQuery)
    text = 'kind = "mean"\nname = "how"\ncolumn = "mood"'
    assert declared(text) == declared({"kind": "mean", "name": "how", "column": "mood"})


def test_an_evaluation_takes_what_it_leaves_out_from_its_training() -> None:
    training = declared(TRAINING)
    assert isinstance(training, TrainQuery)
    short = {"kind": "evaluate", "name": "how-good", "bins": 4}
    assert declared(short, of=training) == declared(EVALUATION)
    with pytest.raises(ManifestError, match="names no training"):
        declared({**short, "of": "another"}, of=training)
    # Other questions are of no training.
    assert declared(MEAN, of=training) == declared(MEAN)


def test_refuses_a_text_that_is_no_toml_and_a_key_that_is_not_known() -> None:
    with pytest.raises(ManifestError, match="not valid TOML"):
        declared("kind = ")
    with pytest.raises(ManifestError, match="Did you mean rounds"):
        declared({**TRAINING, "round": 3})


def test_a_written_study_asks_exactly_the_questions_it_was_made_of() -> None:
    draft = parse_draft(written().encode())
    asks = complete([one.ask for one in draft.file.queries])
    assert [question_from(one) for one in asks] == [
        declared(TRAINING), declared(EVALUATION), declared(MEAN)
    ]  # fmt: skip
    assert (draft.file.title, draft.file.sites) == ('Low mood "after" short nights', ("north",))
    # What the training says already is said once.
    assert "features" not in draft.file.queries[1].ask
    # As people write it.
    assert '    { column = "steps", low = 0.0, high = 20000.0, lag = 1 },\n' in written()


def test_refuses_to_write_an_evaluation_of_a_training_that_is_not_there() -> None:
    with pytest.raises(ManifestError, match="no training of this study"):
        draft_of(
            Asked(question=declared(EVALUATION), epsilon=1.0), study="a", title="b", question="c",
            valid_from=dt.date(2026, 12, 1), minimum_cohort=100, threshold=3,
        )  # fmt: skip


def test_a_plan_needs_no_nodes_and_says_costs_and_errors() -> None:
    found = plan(written(), people=2_000)
    assert 3.3 < found.found.epsilon <= 3.5
    assert found.found.study.roster == "0" * 64
    shown = found._repr_html_()
    for words in ("discrete gaussian", "AUC", "zero-out", "unit: person", "2,000 people"):
        assert words in shown
    assert "<script" not in plan(written(title="<script>"), people=2_000)._repr_html_()


def test_the_command_plans_what_the_notebook_planned(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(written(), encoding="utf-8")

    def closed() -> None:
        raise AssertionError("nothing is opened to plan")

    commands = StudyCommands(
        settings=FederatedSettings,
        roster=lambda: "ab" * 32,
        open_program=closed,  # type: ignore[arg-type]
        open_reading=closed,  # type: ignore[arg-type]
    )
    out = tmp_path / "whole.toml"
    done = CliRunner().invoke(
        build(commands), ["plan", str(file), "--people", "2000", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    noise = [one.noise for one in plan(written(), people=2_000).found.study.queries]
    whole = parse_draft(out.read_bytes()).complete()
    assert [one.noise for one in whole.queries] == noise
    assert whole.roster == "ab" * 32
