"""A question of `analytics` put to virtual people: encoded, summed and decoded as a study's.

Each real (public or made-up) person's rows are encoded once, by the query's own `encode`; a virtual
cohort of any size is then counts of them. So a million people cost no more than a thousand: what
scales with them is exact, and what noise of the exact sampler does to the answer is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.accounting import cost_of
from federated.aggregation.bits import SeededBits
from federated.aggregation.noise import sample
from federated.analytics.base import BaseQuery
from federated.analytics.plan import choose_noise
from federated.errors import CohortError
from federated.model import Answer, NoisePlan, PersonRows, PrivacyCost, Statistic
from federated.simulation.training import Target

_DOMAIN: Final = b"havengate/simulated-answers/v1\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """People's vectors for one query: shape (people, dimension)."""

    query: Statistic
    vectors: NDArray[np.int64] = field(repr=False)

    def total(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """The exact sum where person i stands for `counts[i]` people."""
        return np.asarray(counts @ self.vectors, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedAnswer:
    """What a cohort of `people` would be told, or why nothing."""

    people: int
    answer: Answer | None
    refused: str | None = None


def encode_all(query: Statistic, people: Sequence[PersonRows], *, seed: bytes) -> Encoded:
    """Every person's vector, with rounding drawn off the seed."""
    bits = _bits(seed, b"encoding")
    vectors = np.zeros((len(people), query.dimension), dtype=np.int64)
    for place, rows in enumerate(people):
        vectors[place] = query.encode(rows, bits)
    return Encoded(query=query, vectors=vectors)


def planned(query: BaseQuery, target: Target) -> tuple[NoisePlan, PrivacyCost]:
    """The noise that a study would plan for this cost, and what it costs each person."""
    noise = choose_noise(query, epsilon=target.epsilon, delta=target.delta)
    return noise, cost_of(noise, query.sensitivity, delta=target.delta)


def answered(
    encoded: Encoded,
    *,
    people: int,
    noise: NoisePlan,
    seed: bytes,
    level: float = 0.95,
    drawn: bool = False,
) -> SimulatedAnswer:
    """The answer of a virtual cohort.

    Every person stands for as many of it, to within one; `drawn`: each of the cohort is drawn at
    random from the people instead, which adds the sampling error that intervals speak of. A cohort
    that gets no answer says why; it raises ValueError for nobody to encode, or no cohort.
    """
    real = len(encoded.vectors)
    if not real or people < 1:
        raise ValueError("expected people whose rows are encoded, and a cohort of 1 or more")
    if drawn:
        random = np.random.default_rng(_bits(seed, b"cohort").bits(128))
        counts = random.multinomial(people, np.full(real, 1 / real)).astype(np.int64)
    else:
        counts = np.full(real, people // real, dtype=np.int64)
        counts[: people % real] += 1
    total = encoded.total(counts)
    total += sample(total.size, plan=noise, random=_bits(seed, b"noise"))
    try:
        answer = encoded.query.decode(total, noise=noise, people=people, level=level)
    except CohortError as error:
        return SimulatedAnswer(people=people, answer=None, refused=str(error))
    return SimulatedAnswer(people=people, answer=answer)


def scaling(
    query: BaseQuery,
    people: Sequence[PersonRows],
    *,
    sizes: Sequence[int],
    target: Target,
    seed: bytes,
    level: float = 0.95,
) -> tuple[SimulatedAnswer, ...]:
    """The same question to cohorts of these sizes, at the same cost for each person."""
    encoded = encode_all(query, people, seed=seed)
    noise, _ = planned(query, target)
    return tuple(
        answered(encoded, people=size, noise=noise, seed=seed + b"%d" % size, level=level)
        for size in sizes
    )


def _bits(seed: bytes, label: bytes) -> SeededBits:
    return SeededBits(sha256(_DOMAIN + seed).digest(), label)
