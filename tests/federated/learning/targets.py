"""Whole trainings on real people, fast enough to be repeated: the targets, their data, the rounds.

What stands here is what a deployment does, for everybody at once: each person's update as
`learning.local` makes it, `Rounding`, and the noise that the sites' shares leave in the sum. Only
logistic and linear models; `test_targets.py` holds the batched work to the device's own code.

A fifth of the people of each data set plays the public data on which clip, rate and rounds were
chosen (`benchmarks.learning_choice`); every figure is of the other four fifths, in five folds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.aggregation.bits import SeededBits
from federated.aggregation.encoding import Rounding, unscale
from federated.aggregation.noise import sample
from federated.aggregation.plan import default_colluding, default_threshold
from federated.aggregation.schedule import NoiseSchedule, noise_schedule
from federated.learning.baselines import Scored
from federated.learning.factorisation import full_cohort
from federated.learning.models import decayed, gradient, initial, parameters, predict, sigmoid
from federated.learning.round_query import TrainQuery
from federated.learning.spec import Examples, Feature, Label, TrainSpec
from federated.learning.strategies import FedAvg, FedAvgM, start
from federated.learning.training_cost import training_cost, training_noise
from federated.model import NoisePlan, PersonRows, PrivacyCost, RandomBits
from federated.rounds import CLOSENESS
from tests.federated.analytics import data
from tests.federated.learning import people

type _Floats = NDArray[np.float64]

#: Sites that add up their people's updates, as in the demo; one may be lost, one may tell.
SITES: Final = 4
FOLDS: Final = 5
#: Integers to which the clip is scaled: rounding then adds 0.02 % to the sensitivity.
UNITS: Final = 4096.0
_PUBLIC_SEED: Final = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Everybody's examples in one array; `starts[i]` is where person i's begin. All have some.

    `x` has a last column of ones for the bias.
    """

    x: _Floats = field(repr=False)
    y: _Floats = field(repr=False)
    owner: NDArray[np.intp] = field(repr=False)
    starts: NDArray[np.intp] = field(repr=False)
    share: _Floats = field(repr=False)


def batch_of(everybody: Sequence[Examples]) -> Batch:
    """People without an example are left out: they would send zeros."""
    each = [one for one in everybody if len(one.y)]
    counts = np.array([len(one.y) for one in each])
    x = np.concatenate([one.x for one in each])
    owner = np.repeat(np.arange(len(each)), counts)
    return Batch(
        x=np.column_stack([x, np.ones(len(x))]),
        y=np.concatenate([one.y for one in each]),
        owner=owner,
        starts=np.concatenate(([0], np.cumsum(counts)[:-1])),
        share=1 / counts[owner],
    )


def updates(spec: TrainSpec, batch: Batch, weights: _Floats) -> _Floats:
    """Each person's unclipped update, as `learning.local.update`: shape (people, parameters)."""
    at = np.tile(weights, (len(batch.starts), 1))
    decay = spec.work.l2 * decayed(spec)
    for _ in range(spec.work.epochs):
        outputs = np.einsum("nd,nd->n", batch.x, at[batch.owner])
        residuals = sigmoid(outputs) - batch.y if spec.label.is_class else 2 * (outputs - batch.y)
        slopes = np.add.reduceat(batch.x * (residuals * batch.share)[:, None], batch.starts)
        at -= spec.work.rate * (slopes + decay * at)
    return at - weights


def rounded(rounding: Rounding, found: _Floats, random: np.random.Generator) -> NDArray[np.int64]:
    """Clipped, scaled and rounded row by row, as `Rounding.encode`: within its bound."""
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    scaled = found * (
        rounding.scale * np.minimum(1, rounding.clip_norm / np.maximum(lengths, 1e-300))
    )
    whole = np.zeros(found.shape, dtype=np.int64)
    left = np.arange(len(found))
    while left.size:
        floor = np.floor(scaled[left])
        drawn = (floor + (random.random(floor.shape) < scaled[left] - floor)).astype(np.int64)
        whole[left] = drawn
        left = left[np.einsum("nd,nd->n", drawn, drawn) > rounding.squared_bound]
    return whole


def noise_of(spec: TrainSpec, *, epsilon: float, delta: float) -> NoisePlan:
    """Each round's noise for all rounds at (ε, δ), what the sites' shares lack of it counted in."""
    return training_noise(
        TrainQuery(spec=spec).rounding.sensitivity,
        participation=full_cohort(spec.rounds),
        epsilon=epsilon,
        delta=delta,
        closeness=CLOSENESS * parameters(spec),
    )


def cost(spec: TrainSpec, noise: NoisePlan, *, delta: float) -> PrivacyCost:
    """What the whole training costs each person: unit person, adjacency zero-out."""
    return training_cost(
        noise,
        TrainQuery(spec=spec).rounding.sensitivity,
        participation=full_cohort(spec.rounds),
        delta=delta,
        closeness=CLOSENESS * parameters(spec),
    )


def shared_noise(plan: NoisePlan) -> NoiseSchedule:
    """How the sites share a round's noise: the defaults of a study for so many."""
    return noise_schedule(
        plan,
        nodes=SITES,
        minimum_survivors=default_threshold(SITES),
        colluding=default_colluding(SITES),
    )


def left_in_sum(schedule: NoiseSchedule, dimension: int, random: RandomBits) -> NDArray[np.int64]:
    """What all sites' shares leave in a sum, in granular units: the exact sampler's."""
    kept = (-1, *sorted(schedule.kept[0]))
    total = np.zeros(dimension, dtype=np.int64)
    for _ in range(schedule.nodes):
        for part in kept:
            total += schedule.share(part, dimension=dimension, random=random)
    return total


