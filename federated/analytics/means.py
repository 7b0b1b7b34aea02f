"""Mean and variance over people of a bounded quantity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from federated.analytics.base import Asked, BaseQuery, too_few
from federated.analytics.bernstein import Moments, basis
from federated.analytics.intervals import estimate, wald
from federated.analytics.layout import FINE, Block, Layout
from federated.analytics.quantity import Quantity
from federated.model import Estimate, PersonRows

_TYPICAL_SHAPE = (3.0, 4.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean(BaseQuery):
    """Mean over people of each one's number."""

    of: Quantity

    def check(self) -> None:
        """Nothing beyond the quantity itself."""

    @property
    def columns(self) -> frozenset[str]:
        """The quantity's column."""
        return frozenset({self.of.column})

    @property
    def layout(self) -> Layout:
        """Bernstein basis of degree 2: count, mean and second moment."""
        return Layout(blocks=(Block(size=3, limit=FINE),), unit=FINE)

    def masses(self, rows: PersonRows) -> NDArray[np.float64]:
        """The basis at the person's number."""
        return basis_or_none(self.of.of(rows), 2)

    def estimates(self, asked: Asked) -> list[Estimate]:
        """The mean."""
        moments = Moments(sums=asked.masses)
        if not moments.usable(asked.noise):
            raise too_few(self.name, f"{self.of.column}")
        low, high = wald(moments.mean, moments.mean_spread(asked.noise), asked.level)
        return [in_bounds("mean", moments.mean, (low, high), self.of, asked.level)]

    def cautions(self) -> tuple[str, ...]:
        """What clipping can bias."""
        return clipping_cautions(self.of)

    def typical(self, people: int) -> NDArray[np.float64]:
        """A cohort spread over the middle of the bounds."""
        return typical_sums(people, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variance(BaseQuery):
    """Variance and standard deviation over people of each one's number."""

    of: Quantity

    def check(self) -> None:
        """Nothing beyond the quantity itself."""

    @property
    def columns(self) -> frozenset[str]:
        """The quantity's column."""
        return frozenset({self.of.column})

    @property
    def layout(self) -> Layout:
        """Bernstein basis of degree 4: up to the fourth moment, which the interval needs."""
        return Layout(blocks=(Block(size=5, limit=FINE),), unit=FINE)

    def masses(self, rows: PersonRows) -> NDArray[np.float64]:
        """The basis at the person's number."""
        return basis_or_none(self.of.of(rows), 4)

    def estimates(self, asked: Asked) -> list[Estimate]:
        """Variance and its root, with an interval that cannot be negative."""
        moments = Moments(sums=asked.masses)
        if not moments.usable(asked.noise):
            raise too_few(self.name, f"{self.of.column}")
        corrected = moments.people / max(moments.people - 1, 1.0)
        value = moments.central(2) * corrected
        low, high = wald(value, moments.variance_spread(asked.noise), asked.level)
        # No variance of a number from 0 to 1 is above 1/4 (Popoviciu).
        cut = [min(max(end, 0.0), 0.25 * corrected) for end in (low, value, high)]
        width = self.of.width
        unit = self.of.unit
        squared = f"({unit})²" if unit else ""
        low, value, high = (end * width**2 for end in cut)
        return [
            estimate("variance", value, (low, high), level=asked.level, unit=squared),
            estimate(
                "standard deviation",
                math.sqrt(value),
                (math.sqrt(low), math.sqrt(high)),
                level=asked.level,
                unit=unit,
            ),
        ]

    def cautions(self) -> tuple[str, ...]:
        """What clipping can bias."""
        return (
            *clipping_cautions(self.of),
            "It is the variance between people; days within a person are averaged first.",
        )

    def typical(self, people: int) -> NDArray[np.float64]:
        """A cohort spread over the middle of the bounds."""
        return typical_sums(people, 4)


def basis_or_none(scaled: float | None, degree: int) -> NDArray[np.float64]:
    """The basis at a scaled number, or zeros where there is none."""
    return np.zeros(degree + 1) if scaled is None else basis(scaled, degree)


def in_bounds(
    name: str, scaled: float, ends: tuple[float, float], of: Quantity, level: float
) -> Estimate:
    """An estimate on the scale 0 … 1 in the quantity's own unit, no further than its bounds."""
    low, value, high = (of.in_units(min(max(end, 0.0), 1.0)) for end in (ends[0], scaled, ends[1]))
    return estimate(name, value, (low, high), level=level, unit=of.unit)


def clipping_cautions(of: Quantity) -> tuple[str, ...]:
    """What bounds do to an answer."""
    unit = f" {of.unit}" if of.unit else ""
    return (
        (
            f"Values of {of.column} beyond {of.low:g} and {of.high:g}{unit} count as these bounds: "
            "if many are, the answer is drawn towards the middle."
        ),
        "People without data on the question are not in the answer.",
    )


def typical_sums(people: float, degree: int) -> NDArray[np.float64]:
    """Sums of the basis over people whose numbers follow Beta(3, 4)."""
    a, b = _TYPICAL_SHAPE
    grid = (np.arange(200) + 0.5) / 200
    weights = grid ** (a - 1) * (1 - grid) ** (b - 1)
    return np.asarray(people * (weights / weights.sum()) @ basis(grid, degree))
