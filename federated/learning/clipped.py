"""The sum of many people's clipped gradients, by Opacus: one person is one "sample".

A person's tensor is (most, inputs), or (most, steps, inputs), padded; their loss is the mean over
their own examples (a share of 0 for padding). So Opacus' per-sample gradient is the person's, and
its clipping is per person. What is taken from Opacus is this sum alone: sampling, noise and the
number that is divided by are `site`'s, and exact.

- *ghost*: norms without gradients (Li et al. 2022, Bu et al. 2022), then one backward pass of the
  losses times their clipping factors. Only for layers that are used once: not for a GRU.
- *hooks*: every person's gradient in memory, clipped, summed.

Weight decay is no part of it: it depends on nobody's data. Importing this imports torch and Opacus.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from federated.errors import ManifestError
from federated.learning.models import parts
from federated.learning.spec import Examples, TrainSpec

with warnings.catch_warnings():
    # Opacus' own imports warn of what torch deprecates.
    warnings.simplefilter("ignore")
    from opacus.grad_sample import GradSampleModule  # type: ignore[import-untyped]
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (  # type: ignore[import-untyped]
        GradSampleModuleFastGradientClipping,
    )

type Method = Literal["ghost", "hooks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Padded:
    """People's examples as tensors. `x`: (people, most, [steps,] inputs); `y`, `share`: (…, most).

    `share` is each example's part of the person's mean: it sums to 1 for each, 0 for padding, and
    to 0 for who has no example.
    """

    x: Tensor = field(repr=False)
    y: Tensor = field(repr=False)
    share: Tensor = field(repr=False)

    @property
    def people(self) -> int:
        """How many."""
        return len(self.x)

    def among(self, chosen: NDArray[np.intp]) -> Padded:
        """Of some of the people."""
        places = torch.from_numpy(chosen)
        return Padded(x=self.x[places], y=self.y[places], share=self.share[places])


def padded(spec: TrainSpec, people: Sequence[Examples]) -> Padded:
    """Everybody's examples, each padded with zeros to the longest."""
    most = max((len(one.y) for one in people), default=0) or 1
    inner = (spec.steps, spec.inputs) if spec.kind == "gru" else (spec.inputs,)
    x = np.zeros((len(people), most, *inner))
    y, share = np.zeros((len(people), most)), np.zeros((len(people), most))
    for place, one in enumerate(people):
        count = len(one.y)
        x[place, :count], y[place, :count] = one.x, one.y
        share[place, :count] = 1 / max(count, 1)
    return Padded(x=torch.from_numpy(x), y=torch.from_numpy(y), share=torch.from_numpy(share))


def quicker(spec: TrainSpec, most: int) -> Method:
    """By what takes less time for people of up to `most` examples (`bench_opacus` measures it).

    A layer's norms from most² inner products of its inputs and of its outputs, or from its gradient
    itself, whichever is less work (Bu et al. 2022); small models have not enough of it to save.
    """
    if spec.kind != "mlp":
        return "hooks"
    widths = (spec.inputs, *spec.hidden, 1)
    products = sum(most**2 * (inputs + outputs) for inputs, outputs in pairwise(widths))
    gradients = sum(inputs * outputs for inputs, outputs in pairwise(widths))
    return "ghost" if products < gradients else "hooks"


