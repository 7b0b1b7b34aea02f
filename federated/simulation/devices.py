"""Virtual devices: many people's examples in one place, as arrays.

For public or made-up people only: nothing here asks for consent, keeps a budget or guards a row.
Before this comes `learning.examples`, which makes one person's examples; after it `vectorised`,
which trains on all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from federated.learning.examples import examples_of
from federated.learning.spec import Examples, TrainSpec
from federated.model import PersonRows

#: What training reckons in. A real device reckons in float64.
type Precision = Literal["float64", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Devices:
    """Examples of many people, one after the other. All numbers are finite.

    `x`: (examples, d), or (examples, steps, d) for a sequence; `y`: (examples,). Person i's are
    those from `starts[i]` up to below `starts[i + 1]`, none if both are the same. The type of `x`
    is what training reckons in.
    """

    x: NDArray[Any] = field(repr=False)
    y: NDArray[Any] = field(repr=False)
    starts: NDArray[np.int64] = field(repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError for arrays that do not fit each other, or that are not finite."""
        starts = self.starts
        ordered = (
            starts.ndim == 1 and starts.size and starts[0] == 0 and (np.diff(starts) >= 0).all()
        )
        if not ordered or not len(self.x) == len(self.y) == starts[-1]:
            raise ValueError("expected starts that never fall, from 0 to the number of examples")
        if self.x.dtype not in {np.dtype("float64"), np.dtype("float32")}:
            raise ValueError(f"expected float64 or float32 examples, got {self.x.dtype}")
        if not (np.isfinite(self.x).all() and np.isfinite(self.y).all()):
            raise ValueError("expected finite examples; `pack` leaves out whom others would spoil")

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many examples each person has."""
        return np.diff(self.starts)

    def of(self, person: int) -> Examples:
        """One person's, as `learning.local.update` takes them."""
        own = slice(self.starts[person], self.starts[person + 1])
        return Examples(
            x=np.asarray(self.x[own], dtype=np.float64), y=np.asarray(self.y[own], dtype=np.float64)
        )

    def among(self, people: NDArray[np.int64]) -> Devices:
        """Copies of some of them, in that order."""
        whole = [self.of(int(person)) for person in people]
        return _joined(whole, self.x.shape[1:], self.x.dtype)


def pack(
    spec: TrainSpec, people: Iterable[Examples], *, precision: Precision = "float64"
) -> Devices:
    """Devices of these examples, in their order.

    Whose examples hold a number that is not finite gets none: on a device it makes an update of
    zeros, as having no example does. Raises ValueError for examples of another shape than `spec`'s.
    """
    shape = (spec.steps, spec.inputs) if spec.kind == "gru" else (spec.inputs,)
    kept: list[Examples] = []
    for one in people:
        if one.x.shape != (len(one.y), *shape):
            raise ValueError(f"{spec.name}: expected examples of {shape}, got {one.x.shape[1:]}")
        finite = np.isfinite(one.x).all() and np.isfinite(one.y).all()
        kept.append(one if finite else Examples(x=one.x[:0], y=one.y[:0]))
    return _joined(kept, shape, np.dtype(precision))


def devices_of(
    spec: TrainSpec, people: Iterable[PersonRows], *, precision: Precision = "float64"
) -> Devices:
    """Devices of people's rows, through `learning.examples.examples_of` as on a real one."""
    return pack(spec, (examples_of(spec, rows) for rows in people), precision=precision)


def _joined(people: Sequence[Examples], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Devices:
    starts = np.concatenate(([0], np.cumsum([len(one.y) for one in people]))).astype(np.int64)
    x, y = np.empty((int(starts[-1]), *shape), dtype=dtype), np.empty(int(starts[-1]), dtype=dtype)
    for place, one in enumerate(people):
        own = slice(starts[place], starts[place + 1])
        x[own], y[own] = one.x, one.y
    return Devices(x=x, y=y, starts=starts)
