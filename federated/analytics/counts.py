"""How many, and how they are spread: count and histogram, one place per person."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.analytics.base import Asked, BaseQuery, too_few
from federated.analytics.intervals import NoiseMoments, estimate, score
from federated.analytics.layout import Block, Layout, one_hot
from federated.analytics.quantity import Quantity, is_bin_edges
from federated.errors import ManifestError
from federated.model import Estimate, PersonRows

_MOST_BINS: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Count(BaseQuery):
    """How many people's quantity lies from `at_least` to `at_most`, both included."""

    of: Quantity
    at_least: float = -math.inf
    at_most: float = math.inf

    def check(self) -> None:
        """Refuse a range that holds nothing."""
        if not self.at_least <= self.at_most:
            raise ManifestError(f"{self.name}: `at_least` must not be above `at_most`.")

    @property
    def columns(self) -> frozenset[str]:
        """The quantity's column."""
        return frozenset({self.of.column})

    @property
    def layout(self) -> Layout:
        """Yes or no: one place of two."""
        return Layout(blocks=(Block(size=2, limit=1),), unit=1)

    def masses(self, rows: PersonRows) -> NDArray[np.float64]:
        """One for yes or for no."""
        scaled = self.of.of(rows)
        if scaled is None:
            return one_hot(2, None)
        value = self.of.in_units(scaled)
        # A mean of equal days must not miss a limit by what floats lose.
        slack = 1e-9 * self.of.width
        return one_hot(2, 0 if self.at_least - slack <= value <= self.at_most + slack else 1)

    def estimates(self, asked: Asked) -> list[Estimate]:
        """The number among all who took part, and the share among those with data."""
        yes, known = float(asked.masses[0]), float(asked.masses.sum())
        if known <= 4 * asked.noise.deviation:
            raise too_few(self.name, "data")
        whole = float(asked.people)
        ends = score(yes / whole, whole, asked.noise.through(np.array([1 / whole])), asked.level)
        share = yes / known
        blur = asked.noise.through(np.array([1 - share, -share]) / known)
        return [
            estimate(
                "count",
                max(yes, 0.0),
                (ends[0] * whole, ends[1] * whole),
                level=asked.level,
                unit="people",
            ),
            estimate(
                "share",
                min(max(share, 0.0), 1.0),
                score(share, known, blur, asked.level),
                level=asked.level,
                unit="of people with data",
            ),
        ]

    def cautions(self) -> tuple[str, ...]:
        """What the answer cannot say."""
        return (
            "People without data on the question are in neither number.",
            "The count's interval is for people like these, not for exactly these.",
        )

    def typical(self, people: int) -> NDArray[np.float64]:
        """Three in ten say yes."""
        return np.array([0.3, 0.7]) * people


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram(BaseQuery):
    """Shares of people by fixed bins, each from its edge up to below the next; the last closes."""

    of: Quantity
    edges: tuple[float, ...]

    def check(self) -> None:
        """Refuse edges that are not ascending, or too many."""
        if not is_bin_edges(self.edges) or len(self.edges) > _MOST_BINS + 1:
            raise ManifestError(
                f"{self.name}: `edges` must be 2 to {_MOST_BINS + 1} finite ascending numbers."
            )

    @property
    def columns(self) -> frozenset[str]:
        """The quantity's column."""
        return frozenset({self.of.column})

    @property
    def layout(self) -> Layout:
        """One place of as many as there are bins."""
        return Layout(blocks=(Block(size=len(self.edges) - 1, limit=1),), unit=1)

    def masses(self, rows: PersonRows) -> NDArray[np.float64]:
        """One in the person's bin."""
        scaled = self.of.of(rows)
        size = len(self.edges) - 1
        return one_hot(size, None if scaled is None else bin_of(self.of, scaled, self.edges))

    def estimates(self, asked: Asked) -> list[Estimate]:
        """One share per bin."""
        known = float(asked.masses.sum())
        bins = len(asked.masses)
        if known <= 4 * asked.noise.deviation * math.sqrt(bins):
            raise too_few(self.name, "data")
        return [
            self._share(place, float(mass), known, asked) for place, mass in enumerate(asked.masses)
        ]

    def _share(self, place: int, mass: float, known: float, asked: Asked) -> Estimate:
        share = mass / known
        gradient = np.full(len(asked.masses), -share)
        gradient[place] += 1
        blur: NoiseMoments = asked.noise.through(gradient / known)
        low, high = self.edges[place : place + 2]
        unit = f" {self.of.unit}" if self.of.unit else ""
        return estimate(
            f"{low:g} to {high:g}{unit}",
            min(max(share, 0.0), 1.0),
            score(share, known, blur, asked.level),
            level=asked.level,
            unit="of people with data",
        )

    def cautions(self) -> tuple[str, ...]:
        """What the answer cannot say."""
        return (
            "People without data are in no bin; what is beyond an outer edge is in the outer bin.",
            "Each bin's interval holds by itself; all of them together hold less often.",
        )

    def typical(self, people: int) -> NDArray[np.float64]:
        """The same share in every bin."""
        bins = len(self.edges) - 1
        return np.full(bins, people / bins)


def bin_of(quantity: Quantity, scaled: float, edges: tuple[float, ...]) -> int:
    """Which bin a scaled value falls into; what is beyond the outer edges goes to the outer bins.

    A value counts as on an edge within a billionth of the quantity's width.
    """
    value = quantity.in_units(scaled) + 1e-9 * quantity.width
    place = int(np.searchsorted(np.asarray(edges), value, side="right")) - 1
    return min(max(place, 0), len(edges) - 2)
