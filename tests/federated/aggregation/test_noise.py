"""The samplers give the exact distribution, and floats decide nothing that they might get wrong."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from federated.aggregation import noise, polya
from federated.aggregation.bits import SeededBits, SystemBits, word_source
from federated.aggregation.noise import (
    InversionTable,
    decide_bernoulli_exp,
    discrete_gaussian,
    discrete_laplace,
    sample,
)
from federated.errors import AccountingError
from federated.model import NoisePlan, RandomBits


def bits(label: str) -> SeededBits:
    return SeededBits(hashlib.sha256(label.encode()).digest(), b"test")


class Script:
    """Bits as written down, then zeros."""

    def __init__(self, *values: int) -> None:
        self._values = list(values)

    def bits(self, count: int) -> int:
        return self._values.pop(0) if self._values else 0


def fits(values: NDArray[np.int64], weight: Callable[[float], float], scale: float) -> float:
    """Return the p-value of a chi-square test against P(k) ∝ weight(k), tails in the last cells."""
    reach = 50 + int(60 * scale)
    support = np.arange(-reach, reach + 1)
    mass = np.array([weight(float(k)) for k in support])
    expected = mass / mass.sum() * len(values)
    inside = np.flatnonzero(expected >= 20)
    first, last = inside[0], inside[-1]
    # What lies beyond counts with the outermost cells.
    cells = np.clip(values, support[first], support[last]) - support[first]
    pooled = expected[first : last + 1].copy()
    pooled[0] += expected[:first].sum()
    pooled[-1] += expected[last + 1 :].sum()
    observed = np.bincount(cells, minlength=len(pooled))
    return float(stats.chisquare(observed, pooled).pvalue)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0, 3.7, 20.0])
def test_discrete_laplace_has_its_distribution(scale: float) -> None:
    values = discrete_laplace(100_000, scale=scale, random=bits(f"laplace {scale}"))
    assert fits(values, lambda k: math.exp(-abs(k) / scale), scale) > 1e-3


@pytest.mark.parametrize("variance", [0.1, 0.5, 1.0, 7.3, 400.0])
def test_discrete_gaussian_has_its_distribution(variance: float) -> None:
    values = discrete_gaussian(100_000, variance=variance, random=bits(f"gauss {variance}"))
    assert fits(values, lambda k: math.exp(-k * k / (2 * variance)), variance**0.5) > 1e-3


@pytest.mark.parametrize("scale", [2.0**30 + 0.3, 2.0**40])
def test_huge_scales_are_smooth(scale: float) -> None:
    laplace = discrete_laplace(50_000, scale=scale, random=bits("huge"))
    gauss = discrete_gaussian(50_000, variance=Fraction(scale) ** 2, random=bits("huge"))
    assert stats.kstest(laplace / scale, "laplace").pvalue > 1e-3
    assert stats.kstest(gauss / scale, "norm").pvalue > 1e-3


@pytest.mark.parametrize("scale", [2.0**-8, 2.0**41, 0.0, math.inf, math.nan, -1.0])
def test_refuses_a_scale_that_is_not_proven(scale: float) -> None:
    with pytest.raises(AccountingError):
        discrete_laplace(1, scale=scale, random=SystemBits())
    with pytest.raises(AccountingError):
        polya.laplace_share(1, scale=scale, weight=Fraction(1), random=SystemBits())
    with pytest.raises(AccountingError):
        discrete_gaussian(1, variance=scale * abs(scale), random=SystemBits())


def test_the_plan_says_which_noise() -> None:
    for mechanism, variance in (("discrete_laplace", 200.0), ("discrete_gaussian", 100.0)):
        plan = NoisePlan(mechanism=mechanism, scale=10.0)  # type: ignore[arg-type]
        values = sample(20_000, plan=plan, random=bits("plan"))
        assert float(np.var(values)) == pytest.approx(variance, rel=0.08)


def test_a_seed_gives_the_same_noise_whatever_floating_point_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another machine's exp and log may differ in the last digits; the noise may not."""

    def draw() -> list[NDArray[np.int64]]:
        return [
            discrete_laplace(800, scale=3.3, random=bits("a")),
            discrete_gaussian(800, variance=50.0, random=bits("b")),
            polya.laplace_share(800, scale=50.0, weight=Fraction(1, 3), random=bits("c")),
        ]

    before = draw()
    exp, log, log1p = np.exp, np.log, np.log1p
    # Errors and margins a million times as large as real ones, so that they show in few draws.
    monkeypatch.setattr(noise, "_MARGIN", 2.0**-8)
    monkeypatch.setattr(polya, "_MARGIN", 2.0**-8)
    for factor in (1 + 2.0**-10, 1 - 2.0**-10):
        with monkeypatch.context() as patch:
            patch.setattr(np, "exp", lambda x, f=factor: np.minimum(exp(x) * f, 1.0))
            patch.setattr(np, "log", lambda x, f=factor: log(x) * f)
            patch.setattr(np, "log1p", lambda x, f=factor: log1p(x) * (2 - f))
            for one, other in zip(before, draw(), strict=True):
                assert np.array_equal(one, other)


