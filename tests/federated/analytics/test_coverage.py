"""An interval of 95 % holds the truth in 95 ± 2 % of studies, noise and sampling included.

With fixed seeds. `benchmarks/bench_analytics.py` adds studies of people drawn from real ones.
"""

from __future__ import annotations

import math

import pytest

from tests.federated.analytics.simulated import KINDS, covered

STUDIES = 1000
#: Three standard errors of a share measured over that many studies, at either end of 95 ± 2 %.
LOWEST = 0.93 - 3 * math.sqrt(0.93 * 0.07 / STUDIES)
HIGHEST = 0.97 + 3 * math.sqrt(0.97 * 0.03 / STUDIES)


@pytest.mark.parametrize("people", [200, 500, 2000])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interval_holds_the_truth_as_often_as_it_says(kind: str, people: int) -> None:
    shares = covered(KINDS[kind], people=people, epsilon=1.0, studies=STUDIES, seed=11)
    assert {name: share for name, share in shares.items() if not LOWEST <= share <= HIGHEST} == {}
    # Over all of a kind's estimates chance evens out.
    assert 0.93 <= sum(shares.values()) / len(shares) <= 0.97


@pytest.mark.parametrize("kind", ["count", "histogram", "mean", "variance"])
def test_among_few_people_an_interval_holds_no_less_often_and_hardly_more(kind: str) -> None:
    shares = covered(KINDS[kind], people=40, epsilon=1.0, studies=STUDIES, seed=11)
    assert all(LOWEST <= share <= 0.99 for share in shares.values())


def test_an_interval_of_half_holds_half_as_often() -> None:
    shares = covered(KINDS["mean"], people=400, epsilon=1.0, studies=1000, seed=7, level=0.5)
    assert shares["mean"] == pytest.approx(0.5, abs=0.05)
