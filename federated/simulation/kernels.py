"""Many people's gradients at once: what `learning.models.gradient` gives one by one.

Batched linear algebra for logistic and linear models, in NumPy or torch alike; gradients of MLPs
derived by hand, in torch, since one product of matrices then does what autograd takes several
passes over memory for; `torch.func.vmap(grad(networks.loss))` for a GRU. torch is imported when it
is needed.

Padding repeats a person's own first example with a share of 0: so whatever is no number in the
padding is none in the person's own examples either, and their update is zeros on a device, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from federated.errors import ManifestError
from federated.learning.models import Part, decayed, parts
from federated.learning.spec import TrainSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Some people's examples, padded to the same number. Arrays of `library`, NumPy or torch.

    `x`: (people, examples, d) or (people, examples, steps, d); `y` and `share`: (people, examples).
    `share` is each example's part of its person's mean, 0 for padding.
    """

    library: Any
    x: Any = field(repr=False)
    y: Any = field(repr=False)
    share: Any = field(repr=False)


def changes(spec: TrainSpec, start: Any, chunk: Chunk) -> Any:
    """What `spec.work` makes of the weights `start`, for each person: (people, parameters).

    As in `learning.local.update`, but not finite where that gives zeros. Raises `ManifestError` for
    a model whose head is personal: many at once are not made here.
    """
    if spec.personal is not None:
        raise ManifestError(
            f"{spec.name}: personal heads are not simulated many at once. Ask each device by "
            "itself (`learning.local.update`)."
        )
    gradient = _gradient(spec, start, chunk)
    at = start
    for _ in range(spec.work.epochs):
        # Shared by all people in the first step, (people, parameters) from then on.
        at = at - spec.work.rate * gradient(at)
    return at - start


def _gradient(spec: TrainSpec, like: Any, chunk: Chunk) -> Callable[[Any], Any]:
    """Of the loss with its decay, as a function of weights, shared or one row for each person."""
    decays: Any = decayed(spec)
    if chunk.library is not np:
        decays = chunk.library.asarray(decays, dtype=like.dtype, device=like.device)
    if spec.kind == "gru":
        return _sequence(spec, decays, chunk)
    slopes = partial(_mlp if spec.kind == "mlp" else _affine, spec, chunk)
    if spec.work.l2 == 0:
        return slopes
    return lambda at: slopes(at) + spec.work.l2 * (decays * at)


def _sequence(spec: TrainSpec, decays: Any, chunk: Chunk) -> Callable[[Any], Any]:
    import torch

    from federated.learning import networks

    one = torch.func.grad(partial(networks.loss, spec, decays))
    shared = torch.func.vmap(one, in_dims=(None, 0, 0, 0))
    own = torch.func.vmap(one)

    def slopes(at: Any) -> Any:
        return (shared if at.ndim == 1 else own)(at, chunk.x, chunk.y, chunk.share)

    return slopes


def _affine(spec: TrainSpec, chunk: Chunk, at: Any) -> Any:
    x = chunk.x
    if at.ndim == 1:
        outputs = (x.reshape(-1, x.shape[-1]) @ at[:-1]).reshape(x.shape[:2]) + at[-1]
    else:
        outputs = (x @ at[:, :-1, None])[..., 0] + at[:, -1:]
    slopes = _slopes(spec, chunk, outputs)
    weights = (slopes[:, None, :] @ x)[:, 0]
    return chunk.library.concatenate((weights, slopes.sum(1)[:, None]), 1)


def _slopes(spec: TrainSpec, chunk: Chunk, outputs: Any) -> Any:
    """Derivative of each person's mean loss by each of their outputs."""
    if spec.label.is_class and spec.kind == "mlp":
        # Not the sigmoid itself: that of torch's softplus, which is 1 above 20.
        rising = chunk.library.ops.aten.softplus_backward(chunk.share, outputs, 1, 20)
        return rising - chunk.share * chunk.y
    if spec.label.is_class:
        # The sigmoid of `learning.models`.
        outputs = 0.5 * (1.0 + chunk.library.tanh(0.5 * outputs))
        return (outputs - chunk.y) * chunk.share
    return 2 * (outputs - chunk.y) * chunk.share


def _mlp(spec: TrainSpec, chunk: Chunk, at: Any) -> Any:
    """Backpropagation through tanh layers, for shared weights or one row of them a person.

    Products stand in the order in which autograd has them, so that what overflows there does here.
    """
    torch = chunk.library
    people, count = chunk.x.shape[:2]
    *hidden, (matrix, bias) = _layers(spec, at)
    states = [chunk.x]
    for weights, biases in hidden:
        states.append(_forward(torch, states[-1], weights, biases))
    outputs = (states[-1] @ matrix[..., 0, :, None])[..., 0] + bias
    slopes = _slopes(spec, chunk, outputs)
    found = [slopes.sum(1)[:, None], torch.bmm(slopes[:, None, :], states[-1])[:, 0]]
    ones = chunk.x.new_ones((1, 1, count)).expand(people, 1, count)
    errors = slopes[..., None] * matrix
    for number in reversed(range(len(hidden))):
        errors = torch.ops.aten.tanh_backward(errors, states[number + 1])
        found.append(torch.bmm(ones, errors)[:, 0])
        found.append(torch.bmm(errors.transpose(1, 2), states[number]).reshape(people, -1))
        if number:
            errors = errors @ hidden[number][0]
    return torch.cat(found[::-1], 1)


def _forward(torch: Any, before: Any, matrix: Any, bias: Any) -> Any:
    if matrix.ndim == 2:  # noqa: PLR2004 - the same matrix for all people
        flat = torch.addmm(bias, before.reshape(-1, before.shape[-1]), matrix.T)
        return flat.tanh_().reshape(*before.shape[:2], -1)
    return torch.baddbmm(bias[:, None], before, matrix.transpose(1, 2)).tanh_()


def _layers(spec: TrainSpec, at: Any) -> list[tuple[Any, Any]]:
    """Matrix and bias of each layer, with people in front where each has weights of their own."""
    tensors = [_part(at, part) for part in parts(spec)]
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def _part(at: Any, part: Part) -> Any:
    return at[..., part.start : part.start + part.size].reshape(*at.shape[:-1], *part.shape)
