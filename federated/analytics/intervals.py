"""How sure an estimate is: from the noise that was added and from who happened to take part.

An estimate is a smooth function of the noisy sums. Its noise variance comes from its gradient
(delta method), its sampling variance from second moments in the same sums. Two corrections keep
intervals honest in small cohorts: Student's t with Satterthwaite's degrees of freedom, since the
variance itself was estimated; and the fourth cumulant of Laplace noise (Cornish and Fisher).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from federated.model import Estimate, Interval, NoisePlan

#: An estimated variance is blurred to one side only, since the noise's own is known: fewer degrees
#: than these would make intervals hold too often (simulated: `benchmarks/bench_analytics.py`).
_FEWEST_DEGREES: Final = 24.0
#: Excess kurtosis of the Laplace distribution: no sum of such noise has more.
_LAPLACE_EXCESS: Final = 3.0
_GAUSSIAN_TERMS: Final = 12
#: Variance of what rounding to whole numbers takes away or adds.
_ROUNDING: Final = 1 / 12


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseMoments:
    """Variance and fourth cumulant of the noise in one coordinate, in units of mass."""

    variance: float
    fourth: float

    @property
    def deviation(self) -> float:
        """Standard deviation."""
        return math.sqrt(self.variance)

    def per(self, factor: float) -> NoiseMoments:
        """In units that are `factor` times as large."""
        return NoiseMoments(variance=self.variance / factor**2, fourth=self.fourth / factor**4)

    def through(self, gradient: NDArray[np.float64]) -> NoiseMoments:
        """Moments of a linear function of the coordinates."""
        return NoiseMoments(
            variance=self.variance * float(np.sum(gradient**2)),
            fourth=self.fourth * float(np.sum(gradient**4)),
        )


def noise_moments(noise: NoisePlan, unit: int) -> NoiseMoments:
    """Moments of the noise that is left in the sum, `unit` integers being one unit of mass.

    Discrete Laplace noise is drawn as it is planned, and these are exact. Gaussian noise is drawn
    by nodes on a finer lattice and rounded with the sum (`aggregation.schedule`), which adds up to
    1/12: these are of a rounded normal variable, which what is left never exceeds, nor does what a
    trusted server draws.
    """
    if noise.mechanism == "discrete_laplace":
        # The difference of two geometric variables with ratio r.
        lost = -math.expm1(-1 / noise.scale)
        r = 1 - lost
        variance = 2 * r / lost**2
        fourth = 2 * r * (1 + 4 * r + r * r) / lost**4
        return NoiseMoments(variance=variance / unit**2, fourth=fourth / unit**4)
    if noise.scale >= 2:  # noqa: PLR2004 - from here on it is the sum of both to 10^-7
        return NoiseMoments(variance=(noise.scale**2 + _ROUNDING) / unit**2, fourth=0.0)
    places = np.arange(1, 2 * _GAUSSIAN_TERMS + 1)
    tails = ndtr(-(np.append(places, places[-1] + 1) - 0.5) / noise.scale)
    weights = 2 * (tails[:-1] - tails[1:])
    second, fourth = (float(np.sum(weights * places**k)) for k in (2, 4))
    return NoiseMoments(variance=second / unit**2, fourth=(fourth - 3 * second**2) / unit**4)


def carried(noise: NoisePlan, weight: float) -> NoisePlan:
    """The noise that a sum carries at `weight` times the plan's variance.

    For error bars, never for a claim. Of Laplace noise, whose kind changes with its weight, the
    variance is told a little too large where the scale is below 2.
    """
    return replace(noise, scale=noise.scale * math.sqrt(max(1.0, weight)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """All that is known of how far an estimate may be off.

    `sampling` is the estimated variance from who took part, over `people` (noisy) contributions,
    and `sampling_noise` the variance with which the noise blurs that estimate.
    """

    noise: NoiseMoments
    sampling: float
    sampling_noise: float
    people: float

    @property
    def variance(self) -> float:
        """Of the estimate, from both sources."""
        return self.noise.variance + max(self.sampling, 0.0)

    def critical(self, level: float) -> float:
        """How many standard deviations make an interval of that level."""
        total = self.variance
        blur = self.sampling_noise + 2 * max(self.sampling, 0.0) ** 2 / max(self.people - 1, 1.0)
        degrees = math.inf if blur <= 0 else max(2 * total**2 / blur, _FEWEST_DEGREES)
        excess = self.noise.fourth / total**2 if total > 0 else 0.0
        return critical(level, degrees=degrees, excess=excess)


def difference(a: Spread, b: Spread) -> Spread:
    """How far the difference of two estimates from different people may be off.

    The degrees of freedom of the sum are Satterthwaite's of both.
    """
    sampling = max(a.sampling, 0.0) + max(b.sampling, 0.0)
    parts = sum(max(s.sampling, 0.0) ** 2 / max(s.people - 1, 1.0) for s in (a, b))
    return Spread(
        noise=NoiseMoments(
            variance=a.noise.variance + b.noise.variance, fourth=a.noise.fourth + b.noise.fourth
        ),
        sampling=sampling,
        sampling_noise=a.sampling_noise + b.sampling_noise,
        people=1 + sampling**2 / parts if parts > 0 else a.people + b.people,
    )


def critical(level: float, *, degrees: float = math.inf, excess: float = 0.0) -> float:
    """Two-sided critical value for Student's t, widened for a kurtosis above the normal one."""
    upper = (1 + level) / 2
    z = float(ndtri(upper))
    base = z if math.isinf(degrees) else float(stdtrit(degrees, upper))
    return base + min(max(excess, 0.0), _LAPLACE_EXCESS) * (z**3 - 3 * z) / 24


def wald(value: float, spread: Spread, level: float) -> tuple[float, float]:
    """A symmetric interval."""
    reach = spread.critical(level) * math.sqrt(spread.variance)
    return value - reach, value + reach


def score(share: float, people: float, noise: NoiseMoments, level: float) -> tuple[float, float]:
    """An interval for a proportion whose noise has moments `noise`, after Wilson 1927.

    All p with (share - p)² ≤ q²·(p(1-p)/people + noise variance), cut to 0 … 1.
    """
    sampled = max(share * (1 - share), 0.25 / max(people, 1.0)) / max(people, 1.0)
    total = noise.variance + sampled
    q2 = critical(level, excess=noise.fourth / total**2 if total > 0 else 0.0) ** 2
    curved = q2 / max(people, 1.0)
    middle = (2 * share + curved) / (2 * (1 + curved))
    inside = middle**2 - (share**2 - q2 * noise.variance) / (1 + curved)
    reach = math.sqrt(max(inside, 0.0))
    return min(max(middle - reach, 0.0), 1.0), min(max(middle + reach, 0.0), 1.0)


def estimate(
    name: str, value: float, ends: tuple[float, float], *, level: float, unit: str
) -> Estimate:
    """An estimate with its interval."""
    interval = Interval(low=ends[0], high=ends[1], level=level)
    return Estimate(name=name, value=value, interval=interval, unit=unit)
