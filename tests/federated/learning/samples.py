"""One specification of each kind of model, and people to train them on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from federated.learning.spec import Examples, Feature, Label, TrainSpec, Work
from federated.model import PersonRows

SLEEP = Feature(column="sleep_quality", low=1, high=7)
MOOD = Feature(column="mood", low=-6, high=6)
LOW_MOOD = Label(column="mood", low=-6, high=6, below=1.5)
TOMORROW = Label(column="mood", low=-6, high=6, ahead=1)

LOGISTIC = TrainSpec(
    name="logistic",
    features=(
        SLEEP,
        Feature(column="sleep_quality", low=-3, high=3, within=True, indicator=True),
        Feature(column="mood", low=-6, high=6, lag=1, indicator=True),
    ),
    label=LOW_MOOD,
    work=Work(epochs=2, rate=0.5, l2=0.01),
)
LINEAR = TrainSpec(name="linear", features=(SLEEP, MOOD), label=TOMORROW, kind="linear")
MLP = TrainSpec(
    name="mlp", features=LOGISTIC.features, label=LOW_MOOD, kind="mlp", hidden=(6, 4),
    work=Work(epochs=2, rate=0.3, l2=0.02),
)  # fmt: skip
NUMBERS = TrainSpec(name="numbers", features=(SLEEP, MOOD), label=TOMORROW, kind="mlp", hidden=(5,))
GRU = TrainSpec(
    name="gru", features=(SLEEP, MOOD), label=TOMORROW, kind="gru", hidden=(4,), steps=5,
    work=Work(epochs=1, rate=0.3, l2=0.02),
)  # fmt: skip
PERSON = TrainSpec(
    name="person",
    features=(SLEEP, Feature(column="mood", low=-6, high=6, indicator=True)),
    label=Label(column="phq9_total", low=0, high=27, at_least=10),
    per="person",
)
SPECS = (LOGISTIC, LINEAR, MLP, NUMBERS, GRU, PERSON)


def table(days: list[int], **columns: list[float]) -> PersonRows:
    """Rows as written out."""
    return PersonRows(
        days=np.array(days, dtype=np.int64),
        values={name: np.array(values, dtype=np.float64) for name, values in columns.items()},
    )


def made_up(spec: TrainSpec, seed: int, count: int = 12) -> Examples:
    """Examples of the right shape that mean nothing."""
    random = np.random.default_rng(seed)
    shape = (count, spec.steps, spec.inputs) if spec.kind == "gru" else (count, spec.inputs)
    y = random.uniform(-1, 1, count)
    return Examples(
        x=random.uniform(-1, 1, shape), y=(y > 0).astype(np.float64) if spec.label.is_class else y
    )


def weights_for(count: int, seed: int, size: float = 0.5) -> NDArray[np.float64]:
    """Weights that are no special ones."""
    return np.random.default_rng(seed).normal(0, size, count)
