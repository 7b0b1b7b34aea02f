"""What a training would come to, on public people, before anybody is asked: pure simulation.

Lives here: one training beside what a sceptic compares it with (`try_out`), and the search for
clip, rate and rounds (`choose`). Not here: the simulation itself (`federated.simulation`).

For public or made-up people only. Trying things out on private people would be a release each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.analytics.intervals import carried
from federated.errors import ManifestError
from federated.learning.baselines import Scored, centralised_on, common, last_value, own_mean
from federated.learning.models import predict
from federated.learning.plan import plan_training
from federated.learning.round_query import TrainQuery
from federated.learning.spec import Examples, TrainSpec
from federated.model import NoisePlan, PersonRows
from federated.research.models import Model
from federated.research.show import Table
from federated.rounds import CLOSENESS
from federated.simulation.choose import Choice, Grid
from federated.simulation.choose import choose as choose_among
from federated.simulation.devices import Devices, devices_of
from federated.simulation.training import Course, Population, Target, divided, simulate

STUDY: Final = "the study"
CURATOR: Final = "one trusted curator, the same ε"
CENTRALISED: Final = "all rows in one place, no privacy"
OWN_MEAN: Final = "the person's own mean"
LAST_VALUE: Final = "the person's last value"
_BEST_OF_MANY: Final = (
    "Differences below the spread over repeats say little, and the best of many looks a little "
    "better than it is: judge it on other people."
)
#: Gradient descent without privacy, until little changes any more.
_STEPS: Final = 500

type _Scores = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """How a training did on people held out, beside others. A notebook shows it as a table.

    `scores`: for each way, one figure for each repeat, over all held-out examples. `past`: the same
    over those examples alone that have a past (labels of the person's earlier days), with the own
    mean and the last value; empty where nobody has one. Figure: AUC (higher is better) for a class,
    mean absolute error in the label's unit (lower is better) for a number. `model`: of the last
    repeat, from public people.
    """

    query: TrainQuery
    epsilon: float
    delta: float
    noise: NoisePlan
    people: int
    scores: _Scores = field(repr=False)
    past: _Scores = field(repr=False)
    model: Model = field(repr=False)

    @property
    def figure(self) -> str:
        """What `scores` are."""
        return "AUC" if self.query.spec.label.is_class else "mean absolute error"

    def mean(self, way: str = STUDY) -> float:
        """Over repeats."""
        return float(np.mean(self.scores[way]))

    def spread(self, way: str = STUDY) -> float:
        """Standard deviation over repeats: other people held out, other noise. NaN for one."""
        return _spread(self.scores[way])

    @property
    def table(self) -> Table:
        """A line for each way."""
        rows = [(way, "all held out", *_told(found)) for way, found in self.scores.items()]
        rows += [(way, "days with a past", *_told(found)) for way, found in self.past.items()]
        note = (
            f"{self.people:,} people learned from, others held out. Mean of "
            f"{len(self.scores[STUDY])} repeats; spread: standard deviation over repeats. Unit of "
            "ε: the person, zero-out. Simulated on public people: it says nothing of people unlike "
            "these."
        )
        return Table(
            title=f"{self.query.name} at ε = {self.epsilon:g}, δ = {self.delta:.1g}",
            columns=("how", "examples", self.figure, "spread"),
            rows=tuple(rows),
            notes=(note,),
        )

    def __str__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def try_out(
    query: TrainQuery,
    people: Sequence[PersonRows],
    *,
    epsilon: float,
    delta: float,
    repeats: int = 3,
    seed: bytes = b"try-out",
    nodes: int = 4,
    colluding: int = 1,
    copies: int = 1,
) -> Tried:
    """A simulated study on public people, `repeats` times, beside what a sceptic compares it with.

    In each repeat people are divided anew by the rule of `learning.split` (`spec.held_out`), and
    noise is drawn anew: the study's own plan, with the part that `colluding` of `nodes` add on top;
    the curator's with neither that nor the margin for closeness. Everybody takes part in every
    round, or has every turn. `copies`: as how many each person counts, where the study will have
    more people than there are public ones. The same `seed` gives the same figures. `query.stop` is
    not followed.

    Raises `ManifestError` for what is not simulated (a clip that adapts, a personal head, nobody
    held out or nobody to learn from), `AccountingError` for noise that cannot be had.
    """
    _verify_simulated(query)
    if repeats < 1 or not 0 <= colluding < nodes:
        raise ManifestError("There is one repeat or more, and fewer colluding nodes than nodes.")
    spec = query.spec
    noise = plan_training(
        query, epsilon=epsilon, delta=delta, people=max(len(people), 1),
        closeness=CLOSENESS * query.dimension * query.rounds,
    ).noise  # fmt: skip
    louder = carried(noise, nodes / (nodes - colluding))
    target = Target(epsilon=epsilon, delta=delta)
    devices, course = devices_of(spec, people), _course(query, copies)
    scores: dict[str, list[float]] = {}
    past: dict[str, list[float]] = {}
    for number in range(repeats):
        own = seed + b"/%d" % number
        population = _divided(query, devices, study=own.hex())
        weights = _trained(population, course, louder=louder, target=target, seed=own)
        judged = {way: _judged(population, one) for way, one in weights.items()}
        held_out = [people[place] for place in population.held_out]
        for kept, ways in ((scores, judged), (past, _with_past(query, judged, held_out))):
            for way, found in ways.items():
                kept.setdefault(way, []).append(_figure(query, found))
    return Tried(
        query=query,
        epsilon=epsilon,
        delta=delta,
        noise=noise,
        people=len(population.train),
        scores={way: np.array(found) for way, found in scores.items()},
        past={way: np.array(found) for way, found in past.items()},
        model=Model(query=query, weights=weights[STUDY], epsilon=epsilon, delta=delta),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Every combination that was tried, the best first. A notebook shows it as a table."""

    asked: TrainQuery
    tried: tuple[Choice, ...]

    @property
    def query(self) -> TrainQuery:
        """The question with the best combination."""
        return replace(self.asked, spec=self.tried[0].spec)

    @property
    def table(self) -> Table:
        """A line for each combination."""
        rows = tuple(
            (
                f"{one.spec.clip:g}",
                f"{one.spec.work.rate:g}",
                str(one.spec.rounds),
                f"{abs(one.score):.3f}",
                f"{_spread(one.scores):.3f}",
                f"{one.clipped:.0%}",
            )
            for one in self.tried
        )
        figure = "AUC" if self.asked.spec.label.is_class else "mean absolute error"
        return Table(
            title=f"{self.asked.name}: clip, rate and rounds",
            columns=("clip", "rate", "rounds", figure, "spread", "updates clipped"),
            rows=rows,
            notes=(_BEST_OF_MANY,),
        )

    def __str__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def choose(
    query: TrainQuery,
    people: Sequence[PersonRows],
    *,
    clips: Sequence[float],
    rates: Sequence[float],
    rounds: Sequence[int],
    epsilon: float,
    delta: float,
    repeats: int = 3,
    seed: bytes = b"choose",
    copies: int = 1,
) -> Choices:
    """Every combination simulated at the same ε and δ on public people (`simulation.choose`).

    `copies` as in `try_out`: what is best depends on how many people there are. Raises as that.
    """
    _verify_simulated(query)
    if repeats < 1 or not (len(clips) and len(rates) and len(rounds)):
        raise ManifestError("There is one repeat or more, and one clip, rate and number of rounds.")
    for count in rounds:
        # A strategy may not fit every number of rounds: better said before than after the work.
        replace(query, spec=replace(query.spec, rounds=int(count)))
    found = choose_among(
        query.spec,
        people,
        # Numbers of NumPy would not stand in a study's file as they are.
        Grid(
            clips=[float(one) for one in clips],
            rates=[float(one) for one in rates],
            rounds=[int(one) for one in rounds],
        ),
        target=Target(epsilon=epsilon, delta=delta),
        course=_course(query, copies),
        seeds=[seed + b"/%d" % number for number in range(repeats)],
    )
    return Choices(asked=query, tried=found)


def _verify_simulated(query: TrainQuery) -> None:
    if any(one is not None for one in (query.adaptive, query.spec.personal, query.at_site)):
        raise ManifestError(
            f"{query.name}: a clip that adapts, a personal head and training at sites are not "
            "simulated here: leave `adaptive`, `personal` and `at_site` out to try the rest."
        )
    if not query.spec.held_out > 0:
        raise ManifestError(f"{query.name}: nobody is held out, so nothing can be judged.")


def _course(query: TrainQuery, copies: int) -> Course:
    gap = None if query.turns is None else query.turns.gap
    return Course(strategy=query.server, gap=gap, copies=copies)


def _divided(query: TrainQuery, devices: Devices, *, study: str) -> Population:
    found = divided(query.spec, devices, study=study)
    if not len(found.train) or not devices.counts[found.held_out].sum():
        raise ManifestError(f"{query.name}: {len(devices)} people are too few to hold some out.")
    return found


def _trained(
    population: Population, course: Course, *, louder: NoisePlan, target: Target, seed: bytes
) -> Mapping[str, NDArray[np.float64]]:
    """The weights of each way of training."""
    spec = population.spec
    study = simulate(population, course, noise=louder, seed=seed, judged=False)
    curator = simulate(population, course, noise=target, seed=seed + b"/curator", judged=False)
    pooled = _examples(population.devices, population.train)
    central = centralised_on(spec, pooled, steps=_STEPS, rate=_steady_rate(spec, pooled))
    return {STUDY: study.weights, CURATOR: curator.weights, CENTRALISED: central}


def _steady_rate(spec: TrainSpec, examples: Examples) -> float:
    """A rate at which descent over everybody cannot diverge, where the loss is convex.

    One over the largest curvature: of the log loss a quarter of the inputs' second moments', of
    the squared error twice that. Other models go at the rate that they were declared with.
    """
    if spec.kind not in {"logistic", "linear"}:
        return spec.work.rate
    x = np.column_stack([examples.x, np.ones(len(examples.y))])
    steepest = float(np.linalg.eigvalsh(x.T @ x / max(len(x), 1))[-1])
    return 1 / ((0.25 if spec.kind == "logistic" else 2.0) * steepest + spec.work.l2)


def _examples(devices: Devices, people: NDArray[np.int64]) -> Examples:
    own = devices.among(people)
    return Examples(x=np.asarray(own.x), y=np.asarray(own.y))


def _judged(population: Population, weights: NDArray[np.float64]) -> Scored:
    held = _examples(population.devices, population.held_out)
    return Scored(scores=predict(population.spec, weights, held.x), truth=held.y)


def _with_past(
    query: TrainQuery, judged: Mapping[str, Scored], held_out: Sequence[PersonRows]
) -> Mapping[str, Scored]:
    """All ways on the examples that each has a prediction for; nothing where nobody has a past."""
    spec = query.spec
    if spec.per == "person":
        return {}
    ways = {
        **judged,
        OWN_MEAN: own_mean(spec, held_out),
        LAST_VALUE: last_value(spec, held_out),
    }
    same = common(*ways.values())
    return dict(zip(ways, same, strict=True)) if len(same[0].truth) else {}


def _figure(query: TrainQuery, found: Scored) -> float:
    return found.auc if query.spec.label.is_class else found.mae(query.spec)


def _told(found: NDArray[np.float64]) -> tuple[str, str]:
    return f"{found.mean():.3f}", f"{_spread(found):.3f}"


def _spread(found: NDArray[np.float64]) -> float:
    return float(found.std(ddof=1)) if len(found) > 1 else float("nan")
