"""A whole study of training on virtual devices: who is asked, the sums, the noise, the steps.

Lives here: `simulate`, and what it tells. Not here: one round's sum (`vectorised`), the search for
clip, rate and rounds (`choose`), strategies and costs (`learning`), which are the study's own.

For public or made-up people, before anybody is asked. A simulated study is no release: noise comes
from the exact sampler, but off a seed that the caller knows, and the trace says what no study would
(who was clipped, how well held-out people are predicted, both without noise).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from federated.aggregation.bits import SeededBits
from federated.aggregation.noise import sample
from federated.errors import ManifestError
from federated.learning.baselines import Scored
from federated.learning.factorisation import IDENTITY, Factors, Participation
from federated.learning.models import initial, predict
from federated.learning.round_query import TrainQuery
from federated.learning.spec import MAX_ROUNDS, TrainSpec
from federated.learning.split import is_held_out
from federated.learning.strategies import Correlated, FedAvg, Strategy, TrainingState, start
from federated.learning.training_cost import training_cost, training_noise
from federated.model import NoisePlan, PersonRows, PrivacyCost, RandomBits
from federated.simulation.devices import Devices, devices_of
from federated.simulation.vectorised import RoundSum, Vectorised

#: The id by which virtual people are divided, unless the caller names a study.
STUDY: Final = "simulation"
_DOMAIN: Final = b"havengate/simulation/v1\n"

type _Floats = NDArray[np.float64]
type _People = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a whole training may cost each person: ε at δ. Unit: the person, zero-out."""

    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How a training goes.

    `rounds`: the specification's if not given. `cohort`: at most so many devices in a round, taking
    turns, so that everybody has been asked once before anybody is asked again; all of them if not
    given. `gap`: the same, told as how many rounds there are from turn to turn. `absent`: the share
    of those asked who stay away, drawn anew in each round. `copies`: as how many devices each
    person stands. `exact`: sums of the integers that devices would send, rounded at random, rather
    than of real numbers.
    """

    strategy: Strategy = field(default_factory=FedAvg)
    rounds: int | None = None
    cohort: int | None = None
    gap: int | None = None
    absent: float = 0.0
    copies: int = 1
    exact: bool = False

    def __post_init__(self) -> None:
        """Raises `ManifestError` for a training that nobody takes part in."""
        if self.cohort is not None and self.gap is not None:
            raise ManifestError("Turns are told by `cohort` or by `gap`, not by both.")
        given = (one for one in (self.cohort, self.gap) if one is not None)
        counts = (self.rounds or 1, *given, self.copies)
        if min(counts) < 1 or counts[0] > MAX_ROUNDS or not 0 <= self.absent < 1:
            raise ManifestError(
                f"A training has 1 to {MAX_ROUNDS} rounds, a cohort and copies of 1 or more, and "
                "less than all people absent."
            )

    @property
    def factors(self) -> Factors:
        """How rounds are correlated."""
        return self.strategy.factors if isinstance(self.strategy, Correlated) else IDENTITY


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One round as the trace has it. `people` took part; `clipped` and `silent` as in `RoundSum`.

    `score`: AUC of held-out people's examples for a class, minus their mean absolute error in the
    label's unit for a number: higher is better. NaN if nobody is held out or it was not asked for.
    """

    people: int
    silent: int
    clipped: int
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What a simulated training ends with. `weights`: those that would be released.

    `noise`: of each round's sum, and `cost`: of all rounds together; none without noise.
    """

    weights: NDArray[np.float64] = field(repr=False)
    state: TrainingState = field(repr=False)
    noise: NoisePlan | None
    cost: PrivacyCost | None
    participation: Participation
    trace: tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Population:
    """Virtual people. `train` and `held_out` are places in `devices`."""

    spec: TrainSpec
    devices: Devices
    train: NDArray[np.int64] = field(repr=False)
    held_out: NDArray[np.int64] = field(repr=False)

    def score(self, weights: _Floats) -> float:
        """Of the held-out people, without noise (`Step.score`)."""
        if not len(self.held_out):
            return math.nan
        held = self.devices.among(self.held_out)
        x, y = np.asarray(held.x, dtype=np.float64), np.asarray(held.y, dtype=np.float64)
        found = Scored(scores=predict(self.spec, weights, x), truth=y)
        if self.spec.label.is_class:
            return found.auc
        return -found.mae(self.spec) if len(y) else math.nan


class Summing(Protocol):
    """Where a round's sum comes from: this process (`Here`), or others (`flower`)."""

    def __call__(
        self, weights: NDArray[np.float64], asked: NDArray[np.int64], random: RandomBits | None
    ) -> RoundSum:
        """Of the people at these places; `random` where it is to be exact."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """Sums made in this process."""

    spec: TrainSpec
    devices: Devices
    backend: Vectorised = field(default_factory=Vectorised)

    def __call__(
        self, weights: NDArray[np.float64], asked: NDArray[np.int64], random: RandomBits | None
    ) -> RoundSum:
        """As `Summing`."""
        if random is None:
            return self.backend.round_sum(self.spec, weights, self.devices, asked)
        return self.backend.exact_sum(self.spec, weights, self.devices, asked, random)


def divided(
    spec: TrainSpec, people: Sequence[PersonRows] | Devices, *, study: str = STUDY
) -> Population:
    """Who is trained on and who is held out, by the rule that nodes follow (`learning.split`).

    A virtual person's tag is their place. With the same `study` the division is the same.
    """
    devices = people if isinstance(people, Devices) else devices_of(spec, people)
    held = np.array(
        [
            is_held_out(study=study, tag=f"virtual-{place}", fraction=spec.held_out)
            for place in range(len(devices))
        ],
        dtype=bool,
    )
    return Population(
        spec=spec, devices=devices, train=np.flatnonzero(~held), held_out=np.flatnonzero(held)
    )


def simulate(
    population: Population,
    course: Course,
    *,
    noise: Target | NoisePlan | None,
    seed: bytes,
    summing: Summing | None = None,
    judged: bool = True,
    delta: float | None = None,
    begin: NDArray[np.float64] | None = None,
) -> Simulated:
    """Run a training from its first weights to its last.

    `noise`: what it may cost, from which the noise of each round follows as in a study
    (`training_cost`); or the noise itself, priced at `delta` if that is given; or none. The same
    `seed` gives the same course, whatever the backend, up to floating tolerance. `judged`: score
    held-out people after each round. `begin`: public weights to start at, instead of the model's
    own. Raises `ManifestError` if nobody can be trained on, `AccountingError` for noise or a cost
    that cannot be had.
    """
    spec = population.spec
    groups = _groups(population.train, course, seed)
    rounds = course.rounds or spec.rounds
    rule = Participation(rounds=rounds, most=-(-rounds // len(groups)), gap=len(groups))
    update = TrainQuery(spec=spec).rounding.sensitivity
    if isinstance(noise, Target):
        delta = noise.delta
        noise = training_noise(
            update, participation=rule, factors=course.factors, epsilon=noise.epsilon, delta=delta
        )
    cost = None
    if noise is not None and delta is not None:
        cost = training_cost(noise, update, participation=rule, factors=course.factors, delta=delta)
    work = summing or Here(spec=spec, devices=population.devices)
    run = _Run(course=course, noise=noise, seed=seed, summing=work)
    first = initial(spec, seed=seed) if begin is None else begin
    state, trace = start(first, clip=spec.clip), []
    for asked in _asked(groups, course, rounds, seed):
        state, found = run.step(state, asked, unit=1 / spec.scale)
        trace.append(
            Step(
                people=found.people,
                silent=found.silent,
                clipped=found.clipped,
                score=population.score(state.released) if judged else math.nan,
            )
        )
    return Simulated(
        weights=state.released,
        state=state,
        noise=noise,
        cost=cost,
        participation=rule,
        trace=tuple(trace),
    )


class _Run:
    """The rounds of one training, with what devices and sites remember of earlier ones."""

    def __init__(
        self, *, course: Course, noise: NoisePlan | None, seed: bytes, summing: Summing
    ) -> None:
        self._course = course
        self._noise = noise
        self._summing = summing
        self._rounding = _bits(seed, b"rounding") if course.exact else None
        self._bits = _bits(seed, b"noise")
        self._past: list[NDArray[np.int64] | NDArray[np.float64]] = []

    def step(
        self, state: TrainingState, asked: _People, *, unit: float
    ) -> tuple[TrainingState, RoundSum]:
        """One round more: sum, combination, noise, step."""
        strategy, factors = self._course.strategy, self._course.factors
        found = self._summing(state.weights, asked, self._rounding)
        self._past = [found.total, *self._past][: factors.bands]
        if not found.people:
            # A round without people has no sum; what was correlated with it says so.
            lost = strategy.lost(state) if isinstance(strategy, Correlated) else state
            return lost, found
        total = np.zeros_like(found.total)
        for factor, one in zip(factors.coefficients, self._past, strict=False):
            total += factor * one
        if self._noise is not None:
            total = total + sample(total.size, plan=self._noise, random=self._bits)
        return strategy.step(state, total, people=found.people, unit=unit), found


def _groups(train: _People, course: Course, seed: bytes) -> list[_People]:
    """Who takes part together: all at once, or by turns in an order that the seed draws."""
    people = np.tile(train, course.copies)
    if not len(people):
        raise ManifestError("Nobody is left to train on; declare a smaller `held_out`.")
    turns = course.gap or 1
    if course.cohort is not None:
        turns = -(-len(people) // course.cohort)
    if turns > len(people):
        raise ManifestError(f"{len(people)} people to train on are too few for {turns} turns.")
    if turns == 1:
        return [people]
    return np.array_split(_generator(seed, b"turns").permutation(people), turns)


def _asked(
    groups: Sequence[_People], course: Course, rounds: int, seed: bytes
) -> Iterator[_People]:
    """Who takes part in each round."""
    random = _generator(seed, b"absent")
    for number in range(rounds):
        group = groups[number % len(groups)]
        yield group[random.random(len(group)) >= course.absent] if course.absent else group


def _bits(seed: bytes, label: bytes) -> SeededBits:
    return SeededBits(sha256(_DOMAIN + seed).digest(), label)


def _generator(seed: bytes, label: bytes) -> np.random.Generator:
    return np.random.default_rng(_bits(seed, label).bits(128))