def test_what_floats_cannot_decide_is_decided_with_more_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a margin so wide that many draws are undecided, the draws are the same."""
    before = [
        discrete_laplace(300, scale=3.3, random=bits("a")),
        discrete_gaussian(300, variance=50.0, random=bits("b")),
        polya.laplace_share(300, scale=50.0, weight=Fraction(1, 3), random=bits("c")),
    ]
    monkeypatch.setattr(noise, "_MARGIN", 0.2)
    monkeypatch.setattr(polya, "_MARGIN", 0.05)
    monkeypatch.setattr(polya, "_EDGE", 0.01)
    after = [
        discrete_laplace(300, scale=3.3, random=bits("a")),
        discrete_gaussian(300, variance=50.0, random=bits("b")),
        polya.laplace_share(300, scale=50.0, weight=Fraction(1, 3), random=bits("c")),
    ]
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one, other)


def test_a_word_on_the_edge_of_a_probability_is_settled_by_the_bits_below_it() -> None:
    word = int(Decimal(-1).exp() * (1 << 64))
    assert decide_bernoulli_exp(word, Fraction(1), Script(0))
    assert not decide_bernoulli_exp(word, Fraction(1), Script((1 << 128) - 1))
    assert decide_bernoulli_exp(word - 1, Fraction(1), Script((1 << 128) - 1))
    assert not decide_bernoulli_exp(word + 1, Fraction(1), Script(0))
    assert decide_bernoulli_exp((1 << 64) - 1, Fraction(0), Script((1 << 128) - 1))
    assert not decide_bernoulli_exp(0, Fraction(10**6), Script(1))


def test_a_word_on_the_edge_of_a_table_is_settled_by_the_bits_below_it() -> None:
    table = InversionTable(lambda k: (1 - Decimal(-1).exp()) * Decimal(-k).exp())
    edge = int((1 - Decimal(-1).exp()) * (1 << 64))
    assert table.refine(edge, Script(0)) == 0
    assert table.refine(edge, Script((1 << 128) - 1)) == 1
    assert table.refine(0, Script(0)) == 0
    # Below 2^-64 of the tail: e^-47 ≥ 1 - u > e^-48 needs the bits below.
    far = (1 << 128) - int(Decimal(-3).exp() * (1 << 128)) + 1
    assert table.refine((1 << 64) - 1, Script(far)) == 47
    source = word_source(Script())
    words = np.array([edge, edge - 5, edge + 5, (1 << 64) - 1], dtype=np.uint64)
    drawn = table.draw(words, source, 0)
    assert list(drawn[:3]) == [0, 0, 1]
    assert drawn[3] >= 44


def test_words_come_the_same_from_a_source_of_bits_alone() -> None:
    class Bare:
        def __init__(self) -> None:
            self._inner = bits("bare")

        def bits(self, count: int) -> int:
            return self._inner.bits(count)

    assert np.array_equal(word_source(Bare()).words(100), bits("bare").words(100))
    values = discrete_laplace(1000, scale=2.0, random=Bare())
    assert np.array_equal(values, discrete_laplace(1000, scale=2.0, random=bits("bare")))


@pytest.mark.parametrize("make", [SystemBits, lambda: bits("fair")])
def test_bits_are_within_range_and_fair(make: Callable[[], RandomBits]) -> None:
    source = make()
    drawn = [source.bits(3) for _ in range(4000)]
    assert stats.chisquare(np.bincount(drawn, minlength=8)).pvalue > 1e-6
    assert source.bits(0) == 0
    assert source.bits(256).bit_length() <= 256


def test_a_seed_has_its_length_and_its_labels_are_apart() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        SeededBits(b"short", b"test")
    one, other = SeededBits(bytes(32), b"a"), SeededBits(bytes(32), b"b")
    assert not np.array_equal(one.words(4), other.words(4))
    assert one.refinement(0).bits(64) != one.refinement(1).bits(64)
    assert one.refinement(0).bits(64) != SeededBits(bytes(32), b"a").bits(64)