class Clipper:
    """A model with Opacus' hooks on it, for many calls. Raises `ManifestError` for what cannot be.

    Not finite wherever anybody's gradient is not: who calls checks.
    """

    def __init__(self, spec: TrainSpec, *, method: Method) -> None:
        if method == "ghost" and spec.kind == "gru":
            raise ManifestError(
                f"{spec.name}: ghost clipping needs layers that are used once, and a GRU uses its "
                "own at every step. Use `hooks`."
            )
        self._spec = spec
        self._net = _Net(spec)
        wrapper: Any = (
            GradSampleModuleFastGradientClipping if method == "ghost" else GradSampleModule
        )
        self._hooked: Any = wrapper(self._net, batch_first=True, loss_reduction="sum")
        self._sum = self._by_ghost if method == "ghost" else self._by_hooks

    def clipped_sum(
        self, weights: NDArray[np.float64], people: Padded, *, clip: float
    ) -> NDArray[np.float64]:
        """Σ over people of gradient · min(1, clip/norm), in the order of `models.parts`.

        Zeros for nobody.
        """
        if not people.people:
            return np.zeros(len(weights))
        self._net.put(weights)
        self._hooked.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            # Inputs are data and need no gradient; torch says that hooks then fire at the outputs.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            found = self._sum(self._losses(people), clip)
        return np.concatenate([part.detach().numpy().reshape(-1) for part in found])

    def _losses(self, people: Padded) -> Tensor:
        outputs: Tensor = self._hooked(people.x)
        if self._spec.label.is_class:
            each = functional.softplus(outputs) - people.y * outputs
        else:
            each = (outputs - people.y) ** 2
        return (people.share * each).sum(dim=1)

    def _by_ghost(self, losses: Tensor, clip: float) -> list[Tensor]:
        # Of the first layer's bias alone: every layer's hook fires, no other gradient is made.
        torch.autograd.grad(losses.sum(), self._net.first, retain_graph=True)
        factors = _factors(self._hooked.get_norm_sample().detach(), clip)
        self._hooked.disable_hooks()
        try:
            return list(torch.autograd.grad((factors * losses).sum(), self._net.tensors))
        finally:
            self._hooked.enable_hooks()

    def _by_hooks(self, losses: Tensor, clip: float) -> list[Tensor]:
        torch.autograd.backward(losses.sum())
        each: list[Tensor] = [vars(tensor)["grad_sample"] for tensor in self._net.tensors]
        norms = torch.stack([one.flatten(1).norm(dim=1) for one in each]).norm(dim=0)
        factors = _factors(norms, clip)
        return [torch.tensordot(factors, one, dims=1) for one in each]


class _Net(nn.Module):
    """`networks.forward` as layers that Opacus knows: (people, most, …) to (people, most)."""

    def __init__(self, spec: TrainSpec) -> None:
        super().__init__()
        self._spec = spec
        named: dict[str, Tensor] = {}
        if spec.kind == "gru":
            width = spec.hidden[0]
            self.given = nn.Linear(spec.inputs, 3 * width, dtype=torch.float64)
            self.kept = nn.Linear(width, 3 * width, dtype=torch.float64)
            for layer, name in ((self.given, "ih"), (self.kept, "hh")):
                named |= {f"gru.weight_{name}": layer.weight, f"gru.bias_{name}": layer.bias}
            widths = [width, 1]
        else:
            widths = [spec.inputs, *spec.hidden, 1]
        pairs = list(pairwise(widths))
        self.layers = nn.ModuleList(
            nn.Linear(inputs, outputs, dtype=torch.float64) for inputs, outputs in pairs
        )
        for number, one in enumerate(self.layers):
            name = "output" if number == len(pairs) - 1 else f"layer{number}"
            named |= dict(one.named_parameters(prefix=name))
        self._parts = parts(spec)
        # A tuple, so that torch does not register them twice.
        self.tensors = tuple(named[part.name] for part in self._parts)
        self.first = (self.tensors[1],)

    def put(self, weights: NDArray[np.float64]) -> None:
        """Set the flat weights."""
        with torch.no_grad():
            for part, tensor in zip(self._parts, self.tensors, strict=True):
                tensor.copy_(torch.from_numpy(part.of(weights).copy()))

    def forward(self, x: Tensor) -> Tensor:
        """The output before the sigmoid."""
        hidden = self._state(x) if self._spec.kind == "gru" else x
        for layer in self.layers[:-1]:
            hidden = torch.tanh(layer(hidden))
        return torch.as_tensor(self.layers[-1](hidden))[..., 0]

    def _state(self, x: Tensor) -> Tensor:
        """Gates as `networks` has them, by layers whose gradients Opacus adds up over the steps."""
        width = self._spec.hidden[0]
        state = x.new_zeros((*x.shape[:2], width))
        given = self.given(x)
        for step in range(x.shape[2]):
            kept, seen = self.kept(state), given[:, :, step]
            reset = torch.sigmoid(seen[..., :width] + kept[..., :width])
            update = torch.sigmoid(seen[..., width : 2 * width] + kept[..., width : 2 * width])
            new = torch.tanh(seen[..., 2 * width :] + reset * kept[..., 2 * width :])
            state = (1 - update) * new + update * state
        return state


def _factors(norms: Tensor, clip: float) -> Tensor:
    return torch.clamp(clip / norms, max=1.0)
