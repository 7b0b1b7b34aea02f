"""One number of a person, from their rows: which column, summed up how, within which bounds."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from federated.errors import ManifestError
from federated.model import PersonRows

#: `mean` of all days; `first` or `last` day; `change`: last minus first, of two days or more.
type Summary = Literal["mean", "first", "last", "change"]

#: What an infinity counts as, so that differences stay numbers. Beyond any bound.
_HUGE: Final = 1e300
_LARGEST_BOUND: Final = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A bounded number of each person. Values outside `low` … `high` count as the bound.

    For `mean` each day is clipped, then averaged; for `change` the change is clipped.
    """

    column: str
    low: float
    high: float
    summary: Summary = "mean"
    unit: str = ""

    def __post_init__(self) -> None:
        """Raises `ManifestError` unless the bounds are finite and in order."""
        if not -_LARGEST_BOUND <= self.low < self.high <= _LARGEST_BOUND:
            raise ManifestError(
                f"{self.column}: `low` must be below `high`, both finite, not {self.low:g} and "
                f"{self.high:g}."
            )

    @property
    def width(self) -> float:
        """From bound to bound, in the quantity's unit."""
        return self.high - self.low

    def of(self, rows: PersonRows) -> float | None:
        """The person's number scaled to 0 … 1, or None where nothing is known."""
        values = known(rows, self.column)
        if self.summary == "change":
            # `known` keeps infinities at a size whose differences are numbers.
            return self.scaled(values[-1] - values[0]) if values.size > 1 else None
        if not values.size:
            return None
        if self.summary == "mean":
            return float(np.mean(self.scaled_all(values)))
        return self.scaled(values[0] if self.summary == "first" else values[-1])

    def scaled(self, value: float) -> float:
        """`value` clipped to the bounds, on a scale from 0 to 1."""
        return (min(max(float(value), self.low), self.high) - self.low) / self.width

    def scaled_all(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each of `values` clipped and scaled."""
        return (np.clip(values, self.low, self.high) - self.low) / self.width

    def in_units(self, scaled: float) -> float:
        """Back from 0 … 1 to the quantity's own unit."""
        return self.low + scaled * self.width


def known(rows: PersonRows, column: str) -> NDArray[np.float64]:
    """What is known of a column, by day. Infinities are kept as huge numbers."""
    values = rows.values.get(column)
    if values is None:
        return np.empty(0)
    return np.clip(values[~np.isnan(values)], -_HUGE / 4, _HUGE / 4)


def known_together(
    rows: PersonRows, *columns: str
) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]]:
    """Days on which all of the columns are known, and the columns on those days."""
    found = [rows.values.get(column) for column in columns]
    if any(values is None for values in found):
        return np.empty(0, dtype=np.int64), [np.empty(0) for _ in columns]
    table = [values for values in found if values is not None]
    complete = ~np.any(np.isnan(np.stack(table)), axis=0)
    kept = [np.clip(values[complete], -_HUGE / 4, _HUGE / 4) for values in table]
    return rows.days[complete], kept


def is_bin_edges(edges: tuple[float, ...], *, inner_only: bool = False) -> bool:
    """Whether `edges` are finite and ascending, at least two (one where only inner ones count)."""
    least = 1 if inner_only else 2
    return (
        len(edges) >= least
        and all(math.isfinite(edge) for edge in edges)
        and all(a < b for a, b in itertools.pairwise(edges))
    )
