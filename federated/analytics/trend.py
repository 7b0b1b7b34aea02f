"""How a quantity moves from week to week: a mean per week, and the mean of people's own slopes."""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.analytics.base import Asked, BaseQuery, too_few
from federated.analytics.bernstein import Moments, basis
from federated.analytics.intervals import estimate, wald
from federated.analytics.layout import FINE, Block, Layout
from federated.analytics.means import clipping_cautions, in_bounds, typical_sums
from federated.analytics.quantity import Quantity, known_together
from federated.errors import ManifestError
from federated.model import Estimate, PersonRows

_DAYS: Final = 7
_MOST_WEEKS: Final = 52
_FEWEST_WEEKS: Final = 2
_EPOCH: Final = dt.date(1970, 1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeeklyTrend(BaseQuery):
    """Mean of a column in each of `weeks` weeks, and how it changes per week within people.

    Weeks count from `start` (YYYY-MM-DD), or from each person's first day with data. `steepest`
    bounds a person's own slope, in the column's unit per week; a quarter of the width if left out.
    """

    of: Quantity
    weeks: int
    steepest: float | None = None
    start: str | None = None

    def check(self) -> None:
        """Refuse a number of weeks, a slope or a date that cannot be."""
        if not _FEWEST_WEEKS <= self.weeks <= _MOST_WEEKS:
            raise ManifestError(f"{self.name}: `weeks` must be {_FEWEST_WEEKS} to {_MOST_WEEKS}.")
        if self.steepest is not None and not 0 < self.steepest <= self.of.width:
            raise ManifestError(f"{self.name}: `steepest` must be above 0 and at most the width.")
        if self.of.summary != "mean":
            raise ManifestError(f"{self.name}: a trend is of weekly means; leave out `summary`.")
        if self.start is not None:
            try:
                dt.date.fromisoformat(self.start)
            except ValueError as error:
                raise ManifestError(f"{self.name}: `start` must be YYYY-MM-DD.") from error

    @property
    def columns(self) -> frozenset[str]:
        """The quantity's column."""
        return frozenset({self.of.column})

    @property
    def limit(self) -> float:
        """The steepest slope that counts, in widths per week."""
        return 0.25 if self.steepest is None else self.steepest / self.of.width

    @property
    def _slope_mass(self) -> float:
        """As much as balances one slope against all weeks."""
        return round(math.sqrt(self.weeks) * FINE) / FINE

    @property
    def layout(self) -> Layout:
        """Degree 2 for each week and for the slope."""
        weekly = tuple(Block(size=3, limit=FINE) for _ in range(self.weeks))
        slope = Block(size=3, limit=round(self._slope_mass * FINE))
        return Layout(blocks=(*weekly, slope), unit=FINE)

    def masses(self, rows: PersonRows) -> NDArray[np.float64]:
        """The basis at each week's mean and at the person's own slope."""
        masses = np.zeros((self.weeks + 1, 3))
        days, (values,) = known_together(rows, self.of.column)
        if not days.size:
            return masses.reshape(-1)
        start = days[0] if self.start is None else _day(self.start)
        week = (days - start) // _DAYS
        inside = (week >= 0) & (week < self.weeks)
        week, scaled = week[inside], self.of.scaled_all(values[inside])
        found = np.unique(week)
        means = np.array([scaled[week == one].mean() for one in found])
        if found.size:
            masses[found] = basis(means, 2)
        if found.size >= _FEWEST_WEEKS:
            centred = found - found.mean()
            slope = float(centred @ means / (centred @ centred))
            shifted = (min(max(slope / self.limit, -1.0), 1.0) + 1) / 2
            masses[-1] = self._slope_mass * basis(shifted, 2)
        return masses.reshape(-1)

    def estimates(self, asked: Asked) -> list[Estimate]:
        """Change per week, then the mean of each week."""
        *weekly, last = asked.masses.reshape(-1, 3)
        slopes = Moments(sums=last / self._slope_mass)
        noise = asked.noise.per(self._slope_mass)
        if not slopes.usable(noise):
            raise too_few(self.name, "data in two weeks or more")
        ends = wald(slopes.mean, slopes.mean_spread(noise), asked.level)
        reach = self.limit * self.of.width
        low, value, high = (
            (2 * min(max(end, 0.0), 1.0) - 1) * reach for end in (ends[0], slopes.mean, ends[1])
        )
        unit = f"{self.of.unit} per week".strip()
        change = estimate("change per week", value, (low, high), level=asked.level, unit=unit)
        return [change, *(self._week(k, sums, asked) for k, sums in enumerate(weekly, start=1))]

    def _week(self, number: int, sums: NDArray[np.float64], asked: Asked) -> Estimate:
        moments, value, ends = Moments(sums=sums), 0.5, (0.0, 1.0)
        if moments.usable(asked.noise):
            value = moments.mean
            ends = wald(value, moments.mean_spread(asked.noise), asked.level)
        return in_bounds(f"mean in week {number}", value, ends, self.of, asked.level)

    def cautions(self) -> tuple[str, ...]:
        """What the answer cannot say."""
        return (
            *clipping_cautions(self.of),
            f"A person's own slope beyond {self.limit * self.of.width:g} per week counts as that.",
            (
                "Who answers in later weeks may differ from who answers in the first: compare "
                "weeks by the change per week, which is within people."
            ),
            "A week with too few people for the noise gets an interval of the whole range.",
        )

    def typical(self, people: int) -> NDArray[np.float64]:
        """Everybody in every week, no trend on average."""
        weekly = np.tile(typical_sums(people, 2), self.weeks)
        return np.concatenate([weekly, self._slope_mass * typical_sums(people, 2)])


def _day(date: str) -> int:
    return (dt.date.fromisoformat(date) - _EPOCH).days