def trained(
    spec: TrainSpec,
    everybody: Sequence[Examples],
    *,
    strategy: FedAvg | FedAvgM,
    noise: NoisePlan | None,
    seed: int,
    curator: bool = False,
) -> _Floats:
    """Weights after `spec.rounds` rounds of everybody under secure aggregation.

    `curator`: one party adds the planned noise itself and no more. No noise at all if None.
    """
    batch, rounding = batch_of(everybody), TrainQuery(spec=spec).rounding
    random = np.random.default_rng(seed)
    bits = SeededBits(seed.to_bytes(32), b"targets")
    state = start(initial(spec, seed=b""), clip=spec.clip)
    schedule = None if noise is None or curator else shared_noise(noise)
    for _ in range(spec.rounds):
        total = rounded(rounding, updates(spec, batch, state.weights), random).sum(axis=0)
        if schedule is not None:
            total = total * schedule.granularity + left_in_sum(schedule, len(total), bits)
            total = unscale(total, schedule.granularity)
        elif noise is not None:
            total = total + sample(len(total), plan=noise, random=bits)
        state = strategy.step(state, total, people=len(everybody), unit=1 / spec.scale)
    return state.released


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is to be reached, on whom, by which specification.

    `momentum` and `average_from`: the server's step. `descent`: steps and rate without privacy.
    """

    spec: TrainSpec
    everybody: Callable[[], Sequence[PersonRows]]
    delta: float
    momentum: float = 0.0
    average_from: int = 0
    descent: tuple[int, float] = (150, 2.0)

    @property
    def strategy(self) -> FedAvg | FedAvgM:
        """The server's step."""
        if self.momentum:
            return FedAvgM(momentum=self.momentum, average_from=self.average_from)
        return FedAvg(average_from=self.average_from)

    def score(self, weights: _Floats, held_out: Sequence[Examples]) -> float:
        """AUC for a class, mean absolute error in the label's unit for a number."""
        both = joined(held_out)
        found = Scored(scores=predict(self.spec, weights, both.x), truth=both.y)
        return found.auc if self.spec.label.is_class else found.mae(self.spec)

    def with_choice(self, choice: Choice) -> Target:
        """The same target with another clip, rate, rounds and step."""
        work = replace(self.spec.work, rate=choice.rate)
        clip = choice.slope * choice.rate
        return replace(
            self,
            spec=replace(self.spec, work=work, clip=clip, scale=UNITS / clip, rounds=choice.rounds),
            momentum=choice.momentum,
            average_from=choice.rounds // 2,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Hyper-parameters. `slope`: the norm of a person's gradient above which it is cut."""

    slope: float
    rate: float
    rounds: int
    momentum: float = 0.0


def joined(people: Sequence[Examples]) -> Examples:
    """All their examples in one."""
    return Examples(
        x=np.concatenate([one.x for one in people]), y=np.concatenate([one.y for one in people])
    )


def split(target: Target) -> tuple[list[PersonRows], list[PersonRows]]:
    """Who plays the public data, and who is studied: drawn once, the same in every run."""
    everybody = target.everybody()
    order = np.random.default_rng(_PUBLIC_SEED).permutation(len(everybody))
    first = len(everybody) // FOLDS
    return [everybody[i] for i in order[:first]], [everybody[i] for i in order[first:]]


def folds(count: int, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Who is learned from and who is held out, five times."""
    for chosen in people.folds(count, parts=FOLDS, seed=seed):
        yield sorted(set(range(count)) - set(chosen.tolist())), chosen.tolist()


def private_score(
    target: Target,
    studied: Sequence[Examples],
    *,
    epsilon: float,
    seed: int,
    curator: bool = False,
    judged: Sequence[Examples] | None = None,
) -> float:
    """Mean over five folds of what the held-out people's score is, each fold with its own noise.

    `judged`: what of each person is scored, if not all of their examples.
    """
    noise = noise_of(target.spec, epsilon=epsilon, delta=target.delta)
    judged = studied if judged is None else judged
    found = []
    for fold, (learn, out) in enumerate(folds(len(studied), seed)):
        weights = trained(
            target.spec,
            [studied[i] for i in learn],
            strategy=target.strategy,
            noise=noise,
            seed=FOLDS * seed + fold,
            curator=curator,
        )
        found.append(target.score(weights, [judged[i] for i in out]))
    return float(np.mean(found))


def descended(target: Target, learn: Sequence[Examples]) -> _Floats:
    """Weights of plain descent over everybody in one place, as `baselines.centralised`."""
    both, weights = joined(learn), initial(target.spec, seed=b"")
    steps, rate = target.descent
    for _ in range(steps):
        weights = weights - rate * gradient(target.spec, weights, both)
    return weights


PHQ9: Final = Target(spec=people.NHANES, everybody=people.nhanes, delta=1 / 50_680).with_choice(
    Choice(slope=3.0, rate=6.0, rounds=10)
)
LOW_MOOD: Final = Target(spec=people.PACO, everybody=people.paco, delta=1 / 5_620).with_choice(
    Choice(slope=0.3, rate=4.0, rounds=6)
)
NEXT_MOOD: Final = Target(
    spec=TrainSpec(
        name="next_mood",
        kind="linear",
        features=(
            Feature(column="mood", low=-5, high=5),
            # Today less the days before: with today's mood, this is the own mean.
            Feature(column="mood", low=-3, high=3, within=True),
            Feature(column="mood", low=-5, high=5, lag=1),
        ),
        label=Label(column="mood", low=-5, high=5, ahead=1),
    ),
    everybody=data.scharbert,
    delta=1 / 27_910,
    descent=(1000, 0.4),
).with_choice(Choice(slope=0.5, rate=0.5, rounds=30, momentum=0.9))
