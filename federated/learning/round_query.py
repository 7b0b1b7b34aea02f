"""Training as a question: each person's update of each round, bounded, as integers that are summed.

Nothing that came with the round has to be believed. Whatever weights and rows say, what leaves is
the result of `aggregation.encoding.Rounding`: clipped in L2, rounded at random, and drawn again
until the integers themselves hold to the bound that the price is reckoned with.

A round's vector: the update, then (where the clip adapts) one count of who was within it, then
`canaries` places in which nobody has anything: what comes back there is the round's noise alone,
and `privacy_audit` holds it against the claim.

With `turns` a vector is a combination of a person's last updates (`CarriedRound`), each of them
bounded so once, in the round that it was made in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.accounting import cost_of
from federated.aggregation.encoding import Rounding
from federated.analytics.intervals import noise_moments
from federated.errors import ManifestError, ProtocolError
from federated.learning.at_site import AtSite, verify_installed, verify_torch
from federated.learning.clipping import AdaptiveClip, CountedUpdate, weight_for
from federated.learning.examples import examples_of
from federated.learning.factorisation import (
    EXACT,
    IDENTITY,
    Factors,
    Participation,
    combine,
    full_cohort,
)
from federated.learning.local import update
from federated.learning.models import parameters
from federated.learning.spec import TrainSpec
from federated.learning.split import is_held_out
from federated.learning.strategies import Correlated, FedAvg, FedAvgM, LostInNoise, Strategy
from federated.learning.training_cost import epsilon_so_far, stacked
from federated.learning.turns import Turns
from federated.model import (
    Carried,
    NoisePlan,
    PersonRows,
    PrivacyCost,
    RandomBits,
    Sensitivity,
    Whole,
)

MIN_CANARIES: Final = 20
MAX_CANARIES: Final = 8192
#: What a study has that says nothing: enough to refute claims of ε up to 4 (DESIGN.md).
DEFAULT_CANARIES: Final = 1000
#: Numbers that a person's device keeps of earlier rounds: 256 KiB; a site keeps them of each.
_MOST_CARRIED: Final = 32_768
_PLAIN: Final = FedAvg()


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanUpdate:
    """What a round says: the mean update over the people who took part, with its noise.

    `update`: shape (parameters,), in the weights' own units. `deviation`: standard deviation of the
    noise in each coordinate. `people`: those who took part, a public number and never their data's.
    `unclipped`: the share of people within the clip, blurred by noise, where the clip adapts.
    `lanes`: the noise in the canaries' places, in integers.
    """

    query: str
    update: NDArray[np.float64] = field(repr=False)
    deviation: float
    people: int
    unclipped: float | None = None
    lanes: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainQuery:
    """Training by rounds: a `model.Query`. What it costs is the declaration's alone.

    `strategy` makes the next weights of a round's sum; `adaptive` lets the clip follow a quantile
    (`spec.clip` is the first); `stop` ends early what goes on at random. All three are the
    coordinator's post-processing, and signed with the rest. `turns`: not everybody in every round,
    but by turns, with noise that is correlated over rounds. `at_site`: each site trains by DP-SGD
    and adds the noise itself.
    """

    spec: TrainSpec
    strategy: FedAvg | FedAvgM = _PLAIN
    adaptive: AdaptiveClip | None = None
    canaries: int = 0
    stop: LostInNoise | None = None
    turns: Turns | None = None
    at_site: AtSite | None = None

    def __post_init__(self) -> None:
        """Raises `ManifestError` for a training that cannot be asked."""
        parameters(self.spec)
        if self.canaries and not MIN_CANARIES <= self.canaries <= MAX_CANARIES:
            raise ManifestError(
                f"{self.name}: `canaries` are 0, or {MIN_CANARIES} to {MAX_CANARIES}: of fewer no "
                "audit finds anything."
            )
        if self.strategy.average_from > self.rounds:
            raise ManifestError(f"{self.name}: `average_from` is beyond the last round.")
        if self.turns is not None:
            self._check_turns(self.turns)
        if self.at_site is not None:
            self._check_at_site(self.at_site)

    def _check_at_site(self, at_site: AtSite) -> None:
        others = (self.adaptive, self.stop, self.turns, self.spec.personal, self.canaries or None)
        if any(one is not None for one in others) or self.spec.work.epochs != 1:
            raise ManifestError(
                f"{self.name}: a training at sites has no `adaptive`, `stop`, `turns`, `personal` "
                "and `canaries`, and one epoch: sums carry no noise of their own, and `steps` are "
                "the site's."
            )
        # What cannot be done is refused by what would be.
        at_site.training(self.spec, people=1)

    def _check_turns(self, turns: Turns) -> None:
        if self.adaptive is not None or self.stop is not None:
            raise ManifestError(
                f"{self.name}: with `turns` the clip is fixed and no rule ends the training early: "
                "both read sums whose noise is independent."
            )
        if turns.gap > self.rounds:
            raise ManifestError(
                f"{self.name}: a turn once in {turns.gap} rounds comes to some never in "
                f"{self.rounds}."
            )
        if len(turns.factors) > self.rounds:
            raise ManifestError(f"{self.name}: there are more `factors` than rounds.")
        if -(-len(turns.factors) // turns.gap) * self.dimension > _MOST_CARRIED:
            raise ManifestError(
                f"{self.name}: devices would have to keep more than {_MOST_CARRIED:,} numbers; "
                "take a smaller model, fewer `factors` or a larger `gap`."
            )
        if self.bound >= EXACT:
            raise ManifestError(
                f"{self.name}: combined updates would be too large to take apart exactly; make "
                "`scale` or `factors` smaller."
            )

    @property
    def name(self) -> str:
        """The specification's."""
        return self.spec.name

    @property
    def columns(self) -> frozenset[str]:
        """All that is read: what consent must cover."""
        return self.spec.columns

    @property
    def rounds(self) -> int:
        """As announced; a person pays once for all of them."""
        return self.spec.rounds

    @property
    def rounding(self) -> Rounding:
        """Of the update alone: clip to `spec.clip`, round to whole multiples of 1/`spec.scale`."""
        return Rounding(
            dimension=parameters(self.spec), clip_norm=self.spec.clip, scale=self.spec.scale
        )

    @property
    def counted(self) -> CountedUpdate | None:
        """Update and count together, where the clip adapts."""
        if self.adaptive is None:
            return None
        size, unit = parameters(self.spec), self.spec.clip * self.spec.scale
        return CountedUpdate(dimension=size, unit=unit, weight=weight_for(size, unit=unit))

    @property
    def dimension(self) -> int:
        """Length of the vector that is summed in each round."""
        return parameters(self.spec) + (self.adaptive is not None) + self.canaries

    @property
    def gap(self) -> int:
        """In how many rounds a person brings something new once."""
        return self.participation.gap

    @property
    def noised_by_node(self) -> bool:
        """Whether sites add the noise."""
        return self.at_site is not None

    def verify_here(self) -> None:
        """As `model.Query`: where sites train they need Opacus; networks need torch."""
        if self.at_site is not None:
            verify_installed()
        elif self.spec.kind in {"mlp", "gru"}:
            verify_torch()

    @property
    def least_at_node(self) -> int:
        """Of how many people a node must speak to take part."""
        return 1 if self.at_site is None else self.at_site.least

    def price(self, noise: NoisePlan, *, delta: float, closeness: float) -> PrivacyCost:
        """One release of all rounds' vectors; at sites, of all their steps."""
        if self.at_site is not None:
            return self.at_site.price(self.spec, noise, rounds=self.rounds, delta=delta)
        return cost_of(noise, self.sensitivity, delta=delta, closeness=closeness)

    def epsilon_after(self, done: int, noise: NoisePlan, *, delta: float) -> float:
        """ε at δ of what the first `done` rounds have said: for progress."""
        if done and self.at_site is not None:
            return self.at_site.price(self.spec, noise, rounds=done, delta=delta).epsilon
        return epsilon_so_far(
            noise,
            self.one_round,
            participation=self.participation,
            factors=self.factors,
            done=done,
            delta=delta,
        )

    @property
    def one_round(self) -> Sensitivity:
        """Of one round's integers, rounding included; the same in every round."""
        if self.at_site is not None:
            return self.at_site.sensitivity(self.spec, rounds=1)
        counted = self.counted
        return self.rounding.sensitivity if counted is None else counted.sensitivity

    @property
    def participation(self) -> Participation:
        """How often one person's new updates may enter: in every round, or by turns."""
        if self.turns is None:
            return full_cohort(self.rounds)
        return self.turns.participation(self.rounds)

    @property
    def factors(self) -> Factors:
        """By how much an update counts in the round that it was made in, and in those after it."""
        return IDENTITY if self.turns is None else self.turns.correlation

    @property
    def server(self) -> Strategy:
        """What makes the next weights of a round's noisy sum, and the state between rounds."""
        if self.turns is None:
            return self.strategy
        return Correlated(inner=self.strategy, factors=self.factors)

    @property
    def sensitivity(self) -> Sensitivity:
        """Of all rounds' integers, one below the other."""
        if self.at_site is not None:
            return self.at_site.sensitivity(self.spec, rounds=self.rounds)
        return stacked(self.one_round, participation=self.participation, factors=self.factors)

    @property
    def bound(self) -> int:
        """Largest absolute value of any coordinate of one person's vector, in any round."""
        if self.at_site is not None:
            return self.at_site.bound(self.spec)
        counted = self.counted
        update = self.rounding.bound if counted is None else counted.bound
        return update * self.factors.row_bound(self.participation)

    def at(
        self, weights: NDArray[np.float64], *, clip: float | None = None, index: int = 0
    ) -> TrainRound:
        """The round that starts at these weights, with this clip where it adapts.

        `index`: which of all rounds it is, from 0; it matters where people take turns.
        """
        own = np.array(weights, dtype=np.float64)
        if self.turns is not None:
            return CarriedRound(query=self, weights=own, clip=self.spec.clip, index=index)
        if self.at_site is not None:
            return SiteRound(query=self, weights=own, clip=self.spec.clip)
        return TrainRound(
            query=self,
            weights=own,
            clip=self.spec.clip if clip is None or self.adaptive is None else clip,
        )

    def begin(self, given: bytes, *, index: int = 0) -> TrainRound:
        """As `model.Query`: `given` are the weights, behind the clip where that adapts."""
        numbers = given_numbers(given, parameters(self.spec) + (self.adaptive is not None))
        if self.adaptive is None:
            return self.at(numbers, index=index)
        return self.at(numbers[1:], clip=float(numbers[0]))

    def give(self, weights: NDArray[np.float64], *, clip: float) -> bytes:
        """What `begin` reads."""
        first = np.array([] if self.adaptive is None else [clip])
        return np.concatenate([first, weights]).astype("<f8").tobytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRound:
    """One round: a `model.Contribution`. Unit: the person. Adjacency: zero-out."""

    query: TrainQuery
    weights: NDArray[np.float64] = field(repr=False, compare=False)
    clip: float

    @property
    def spec(self) -> TrainSpec:
        """What is trained."""
        return self.query.spec

    @property
    def name(self) -> str:
        """The specification's."""
        return self.spec.name

    @property
    def columns(self) -> frozenset[str]:
        """All that is read: what consent must cover."""
        return self.spec.columns

    @property
    def rounding(self) -> Rounding:
        """As `TrainQuery.rounding`: the weights change nothing of it."""
        return self.query.rounding

    @property
    def dimension(self) -> int:
        """Length of the vector that is summed."""
        return self.query.dimension

    @property
    def sensitivity(self) -> Sensitivity:
        """Of what `encode` gives, rounding included."""
        return self.query.one_round

    @property
    def bound(self) -> int:
        """Largest absolute value of any coordinate of one person's vector."""
        return self.query.bound

    @property
    def unit(self) -> float:
        """What 1 in the sum stands for, of the weights."""
        return self.clip / (self.spec.clip * self.spec.scale)

    def asks(self, *, study: str, tag: str) -> bool:
        """As `model.Contribution`: everybody but those who are kept for evaluation."""
        return not is_held_out(study=study, tag=tag, fraction=self.spec.held_out)

    def encode(self, rows: PersonRows, random: RandomBits) -> NDArray[np.int64]:
        """One person's update as integers: within `sensitivity` and `bound` whatever rows hold.

        Zeros, and no bit drawn, for a person who has no example or whom the weights lead nowhere.
        """
        vector = np.zeros(self.dimension, dtype=np.int64)
        change = update(self.spec, self.weights, examples_of(self.spec, rows))
        if not change.any():
            return vector
        counted, size = self.query.counted, len(change)
        if counted is None:
            vector[:size] = self.rounding.encode(change, random)
        else:
            vector[: size + 1] = counted.encode(change, clip_norm=self.clip, random=random)
        return vector

    def decode(
        self, total: NDArray[np.int64], *, noise: NoisePlan, people: int, level: float = 0.95
    ) -> MeanUpdate:
        """The mean over `people`, noise and all. `level` is for answers with intervals: unused.

        Raises `ValueError` for a sum of another length or over nobody.
        """
        del level
        if total.shape != (self.dimension,) or people < 1:
            raise ValueError(
                f"{self.name}: expected {self.dimension} sums over at least one person, got "
                f"{total.shape} over {people}."
            )
        size, counted = parameters(self.spec), self.query.counted
        unclipped = None
        if counted is not None:
            counts = counted.decode(total[: size + 1], clip_norm=self.clip, people=people)
            unclipped = counts.unclipped
        return MeanUpdate(
            query=self.name,
            update=np.asarray(total[:size] * (self.unit / people), dtype=np.float64),
            deviation=noise_moments(noise, 1).deviation * self.unit / people,
            people=people,
            unclipped=unclipped,
            lanes=total[self.dimension - self.query.canaries :],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CarriedRound(TrainRound, Carried):
    """A round in which some have their turn: a `model.Carried`.

    `encode` makes the new update of those. What is sent is the combination of a person's updates of
    this and of earlier turns: within `TrainQuery.sensitivity` over all rounds together, whoever
    misses rounds or has lost what they brought (proof: `factorisation`).
    """

    index: int

    def has_turn(self, *, study: str, tag: str) -> bool:
        """As `model.Carried`."""
        turns = self.query.turns
        return turns is not None and turns.has_turn(study=study, tag=tag, index=self.index)

    def combined(self, brought: Mapping[int, NDArray[np.int64]]) -> NDArray[np.int64]:
        """As `model.Carried`: Σ factors[j]·(what was brought j rounds ago)."""
        nothing = np.zeros(self.dimension, dtype=np.int64)
        bands = self.query.factors.bands
        past = [brought.get(self.index - lag, nothing) for lag in range(bands)]
        return combine(past, self.query.factors)

    def needed(self, brought: Mapping[int, NDArray[np.int64]]) -> Mapping[int, NDArray[np.int64]]:
        """As `model.Carried`: what was brought in fewer than `bands` rounds before the next."""
        following, bands = self.index + 1, self.query.factors.bands
        if following >= self.query.rounds:
            return {}
        return {at: one for at, one in brought.items() if 0 < following - at < bands}


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRound(TrainRound, Whole):
    """A round in which each site trains by itself: a `model.Whole`."""

    def whole(
        self, rows: Sequence[PersonRows], *, people: int, noise: NoisePlan, random: RandomBits
    ) -> NDArray[np.int64]:
        """As `model.Whole`: the site's change of the weights, times its people."""
        at_site = self.query.at_site
        if at_site is None:
            raise ValueError("expected a training at sites")
        return at_site.change(
            self.spec, self.weights, rows, people=people, noise=noise, random=random
        )

    def encode(self, rows: PersonRows, random: RandomBits) -> NDArray[np.int64]:  # noqa: ARG002
        """Nothing: no person brings anything by themselves."""
        return np.zeros(self.dimension, dtype=np.int64)


def given_numbers(given: bytes, count: int) -> NDArray[np.float64]:
    """The little-endian doubles that came with a round. Raises `ProtocolError` for another count.

    What they are is not looked at: NaN and infinities make contributions of zeros.
    """
    if len(given) != 8 * count:
        raise ProtocolError(f"Expected {count} numbers with the round, got {len(given)} bytes.")
    return np.frombuffer(given, dtype="<f8").astype(np.float64)
