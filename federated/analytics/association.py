"""Within-person association of two daily quantities: slope and correlation.

Each person's days are compared with that person's own mean, so what differs between people cannot
pass for an association. Products and squares are clipped jointly: a person whose days vary more
than declared counts with less weight in all three sums, which leaves their own slope as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.analytics.base import Asked, BaseQuery, too_few
from federated.analytics.intervals import Spread, estimate, wald
from federated.analytics.layout import FINE, Block, Layout
from federated.analytics.quantity import Quantity, known_together
from federated.errors import ManifestError
from federated.model import Estimate, PersonRows

#: From squares along three directions, 60° apart, to x², y² and xy: a tight frame of the plane.
_XX: Final = np.array([1.5, 0.0, 0.0, 0.0, 0.0])
_YY: Final = np.array([-0.5, 1.0, 1.0, 0.0, 0.0])
_XY: Final = np.array([0.0, math.sqrt(3) / 2, -math.sqrt(3) / 2, 0.0, 0.0])
#: Parts of the vector that measure how much products differ between people, and how much their
#: days vary, for the interval.
_PRODUCTS: Final = 128
_TOTALS: Final = 64
_PRODUCT_SQUARES: Final = np.array([0.0, 0.0, 0.0, FINE / _PRODUCTS / 4, 0.0])
_TOTAL_SQUARES: Final = np.array([0.0, 0.0, 0.0, 0.0, FINE / _TOTALS])
_FEWEST_DAYS: Final = 2
_MOST_DAYS: Final = 3660


@dataclass(frozen=True, slots=True, kw_only=True)
class Association(BaseQuery):
    """How `y` moves with `x` from day to day within people.

    `spread_x` and `spread_y` are the within-person standard deviations, in the quantity's unit,
    that count in full; a quarter of the width if left out. A person with `days` days or more counts
    once, one with fewer in proportion.
    """

    x: Quantity
    y: Quantity
    spread_x: float | None = None
    spread_y: float | None = None
    days: int = 28

    def check(self) -> None:
        """Refuse spreads and numbers of days that cannot be."""
        for quantity, spread in ((self.x, self.spread_x), (self.y, self.spread_y)):
            if spread is not None and not 0 < spread <= quantity.width:
                raise ManifestError(
                    f"{self.name}: the spread of {quantity.column} must be above 0 and at most "
                    "the width of its bounds."
                )
            if quantity.summary != "mean":
                raise ManifestError(f"{self.name}: days are compared; leave out `summary`.")
        if not _FEWEST_DAYS <= self.days <= _MOST_DAYS:
            raise ManifestError(f"{self.name}: `days` must be {_FEWEST_DAYS} to {_MOST_DAYS}.")

    @property
    def columns(self) -> frozenset[str]:
        """Both columns."""
        return frozenset({self.x.column, self.y.column})

    @property
    def units(self) -> tuple[float, float]:
        """The spreads, in the quantities' units."""
        return (
            self.x.width / 4 if self.spread_x is None else self.spread_x,
            self.y.width / 4 if self.spread_y is None else self.spread_y,
        )

    @property
    def layout(self) -> Layout:
        """Three directions, and the squares of product and total."""
        blocks = (Block(size=3, limit=FINE), Block(size=1, limit=_PRODUCTS))
        return Layout(blocks=(*blocks, Block(size=1, limit=_TOTALS)), unit=FINE)

    def masses(self, rows: PersonRows) -> NDArray[np.float64]:
        """Mean squares along three directions; squares of the mean product and of the total."""
        _, (x, y) = known_together(rows, self.x.column, self.y.column)
        if x.size < _FEWEST_DAYS:
            return np.zeros(5)
        x, y = np.clip(x, self.x.low, self.x.high), np.clip(y, self.y.low, self.y.high)
        unit_x, unit_y = self.units
        dx, dy = (x - x.mean()) / unit_x, (y - y.mean()) / unit_y
        weight = np.array(min(1.0, x.size / self.days))
        # Halved, so that both at their full spread make 1.
        factor = weight / (2 * x.size)
        return masses_of(factor * (dx @ dx), factor * (dy @ dy), factor * (dx @ dy), weight=weight)

    def estimates(self, asked: Asked) -> list[Estimate]:
        """Slope and correlation."""
        xx, yy, xy = (float(row @ asked.masses) for row in (_XX, _YY, _XY))
        if min(xx, yy) < 6 * asked.noise.deviation:
            raise too_few(self.name, "two days or more of both quantities that vary")
        slope, correlation = xy / xx, xy / math.sqrt(xx * yy)
        # Days alone make people's products differ at least so much.
        least = xx * yy * max(1 - correlation**2, 0.0) / (asked.people * self.days)
        spread = _spread(asked, (_XY - slope * _XX) / xx, slope, xx * xx, (least, 0.5))
        scale = self.units[1] / self.units[0]
        low, value, high = (
            end * scale for end in _around(slope, wald(slope, spread, asked.level), math.inf)
        )
        unit = f"{self.y.unit or 1} per {self.x.unit or 1}" if self.x.unit or self.y.unit else ""
        slopes = estimate("slope", value, (low, high), level=asked.level, unit=unit)
        gradient = _XY / math.sqrt(xx * yy) - correlation / 2 * (_XX / xx + _YY / yy)
        spread = _spread(asked, gradient, correlation, xx * yy, (least, 1.0))
        low, value, high = _around(correlation, wald(correlation, spread, asked.level), 1.0)
        return [slopes, estimate("correlation", value, (low, high), level=asked.level, unit="")]

    def cautions(self) -> tuple[str, ...]:
        """What the answer cannot say."""
        unit_x, unit_y = self.units
        return (
            (
                f"People whose days vary by more than about {unit_x:g} in {self.x.column} or "
                f"{unit_y:g} in {self.y.column} count with less weight."
            ),
            "An association from day to day is not an effect: a third thing may move both.",
            "The interval takes people's slopes to be unrelated to how much their days vary.",
        )

    def typical(self, people: int) -> NDArray[np.float64]:
        """Days that vary by half of the spread, correlated by a quarter, more in some people."""
        half = np.full(2, 0.125)
        found = masses_of(half, half, np.array([-0.03, 0.0925]), weight=np.ones(2))
        return np.asarray(people * found.mean(axis=0))


