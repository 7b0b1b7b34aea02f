"""The files of a released model, made from the document's own weights: nothing else is given out.

Lives here: their names and bytes, and what stands in the way of one. `learning.export` says what is
in them. The packages that write them are optional, and torch is none of them: a release without
them is whole, for the weights are in the document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final

from federated.errors import ManifestError
from federated.learning.export import Provenance, to_onnx, to_safetensors
from federated.learning.round_query import TrainQuery
from federated.learning.spec import TrainSpec
from federated.manifest import canonical_json
from federated.questions import declared_question
from federated.release.alarms import findings
from federated.release.document import model_weights

_WRITERS: Final = {"safetensors": to_safetensors, "onnx": to_onnx}
#: Of every file of this kind, whatever the model is called.
PATTERNS: Final = tuple(f"model-*.{form}" for form in _WRITERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """One file of one model. `data` is None, and `missing` says why, where it cannot be made."""

    query: str
    name: str
    data: bytes | None = field(repr=False)
    missing: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 in hex; empty where there is no file."""
        return "" if self.data is None else sha256(self.data).hexdigest()


def model_files(document: Mapping[str, Any]) -> list[ModelFile]:
    """Both files of each model. Raises `ManifestError` for weights that are no such model."""
    return [file for model in document["models"] for file in _files(document, model)]


def spec_of(model: Mapping[str, Any]) -> TrainSpec:
    """What a document's model is a model of. Raises `ManifestError`."""
    query = declared_question(canonical_json(model["ask"]).decode())
    if not isinstance(query, TrainQuery):
        raise ManifestError(f"{query.name} is no training, so it has no model.")
    return query.spec


def _files(document: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[ModelFile]:
    spec, weights = spec_of(model), model_weights(model)
    cost = model["cost"]
    provenance = Provenance(
        study_hash=document["study"]["hash"],
        epsilon=cost["epsilon"],
        delta=cost["delta"],
        audit=_audit_words(model),
    )
    for form, write in _WRITERS.items():
        name = f"model-{model['query']}.{form}"
        try:
            data, missing = write(spec, weights, provenance), ""
        except ImportError as error:
            data = None
            missing = (
                f"the package {error.name or form} is not installed here "
                "(pip install 'havengate[learning]'); the weights are in the answer"
            )
        except ValueError as error:
            data, missing = None, str(error)
        yield ModelFile(query=model["query"], name=name, data=data, missing=missing)


def _audit_words(model: Mapping[str, Any]) -> str:
    if model["audit"] is None:
        return "none"
    return ",".join(findings(model)) or "nothing_found"
