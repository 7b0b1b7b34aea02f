"""From a round's noisy sum to the next weights; state that survives a crash; when to stop.

Lives here: `FedAvg`, `FedAvgM`, `Correlated` (matrix-factorisation DP-FTRL around either), the
state of a training and its bytes, averages of the last weights, rules for stopping early. Pure:
whatever it computes is post-processing of noisy sums and of the public number of people, so nothing
here costs privacy. Not here: clip and sums (`clipping`, `aggregation`), factors (`factorisation`).

The same sums give the same weights, bit for bit, on one machine: a run that was stopped anywhere
goes on from its last state as if it had not been.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from federated.errors import CheckpointError, CohortError, ManifestError
from federated.learning.factorisation import Factors, decode_next
from federated.learning.spec import MAX_PARAMETERS, MAX_ROUNDS

_MAGIC: Final = b"havengate/training-state/v1\n"
_HEADER: Final = struct.Struct("<QQQQd")
_DIGEST_BYTES: Final = 32
_MOST_RECENT: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingState:
    """All that a training knows after `done` rounds; noisy, so it says no more than the sums did.

    `velocity`: momentum, zeros without. `average`: mean of the weights after the last `averaged`
    rounds. `clip`: that of the next round. `recent`: sums decoded last, newest first, shape
    (bands - 1 or fewer, parameters). Arrays are copies that nobody can write to.
    """

    done: int
    weights: NDArray[np.float64] = field(repr=False)
    velocity: NDArray[np.float64] = field(repr=False)
    average: NDArray[np.float64] = field(repr=False)
    averaged: int
    clip: float
    recent: NDArray[np.float64] = field(repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError for shapes or numbers that no training has."""
        for name in ("weights", "velocity", "average", "recent"):
            own = np.array(getattr(self, name), dtype=np.float64)
            own.setflags(write=False)
            object.__setattr__(self, name, own)
        size = self.weights.size
        flat = all(one.shape == (size,) for one in (self.weights, self.velocity, self.average))
        if not flat or self.recent.ndim != 2 or self.recent.shape[1] != size:  # noqa: PLR2004
            raise ValueError("expected one flat vector each, and rows of the same length")
        if not 1 <= size <= MAX_PARAMETERS or len(self.recent) > min(_MOST_RECENT, self.done):
            raise ValueError(f"expected 1 to {MAX_PARAMETERS} parameters and a row a round at most")
        if not 0 <= self.averaged <= self.done <= MAX_ROUNDS or not 0 < self.clip < math.inf:
            raise ValueError("expected counts of rounds within the rounds, and a positive clip")
        if not all(np.isfinite(one).all() for one in self._arrays()):
            raise ValueError("expected finite numbers; the training ran away")

    def _arrays(self) -> tuple[NDArray[np.float64], ...]:
        return self.weights, self.velocity, self.average, self.recent

    @property
    def released(self) -> NDArray[np.float64]:
        """What would be released now: the average where there is one, else the weights."""
        return self.average if self.averaged else self.weights

    def to_bytes(self, *, study: bytes) -> bytes:
        """Canonical bytes; the same on every machine. `study`: 32 bytes that name the study."""
        header = _HEADER.pack(
            self.weights.size, self.done, self.averaged, len(self.recent), self.clip
        )
        body = b"".join(one.astype("<f8").tobytes() for one in self._arrays())
        whole = _MAGIC + _named(study) + header + body
        return whole + hashlib.sha256(whole).digest()


def parse_state(data: bytes, *, study: bytes) -> TrainingState:
    """The state that `to_bytes` wrote, exactly.

    Raises `CheckpointError` for bytes that are cut, altered, or another study's: the caller goes
    back to the state before, and never repeats a round that was dispatched. The digest finds
    accidents; who may write to the coordinator's files is not its business.
    """
    start = len(_MAGIC) + _DIGEST_BYTES + _HEADER.size
    if len(data) < start + _DIGEST_BYTES or not data.startswith(_MAGIC):
        raise CheckpointError("This is no training state of version 1; go back to an earlier one.")
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if not hmac.compare_digest(hashlib.sha256(body).digest(), digest):
        raise CheckpointError("A training state is damaged or cut; go back to an earlier one.")
    if data[len(_MAGIC) :][:_DIGEST_BYTES] != _named(study):
        raise CheckpointError("This training state is another study's; resume that study instead.")
    size, done, averaged, rows, clip = _HEADER.unpack_from(body, len(_MAGIC) + _DIGEST_BYTES)
    if rows > _MOST_RECENT or size > MAX_PARAMETERS or len(body) - start != 8 * size * (3 + rows):
        raise CheckpointError("A training state has another length than it says.")
    numbers = np.frombuffer(body, dtype="<f8", offset=start).reshape(3 + rows, size)
    try:
        return TrainingState(
            done=done,
            weights=numbers[0],
            velocity=numbers[1],
            average=numbers[2],
            averaged=averaged,
            clip=clip,
            recent=numbers[3:],
        )
    except ValueError as error:
        raise CheckpointError(f"A training state says what none can: {error}.") from error