def masses_of(
    xx: NDArray[np.float64],
    yy: NDArray[np.float64],
    xy: NDArray[np.float64],
    *,
    weight: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Masses, shape (…, 5), from half the weighted mean squares and product in units of the spread.

    Scaled down jointly where the squares add up to more than `weight`. Then |xy| ≤ weight/2, so
    that four times its square is at most 1.
    """
    total = xx + yy
    kept = np.minimum(1.0, weight / np.maximum(total, 1e-300))
    xx, yy, xy = xx * kept, yy * kept, xy * kept
    slanted = math.sqrt(3) / 2 * xy
    along = [xx, xx / 4 + yy * 3 / 4 + slanted, xx / 4 + yy * 3 / 4 - slanted]
    products = np.minimum(4 * xy**2, 1.0) * (_PRODUCTS / FINE)
    totals = np.minimum((xx + yy) ** 2, 1.0) * (_TOTALS / FINE)
    frame = [np.maximum(part, 0.0) * 2 / 3 for part in along]
    return np.stack([*frame, products, totals], axis=-1)


def _spread(
    asked: Asked,
    gradient: NDArray[np.float64],
    value: float,
    scale: float,
    limits: tuple[float, float],
) -> Spread:
    """How far a ratio of sums may be off: people's squared products beyond what it explains.

    If products follow the ratio on average, the mean squared residual is the mean square less the
    ratio's square times the mean square of a person's total, relative to the squared mean total.
    That is never below the squared mean; `limits` are the least sum of squared products, and how
    much of what is above the squared mean is believed. For a slope it is half: clipping makes
    products fall short of it where totals are large.
    """
    least, believed = limits
    squared = float(_PRODUCT_SQUARES @ asked.masses)
    total = float((_XX + _YY) @ asked.masses)
    uneven = float(_TOTAL_SQUARES @ asked.masses) / total**2
    least_uneven = 1 / asked.people
    uneven = min(max(uneven, least_uneven), 3 * least_uneven)
    explained = value**2 * (believed * uneven + (1 - believed) * least_uneven)
    blur = float(_PRODUCT_SQUARES @ _PRODUCT_SQUARES) / scale**2
    blur += value**4 * float(_TOTAL_SQUARES @ _TOTAL_SQUARES) * believed**2 / total**4
    return Spread(
        noise=asked.noise.through(gradient),
        sampling=max(squared / scale - explained, least / scale),
        sampling_noise=asked.noise.variance * blur,
        people=float(asked.people),
    )


def _around(value: float, ends: tuple[float, float], limit: float) -> tuple[float, float, float]:
    low, middle, high = (min(max(end, -limit), limit) for end in (ends[0], value, ends[1]))
    return low, middle, high
