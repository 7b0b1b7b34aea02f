"""What a training study declares: examples, model, work on the device, clip, rounds.

Types and their rules; no mathematics. `examples` makes examples of rows, `models` what a model
computes, `local` the work of one round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from federated.errors import ManifestError

type ModelKind = Literal["logistic", "linear", "mlp", "gru"]
#: One example for each day, or one for the whole person (each column's newest value).
type Per = Literal["day", "person"]

MAX_FEATURES: Final = 64
MAX_EXAMPLES: Final = 4096
MAX_PARAMETERS: Final = 100_000
MAX_ROUNDS: Final = 1000
_MAX_STEPS: Final = 64
_MAX_EPOCHS: Final = 100
_MAX_RATE: Final = 1000.0
_MAX_L2: Final = 10.0
_MAX_LAYERS: Final = 4
_MAX_WIDTH: Final = 512
_MOST_HELD_OUT: Final = 0.9
_LEAST_OLDER: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One number of an example, scaled to -1 … 1 by bounds that are public.

    Values count as the bound they are beyond. `lag` is how many days before the example's day it
    is taken from. `within`: less the person's own mean of all *earlier* days, so that nothing of
    the future is in it; the bounds then are those of the difference. What is missing counts as 0,
    the middle; `indicator` adds a feature that is 1 where the value is there and 0 where not.
    """

    column: str
    low: float
    high: float
    lag: int = 0
    within: bool = False
    indicator: bool = False

    def __post_init__(self) -> None:
        """Raises `ManifestError` for bounds that bound nothing."""
        _check_bounds(self.column, self.low, self.high)
        if not 0 <= self.lag <= _MAX_STEPS:
            raise ManifestError(f"{self.column}: `lag` is 0 to {_MAX_STEPS} days.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What is predicted. With `at_least` or `below` a class, 1 where it holds; else a number.

    A number is scaled to -1 … 1 by `low` and `high`. `ahead` is how many days after the example's
    day it is taken from. A day without it makes no example.
    """

    column: str
    low: float
    high: float
    at_least: float | None = None
    below: float | None = None
    ahead: int = 0

    def __post_init__(self) -> None:
        """Raises `ManifestError` for a label that is both classes, or out of bounds."""
        _check_bounds(self.column, self.low, self.high)
        if self.at_least is not None and self.below is not None:
            raise ManifestError(f"{self.column}: a label has `at_least` or `below`, not both.")
        if not 0 <= self.ahead <= _MAX_STEPS:
            raise ManifestError(f"{self.column}: `ahead` is 0 to {_MAX_STEPS} days.")

    @property
    def is_class(self) -> bool:
        """Whether a class is predicted rather than a number."""
        return self.at_least is not None or self.below is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """One person's examples. `x`: (n, d), or (n, steps, d) for a sequence; `y`: (n,)."""

    x: NDArray[np.float64] = field(repr=False)
    y: NDArray[np.float64] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a person's device does in one round: gradient descent from the weights it was given.

    `epochs` steps of `rate` along the gradient of the mean loss over all the person's examples
    (full batch: the same numbers on every machine), with weight decay `l2`.
    """

    epochs: int = 1
    rate: float = 1.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        """Raises `ManifestError` for work that never ends or goes nowhere."""
        bounded = self.epochs <= _MAX_EPOCHS and self.rate <= _MAX_RATE and self.l2 <= _MAX_L2
        if not bounded or not (self.epochs >= 1 and self.rate > 0 and self.l2 >= 0):
            raise ManifestError(
                f"`work` needs 1 to {_MAX_EPOCHS} epochs, a rate above 0 and at most "
                f"{_MAX_RATE:g}, and `l2` of 0 to {_MAX_L2:g}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonalHead:
    """The last layer is made on the device in each round, and never leaves it (`personal`).

    `steps` of gradient descent of `rate` from a public start, on the `older` share of the person's
    own examples; the rest of the model is trained, and judged, on the newer ones.
    """

    steps: int = 5
    rate: float = 1.0
    older: float = 0.5

    def __post_init__(self) -> None:
        """Raises `ManifestError` for a head that is made of nothing, or never."""
        bounded = 1 <= self.steps <= _MAX_EPOCHS and 0 < self.rate <= _MAX_RATE
        if not bounded or not _LEAST_OLDER <= self.older <= 1 - _LEAST_OLDER:
            raise ManifestError(
                f"`personal` needs 1 to {_MAX_EPOCHS} steps, a rate above 0 and at most "
                f"{_MAX_RATE:g}, and `older` from {_LEAST_OLDER} to {1 - _LEAST_OLDER}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """A model to be trained, as it is declared, signed and run on every device.

    `hidden`: widths of the MLP's layers, or of the GRU (one). `steps`: days that a GRU sees, the
    example's own the last. `most`: examples of one person in a round, the newest. `clip`: L2 norm
    to which a person's update is clipped; `scale`: integers per unit of it. `rounds` as announced.
    `held_out`: the share of people who are never trained on, and whom evaluation asks (`split`).
    `personal`: the last layer stays on the device, and no weights anywhere hold it.
    """

    name: str
    features: tuple[Feature, ...]
    label: Label
    kind: ModelKind = "logistic"
    hidden: tuple[int, ...] = ()
    steps: int = 1
    per: Per = "day"
    most: int = 64
    work: Work = Work()
    clip: float = 1.0
    scale: float = 4096.0
    rounds: int = 10
    held_out: float = 0.2
    personal: PersonalHead | None = None

    def __post_init__(self) -> None:
        """Raises `ManifestError` for a declaration that cannot be trained."""
        if not 1 <= len(self.features) <= MAX_FEATURES:
            raise ManifestError(f"{self.name}: a model has 1 to {MAX_FEATURES} features.")
        if not 1 <= self.most <= MAX_EXAMPLES or not 1 <= self.rounds <= MAX_ROUNDS:
            raise ManifestError(
                f"{self.name}: `most` is 1 to {MAX_EXAMPLES}, `rounds` 1 to {MAX_ROUNDS}."
            )
        if not (0 < self.clip < math.inf and 1 <= self.scale * self.clip < 2.0**40):
            raise ManifestError(f"{self.name}: `clip` and `scale` must leave room for integers.")
        if not 0 <= self.held_out <= _MOST_HELD_OUT:
            raise ManifestError(f"{self.name}: `held_out` is 0 to {_MOST_HELD_OUT:g}.")
        self._check_shape()

    def _check_shape(self) -> None:
        widths = {"logistic": 0, "linear": 0, "gru": 1}.get(self.kind, len(self.hidden))
        if len(self.hidden) != widths or (self.kind == "mlp" and not 1 <= widths <= _MAX_LAYERS):
            raise ManifestError(f"{self.name}: `hidden` does not fit a model of kind {self.kind}.")
        if not all(1 <= width <= _MAX_WIDTH for width in self.hidden):
            raise ManifestError(f"{self.name}: a layer has 1 to {_MAX_WIDTH} units.")
        if not 1 <= self.steps <= _MAX_STEPS or (self.steps > 1) != (self.kind == "gru"):
            raise ManifestError(
                f"{self.name}: a GRU has 2 to {_MAX_STEPS} `steps`, every other model one."
            )
        if self.kind == "logistic" and not self.label.is_class:
            raise ManifestError(f"{self.name}: a logistic model predicts a class.")
        if self.kind == "linear" and self.label.is_class:
            raise ManifestError(f"{self.name}: a linear model predicts a number.")
        if self.kind == "gru" and self.per == "person":
            raise ManifestError(f"{self.name}: a sequence needs an example for each day.")
        lags = (*(one.lag for one in self.features), self.label.ahead)
        if self.per == "person" and any(lags):
            raise ManifestError(f"{self.name}: who is one example has no `lag` and no `ahead`.")
        if self.per == "person" and self.personal is not None:
            raise ManifestError(f"{self.name}: who is one example has no older ones for a head.")

    @property
    def columns(self) -> frozenset[str]:
        """All that is read: what consent must cover."""
        return frozenset({one.column for one in self.features} | {self.label.column})

    @property
    def inputs(self) -> int:
        """Width of an example: features and their indicators."""
        return sum(1 + one.indicator for one in self.features)


def _check_bounds(column: str, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ManifestError(f"{column}: `low` must be below `high`, both finite.")
