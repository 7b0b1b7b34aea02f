"""Matrix-factorisation DP-FTRL: noise that is correlated over rounds and cancels in sums of rounds.

Lives here: the factor C, what one person can move the released C·x (sensitivity), how far off the
running sums then are (error), `combine` for who sends and `decode` for who receives. Not here: what
a release costs (`training_cost`), and what is done with decoded sums (`strategies`).

Training is the running sums A·x of the rounds' sums x. Released is C·x + z with z independent in
each round, and C⁻¹(C·x + z) = x + C⁻¹·z goes to the optimiser: its running sums carry A·C⁻¹·z.
C is a banded lower-triangular Toeplitz matrix: C[t, s] = c[t-s] for 0 ≤ t-s < bands (Choquette-Choo
et al., "(Amplified) Banded Matrix Factorization" (2023); Kalinin and Lampert, "Banded Square Root
Matrix Factorization for Differentially Private Model Training" (2024)). Its coefficients are *whole
numbers*, positive and never rising: updates are rounded to integers once, their combinations are
integers again, and no second rounding adds to the sensitivity.

Sensitivity
-----------
A person takes part in rounds s_0 < s_1 < … < s_(m-1), m ≤ `most`, at least `gap` apart, each time
with an integer vector X_i of L2 norm ≤ L. Their part of the stacked C·x is Σ_i (C e_(s_i)) ⊗ X_i.
Of each C e_(s_i) any rows may be missing, others for each i: the masked columns are D_i C e_(s_i).

Claim: its L2 norm is at most L·‖Σ_(j<m) C e_(j·gap)‖, whatever the rounds, masks and vectors.

1. The square is Σ_ij ⟨D_i C e_(s_i), D_j C e_(s_j)⟩·⟨X_i, X_j⟩. All entries of C are ≥ 0, so masks
   only leave out terms ≥ 0 of the first product, and the second is ≤ L²: it is at most
   L²·Σ_ij G(s_i, s_j) with G = CᵀC.
2. G(s, t) for s ≤ t is Σ_r c[r]·c[r+t-s] over 0 ≤ r < rounds - t. As c never rises, each term falls
   when t - s grows; as terms are ≥ 0, there are fewer of them when t grows. So G never rises in
   either.
3. s_i ≥ i·gap and s_j - s_i ≥ (j-i)·gap, so G(s_i, s_j) ≤ G(i·gap, j·gap). Summed: the claim. (The
   order of the sum is Kalinin and Lampert's Theorem 2; masks cost nothing more.)

If gap ≥ bands the columns have no row in common and the square is Σ_j ‖C e_(j·gap)‖² ≤ m·Σc².
The claim covers people who miss rounds, join late or never, and devices that lost their past and
send the rest of nothing; it rests on `most` and `gap` alone, which `turns` keeps to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from federated.errors import ManifestError

#: What of the error is made small: the worst round's, or the root mean square over rounds.
type Goal = Literal["max", "rms"]

MAX_BANDS: Final = 1024
MAX_GRAIN: Final = 1 << 16
#: Combinations must stay exact in float64, where sums are decoded.
EXACT: Final = 1 << 53


@dataclass(frozen=True, slots=True, kw_only=True)
class Participation:
    """How often one person's *new* updates may enter a training of `rounds` rounds.

    At most `most` times, in rounds whose numbers differ by `gap` or more. Public and fixed before
    the first round; nodes hold to it (`turns`).
    """

    rounds: int
    most: int
    gap: int = 1

    def __post_init__(self) -> None:
        """Raises `ManifestError` for numbers below 1."""
        if min(self.rounds, self.most, self.gap) < 1:
            raise ManifestError(
                f"`rounds`, `most` and `gap` are 1 or more, not {self.rounds}, {self.most}, "
                f"{self.gap}."
            )

    @property
    def times(self) -> int:
        """How often that can be at most: not more than the rounds have room for."""
        return min(self.most, -(-self.rounds // self.gap))

    def admits(self, earlier: Sequence[int], now: int) -> bool:
        """Whether who brought an update in each of the `earlier` rounds may bring one in `now`.

        What the bound rests on. On devices it follows from the round's number (`turns`).
        """
        if not 0 <= now < self.rounds or len(earlier) >= self.times:
            return False
        return all(now - past >= self.gap for past in earlier)

    def until(self, done: int) -> Participation:
        """The same rule for the first `done` rounds."""
        return Participation(rounds=done, most=self.most, gap=self.gap)


def full_cohort(rounds: int) -> Participation:
    """Everybody in every round."""
    return Participation(rounds=rounds, most=rounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The first column of C: whole numbers, positive, never rising, the first a power of two.

    Never rising makes the sensitivity known (module docstring), and C⁻¹ harmless: all zeros of
    Σ c[j]·x^j lie on or outside the unit circle (Eneström and Kakeya), so that decoding never blows
    up. A power of two in front makes decoding exact: nothing is rounded in a division by it.
    """

    coefficients: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raises `ManifestError` for coefficients of which the above does not hold."""
        given = self.coefficients
        whole = all(type(value) is int for value in given)
        if not whole or not 1 <= len(given) <= MAX_BANDS or given[-1] < 1:
            raise ManifestError(f"Factors are 1 to {MAX_BANDS} whole numbers of 1 or more.")
        if any(after > before for before, after in itertools.pairwise(given)):
            raise ManifestError("Factors never rise: each is at most the one before.")
        if given[0] > MAX_GRAIN or given[0] & (given[0] - 1):
            raise ManifestError(f"The first factor is a power of two up to {MAX_GRAIN}.")

    @property
    def bands(self) -> int:
        """How many rounds an update is part of what is sent."""
        return len(self.coefficients)

    @property
    def scaled(self) -> NDArray[np.float64]:
        """The same with 1 in front, as papers write them."""
        return np.asarray(self.coefficients, dtype=np.float64) / self.coefficients[0]

    def squared_sensitivity(self, participation: Participation) -> int:
        """Largest squared L2 norm of a person's stacked C·x, if each update has norm 1. Exact.

        The claim of the module docstring, attained by who always sends the same vector.
        """
        column = np.zeros(participation.rounds, dtype=object)
        for time in range(participation.times):
            start = time * participation.gap
            end = min(start + self.bands, participation.rounds)
            column[start:end] += np.array(self.coefficients[: end - start], dtype=object)
        return int(column @ column)

    def row_bound(self, participation: Participation) -> int:
        """By how much a row may exceed one update's bound in any coordinate: sizes the modulus."""
        return sum(self.coefficients[:: participation.gap][: participation.times])


