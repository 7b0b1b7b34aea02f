"""From shares of a person to integers that can be summed, with the sensitivity proven.

Every query says what a person contributes as non-negative *mass*, in blocks that each hold at most
so much. Here mass becomes integers so that a block's integers are never negative and never add up
to more than its limit, whatever came in. That is the whole proof of sensitivity: per block
l1 ≤ limit and l2 ≤ l1, hence l1 ≤ sum of limits and l2 ≤ root of the sum of their squares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.model import RandomBits, Sensitivity

#: Integers per unit of mass where mass is not whole. Rounding then moves a person by less than a
#: thousandth of what the noise hides.
FINE: Final = 1024
#: Exact beside any limit below 2^21 in a double.
_OFFSET_BITS: Final = 32
_LARGEST_LIMIT: Final = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """`size` coordinates that hold at most `limit` integer units of one person together."""

    size: int
    limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A vector of blocks. `unit` integers are one unit of mass."""

    blocks: tuple[Block, ...]
    unit: int

    def __post_init__(self) -> None:
        if any(b.size < 1 or not 1 <= b.limit <= _LARGEST_LIMIT for b in self.blocks):
            raise ValueError(f"A block holds 1 to {_LARGEST_LIMIT} units in one place or more.")

    @property
    def dimension(self) -> int:
        """Length of the vector."""
        return sum(block.size for block in self.blocks)

    @property
    def sensitivity(self) -> Sensitivity:
        """Of the integer vector, for zero-out of one person."""
        limits = np.array([block.limit for block in self.blocks], dtype=np.float64)
        # The root is rounded to the nearest: one step up, so that its square is never too small.
        length = math.nextafter(float(np.sqrt((limits**2).sum())), math.inf)
        return Sensitivity(l1=float(limits.sum()), l2=min(length, float(limits.sum())))

    @property
    def bound(self) -> int:
        """Largest value of one coordinate of one person."""
        return max(block.limit for block in self.blocks)

    def integers(self, masses: NDArray[np.float64], random: RandomBits) -> NDArray[np.int64]:
        """`masses`, shape (dimension,), as integers: unbiased, and within every block's limit.

        Systematic rounding: the running sum of a block is shifted by one uniform offset and cut to
        whole numbers, so that each coordinate becomes one of its two neighbours and the block's
        total never exceeds its limit. NaN, infinities and negative mass count as none.
        """
        usable = np.where(np.isfinite(masses) & (masses > 0), masses, 0.0)
        parts = []
        start = 0
        for block in self.blocks:
            part = np.minimum(usable[start : start + block.size], block.limit / self.unit)
            offset = random.bits(_OFFSET_BITS) / 2**_OFFSET_BITS
            reached = np.minimum(np.floor(_running(part * self.unit) + offset), block.limit).astype(
                np.int64
            )
            parts.append(reached - np.concatenate(([0], reached[:-1])))
            start += block.size
        return np.concatenate(parts)

    def masses(self, total: NDArray[np.int64]) -> NDArray[np.float64]:
        """A sum of integer vectors, in units of mass."""
        return total.astype(np.float64) / self.unit


def _running(part: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cumulative sums, with what floats lose of a whole number put back."""
    running = np.cumsum(part)
    nearest = np.rint(running)
    return np.where(np.abs(running - nearest) < 1e-9 * (1 + nearest), nearest, running)


def one_hot(size: int, place: int | None) -> NDArray[np.float64]:
    """All mass in one place, or none."""
    masses = np.zeros(size)
    if place is not None:
        masses[place] = 1.0
    return masses
