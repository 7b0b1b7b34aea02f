"""Shares of discrete Laplace noise: the exact share, and the exact noise when they are summed."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from federated.aggregation.polya import _logarithmic, decide_logarithmic, laplace_share
from tests.federated.aggregation.test_noise import Script, bits, fits


@pytest.mark.parametrize(("scale", "shares"), [(0.4, 3), (3.0, 7), (15.0, 4)])
def test_shares_sum_to_discrete_laplace(scale: float, shares: int) -> None:
    weight = Fraction(1, shares)
    total = sum(
        laplace_share(60_000, scale=scale, weight=weight, random=bits(f"{scale} {at}"))
        for at in range(shares)
    )
    assert isinstance(total, np.ndarray)
    assert fits(total, lambda k: math.exp(-abs(k) / scale), scale) > 1e-3


def test_unequal_shares_sum_to_discrete_laplace() -> None:
    weights = (Fraction(1, 2), Fraction(1, 3), Fraction(1, 7), Fraction(1, 42))
    total = sum(
        laplace_share(60_000, scale=5.0, weight=weight, random=bits(f"unequal {weight}"))
        for weight in weights
    )
    assert isinstance(total, np.ndarray)
    assert fits(total, lambda k: math.exp(-abs(k) / 5.0), 5.0) > 1e-3


def test_a_share_is_a_difference_of_polya_variables() -> None:
    scale, weight = 2.0, Fraction(1, 3)
    drawn = laplace_share(100_000, scale=scale, weight=weight, random=bits("one share"))
    mass = stats.nbinom(float(weight), 1 - math.exp(-1 / scale)).pmf(np.arange(200))
    difference = np.convolve(mass, mass[::-1])
    assert fits(drawn, lambda k: difference[int(k) + 199] if abs(k) < 200 else 0.0, scale) > 1e-3


def test_logarithmic_variables_have_their_distribution() -> None:
    values, negative = _logarithmic(80_000, Fraction(6), bits("log"))
    theta = math.exp(-1 / 6)
    expected = stats.logser(theta).pmf(np.arange(1, 30)) * len(values)
    observed = np.bincount(np.minimum(values, 30), minlength=31)[1:]
    assert stats.chisquare(observed, [*expected, len(values) - expected.sum()]).pvalue > 1e-3
    assert abs(int(negative.sum()) - 40_000) < 5 * math.sqrt(20_000)


def test_floats_decide_a_logarithmic_variable_as_exact_arithmetic_does() -> None:
    for scale in (Fraction(1, 2), Fraction(50), Fraction(2**30)):
        values, _ = _logarithmic(60, scale, bits("compare"))
        words = bits("compare").words(180).reshape(3, 60)
        for at, value in enumerate(values):
            first, second = int(words[0, at]), int(words[1, at])
            assert decide_logarithmic(first, second, scale, bits(f"below {at}")) == value


def test_words_at_the_very_edges_are_settled() -> None:
    top = (1 << 64) - 1
    assert decide_logarithmic(top, 5, Fraction(4), bits("edge")) == 1
    assert decide_logarithmic(0, top, Fraction(4), bits("edge")) > 100
    assert decide_logarithmic(0, 0, Fraction(4), Script(0, 0, 1 << 100, 1 << 100)) >= 1


def test_a_share_has_a_positive_weight() -> None:
    with pytest.raises(ValueError, match="positive"):
        laplace_share(1, scale=1.0, weight=Fraction(0), random=bits("none"))
