"""One query of each kind, and rows of people as tests need them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from federated.analytics.association import Association
from federated.analytics.base import BaseQuery
from federated.analytics.conditional import OwnAverageSplit
from federated.analytics.counts import Count, Histogram
from federated.analytics.groups import ArmContrast, GroupMeans
from federated.analytics.means import Mean, Variance
from federated.analytics.quantiles import Quantiles
from federated.analytics.quantity import Quantity
from federated.analytics.trend import WeeklyTrend
from federated.model import PersonRows

MOOD = Quantity(column="mood", low=-6, high=6)
SLEEP = Quantity(column="sleep_quality", low=1, high=7)
PHQ9 = Quantity(column="phq9_total", low=0, high=27, summary="last")
CHANGE = Quantity(column="phq9_total", low=-27, high=27, summary="change")
COLUMNS = ("mood", "sleep_quality", "phq9_total", "arm")

QUERIES: tuple[BaseQuery, ...] = (
    Count(name="count", of=PHQ9, at_least=10),
    Histogram(name="histogram", of=PHQ9, edges=(0, 5, 10, 15, 20, 27)),
    Mean(name="mean", of=MOOD),
    Variance(name="variance", of=MOOD),
    Quantiles(name="quantiles", of=MOOD),
    Quantiles(name="dyadic", of=MOOD, depth=6, branching=2),
    Association(name="association", x=SLEEP, y=MOOD, spread_x=1.5, spread_y=2, days=21),
    OwnAverageSplit(name="split", outcome="mood", less_than=1.5, by="sleep_quality", days=21),
    ArmContrast(name="contrast", outcome=CHANGE),
    GroupMeans(name="groups", outcome=PHQ9, by=SLEEP, edges=(1, 3, 5, 7), reference=1),
    WeeklyTrend(name="trend", of=MOOD, weeks=5),
    WeeklyTrend(name="dated", of=MOOD, weeks=3, start="2020-01-01", steepest=0.5),
)


class SeededBits:
    """Reproducible bits for tests."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def bits(self, count: int) -> int:
        drawn = int.from_bytes(self._random.bytes((count + 7) // 8))
        return drawn % (1 << count)


class EdgeBits:
    """The largest offset that rounding can draw."""

    def bits(self, count: int) -> int:
        return (1 << count) - 1


def person(seed: int, *, days: int = 20) -> PersonRows:
    """Somebody unremarkable."""
    random = np.random.default_rng(seed)
    mood = random.normal(random.normal(2, 1), 1.5, days)
    sleep = np.clip(np.round(random.normal(5, 1.2, days) + 0.2 * mood), 1, 7)
    return PersonRows(
        days=np.arange(18_262, 18_262 + days),
        values={
            "mood": np.clip(mood, -6, 6),
            "sleep_quality": sleep,
            "phq9_total": random.integers(0, 28, days).astype(np.float64),
            "arm": np.full(days, float(random.integers(0, 2))),
        },
    )


_SPECIAL = (np.nan, np.inf, -np.inf, 1e308, -1e308, 5e-324, -0.0, 0.0, 1.0, 7.0, 27.0)


@st.composite
def hostile_rows(draw: st.DrawFn) -> PersonRows:
    """Whatever a store could hold by mistake or on purpose."""
    size = draw(st.sampled_from([0, 1, 2, 3, 9, 40, 4000]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    stretch = draw(st.sampled_from([1, 3, 1000]))
    start = draw(st.sampled_from([-(2**40), 0, 18_262, 2**40]))
    days = start + np.cumsum(random.integers(1, 1 + stretch, size))
    values = {}
    for column in draw(st.sets(st.sampled_from(COLUMNS))):
        kind = draw(st.sampled_from(["plain", "special", "constant", "wide"]))
        plain = random.normal(2, 3, size)
        values[column] = {
            "plain": plain,
            "special": random.choice(np.array(_SPECIAL), size),
            "constant": np.full(size, draw(st.sampled_from(_SPECIAL))),
            "wide": plain * 10.0 ** random.integers(-300, 300, size),
        }[kind]
    return PersonRows(days=days.astype(np.int64), values=values)
