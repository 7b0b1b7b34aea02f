"""Personal heads: made on the device, never in what leaves it, and worth it on real people."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open

from federated.aggregation.bits import SeededBits
from federated.errors import ManifestError
from federated.learning.baselines import Scored, common, own_mean, scored
from federated.learning.evaluate import EvaluateQuery
from federated.learning.examples import examples_of
from federated.learning.export import Provenance, to_onnx, to_safetensors
from federated.learning.local import update
from federated.learning.models import gradient, initial, parameters, parts, predict
from federated.learning.personal import (
    head_size,
    older_and_newer,
    predict_newer,
    reconstructed,
    whole,
)
from federated.learning.round_query import TrainQuery
from federated.learning.site import SiteTraining
from federated.learning.spec import Examples, PersonalHead, TrainSpec, Work
from federated.model import PersonRows
from tests.federated.learning.people import PACO, folds, paco
from tests.federated.learning.samples import PERSON, SPECS, made_up, weights_for

HEADED = tuple(
    replace(spec, personal=PersonalHead(steps=3, rate=0.5)) for spec in SPECS if spec.per == "day"
)
headed = pytest.mark.parametrize("spec", HEADED, ids=lambda spec: spec.name)
FROM = Provenance(study_hash="ab" * 32, epsilon=2.0, delta=1e-5)


def days(seed: int, count: int = 30) -> PersonRows:
    random = np.random.default_rng(seed)
    values = {"sleep_quality": random.uniform(1, 7, count), "mood": random.uniform(-6, 6, count)}
    return PersonRows(days=np.arange(count), values=values)


@headed
def test_what_is_summed_has_no_room_for_a_head(spec: TrainSpec) -> None:
    model = whole(spec)
    width = 0 if spec.kind in {"logistic", "linear"} else spec.hidden[-1]
    assert head_size(spec) == 1 + width == parameters(model) - parameters(spec)
    query = TrainQuery(spec=spec).at(initial(spec, seed=b"x"))
    assert query.dimension == parameters(spec)
    assert query.encode(days(1), SeededBits(bytes(32), b"x")).shape == (parameters(spec),)
    assert {part.name for part in parts(model)} - {part.name for part in parts(spec)} == (
        {"output.bias"} if not width else {"output.weight", "output.bias"}
    )


@headed
def test_the_head_is_made_of_older_examples_alone(spec: TrainSpec) -> None:
    body, given = weights_for(parameters(spec), 1), made_up(spec, 2, count=10)
    older, newer = older_and_newer(spec, given)
    assert (len(older.y), len(newer.y)) == (5, 5)
    at = reconstructed(spec, body, older)
    assert np.array_equal(at[: len(body)], body)
    expected = np.append(body, initial(whole(spec), seed=b"personal-head")[len(body) :])
    for _ in range(3):
        expected[len(body) :] -= 0.5 * gradient(whole(spec), expected, older)[len(body) :]
    assert at == pytest.approx(expected, abs=1e-15)
    turned = Examples(x=given.x, y=np.append(older.y, newer.y[::-1] + 7))
    assert np.array_equal(predict_newer(spec, body, given)[1], predict_newer(spec, body, turned)[1])
    assert np.array_equal(predict_newer(spec, body, given)[0].x, newer.x)


@headed
def test_the_body_moves_along_the_gradient_of_the_newer_at_the_heads_weights(
    spec: TrainSpec,
) -> None:
    body, given = weights_for(parameters(spec), 1), made_up(spec, 2, count=9)
    older, newer = older_and_newer(spec, given)
    at = reconstructed(spec, body, older)
    for _ in range(spec.work.epochs):
        at[: len(body)] -= spec.work.rate * gradient(whole(spec), at, newer)[: len(body)]
    assert update(spec, body, given) == pytest.approx(at[: len(body)] - body, abs=1e-14)


@headed
def test_nothing_is_kept_from_round_to_round(spec: TrainSpec) -> None:
    body, given = weights_for(parameters(spec), 1), made_up(spec, 2, count=9)
    first = update(spec, body, given)
    update(spec, 3 * body, made_up(spec, 5, count=4))
    assert np.array_equal(update(spec, body, given), first)


@headed
@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_examples_make_do_with_the_public_head(spec: TrainSpec, count: int) -> None:
    body, given = weights_for(parameters(spec), 1), made_up(spec, 2, count=count)
    newer, scores = predict_newer(spec, body, given)
    assert len(newer.y) == len(scores) == (count + 1) // 2
    assert np.isfinite(scores).all()
    assert update(spec, body, given).any() == (count > 0)


@headed
def test_what_leads_nowhere_is_zeros(spec: TrainSpec) -> None:
    given = made_up(spec, 1)
    good = weights_for(parameters(spec), 2)
    spoiled = good.copy()
    spoiled[0] = np.nan
    for weights in (spoiled, good[:-1], weights_for(parameters(whole(spec)), 1)):
        found = update(spec, weights, given)
        assert found.shape == good.shape
        assert not found.any()
    for size in (1e150, 1e308):
        assert np.isfinite(update(spec, weights_for(parameters(spec), 3, size), given)).all()
    wild = replace(spec, personal=PersonalHead(steps=100, rate=1000.0), work=Work(rate=1000.0))
    assert np.isfinite(update(wild, good, given)).all()


@headed
def test_refuses_to_predict_without_a_persons_own_head(spec: TrainSpec) -> None:
    given = made_up(spec, 1)
    for weights in (np.zeros(parameters(spec)), np.zeros(parameters(whole(spec)))):
        with pytest.raises(ManifestError, match="head"):
            predict(spec, weights, given.x)
        with pytest.raises(ManifestError, match="head"):
            gradient(spec, weights, given)


@headed
def test_evaluation_judges_the_newer_examples_only(spec: TrainSpec) -> None:
    """Older labels made the head; to judge by them would be to ask what was told."""
    body, rows = weights_for(parameters(spec), 1), days(3)
    query = EvaluateQuery(spec=spec, examples=64).at(body)
    found = query.masses(rows)
    newer, _ = predict_newer(spec, body, examples_of(spec, rows))
    assert found.sum() > 0
    if spec.label.is_class:
        assert found.sum() == pytest.approx(len(newer.y) / 64)
    # A label that is of the newest day alone moves what is judged, never the head.
    judged = scored(spec, body, [rows])
    known = ~np.isnan(judged.scores)
    assert known.sum() == len(newer.y)
    assert not known[: len(known) - len(newer.y)].any()
    assert np.array_equal(judged.truth[known], newer.y)


@headed
def test_released_files_hold_the_body_and_say_so(spec: TrainSpec, tmp_path: object) -> None:
    body = weights_for(parameters(spec), 1)
    with pytest.raises(ValueError, match="head is personal"):
        to_onnx(spec, body, FROM)
    path = f"{tmp_path}/model.safetensors"
    with open(path, "wb") as file:  # noqa: PTH123 - the path is somebody else's type
        file.write(to_safetensors(spec, body, FROM))
    with safe_open(path, framework="numpy") as opened:
        assert opened.metadata()["head"].startswith("personal")
        assert set(opened.keys()) == {part.name for part in parts(spec)}


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0}, {"steps": 101}, {"rate": 0.0}, {"rate": 1e9}, {"rate": np.nan},
        {"older": 0.0}, {"older": 1.0}, {"older": np.nan},
    ],
)  # fmt: skip
def test_refuses_a_head_made_of_nothing(bad: dict[str, float]) -> None:
    with pytest.raises(ManifestError, match="personal"):
        PersonalHead(**bad)  # type: ignore[arg-type]


def test_refuses_a_head_for_who_is_one_example_and_at_a_site() -> None:
    with pytest.raises(ManifestError, match="older"):
        replace(PERSON, personal=PersonalHead())
    with pytest.raises(ManifestError, match="devices"):
        SiteTraining(spec=HEADED[0], clip=1.0, rate=0.5, steps=1, divisor=1.0, multiplier=1.0)


def test_a_personal_bias_beats_both_the_common_model_and_the_own_mean_on_paco() -> None:
    """Of people who were held out, and of their newer half, which no head has seen."""
    everybody, chosen = paco(), set(folds(562)[0].tolist())
    train = [rows for place, rows in enumerate(everybody) if place not in chosen][::3]
    held_out = [everybody[place] for place in sorted(chosen)]
    common_model = replace(PACO, work=Work(rate=2.0, l2=1e-4))
    personal = replace(common_model, personal=PersonalHead(steps=3, rate=1.0))
    found = [
        scored(spec, federated(spec, train, rounds=12), held_out)
        for spec in (personal, common_model)
    ]
    ours, without, mean = common(*found, own_mean(PACO, held_out))
    assert len(ours.truth) > 600
    assert ours.auc > mean.auc + 0.01
    assert ours.auc > without.auc + 0.03


def federated(spec: TrainSpec, train: list[PersonRows], *, rounds: int) -> np.ndarray:
    """Plain averaging of everybody's updates, no privacy."""
    each = [examples_of(spec, rows) for rows in train]
    weights = initial(spec, seed=b"x")
    for _ in range(rounds):
        weights = weights + np.mean([update(spec, weights, one) for one in each], axis=0)
    return weights


def test_a_scored_person_keeps_their_place() -> None:
    """Predictions stand beside the same truth as every other baseline's."""
    spec = HEADED[0]
    rows = [days(1), days(2, count=5)]
    found = scored(spec, weights_for(parameters(spec), 1), rows)
    assert isinstance(found, Scored)
    assert len(found.scores) == len(own_mean(spec, rows).scores)
