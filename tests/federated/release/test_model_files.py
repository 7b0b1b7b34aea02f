"""A released model's files: made of the document alone, exact, and never in the release's way."""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from safetensors import safe_open

from federated.errors import ManifestError
from federated.learning.models import parameters, parts, predict
from federated.learning.round_query import TrainQuery
from federated.learning.spec import TrainSpec
from federated.manifest import Study
from federated.planning import study_costs
from federated.questions import declared_question
from federated.release.document import model_weights, parse_document
from federated.release.files import Reports, WrittenRelease
from federated.release.model_files import model_files, spec_of
from tests.federated.learning.samples import made_up, weights_for
from tests.federated.release.documents import audited, make_trained, training_study

MLP = {'name = "mood"\n': 'name = "mood"\nmodel = "mlp"\nhidden = [5, 3]\n'}


def spec(of: Study) -> TrainSpec:
    query = declared_question(of.query("mood").ask)
    assert isinstance(query, TrainQuery)
    return query.spec


def release(
    folder: Path, of: Study, weights: np.ndarray, **changes: Any
) -> tuple[WrittenRelease, dict[str, Any]]:
    """Keep the document of these weights, and write the release of what was kept."""
    document, _ = make_trained(folder / "made", of, with_model={"weights": weights, **changes})
    reports = Reports(folder / "reports")
    reports.keep(of, document)
    return reports.write(reports.kept(of), released=17), document


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, np.ndarray, WrittenRelease]:
    of = training_study(MLP)
    weights = weights_for(parameters(spec(of)), 3, 1.0)
    written, _ = release(tmp_path_factory.mktemp("mlp"), of, weights)
    return of, weights, written


def test_the_released_onnx_predicts_as_the_model_and_as_torch(
    mlp: tuple[Study, np.ndarray, WrittenRelease],
) -> None:
    of, weights, written = mlp
    own, (_, onnx) = spec(of), written.models
    assert onnx.path.name == "model-mood.onnx"
    x = made_up(own, 5, count=300).x
    session = onnxruntime.InferenceSession(str(onnx.path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"features": x.astype(np.float32)})
    assert np.abs(found - predict(own, weights, x)).max() < 1e-5
    layers: list[torch.nn.Module] = []
    tensors = {part.name: torch.tensor(part.of(weights)) for part in parts(own)}
    for name in ("layer0", "layer1", "output"):
        after, before = tensors[f"{name}.weight"].shape
        linear = torch.nn.Linear(before, after, dtype=torch.float64)
        linear.load_state_dict(
            {"weight": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}
        )
        layers += [linear, torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers[:-1], torch.nn.Sigmoid())
    with torch.no_grad():
        told = model(torch.tensor(x)).numpy()[:, 0]
    assert np.abs(found - told).max() < 1e-5


def test_the_released_tensors_are_the_documents_weights_to_the_last_bit(
    mlp: tuple[Study, np.ndarray, WrittenRelease],
) -> None:
    of, weights, written = mlp
    tensors, _ = written.models
    with safe_open(str(tensors.path), framework="numpy") as opened:
        again = np.concatenate([opened.get_tensor(one.name).reshape(-1) for one in parts(spec(of))])
        said = opened.metadata()
    document = parse_document(written.answer.read_bytes())
    assert again.tobytes() == model_weights(document["models"][0]).tobytes() == weights.tobytes()
    cost = study_costs(of)["mood"]
    assert said["study_hash"] == of.study_hash
    assert (float(said["epsilon"]), float(said["delta"])) == (cost.epsilon, cost.delta)
    assert said["audit"] == "nothing_found"


def test_digests_are_those_of_the_files_and_stand_on_the_page(
    mlp: tuple[Study, np.ndarray, WrittenRelease],
) -> None:
    *_, written = mlp
    page = written.page.read_text()
    for one in written.models:
        assert sha256(one.path.read_bytes()).hexdigest() == one.digest
        assert one.digest in page
        assert one.path.stat().st_mode & 0o777 == 0o600


def test_torch_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = training_study(MLP)
    weights = weights_for(parameters(spec(of)), 3, 1.0)
    monkeypatch.setitem(sys.modules, "torch", None)
    written, _ = release(tmp_path, of, weights)
    assert [one.missing for one in written.models] == ["", ""]


@pytest.mark.parametrize(
    ("missing", "left"), [("onnx", "model-mood.safetensors"), ("safetensors", "model-mood.onnx")]
)
def test_a_release_without_an_optional_package_says_which_file_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, left: str
) -> None:
    of = training_study()
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, missing, None)
    written, document = release(tmp_path, of, np.zeros(4))
    there = {path.name for path in written.page.parent.glob("model-*")}
    assert there == {left}
    (gone,) = [one for one in written.models if one.missing]
    assert gone.path.suffix == f".{missing}"
    assert f"the package {missing}" in gone.missing
    assert "havengate[learning]" in gone.missing
    assert gone.digest == ""
    assert f"{gone.path.name}</td><td>was not written" in written.page.read_text()
    assert parse_document(written.answer.read_bytes()) == document


def test_weights_that_floats_cannot_hold_are_released_all_the_same(tmp_path: Path) -> None:
    written, _ = release(tmp_path, training_study(), np.full(4, 1e300))
    tensors, onnx = written.models
    assert tensors.path.exists()
    assert "single precision" in onnx.missing
    assert not onnx.path.exists()


def test_an_earlier_releases_model_does_not_stay_beside_another_answer(tmp_path: Path) -> None:
    of = training_study()
    written, _ = release(tmp_path, of, np.zeros(4))
    folder = written.page.parent
    for name in ("model-older.onnx", "model-older.safetensors"):
        (folder / name).write_bytes(b"an earlier run's")
    reports = Reports(tmp_path / "reports")
    reports.write(reports.kept(of), released=18)
    assert {path.name for path in folder.glob("model-*")} == {
        "model-mood.onnx",
        "model-mood.safetensors",
    }


def test_a_model_file_carries_what_its_audit_found(tmp_path: Path) -> None:
    of = training_study()
    audit = audited(study_costs(of)["mood"], right=1.0)
    written, _ = release(tmp_path, of, np.zeros(4), audit=audit)
    assert b'"audit":"claim_refuted"' in written.models[0].path.read_bytes()


def test_a_document_whose_model_is_none_makes_no_file(tmp_path: Path) -> None:
    document, _ = make_trained(tmp_path)
    (model,) = document["models"]
    statistic = {**model, "ask": document["answers"][0]["ask"]}
    with pytest.raises(ManifestError, match="no training"):
        spec_of(statistic)
    broken = json.loads(json.dumps(document))
    broken["models"][0]["weights"] = "!"
    with pytest.raises(ManifestError, match="malformed"):
        model_files(broken)
