"""How often something happens on days below a person's own average of something, and above it.

The split is within each person, so that people who always sleep badly do not pass for bad nights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.analytics.base import Asked, BaseQuery, too_few
from federated.analytics.bernstein import Moments, basis
from federated.analytics.intervals import Spread, estimate, wald
from federated.analytics.layout import FINE, Block, Layout
from federated.analytics.quantity import known_together
from federated.errors import ManifestError
from federated.model import Estimate, PersonRows

#: Part of the vector that measures how unequally days are shared out, for the interval.
_SQUARES: Final = 154
_LARGEST: Final = 1e12
_MOST_DAYS: Final = 3660
_SIDES: Final = ("below", "above")


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnAverageSplit(BaseQuery):
    """Share of days on which `outcome` is below `less_than`, by whether `by` was below or above
    the person's own average.

    Every day counts alike, up to `days` days of a person; who has more counts as if they had that
    many. Days on which `by` equals the average are on neither side.
    """  # noqa: D205 - one sentence that says the question

    outcome: str
    less_than: float
    by: str
    days: int = 28

    def check(self) -> None:
        """Refuse limits and numbers of days that cannot be."""
        if not -_LARGEST <= self.less_than <= _LARGEST:
            raise ManifestError(f"{self.name}: `less_than` must be a finite number.")
        if not 1 < self.days <= _MOST_DAYS:
            raise ManifestError(f"{self.name}: `days` must be 2 to {_MOST_DAYS}.")
        if self.outcome == self.by:
            raise ManifestError(f"{self.name}: `outcome` and `by` must be different columns.")

    @property
    def columns(self) -> frozenset[str]:
        """Both columns."""
        return frozenset({self.outcome, self.by})

    @property
    def layout(self) -> Layout:
        """Three places for each side, and a square for each."""
        return Layout(blocks=(Block(size=6, limit=FINE), Block(size=2, limit=_SQUARES)), unit=FINE)

    def masses(self, rows: PersonRows) -> NDArray[np.float64]:
        """Days and shares of both sides."""
        _, (outcome, by) = known_together(rows, self.outcome, self.by)
        if not by.size:
            return np.zeros(8)
        by = np.clip(by, -_LARGEST, _LARGEST)
        own = by.mean()
        # An average of equal days must not miss them by what floats lose.
        slack = 1e-9 * max(1.0, float(np.abs(by).max()))
        low = outcome < self.less_than
        sides = np.stack([by < own - slack, by > own + slack])
        days = sides.sum(axis=1).astype(np.float64)
        hits = (sides & low).sum(axis=1) / np.maximum(days, 1.0)
        return masses_of(days / self.days, hits)

    def estimates(self, asked: Asked) -> list[Estimate]:
        """The share of days on either side."""
        return [self._side(place, name, asked) for place, name in enumerate(_SIDES)]

    def _side(self, place: int, name: str, asked: Asked) -> Estimate:
        moments = Moments(sums=asked.masses[3 * place : 3 * place + 3])
        if not moments.usable(asked.noise):
            raise too_few(self.name, f"days {name} their own average")
        share, days = moments.mean, moments.people
        squares = float(asked.masses[6 + place]) * FINE / _SQUARES / 2
        # The mean number of days, weighted by days: at least the plain one, at most all.
        length = min(max(squares / days, days / asked.people), 1.0)
        coefficients = moments.central_coefficients(2)
        between = max(float(coefficients @ moments.sums), 0.0)
        noise = asked.noise.variance
        blur = noise * float(coefficients @ coefficients) * length**2
        blur += noise * (between * FINE / _SQUARES / 2 / days) ** 2
        people = days / length
        spread = Spread(
            noise=asked.noise.through(moments.mean_gradient()),
            sampling=between * length / days**2 * people / max(people - 1, 1.0),
            sampling_noise=blur / days**4,
            people=people,
        )
        low, high = wald(share, spread, asked.level)
        low, share, high = (min(max(end, 0.0), 1.0) for end in (low, share, high))
        return estimate(
            f"P({self.outcome} < {self.less_than:g}) on days with {self.by} {name} own average",
            share,
            (low, high),
            level=asked.level,
            unit="of days",
        )

    def cautions(self) -> tuple[str, ...]:
        """What the answer cannot say."""
        return (
            f"Who has more than {self.days} days counts as if they had that many.",
            "People whose days are all alike are on neither side.",
            "A difference between the two is an association, not an effect.",
        )

    def typical(self, people: int) -> NDArray[np.float64]:
        """Three quarters of the days, half on either side; three in ten days low."""
        one = masses_of(np.array([0.375, 0.375]), np.array([0.0, 0.0]))
        other = masses_of(np.array([0.375, 0.375]), np.array([0.6, 0.6]))
        return people * (one + other) / 2


def masses_of(days: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Masses, shape (…, 8), from days (in units of the most that count) and shares per side."""
    total = days.sum(axis=-1, keepdims=True)
    kept = days / np.maximum(total, 1.0)
    main = kept[..., None] * basis(shares, 2)
    squares = np.minimum(4 * kept**2, 1.0) / 2 * (_SQUARES / FINE)
    return np.concatenate([main.reshape(*main.shape[:-2], 6), squares], axis=-1)
