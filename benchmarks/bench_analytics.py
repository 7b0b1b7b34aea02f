"""How far statistics are off at ε = 1, beside OpenDP with a trusted curator, and how often an
interval holds the truth.

`federated.error_ratio_to_opendp.<query>`: root mean square error against the exact statistic of the
same people, ours over OpenDP's; of several estimates the worst ratio. Ours is what decoding gives
from exact sums and planned noise, which is what secure aggregation releases, and pays for its
interval out of the same ε; OpenDP's is the estimate alone, with the number of people public.
`federated.error_ratio_to_exponential.quantiles` is against OpenDP's exponential mechanism instead,
`federated.error_ratio_to_centred_sum.mean` against the least noise that OpenDP can be made to give
if it is public that everybody has a value; `federated.error_ratio_to_centred_sum_and_count.mean`
against the same where it is not, and a count has to be paid for, too.
`federated.interval_coverage.<query>`: share of simulated studies whose 95 % interval holds the
truth; the estimate that is furthest from 95 %.
"""  # noqa: D205 - one sentence that says the question

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks import analytics_opendp as opendp
from benchmarks.harness import Result
from federated.accounting import calibrate
from federated.analytics.association import Association
from federated.analytics.base import BaseQuery
from federated.analytics.conditional import OwnAverageSplit
from federated.analytics.counts import Count, Histogram, bin_of
from federated.analytics.groups import ArmContrast, GroupMeans
from federated.analytics.means import Mean, Variance
from federated.analytics.quantiles import Quantiles
from federated.analytics.quantity import Quantity, known_together
from federated.analytics.trend import WeeklyTrend
from federated.model import NoisePlan, PersonRows
from tests.federated.analytics import data
from tests.federated.analytics.samples import SeededBits
from tests.federated.analytics.simulated import KINDS, Kind, covered, laplace

EPSILON = 1.0
ROUNDS = 5
DRAWS = 200
STUDIES = 1200
COHORT = 500
PEER = "OpenDP, trusted curator, number of people public"
CENTRED = "OpenDP, sum around the middle over a public number of people"
CENTRED_AND_COUNT = "OpenDP, sum around the middle and count, ε shared out"
EXPONENTIAL = "OpenDP, exponential mechanism, ε shared out"
MOOD = Quantity(column="mood", low=-6, high=6)
SLEEP = Quantity(column="sleep_quality", low=1, high=7)
PHQ9 = Quantity(column="phq9_total", low=0, high=27, summary="last")
HOURS = Quantity(column="sleep_hours", low=0, high=14, summary="last")
EDGES = (0.0, 6.0, 7.0, 8.0, 9.0, 14.0)
WEEKS = 3
LOW_MOOD = OwnAverageSplit(name="split", outcome="mood", less_than=1.5, by="sleep_quality", days=21)
SLEEP_AND_MOOD = Association(name="association", x=SLEEP, y=MOOD, spread_x=1.5, spread_y=2, days=21)

type Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A query over people, OpenDP's answer to it, and which of our estimates it compares with."""

    query: BaseQuery
    people: Sequence[PersonRows]
    peer: opendp.Draw
    kept: slice = slice(None)


def run() -> dict[str, Result]:
    """Measure errors, then coverage."""
    results: dict[str, Result] = {}
    for name, make in PAIRS.items():
        pair = make()
        ours, theirs = _errors(pair)
        results[f"federated.error_ratio_to_opendp.{name}"] = _ratio(ours, theirs, PEER)
        if name == "quantiles":
            exponential = _exponential(pair)
            results[f"federated.error_ratio_to_exponential.{name}"] = _ratio(
                ours, exponential, EXPONENTIAL
            )
        if name == "mean":
            least = _rms(_least_mean(pair), _exact(pair))
            results["federated.error_ratio_to_centred_sum.mean"] = _ratio(ours, least, CENTRED)
            counted = _rms(_counted_mean(pair), _exact(pair))
            results["federated.error_ratio_to_centred_sum_and_count.mean"] = _ratio(
                ours, counted, CENTRED_AND_COUNT
            )
    for name, kind in {**KINDS, **_real_kinds()}.items():
        people = len(data.paco()) if name.endswith("_paco") else COHORT
        shares = [_furthest(covered(kind, people=people, epsilon=EPSILON, studies=STUDIES, seed=1))]
        results[f"federated.interval_coverage.{name}"] = Result.of(shares, unit="share")
    return results


def _real_kinds() -> dict[str, Kind]:
    """Studies whose people are drawn from PACO's, days and all."""
    return {"split_paco": _of_paco(LOW_MOOD), "association_paco": _of_paco(SLEEP_AND_MOOD)}


def _of_paco(query: BaseQuery) -> Kind:
    def population(_: np.random.Generator) -> Floats:
        return np.array([query.masses(rows) for rows in data.paco()])

    return Kind(query=query, population=population)


