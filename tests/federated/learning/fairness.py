"""Is the model as right for some as for others? One private answer about people held out.

NHANES' half that no round has asked (`split`), by sex and by age. The model is trained on the other
half at ε = 2; who is held out pays for the answer alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.aggregation.bits import SeededBits
from federated.aggregation.encoding import unscale
from federated.analytics.intervals import carried
from federated.analytics.plan import choose_noise
from federated.learning.baselines import Scored
from federated.learning.evaluate import EvaluateQuery, EvaluateRound, Subgroup
from federated.learning.examples import examples_of
from federated.learning.models import predict
from federated.learning.spec import TrainSpec
from federated.learning.split import is_held_out
from federated.model import Answer, NoisePlan, PersonRows
from tests.federated.learning import targets
from tests.federated.learning.targets import PHQ9, noise_of, trained

#: In a study of NHANES' size a fifth has too few who are ill for each group to be told.
SPEC: Final[TrainSpec] = replace(PHQ9.spec, held_out=0.5)
SEX: Final = Subgroup(column="sex", edges=(-0.5, 0.5, 1.5))
AGE: Final = Subgroup(column="age_years", edges=(18, 40, 60, 80))
#: Few steps of scores: each one more has noise of its own.
BINS: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A private model, and the people whom no round of its training asked."""

    weights: NDArray[np.float64] = field(repr=False)
    learned_from: tuple[PersonRows, ...] = field(repr=False)
    held_out: tuple[PersonRows, ...] = field(repr=False)


@cache
def judged() -> Judged:
    """Trained at ε = 2 on those whom the node's rule does not hold out."""
    _, rows = targets.split(PHQ9)
    out = [
        is_held_out(study="fairness", tag=f"{place}", fraction=SPEC.held_out)
        for place in range(len(rows))
    ]
    learn = tuple(one for one, kept in zip(rows, out, strict=True) if not kept)
    noise = noise_of(SPEC, epsilon=2.0, delta=PHQ9.delta)
    examples = [examples_of(SPEC, one) for one in learn]
    return Judged(
        weights=trained(SPEC, examples, strategy=PHQ9.strategy, noise=noise, seed=0),
        learned_from=learn,
        held_out=tuple(one for one, kept in zip(rows, out, strict=True) if kept),
    )


def question(weights: NDArray[np.float64], *, bins: int = BINS) -> EvaluateRound:
    """What is asked of people held out, by sex and by age."""
    return EvaluateQuery(spec=SPEC, bins=bins, subgroups=(SEX, AGE)).at(weights)


def summed(query: EvaluateRound, people: Sequence[PersonRows]) -> NDArray[np.int64]:
    """Everybody's integers, before noise."""
    bits = SeededBits(bytes(32), b"fairness")
    total: NDArray[np.int64] = np.sum([query.encode(rows, bits) for rows in people], axis=0)
    return total


def noisy(
    query: EvaluateRound, total: NDArray[np.int64], *, epsilon: float, seed: int
) -> tuple[NDArray[np.int64], NoisePlan]:
    """The sum as four sites' shares of noise leave it, and the noise that is then in it."""
    noise = choose_noise(query, epsilon=epsilon, delta=PHQ9.delta)
    schedule = targets.shared_noise(noise)
    bits = SeededBits(seed.to_bytes(32), b"noise")
    granular = total * schedule.granularity + targets.left_in_sum(schedule, len(total), bits)
    left = carried(noise, float(schedule.weight(targets.SITES)))
    return unscale(granular, schedule.granularity), left


def answer(
    query: EvaluateRound, total: NDArray[np.int64], people: int, *, epsilon: float, seed: int
) -> Answer:
    """What the question releases."""
    released, left = noisy(query, total, epsilon=epsilon, seed=seed)
    return query.decode(released, noise=left, people=people, level=0.95)


def exact(weights: NDArray[np.float64], people: Sequence[PersonRows]) -> dict[str, float]:
    """The same figures of the same people from their rows, by the names that an answer has."""
    found = {}
    for name, group in groups(people).items():
        examples = targets.joined([examples_of(SPEC, one) for one in group])
        scores = predict(SPEC, weights, examples.x)
        end = f", {name}" if name else ""
        found[f"AUC{end}"] = Scored(scores=scores, truth=examples.y).auc
        found[f"predicted minus observed{end}"] = float(np.mean(scores - examples.y))
    return found


def groups(people: Sequence[PersonRows]) -> dict[str, list[PersonRows]]:
    """Everybody under the empty name, then each group."""
    found = {"": list(people)}
    for subgroup in (SEX, AGE):
        for place, name in enumerate(subgroup.names()):
            found[name] = [one for one in people if subgroup.group_of(one) == place]
    return found
