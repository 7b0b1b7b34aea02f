"""How often something happens on days below a person's own average of something, and above it.

The split is within each person, so that people who always sleep badly do not pass for bad nights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.analytics.base import Asked, BaseQuery, too_few
from federated.analytics.bernstein import Moments, basis
from federated.analytics.intervals import Spread, difference, estimate, wald
from federated.analytics.layout import FINE, Block, Layout
from federated.analytics.quantity import known_together
from federated.errors import ManifestError
from federated.model import Estimate, PersonRows

#: Part of the vector that holds squares of days, for the interval.
_SQUARES: Final = 154
#: How far the variance may be off, relatively, if days are taken as unrelated to shares.
_UNRELATED: Final = 0.15
#: Part that measures how both shares go together within people, for the difference's interval.
_CROSSED: Final = 102
_LARGEST: Final = 1e12
_MOST_DAYS: Final = 3660
_SIDES: Final = ("below", "above")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """One side's days, and how far its share may be off. `length`: a person's days, of the most."""

    moments: Moments
    length: float
    spread: Spread


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
        """Three places for each side, the same for squared days, and four for both together."""
        blocks = (Block(size=6, limit=FINE), Block(size=6, limit=_SQUARES))
        return Layout(blocks=(*blocks, Block(size=4, limit=_CROSSED)), unit=FINE)

    def masses(self, rows: PersonRows) -> NDArray[np.float64]:
        """Days and shares of both sides."""
        _, (outcome, by) = known_together(rows, self.outcome, self.by)
        if not by.size:
            return np.zeros(16)
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
        """The share of days on either side, and the difference."""
        below, above = (self._side(place, name, asked) for place, name in enumerate(_SIDES))
        event = f"P({self.outcome} < {self.less_than:g})"
        where = f"days with {self.by}"
        found = []
        for name, side in (("below", below), ("above", above)):
            ends = wald(side.moments.mean, side.spread, asked.level)
            low, share, high = (
                min(max(e, 0.0), 1.0) for e in (ends[0], side.moments.mean, ends[1])
            )
            title = f"{event} on {where} {name} own average"
            ends = (low, high)
            found.append(estimate(title, share, ends, level=asked.level, unit="of days"))
        value = below.moments.mean - above.moments.mean
        low, high = wald(value, _difference(below, above, asked), asked.level)
        low, value, high = (min(max(end, -1.0), 1.0) for end in (low, value, high))
        title = f"difference, {where} below minus above own average"
        return [*found, estimate(title, value, (low, high), level=asked.level, unit="of days")]

    def _side(self, place: int, name: str, asked: Asked) -> _Side:
        moments = Moments(sums=asked.masses[3 * place : 3 * place + 3])
        if not moments.usable(asked.noise):
            raise too_few(self.name, f"days {name} their own average")
        days = moments.people
        each = FINE / _SQUARES / 2
        squared = asked.masses[6 + 3 * place : 9 + 3 * place] * each
        # The mean number of days, weighted by days: at least the plain one, at most all.
        length = min(max(float(squared.sum()) / days, days / asked.people), 1.0)
        coefficients = moments.central_coefficients(2)
        between = max(float(coefficients @ moments.sums), 0.0)
        noise = asked.noise.variance
        norm = float(coefficients @ coefficients)
        # Measured without assumptions but blurred; or sharp, if days are unrelated to shares.
        direct, direct_noise = float(coefficients @ squared), noise * norm * each**2
        believed = (_UNRELATED * between * length) ** 2
        weight = believed / (believed + direct_noise) if believed > 0 else 0.0
        summed = max(between * length + weight * (direct - between * length), 0.0)
        blur = noise * (norm * length**2 + 3 * (between * each / days) ** 2) * (1 - weight) ** 2
        blur += direct_noise * weight**2
        people = days / length
        spread = Spread(
            noise=asked.noise.through(moments.mean_gradient()),
            sampling=summed / days**2 * people / max(people - 1, 1.0),
            sampling_noise=blur / days**4,
            people=people,
        )
        return _Side(moments=moments, length=length, spread=spread)

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
    """Masses, shape (…, 16), from days (in units of the most that count) and shares per side."""
    total = days.sum(axis=-1, keepdims=True)
    kept = days / np.maximum(total, 1.0)
    fractions = basis(shares, 2)
    main = kept[..., None] * fractions
    # At most 1 together where both sides have as many days; clipped jointly where they have not.
    doubled = 2 * kept**2
    doubled = doubled / np.maximum(doubled.sum(axis=-1, keepdims=True), 1.0)
    squares = doubled[..., None] * fractions * (_SQUARES / FINE)
    both = np.stack([shares, 1 - shares], axis=-1)
    pairs = both[..., 0, :, None] * both[..., 1, None, :]
    shared = 2 * kept.min(axis=-1)[..., None, None]
    crossed = pairs * shared * (_CROSSED / FINE)
    flat = [part.reshape(*days.shape[:-1], -1) for part in (main, squares, crossed)]
    return np.concatenate(flat, axis=-1)


def _difference(below: _Side, above: _Side, asked: Asked) -> Spread:
    """How far the difference may be off: both sides' variances less twice their covariance.

    The covariance is that of both shares within people, weighted by the smaller of their days (this
    is measured), times the mean product of days over the mean of that weight. This follows from the
    mean numbers of days where both sides have equally many, and from the plain means where they are
    unrelated; the larger of the two is right at both ends.
    """
    apart = difference(below.spread, above.spread)
    sides = [np.array([1 - side.moments.mean, -side.moments.mean]) for side in (below, above)]
    coefficients = np.outer(*sides).reshape(-1)
    days = below.moments.people * above.moments.people
    shared = float(asked.masses[12:].sum()) * FINE / _CROSSED
    equal = (below.length + above.length) / 4
    unrelated = min(days / max(shared * asked.people, 1e-9), 0.5)
    factor = FINE / _CROSSED * max(equal, unrelated) / days
    covariance = float(coefficients @ asked.masses[12:]) * factor
    most = math.sqrt(max(below.spread.sampling, 0.0) * max(above.spread.sampling, 0.0))
    covariance = min(max(covariance, -most), most)
    blur = 4 * asked.noise.variance * float(coefficients @ coefficients) * factor**2
    return Spread(
        noise=apart.noise,
        sampling=apart.sampling - 2 * covariance,
        sampling_noise=apart.sampling_noise + blur,
        people=min(below.spread.people, above.spread.people),
    )
