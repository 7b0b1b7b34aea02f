"""Quantiles over people of a bounded quantity, from a tree of counts made consistent.

Leaves are equal bins; every level above counts the same people more coarsely, and least squares
over all levels (Hay et al. 2010) gives leaf counts whose running sums carry far less noise than
sums of noisy leaves. With two children per node it is the dyadic tree; a wider one has fewer levels
to pay for and is better for the few hundred leaves that are of use here (Qardaji et al. 2013).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.analytics.base import Asked, BaseQuery, too_few
from federated.analytics.intervals import NoiseMoments, Spread, estimate
from federated.analytics.layout import Block, Layout, one_hot
from federated.analytics.means import clipping_cautions
from federated.analytics.quantity import Quantity
from federated.errors import ManifestError
from federated.model import Estimate, PersonRows

_MOST_LEAVES: Final = 1024
_MOST_QUANTILES: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles(BaseQuery):
    """Values below which the shares `at` of people lie.

    The tree has `depth` levels and `branching` children per node: branching**depth leaves. `whole`:
    the quantity is a whole number, and so are its quantiles.
    """

    of: Quantity
    at: tuple[float, ...] = (0.25, 0.5, 0.75)
    depth: int = 2
    branching: int = 8
    whole: bool = False

    def check(self) -> None:
        """Refuse shares outside of 0 … 1 and trees that are too large."""
        if not 1 <= len(self.at) <= _MOST_QUANTILES or not all(0 < share < 1 for share in self.at):
            raise ManifestError(f"{self.name}: `at` must hold shares above 0 and below 1.")
        if self.depth < 1 or self.branching < 2 or self.leaves > _MOST_LEAVES:  # noqa: PLR2004
            raise ManifestError(
                f"{self.name}: a tree has 1 level or more, 2 children or more, and at most "
                f"{_MOST_LEAVES} leaves."
            )

    @property
    def leaves(self) -> int:
        """Number of equal bins."""
        return int(self.branching ** min(self.depth, 16))

    @property
    def columns(self) -> frozenset[str]:
        """The quantity's column."""
        return frozenset({self.of.column})

    @property
    def layout(self) -> Layout:
        """One place in each level."""
        levels = range(1, self.depth + 1)
        return Layout(
            blocks=tuple(Block(size=self.branching**level, limit=1) for level in levels), unit=1
        )

    def masses(self, rows: PersonRows) -> NDArray[np.float64]:
        """One in the person's node of every level."""
        scaled = self.of.of(rows)
        leaf = None if scaled is None else min(int(scaled * self.leaves), self.leaves - 1)
        return np.concatenate(
            [
                one_hot(
                    self.branching**level,
                    None if leaf is None else leaf // self.branching ** (self.depth - level),
                )
                for level in range(1, self.depth + 1)
            ]
        )

    def estimates(self, asked: Asked) -> list[Estimate]:
        """Each quantile, with an interval by inverting the distribution (Woodruff 1952)."""
        to_leaves = _least_squares(self.depth, self.branching)
        running = np.cumsum(to_leaves, axis=0)
        reached = running @ asked.masses
        people = float(reached[-1])
        if people <= 4 * asked.noise.deviation * float(np.linalg.norm(running[-1])) + 2:
            raise too_few(self.name, self.of.column)
        shares = reached / people
        gradients = (running - shares[:, None] * running[-1]) / people
        curve = np.concatenate([[0.0], monotone(shares)])
        return [self._quantile(at, curve, gradients, people, asked) for at in self.at]

    def _quantile(
        self,
        at: float,
        curve: NDArray[np.float64],
        gradients: NDArray[np.float64],
        people: float,
        asked: Asked,
    ) -> Estimate:
        value, low, high = inverted(at, curve, gradients, people, asked)
        return estimate(
            f"{at * 100:g} % quantile",
            self._in_units(value),
            (self._in_units(low), self._in_units(high)),
            level=asked.level,
            unit=self.of.unit,
        )

    def _in_units(self, scaled: float) -> float:
        """Back to the quantity's unit; to the whole number that is in the same leaf, if any is."""
        if not self.whole:
            return self.of.in_units(scaled)
        leaf = min(int(scaled * self.leaves + 1e-9), self.leaves - 1)
        first = math.ceil(self.of.in_units(leaf / self.leaves) - 1e-9 * self.of.width)
        end = self.of.in_units((leaf + 1) / self.leaves)
        inside = first < end or (first == end and leaf == self.leaves - 1)
        return float(first if inside else round(self.of.in_units(scaled)))

    def cautions(self) -> tuple[str, ...]:
        """What the answer cannot say."""
        step = self.of.width / self.leaves
        unit = f" {self.of.unit}" if self.of.unit else ""
        return (
            *clipping_cautions(self.of),
            (
                f"Values are told apart in steps of {step:.3g}{unit}; within a step people count "
                "as spread evenly."
            ),
        )

    def typical(self, people: int) -> NDArray[np.float64]:
        """The same number in every leaf."""
        levels = [self.branching**level for level in range(1, self.depth + 1)]
        return np.concatenate([np.full(size, people / size) for size in levels])


def inverted(
    at: float,
    curve: NDArray[np.float64],
    gradients: NDArray[np.float64],
    people: float,
    asked: Asked,
) -> tuple[float, float, float]:
    """A quantile and its interval's ends, as places from 0 to 1 on equal steps (Woodruff 1952).

    `curve`: `monotone` shares of people up to each step's end, 0 before them. `gradients`: of each
    share by the masses, shape (steps, masses).
    """
    steps, value = len(gradients), inverse(curve, at)
    edge = min(max(round(value * steps) - 1, 0), steps - 2)
    noise: NoiseMoments = asked.noise.through(gradients[edge])
    spread = Spread(
        noise=noise, sampling=at * (1 - at) / people, sampling_noise=0.0, people=math.inf
    )
    reach = spread.critical(asked.level) * math.sqrt(spread.variance)
    return value, inverse(curve, at - reach), inverse(curve, at + reach)


@lru_cache(maxsize=16)
def _least_squares(depth: int, branching: int) -> NDArray[np.float64]:
    """From all noisy counts to consistent leaves: shape (leaves, counts)."""
    leaves = branching**depth
    levels = [
        np.kron(np.eye(branching**level), np.ones(branching ** (depth - level)))
        for level in range(1, depth + 1)
    ]
    matrix = np.concatenate([level.reshape(-1, leaves) for level in levels])
    return np.asarray(np.linalg.solve(matrix.T @ matrix, matrix.T))


def monotone(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest never-falling curve from 0 to 1: halfway between its hulls from both sides."""
    above = np.maximum.accumulate(shares)
    below = np.minimum.accumulate(shares[::-1])[::-1]
    curve = np.clip((above + below) / 2, 0.0, 1.0)
    curve[-1] = 1.0
    return np.asarray(curve)


def inverse(curve: NDArray[np.float64], share: float) -> float:
    """Where a never-falling curve on equal steps from 0 to 1 reaches a share: the middle of it."""
    steps = len(curve) - 1
    cut = min(max(share, 0.0), 1.0)
    first = int(np.searchsorted(curve, cut, side="left"))
    last = int(np.searchsorted(curve, cut, side="right"))
    if last > first:
        return (first + last - 1) / 2 / steps
    rise = curve[first] - curve[first - 1]
    return float((first - 1 + (cut - curve[first - 1]) / rise) / steps)
