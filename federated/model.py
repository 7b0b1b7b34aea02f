"""The words that all parts of `federated` share: people's rows, privacy cost, noise, answers.

Types only; no I/O and no mathematics. Who makes them: `node.store` makes `PersonRows`,
`manifest` makes `Study`, `analytics` makes queries over them, `accounting` makes `NoisePlan`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

type Mechanism = Literal["discrete_laplace", "discrete_gaussian"]

#: Secure aggregation: nobody sees a summand. Trusted server: the coordinator sees every summand.
type TrustModel = Literal["secure_aggregation", "trusted_server"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonRows:
    """One person's daily table, as a query sees it.

    `days`: days since 1970-01-01 in the person's own time zone, shape (n,), ascending, unique.
    `values`: column → shape (n,), NaN where nothing is known; units as `node.columns` names them.
    """

    days: NDArray[np.int64] = field(repr=False)
    values: Mapping[str, NDArray[np.float64]] = field(repr=False)


#: Somebody of whom nothing is known.
NO_ROWS: Final = PersonRows(days=np.empty(0, np.int64), values={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """How far one person can move the integer vector that is summed, in its own units.

    Adjacency is *zero-out*: a person's whole contribution is replaced by zeros, who takes part
    being public (add/remove of one person for the sum). `l1` and `l2` are proven for every
    possible contribution, rounding included.
    """

    l1: float
    l2: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisePlan:
    """The noise that the *sum* carries when it is released, per coordinate, in integer units.

    `discrete_laplace`: P(k) ∝ exp(-|k|/scale), pure ε = l1/scale.
    `discrete_gaussian`: P(k) ∝ exp(-k²/(2·scale²)).
    """

    mechanism: Mechanism
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyCost:
    """What a release costs each person: unit person, adjacency zero-out.

    `epsilon` at `delta` for the release alone; `noise` and `sensitivity` are what an accountant
    composes with others. `closeness` bounds the total variation distance between the noise that is
    really added and the planned one; what it takes of `delta` is counted in it.
    """

    epsilon: float
    delta: float
    noise: NoisePlan
    sensitivity: Sensitivity
    closeness: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A two-sided confidence interval; `level` such as 0.95. Includes noise and sampling error."""

    low: float
    high: float
    level: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One number of an answer, with how sure it is. `name` is unique in its answer."""

    name: str
    value: float
    interval: Interval
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a query says about the cohort. `cautions` are sentences, as what clipping can bias."""

    query: str
    estimates: Sequence[Estimate]
    cautions: Sequence[str] = ()


class Contribution(Protocol):
    """What one person adds to the sum of one round. Pure; made on the device by `Query.begin`."""

    @property
    def dimension(self) -> int:
        """Length of the vector that is summed."""
        ...

    @property
    def bound(self) -> int:
        """Largest absolute value of any coordinate of one person's vector: sizes the modulus."""
        ...

    def asks(self, *, study: str, tag: str) -> bool:
        """Whether this person is asked at all; who is not counts as zeros.

        `study` is the study's id, `tag` the person's secret name in the node's store: it must
        depend on nothing else, so never on data.
        """
        ...

    def encode(self, rows: PersonRows, random: RandomBits) -> NDArray[np.int64]:
        """One person's contribution, clipped, scaled and rounded: shape (dimension,).

        Zeros for a person who has nothing to say. Satisfies `sensitivity` and `bound` whatever
        the rows hold, NaN and infinities included.
        """
        ...


class Carried(Contribution):
    """A contribution of which a part is sent in later rounds too: a node keeps what was brought.

    `encode` makes what a person newly brings in this round, `combined` the vector that is sent. To
    be inherited: no question is taken for one by its names alone.
    """

    @property
    @abstractmethod
    def index(self) -> int:
        """Which of the question's rounds it is, from 0."""

    @abstractmethod
    def has_turn(self, *, study: str, tag: str) -> bool:
        """Whether the person newly brings something in this round; as `asks`, never of data.

        `tag` is another name than that of `asks`: it lives as long as the node's key in rosters.
        """

    @abstractmethod
    def combined(self, brought: Mapping[int, NDArray[np.int64]]) -> NDArray[np.int64]:
        """What is sent, of what the person brought: round → what `encode` gave. Any may be lost."""

    @abstractmethod
    def needed(self, brought: Mapping[int, NDArray[np.int64]]) -> Mapping[int, NDArray[np.int64]]:
        """The part of it that later rounds send: what is to be kept, and nothing else."""


class Whole(Contribution):
    """A contribution that a node makes of all its people at once, and that carries its own noise.

    Such a question is `noised_by_node`. To be inherited, as `Carried`.
    """

    @abstractmethod
    def whole(
        self, rows: Sequence[PersonRows], *, people: int, noise: NoisePlan, random: RandomBits
    ) -> NDArray[np.int64]:
        """What the node brings, shape (dimension,), within `people` times `bound`.

        `rows` are of those who are asked, `people` for how many the node speaks; `noise` is the
        declared one. Private by itself, at the question's price.
        """


class Query(Protocol):
    """A question as it is declared: what it reads, how far a person moves it, what that costs.

    The same on device and coordinator. One round answers it, or `rounds` of them, as in training.
    """

    @property
    def name(self) -> str:
        """Unique in its study."""
        ...

    @property
    def columns(self) -> frozenset[str]:
        """Columns of the daily table that are read: what consent must cover."""
        ...

    @property
    def dimension(self) -> int:
        """Length of the vector that is summed in each round."""
        ...

    @property
    def rounds(self) -> int:
        """How many rounds it takes. A person is asked in so many, and pays once for all."""
        ...

    @property
    def sensitivity(self) -> Sensitivity:
        """Of the integer vectors of all rounds, one below the other: what is paid for."""
        ...

    @property
    def bound(self) -> int:
        """Largest absolute value of any coordinate of one person's vector: sizes the modulus."""
        ...

    @property
    def gap(self) -> int:
        """In how many rounds a person newly brings something once; 1 where they do in each."""
        ...

    @property
    def least_at_node(self) -> int:
        """For how many people a node must speak to be asked."""
        ...

    @property
    def noised_by_node(self) -> bool:
        """Whether what a node brings carries all its noise already, so that sums need none."""
        ...

    def verify_here(self) -> None:
        """Raise `ManifestError` where this machine lacks what answering takes.

        Asked before a node says that it would take part: else it would be counted, and others pay.
        """
        ...

    def price(self, noise: NoisePlan, *, delta: float, closeness: float) -> PrivacyCost:
        """What the answer costs a person, all its rounds. Raises `AccountingError`: no bound.

        `noise`: the declared one. `closeness`: of what nodes add together to it.
        """
        ...

    def begin(self, given: bytes, *, index: int = 0) -> Contribution:
        """One round's contribution, from what comes with the round: weights, or nothing.

        `given` is the coordinator's and not to be believed. `index`: which of the question's rounds
        it is, from 0. Raises `ProtocolError` for what this question never starts from.
        """
        ...


class Statistic(Query, Contribution, Protocol):
    """A question that one round answers (`analytics`), in numbers for readers."""

    def decode(
        self, total: NDArray[np.int64], *, noise: NoisePlan, people: int, level: float
    ) -> Answer:
        """From the noisy sum to an answer. `people` took part (public, or its lower bound)."""
        ...


class RandomBits(Protocol):
    """A source of cryptographic random bits: the operating system's, or a seed's stream."""

    def bits(self, count: int) -> int:
        """`count` independent fair bits as an integer in [0, 2^count)."""
        ...
