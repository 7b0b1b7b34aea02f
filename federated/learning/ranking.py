"""AUC, calibration and Brier score from noisy sums of masses by class and score.

Masses lie on *knots*: an example between two of them is shared out linearly, so that mean scores
are exact whatever the knots. Each figure is a function of the sums; its gradient gives the variance
that the noise adds, and the same gradient, at each knot, is what one example moves it by. A person
shares out at most one unit of mass m over knots of influence ψ, so their squared influence
(Σ m·ψ)² is at most Σ m·ψ² (Cauchy-Schwarz), and the sum of that over people is read off the same
sums. It is exact where a person has one example and their score lies on a knot, else too large,
never too small: days of one person are not taken for independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.analytics.intervals import NoiseMoments, Spread, estimate, score, wald
from federated.model import Estimate

#: In how many groups of neighbouring knots observed rates are given.
_RELIABILITY_GROUPS: Final = 6
_DEVIATIONS: Final = 4

type _Floats = NDArray[np.float64]


def knots(bins: int) -> _Floats:
    """`bins` + 1 scores from 0 to 1, denser at both ends, where rare classes have theirs."""
    return np.sin(np.pi / 2 * np.arange(bins + 1) / bins) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Noisy sums of one block: class 0 by knot, then class 1 by knot."""

    sums: NDArray[np.float64] = field(repr=False)
    noise: NoiseMoments

    @property
    def zeros(self) -> _Floats:
        """Masses of class 0."""
        return self.sums[: len(self.sums) // 2]

    @property
    def ones(self) -> _Floats:
        """Masses of class 1."""
        return self.sums[len(self.sums) // 2 :]

    @property
    def at(self) -> _Floats:
        """The knots."""
        return knots(len(self.sums) // 2 - 1)

    @property
    def mass(self) -> float:
        """How many people's worth of examples, noise included."""
        return float(self.sums.sum())

    @property
    def usable(self) -> bool:
        """Whether both classes stand out of their noise, so that ratios mean something."""
        least = _DEVIATIONS * self.noise.deviation * math.sqrt(len(self.zeros)) + 2
        return bool(self.zeros.sum() > least and self.ones.sum() > least)

    def auc(self, name: str, level: float) -> Estimate:
        """P(score of a 1 > score of a 0), ties counted half; 0 to 1 where a class is lost."""
        if not self.usable:
            return estimate(name, 0.5, (0.0, 1.0), level=level, unit="")
        zeros, ones = self.zeros, self.ones
        lost, found = float(zeros.sum()), float(ones.sum())
        order = _order(len(ones))
        ahead, behind = ones @ order, order @ zeros
        value = float(zeros @ ahead) / (lost * found)
        influence = np.concatenate(
            [(ahead / found - value) / lost, (behind / lost - value) / found]
        )
        # Noise of one class meets noise of the other: the term that the gradient leaves out.
        meeting = float(np.sum((order - value) ** 2)) / (lost * found) ** 2
        spread = self._spread(influence, more=self.noise.variance**2 * meeting)
        return _within(name, value, spread, level, (0.0, 1.0))

    def calibration(self, name: str, level: float) -> Estimate:
        """Mean score minus the share of ones: 0 for a model that is right on average."""
        if not self._counted:
            return estimate(name, 0.0, (-1.0, 1.0), level=level, unit="")
        each = np.concatenate([self.at, self.at - 1])
        return self._mean(name, each, level, (-1.0, 1.0))

    def brier(self, name: str, level: float) -> Estimate:
        """Mean squared distance of scores from classes; the lower end allows for the knots."""
        if not self._counted:
            return estimate(name, 0.5, (0.0, 1.0), level=level, unit="")
        each = np.concatenate([self.at**2, (1 - self.at) ** 2])
        found = self._mean(name, each, level, (0.0, 1.0))
        # Sharing out between knots h apart adds at most (h/2)² to a square.
        added = float(np.max(np.diff(self.at))) ** 2 / 4
        low = max(found.interval.low - added, 0.0)
        return estimate(name, found.value, (low, found.interval.high), level=level, unit="")

    def rate(self, name: str, level: float) -> Estimate:
        """The share of ones."""
        each = np.concatenate([np.zeros(len(self.zeros)), np.ones(len(self.ones))])
        return self._mean(name, each, level, (0.0, 1.0))

    def reliability(self, level: float) -> list[Estimate]:
        """The share of ones among examples with scores around each of some values."""
        found = []
        groups = min(_RELIABILITY_GROUPS, len(self.at))
        for places in np.array_split(np.arange(len(self.at)), groups):
            name = f"observed rate at scores {self.at[places[0]]:.2f} to {self.at[places[-1]]:.2f}"
            ones, both = (
                float(self.ones[places].sum()),
                float(self.ones[places].sum() + self.zeros[places].sum()),
            )
            least = _DEVIATIONS * self.noise.deviation * math.sqrt(2 * len(places)) + 2
            if both <= least:
                found.append(estimate(name, 0.5, (0.0, 1.0), level=level, unit=""))
                continue
            share = min(max(ones / both, 0.0), 1.0)
            gradient = np.concatenate(
                [np.full(len(places), -share), np.full(len(places), 1 - share)]
            )
            ends = score(share, both, self.noise.through(gradient / both), level)
            found.append(estimate(name, share, ends, level=level, unit=""))
        return found

    @property
    def _counted(self) -> bool:
        return self.mass > _DEVIATIONS * self.noise.deviation * math.sqrt(len(self.sums)) + 2

    def _mean(self, name: str, each: _Floats, level: float, ends: tuple[float, float]) -> Estimate:
        """The mean over mass of a number that each coordinate stands for."""
        value = float(each @ self.sums) / self.mass
        return _within(name, value, self._spread((each - value) / self.mass), level, ends)

    def _spread(self, influence: _Floats, *, more: float = 0.0) -> Spread:
        """Noise and sampling by the influence of each coordinate; `more` variance of the noise."""
        squares = influence**2
        through = self.noise.through(influence)
        return Spread(
            noise=NoiseMoments(variance=through.variance + more, fourth=through.fourth),
            sampling=float(squares @ self.sums) * self.mass / max(self.mass - 1, 1.0),
            sampling_noise=self.noise.variance * float(np.sum(squares**2)),
            people=self.mass,
        )


def _order(count: int) -> _Floats:
    """How far a 1 at knot i counts as ahead of a 0 at knot j: 1, a half, or 0; and a correction.

    Sharing out between knots blurs scores, which draws the AUC towards a half. To the second order
    in their distance the blur takes as much as an eighth more for neighbours gives back: for d > 0
    between two scores, ∫ d·(1 - counted) dd is 1/8, averaged over where they lie between knots.
    """
    ahead = np.arange(count)[:, None] - np.arange(count)
    return np.asarray(np.sign(ahead) / 2 + 0.5 + np.where(np.abs(ahead) == 1, ahead / 8, 0.0))


def _within(
    name: str, value: float, spread: Spread, level: float, bounds: tuple[float, float]
) -> Estimate:
    low, high = wald(value, spread, level)
    least, most = bounds
    return estimate(
        name,
        min(max(value, least), most),
        (max(low, least), min(high, most)),
        level=level,
        unit="",
    )
