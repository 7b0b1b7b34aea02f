"""An interval of 95 % holds the truth in 95 ± 2 % of studies, noise and sampling included.

Small runs with fixed seeds; the full ones are in `benchmarks/bench_analytics.py`.
"""

from __future__ import annotations

import math

import pytest

from tests.federated.analytics.simulated import KINDS, covered

STUDIES = 300
#: Three standard errors of a share measured over that many studies, at either end of 95 ± 2 %.
LOWEST = 0.93 - 3 * math.sqrt(0.93 * 0.07 / STUDIES)
HIGHEST = 0.97 + 3 * math.sqrt(0.97 * 0.03 / STUDIES)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interval_holds_the_truth_as_often_as_it_says(kind: str) -> None:
    shares = covered(KINDS[kind], people=400, epsilon=1.0, studies=STUDIES, seed=7)
    assert {name: share for name, share in shares.items() if not LOWEST <= share <= HIGHEST} == {}


def test_an_interval_of_half_holds_half_as_often() -> None:
    shares = covered(KINDS["mean"], people=400, epsilon=1.0, studies=1000, seed=7, level=0.5)
    assert shares["mean"] == pytest.approx(0.5, abs=0.05)
