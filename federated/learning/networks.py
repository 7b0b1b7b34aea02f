"""MLP and GRU in torch: pure functions of the flat weights, made for `torch.func`.

Everything that needs torch to compute a model stands here; `models` imports it when such a model is
used. `loss` takes one person's tensors, has no branch on data and no operation that `vmap` cannot
batch, so that many people's gradients are one call of `vmap(grad(loss))`.
"""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from federated.learning.models import Part, decayed, parts
from federated.learning.spec import Examples, TrainSpec


def forward(spec: TrainSpec, weights: Tensor, x: Tensor) -> Tensor:
    """The output before the sigmoid: (n,). `weights` flat; `x` (n, d), or (n, steps, d)."""
    tensors = {part.name: _view(part, weights) for part in parts(spec)}
    hidden = _gru(tensors, x) if spec.kind == "gru" else x
    for number in range(len(spec.hidden) if spec.kind == "mlp" else 0):
        matrix, bias = tensors[f"layer{number}.weight"], tensors[f"layer{number}.bias"]
        hidden = torch.tanh(hidden @ matrix.T + bias)
    return (hidden @ tensors["output.weight"].T + tensors["output.bias"])[:, 0]


def loss(
    spec: TrainSpec, decays: Tensor, weights: Tensor, x: Tensor, y: Tensor, share: Tensor
) -> Tensor:
    """The loss that `models` defines. `share` (n,): each example's part of the mean, 0 for padding.

    `decays` is `models.decayed` as a tensor.
    """
    outputs = forward(spec, weights, x)
    is_class = spec.label.is_class
    each = functional.softplus(outputs) - y * outputs if is_class else (outputs - y) ** 2
    return (share * each).sum() + spec.work.l2 / 2 * (decays * weights**2).sum()


def outputs(
    spec: TrainSpec, weights: NDArray[np.float64], x: NDArray[np.float64]
) -> NDArray[np.float64]:
    """`forward` on arrays."""
    with torch.no_grad():
        found = forward(spec, torch.from_numpy(_own(weights)), torch.from_numpy(_own(x)))
    return np.asarray(found.numpy(), dtype=np.float64)


def gradient(
    spec: TrainSpec, weights: NDArray[np.float64], examples: Examples
) -> NDArray[np.float64]:
    """Of the mean loss over one person's examples."""
    count = len(examples.y)
    share = torch.full((count,), 1 / max(count, 1), dtype=torch.float64)
    slopes = torch.func.grad(partial(loss, spec, _decays(spec)))(
        torch.from_numpy(_own(weights)),
        torch.from_numpy(_own(examples.x)),
        torch.from_numpy(_own(examples.y)),
        share,
    )
    return np.asarray(slopes.detach().numpy(), dtype=np.float64)


def _gru(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """The last state. Gates as in `torch.nn.GRU`, whose own kernel `vmap` cannot batch."""
    width = tensors["gru.weight_hh"].shape[1]
    state = torch.zeros((x.shape[0], width), dtype=x.dtype, device=x.device)
    given = x @ tensors["gru.weight_ih"].T + tensors["gru.bias_ih"]
    for step in range(x.shape[1]):
        kept = state @ tensors["gru.weight_hh"].T + tensors["gru.bias_hh"]
        seen = given[:, step, :]
        reset = torch.sigmoid(seen[:, :width] + kept[:, :width])
        update = torch.sigmoid(seen[:, width : 2 * width] + kept[:, width : 2 * width])
        new = torch.tanh(seen[:, 2 * width :] + reset * kept[:, 2 * width :])
        state = (1 - update) * new + update * state
    return state


def _view(part: Part, weights: Tensor) -> Tensor:
    return weights[part.start : part.start + part.size].reshape(part.shape)


@lru_cache(maxsize=64)
def _decays(spec: TrainSpec) -> Tensor:
    return torch.from_numpy(decayed(spec))


def _own(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """A contiguous array that may be written to, as torch wants it."""
    return np.array(array, dtype=np.float64, order="C")
