"""Made-up people in a training: lanes of their own behind the model's parameters, and their coins.

Lives here: what a canary adds to a round, who of them is in, and the bytes of both. Not here: what
is concluded (`privacy_audit`), and the sums (`aggregation`). Pure; randomness is an argument.

A round's vector has, behind the model's d coordinates, one *lane* for each canary. Real people have
zeros there, appended *after* their update was rounded in d dimensions: their sensitivity, l1, l2
and largest coordinate, stays what it was, and nobody pays for the audit. Nodes draw the round's
noise over all coordinates alike. A canary is a person whose whole contribution lies on its lane, as
large as sensitivity allows. Whether it is in, a fair coin of the coordinator's decides, drawn
before the first round and told to nobody: noise must not know it. The coordinator adds those that
are in to the sum that was unmasked: noise does not depend on what it is added to, so that sum has
the distribution that it would have had with the canary among the people.

Cost: as many more coordinates to draw noise for, mask and send; closeness and the modulus count
them too (`NoiseSchedule.log_ratio`, `needed_modulus_bits` by the whole dimension).
"""

from __future__ import annotations

import hashlib
import hmac
import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.errors import CheckpointError, ManifestError
from federated.learning.factorisation import IDENTITY, Factors, Participation
from federated.model import RandomBits, Sensitivity

#: Enough for a bound near ε; more only cost.
MAX_CANARIES: Final = 100_000
_DIGEST_BYTES: Final = 32
_COUNT_BYTES: Final = 4
_MAGIC: Final = b"havengate/canaries/v1\n"


def lane_value(update: Sensitivity) -> int:
    """The largest whole number that one person may add on one coordinate, of a round's vector.

    `update`: of one round's rounded vector, a joined count included. Raises `ManifestError` where
    it leaves no room for 1.
    """
    value = math.floor(min(update.l1, update.l2))
    if value < 1:
        raise ManifestError(
            f"A canary needs a sensitivity of 1 or more, not l2 = {update.l2:g}: choose a larger "
            "scale of the integers."
        )
    return value


def lane_shifts(
    update: Sensitivity, *, participation: Participation, factors: Factors = IDENTITY
) -> tuple[int, ...]:
    """What a canary adds in each round: as much as a person ever can, so their worst case.

    `lane_value` as often and as early as `participation` lets, combined by `factors`: the stacked
    vector's l2 is that of `training_cost.stacked`, but for rounding down. A full cohort without
    factors: the value in every round.
    """
    column = [0] * participation.rounds
    for time in range(participation.times):
        later = column[time * participation.gap :]
        for lag, factor in enumerate(factors.coefficients[: len(later)]):
            column[time * participation.gap + lag] += factor
    return tuple(lane_value(update) * row for row in column)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Canaries:
    """Who is in, shape (count,): the coordinator's secret until the audit is over.

    Afterwards it may be published with the lanes, so that others can count again: both are of
    made-up people and of noise alone.
    """

    included: NDArray[np.bool_] = field(repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError for anything but a flat array of coins."""
        own = np.array(self.included)
        if own.dtype != np.bool_ or own.ndim != 1 or not 1 <= own.size <= MAX_CANARIES:
            raise ValueError(f"expected 1 to {MAX_CANARIES} coins, each True or False")
        own.setflags(write=False)
        object.__setattr__(self, "included", own)

    @property
    def count(self) -> int:
        """How many lanes there are, of canaries that are in and out."""
        return self.included.size

    def added(self, value: int) -> NDArray[np.int64]:
        """What to add to the lanes of a round's noisy sum, shape (count,)."""
        return np.where(self.included, np.int64(value), np.int64(0))

    def to_bytes(self, *, study: bytes) -> bytes:
        """Canonical bytes, to be kept as secret as the study's state. `study`: 32 bytes."""
        return sealed(_MAGIC, packed(self), study=study)


def draw_canaries(count: int, random: RandomBits) -> Canaries:
    """Fair and independent coins, one bit each: to be drawn from the operating system's, once."""
    if not 1 <= count <= MAX_CANARIES:
        raise ManifestError(f"A training has 1 to {MAX_CANARIES} canaries, not {count}.")
    coins = random.bits(count).to_bytes(-(-count // 8), "little")
    return Canaries(included=_unpacked(coins, count))


def parse_canaries(data: bytes, *, study: bytes) -> Canaries:
    """What `to_bytes` wrote. Raises `CheckpointError` for anything else, or another study's."""
    canaries, rest = unpack(opened(_MAGIC, data, study=study))
    if rest:
        raise CheckpointError("The coins of canaries are longer than they say.")
    return canaries


def packed(canaries: Canaries) -> bytes:
    """Count and coins."""
    coins = np.packbits(canaries.included, bitorder="little").tobytes()
    return canaries.count.to_bytes(_COUNT_BYTES, "little") + coins


def unpack(body: bytes) -> tuple[Canaries, bytes]:
    """Canaries and what follows. Raises `CheckpointError` for coins that are missing."""
    count = int.from_bytes(body[:_COUNT_BYTES], "little")
    end = _COUNT_BYTES - (-count // 8)
    if not 1 <= count <= MAX_CANARIES or len(body) < end:
        raise CheckpointError("The coins of canaries have another length than they say.")
    return Canaries(included=_unpacked(body[_COUNT_BYTES:end], count)), body[end:]


def sealed(magic: bytes, body: bytes, *, study: bytes) -> bytes:
    """`body` with what it is, whose, and a digest that finds accidents."""
    if len(study) != _DIGEST_BYTES:
        raise ValueError(f"expected {_DIGEST_BYTES} bytes that name the study, got {len(study)}")
    whole = magic + study + body
    return whole + hashlib.sha256(whole).digest()


def opened(magic: bytes, data: bytes, *, study: bytes) -> bytes:
    """The body that was sealed.

    Raises `CheckpointError` for bytes that are cut, altered, another study's or of another kind:
    without its coins an audit is over, and coins drawn anew would find nothing.
    """
    whole, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    start = len(magic) + _DIGEST_BYTES
    if len(whole) < start or not whole.startswith(magic):
        raise CheckpointError("This is no saved audit of version 1; go back to an earlier one.")
    if not hmac.compare_digest(hashlib.sha256(whole).digest(), digest):
        raise CheckpointError("A saved audit is damaged or cut; go back to an earlier one.")
    if whole[len(magic) : start] != study:
        raise CheckpointError("This saved audit is another study's; resume that study instead.")
    return whole[start:]


def _unpacked(coins: bytes, count: int) -> NDArray[np.bool_]:
    bits = np.unpackbits(np.frombuffer(coins, dtype=np.uint8), count=count, bitorder="little")
    return bits.astype(np.bool_)
