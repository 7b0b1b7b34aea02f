"""A trained model for others: safetensors (exact doubles) and ONNX (floats, runs anywhere).

Both carry where they come from: the specification as canonical JSON, the study's hash, ε and δ.
The ONNX graph is built node by node from the flat weights: its input is examples as `examples_of`
scales them, its output what `predict` says. Nothing of torch is needed to write or to run either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from federated.learning.models import parameters, parts
from federated.learning.spec import TrainSpec
from federated.manifest import canonical_json

if TYPE_CHECKING:
    from onnx import NodeProto

FORMAT: Final = "havengate/model/v1"
#: Old enough for any runtime of today, new enough for every operator that is used.
_OPSET: Final = 17
_IR_VERSION: Final = 8
#: ONNX has a GRU's gates as update, reset, new; the flat weights as reset, update, new.
_GATES: Final = (1, 0, 2)

_PERSONAL: Final = (
    "personal: made of a person's own older examples on their device, not in this file"
)

type _Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a released model says of itself. ε at δ: of all its training, unit person, zero-out.

    `audit`: what the audit of its training found: `none` took place, `nothing_found`, or the names
    of findings (`release.alarms`), for a file travels without the page that says them first.
    """

    study_hash: str
    epsilon: float
    delta: float
    audit: str = "none"


def metadata(spec: TrainSpec, provenance: Provenance) -> Mapping[str, str]:
    """The same texts in both files."""
    said = {
        "format": FORMAT,
        "specification": canonical_specification(spec).decode(),
        "study_hash": provenance.study_hash,
        "epsilon": repr(provenance.epsilon),
        "delta": repr(provenance.delta),
        "unit": "person",
        "adjacency": "zero-out",
        "audit": provenance.audit,
    }
    if spec.personal is not None:
        said["head"] = _PERSONAL
    return said


def canonical_specification(spec: TrainSpec) -> bytes:
    """The specification as canonical JSON: all that is needed to make inputs of rows."""
    return canonical_json(asdict(spec))


def to_safetensors(spec: TrainSpec, weights: NDArray[np.float64], provenance: Provenance) -> bytes:
    """The weights as named tensors, in doubles; without the head where that is personal.

    Raises `ValueError` for another model's weights.
    """
    from safetensors.numpy import save

    tensors = {name: np.ascontiguousarray(value) for name, value in _named(spec, weights).items()}
    return _in_one_form(save(tensors, metadata=dict(metadata(spec, provenance))))


def _in_one_form(data: bytes) -> bytes:
    """The same file with its header's keys sorted: the library writes them in any order.

    A file is its header's length (8 bytes, little-endian), the header as JSON, padded with spaces
    to a multiple of 8 bytes, and the tensors.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    padded = header.ljust(-(-len(header) // 8) * 8)
    return len(padded).to_bytes(8, "little") + padded + data[end:]


def to_onnx(spec: TrainSpec, weights: NDArray[np.float64], provenance: Provenance) -> bytes:
    """A graph from `features` (n, inputs), or (n, steps, inputs), to `prediction` (n,), in floats.

    Raises `ValueError` for weights that are not this specification's, or not finite as floats, and
    for a model whose head is personal: without one it predicts nothing.
    """
    if spec.personal is not None:
        raise ValueError(
            f"{spec.name}: the head is personal, and no graph can predict without it. Write the "
            "body with `to_safetensors`, and make heads by `personal.reconstructed`."
        )
    from onnx import TensorProto, checker, helper, numpy_helper

    nodes, constants = (_gru if spec.kind == "gru" else _layers)(spec, _named(spec, weights))
    nodes.append(
        helper.make_node("Sigmoid" if spec.label.is_class else "Identity", ["raw"], ["column"])
    )
    nodes.append(helper.make_node("Squeeze", ["column", "one"], ["prediction"]))
    constants["one"] = np.array([1], dtype=np.int64)
    steps: list[str | int | None] = [spec.steps] if spec.kind == "gru" else []
    shape: list[str | int | None] = ["examples", *steps, spec.inputs]
    graph = helper.make_graph(
        nodes,
        spec.name,
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("prediction", TensorProto.FLOAT, ["examples"])],
        [numpy_helper.from_array(_as_float(value), name) for name, value in constants.items()],
        doc_string="the class's probability" if spec.label.is_class else "the scaled number",
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="havengate",
    )
    helper.set_model_props(model, dict(metadata(spec, provenance)))
    checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def _named(spec: TrainSpec, weights: _Floats) -> dict[str, _Floats]:
    if weights.shape != (parameters(spec),) or not np.isfinite(weights).all():
        raise ValueError(
            f"{spec.name}: expected {parameters(spec)} finite weights, got {weights.shape}: these "
            "are not a model of this specification."
        )
    return {part.name: part.of(weights) for part in parts(spec)}


def _layers(
    spec: TrainSpec, tensors: Mapping[str, _Floats]
) -> tuple[list[NodeProto], dict[str, NDArray[np.generic]]]:
    """Logistic, linear, MLP: affine layers with tanh between."""
    from onnx import helper

    nodes, given = [], "features"
    for number in range(len(spec.hidden)):
        layer = f"layer{number}"
        nodes.append(_affine(given, layer, f"{layer}.affine"))
        nodes.append(helper.make_node("Tanh", [f"{layer}.affine"], [f"{layer}.tanh"]))
        given = f"{layer}.tanh"
    nodes.append(_affine(given, "output", "raw"))
    return nodes, dict(tensors)


def _gru(
    spec: TrainSpec, tensors: Mapping[str, _Floats]
) -> tuple[list[NodeProto], dict[str, NDArray[np.generic]]]:
    """ONNX's own GRU, its reset gate after the product as torch has it, then the output."""
    from onnx import helper

    width = spec.hidden[0]
    nodes = [
        helper.make_node("Transpose", ["features"], ["by_step"], perm=[1, 0, 2]),
        helper.make_node(
            "GRU",
            ["by_step", "gru.W", "gru.R", "gru.B"],
            ["", "state"],
            hidden_size=width,
            linear_before_reset=1,
        ),
        helper.make_node("Squeeze", ["state", "zero"], ["last"]),
        _affine("last", "output", "raw"),
    ]
    biases = [_regated(tensors[name], width) for name in ("gru.bias_ih", "gru.bias_hh")]
    constants: dict[str, NDArray[np.generic]] = {
        "gru.W": _regated(tensors["gru.weight_ih"], width)[None],
        "gru.R": _regated(tensors["gru.weight_hh"], width)[None],
        "gru.B": np.concatenate(biases)[None],
        "output.weight": tensors["output.weight"],
        "output.bias": tensors["output.bias"],
        "zero": np.array([0], dtype=np.int64),
    }
    return nodes, constants


def _affine(given: str, layer: str, result: str) -> NodeProto:
    from onnx import helper

    return helper.make_node("Gemm", [given, f"{layer}.weight", f"{layer}.bias"], [result], transB=1)


def _regated(value: _Floats, width: int) -> _Floats:
    """The three gates in ONNX's order."""
    return np.concatenate([value[gate * width : (gate + 1) * width] for gate in _GATES])


def _as_float(value: NDArray[np.generic]) -> NDArray[np.generic]:
    """Single precision for weights. Raises `ValueError` where one does not fit."""
    if value.dtype != np.float64:
        return value
    with np.errstate(over="ignore"):
        single = value.astype(np.float32)
    if not np.isfinite(single).all():
        raise ValueError(
            "A weight is too large for single precision: the model cannot be exported."
        )
    return single
