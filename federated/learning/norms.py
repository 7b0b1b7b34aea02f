"""How long people's updates are: a small release to fix a clip by, before a training is declared.

Each person is in one of some public geometric bins of the length (L2) of their update at the first
weights, so l1 = l2 = 1 whatever their rows say. What comes out are quantiles with intervals; the
clip that is then declared is a public number. Unit: the person. Adjacency: zero-out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.analytics.base import Asked, BaseQuery, too_few
from federated.analytics.intervals import estimate
from federated.analytics.layout import Block, Layout, one_hot
from federated.analytics.quantiles import inverted, monotone
from federated.errors import ManifestError
from federated.learning.clipping import NormBins
from federated.learning.examples import examples_of
from federated.learning.local import update
from federated.learning.models import initial
from federated.learning.spec import TrainSpec
from federated.model import Estimate, PersonRows

#: Where a training of other than convex models starts differs by study; lengths hardly do.
_SEED: Final = b"norms"
_MOST_QUANTILES: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateNorms(BaseQuery):
    """Lengths below which the shares `at` of people's first updates lie, from `low` to `high`.

    Of `spec` examples, model and work count; its clip, rounds and held-out share do not: everybody
    is asked, and a study of its own asks, since a clip is declared before it is used.
    """

    spec: TrainSpec
    low: float
    high: float
    bins: int = 24
    at: tuple[float, ...] = (0.5, 0.8, 0.95)

    def check(self) -> None:
        """Refuse bins that tell nothing apart, and shares outside of 0 … 1."""
        _ = self.norm_bins
        if not 1 <= len(self.at) <= _MOST_QUANTILES or not all(0 < share < 1 for share in self.at):
            raise ManifestError(f"{self.name}: `at` must hold shares above 0 and below 1.")

    @property
    def norm_bins(self) -> NormBins:
        """The bins, one more below and one above."""
        return NormBins(low=self.low, high=self.high, bins=self.bins)

    @property
    def columns(self) -> frozenset[str]:
        """All that the training reads."""
        return self.spec.columns

    @property
    def layout(self) -> Layout:
        """One place of as many as there are bins."""
        return Layout(blocks=(Block(size=self.norm_bins.dimension, limit=1),), unit=1)

    def masses(self, rows: PersonRows) -> NDArray[np.float64]:
        """One in the bin of the person's update; none for who has no example."""
        bins, examples = self.norm_bins, examples_of(self.spec, rows)
        if not len(examples.y):
            return one_hot(bins.dimension, None)
        change = update(self.spec, initial(self.spec, seed=_SEED), examples)
        return bins.encode(change).astype(np.float64)

    def estimates(self, asked: Asked) -> list[Estimate]:
        """Each quantile, with an interval by inverting the distribution (Woodruff 1952)."""
        size = len(asked.masses)
        reached = np.cumsum(asked.masses)
        people = float(reached[-1])
        if people <= 4 * asked.noise.deviation * math.sqrt(size) + 2:
            raise too_few(self.name, "examples")
        shares = reached / people
        gradients = (np.tri(size) - shares[:, None]) / people
        curve = np.concatenate([[0.0], monotone(shares)])
        found = []
        for at in self.at:
            value, *ends = map(self._length, inverted(at, curve, gradients, people, asked))
            found.append(
                estimate(
                    f"{at * 100:g} % of updates are no longer than",
                    value,
                    (ends[0], ends[1]),
                    level=asked.level,
                    unit="of the weights",
                )
            )
        return found

    def _length(self, place: float) -> float:
        """Of a place from 0 to 1 on all bins; what is beyond the outer bins counts as their end."""
        step = place * (self.bins + 2) - 1
        ratio = min(max(step / self.bins, 0.0), 1.0)
        return self.low * math.exp(ratio * math.log(self.high / self.low))

    def cautions(self) -> tuple[str, ...]:
        """What the answer cannot say."""
        ratio = (self.high / self.low) ** (1 / self.bins)
        return (
            (
                f"Lengths are told apart in steps of {100 * (ratio - 1):.0f} %; below {self.low:g} "
                f"and above {self.high:g} they count as that."
            ),
            "Updates at the first weights: in later rounds most are shorter.",
        )

    def typical(self, people: int) -> NDArray[np.float64]:
        """Lengths about the middle of the bins."""
        places = np.arange(self.bins + 2)
        bell = np.exp(-(((places - (self.bins + 1) / 2) / (self.bins / 8 + 1)) ** 2) / 2)
        return np.asarray(people * bell / bell.sum())
