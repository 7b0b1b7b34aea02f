"""How large an update may be: a clip from one small release, or one that follows a quantile.

Lives here: what each person adds to find the clip, its sensitivity, and the next clip from noisy
sums. Not here: updates (`local`), clip and rounding of a vector (`aggregation.encoding`), costs
(`training_cost`). Pure; randomness is an argument.

A clip that is known *before* a round (from an earlier release, or from the rounds so far) costs
nothing in that round: whatever it is, integers are made of update/clip, so that the sensitivity in
integers is the same in every round and was fixed before the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.aggregation.encoding import Rounding, clip
from federated.errors import CohortError, ManifestError
from federated.model import RandomBits, Sensitivity

_MOST_BINS: Final = 256
#: Sums must stand out of their noise by so many deviations.
_STANDS_OUT: Final = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NormBins:
    """Counts of updates' norms in public geometric bins: a clip fixed beforehand by one release.

    `bins` of them from `low` to `high`, one below and one above. A person is in one bin, so
    l1 = l2 = 1 whatever their update is. Of a round of its own, before the first of training.
    """

    low: float
    high: float
    bins: int = 24

    def __post_init__(self) -> None:
        """Raises `ManifestError` for bins that tell nothing apart."""
        if not 0 < self.low < self.high < math.inf or not 1 <= self.bins <= _MOST_BINS:
            raise ManifestError(
                f"Norms need 0 < low < high and 1 to {_MOST_BINS} bins, not {self.low:g}, "
                f"{self.high:g}, {self.bins}."
            )

    @property
    def edges(self) -> NDArray[np.float64]:
        """From `low` to `high`, shape (bins + 1,)."""
        return np.geomspace(self.low, self.high, self.bins + 1)

    @property
    def dimension(self) -> int:
        """Length of the vector that is summed."""
        return self.bins + 2

    @property
    def sensitivity(self) -> Sensitivity:
        """One place."""
        return Sensitivity(l1=1.0, l2=1.0)

    @property
    def bound(self) -> int:
        """Largest coordinate of one person's vector."""
        return 1

    def encode(self, update: NDArray[np.float64] | None) -> NDArray[np.int64]:
        """One in the bin of the update's L2 norm; zeros for a person who has none.

        As in `clip`, what is not finite counts as 0.
        """
        vector = np.zeros(self.dimension, dtype=np.int64)
        if update is not None:
            vector[np.searchsorted(self.edges, _norm(update), side="left")] = 1
        return vector

    def quantile(
        self, counts: NDArray[np.int64] | NDArray[np.float64], *, at: float, deviation: float
    ) -> float:
        """The norm below which a share `at` of updates lie, from noisy counts.

        `deviation` is that of each count's noise. Interpolated within a bin on the scale of
        logarithms; never outside of `low` … `high`. Raises `CohortError` where the counts do not
        stand out of their noise.
        """
        if counts.shape != (self.dimension,) or not 0 < at < 1:
            raise ValueError(f"expected {self.dimension} counts and a share above 0 and below 1")
        running = np.cumsum(counts, dtype=np.float64)
        if running[-1] <= _STANDS_OUT * deviation * math.sqrt(self.dimension) + 2:
            raise CohortError(
                "Too few updates to find a clip: their counts do not stand out of the noise. Ask "
                "more people, allow the release more ε, or declare a clip."
            )
        shares = running / running[-1]
        # The nearest never-falling curve lies between the hulls from both sides.
        above = np.maximum.accumulate(shares)
        below = np.minimum.accumulate(shares[::-1])[::-1]
        curve = np.clip((above + below) / 2, 0.0, 1.0)[:-1]
        if at <= curve[0]:
            return self.low
        if at >= curve[-1]:
            return self.high
        place = int(np.searchsorted(curve, at, side="left"))
        part = (at - curve[place - 1]) / (curve[place] - curve[place - 1])
        step = math.log(self.high / self.low) / self.bins
        return self.low * math.exp(step * (place - 1 + float(part)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What a round's noisy sum says: the sum of clipped updates, and who was within the clip.

    `unclipped` is a share of the people, blurred: it can lie outside of 0 … 1.
    """

    update: NDArray[np.float64] = field(repr=False)
    unclipped: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedUpdate:
    """One person's update and whether it was within the clip, in one integer vector.

    `unit` integers stand for the clip. The last coordinate is +`weight` for an update within the
    clip and -`weight` for one that was clipped: a count around its middle, as Andrew et al. (2021)
    take it, has half the sensitivity of one from 0. Both are released by the same noise, and
    l2² = (rounded update)² + weight² is the sensitivity of both together. With noise of scale s
    that is the published split: z for both, z_update = (z⁻² - (2·z_count)⁻²)^(-½) for the update,
    where z = s/l2, z_update = s/(rounded update) and z_count = s/(2·weight).
    """

    dimension: int
    unit: float = 4096.0
    weight: int = 410

    def __post_init__(self) -> None:
        """Raises `ManifestError` for numbers that leave no room."""
        if self.dimension < 1 or not 1 <= self.unit < 2.0**40 or not 1 <= self.weight < 2**40:
            raise ManifestError("`dimension`, `unit` and `weight` are 1 or more, below 2^40.")

    @property
    def rounding(self) -> Rounding:
        """Of update/clip."""
        return Rounding(dimension=self.dimension, clip_norm=1.0, scale=self.unit)

    @property
    def sensitivity(self) -> Sensitivity:
        """Of update and count together, in every round, whatever the clip is."""
        alone = self.rounding
        squared = alone.squared_bound + self.weight**2
        return Sensitivity(
            l1=math.nextafter(alone.sensitivity.l1 + self.weight, math.inf),
            l2=math.nextafter(math.sqrt(squared), math.inf),
        )

    @property
    def bound(self) -> int:
        """Largest |coordinate| of one person's vector."""
        return max(self.rounding.bound, self.weight)

    @property
    def inflation(self) -> float:
        """By how much the count raises the noise that the update needs."""
        return self.sensitivity.l2 / self.rounding.sensitivity.l2

    def deviation(self, noise_deviation: float, *, people: int) -> float:
        """Deviation of `Counted.unclipped` that is due to noise."""
        return noise_deviation / (2 * self.weight * people)

    def encode(
        self, update: NDArray[np.float64] | None, *, clip_norm: float, random: RandomBits
    ) -> NDArray[np.int64]:
        """Shape (dimension + 1,). Satisfies `sensitivity` whatever the update and the clip are.

        Zeros for a person who has no update: they count as half within the clip.
        """
        whole = np.zeros(self.dimension + 1, dtype=np.int64)
        if update is None or not (math.isfinite(clip_norm) and clip_norm > 0):
            return whole
        # Clipped before it is divided: a tiny clip would make infinities of what it should cut.
        scaled = clip(update, norm=clip_norm, order=2) / clip_norm
        whole[:-1] = self.rounding.encode(scaled, random)
        whole[-1] = self.weight if _norm(update) <= clip_norm else -self.weight
        return whole

    def decode(
        self,
        total: NDArray[np.int64] | NDArray[np.float64],
        *,
        clip_norm: float,
        people: int,
    ) -> Counted:
        """From a round's noisy sum. `clip_norm` is that of this round; `people` took part."""
        if total.shape != (self.dimension + 1,) or people < 1:
            raise ValueError(f"expected {self.dimension + 1} sums of at least one person")
        return Counted(
            update=np.asarray(total[:-1] * (clip_norm / self.unit), dtype=np.float64),
            unclipped=(1 + float(total[-1]) / (self.weight * people)) / 2,
        )


def weight_for(dimension: int, *, unit: float = 4096.0, share: float = 0.01) -> int:
    """The weight at which the count is that share of the squared sensitivity, rounded.

    At 0.01 the update's noise is half a per cent larger, and the share of people within the clip
    has a deviation of 5·(noise multiplier)/people.
    """
    if not 0 < share < 1:
        raise ManifestError(f"The count's share is above 0 and below 1, not {share}.")
    alone = Rounding(dimension=dimension, clip_norm=1.0, scale=unit)
    return max(1, round(math.sqrt(alone.squared_bound * share / (1 - share))))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveClip:
    """A clip that follows the `quantile` of norms: C ← C·exp(-rate·(unclipped - quantile)).

    Andrew et al., "Differentially Private Learning with Adaptive Clipping" (2021), algorithm 1,
    with the share of people *within* the clip: too many within make it smaller. Post-processing of
    noisy sums, so it costs nothing beyond the count. The difference is cut to -1 … 1, evenly around
    the quantile, so that noise neither throws the clip far nor moves where it comes to rest; the
    clip stays within `low` … `high`.
    """

    quantile: float = 0.5
    rate: float = 0.2
    low: float = 1e-6
    high: float = 1e6

    def __post_init__(self) -> None:
        """Raises `ManifestError` for a rule that goes nowhere."""
        if not (
            0 < self.quantile < 1 and 0 < self.rate <= 1 and 0 < self.low < self.high < math.inf
        ):
            raise ManifestError(
                "An adaptive clip needs a quantile above 0 and below 1, a rate above 0 and at most "
                "1, and 0 < low < high."
            )

    def following(self, clip_norm: float, unclipped: float) -> float:
        """The next round's clip. Raises ValueError for a share that is no number."""
        if not math.isfinite(unclipped):
            raise ValueError("expected a share of people, got no number")
        off = min(max(unclipped - self.quantile, -1.0), 1.0)
        return min(max(clip_norm * math.exp(-self.rate * off), self.low), self.high)


def _norm(vector: NDArray[np.float64]) -> float:
    """L2 norm of what is finite; infinite where it is too large for a float."""
    finite = np.where(np.isfinite(vector), vector, 0.0)
    largest = float(np.max(np.abs(finite), initial=0.0))
    return largest * float(np.linalg.norm(finite / largest)) if largest > 0 else 0.0
