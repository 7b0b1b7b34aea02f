"""Exact samplers of integer noise over random bits, vectorised: no float decides anything.

Each draw compares a uniform number with a probability. The uniform's first 64 bits and a float of
the probability settle almost every comparison, with a margin (2^-30) far above any rounding error
of the float; what they do not settle is compared again with more bits and `decimal` arithmetic
whose error is bounded, until it is settled. So the distribution is the exact one for fair bits.

Discrete Laplace and Gaussian: rejection after Canonne, Kamath and Steinke, "The Discrete Gaussian
for Differential Privacy" (2020), algorithms 2 and 3, with their two acceptance steps in one.
Shares of discrete Laplace noise stand in `polya`, who adds how much in `schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.aggregation.bits import WordSource, word_source
from federated.errors import AccountingError
from federated.model import NoisePlan, RandomBits

#: Smallest and largest scale that is sampled: below, the float margin is not proven; above,
#: values could leave 63 bits.
SMALLEST_SCALE: Final = 2.0**-7
LARGEST_SCALE: Final = 2.0**40

_MARGIN: Final = 2.0**-30
_TO_UNIT: Final = 2.0**-64
_WORD: Final = 1 << 64


class InversionTable:
    """A distribution on 0, 1, 2, … by inversion of its distribution function.

    `mass(k)` gives P(k) under the current `decimal` context, with a relative error of at most
    10^-(digits - 16); masses must sum to 1.
    """

    def __init__(self, mass: Callable[[int], Decimal]) -> None:
        self._mass = mass
        thresholds: list[int] = []
        with localcontext(Context(prec=60)):
            total = Decimal(0)
            while not thresholds or thresholds[-1] < _WORD - 2:
                total += mass(len(thresholds))
                thresholds.append(min(int(total * _WORD), _WORD - 1))
        self._thresholds = np.array(thresholds, dtype=np.uint64)

    def draw(self, words: NDArray[np.uint64], source: WordSource, start: int) -> NDArray[np.int64]:
        """One value for each word; `start` is the position of the first in `source`."""
        values = np.searchsorted(self._thresholds, words, side="right").astype(np.int64)
        last = len(self._thresholds) - 1
        above = self._thresholds[np.minimum(values, last)]
        below = self._thresholds[np.maximum(values - 1, 0)]
        # The word is the first 64 bits of a number; next to a threshold they do not decide.
        unsure = (above - words <= 1) | ((values > 0) & (words - below <= 1)) | (values > last)
        for index in np.flatnonzero(unsure):
            values[index] = self.refine(int(words[index]), source.refinement(start + int(index)))
        return values

    def refine(self, word: int, more: RandomBits) -> int:
        """Return the value of the number that starts with `word`, reading bits until it is sure."""
        number, size, digits = word, 64, 60
        while True:
            number, size, digits = (number << 128) | more.bits(128), size + 128, digits + 60
            with localcontext(Context(prec=digits)):
                slack = Decimal(10) ** (20 - digits)
                low = Decimal(number) / (1 << size)
                high = low + Decimal(1) / (1 << size)
                value, total = 0, self._mass(0)
                while total + slack < high and total < 1 - slack:
                    value += 1
                    total += self._mass(value)
                before = total - self._mass(value)
                above = value == 0 or before + slack <= low
                if above and high <= total - slack:
                    return value


def _geometric_mass(value: int) -> Decimal:
    """P(k) = (1 - 1/e)·e^-k."""
    return (1 - Decimal(-1).exp()) * Decimal(-value).exp()


_GEOMETRIC: Final = InversionTable(_geometric_mass)


def discrete_laplace(
    count: int, *, scale: Fraction | float, random: RandomBits
) -> NDArray[np.int64]:
    """`count` independent draws with P(k) ∝ exp(-|k|/scale), exactly.

    Raises `AccountingError` for a scale outside [2^-7, 2^40].
    """
    exact = exact_scale(scale)
    # A power of two, so that the uniform part needs no rejection; not below the scale, so that the
    # acceptance probability is at most 1.
    shift = (-(-exact.numerator // exact.denominator) - 1).bit_length()
    inverse = 1 / float(exact)

    def exponent(size: NDArray[np.int64], turns: NDArray[np.int64]) -> NDArray[np.float64]:
        return (size * inverse - turns).astype(np.float64)

    def exact_exponent(size: int, turns: int) -> Fraction:
        return size / exact - turns

    return _reject(count, shift, exponent, exact_exponent, word_source(random))


def discrete_gaussian(
    count: int, *, variance: Fraction | float, random: RandomBits
) -> NDArray[np.int64]:
    """`count` independent draws with P(k) ∝ exp(-k²/(2·variance)), exactly.

    `variance` is the parameter (sigma squared); the distribution's own variance is at most that.
    Raises `AccountingError` for a sigma outside [2^-7, 2^40].
    """
    sigma = math.sqrt(variance) if variance > 0 else 0.0
    exact_scale(sigma)
    exact = Fraction(variance)
    # Any power of two gives the right distribution; near sigma, few draws are rejected.
    shift = max(0, round(float(np.log2(sigma))))
    half_precision = 1 / (2 * exact)
    constant = exact / (2 << (2 * shift))
    factor, offset = float(half_precision), float(constant)

    def exponent(size: NDArray[np.int64], turns: NDArray[np.int64]) -> NDArray[np.float64]:
        wide = size.astype(np.float64)
        return wide * wide * factor + offset - turns

    def exact_exponent(size: int, turns: int) -> Fraction:
        return size * size * half_precision + constant - turns

    return _reject(count, shift, exponent, exact_exponent, word_source(random))


def sample(count: int, *, plan: NoisePlan, random: RandomBits) -> NDArray[np.int64]:
    """The whole planned noise, as one party adds it (trusted server)."""
    match plan.mechanism:
        case "discrete_laplace":
            return discrete_laplace(count, scale=plan.scale, random=random)
        case "discrete_gaussian":
            return discrete_gaussian(count, variance=Fraction(plan.scale) ** 2, random=random)


def _reject(
    count: int,
    shift: int,
    exponent: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]],
    exact_exponent: Callable[[int, int], Fraction],
    source: WordSource,
) -> NDArray[np.int64]:
    """Symmetric draws by rejection.

    Proposal: size = uniform in [0, 2^shift) + 2^shift · turns, P(turns) ∝ e^-turns, and a sign.
    Accepted with probability exp(-exponent(size, turns)); minus zero is rejected.
    """
    drawn = np.empty(count, dtype=np.int64)
    filled = 0
    while filled < count:
        batch = 2 * (count - filled) + 16
        start = source.position
        words = source.words(3 * batch).reshape(3, batch)
        turns = _GEOMETRIC.draw(words[0], source, start)
        size = (words[1] & np.uint64((1 << shift) - 1)).astype(np.int64) + (turns << shift)
        negative = words[1] >> np.uint64(63) == 1
        accepted = _bernoulli_exp(
            words[2], exponent(size, turns), size, turns, exact_exponent, source, start + 2 * batch
        )
        accepted &= ~(negative & (size == 0))
        values = np.where(negative, -size, size)[accepted][: count - filled]
        drawn[filled : filled + len(values)] = values
        filled += len(values)
    return drawn


def _bernoulli_exp(
    words: NDArray[np.uint64],
    exponents: NDArray[np.float64],
    size: NDArray[np.int64],
    turns: NDArray[np.int64],
    exact_exponent: Callable[[int, int], Fraction],
    source: WordSource,
    start: int,
) -> NDArray[np.bool_]:
    """True with probability exp(-exponent), each."""
    uniform = words.astype(np.float64) * _TO_UNIT
    probability = np.exp(-exponents)
    accepted = uniform + 2 * _TO_UNIT < probability * (1 - _MARGIN)
    refused = uniform - 2 * _TO_UNIT > probability * (1 + _MARGIN)
    for index in np.flatnonzero(~(accepted | refused)):
        exact = exact_exponent(int(size[index]), int(turns[index]))
        more = source.refinement(start + int(index))
        accepted[index] = decide_bernoulli_exp(int(words[index]), exact, more)
    return accepted


def decide_bernoulli_exp(word: int, exponent: Fraction, more: RandomBits) -> bool:
    """Whether the uniform number that starts with the 64 bits of `word` is below exp(-exponent)."""
    if exponent == 0:
        return True
    number, size, digits = word, 64, 60
    while True:
        number, size, digits = (number << 128) | more.bits(128), size + 128, digits + 60
        with localcontext(Context(prec=digits, Emin=-(10**15), Emax=10**15)):
            ratio = Decimal(exponent.numerator) / Decimal(exponent.denominator)
            probability = (-ratio).exp()
            # Relative errors: 10^-digits of the quotient, multiplied by it in the exponent.
            slack = probability * (ratio + 2) * Decimal(10) ** (2 - digits)
            low = Decimal(number) / (1 << size)
            high = low + Decimal(1) / (1 << size)
            slack += Decimal(10) ** (2 - digits) * low
            if high <= probability - slack:
                return True
            if low >= probability + slack:
                return False


def exact_scale(scale: Fraction | float) -> Fraction:
    """Return the scale as a fraction. Raises `AccountingError` if the samplers do not draw it."""
    if not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        raise AccountingError(
            f"Noise of scale {scale} cannot be drawn: expected from {SMALLEST_SCALE} to "
            f"{LARGEST_SCALE}. Choose another scale of the integers."
        )
    return Fraction(scale)