def start(weights: NDArray[np.float64], *, clip: float) -> TrainingState:
    """Before the first round. `weights` are public (`models.initial`)."""
    nothing = np.zeros_like(weights, dtype=np.float64)
    return TrainingState(
        done=0,
        weights=weights,
        velocity=nothing,
        average=nothing,
        averaged=0,
        clip=clip,
        recent=np.zeros((0, np.size(weights))),
    )


class Strategy(Protocol):
    """One round's step."""

    def step(
        self,
        state: TrainingState,
        total: NDArray[np.int64] | NDArray[np.float64],
        *,
        people: int,
        unit: float = 1.0,
    ) -> TrainingState:
        """The state after one more round.

        `total`: noisy sum of people's clipped updates, shape (parameters,), of which 1 stands for
        `unit` of the weights (clip/scale). `people`: how many took part; public, so that dividing
        by it costs nothing. Raises `CohortError` for nobody, ValueError for another shape or sums
        that are not finite.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAvg:
    """Weights move by `rate` times people's mean update (McMahan et al. 2017; DP: 2018).

    From round `average_from` on (0: never) the state also keeps the mean of all weights since:
    averaging the last iterates (Polyak and Juditsky 1992) takes noise off that the steps put in.
    """

    rate: float = 1.0
    average_from: int = 0

    def __post_init__(self) -> None:
        """Raises `ManifestError` for a rate that goes nowhere."""
        _check_rate(self.rate, self.average_from)

    def step(
        self,
        state: TrainingState,
        total: NDArray[np.int64] | NDArray[np.float64],
        *,
        people: int,
        unit: float = 1.0,
    ) -> TrainingState:
        """As `Strategy.step`."""
        mean = _mean(state, total, people, unit)
        return _moved(state, self.rate * mean, state.velocity, self.average_from)


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAvgM:
    """The same with momentum on the server: v ← momentum·v + mean, weights move by rate·v.

    Hsu, Qi, Brown (2019). With `nesterov` they move by rate·(momentum·v + mean). A steady mean is
    followed 1/(1 - momentum) times as fast: choose the rate with it.
    """

    rate: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False
    average_from: int = 0

    def __post_init__(self) -> None:
        """Raises `ManifestError` for a rate that goes nowhere or momentum that never ends."""
        _check_rate(self.rate, self.average_from)
        if not 0 <= self.momentum < 1:
            raise ManifestError(f"Momentum is at least 0 and below 1, not {self.momentum}.")

    def step(
        self,
        state: TrainingState,
        total: NDArray[np.int64] | NDArray[np.float64],
        *,
        people: int,
        unit: float = 1.0,
    ) -> TrainingState:
        """As `Strategy.step`."""
        mean = _mean(state, total, people, unit)
        velocity = self.momentum * state.velocity + mean
        ahead = self.momentum * velocity + mean if self.nesterov else velocity
        return _moved(state, self.rate * ahead, velocity, self.average_from)


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlated:
    """Matrix-factorisation DP-FTRL: totals are noisy rows of C·x; `inner` gets what they decode to.

    Kairouz et al. (2021), Denisov et al. (2022), Choquette-Choo et al. (2023). `total` must be in
    the integers that were combined, whatever the clip of the rounds was: `unit` belongs to the
    newest round's update, and `people` are those who brought a *new* update in it.
    """

    inner: FedAvg | FedAvgM
    factors: Factors

    def step(
        self,
        state: TrainingState,
        total: NDArray[np.int64] | NDArray[np.float64],
        *,
        people: int,
        unit: float = 1.0,
    ) -> TrainingState:
        """As `Strategy.step`."""
        _check_total(state, total)
        newest = decode_next(total, state.recent, self.factors)
        kept = np.concatenate([newest[None, :], state.recent])[: self.factors.bands - 1]
        moved = self.inner.step(state, newest, people=people, unit=unit)
        return replace(moved, recent=kept)

    def lost(self, state: TrainingState) -> TrainingState:
        """The state after a round that was dispatched and has no sum. It keeps its number.

        Its row is decoded as zeros: earlier rounds stay whole, and of its own updates the later
        rows bring a part back. Asking the same round again would be one row too many.
        """
        nothing = np.zeros((1, state.weights.size))
        kept = np.concatenate([nothing, state.recent])[: self.factors.bands - 1]
        return replace(state, done=state.done + 1, recent=kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoMoreGain:
    """Stop when private evaluations no longer rise: decided by released scores alone.

    The mean of the last `patience` scores is held against that of the `patience` before. Training
    stops if even `sureness` deviations of that difference's noise above it, it is below
    `least_gain`: noise alone seldom ends a training that still gains.

    It does not leak, since it reads only what was released, and costs nothing. Nor does it give
    anything back: whether a run stopped is an outcome too, so the cost of *all* rounds that were
    announced is what a person paid (reserved beforehand, never refunded). What is saved is people's
    time and batteries.
    """

    patience: int = 3
    least_gain: float = 0.002
    sureness: float = 1.0

    def __post_init__(self) -> None:
        """Raises `ManifestError` for a rule that cannot decide."""
        if self.patience < 1 or not (math.isfinite(self.least_gain) and 0 <= self.sureness < 100):  # noqa: PLR2004
            raise ManifestError("Stopping needs a patience of 1 or more and a finite gain.")

    def stops(self, scores: Sequence[float], *, deviation: float) -> bool:
        """Whether to stop after these released scores, oldest first, higher being better.

        `deviation`: of each score's noise, which is public. A score that is no number never stops.
        """
        if len(scores) < 2 * self.patience:
            return False
        last = float(np.mean(scores[-self.patience :]))
        before = float(np.mean(scores[-2 * self.patience : -self.patience]))
        blur = self.sureness * deviation * math.sqrt(2 / self.patience)
        return last - before + blur < self.least_gain


@dataclass(frozen=True, slots=True, kw_only=True)
class LostInNoise:
    """Stop when the last `patience` rounds' noisy sums together look like noise alone.

    Their total's squared length over its noise variance is chi-square with as many degrees of
    freedom as parameters if nothing is in it; below the `level` quantile, training goes on at
    random. For independent noise only (not sums decoded from `Correlated`). It reads released sums:
    what `NoMoreGain` says about leaks and costs holds here too.
    """

    patience: int = 3
    level: float = 0.95

    def __post_init__(self) -> None:
        """Raises `ManifestError` for a rule that cannot decide."""
        if self.patience < 1 or not 0 < self.level < 1:
            raise ManifestError("Stopping needs a patience of 1 or more and a level of 0 to 1.")

    def stops(
        self,
        totals: Sequence[NDArray[np.int64]] | Sequence[NDArray[np.float64]],
        *,
        deviation: float,
    ) -> bool:
        """Whether to stop after these noisy sums, oldest first, each of noise `deviation`."""
        from scipy.stats import chi2

        if len(totals) < self.patience or deviation <= 0:
            return False
        total = np.sum(np.asarray(totals[-self.patience :], dtype=np.float64), axis=0)
        length = float(total @ total) / (self.patience * deviation**2)
        return length < float(chi2.ppf(self.level, df=total.size))


def _named(study: bytes) -> bytes:
    if len(study) != _DIGEST_BYTES:
        raise ValueError(f"expected {_DIGEST_BYTES} bytes that name the study, got {len(study)}")
    return study


def _check_rate(rate: float, average_from: int) -> None:
    if not 0 < rate < math.inf or not 0 <= average_from <= MAX_ROUNDS:
        raise ManifestError(f"A rate is above 0 and `average_from` a round, not {rate}.")


def _check_total(state: TrainingState, total: NDArray[np.int64] | NDArray[np.float64]) -> None:
    if total.shape != state.weights.shape or not np.isfinite(total).all():
        raise ValueError(f"expected {state.weights.size} finite sums, got shape {total.shape}")


def _mean(
    state: TrainingState,
    total: NDArray[np.int64] | NDArray[np.float64],
    people: int,
    unit: float,
) -> NDArray[np.float64]:
    _check_total(state, total)
    if people < 1:
        raise CohortError("Nobody took part in this round; keep the weights and ask again.")
    return np.asarray(total * (unit / people), dtype=np.float64)


def _moved(
    state: TrainingState,
    by: NDArray[np.float64],
    velocity: NDArray[np.float64],
    average_from: int,
) -> TrainingState:
    weights = state.weights + by
    done, average, averaged = state.done + 1, state.average, state.averaged
    if 0 < average_from <= done:
        averaged += 1
        average = average + (weights - average) / averaged
    return replace(
        state, done=done, weights=weights, velocity=velocity, average=average, averaged=averaged
    )