def _ratio(ours: Floats, theirs: Floats, peer: str) -> Result:
    """Ratio by round for the worst estimate; errors have shape (rounds, estimates)."""
    ratios = ours / theirs
    worst = int(np.argmax(np.sqrt((ours**2).mean(axis=0) / (theirs**2).mean(axis=0))))
    return Result.of(ratios[:, worst].tolist(), unit="ratio", peer=peer, peer_rounds=[1.0])


def _furthest(shares: Mapping[str, float]) -> float:
    return max(shares.values(), key=lambda share: abs(share - 0.95))


def _errors(pair: Pair) -> tuple[Floats, Floats]:
    """Root mean square errors by round and estimate: ours, OpenDP's."""
    query, people = pair.query, pair.people
    random = SeededBits(0)
    total = np.sum([query.encode(rows, random) for rows in people], axis=0)
    plan = calibrate("discrete_laplace", query.sensitivity, epsilon=EPSILON)
    exact = _exact(pair)
    noise = np.random.default_rng(1)

    def ours() -> Floats:
        drawn = total + laplace(noise, plan.scale, query.dimension)
        return _values(pair, drawn, plan)

    return _rms(ours, exact), _rms(pair.peer, exact)


def _exact(pair: Pair) -> Floats:
    """The statistic with the same clipping, unrounded and without noise."""
    masses = np.sum([pair.query.masses(rows) for rows in pair.people], axis=0)
    fine = np.asarray(np.rint(masses * pair.query.layout.unit), dtype=np.int64)
    return _values(pair, fine, NoisePlan(mechanism="discrete_laplace", scale=1e-3))


def _values(pair: Pair, total: NDArray[np.int64], noise: NoisePlan) -> Floats:
    answer = pair.query.decode(total, noise=noise, people=len(pair.people), level=0.95)
    return np.array([e.value for e in answer.estimates])[pair.kept]


def _rms(draw: Callable[[], Floats], exact: Floats) -> Floats:
    errors = [[draw() - exact for _ in range(DRAWS)] for _ in range(ROUNDS)]
    return np.asarray(np.sqrt((np.array(errors) ** 2).mean(axis=1)))


def _scaled(of: Quantity, people: Sequence[PersonRows]) -> Floats:
    return np.array([value for rows in people if (value := of.of(rows)) is not None])


def _in_units(of: Quantity, people: Sequence[PersonRows]) -> Floats:
    return of.low + of.width * _scaled(of, people)


def _count() -> Pair:
    people = data.nhanes()
    reached = int((_in_units(PHQ9, people) >= 10).sum())
    query = Count(name="count", of=PHQ9, at_least=10)
    return Pair(query=query, people=people, peer=opendp.count(reached, EPSILON), kept=slice(0, 1))


def _histogram() -> Pair:
    people = data.nhanes()
    query = Histogram(name="histogram", of=PHQ9, edges=(0, 5, 10, 15, 20, 27))
    bins = np.array([bin_of(PHQ9, value, query.edges) for value in _scaled(PHQ9, people)])
    # Whether somebody has data is nobody's business: the whole is the sum of the noisy counts.
    counts = opendp.counts(bins, 5, EPSILON)
    peer = opendp.together(lambda counted: counted / counted.sum(), counts)
    return Pair(query=query, people=people, peer=peer)


def _mean() -> Pair:
    people = data.nhanes()
    peer = opendp.mean(_in_units(PHQ9, people), 0.0, 27.0, EPSILON)
    return Pair(query=Mean(name="mean", of=PHQ9), people=people, peer=peer)


def _least_mean(pair: Pair) -> opendp.Draw:
    whole = np.rint(_in_units(PHQ9, pair.people)).astype(np.int64)
    return opendp.centred_mean(whole, 13, 14, EPSILON)


def _counted_mean(pair: Pair) -> opendp.Draw:
    whole = np.rint(_in_units(PHQ9, pair.people)).astype(np.int64)
    return opendp.together(
        lambda centred, counted: 13 + centred / counted,
        opendp.centred_total(whole, 13, 14, EPSILON / 2),
        opendp.count(len(whole), EPSILON / 2),
    )


def _variance() -> Pair:
    people = data.paco()
    peer = opendp.variance(_in_units(MOOD, people), -6.0, 6.0, EPSILON)
    query = Variance(name="variance", of=MOOD)
    return Pair(query=query, people=people, peer=peer, kept=slice(0, 1))


def _quantiles() -> Pair:
    people = data.paco()
    query = Quantiles(name="quantiles", of=MOOD)
    bins = np.minimum((_scaled(MOOD, people) * query.leaves).astype(np.int64), query.leaves - 1)
    peer = opendp.quantiles(bins, _edges(query), query.at, EPSILON)
    return Pair(query=query, people=people, peer=peer)


def _exponential(pair: Pair) -> Floats:
    query = Quantiles(name="quantiles", of=MOOD)
    values = _in_units(MOOD, pair.people)
    draw = opendp.exponential_quantiles(values, _edges(query), query.at, EPSILON)
    return _rms(draw, _exact(pair))


