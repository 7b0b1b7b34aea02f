"""How much noise each node adds, and what is taken off again once the survivors are known.

Add-then-remove, after Jiang, Wang and Chen, "Dordis: Efficient Federated Learning with Dropout-
Resilient Differential Privacy" (EuroSys 2024; XNoise). The planned noise is one unit of weight
(variance of the discrete Gaussian, index of the Pólya variable), and with s survivors of whom
`colluding` may tell the server their noise, each must keep 1/(s - colluding). A node adds a base
share for the case that all survive, and increments for drop-outs; those that are not needed at s
survivors come off the sum. Weights are rational numbers, so what stays is known exactly:

- up to `UNARY` tolerated drop-outs: one increment for each, and what stays is the plan's weight
  exactly;
- beyond: increments of 1, 2, 4, … units, of which the binary digits of the missing weight, rounded
  up, stay: never less than the plan, and at most 1/127 of the increments' sum more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.aggregation.bits import SeededBits
from federated.aggregation.noise import discrete_gaussian, exact_scale
from federated.aggregation.polya import laplace_share
from federated.model import NoisePlan, RandomBits

#: Up to so many drop-outs there is one increment for each.
UNARY: Final = 6
#: Beyond, so many binary digits.
BINARY: Final = 7
#: Smallest variance of a discrete Gaussian share: keeps a sum of shares close to the discrete
#: Gaussian (`NoiseSchedule.log_ratio`).
SMALLEST_VARIANCE: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSchedule:
    """Base and increments for `nodes` of whom at least `minimum_survivors` send a vector.

    `base` and `increments` are weights of the planned noise. `kept[d]` says which increments stay
    when d of the nodes are missing.
    """

    plan: NoisePlan
    nodes: int
    minimum_survivors: int
    colluding: int
    base: Fraction
    increments: tuple[Fraction, ...]
    kept: Mapping[int, frozenset[int]]

    @property
    def granularity(self) -> int:
        """What integers are multiplied by before noise, so that no share is too coarse.

        1 for discrete Laplace, whose shares are exact at any scale. Always odd: dividing by it
        again then rounds up as often as down, so that no estimate is shifted.
        """
        if self.plan.mechanism == "discrete_laplace":
            return 1
        smallest = min((self.base, *self.increments)) * Fraction(self.plan.scale) ** 2
        return (math.isqrt(math.ceil(SMALLEST_VARIANCE / smallest) - 1) + 1) | 1

    def removed(self, survivors: int) -> tuple[int, ...]:
        """Which increments come off at `survivors`, ascending."""
        kept = self.kept[self.nodes - survivors]
        return tuple(index for index in range(len(self.increments)) if index not in kept)

    def weight(self, survivors: int) -> Fraction:
        """How much of the planned noise the sum of all survivors' shares carries.

        At least survivors / (survivors - colluding): the honest survivors' part is at least 1.
        """
        kept = sum((self.increments[k] for k in self.kept[self.nodes - survivors]), Fraction(0))
        return survivors * (self.base + kept)

    @property
    def log_ratio(self) -> float:
        """Bound on |ln(P[sum of honest shares = k] / P[one discrete Gaussian = k])|, a coordinate.

        The discrete Gaussian has the summed variance, which is at least the plan's. 0 for discrete
        Laplace. Each of fewer than N = nodes · (1 + increments) convolutions of parts with
        variances S ≥ largest and v ≥ smallest costs at most 5·exp(-2π²/(1/S + 1/v)) (Kairouz, Liu
        and Steinke, "The Distributed Discrete Gaussian Mechanism" (2021), on sums of discrete
        Gaussians), summed from the largest part on.

        A mechanism that is (ε, δ)-private with the exact noise in d coordinates is
        (ε + 2·d·log_ratio, δ·exp(d·log_ratio))-private with the sum of shares.
        """
        if self.plan.mechanism == "discrete_laplace":
            return 0.0
        unit = Fraction(self.plan.scale) ** 2 * self.granularity**2
        parts = [float(part * unit) for part in (self.base, *self.increments)]
        narrowest = 1 / (1 / max(parts) + 1 / min(parts))
        return self.nodes * len(parts) * 5 * math.exp(-2 * math.pi**2 * narrowest)

    def share(self, part: int, *, dimension: int, random: RandomBits) -> NDArray[np.int64]:
        """One node's noise of one part, in granular units: -1 is the base, k the k-th increment."""
        weight = self.base if part < 0 else self.increments[part]
        scale = Fraction(self.plan.scale)
        if self.plan.mechanism == "discrete_laplace":
            return laplace_share(dimension, scale=scale, weight=weight, random=random)
        variance = scale**2 * self.granularity**2 * weight
        return discrete_gaussian(dimension, variance=variance, random=random)

    def increment(self, part: int, *, dimension: int, seed: bytes) -> NDArray[np.int64]:
        """Draw the increment that a seed stands for; node and server draw the same."""
        random = SeededBits(seed, b"noise increment %d" % part)
        return self.share(part, dimension=dimension, random=random)


def noise_schedule(
    plan: NoisePlan, *, nodes: int, minimum_survivors: int, colluding: int
) -> NoiseSchedule:
    """Return the schedule. Needs nodes ≥ minimum_survivors > colluding ≥ 0.

    Raises `AccountingError` for noise that cannot be drawn at its granularity.
    """
    exact_scale(plan.scale)
    tolerated = nodes - minimum_survivors
    needed = [Fraction(1, nodes - colluding - missing) for missing in range(tolerated + 1)]
    if tolerated <= UNARY:
        increments = tuple(after - before for before, after in itertools.pairwise(needed))
        kept = {missing: frozenset(range(missing)) for missing in range(tolerated + 1)}
    else:
        unit = (needed[-1] - needed[0]) / (2**BINARY - 1)
        increments = tuple(unit * 2**digit for digit in range(BINARY))
        kept = {
            missing: _digits(math.ceil((weight - needed[0]) / unit))
            for missing, weight in enumerate(needed)
        }
    schedule = NoiseSchedule(
        plan=plan,
        nodes=nodes,
        minimum_survivors=minimum_survivors,
        colluding=colluding,
        base=needed[0],
        increments=increments,
        kept=kept,
    )
    exact_scale(plan.scale * schedule.granularity)
    return schedule


def _digits(number: int) -> frozenset[int]:
    return frozenset(digit for digit in range(BINARY) if number >> digit & 1)
