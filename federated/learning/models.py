"""What a model computes of its weights: prediction, gradient, and where a run starts.

Weights are one flat float64 vector, in this order (matrices row by row, outputs by inputs):

- *logistic*, *linear*: one weight for each input, then the bias.
- *mlp*: layer by layer, from the inputs to the one output: matrix, then biases.
- *gru* of h units: the matrix of the inputs (3h by inputs), that of the state (3h by h), the biases
  of the inputs (3h) and of the state (3h), each as reset, update and new gate one below the other,
  as PyTorch has them; then the output's weights (h) and its bias. The state starts with zeros.

Between the layers of an MLP stands tanh: it is bounded, so that noisy or hostile weights do not
blow activations up from layer to layer, and smooth, so that gradients have no kinks at which two
machines could decide differently. Loss: mean log loss for a class, mean squared error of the scaled
number else, plus `l2`/2 times the squared weights, biases left out.

A specification with a personal head has weights without it: all but the output's, of logistic and
linear models all but the bias (`personal`).

Logistic and linear models need NumPy only. The others import torch when they are first used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.aggregation.bits import SeededBits
from federated.errors import ManifestError
from federated.learning.spec import MAX_PARAMETERS, Examples, TrainSpec

_INITIAL: Final = b"havengate/initial-weights/v1\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor of the flat vector. `start` is where it begins; biases are never decayed."""

    name: str
    shape: tuple[int, ...]
    start: int
    is_bias: bool

    @property
    def size(self) -> int:
        """How many weights it holds."""
        return math.prod(self.shape)

    def of(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """The tensor itself, out of a flat vector."""
        return weights[self.start : self.start + self.size].reshape(self.shape)


@lru_cache(maxsize=64)
def parts(spec: TrainSpec) -> tuple[Part, ...]:
    """The tensors of the flat vector, in its order; without the head if it is personal."""
    shapes: list[tuple[str, tuple[int, ...]]] = []
    if spec.kind == "gru":
        width = spec.hidden[0]
        shapes += [
            ("gru.weight_ih", (3 * width, spec.inputs)),
            ("gru.weight_hh", (3 * width, width)),
            ("gru.bias_ih", (3 * width,)),
            ("gru.bias_hh", (3 * width,)),
            ("output.weight", (1, width)),
            ("output.bias", (1,)),
        ]
    else:
        widths = (spec.inputs, *spec.hidden, 1)
        names = [f"layer{number}" for number in range(len(spec.hidden))] + ["output"]
        for name, (before, after) in zip(names, pairwise(widths), strict=True):
            shapes += [(f"{name}.weight", (after, before)), (f"{name}.bias", (after,))]
    found, start = [], 0
    for name, shape in shapes:
        part = Part(name=name, shape=shape, start=start, is_bias="bias" in name)
        found.append(part)
        start += part.size
    if spec.personal is not None:
        # The last layer, of one alone its bias.
        del found[-1 if spec.kind in {"logistic", "linear"} else -2 :]
    return tuple(found)


@lru_cache(maxsize=64)
def parameters(spec: TrainSpec) -> int:
    """Length of the flat vector. Raises `ManifestError` for a model too large to be summed."""
    count = sum(part.size for part in parts(spec))
    if count > MAX_PARAMETERS:
        raise ManifestError(
            f"{spec.name}: a model has at most {MAX_PARAMETERS} parameters, this one {count}."
        )
    return count


def decayed(spec: TrainSpec) -> NDArray[np.float64]:
    """1 where weight decay applies, 0 at biases."""
    return np.concatenate([np.full(part.size, float(not part.is_bias)) for part in parts(spec)])


def initial(spec: TrainSpec, *, seed: bytes) -> NDArray[np.float64]:
    """Where a run starts. Public: who knows the seed gets the same weights on every machine.

    Zeros for logistic and linear models, whose loss is convex. Else Glorot's uniform weights
    (Glorot and Bengio 2010), which suit tanh, drawn from the seed's ChaCha20 stream; biases 0.
    """
    weights = np.zeros(parameters(spec))
    if spec.kind in {"logistic", "linear"}:
        return weights
    stream = SeededBits(sha256(_INITIAL + seed).digest(), b"weights")
    for part in parts(spec):
        if part.is_bias:
            continue
        outputs, inputs = part.shape
        if part.name.startswith("gru."):
            outputs //= 3
        reach = math.sqrt(6 / (inputs + outputs))
        uniform = (stream.words(part.size) >> np.uint64(11)) * 2.0**-53
        weights[part.start : part.start + part.size] = reach * (2 * uniform - 1)
    return weights


def predict(
    spec: TrainSpec, weights: NDArray[np.float64], x: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The class's probability, or the number on the label's scale (not cut at -1 and 1): (n,).

    NaN where the weights lead to no number; never an exception for what weights or `x` hold.
    Raises `ManifestError` for a specification whose head is personal: see `personal.predict_newer`.
    """
    _check_whole(spec)
    if spec.kind in {"logistic", "linear"}:
        outputs = _affine(weights, x)
    else:
        from federated.learning import networks

        outputs = networks.outputs(spec, weights, x)
    return sigmoid(outputs) if spec.label.is_class else outputs


def gradient(
    spec: TrainSpec, weights: NDArray[np.float64], examples: Examples
) -> NDArray[np.float64]:
    """Of the loss with its decay (see above), over all the examples; of the decay alone over none.

    Not finite where the weights lead to no number. Raises `ManifestError` as `predict` does.
    """
    _check_whole(spec)
    if spec.kind not in {"logistic", "linear"}:
        from federated.learning import networks

        return networks.gradient(spec, weights, examples)
    count = max(len(examples.y), 1)
    with np.errstate(all="ignore"):
        outputs = _affine(weights, examples.x)
        # The derivative of the log loss is p - y, that of the squared error twice the residual.
        residuals = (
            sigmoid(outputs) - examples.y if spec.label.is_class else 2 * (outputs - examples.y)
        )
        slopes = np.append(residuals @ examples.x, residuals.sum()) / count
        slopes[:-1] += spec.work.l2 * weights[:-1]
    return slopes


def _check_whole(spec: TrainSpec) -> None:
    if spec.personal is not None:
        raise ManifestError(
            f"{spec.name}: these weights have no head, since it is personal: nothing can be "
            "predicted without a person's own older examples. See `personal`."
        )


def sigmoid(outputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + e^-z), without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * outputs)))


def _affine(weights: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(all="ignore"):
        return np.asarray(x @ weights[:-1] + weights[-1])
