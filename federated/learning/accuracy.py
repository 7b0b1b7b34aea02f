"""Mean absolute errors from noisy sums: a model's, and the person's own past beside it.

An error is a number from 0 to 1 (a share of the largest that counts), a comparison one from -1 to
1, moved to 0 … 1: both as sums of a Bernstein basis of degree 2, whose second moments give the
sampling variance. Who is hard to predict is so for the model and for the own past alike; hence
their difference is taken within each person, and its interval is the comparison's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from federated.analytics.bernstein import Moments
from federated.analytics.intervals import NoiseMoments, Spread, estimate, wald
from federated.model import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Reads errors off sums. `largest`: the error, in `unit`, that 1 stands for."""

    noise: NoiseMoments
    largest: float
    unit: str

    def error(self, name: str, moments: Moments, level: float) -> Estimate:
        """A mean error; the whole range where it is lost in the noise."""
        ends = (0.0, 0.5, 1.0)
        if moments.usable(self.noise):
            ends = _around(moments.mean, moments.mean_spread(self.noise), level, least=0.0)
        return self._in_units(name, ends, level)

    def past(self, name: str, own: Moments, worse: Moments, level: float) -> list[Estimate]:
        """The error of the own past, and by how much it is above the model's.

        `worse`: of (1 + past - model)/2, in people who have a past. The past's error is the model's
        plus that difference, and its interval the widest that both allow.
        """
        by, error = (-1.0, 0.0, 1.0), (0.0, 0.5, 1.0)
        if worse.usable(self.noise):
            spread = _doubled(worse.mean_spread(self.noise))
            by = _around(2 * worse.mean - 1, spread, level, least=-1.0)
            both = _together(own.mean_spread(self.noise), spread)
            error = _around(own.mean + by[1], both, level, least=0.0)
        return [
            self._in_units(f"MAE of the {name}", error, level),
            self._in_units(f"MAE of the {name} minus MAE", by, level),
        ]

    def _in_units(self, name: str, ends: tuple[float, float, float], level: float) -> Estimate:
        low, value, high = (self.largest * end for end in ends)
        return estimate(name, value, (low, high), level=level, unit=self.unit)


def _doubled(spread: Spread) -> Spread:
    """Of a number twice as large."""
    return Spread(
        noise=spread.noise.per(0.5),
        sampling=spread.sampling * 4,
        sampling_noise=spread.sampling_noise * 16,
        people=spread.people,
    )


def _together(a: Spread, b: Spread) -> Spread:
    """Of the sum of two numbers of the same people: at worst their errors go the same way."""
    return Spread(
        noise=NoiseMoments(
            variance=a.noise.variance + b.noise.variance, fourth=a.noise.fourth + b.noise.fourth
        ),
        sampling=(math.sqrt(max(a.sampling, 0.0)) + math.sqrt(max(b.sampling, 0.0))) ** 2,
        sampling_noise=2 * (a.sampling_noise + b.sampling_noise),
        people=min(a.people, b.people),
    )


def _around(
    value: float, spread: Spread, level: float, *, least: float
) -> tuple[float, float, float]:
    """Low end, value, high end, from `least` to 1."""
    low, high = wald(value, spread, level)
    return max(low, least), min(max(value, least), 1.0), min(high, 1.0)
