"""Made-up people whose mood follows their sleep, and what is asked of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from federated.model import PersonRows

TRAINING: dict[str, Any] = {
    "kind": "train",
    "name": "mood",
    "features": [
        {"column": "sleep_hours", "low": 4.0, "high": 10.0, "indicator": True},
        {"column": "steps", "low": 0.0, "high": 20000.0, "lag": 1},
    ],
    "label": {"column": "mood", "low": -6.0, "high": 6.0, "below": 0.0},
    "work": {"rate": 4.0},
    "clip": 1.0,
    "rounds": 4,
    "held_out": 0.3,
}
EVALUATION: dict[str, Any] = {
    **{key: TRAINING[key] for key in ("features", "label", "held_out")},
    "kind": "evaluate",
    "name": "how-good",
    "of": "mood",
    "bins": 4,
}
MEAN: dict[str, Any] = {"kind": "mean", "name": "sleep", "column": "sleep_hours"}


def people(count: int, *, seed: int = 0, days: int = 8) -> Sequence[PersonRows]:
    drawn = np.random.default_rng(seed)
    return [_person(drawn, days) for _ in range(count)]


def _person(drawn: np.random.Generator, days: int) -> PersonRows:
    sleep = drawn.uniform(4.0, 10.0, days)
    mood = np.clip(sleep - 7.0 + drawn.normal(0.0, 1.0, days), -6.0, 6.0)
    steps = drawn.uniform(0.0, 20_000.0, days)
    return PersonRows(
        days=np.arange(days, dtype=np.int64),
        values={"sleep_hours": sleep, "mood": mood, "steps": steps},
    )
