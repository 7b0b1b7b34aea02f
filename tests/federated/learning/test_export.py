"""Released files say what the model says, and where they come from; others can read them."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
from safetensors import safe_open
from safetensors.numpy import load

from federated.learning.export import (
    Provenance,
    canonical_specification,
    to_onnx,
    to_safetensors,
)
from federated.learning.models import parameters, parts, predict
from federated.learning.spec import TrainSpec
from federated.manifest import parse_canonical
from tests.federated.learning.samples import GRU, LINEAR, LOGISTIC, SPECS, made_up, weights_for

FROM = Provenance(study_hash="ab" * 32, epsilon=2.0, delta=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_another_runtime_predicts_the_same(spec: TrainSpec) -> None:
    weights = weights_for(parameters(spec), 3, 1.0)
    session = onnxruntime.InferenceSession(
        to_onnx(spec, weights, FROM), providers=["CPUExecutionProvider"]
    )
    for count in (1, 200):
        x = made_up(spec, count, count=count).x
        (found,) = session.run(None, {"features": x.astype(np.float32)})
        assert found.shape == (count,)
        assert np.abs(found - predict(spec, weights, x)).max() < 1e-5


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_tensors_are_the_weights_to_the_last_bit(spec: TrainSpec) -> None:
    weights = weights_for(parameters(spec), 4)
    tensors = load(to_safetensors(spec, weights, FROM))
    again = np.concatenate([tensors[part.name].reshape(-1) for part in parts(spec)])
    assert again.tobytes() == weights.tobytes()


def test_both_files_say_where_they_come_from(tmp_path: object) -> None:
    model = onnx.load_from_string(to_onnx(LOGISTIC, np.zeros(6), FROM))
    said = {one.key: one.value for one in model.metadata_props}
    path = f"{tmp_path}/model.safetensors"
    with open(path, "wb") as file:  # noqa: PTH123 - the path is somebody else's type
        file.write(to_safetensors(LOGISTIC, np.zeros(6), FROM))
    with safe_open(path, framework="numpy") as opened:
        assert opened.metadata() == said
    assert said["study_hash"] == FROM.study_hash
    assert (float(said["epsilon"]), float(said["delta"])) == (2.0, 1e-5)
    specification = parse_canonical(said["specification"].encode(), what="spec")
    assert specification["features"][2]["lag"] == 1
    assert canonical_specification(LOGISTIC) == said["specification"].encode()
    assert json.loads(said["specification"])["label"]["below"] == 1.5


@pytest.mark.parametrize("bad", [np.zeros(2), np.array([0.0, np.nan, 0.0]), np.zeros((1, 3))])
def test_weights_of_no_model_are_refused(bad: np.ndarray) -> None:
    for write in (to_onnx, to_safetensors):
        with pytest.raises(ValueError, match="finite weights"):
            write(LINEAR, bad, FROM)


def test_weights_that_floats_cannot_hold_are_refused() -> None:
    weights = np.full(parameters(GRU), 1e300)
    with pytest.raises(ValueError, match="single precision"):
        to_onnx(GRU, weights, FROM)


def test_a_file_changes_if_anything_it_says_does() -> None:
    weights = np.zeros(3)
    first = to_onnx(LINEAR, weights, FROM)
    assert first == to_onnx(LINEAR, weights, FROM)
    other = Provenance(study_hash="cd" * 32, epsilon=2.0, delta=1e-5)
    assert first != to_onnx(LINEAR, weights, other)


@pytest.mark.parametrize("write", [to_onnx, to_safetensors])
def test_a_model_has_one_file_so_that_its_digest_can_be_told(
    write: Callable[[TrainSpec, np.ndarray, Provenance], bytes],
) -> None:
    weights = weights_for(parameters(GRU), 5)
    assert len({write(GRU, weights, FROM) for _ in range(20)}) == 1


def test_a_file_says_what_an_audit_found() -> None:
    found = Provenance(study_hash="ab" * 32, epsilon=2.0, delta=1e-5, audit="claim_refuted")
    model = onnx.load_from_string(to_onnx(LINEAR, np.zeros(3), found))
    assert {one.key: one.value for one in model.metadata_props}["audit"] == "claim_refuted"
    assert b'"audit":"claim_refuted"' in to_safetensors(LINEAR, np.zeros(3), found)
