"""Was the noise of a training as large as it costs? An audit of the run itself, by canaries.

Lives here: the lanes of all rounds, the guess who of the canaries is in, the lower bound of ε that
its success proves, and how much noise the lanes have. Not here: canaries and coins (`canaries`),
the statistics of guesses (`one_run_bound`), the claim (`training_cost`). Pure.

What is audited: the noise that was drawn, scaled, shared out, masked, unmasked, taken off and
decoded in this run, of all nodes together, against the ε that is claimed, for the largest
contribution that a person may make. Unit: the person. Adjacency: zero-out. Trust: the coordinator
audits the nodes and its own software; its coins are secret from the nodes.

What is not audited:
- that a node clips and rounds real people's updates (`aggregation.encoding` bounds them, on the
  node), and that it appends zeros on the lanes: canaries are not clipped by anybody;
- noise of coordinates that are no lanes: a node's program draws all of them in one go, one that was
  tampered with need not;
- what colluding nodes know: the sum carries their noise too, the claim does without it;
- the coordinator: it draws the coins and reads the sums.
Passing is no proof of privacy. The bound is one-sided: it refutes claims, and never confirms any.

Two looks at the same lanes. `Audit.result` bounds ε itself and presumes nothing about noise; it is
coarse, and a claim must be wrong by far to be refuted (`one_run_bound.power`). `Audit.noise` knows
the coins, and measures the noise that is left against the plan: a thousand canaries find a tenth of
the variance missing in ten rounds, or three tenths in one of them. It says nothing of ε.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.errors import AccountingError, CheckpointError
from federated.learning.canaries import Canaries, opened, packed, sealed, unpack
from federated.learning.one_run_bound import guesses_for, lower_bound
from federated.learning.spec import MAX_ROUNDS
from federated.model import NoisePlan

#: What `Audit.result` is sure to, unless it is asked otherwise.
CONFIDENCE: Final = 0.95
#: How often `Audit.noise` may find noise missing that is not.
FALSE_ALARM: Final = 1e-6
_MAGIC: Final = b"havengate/privacy-audit/v1\n"
_HEADER: Final = struct.Struct("<Q")
#: Noise is taken to be at least this share of the shift, squared: with less, guesses never fail.
_LEAST_SHARE: Final = 2.0**-10


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """What guessing proves: the training is not (ε, `delta`)-private for any ε < `lower_bound`.

    With that `confidence`: of audits of trainings that keep their claim, at most 1 - `confidence`
    do not pass. `guesses` of `canaries` coins were guessed, `correct` of them right.
    """

    claimed_epsilon: float
    delta: float
    lower_bound: float
    confidence: float
    canaries: int
    guesses: int
    correct: int

    @property
    def passed(self) -> bool:
        """Whether the claim is not refuted."""
        return self.lower_bound <= self.claimed_epsilon


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseCheck:
    """The variance of the lanes' noise as a share of the planned, over all rounds and in each.

    Noise as planned, or more, fails to pass in one of 1/`false_alarm` trainings. `short`: rounds
    (from 0) that by themselves have less than planned.
    """

    share: float
    by_round: tuple[float, ...]
    short: tuple[int, ...]
    false_alarm: float
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Audit:
    """What the lanes of the rounds so far held, canaries included.

    `shifts`: what each canary that is in added in a round (`canaries.lane_shifts`); shape (rounds,)
    in all. `lanes`: shape (rounds, count). A round that was lost has no row.
    """

    canaries: Canaries
    shifts: tuple[int, ...] = ()
    lanes: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros((0, 0), dtype=np.int64), repr=False
    )

    def __post_init__(self) -> None:
        """Raises ValueError for lanes that are not of these canaries and rounds."""
        shape = (len(self.shifts), self.canaries.count)
        own = np.array(self.lanes) if self.lanes.size else np.zeros((0, shape[1]), dtype=np.int64)
        if own.shape != shape or own.dtype != np.int64 or len(self.shifts) > MAX_ROUNDS:
            raise ValueError(f"expected whole numbers of shape {shape}, got {own.shape}")
        if any(shift < 0 for shift in self.shifts):
            raise ValueError("expected shifts of 0 or more")
        own.setflags(write=False)
        object.__setattr__(self, "lanes", own)

    def after(self, sums: NDArray[np.int64], *, shift: int) -> Audit:
        """The audit after one more round.

        `sums`: of the lanes, as unmasking gives them, shape (count,): canaries are added here.
        """
        if sums.shape != (self.canaries.count,):
            raise ValueError(f"expected {self.canaries.count} lanes, got shape {sums.shape}")
        row = sums + self.canaries.added(shift)
        return Audit(
            canaries=self.canaries,
            shifts=(*self.shifts, shift),
            lanes=np.concatenate([self.lanes, row[None, :]]),
        )

    @property
    def scores(self) -> NDArray[np.float64]:
        """How much the lanes speak for each canary, shape (count,): Σ shift·lane/variance.

        The likelihood ratio of Gaussian noise in order, so no score guesses better; for equal
        shifts and noise it is the sum of the rounds. Variances are those of each round's lanes,
        less what half of the canaries make of it: a round with less noise than the others speaks
        louder. Of what was released alone, never of the coins.
        """
        total = np.zeros(self.canaries.count)
        for shift, row in zip(self.shifts, self.lanes, strict=True):
            squared = float(shift) ** 2
            if squared and len(row) > 1:
                spread = float(np.var(row, ddof=1)) - squared / 4
                total += (shift / max(spread, squared * _LEAST_SHARE)) * row
        return total

    def result(
        self, *, epsilon: float, delta: float, confidence: float = CONFIDENCE
    ) -> AuditResult:
        """Guess, count, and bound ε from below. `epsilon`: claimed at `delta` for all rounds.

        The k/2 highest scores are guessed in, the k/2 lowest out, with k by the public rule of
        `guesses_for`, which knows the claim and no score. Raises ValueError for no round at all.
        """
        if not self.shifts:
            raise ValueError("expected one round or more to audit")
        count = self.canaries.count
        guesses = guesses_for(count, epsilon=epsilon, delta=delta)
        # Equal scores stand in the lanes' order, which the coins do not know.
        order = np.argsort(self.scores, kind="stable")
        lowest, highest = order[: guesses // 2], order[count - guesses // 2 :]
        included = self.canaries.included
        correct = int(np.sum(included[highest])) + int(np.sum(~included[lowest]))
        return AuditResult(
            claimed_epsilon=epsilon,
            delta=delta,
            lower_bound=lower_bound(
                canaries=count,
                guesses=guesses,
                correct=correct,
                delta=delta,
                confidence=confidence,
            ),
            confidence=confidence,
            canaries=count,
            guesses=guesses,
            correct=correct,
        )

    def noise(self, plan: NoisePlan, *, false_alarm: float = FALSE_ALARM) -> NoiseCheck:
        """Hold the noise in the lanes against `plan`, that of each round's sum.

        The squares of noise as planned, over its variance, are chi-square to within rounding; each
        round and all together get an equal part of `false_alarm`. More noise than planned passes.
        Raises `AccountingError` for noise that is not a discrete Gaussian of scale 1 or more,
        ValueError for no round at all.
        """
        from scipy.stats import chi2

        if plan.mechanism != "discrete_gaussian" or plan.scale < 1:
            raise AccountingError("Only discrete Gaussian noise of scale 1 or more is measured.")
        if not self.shifts or not 0 < false_alarm < 1:
            raise ValueError("expected one round or more, and a chance above 0 and below 1")
        added = np.array([self.canaries.added(shift) for shift in self.shifts])
        squares = np.sum(((self.lanes - added) / plan.scale) ** 2, axis=1)
        rounds, count = self.lanes.shape
        level = false_alarm / (rounds + 1)
        short = tuple(np.flatnonzero(squares < chi2.ppf(level, count)).tolist())
        whole = float(np.sum(squares))
        return NoiseCheck(
            share=whole / (rounds * count),
            by_round=tuple((squares / count).tolist()),
            short=short,
            false_alarm=false_alarm,
            passed=not short and whole >= float(chi2.ppf(level, rounds * count)),
        )

    def to_bytes(self, *, study: bytes) -> bytes:
        """Canonical bytes, to be kept as secret as the study's state. `study`: 32 bytes."""
        shifts = np.asarray(self.shifts, dtype="<i8").tobytes()
        body = packed(self.canaries) + _HEADER.pack(len(self.shifts)) + shifts
        return sealed(_MAGIC, body + self.lanes.astype("<i8").tobytes(), study=study)


def parse_audit(data: bytes, *, study: bytes) -> Audit:
    """What `to_bytes` wrote. Raises `CheckpointError` for anything else, or another study's."""
    canaries, rest = unpack(opened(_MAGIC, data, study=study))
    try:
        (rounds,) = _HEADER.unpack_from(rest)
        numbers = np.frombuffer(rest, dtype="<i8", offset=_HEADER.size).astype(np.int64)
        return Audit(
            canaries=canaries,
            shifts=tuple(numbers[:rounds].tolist()),
            lanes=numbers[rounds:].reshape(rounds, canaries.count),
        )
    except (struct.error, ValueError, OverflowError) as error:
        raise CheckpointError("A saved audit has another length than it says.") from error
