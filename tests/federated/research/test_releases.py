"""Reading a release: verified by whom one believes, or said to be not; models that predict."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from federated.errors import ApprovalError, FederatedError, ManifestError
from federated.learning.models import predict
from federated.learning.round_query import TrainQuery
from federated.model import PersonRows
from federated.node.enrolment import Enrolment
from federated.release.document import encode_document
from federated.research import Model, declared, read_release
from tests.federated.release.documents import WEIGHTS, Believed, make_trained
from tests.federated.research.made_up import TRAINING, people
from tests.federated.studies import ORIGIN


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Believed]:
    return make_trained(tmp_path_factory.mktemp("release"))


@pytest.fixture
def answer(tmp_path: Path, released: tuple[dict[str, Any], Believed]) -> Path:
    path = tmp_path / "answer.json"
    path.write_bytes(encode_document(released[0]))
    return path


@pytest.fixture
def enrolment(tmp_path: Path, released: tuple[dict[str, Any], Believed]) -> Path:
    believed = released[1]
    trusted = believed.trusted
    path = tmp_path / "federation.json"
    path.write_bytes(
        msgspec.json.encode(
            Enrolment(
                node="reader",
                coordinator=tuple(one.hex() for one in trusted.coordinator),
                ethics_board=tuple(one.hex() for one in trusted.ethics_board),
                sites={
                    site: tuple(one.hex() for one in keys) for site, keys in trusted.sites.items()
                },
                origin=ORIGIN,
                log_keys=tuple(one.text for one in believed.log_keys),
                witness_keys=tuple(one.text for one in believed.witness_keys),
            )
        )
    )
    return path


def changed(path: Path, **changes: Any) -> None:
    path.write_bytes(encode_document({**json.loads(path.read_bytes()), **changes}))


def test_an_enrolment_verifies_the_release_and_without_one_it_says_that_nothing_was(
    answer: Path, enrolment: Path
) -> None:
    found = read_release(answer, enrolment=enrolment)
    assert found.proven == "signed"
    assert "coordinator's word" in str(found)
    unproven = read_release(answer)
    assert unproven.proven == "nothing"
    assert "Nothing of this was verified" in unproven._repr_html_()


def test_nothing_is_returned_of_a_release_that_does_not_hold(answer: Path, enrolment: Path) -> None:
    document = json.loads(answer.read_bytes())
    changed(answer, trust={**document["trust"], "colluding": 0})
    with pytest.raises(ManifestError, match=r"trust\.colluding"):
        read_release(answer, enrolment=enrolment)
    others = json.loads(enrolment.read_bytes())
    others["ethics_board"] = ["11" * 32]
    enrolment.write_bytes(json.dumps(others).encode())
    with pytest.raises(ApprovalError):
        read_release(answer, enrolment=enrolment)


def test_a_proof_beside_the_answer_is_looked_at(answer: Path, enrolment: Path) -> None:
    answer.with_name("answer.proof").write_bytes(b"no proof")
    with pytest.raises(FederatedError, match="not proven"):
        read_release(answer, enrolment=enrolment)
    with pytest.raises(ManifestError, match="name that, too"):
        read_release(answer, proof=answer.with_name("answer.proof"))


def test_estimates_stand_in_a_table_with_their_intervals_and_what_they_cost(answer: Path) -> None:
    found = read_release(answer)
    assert ("how-good", "AUC", "0.780", "0.750", "0.810", "95 %", "") in found.table.rows
    for words in ("zero-out", "secure_aggregation", "Hours beyond 3 to 14"):
        assert words in str(found)


def test_alarms_stand_before_everything_else(
    tmp_path: Path, released: tuple[dict[str, Any], Believed]
) -> None:
    document = json.loads(encode_document(released[0]))
    document["models"][0]["noise"]["passed"] = False
    path = tmp_path / "answer.json"
    path.write_bytes(encode_document(document))
    found = read_release(path)
    assert str(found).startswith("WARNING: There was less noise")
    assert found._repr_html_().startswith("<p><strong>WARNING: There was less noise")


def test_what_others_named_is_escaped(answer: Path) -> None:
    document = json.loads(answer.read_bytes())
    changed(answer, study={**document["study"], "title": "<script>alert(1)</script>"})
    assert "<script>" not in read_release(answer)._repr_html_()


def test_refuses_what_is_no_release(answer: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot be read"):
        read_release(tmp_path / "nothing.json")
    document = json.loads(answer.read_bytes())
    changed(answer, more="than there is")
    with pytest.raises(ManifestError):
        read_release(answer)
    changed(answer, **document)
    document["models"][0]["weights"] = base64.b64encode(np.zeros(3, dtype="<f8")).decode()
    answer.write_bytes(encode_document(document))
    with pytest.raises(ManifestError, match="no such model"):
        read_release(answer)


def test_a_released_model_has_its_weights_and_predicts(answer: Path) -> None:
    model = read_release(answer).models["mood"]
    assert model.weights.tolist() == list(WEIGHTS)
    x = np.array([[0.5, 1.0, -0.25], [-1.0, 0.0, 0.0]])
    assert model.predict(x).tolist() == predict(model.query.spec, model.weights, x).tolist()
    assert model.table.rows[0] == ("sleep_hours 4 to 10", "-1.50")


def test_rows_are_predicted_without_their_label_and_as_if_with_it() -> None:
    query = declared(TRAINING)
    assert isinstance(query, TrainQuery)
    model = Model(query=query, weights=np.array([-1.5, 0.25, 0.5, 0.1]), epsilon=1.0, delta=1e-6)
    (rows,) = people(1)
    unlabelled = {name: values for name, values in rows.values.items() if name != "mood"}
    blind = PersonRows(days=rows.days, values=unlabelled)
    assert len(model.predict(rows)) == 8
    assert model.predict(blind).tolist() == model.predict(rows).tolist()
    # A day on which nothing is known has nothing to predict from.
    gone = {name: np.where(rows.days == 3, np.nan, values) for name, values in unlabelled.items()}
    assert len(model.predict(PersonRows(days=rows.days, values=gone))) == 7
    nobody = PersonRows(days=rows.days[:0], values={})
    assert model.predict(nobody).shape == (0,)


def test_a_number_is_predicted_in_its_own_unit_and_bounds() -> None:
    label = {"column": "mood", "low": -6.0, "high": 6.0, "ahead": 1}
    query = declared({**TRAINING, "model": "linear", "label": label})
    assert isinstance(query, TrainQuery)
    model = Model(query=query, weights=np.array([0.0, 0.0, 0.0, 0.5]), epsilon=1.0, delta=1e-6)
    assert model.predict(people(1)[0]).tolist() == [3.0] * 8
    high = Model(query=query, weights=np.array([0.0, 0.0, 0.0, 9.0]), epsilon=1.0, delta=1e-6)
    assert high.predict(np.zeros((1, 3))).tolist() == [6.0]


def test_refuses_to_predict_where_the_label_is_a_feature_or_the_head_is_personal() -> None:
    features = [*TRAINING["features"], {"column": "mood", "lag": 1}]
    query = declared({**TRAINING, "features": features})
    assert isinstance(query, TrainQuery)
    model = Model(query=query, weights=np.zeros(5), epsilon=1.0, delta=1e-6)
    with pytest.raises(ManifestError, match="label and feature"):
        model.predict(people(1)[0])
    assert model.predict(np.zeros((1, 4))).tolist() == [0.5]
    personal = declared({**TRAINING, "personal": {}})
    assert isinstance(personal, TrainQuery)
    with pytest.raises(ManifestError, match="stays on each device"):
        Model(query=personal, weights=np.zeros(1), epsilon=1, delta=0).predict(np.zeros((1, 3)))
