"""One round of training as a question: each person's update, bounded, as integers that are summed.

Nothing that came with the round has to be believed. Whatever weights and rows say, what leaves is
the result of `aggregation.encoding.Rounding`: clipped in L2, rounded at random, and drawn again
until the integers themselves hold to the bound that the price is reckoned with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.aggregation.encoding import Rounding
from federated.analytics.intervals import noise_moments
from federated.learning.examples import examples_of
from federated.learning.local import update
from federated.learning.models import parameters
from federated.learning.spec import TrainSpec
from federated.model import NoisePlan, PersonRows, RandomBits, Sensitivity

_DIGEST_DOMAIN: Final = b"havengate/weights/v1\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanUpdate:
    """What a round says: the mean update over the people who took part, with its noise.

    `update`: shape (parameters,), in the weights' own units. `deviation`: standard deviation of the
    noise in each coordinate. `people`: those who took part, a public number and never their data's.
    """

    query: str
    update: NDArray[np.float64] = field(repr=False)
    deviation: float
    people: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainQuery:
    """Training by rounds. Sensitivity and bound are the specification's alone."""

    spec: TrainSpec

    @property
    def rounding(self) -> Rounding:
        """Clip to `spec.clip`, round to whole multiples of 1/`spec.scale`."""
        return Rounding(
            dimension=parameters(self.spec), clip_norm=self.spec.clip, scale=self.spec.scale
        )

    def at(self, weights: NDArray[np.float64]) -> TrainRound:
        """The round that starts at these weights."""
        return TrainRound(spec=self.spec, weights=np.array(weights, dtype=np.float64))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRound:
    """A `model.Query` in all but what `decode` gives. Unit: the person. Adjacency: zero-out.

    Whom it is asked of is the node's business (`split`): it trains on whose rows it is given.
    """

    spec: TrainSpec
    weights: NDArray[np.float64] = field(repr=False, compare=False)

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
        return TrainQuery(spec=self.spec).rounding

    @property
    def dimension(self) -> int:
        """Length of the vector that is summed."""
        return self.rounding.dimension

    @property
    def sensitivity(self) -> Sensitivity:
        """Of the integer vector, rounding included."""
        return self.rounding.sensitivity

    @property
    def bound(self) -> int:
        """Largest absolute value of any coordinate of one person's vector."""
        return self.rounding.bound

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, for the round's plan: who has others does not sum with these."""
        return weights_digest(self.weights)

    def encode(self, rows: PersonRows, random: RandomBits) -> NDArray[np.int64]:
        """One person's update as integers: within `sensitivity` and `bound` whatever rows hold.

        Zeros, and no bit drawn, for a person who has no example or whom the weights lead nowhere.
        """
        change = update(self.spec, self.weights, examples_of(self.spec, rows))
        rounding = self.rounding
        if not change.any():
            return np.zeros(rounding.dimension, dtype=np.int64)
        return rounding.encode(change, random)

    def decode(
        self, total: NDArray[np.int64], *, noise: NoisePlan, people: int, level: float
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
        return MeanUpdate(
            query=self.name,
            update=self.rounding.decode(total) / people,
            deviation=noise_moments(noise, 1).deviation / self.spec.scale / people,
            people=people,
        )


def weights_digest(weights: NDArray[np.float64]) -> str:
    """SHA-256, in hex, of the little-endian doubles."""
    return sha256(_DIGEST_DOMAIN + weights.astype("<f8").tobytes()).hexdigest()