IDENTITY: Final = Factors(coefficients=(1,))


def square_root(bands: int, *, grain: int = 1024) -> Factors:
    """The square root of the running sum, cut to so many bands.

    c[j] = C(2j, j)/4^j in steps of 1/grain: Fichtenberger, Henzinger and Upadhyay, "Constant
    Matters" (2023); cut: Kalinin and Lampert (2024).
    """
    return _whole(root_coefficients(bands), grain)


def root_coefficients(count: int) -> NDArray[np.float64]:
    """C(2j, j)/4^j for j < count: the coefficients of (1-x)^(-1/2)."""
    ratios = [1.0, *((2 * j - 1) / (2 * j) for j in range(1, count))]
    return np.cumprod(np.asarray(ratios, dtype=np.float64))


def optimised(
    bands: int,
    participation: Participation,
    *,
    goal: Goal = "rms",
    momentum: float = 0.0,
    grain: int = 1024,
) -> Factors:
    """The factors of that many bands with the smallest error · sensitivity that SciPy finds.

    Starts at the square root, over coefficients that never rise. Deterministic on one machine;
    compute once and declare the integers, since others may round differently.
    """
    from scipy.optimize import minimize

    root = root_coefficients(bands)
    if bands == 1:
        return _whole(root, grain)
    ratios = root[1:] / root[:-1]
    task = _Task(participation, _workload(participation.rounds, momentum), goal)
    found = minimize(
        task.loss,
        np.log(ratios / (1 - ratios)),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-12, 12)] * (bands - 1),
        options={"maxiter": 500},
    )
    return _whole(_from_logits(found.x), grain)


def error(
    factors: Factors, participation: Participation, *, goal: Goal = "rms", momentum: float = 0.0
) -> float:
    """Deviation of the running sums, per unit of noise multiplier and of one update's norm.

    √(squared sensitivity)·‖rows of A·C⁻¹‖, the largest row (`max`) or their root mean square. The
    independent mechanism is `IDENTITY`. With `momentum` running sums are those of the velocity.
    """
    return numeric_error(factors.scaled, participation, goal=goal, momentum=momentum)


def running_noise(factors: Factors, rounds: int) -> float:
    """Deviation of the sum of all decoded sums, per unit of the noise that each row carries.

    ‖last row of A·C⁻¹‖/c[0]; without factors √rounds.
    """
    task = _Task(full_cohort(rounds), _workload(rounds, 0.0), "max")
    return math.sqrt(task.squared_error(factors.scaled)) / factors.coefficients[0]


def numeric_error(
    coefficients: NDArray[np.float64],
    participation: Participation,
    *,
    goal: Goal = "rms",
    momentum: float = 0.0,
) -> float:
    """The same of coefficients that are not whole numbers, to compare with published figures."""
    task = _Task(participation, _workload(participation.rounds, momentum), goal)
    return math.sqrt(task.squared_sensitivity(coefficients) * task.squared_error(coefficients))


def least_error(rounds: int) -> float:
    """No factorisation of any kind has a smaller `rms` error for one participation.

    ‖A‖_* ≤ ‖B‖_F·‖C‖_F ≤ ‖B‖_F·√rounds·(largest column of C), so the error is at least
    ‖A‖_*/rounds; A's singular values are 1/(2·sin((2j-1)·π/(4·rounds+2))). Also a bound on `max`.
    (Matoušek, Nikolov, Talwar 2020; Henzinger, Upadhyay, Upadhyay 2023.)
    """
    angles = (2 * np.arange(1, rounds + 1) - 1) * np.pi / (4 * rounds + 2)
    return float(np.mean(1 / (2 * np.sin(angles))))


