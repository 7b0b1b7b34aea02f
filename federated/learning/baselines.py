"""What a sceptic compares a model with: the person's own past, and models trained in other ways.

Pure functions over people's rows, given as two lists: whom may be learned from, and who is held
out. Nothing here is released or runs on a device: it is for public data and for a site's own.

Each returns `Scored`: predictions of the held-out people's examples beside the truth, so that all
of them are judged by the same figures on the same examples. Only `own_mean` and `last_value` lack
predictions for examples without a past; `common` keeps those that all have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from federated.accounting import calibrate
from federated.aggregation.noise import sample
from federated.learning.examples import examples_of, history_of
from federated.learning.models import gradient, initial, predict
from federated.learning.personal import predict_newer
from federated.learning.round_query import TrainQuery
from federated.learning.site import SiteTraining, train_people
from federated.learning.spec import Examples, TrainSpec
from federated.model import NoisePlan, PersonRows, RandomBits, Sensitivity

type People = Sequence[PersonRows]
type _Floats = NDArray[np.float64]

_SEED: Final = b"baselines"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Predictions of held-out examples, person after person; NaN where there is none.

    As `models.predict` gives them: probabilities, or numbers on the label's scale.
    """

    scores: NDArray[np.float64] = field(repr=False)
    truth: NDArray[np.float64] = field(repr=False)

    def among(self, kept: NDArray[np.bool_]) -> Scored:
        """Of some of the examples."""
        return Scored(scores=self.scores[kept], truth=self.truth[kept])

    @property
    def auc(self) -> float:
        """Area under the ROC curve, ties counted half; NaN if there is only one class."""
        known = ~np.isnan(self.scores)
        positive = self.truth[known] == 1
        ranks = rankdata(self.scores[known])
        ones, zeros = int(positive.sum()), int((~positive).sum())
        if not ones or not zeros:
            return math.nan
        return float((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))

    def mae(self, spec: TrainSpec) -> float:
        """Mean absolute error in the label's own unit, predictions cut to the label's bounds."""
        known = ~np.isnan(self.scores)
        errors = np.abs(np.clip(self.scores[known], -1, 1) - self.truth[known])
        return float(errors.mean()) * (spec.label.high - spec.label.low) / 2


def common(*scored: Scored) -> tuple[Scored, ...]:
    """The same examples for all: those of which each has a prediction."""
    kept = np.all([~np.isnan(one.scores) for one in scored], axis=0)
    return tuple(one.among(kept) for one in scored)


def own_mean(spec: TrainSpec, held_out: People) -> Scored:
    """Each person's mean of all labels known before the one that is predicted. Learns nothing."""
    pasts = [history_of(spec, rows).mean for rows in held_out]
    return Scored(scores=_joined(pasts), truth=pooled(spec, held_out).y)


def last_value(spec: TrainSpec, held_out: People) -> Scored:
    """Each person's newest label before the one that is predicted. Learns nothing."""
    pasts = [history_of(spec, rows).last for rows in held_out]
    return Scored(scores=_joined(pasts), truth=pooled(spec, held_out).y)


def scored(spec: TrainSpec, weights: _Floats, held_out: People) -> Scored:
    """What weights from anywhere predict.

    With a personal head, made of each person's older examples, nothing for those: NaN.
    """
    examples = pooled(spec, held_out)
    if spec.personal is not None:
        return Scored(scores=_joined(_newer(spec, weights, held_out)), truth=examples.y)
    return Scored(scores=predict(spec, weights, examples.x), truth=examples.y)


def centralised(spec: TrainSpec, train: People, *, steps: int, rate: float) -> _Floats:
    """Weights of plain gradient descent over everybody's examples in one place. No privacy.

    Each example counts the same, as it does where rows are pooled; the decay is `spec.work.l2`.
    """
    return centralised_on(spec, pooled(spec, train), steps=steps, rate=rate)


def centralised_on(spec: TrainSpec, examples: Examples, *, steps: int, rate: float) -> _Floats:
    """The same where everybody's examples are in one place already."""
    weights = initial(spec, seed=_SEED)
    for _ in range(steps):
        weights = weights - rate * gradient(spec, weights, examples)
    return weights