def _edges(query: Quantiles) -> Floats:
    return np.linspace(query.of.low, query.of.high, query.leaves + 1)


def _association() -> Pair:
    people = data.paco()
    query = SLEEP_AND_MOOD
    masses = np.array([query.masses(rows) for rows in people])
    xx = 1.5 * masses[:, 0]
    yy = masses[:, 1] + masses[:, 2] - masses[:, 0] / 2
    xy = np.sqrt(3) / 2 * (masses[:, 1] - masses[:, 2])
    third = EPSILON / 3

    def combine(xx: Floats, yy: Floats, xy: Floats) -> Floats:
        return np.array([xy[0] / xx[0] * 2 / 1.5, xy[0] / np.sqrt(xx[0] * yy[0])])

    peer = opendp.together(
        combine,
        opendp.total(xx, 0.0, 1.0, third),
        opendp.total(yy, 0.0, 1.0, third),
        opendp.total(xy, -0.5, 0.5, third),
    )
    return Pair(query=query, people=people, peer=peer)


def _split() -> Pair:
    people = data.paco()
    query = LOW_MOOD
    masses = np.array([query.masses(rows) for rows in people])[:, :6].reshape(-1, 2, 3)
    days = masses.sum(axis=2)
    low = masses[:, :, 1] / 2 + masses[:, :, 2]
    parts = [
        opendp.total(part, 0.0, 1.0, EPSILON / 4)
        for part in (low[:, 0], days[:, 0], low[:, 1], days[:, 1])
    ]

    def combine(low0: Floats, days0: Floats, low1: Floats, days1: Floats) -> Floats:
        below, above = low0 / days0, low1 / days1
        return np.concatenate([below, above, below - above])

    return Pair(query=query, people=people, peer=opendp.together(combine, *parts))


def _contrast() -> Pair:
    """Two halves of NHANES by lot stand for the arms of a trial."""
    lot = np.random.default_rng(3).integers(0, 2, 5068)
    people = [
        PersonRows(days=rows.days, values={**rows.values, "arm": np.array([float(arm)])})
        for rows, arm in zip(data.nhanes(), lot, strict=True)
    ]
    values = _in_units(PHQ9, people)
    peer = opendp.together(
        lambda control, treated: np.concatenate([control, treated, treated - control]),
        opendp.mean(values[lot == 0], 0.0, 27.0, EPSILON),
        opendp.mean(values[lot == 1], 0.0, 27.0, EPSILON),
    )
    return Pair(query=ArmContrast(name="contrast", outcome=PHQ9), people=people, peer=peer)


def _groups() -> Pair:
    """Group sizes are not public: half of ε goes to them."""
    people = [rows for rows in data.nhanes() if HOURS.of(rows) is not None]
    query = GroupMeans(name="groups", outcome=PHQ9, by=HOURS, edges=EDGES)
    place = np.array([bin_of(HOURS, value, EDGES) for value in _scaled(HOURS, people)])
    values = _in_units(PHQ9, people)
    bins = len(EDGES) - 1
    totals = [opendp.total(values[place == k], 0.0, 27.0, EPSILON / 2) for k in range(bins)]
    sizes = opendp.counts(place, bins, EPSILON / 2)

    def combine(sizes: Floats, *totals: Floats) -> Floats:
        return np.concatenate(totals) / sizes

    return Pair(query=query, people=people, peer=opendp.together(combine, sizes, *totals))


def _trend() -> Pair:
    """ε shared out over the weeks and the slope; who answered in a week is public to OpenDP."""
    people = data.paco()
    query = WeeklyTrend(name="trend", of=MOOD, weeks=WEEKS, steepest=1.5)
    weekly: list[list[float]] = [[] for _ in range(WEEKS)]
    slopes = []
    for rows in people:
        days, (values,) = known_together(rows, "mood")
        week = (days - days[0]) // 7 if days.size else days
        found = [k for k in range(WEEKS) if (week == k).any()]
        means = np.array([np.clip(values[week == k], -6, 6).mean() for k in found])
        for k, one in zip(found, means, strict=True):
            weekly[k].append(float(one))
        if len(found) > 1:
            centred = np.array(found) - np.mean(found)
            slopes.append(float(np.clip(centred @ means / (centred @ centred), -1.5, 1.5)))
    share = EPSILON / (WEEKS + 1)
    peer = opendp.together(
        lambda *parts: np.concatenate(parts),
        opendp.mean(np.array(slopes), -1.5, 1.5, share),
        *(opendp.mean(np.array(one), -6.0, 6.0, share) for one in weekly),
    )
    return Pair(query=query, people=people, peer=peer)


PAIRS: Mapping[str, Callable[[], Pair]] = {
    "count": _count,
    "histogram": _histogram,
    "mean": _mean,
    "variance": _variance,
    "quantiles": _quantiles,
    "association": _association,
    "split": _split,
    "contrast": _contrast,
    "groups": _groups,
    "trend": _trend,
}