def combine(past: Sequence[NDArray[np.int64]], factors: Factors) -> NDArray[np.int64]:
    """What a device or site sends in a round: Σ_j c[j]·past[j], exact.

    `past[j]` is the sum that it made j rounds ago, clipped and rounded: zeros where it made none.
    Newest first; shorter than the bands where there was nothing before, longer is cut. Raises
    ValueError for no vector, different lengths, or values too large to decode exactly.
    """
    used = list(past[: factors.bands])
    if not used or any(one.shape != used[0].shape for one in used):
        raise ValueError("expected at least one vector, all of one length")
    pairs = list(zip(factors.coefficients, used, strict=False))
    largest = sum(
        factor * max(int(one.max(initial=0)), -int(one.min(initial=0))) for factor, one in pairs
    )
    if largest >= EXACT:
        raise ValueError("expected combinations below 2^53; make the updates' scale smaller")
    total = np.zeros(used[0].shape, dtype=np.int64)
    for factor, one in pairs:
        total += factor * one.astype(np.int64)
    return total


def decode_next(
    noisy: NDArray[np.int64] | NDArray[np.float64],
    recent: Sequence[NDArray[np.float64]] | NDArray[np.float64],
    factors: Factors,
) -> NDArray[np.float64]:
    """The newest round's sum from its noisy row: (row - Σ_(j≥1) c[j]·recent[j-1])/c[0].

    `recent`: what was decoded before, newest first, bands - 1 of them or all there are. Without
    noise it gives exactly what was combined.
    """
    left = np.asarray(noisy, dtype=np.float64).copy()
    for factor, one in zip(factors.coefficients[1:], recent, strict=False):
        left -= factor * np.asarray(one)
    return left / factors.coefficients[0]


def decode(noisy: NDArray[np.int64] | NDArray[np.float64], factors: Factors) -> NDArray[np.float64]:
    """All rounds' sums from all noisy rows, shape (rounds, dimension): C⁻¹ times the rows."""
    decoded: list[NDArray[np.float64]] = []
    for row in noisy:
        decoded.append(decode_next(row, decoded[: -factors.bands : -1], factors))
    return np.asarray(decoded, dtype=np.float64).reshape(np.shape(noisy))


def _whole(coefficients: NDArray[np.float64], grain: int) -> Factors:
    steps = np.maximum(1, np.rint(coefficients / coefficients[0] * grain))
    return Factors(coefficients=tuple(int(step) for step in steps))


def _workload(rounds: int, momentum: float) -> NDArray[np.float64]:
    """First column of A: by how much a round's sum is in the weights so many rounds later."""
    if not 0 <= momentum < 1:
        raise ManifestError(f"Momentum is at least 0 and below 1, not {momentum}.")
    return np.cumsum(momentum ** np.arange(rounds, dtype=np.float64))


def _from_logits(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([[1.0], np.cumprod(1 / (1 + np.exp(-logits)))])


class _Task:
    """Squared sensitivity times squared error, and its gradient, by filters in O(rounds·bands)."""

    def __init__(
        self, participation: Participation, workload: NDArray[np.float64], goal: Goal
    ) -> None:
        rounds = participation.rounds
        self._workload = workload
        starts = np.zeros(rounds)
        starts[: participation.times * participation.gap : participation.gap] = 1.0
        self._starts = starts
        # A row of A·C⁻¹ has its first entries: the k-th is in all rows from k on.
        self._share = np.ones(rounds) if goal == "max" else 1 - np.arange(rounds) / rounds

    def squared_sensitivity(self, coefficients: NDArray[np.float64]) -> float:
        column = self._column(coefficients)
        return float(column @ column)

    def squared_error(self, coefficients: NDArray[np.float64]) -> float:
        rows = self._divided(self._workload, coefficients)
        return float(self._share @ rows**2)

    def loss(self, logits: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """The logarithm of their product, over ratios of neighbours that are given as logits."""
        coefficients = _from_logits(logits)
        column = self._column(coefficients)
        rows = self._divided(self._workload, coefficients)
        slopes = self._divided(rows, coefficients)
        sensitivity, wrong = float(column @ column), float(self._share @ rows**2)
        lags = range(len(coefficients))
        by_column = np.array([_lagged(column, self._starts, lag) for lag in lags])
        by_rows = np.array([_lagged(self._share * rows, slopes, lag) for lag in lags])
        by_coefficient = 2 * by_column / sensitivity - 2 * by_rows / wrong
        # A logit moves all later coefficients by the same relative amount.
        later = np.cumsum((by_coefficient * coefficients)[:0:-1])[::-1]
        return math.log(sensitivity) + math.log(wrong), later / (1 + np.exp(logits))

    def _column(self, coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
        from scipy.signal import lfilter

        return np.asarray(lfilter(coefficients, [1.0], self._starts))

    def _divided(
        self, series: NDArray[np.float64], coefficients: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        from scipy.signal import lfilter

        return np.asarray(lfilter([1.0], coefficients, series))


def _lagged(ahead: NDArray[np.float64], behind: NDArray[np.float64], lag: int) -> float:
    return float(ahead[lag:] @ behind[: len(behind) - lag])
