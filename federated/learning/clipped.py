"""The sum of many people's clipped gradients, by Opacus: one person is one "sample".

A person's tensor is (most, inputs), or (most, steps, inputs), padded; their loss is the mean over
their own examples (a share of 0 for padding). So Opacus' per-sample gradient is the person's, and
its clipping is per person. What is taken from Opacus are these gradients alone: sampling, noise and
the number that is divided by are `site`'s, and exact.

**What a person adds depends on their own rows alone**, bit for bit. Library code rounds a row of a
matrix otherwise where the matrix has another shape, and a recurrent network makes of that last bit
whatever it likes. So people sit in places that nobody's rows or draws move: all are padded to the
same length, `CHUNK` at a time, and who is not drawn is computed and left out afterwards. A gradient
that is no number is zeros, before it meets another's. Each is clipped, and rounded to integers.

**Ghost clipping bounds nobody** and is here to be measured (`benchmarks.bench_opacus`). It takes a
person's norm from inner products (Li et al. 2022, Bu et al. 2022), and those cancel: two examples
of one input and opposite labels have a small gradient whose parts are huge, and Opacus' norm of it
is what rounding left. With weights that a coordinator may send, a clip was exceeded 600,000 times
(`test_clipped`). Where a claim is made there are `hooks`: every person's gradient in memory.

Weight decay is no part of it: it depends on nobody's data. Importing this imports torch and Opacus.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, Literal

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

#: So many people are computed at once, each always in the same place.
CHUNK: Final = 64
#: Factors are this much smaller, so that rounding in them makes nobody longer than the clip.
_LESS: Final = 1 - 2.0**-30


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

    def chunk(self, start: int) -> Padded:
        """`CHUNK` people from a place on, nobody in the places beyond the last."""
        # Copied to where the library aligns it: how rows are rounded could depend on that, too.
        cut = [one[start : start + CHUNK].clone() for one in (self.x, self.y, self.share)]
        lacking = CHUNK - len(cut[0])
        if lacking:
            cut = [torch.cat([one, one.new_zeros((lacking, *one.shape[1:]))]) for one in cut]
        return Padded(x=cut[0], y=cut[1], share=cut[2])


def padded(spec: TrainSpec, people: Sequence[Examples], *, most: int | None = None) -> Padded:
    """Everybody's examples, each padded with zeros to `most`, `longest(spec)` if not given.

    Nobody's number of examples moves anything of another's. Raises ValueError for more.
    """
    most = longest(spec) if most is None else most
    inner = (spec.steps, spec.inputs) if spec.kind == "gru" else (spec.inputs,)
    x = np.zeros((len(people), most, *inner))
    y, share = np.zeros((len(people), most)), np.zeros((len(people), most))
    for place, one in enumerate(people):
        count = len(one.y)
        if count > most:
            raise ValueError(f"expected at most {most} examples of a person")
        x[place, :count], y[place, :count] = one.x, one.y
        share[place, :count] = 1 / max(count, 1)
    return Padded(x=torch.from_numpy(x), y=torch.from_numpy(y), share=torch.from_numpy(share))


def longest(spec: TrainSpec) -> int:
    """How many examples a person has at most."""
    return 1 if spec.per == "person" else spec.most


class Clipper:
    """A model with Opacus' hooks on it, for many calls.

    `method` is "ghost" only to measure it. Raises `ManifestError` for what cannot be.
    """

    def __init__(self, spec: TrainSpec, *, method: Method = "hooks") -> None:
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
        self._method = method

    def clipped_sum(
        self,
        weights: NDArray[np.float64],
        people: Padded,
        *,
        clip: float,
        fineness: float,
        drawn: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.int64]:
        """Σ over `drawn` people of gradient · min(1, clip/norm), in integers of clip/`fineness`.

        In the order of `models.parts`; of everybody if `drawn` is not given; zeros for nobody. One
        person moves it by at most `fineness` + √(numbers)/2, whatever their rows and the weights
        are; by ghost there is no bound.
        """
        chosen = np.ones(people.people, dtype=bool) if drawn is None else drawn
        self._net.put(weights)
        with warnings.catch_warnings():
            # Inputs are data and need no gradient; torch says that hooks then fire at the outputs.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            return self._summed(people, chosen, clip=clip, fineness=fineness)

    def _summed(
        self, people: Padded, chosen: NDArray[np.bool_], *, clip: float, fineness: float
    ) -> NDArray[np.int64]:
        exact = np.zeros(self._net.size, dtype=np.int64)
        inexact = np.zeros(self._net.size)
        for start in range(0, people.people, CHUNK):
            mask = np.zeros(CHUNK)
            mask[: len(chosen[start : start + CHUNK])] = chosen[start : start + CHUNK]
            if not mask.any():
                continue
            losses = self._losses(people.chunk(start))
            if self._method == "hooks":
                each = self._by_hooks(losses, clip).mul_(fineness / clip).round_()
                # Whole numbers, so few that doubles hold every sum of them.
                exact += (torch.from_numpy(mask) @ each).numpy().astype(np.int64)
            else:
                inexact += self._by_ghost(losses, clip, torch.from_numpy(mask)).numpy()
        return exact + np.rint(inexact * (fineness / clip)).astype(np.int64)

    def _losses(self, people: Padded) -> Tensor:
        self._hooked.zero_grad(set_to_none=True)
        outputs: Tensor = self._hooked(people.x)
        if self._spec.label.is_class:
            each = functional.softplus(outputs) - people.y * outputs
        else:
            each = (outputs - people.y) ** 2
        return (people.share * each).sum(dim=1)

    def _by_ghost(self, losses: Tensor, clip: float, mask: Tensor) -> Tensor:
        # Of the first layer's bias alone: every layer's hook fires, no other gradient is made.
        torch.autograd.grad(losses.sum(), self._net.first, retain_graph=True)
        factors = _factors(self._hooked.get_norm_sample().detach(), clip) * mask
        self._hooked.disable_hooks()
        try:
            found = torch.autograd.grad((factors * losses).sum(), self._net.tensors)
        finally:
            self._hooked.enable_hooks()
        return torch.cat([one.detach().reshape(-1) for one in found])

    def _by_hooks(self, losses: Tensor, clip: float) -> Tensor:
        """Everybody's clipped gradient, shape (people, numbers); zeros where it is no number."""
        torch.autograd.backward(losses.sum())
        parts_: list[Tensor] = [vars(tensor)["grad_sample"] for tensor in self._net.tensors]
        each = torch.cat([one.detach().flatten(1) for one in parts_], dim=1)
        norms = each.norm(dim=1)
        # What overflows is no number that could be clipped, either.
        each[~torch.isfinite(norms)] = 0.0
        return each.mul_(_factors(norms, clip)[:, None])


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
        self.size = sum(one.numel() for one in self.tensors)

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
    """At most 1, and 1 where there is nothing to clip or no number."""
    return torch.nan_to_num(torch.clamp(clip * _LESS / norms, max=1.0), nan=1.0)
