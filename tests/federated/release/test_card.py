"""The page's model card says what the document says, in words, and warns first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from federated.learning.models import parameters
from federated.learning.privacy_audit import NoiseCheck
from federated.planning import study_costs
from federated.release.document import encode_document
from federated.release.judged import judged
from federated.release.plots import plot_reliability
from federated.release.report import make_report
from tests.federated.release.documents import audited, make_trained, training_study
from tests.federated.release.test_model_files import MLP, spec
from tests.federated.release.test_release import Page


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_trained(tmp_path_factory.mktemp("card"))[0]


def words_of(text: str) -> str:
    return " ".join(" ".join(Page(text).words).split())


def page(document: dict[str, Any]) -> str:
    return make_report(document, answer_hash="ab" * 32, released=17)


def test_the_card_says_what_the_document_says(document: dict[str, Any]) -> None:
    said = words_of(page(document))
    model = document["models"][0]
    for expected in (
        "Model mood",
        "whether mood is below 0",
        "bounds -6 to 6",
        "sleep_hours (time asleep in the night",
        "bounds 4 to 10), and whether it is known",
        "steps 1 day before, less the person's own mean of earlier days",
        "bounds 0 to 20000",
        "logistic regression, 4 numbers",
        "940 people or more in each round, at 4 nodes or more",
        "6 of 6 announced rounds were asked, 5 came to a sum; without a sum: 1",
        "30 % of people, drawn by their own node",
        "a length of 1 at most",
        "0.5 times people's mean change, with momentum 0.9",
        "nobody's data were asked in this study to choose them",
        "ε = 2 at δ = 1.0e\N{MINUS SIGN}6, for all rounds together",
        "person, zero-out adjacency",
        "Discrete Gaussian noise of scale",
        "secure aggregation",
        f"Measured lower bound {model['audit']['lower_bound']:.4g} beside the claimed ε = 2",
        "95 % sure",
        "one below proves nothing",
        "show that nodes clip real people's changes",
        "101 % of the planned variance",
        "not for decisions about a single person",
        "no diagnosis",
        "of people unlike those who took part",
        "not what causes it",
        "AUC 0.780 0.750 to 0.810",
        "Brier score",
        "By group:",
        "0 female, 1 male, 2 other, as recorded",
        "sleep_hours is known",
        "intercept",
        "\N{MINUS SIGN}1.5",
    ):
        assert expected in said, expected


def test_an_evaluation_stands_in_the_card_of_its_model_and_not_twice(
    document: dict[str, Any],
) -> None:
    text = page(document)
    assert text.count("<h3>") == 2
    assert "<h3>how-good</h3>" not in text
    assert "<h3>sleep</h3>" in text
    # Reliability, groups, the statistic.
    assert text.count("<svg") == 3
    orphan = {**document, "models": [], "failures": {"mood": "It ran away."}}
    assert "<h3>how-good</h3>" in page(orphan)


def test_a_page_with_a_model_loads_and_runs_nothing(document: dict[str, Any]) -> None:
    text = page(document)
    found = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "img", "form"} & set(found.tags)
    assert all(link.startswith("#") for link in found.links)
    assert "default-src 'none'" in text


def test_nothing_from_a_training_becomes_markup(document: dict[str, Any]) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    hostile = json.loads(encode_document(document))
    model, answer = hostile["models"][0], hostile["answers"][1]
    answer["ask"]["subgroups"] = [{"column": evil}]
    answer["cautions"] = [evil, evil]
    model["audit"]["lower_bound"] = 9.0
    for one in answer["estimates"]:
        one["unit"] = evil
    answer["estimates"] += [
        {**answer["estimates"][0], "name": f"{name}{evil}"} for name in ("AUC, ", "MAE, ", "")
    ]
    found = Page(page(hostile))
    assert not {"script", "img"} & set(found.tags)


def test_what_an_audit_found_is_said_before_all_else(tmp_path: Path) -> None:
    of = training_study()
    audit = audited(study_costs(of)["mood"], right=1.0)
    noise = NoiseCheck(share=0.5, by_round=(), short=(0,), false_alarm=1e-6, passed=False)
    document, _ = make_trained(tmp_path, of, with_model={"audit": audit, "noise": noise})
    text = page(document)
    said = words_of(text)
    assert said.index("refutes the privacy") < said.index("People in the answers")
    assert said.index("less noise in the sums") < said.index("People in the answers")
    # And again in the card itself.
    assert said.count("refutes the privacy") == said.count("less noise in the sums") == 2
    assert "too little (in sum 1 by itself)" in said


def test_a_model_that_is_no_line_has_no_table_of_weights(tmp_path: Path) -> None:
    of = training_study(MLP)
    weights = np.zeros(parameters(spec(of)))
    document, _ = make_trained(tmp_path, of, with_model={"weights": weights})
    said = words_of(page(document))
    assert "neural network (MLP, tanh) of 5, 3 units" in said
    assert "intercept" not in said


def test_a_model_that_nobody_judged_says_so(document: dict[str, Any]) -> None:
    alone = {**document, "answers": [], "failures": {"how-good": "Too few."}}
    said = words_of(page(alone))
    assert "nobody knows how well it does" in said
    assert "how-good has no answer: Too few." in said


def test_a_number_stands_beside_what_the_own_past_would_have_said() -> None:
    estimates = [
        {"name": name, "value": at, "low": at - 0.1, "high": at + 0.1, "level": 0.95, "unit": "u"}
        for name, at in (
            ("MAE", 0.9),
            ("MAE of the own mean", 1.0),
            ("MAE of the own mean minus MAE", 0.1),
            ("MAE of the last value", 1.1),
            ("MAE, sex 0 to 1", 0.8),
        )
    ]
    cost = {"mechanism": "discrete_laplace", "scale": 1.0, "l1": 1.0, "l2": 1.0}
    answer = {
        "query": "how-far", "ask": {}, "estimates": estimates, "cautions": [], "people": 9,
        "nodes": 3, "dropped": 0, "cost": cost,
    }  # fmt: skip
    text = judged(answer)
    assert text.count("<svg") == 2
    said = words_of(text)
    assert "each person's own mean of the past is the guess" in said
    assert "MAE of the own mean minus MAE" in said


def test_what_says_nothing_is_not_drawn_as_if_it_did(document: dict[str, Any]) -> None:
    lost = json.loads(encode_document(document))
    answer = lost["answers"][1]
    for one in answer["estimates"]:
        if one["name"].startswith(("AUC, sex -0.5", "observed rate at scores 0.10")):
            one.update(value=0.5, low=0.0, high=1.0)
    said = words_of(judged(answer))
    assert "Too few people to say anything: AUC, sex -0.5 to 0.5." in said
    assert "Ranges of scores with too few people to say anything: 1." in said


def test_a_reliability_plot_is_the_same_each_time() -> None:
    one = {"value": 0.4, "low": 0.3, "high": 0.5}
    first = plot_reliability([(0.2, 0.4, one)], label="x")
    assert first == plot_reliability([(0.2, 0.4, one)], label="x")
    assert first.startswith('<svg role="img" aria-label="x"')
