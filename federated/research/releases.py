"""A release as a researcher reads it: estimates as a table, models that predict.

Lives here: reading the file and showing it; what a model does stands in `models`. That a document
says what was signed is proven by `release.check`, that it is what was released by `release.proof`,
both by keys of an enrolment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from federated.errors import ManifestError
from federated.learning.models import parameters
from federated.learning.round_query import TrainQuery
from federated.manifest import canonical_json
from federated.node.enrolment import parse_enrolment
from federated.questions import declared_question
from federated.release.alarms import alarm_words
from federated.release.document import model_weights, parse_document
from federated.release.figures import figures
from federated.release.form import parse_form
from federated.release.proof import verify_believed
from federated.research.models import Model
from federated.research.show import Table

#: How much of a release is proven.
type Proven = Literal["nothing", "signed", "released"]
_PROVEN: Final[Mapping[Proven, str]] = {
    "nothing": "Nothing of this was verified: name an enrolment to check signatures.",
    "signed": "Signed by all it needed and published; estimates are the coordinator's word, for no "
    "proof of the release was given.",
    "released": "Signed by all it needed and published; the log says that this very answer was "
    "released.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A released document. `models` by the training's name. A notebook shows it as a table."""

    document: Mapping[str, Any] = field(repr=False)
    models: Mapping[str, Model]
    proven: Proven

    @property
    def table(self) -> Table:
        """Every estimate with its interval; what an audit found against a model first."""
        document = self.document
        rows = [
            (one["query"], estimate["name"], *_figures(estimate), estimate["unit"])
            for one in document["answers"]
            for estimate in one["estimates"]
        ]
        cautions = [caution for one in document["answers"] for caution in one["cautions"]]
        failed = [f"{name}: no answer. {why}" for name, why in document["failures"].items()]
        privacy = document["privacy"]
        cost = (
            f"The study has cost each person ε = {privacy['epsilon']:.3g} at δ = "
            f"{privacy['delta']:.1g} in all (unit: {privacy['unit']}, adjacency: "
            f"{privacy['adjacency']}, trust: {document['trust']['model']})."
        )
        return Table(
            title=f"{document['study']['title']}: {document['study']['question']}",
            columns=("question", "estimate", "value", "low", "high", "level", "unit"),
            rows=tuple(rows),
            notes=(*cautions, *failed, cost, _PROVEN[self.proven]),
            warnings=tuple(alarm_words(document)),
        )

    def __str__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def read_release(
    path: Path, *, enrolment: Path | None = None, proof: Path | None = None
) -> Release:
    """Read `answer.json` of a release, and verify it by an enrolment's keys if one is given.

    `proof` is `answer.proof`, that the log says so: that beside the answer if there is one. Without
    an enrolment nothing is verified, and the release says so. Raises `ManifestError`,
    `ApprovalError` or `StudyLogError` for a document that is damaged or does not hold; then nothing
    of it is returned.
    """
    document = parse_document(_bytes(path))
    parse_form(document)
    proven: Proven = "nothing"
    if enrolment is not None:
        beside = path.with_name("answer.proof")
        given = proof or (beside if beside.exists() else None)
        evidence = None if given is None else _bytes(given)
        verify_believed(document, parse_enrolment(_bytes(enrolment)), proof=evidence)
        proven = "signed" if given is None else "released"
    elif proof is not None:
        raise ManifestError("A proof is checked by the keys of an enrolment: name that, too.")
    models = {one["query"]: _model(one) for one in document["models"]}
    return Release(document=document, models=models, proven=proven)


def _model(one: Mapping[str, Any]) -> Model:
    query = declared_question(canonical_json(one["ask"]).decode())
    weights = model_weights(one)
    if not isinstance(query, TrainQuery) or weights.shape != (parameters(query.spec),):
        raise ManifestError(f"The weights of {one['query']} are no such model.")
    cost = one["cost"]
    return Model(query=query, weights=weights, epsilon=cost["epsilon"], delta=cost["delta"])


def _figures(estimate: Mapping[str, Any]) -> tuple[str, str, str, str]:
    level = f"{100 * estimate['level']:g} %"
    return (*figures(estimate["value"], estimate["low"], estimate["high"]), level)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}.") from error