def centralised_private(
    spec: TrainSpec, train: People, *, epsilon: float, delta: float, random: RandomBits
) -> _Floats:
    """Weights from one curator who sees all rows and is trusted with them. Unit: the person.

    `spec.rounds` rounds over everybody, each the sum of clipped updates and discrete Gaussian noise
    from the exact sampler, (ε, δ) together (zCDP), zero-out. What is left when nobody has to be
    protected from the curator: one draw of noise, no drop-outs, no modulus.
    """
    query = TrainQuery(spec=spec)
    noise = noise_for(spec, epsilon=epsilon, delta=delta)
    weights = initial(spec, seed=_SEED)
    for _ in range(spec.rounds):
        at = query.at(weights)
        total = np.zeros(at.dimension, dtype=np.int64)
        for rows in train:
            total += at.encode(rows, random)
        total += sample(at.dimension, plan=noise, random=random)
        step = at.decode(total, noise=noise, people=len(train), level=0.95)
        weights = weights + step.update
    return weights


def centralised_dp_sgd(training: SiteTraining, train: People, *, random: RandomBits) -> _Floats:
    """Weights from the same curator by DP-SGD (`site`): people drawn anew in each step.

    (ε, δ) is the training's own (`SiteTraining.calibrated`), zero-out.
    """
    return train_people(training, train, random=random).weights


def noise_for(spec: TrainSpec, *, epsilon: float, delta: float) -> NoisePlan:
    """The noise of each round so that all `spec.rounds` together cost at most (ε, δ).

    zCDP adds up: T rounds of l2 cost what one of √T · l2 does.
    """
    one = TrainQuery(spec=spec).rounding.sensitivity
    whole = Sensitivity(l1=one.l1 * spec.rounds, l2=one.l2 * math.sqrt(spec.rounds))
    return calibrate("discrete_gaussian", whole, epsilon=epsilon, delta=delta)


def each_alone(
    spec: TrainSpec, sites: Sequence[tuple[People, People]], *, steps: int, rate: float
) -> tuple[Scored, ...]:
    """Each site's own model, trained on its own people, judged on its own held-out people.

    `sites`: for each the people to learn from and those held out. No privacy, and none needed as
    long as nothing leaves the site.
    """
    return tuple(
        scored(spec, centralised(spec, train, steps=steps, rate=rate), held_out)
        for train, held_out in sites
    )


def each_alone_private(
    training: SiteTraining, sites: Sequence[tuple[People, People]], *, random: RandomBits
) -> tuple[Scored, ...]:
    """Each site's own model by DP-SGD over its own people, judged on its own held-out people.

    What a site could publish by itself. ε and δ of the training for each, since nobody is at two;
    a site divides by `rate` times its own people, whose number is public in zero-out.
    """
    found = []
    for train, held_out in sites:
        own = replace(training, divisor=training.rate * max(len(train), 1))
        found.append(
            scored(training.spec, train_people(own, train, random=random).weights, held_out)
        )
    return tuple(found)


def pooled(spec: TrainSpec, people: People) -> Examples:
    """Everybody's examples, person after person."""
    each = [examples_of(spec, rows) for rows in people]
    if not each:
        shape = (0, spec.steps, spec.inputs) if spec.kind == "gru" else (0, spec.inputs)
        return Examples(x=np.zeros(shape), y=np.zeros(0))
    return Examples(x=np.concatenate([one.x for one in each]), y=_joined([one.y for one in each]))


def _newer(spec: TrainSpec, body: _Floats, people: People) -> list[_Floats]:
    found = []
    for rows in people:
        examples = examples_of(spec, rows)
        scores = predict_newer(spec, body, examples)[1]
        found.append(np.append(np.full(len(examples.y) - len(scores), np.nan), scores))
    return found


def _joined(parts: Sequence[_Floats]) -> _Floats:
    return np.concatenate(parts) if parts else np.zeros(0)
