"""One quantity by groups of people: means by a second quantity, and the contrast between arms."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.analytics.base import Asked, BaseQuery, too_few
from federated.analytics.bernstein import Moments, basis
from federated.analytics.counts import bin_of
from federated.analytics.intervals import difference, estimate, wald
from federated.analytics.layout import FINE, Block, Layout
from federated.analytics.means import clipping_cautions, in_bounds, typical_sums
from federated.analytics.quantity import Quantity, is_bin_edges, known
from federated.errors import ManifestError
from federated.model import Estimate, PersonRows

_MOST_GROUPS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupQuery(BaseQuery):
    """Each person is in one group at most, so all groups together cost what one does."""

    outcome: Quantity

    @abstractmethod
    def groups(self) -> tuple[str, ...]:
        """What the groups are called."""

    @abstractmethod
    def group_of(self, rows: PersonRows) -> int | None:
        """Which group the person is in, if any."""

    @property
    def layout(self) -> Layout:
        """Three places per group; one person fills one group's."""
        return Layout(blocks=(Block(size=3 * len(self.groups()), limit=FINE),), unit=FINE)

    def masses(self, rows: PersonRows) -> NDArray[np.float64]:
        """The basis at the person's outcome, in the person's group."""
        masses = np.zeros((len(self.groups()), 3))
        group, scaled = self.group_of(rows), self.outcome.of(rows)
        if group is not None and scaled is not None:
            masses[group] = basis(scaled, 2)
        return masses.reshape(-1)

    def typical(self, people: int) -> NDArray[np.float64]:
        """Groups of equal size with the same outcome."""
        count = len(self.groups())
        return np.tile(typical_sums(people / count, 2), count)

    def moments(self, asked: Asked) -> list[Moments]:
        """Of each group. Raises `CohortError` if no group stands out of the noise."""
        found = [Moments(sums=part) for part in asked.masses.reshape(-1, 3)]
        if not any(moments.usable(asked.noise) for moments in found):
            raise too_few(self.name, "data in any group")
        return found

    def mean(self, name: str, moments: Moments, asked: Asked) -> Estimate:
        """A group's mean; the whole range where the group is lost in the noise."""
        if not moments.usable(asked.noise):
            return in_bounds(name, 0.5, (0.0, 1.0), self.outcome, asked.level)
        ends = wald(moments.mean, moments.mean_spread(asked.noise), asked.level)
        return in_bounds(name, moments.mean, ends, self.outcome, asked.level)

    def contrast(self, name: str, of: Moments, against: Moments, asked: Asked) -> Estimate:
        """Mean of one group minus mean of another; the whole range where either is lost."""
        low, value, high = -1.0, 0.0, 1.0
        if of.usable(asked.noise) and against.usable(asked.noise):
            value = of.mean - against.mean
            spread = difference(of.mean_spread(asked.noise), against.mean_spread(asked.noise))
            low, high = wald(value, spread, asked.level)
        low, value, high = (
            min(max(end, -1.0), 1.0) * self.outcome.width for end in (low, value, high)
        )
        return estimate(name, value, (low, high), level=asked.level, unit=self.outcome.unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMeans(GroupQuery):
    """Mean of `outcome` by bins of `by`; with `reference`, also each bin's difference from it.

    `reference` is the number of a bin, from 0.
    """

    by: Quantity
    edges: tuple[float, ...]
    reference: int | None = None

    def check(self) -> None:
        """Refuse edges that are not ascending, or a reference that is no bin."""
        if not is_bin_edges(self.edges) or len(self.edges) > _MOST_GROUPS + 1:
            raise ManifestError(
                f"{self.name}: `edges` must be 2 to {_MOST_GROUPS + 1} finite ascending numbers."
            )
        if self.reference is not None and not 0 <= self.reference < len(self.edges) - 1:
            raise ManifestError(f"{self.name}: `reference` must be 0 to {len(self.edges) - 2}.")

    @property
    def columns(self) -> frozenset[str]:
        """Both quantities' columns."""
        return frozenset({self.outcome.column, self.by.column})

    def groups(self) -> tuple[str, ...]:
        """The bins."""
        unit = f" {self.by.unit}" if self.by.unit else ""
        pairs = zip(self.edges, self.edges[1:], strict=False)
        return tuple(f"{low:g} to {high:g}{unit}" for low, high in pairs)

    def group_of(self, rows: PersonRows) -> int | None:
        """The person's bin."""
        scaled = self.by.of(rows)
        return None if scaled is None else bin_of(self.by, scaled, self.edges)

    def estimates(self, asked: Asked) -> list[Estimate]:
        """Means by bin, then differences from the reference."""
        moments, names = self.moments(asked), self.groups()
        means = [
            self.mean(f"mean at {name}", one, asked)
            for name, one in zip(names, moments, strict=True)
        ]
        if self.reference is None:
            return means
        against = moments[self.reference]
        return means + [
            self.contrast(f"{name} against {names[self.reference]}", one, against, asked)
            for place, (name, one) in enumerate(zip(names, moments, strict=True))
            if place != self.reference
        ]

    def cautions(self) -> tuple[str, ...]:
        """What the answer cannot say."""
        return (
            *clipping_cautions(self.outcome),
            f"Groups by {self.by.column} were not drawn by lot: a difference is not an effect.",
            "A group too small for the noise gets an interval of the whole range.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmContrast(GroupQuery):
    """Effect of an intervention: mean outcome of the treated arm minus that of the control arm.

    `arm` is the column that holds the arm's code (the last one known counts).
    """

    arm: str = "arm"
    control: float = 0.0
    treated: float = 1.0

    def check(self) -> None:
        """Refuse two arms that are one."""
        if self.control == self.treated:
            raise ManifestError(f"{self.name}: `control` and `treated` must be different codes.")

    @property
    def columns(self) -> frozenset[str]:
        """The outcome's column and the arm's."""
        return frozenset({self.outcome.column, self.arm})

    def groups(self) -> tuple[str, ...]:
        """Both arms."""
        return ("control", "treated")

    def group_of(self, rows: PersonRows) -> int | None:
        """The person's arm; none if it is neither of the two."""
        codes = known(rows, self.arm)
        if not codes.size:
            return None
        arms: Sequence[float] = (self.control, self.treated)
        return next((place for place, code in enumerate(arms) if codes[-1] == code), None)

    def estimates(self, asked: Asked) -> list[Estimate]:
        """Both means and the effect."""
        control, treated = self.moments(asked)
        if not (control.usable(asked.noise) and treated.usable(asked.noise)):
            raise too_few(self.name, "an outcome in one of the arms")
        return [
            self.mean("mean, control", control, asked),
            self.mean("mean, treated", treated, asked),
            self.contrast("effect", treated, control, asked),
        ]

    def cautions(self) -> tuple[str, ...]:
        """What the answer cannot say."""
        return (
            *clipping_cautions(self.outcome),
            (
                "Only people with an outcome count: if they left one arm more often, the effect is "
                "biased."
            ),
            "It is an effect only if arms were drawn by lot.",
        )
