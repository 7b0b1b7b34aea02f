"""A release with a model: what must follow from what was signed does, and no audit is hidden."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from federated.errors import FederatedError, ManifestError
from federated.learning.one_run_bound import lower_bound
from federated.learning.privacy_audit import NoiseCheck
from federated.planning import study_costs
from federated.release.alarms import CLAIM_REFUTED, NOISE_MISSING, alarm_words
from federated.release.check import COORDINATORS_WORD, verify_document
from federated.release.document import encode_document, model_weights, parse_document
from tests.federated.release.changes import changed, leaves, others, spelled
from tests.federated.release.documents import (
    WEIGHTS,
    Believed,
    audited,
    make_trained,
    training_study,
)
from tests.federated.studies import ORIGIN


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Believed]:
    return make_trained(tmp_path_factory.mktemp("model"))


def check(document: dict[str, Any], believed: Believed) -> None:
    verify_document(
        document,
        believed.trusted,
        origin=ORIGIN,
        log_keys=believed.log_keys,
        witness_keys=believed.witness_keys,
    )


def text_of(weights: object) -> str:
    return base64.b64encode(np.asarray(weights, dtype="<f8").tobytes()).decode()


def test_a_release_with_a_model_is_proven_with_public_keys(
    released: tuple[dict[str, Any], Believed],
) -> None:
    document, believed = released
    check(document, believed)
    check(parse_document(encode_document(document)), believed)
    assert document["alarms"] == []
    (one,) = document["models"]
    assert model_weights(one).tolist() == list(WEIGHTS)
    assert (one["asked"], one["summed"], one["people"]) == (6, 5, 940)


def test_every_single_change_of_a_model_is_found_or_the_coordinators_word(
    released: tuple[dict[str, Any], Believed],
) -> None:
    document, believed = released
    unproven: set[str] = set()
    tried = 0
    for path in leaves(document):
        if path[:1] not in {("models",), ("alarms",)}:
            continue
        value: Any = document
        for key in path:
            value = value[key]
        for other in others(value):
            if json.dumps(other) == json.dumps(value):
                continue
            tried += 1
            try:
                check(changed(document, path, other), believed)
            except FederatedError:
                continue
            unproven.add(spelled(path))
    assert tried > 200
    assert unproven <= set(COORDINATORS_WORD), sorted(unproven - set(COORDINATORS_WORD))


@pytest.mark.parametrize(
    "weights",
    [
        text_of(WEIGHTS[:-1]),
        text_of([*WEIGHTS, 0.0]),
        text_of([np.nan, *WEIGHTS[1:]]),
        text_of([np.inf, *WEIGHTS[1:]]),
        text_of([]),
        text_of(WEIGHTS)[:-4],
        text_of(WEIGHTS) + "\n",
        # The same bytes, in bits that base64 throws away.
        text_of(WEIGHTS)[:-2] + chr(ord(text_of(WEIGHTS)[-2]) + 1) + "=",
        "é",
    ],
)
def test_refuses_weights_that_are_no_such_model(
    released: tuple[dict[str, Any], Believed], weights: str
) -> None:
    document, believed = released
    with pytest.raises(ManifestError, match="weights"):
        check(changed(document, ("models", 0, "weights"), weights), believed)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("audit", "canaries"), 100),
        (("audit", "canaries"), 400),
        (("audit", "confidence"), 0.5),
        (("audit", "lower_bound"), 0.0),
        (("audit", "lower_bound"), 3.0),
        (("noise", "false_alarm"), 0.5),
        (("noise", "short"), [2]),
        (("noise", "short"), [5]),
        (("noise", "share"), -1.0),
        (("asked",), 7),
        (("asked",), 5),
        (("summed",), 0),
        (("summed",), 7),
        (("people",), 99),
        (("nodes",), 2),
        (("query",), "sleep"),
        (("query",), "how-good"),
        (("round",), "7-0"),
        (("round",), "8-1"),
        (("ask", "rounds"), 12),
        (("cost", "epsilon"), 1.0),
        (("audit",), None),
        (("noise",), None),
    ],
)
def test_refuses_a_model_that_was_trained_or_audited_otherwise_than_signed(
    released: tuple[dict[str, Any], Believed], path: tuple[Any, ...], value: Any
) -> None:
    document, believed = released
    with pytest.raises(ManifestError):
        check(changed(document, ("models", 0, *path), value), believed)


def test_refuses_an_unaudited_model_of_an_audited_training(tmp_path: Path) -> None:
    document, believed = make_trained(tmp_path, with_model={"audit": None, "noise": None})
    with pytest.raises(ManifestError, match="audited otherwise than signed"):
        check(document, believed)


def test_a_training_without_canaries_has_no_audit(tmp_path: Path) -> None:
    of = training_study({"canaries = 200\n": "canaries = 0\n"})
    document, believed = make_trained(tmp_path, of, with_model={"audit": None, "noise": None})
    check(document, believed)
    assert document["models"][0]["audit"] is None
    cost = study_costs(of)["mood"]
    audit = {"lower_bound": 0.0, "confidence": 0.95, "canaries": 0, "guesses": 0, "correct": 0}
    noise = {"share": 1.0, "short": [], "false_alarm": 1e-6, "passed": True}
    assert lower_bound(canaries=0, guesses=0, correct=0, delta=cost.delta) == 0
    audited_anyhow = changed(
        changed(document, ("models", 0, "audit"), audit), ("models", 0, "noise"), noise
    )
    with pytest.raises(ManifestError, match="audit"):
        check(audited_anyhow, believed)


def test_only_a_signed_rule_ends_a_training_early(tmp_path: Path) -> None:
    of = training_study({"canaries = 200\n": "canaries = 200\nstop = { patience = 2 }\n"})
    short = {"asked": 3, "summed": 3}
    document, believed = make_trained(tmp_path / "a", of, with_model=short)
    check(document, believed)
    document, believed = make_trained(tmp_path / "b", with_model=short)
    with pytest.raises(ManifestError, match="otherwise than signed"):
        check(document, believed)


def test_a_model_may_be_of_an_earlier_run_and_an_answer_not(
    released: tuple[dict[str, Any], Believed],
) -> None:
    document, believed = released
    earlier = changed(document, ("models", 0, "round"), "6-1")
    with pytest.raises(ManifestError, match="another sum than was charged"):
        check(earlier, believed)
    check(changed(earlier, ("privacy", "charged", 1, "round"), "6-1"), believed)
    answer = changed(document, ("answers", 0, "round"), "6-0")
    with pytest.raises(ManifestError, match="of another run"):
        check(changed(answer, ("privacy", "charged", 0, "round"), "6-0"), believed)


def test_a_model_under_a_statistics_name_is_refused_and_an_answer_under_a_trainings(
    released: tuple[dict[str, Any], Believed],
) -> None:
    document, believed = released
    sleep, mood = document["answers"][0], document["models"][0]
    asks = {one["query"]: one["ask"] for one in (sleep, mood)}
    swapped = {
        **document,
        "answers": [{**sleep, "query": "mood", "ask": asks["mood"]}, document["answers"][1]],
        "models": [{**mood, "query": "sleep", "ask": asks["sleep"]}],
    }
    with pytest.raises(ManifestError, match="what it cannot be"):
        check(swapped, believed)


def test_a_training_without_a_model_says_why(tmp_path: Path) -> None:
    why = "No round has a sum."
    failures = {"mood": why, "how-good": why}
    document, believed = make_trained(tmp_path, failures=failures)
    assert document["models"] == []
    check(document, believed)
    for other in ({}, {"mood": why}, {"how-good": why}):
        with pytest.raises(ManifestError, match="what became of it"):
            check({**document, "failures": other}, believed)


def test_an_evaluation_of_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    document, believed = make_trained(tmp_path, failures={"mood": "It ran away."})
    with pytest.raises(ManifestError, match="judges a model that is not there"):
        check(document, believed)


# What an audit found


def refuted(tmp_path: Path) -> tuple[dict[str, Any], Believed]:
    of = training_study()
    audit = audited(study_costs(of)["mood"], right=1.0)
    return make_trained(tmp_path, of, with_model={"audit": audit})


def short(tmp_path: Path) -> tuple[dict[str, Any], Believed]:
    check = NoiseCheck(
        share=0.83, by_round=(0.83,) * 5, short=(1, 4), false_alarm=1e-6, passed=False
    )
    return make_trained(tmp_path, with_model={"noise": check})


def test_a_refuted_claim_is_released_and_cannot_be_hidden(tmp_path: Path) -> None:
    document, believed = refuted(tmp_path)
    assert document["alarms"] == [{"query": "mood", "finding": CLAIM_REFUTED}]
    check(document, believed)
    with pytest.raises(ManifestError, match="alarms"):
        check({**document, "alarms": []}, believed)
    # Nor by another bound than its guesses prove.
    hidden = changed(document, ("models", 0, "audit", "lower_bound"), 1.0)
    with pytest.raises(ManifestError, match="alarms"):
        check({**hidden, "alarms": []}, believed)
    (words,) = alarm_words(document)
    assert "refutes the privacy that is claimed for the model mood" in words
    assert "5 in 100" in words


def test_missing_noise_is_released_and_cannot_be_hidden(tmp_path: Path) -> None:
    document, believed = short(tmp_path)
    assert document["alarms"] == [{"query": "mood", "finding": NOISE_MISSING}]
    check(document, believed)
    with pytest.raises(ManifestError, match="alarms"):
        check({**document, "alarms": []}, believed)
    passed = changed(document, ("models", 0, "noise", "passed"), True)
    with pytest.raises(ManifestError, match="noise of the model mood is none"):
        check({**passed, "alarms": []}, believed)
    (words,) = alarm_words(document)
    assert "less noise" in words
    assert "83 %" in words
    assert "sum 2, 5" in words
    assert "one of 1,000,000 trainings" in words


def test_the_alarm_is_the_first_that_a_document_says(tmp_path: Path) -> None:
    document, _ = refuted(tmp_path)
    assert encode_document(document).startswith(b'{"alarms":[{"finding":"claim_refuted"')
