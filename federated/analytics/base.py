"""What every query has: a name, a minimum cohort, a layout; and the two directions of a round."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.accounting import cost_of
from federated.analytics.intervals import NoiseMoments, noise_moments
from federated.analytics.layout import Layout
from federated.errors import CohortError, ManifestError, ProtocolError
from federated.model import (
    Answer,
    Contribution,
    Estimate,
    NoisePlan,
    PersonRows,
    PrivacyCost,
    RandomBits,
    Sensitivity,
)

#: Below this no interval here has been shown to cover what it says.
SMALLEST_COHORT: Final = 20
_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,63}").fullmatch
_LOWEST_LEVEL: Final = 0.5
_HIGHEST_LEVEL: Final = 0.999


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question put to noisy masses: what an estimator is given."""

    masses: NDArray[np.float64]
    noise: NoiseMoments
    people: int
    level: float


class OneRelease:
    """What of a `model.Query` is the same for all that one release of noisy sums answers."""

    __slots__ = ()

    @property
    @abstractmethod
    def sensitivity(self) -> Sensitivity:
        """Of a person's vector."""

    @property
    def gap(self) -> int:
        """Everybody brings something."""
        return 1

    @property
    def least_at_node(self) -> int:
        """A node may speak for one person."""
        return 1

    @property
    def noised_by_node(self) -> bool:
        """Sums carry what the nodes add together."""
        return False

    def verify_here(self) -> None:
        """Nothing is needed that a node has not."""

    def price(self, noise: NoisePlan, *, delta: float, closeness: float) -> PrivacyCost:
        """One release of `sensitivity`."""
        return cost_of(noise, self.sensitivity, delta=delta, closeness=closeness)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseQuery(OneRelease, ABC):
    """A `model.Statistic` made of masses. Subclasses say the masses and the estimates.

    `minimum_cohort`: with fewer people there is no answer; never below `SMALLEST_COHORT`.
    """

    name: str
    minimum_cohort: int = SMALLEST_COHORT

    def __post_init__(self) -> None:
        """Raises `ManifestError` for a declaration that cannot be asked."""
        if not _NAME(self.name):
            raise ManifestError("A query's `name` is 1 to 64 of a-z, 0-9, _ and -.")
        if self.minimum_cohort < SMALLEST_COHORT:
            raise ManifestError(
                f"{self.name}: `minimum_cohort` must be at least {SMALLEST_COHORT}: with fewer "
                "people no interval is known to hold."
            )
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Refuse what cannot be asked. Raises `ManifestError`."""

    @property
    @abstractmethod
    def columns(self) -> frozenset[str]:
        """Columns of the daily table that are read."""

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """How the vector is cut, and what each block may hold."""

    @abstractmethod
    def masses(self, rows: PersonRows) -> NDArray[np.float64]:
        """What a person contributes, shape (dimension,); zeros if they have nothing to say."""

    @abstractmethod
    def estimates(self, asked: Asked) -> list[Estimate]:
        """Estimates with intervals from the noisy sums."""

    @abstractmethod
    def cautions(self) -> tuple[str, ...]:
        """What the answer cannot say, and what clipping can bias."""

    @abstractmethod
    def typical(self, people: int) -> NDArray[np.float64]:
        """Sums of masses of an unremarkable cohort, to plan with. Reads nobody's data."""

    @property
    def dimension(self) -> int:
        """Length of the vector that is summed."""
        return self.layout.dimension

    @property
    def sensitivity(self) -> Sensitivity:
        """Of the integer vector: see `Layout`."""
        return self.layout.sensitivity

    @property
    def bound(self) -> int:
        """Largest absolute value of any coordinate of one person's vector."""
        return self.layout.bound

    @property
    def rounds(self) -> int:
        """One answers it."""
        return 1

    def begin(self, given: bytes, *, index: int = 0) -> Contribution:  # noqa: ARG002 - the protocol's
        """Itself: what people add depends on nothing that comes with the round."""
        if given:
            raise ProtocolError(f"{self.name} starts from nothing; {len(given)} bytes came.")
        return self

    def asks(self, *, study: str, tag: str) -> bool:  # noqa: ARG002 - the protocol's
        """Everybody."""
        return True

    def encode(self, rows: PersonRows, random: RandomBits) -> NDArray[np.int64]:
        """One person's contribution: shape (dimension,), within `sensitivity` and `bound`."""
        return self.layout.integers(self.masses(rows), random)

    def decode(
        self, total: NDArray[np.int64], *, noise: NoisePlan, people: int, level: float
    ) -> Answer:
        """From the noisy sum to an answer.

        Raises `CohortError` if fewer than `minimum_cohort` took part, `ValueError` for a vector of
        another length or a level that no interval has.
        """
        if people < self.minimum_cohort:
            raise CohortError(
                f"{self.name}: {people} took part, and at least {self.minimum_cohort} are needed. "
                "Wait until more have joined."
            )
        if total.shape != (self.dimension,):
            raise ValueError(f"{self.name}: expected {self.dimension} sums, got {total.shape}.")
        if not _LOWEST_LEVEL <= level <= _HIGHEST_LEVEL:
            raise ValueError(f"A confidence level is 0.5 to 0.999, not {level}.")
        asked = Asked(
            masses=self.layout.masses(total),
            noise=noise_moments(noise, self.layout.unit),
            people=people,
            level=level,
        )
        return Answer(query=self.name, estimates=self.estimates(asked), cautions=self.cautions())


def too_few(name: str, what: str) -> CohortError:
    """Too little data is left under the noise to say anything."""
    return CohortError(
        f"{name}: too few people have {what} for an answer under this much noise. Ask more people, "
        "or with a larger ε."
    )
