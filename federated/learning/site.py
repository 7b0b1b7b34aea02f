"""Training at one place that holds many people's rows and is trusted with them: a clinic, a site.

DP-SGD (Abadi et al. 2016) with one person as one example. In each step everybody is drawn by
themselves with probability `rate`, from cryptographic bits; Opacus gives the sum of the drawn
people's gradients, clipped and rounded to integers (`clipped`); discrete Gaussian noise from the
exact sampler is added, and the result divided by a number that was fixed beforehand. Nothing of
Opacus' own loader, optimiser, noise or accountant is used: its noise is a float from torch's
generator, and it divides by ⌊rate · people⌋, which is data where the number of people is.

Unit: the person, in `train_people`. Adjacency: zero-out, which with a fixed divisor is add/remove
(`sampled`). Trust: the site sees all; who gets the weights of each step learns (ε, δ) of a person.

`train_records` protects single *examples* of one person, for a device that wants that in addition.
Its result is another type, has no ε of a person, and no claim can be made of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray

from federated.aggregation.bits import WordSource, word_source
from federated.aggregation.noise import sample
from federated.errors import AccountingError, ManifestError
from federated.learning.examples import examples_of
from federated.learning.export import Provenance
from federated.learning.models import decayed, initial, parameters
from federated.learning.sampled import sampled_epsilon, sampled_multiplier
from federated.learning.spec import Examples, TrainSpec
from federated.model import NO_ROWS, NoisePlan, PersonRows, RandomBits, Sensitivity

type Unit = Literal["person", "record"]
type _Floats = NDArray[np.float64]

#: Integers to which a clipped gradient is rounded: fine enough that rounding costs nothing.
_FINENESS: Final = 2.0**24
#: By how much more than the clip a person may move a step's integers, beside what rounding does.
#: None is known: rounding itself moves them by √d/2 at most, and √d is counted.
_FLOATS: Final = 2.0**-16
_SMALLEST_CLIP: Final = 2.0**-64
#: Where a weight is larger, training stops. A gradient may be no number even below it (`clipped`).
LARGEST_WEIGHT: Final = 1024.0
_MOST_STEPS: Final = 100_000
_SEED: Final = b"site"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteTraining:
    """What is done, all fixed before anybody's rows are read.

    `clip`: L2 norm of a person's gradient. `rate`: probability with which each person is in a step.
    `divisor`: what a step's sum is divided by, as `rate` times the people enrolled; a public number
    and never one of those drawn. `multiplier`: the noise in units of what a person can move.
    `step_size` along the noisy mean gradient and the decay `spec.work.l2`; of `spec.work` nothing
    else counts here. `averaged`: of how many last steps' weights the result is the mean.
    """

    spec: TrainSpec
    clip: float
    rate: float
    steps: int
    divisor: float
    multiplier: float
    step_size: float = 1.0
    averaged: int = 1

    def __post_init__(self) -> None:
        """Raises `ManifestError` for what cannot be done, `AccountingError` for what has no ε."""
        if not _SMALLEST_CLIP <= self.clip <= 1 / _SMALLEST_CLIP:
            # Squares of much smaller gradients vanish, and with them the norm that bounds a person.
            raise ManifestError(
                f"{self.spec.name}: `clip` must be from 2^-64 to 2^64, not {self.clip}."
            )
        numbers = (("divisor", self.divisor), ("step_size", self.step_size))
        for name, value in numbers:
            if not (math.isfinite(value) and value > 0):
                raise ManifestError(
                    f"{self.spec.name}: `{name}` must be a number above 0, not {value}."
                )
        if not 1 <= self.averaged <= self.steps <= _MOST_STEPS:
            raise ManifestError(
                f"{self.spec.name}: expected 1 to {_MOST_STEPS:,} `steps` and `averaged` from 1 to "
                f"as many, got {self.steps} and {self.averaged}."
            )
        if self.spec.personal is not None:
            raise ManifestError(
                f"{self.spec.name}: personal heads are made on devices; a site trains whole models."
            )
        if not 0 < self.rate <= 1:
            raise AccountingError(f"A sampling rate is above 0 and at most 1, not {self.rate}.")
        if not (math.isfinite(self.multiplier) and self.multiplier > 0):
            raise AccountingError(
                f"The noise multiplier must be a number above 0, not {self.multiplier}: without "
                "noise nobody is protected."
            )

    @property
    def sensitivity(self) -> Sensitivity:
        """Of one step's integers. Rounding each of two sums moves their difference by √d at most.

        The clip in integers, the margin of double arithmetic, and √d.
        """
        root = math.sqrt(parameters(self.spec))
        l2 = _FINENESS * (1 + _FLOATS) + root
        return Sensitivity(l1=l2 * root, l2=l2)

    @property
    def noise(self) -> NoisePlan:
        """What each step's sum carries, in integers."""
        return NoisePlan(
            mechanism="discrete_gaussian", scale=self.multiplier * self.sensitivity.l2 * (1 + 1e-12)
        )

    def calibrated(self, *, epsilon: float, delta: float) -> SiteTraining:
        """The same with the least noise at which all steps together cost at most (ε, δ)."""
        found = sampled_multiplier(epsilon=epsilon, delta=delta, rate=self.rate, steps=self.steps)
        return replace(self, multiplier=found)

    def epsilon(self, *, delta: float) -> float:
        """A proven ε at `delta` of all steps, for the unit that is sampled."""
        return sampled_epsilon(
            multiplier=self.multiplier, rate=self.rate, steps=self.steps, delta=delta
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonLevel:
    """Weights that protect people: all that `models.predict` and `export` take."""

    unit: ClassVar[Unit] = "person"
    training: SiteTraining
    weights: NDArray[np.float64] = field(repr=False)

    def epsilon(self, *, delta: float) -> float:
        """Of a person, at `delta`, zero-out."""
        return self.training.epsilon(delta=delta)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLevel:
    """Weights that protect single examples of one person, and not the person.

    An example, not a day: a day is in several examples where features have a `lag` or are `within`,
    or the label lies ahead.
    """

    unit: ClassVar[Unit] = "record"
    training: SiteTraining
    weights: NDArray[np.float64] = field(repr=False)

    def record_epsilon(self, *, delta: float) -> float:
        """Of one example, at `delta`, zero-out. Says nothing of a person."""
        return self.training.epsilon(delta=delta)


def train_people(
    training: SiteTraining,
    people: Sequence[PersonRows],
    *,
    random: RandomBits,
    start: NDArray[np.float64] | None = None,
) -> PersonLevel:
    """DP-SGD over people. `start`: public weights, zeros or drawn from a public seed if not given.

    A step in which nobody is drawn adds noise like any other. Who has no example is drawn as
    everybody is, and says zeros. Raises `ManifestError` where weights run away.
    """
    examples = [_examples(training.spec, rows) for rows in people]
    weights = _descend(training, examples, random, start)
    return PersonLevel(training=training, weights=weights)


def train_records(
    training: SiteTraining,
    rows: PersonRows,
    *,
    random: RandomBits,
    start: NDArray[np.float64] | None = None,
) -> RecordLevel:
    """DP-SGD over one person's examples, each by itself. Not to be released: see `RecordLevel`."""
    own = examples_of(training.spec, rows)
    each = [Examples(x=own.x[[place]], y=own.y[[place]]) for place in range(len(own.y))]
    return RecordLevel(training=training, weights=_descend(training, each, random, start, most=1))


def provenance(model: PersonLevel, *, study_hash: str, delta: float) -> Provenance:
    """What a released model says of its privacy. The only way from here to a claim.

    Raises `AccountingError` for anything that does not protect people, whatever the types said.
    """
    if type(model) is not PersonLevel:
        raise AccountingError(
            "A claim is about people, and this model protects something else (records of one "
            "person, or nothing that is known): train with `train_people`."
        )
    return Provenance(study_hash=study_hash, epsilon=model.epsilon(delta=delta), delta=delta)


def _examples(spec: TrainSpec, rows: PersonRows) -> Examples:
    """A person's examples; none where their rows are not what rows must be.

    Whatever one person's rows raise must not become everybody's answer.
    """
    try:
        return examples_of(spec, rows)
    except Exception:  # noqa: BLE001 - of whatever kind
        return examples_of(spec, NO_ROWS)


def _descend(
    training: SiteTraining,
    examples: Sequence[Examples],
    random: RandomBits,
    start: _Floats | None,
    *,
    most: int | None = None,
) -> _Floats:
    from federated.learning.clipped import Clipper, padded

    spec, source = training.spec, word_source(random)
    weights, clipper = _start(spec, start), Clipper(spec)
    data = padded(spec, examples, most=most)
    scale, decay = _FINENESS / training.clip, spec.work.l2 * decayed(spec)
    mean = np.zeros_like(weights)
    for step in range(training.steps):
        drawn = np.zeros(len(examples), dtype=bool)
        drawn[_drawn(len(examples), training.rate, source)] = True
        total = clipper.clipped_sum(
            weights, data, clip=training.clip, fineness=_FINENESS, drawn=drawn
        )
        total += sample(len(weights), plan=training.noise, random=random)
        slope = total / scale / training.divisor + decay * weights
        weights = weights - training.step_size * slope
        _check_weights(spec, weights)
        if step >= training.steps - training.averaged:
            mean += weights / training.averaged
    return mean


def _drawn(people: int, rate: float, source: WordSource) -> NDArray[np.intp]:
    """Places of those who are drawn, each with a probability of `rate`, or 2^-64 less."""
    if rate == 1:
        return np.arange(people)
    return np.flatnonzero(source.words(people) < np.uint64(int(rate * 2**64)))


def _start(spec: TrainSpec, start: _Floats | None) -> _Floats:
    if start is None:
        return initial(spec, seed=_SEED)
    if start.shape != (parameters(spec),):
        raise ManifestError(
            f"{spec.name}: expected {parameters(spec)} weights to start from, got {start.shape}."
        )
    _check_weights(spec, start)
    return np.array(start, dtype=np.float64)


def _check_weights(spec: TrainSpec, weights: _Floats) -> None:
    """Of noisy weights only, so that stopping says nothing that they do not."""
    if not (np.abs(weights) <= LARGEST_WEIGHT).all():
        raise ManifestError(
            f"{spec.name}: the weights run away, beyond {LARGEST_WEIGHT:g}. Nothing was released. "
            "Take a smaller `step_size`, more people in a step, or less noise."
        )
