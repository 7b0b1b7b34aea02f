"""Shares of discrete Laplace noise, exactly: differences of Pólya (negative binomial) variables.

Discrete Laplace noise with q = e^(-1/scale) is NB(1, q) - NB(1, q), and NB(r, q) adds up over r: so
shares NB(w, q) - NB(w, q) whose weights w sum to 1 sum to the noise (Bao, Shi, Xiao 2019; Goryczka
and Xiong 2017). NB(w, q) is a sum of Poisson(-w·ln(1 - q)) many logarithmic variables
(Quenouille 1949); so a share is a sum of Poisson(-2w·ln(1 - q)) many with fair signs. The Poisson
count comes from an inversion table; a logarithmic variable from Kemp's algorithm LK (1981):
1 + floor(ln U / ln(1 - (1 - q)^V)). As in `noise`, floats decide only what they decide surely.
"""

from __future__ import annotations

from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.aggregation.bits import word_source
from federated.aggregation.noise import InversionTable, exact_scale
from federated.model import RandomBits

#: Relative margin of the float quotient of logarithms, whose error is below 2^-42 (`_quotient`).
_MARGIN: Final = 2.0**-36
#: Uniforms this close to 0 or 1 are not decided by floats.
_EDGE: Final = 2.0**-20
_TO_UNIT: Final = 2.0**-64


def laplace_share(
    count: int, *, scale: Fraction | float, weight: Fraction, random: RandomBits
) -> NDArray[np.int64]:
    """`count` independent shares of `weight` in discrete Laplace noise of `scale`, exactly.

    Independent shares whose weights sum to 1 sum to `noise.discrete_laplace`; more weight is more
    noise, independent of it. Raises `AccountingError` for a scale that is not sampled, ValueError
    for a weight that is not positive.
    """
    exact = exact_scale(scale)
    if weight <= 0:
        raise ValueError(f"A share's weight is positive, not {weight}.")
    source = word_source(random)
    start = source.position
    jumps = _count_table(exact, weight).draw(source.words(count), source, start)
    owners = np.repeat(np.arange(count), jumps)
    sizes, negative = _logarithmic(len(owners), exact, source)
    shares = np.zeros(count, dtype=np.int64)
    np.add.at(shares, owners, np.where(negative, -sizes, sizes))
    return shares


def _logarithmic(
    count: int, scale: Fraction, random: RandomBits
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """`count` logarithmic variables, each with a fair sign (True: negative)."""
    source = word_source(random)
    start = source.position
    words = source.words(3 * count).reshape(3, count)
    first, second = (words[row].astype(np.float64) * _TO_UNIT + _TO_UNIT / 2 for row in (0, 1))
    quotient = _quotient(first, second, scale)
    values = np.floor(quotient * (1 - _MARGIN))
    unsure = values != np.floor(quotient * (1 + _MARGIN))
    for uniform in (first, second):
        unsure |= (uniform < _EDGE) | (uniform > 1 - _EDGE)
    values[unsure] = 0
    sizes = values.astype(np.int64) + 1
    for index in np.flatnonzero(unsure):
        more = source.refinement(start + int(index))
        sizes[index] = decide_logarithmic(int(words[0, index]), int(words[1, index]), scale, more)
    return sizes, words[2] >> np.uint64(63) == 1


def _quotient(
    first: NDArray[np.float64], second: NDArray[np.float64], scale: Fraction
) -> NDArray[np.float64]:
    """Return ln U / ln(1 - e^(-c·V)), with c = -ln(1 - q).

    For U and V in [2^-20, 1 - 2^-20] the 64-bit cut moves either logarithm by less than 2^-43 of
    itself, and each function below is accurate to a few units in the last place.
    """
    with localcontext(Context(prec=40)):
        rate = float(_rate(scale))
    power = rate * second
    small = power < np.log(2)
    with np.errstate(divide="ignore"):
        log_base = np.where(small, np.log(-np.expm1(-power)), np.log1p(-np.exp(-power)))
    near_one = first > 0.5  # noqa: PLR2004 - where ln loses digits
    log_first = np.where(near_one, np.log1p(first - 1), np.log(first))
    quotient: NDArray[np.float64] = log_first / log_base
    return quotient


def decide_logarithmic(first: int, second: int, scale: Fraction, more: RandomBits) -> int:
    """Return the logarithmic variable of two uniforms that start with these 64-bit words."""
    size, digits = 64, 60
    while True:
        first = (first << 192) | more.bits(192)
        second = (second << 192) | more.bits(192)
        size, digits = size + 192, digits + 80
        if first == 0 or second == 0:
            continue
        with localcontext(Context(prec=digits)):
            unit = Decimal(1) / (1 << size)
            slack = Decimal(10) ** (_lost_digits(size) - digits)
            # The quotient falls with U and rises with V: two corners bound it.
            low = _exact_quotient((first + 1) * unit, second * unit, scale) * (1 - slack)
            high = _exact_quotient(first * unit, (second + 1) * unit, scale) * (1 + slack)
            if int(low) == int(high):
                return int(low) + 1


def _lost_digits(size: int) -> int:
    """Decimal digits that a logarithm may lose where its argument is 2^-size from 0 or 1."""
    return size * 3 // 10 + 10


def _exact_quotient(first: Decimal, second: Decimal, scale: Fraction) -> Decimal:
    base = 1 - (-_rate(scale) * second).exp()
    return first.ln() / base.ln()


def _rate(scale: Fraction) -> Decimal:
    """Return c = -ln(1 - e^(-1/scale)) under the current context."""
    return -(1 - (Decimal(-scale.denominator) / Decimal(scale.numerator)).exp()).ln()


@lru_cache(maxsize=64)
def _count_table(scale: Fraction, weight: Fraction) -> InversionTable:
    """How many logarithmic variables a share sums: Poisson(2·weight·c)."""

    def mass(value: int) -> Decimal:
        mean = 2 * Decimal(weight.numerator) / Decimal(weight.denominator) * _rate(scale)
        probability = (-mean).exp()
        for step in range(1, value + 1):
            probability *= mean / step
        return probability

    return InversionTable(mass)
