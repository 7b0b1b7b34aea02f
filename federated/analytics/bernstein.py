"""Moments of a bounded number from sums of its Bernstein polynomials.

A number x in 0 … 1 is told as the values of the Bernstein basis of degree k, which are never
negative and add up to 1: one person's l1 is 1 whatever x is, so that count, mean and every moment
up to k come out of one release at the price of a single count. The count need not be public, and
a mean's noise is at most 1.12 times that of the bounded sum alone with a public count, and less
where the mean is not at a bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from federated.analytics.intervals import NoiseMoments, Spread


def basis(x: NDArray[np.float64] | float, degree: int) -> NDArray[np.float64]:
    """Values of the basis at `x`, shape (…, degree + 1)."""
    at = np.asarray(x, dtype=np.float64)[..., None]
    j = np.arange(degree + 1)
    weights = np.array([math.comb(degree, int(k)) for k in j], dtype=np.float64)
    return np.asarray(weights * at**j * (1 - at) ** (degree - j), dtype=np.float64)


def power(degree: int, exponent: int) -> NDArray[np.float64]:
    """Coefficients of x**exponent in the basis: C(j, r) / C(k, r)."""
    whole = math.comb(degree, exponent)
    return np.array([math.comb(j, exponent) / whole for j in range(degree + 1)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Noisy sums of a basis over people: shape (degree + 1,)."""

    sums: NDArray[np.float64]

    @property
    def degree(self) -> int:
        """Of the basis."""
        return len(self.sums) - 1

    @property
    def people(self) -> float:
        """How many contributed, noise included."""
        return float(self.sums.sum())

    def mean_of(self, coefficients: NDArray[np.float64]) -> float:
        """Mean over people of the polynomial with these coefficients."""
        return float(coefficients @ self.sums) / self.people

    @property
    def mean(self) -> float:
        """Of x."""
        return self.mean_of(power(self.degree, 1))

    def central(self, exponent: int) -> float:
        """Mean of (x - mean)**exponent, noise included: a variance may be negative."""
        return self.mean_of(self.central_coefficients(exponent))

    def central_coefficients(self, exponent: int) -> NDArray[np.float64]:
        """Coefficients of (x - mean)**exponent in the basis, the mean held fixed."""
        mean = self.mean
        terms = [
            math.comb(exponent, r) * (-mean) ** (exponent - r) * power(self.degree, r)
            for r in range(exponent + 1)
        ]
        return np.asarray(np.sum(terms, axis=0), dtype=np.float64)

    def usable(self, noise: NoiseMoments) -> bool:
        """Whether the count stands out of its own noise, so that a ratio means something."""
        return self.people > 4 * noise.deviation * math.sqrt(self.degree + 1) + 2

    def mean_gradient(self) -> NDArray[np.float64]:
        """How the mean moves with each sum."""
        return (power(self.degree, 1) - self.mean) / self.people

    def mean_spread(self, noise: NoiseMoments) -> Spread:
        """How far the mean may be off. Exact second moments: degree 2 or more."""
        squares = self.central_coefficients(2)
        variance = float(squares @ self.sums) / self.people
        blur = noise.variance * float(np.sum((squares - variance) ** 2)) / self.people**4
        return Spread(
            noise=noise.through(self.mean_gradient()),
            sampling=variance / max(self.people - 1, 1.0),
            sampling_noise=blur,
            people=self.people,
        )

    def variance_spread(self, noise: NoiseMoments) -> Spread:
        """How far the variance may be off. Needs fourth moments: degree 4."""
        variance = self.central(2)
        fourths = self.central_coefficients(4)
        fourth = float(fourths @ self.sums) / self.people
        # The variance as a function of the sums: the mean moves with them, and drops out.
        gradient = (self.central_coefficients(2) - variance) / self.people
        # Sampling variance of (x - mean)², as a function of the sums.
        slopes = fourths - fourth - 2 * variance * (self.central_coefficients(2) - variance)
        return Spread(
            noise=noise.through(gradient),
            sampling=(fourth - variance**2) / max(self.people - 1, 1.0),
            sampling_noise=noise.variance * float(np.sum(slopes**2)) / self.people**4,
            people=self.people,
        )
