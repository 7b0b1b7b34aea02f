"""Real people: what the default model reaches without privacy, by person held out, 5 folds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from federated.learning.baselines import (
    Scored,
    centralised,
    common,
    last_value,
    own_mean,
    scored,
)
from federated.learning.spec import TrainSpec
from federated.model import PersonRows
from tests.federated.learning.people import NHANES, PACO, folds, nhanes, paco

type Predictor = Callable[[Sequence[PersonRows], Sequence[PersonRows]], Scored]


def held_out(people: Sequence[PersonRows], predict: Predictor, *, seed: int = 0) -> Scored:
    """Predictions of everybody, each by who was trained without them."""
    found = []
    for chosen in folds(len(people), seed=seed):
        out = set(chosen.tolist())
        train = [rows for place, rows in enumerate(people) if place not in out]
        found.append(predict(train, [people[place] for place in chosen]))
    return Scored(
        scores=np.concatenate([one.scores for one in found]),
        truth=np.concatenate([one.truth for one in found]),
    )


def descent(spec: TrainSpec) -> Predictor:
    def predict(train: Sequence[PersonRows], out: Sequence[PersonRows]) -> Scored:
        return scored(spec, centralised(spec, train, steps=150, rate=2.0), out)

    return predict


def test_nhanes_depression_is_told_from_sleep_activity_and_demographics() -> None:
    assert len(NHANES.features) <= 20
    found = held_out(nhanes(), descent(NHANES))
    assert len(found.truth) == 5068
    assert found.truth.sum() == 459
    assert found.auc >= 0.80


def test_pacos_low_mood_is_told_from_the_days_sleep_activity_and_stressors() -> None:
    found = held_out(paco(), descent(PACO))
    assert len(found.truth) == 7635
    assert found.auc >= 0.785


def test_the_own_past_alone_tells_more_of_low_mood_than_the_day_does() -> None:
    """The honest comparison: most of the signal is who somebody is."""
    model = held_out(paco(), descent(PACO))
    mean = held_out(paco(), lambda _, out: own_mean(PACO, out))
    last = held_out(paco(), lambda _, out: last_value(PACO, out))
    model, mean, last = common(model, mean, last)
    assert mean.auc > last.auc > 0.5
    assert mean.auc > 0.75
    assert abs(mean.auc - model.auc) < 0.1
