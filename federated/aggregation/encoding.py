"""From real vectors to integers modulo 2^b and back: clip, scale, round, size the modulus.

Queries of `analytics` make their own integers; clipping and rounding here are for vectors of real
numbers (updates of a model), after Kairouz, Liu and Steinke, "The Distributed Discrete Gaussian
Mechanism for Federated Learning with Secure Aggregation" (2021). Modulus and decoding are for all.

The chance in rounding needs no exact probabilities: what privacy rests on is the bound on the
rounded vector, and that is checked on integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.aggregation.bits import word_source
from federated.aggregation.schedule import NoiseSchedule
from federated.model import RandomBits, Sensitivity

#: A sum wraps around with a probability of at most 2^-40: the answer is then wrong, not private
#: data exposed, since the modulus is applied after the noise.
WRAP_BITS: Final = 40


def clip(vector: NDArray[np.float64], *, norm: float, order: int) -> NDArray[np.float64]:
    """Scale down to an L1 (order 1) or L2 (order 2) norm of at most `norm`.

    What is not finite counts as 0: NaN and infinity pass no bound.
    """
    if order not in {1, 2} or not 0 < norm < math.inf:
        raise ValueError("expected order 1 or 2 and a positive norm")
    finite = np.where(np.isfinite(vector), vector, 0.0)
    largest = float(np.max(np.abs(finite), initial=0.0))
    if largest == 0:
        return finite
    # Scaled first, so that squares of huge numbers do not overflow.
    length = float(np.linalg.norm(finite / largest, ord=order))
    if length <= norm / largest:
        return finite
    return finite / largest * (norm / length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """Conditional randomised rounding of a vector clipped to L2 norm `clip_norm`.

    A vector is clipped, multiplied by `scale`, and each coordinate rounded up or down at random so
    that it is right on average; this is repeated until the rounded vector's L2 norm is within
    `sensitivity.l2`. `beta` in (0, 1): the bound holds at a try with probability at least
    1 - beta; larger means a tighter bound, more bias and more tries.
    """

    dimension: int
    clip_norm: float
    scale: float
    beta: float = math.exp(-0.5)

    def __post_init__(self) -> None:
        within = 0 < self.beta < 1 and self.dimension >= 1 and 0 < self.clip_norm < math.inf
        if not within or not 0 < self.scale * self.clip_norm < 2.0**52:
            raise ValueError("expected beta in (0, 1) and clip_norm · scale in (0, 2^52)")

    @property
    def squared_bound(self) -> int:
        """Largest squared L2 norm of a rounded vector (Kairouz et al. 2021, rounding lemma).

        min((x + √d)², x² + d/4 + √(2·ln(1/beta))·(x + √d/2)) with x = clip_norm · scale.
        """
        length, root = self.clip_norm * self.scale, math.sqrt(self.dimension)
        sure = (length + root) ** 2
        spread = math.sqrt(2 * math.log(1 / self.beta)) * (length + root / 2)
        return math.floor(min(sure, length**2 + self.dimension / 4 + spread) * (1 + 2.0**-40) + 1)

    @property
    def inflation(self) -> float:
        """By how much rounding raises the sensitivity: at least 1, towards 1 as `scale` grows."""
        return self.sensitivity.l2 / (self.clip_norm * self.scale)

    @property
    def sensitivity(self) -> Sensitivity:
        """Of the rounded vector, rounding included.

        L1 follows from L2, by dimension or, for integers, by |k| ≤ k².
        """
        squared = self.squared_bound
        l1 = min(math.sqrt(squared) * math.sqrt(self.dimension), float(squared))
        return Sensitivity(
            l1=math.nextafter(l1, math.inf), l2=math.nextafter(math.sqrt(squared), math.inf)
        )

    @property
    def bound(self) -> int:
        """Largest |coordinate| of a rounded vector."""
        return math.isqrt(self.squared_bound)

    def encode(self, vector: NDArray[np.float64], random: RandomBits) -> NDArray[np.int64]:
        """Clip, scale and round. Satisfies `sensitivity` whatever the vector holds."""
        if vector.shape != (self.dimension,):
            raise ValueError(f"expected {self.dimension} coordinates, got {vector.shape}")
        source = word_source(random)
        scaled = clip(vector, norm=self.clip_norm, order=2) * self.scale
        floor = np.floor(scaled)
        while True:
            uniform = source.words(self.dimension) * 2.0**-64
            rounded = (floor + (uniform < scaled - floor)).astype(np.int64)
            if self._holds(rounded):
                return rounded

    def _holds(self, rounded: NDArray[np.int64]) -> bool:
        if np.max(np.abs(rounded)) > self.bound:
            return False
        if self.squared_bound * self.dimension < 1 << 63:
            return int(rounded @ rounded) <= self.squared_bound
        return sum(int(value) ** 2 for value in rounded) <= self.squared_bound

    def decode(self, total: NDArray[np.int64]) -> NDArray[np.float64]:
        """Back to real numbers."""
        return total / self.scale


def needed_modulus_bits(*, bound: int, dimension: int, schedule: NoiseSchedule | None) -> int:
    """Bits so that a sum of at most `bound` and its noise wraps with probability ≤ 2^-40.

    The noise left in the sum is largest with the fewest survivors or with all, whichever weighs
    more; a granular sum is `granularity` times as large. Can exceed 64: then nothing fits.
    """
    largest = bound * (schedule.granularity if schedule else 1) + 1
    if schedule is not None:
        largest += _noise_tail(schedule, dimension)
    return largest.bit_length() + 1


def _noise_tail(schedule: NoiseSchedule, dimension: int) -> int:
    """Return z with P(|noise of any coordinate| ≥ z) ≤ 2^-40."""
    counts = range(schedule.minimum_survivors, schedule.nodes + 1)
    weight = float(max(schedule.weight(survivors) for survivors in counts))
    logs = math.log(2 * dimension) + WRAP_BITS * math.log(2)
    scale = schedule.plan.scale * schedule.granularity
    if schedule.plan.mechanism == "discrete_gaussian":
        # Discrete Gaussians are subgaussian with their parameter (Canonne et al. 2020).
        return math.ceil(scale * math.sqrt(2 * weight * logs) * (1 + 2.0**-20)) + 1
    # Chernoff at half the radius of convergence: E e^(X/2s) of one unit of discrete Laplace.
    decay = math.exp(-1 / scale)
    half = math.exp(-0.5 / scale)
    moment = 2 * math.log1p(-decay) - math.log1p(-half) - math.log1p(-decay * half)
    return math.ceil(2 * scale * (logs + weight * moment) * (1 + 2.0**-20)) + 1


def to_residues(values: NDArray[np.int64], modulus_bits: int) -> NDArray[np.uint64]:
    """Signed integers to [0, 2^b)."""
    return values.astype(np.uint64) & _mask(modulus_bits)


def from_residues(residues: NDArray[np.uint64], modulus_bits: int) -> NDArray[np.int64]:
    """Back to [-2^(b-1), 2^(b-1))."""
    shift = np.uint64(64 - modulus_bits)
    return (residues << shift).astype(np.int64) >> shift.astype(np.int64)


def pack(residues: NDArray[np.uint64], modulus_bits: int) -> bytes:
    """⌈b/8⌉ bytes each, little-endian."""
    width = -(-modulus_bits // 8)
    return residues.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()


def unpack(data: bytes, *, dimension: int, modulus_bits: int) -> NDArray[np.uint64]:
    """Undo `pack`. Raises ValueError for a wrong length or a value outside [0, 2^b)."""
    width = -(-modulus_bits // 8)
    if len(data) != width * dimension:
        raise ValueError(f"expected {dimension} values of {width} bytes, got {len(data)} bytes")
    whole = np.zeros((dimension, 8), dtype=np.uint8)
    whole[:, :width] = np.frombuffer(data, dtype=np.uint8).reshape(dimension, width)
    residues = whole.view("<u8").reshape(dimension)
    if np.any(residues > _mask(modulus_bits)):
        raise ValueError(f"expected values below 2^{modulus_bits}")
    return residues


def unscale(total: NDArray[np.int64], granularity: int) -> NDArray[np.int64]:
    """Divide by the granularity, rounded to the nearest (halves up)."""
    return (total + granularity // 2) // granularity


def _mask(modulus_bits: int) -> np.uint64:
    return np.uint64((1 << modulus_bits) - 1)
