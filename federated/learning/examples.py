"""From one person's rows to examples: what a model sees of a day, or of a whole person.

Pure, NumPy only, and total: whatever the rows hold, out come finite numbers from -1 to 1, or no
examples at all. NaN is what is not known; an infinity counts as the bound it is beyond. Time is
calendar days, never positions in the table: what was not recorded yesterday is not yesterday's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.learning.spec import Examples, Feature, Label, TrainSpec
from federated.model import PersonRows

#: What an infinity counts as before a mean is taken, so that sums and differences stay numbers.
_HUGE: Final = 1e290

type _Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What the person's own past says of each example's label; NaN where there is no past.

    `mean` of all labels known when the prediction is made, `last` the newest of them; aligned with
    the examples. Both as `models.predict` gives them: a number scaled as the label is; for a class
    a score from 0 to 1, higher where the class is nearer.
    """

    mean: NDArray[np.float64] = field(repr=False)
    last: NDArray[np.float64] = field(repr=False)


def examples_of(spec: TrainSpec, rows: PersonRows) -> Examples:
    """One person's examples, oldest first, the newest `spec.most`.

    A day is an example where something of the spec's columns is known on it, and the label `ahead`
    days later. Inputs stand in the order of the features, each followed by its indicator if it has
    one; a sequence is `steps` calendar days, the example's own the last, and what is missing is 0.
    """
    columns = {name: _column(rows, name) for name in spec.columns}
    if spec.per == "person":
        return _of_person(spec, columns)
    places = _places(spec, rows, columns)
    labels = _truth(spec.label, _label_ahead(spec, rows, columns))
    back = np.arange(spec.steps - 1, -1, -1)
    days = rows.days[places][:, None] - back
    x = np.zeros((*days.shape, spec.inputs))
    start = 0
    for feature in spec.features:
        values = _feature_values(feature, columns)
        scaled = _scaled(_at(rows.days, days - feature.lag, values), feature.low, feature.high)
        start = _fill(x, start, feature, scaled)
    return Examples(x=x if spec.kind == "gru" else x[:, 0, :], y=labels[places])


def history_of(spec: TrainSpec, rows: PersonRows) -> History:
    """What the own mean and the last value would have predicted for each of `examples_of`.

    Known when the prediction is made: labels of days up to the example's, and of the example's own
    only if the label lies ahead. A person who is one example has no past.
    """
    columns = {name: _column(rows, name) for name in spec.columns}
    if spec.per == "person":
        none = np.full(examples_of(spec, rows).y.shape, np.nan)
        return History(mean=none, last=none)
    places = _places(spec, rows, columns)
    label = spec.label
    seen = _scaled(columns[label.column], label.low, label.high)
    known = ~np.isnan(seen)
    until = places + (1 if label.ahead else 0)
    count = np.concatenate(([0], np.cumsum(known)))[until]
    total = np.concatenate(([0.0], np.cumsum(np.where(known, seen, 0.0))))[until]
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    values = np.append(seen[known], np.nan)
    last = np.where(count > 0, values[count - 1], np.nan)
    if not label.is_class:
        return History(mean=mean, last=last)
    sign = 1.0 if label.at_least is not None else -1.0
    return History(mean=(1 + sign * mean) / 2, last=(1 + sign * last) / 2)


def _of_person(spec: TrainSpec, columns: Mapping[str, _Floats]) -> Examples:
    """The newest value of each column, or no example where the label was never known."""
    label = _truth(spec.label, _newest(columns[spec.label.column]))
    if np.isnan(label[0]):
        return Examples(x=np.zeros((0, spec.inputs)), y=np.zeros(0))
    x = np.zeros((1, spec.inputs))
    start = 0
    for feature in spec.features:
        newest = _newest(_feature_values(feature, columns))
        start = _fill(x, start, feature, _scaled(newest, feature.low, feature.high))
    return Examples(x=x, y=label)


def _places(spec: TrainSpec, rows: PersonRows, columns: Mapping[str, _Floats]) -> NDArray[np.intp]:
    """Which rows are examples: the newest `most`."""
    there = ~np.all(np.isnan(np.stack(list(columns.values()))), axis=0)
    labelled = ~np.isnan(_label_ahead(spec, rows, columns))
    return np.flatnonzero(there & labelled)[-spec.most :]


def _label_ahead(spec: TrainSpec, rows: PersonRows, columns: Mapping[str, _Floats]) -> _Floats:
    return _at(rows.days, rows.days + spec.label.ahead, columns[spec.label.column])


def _column(rows: PersonRows, name: str) -> _Floats:
    """A column, NaN where nothing is known; infinities as huge numbers."""
    values = rows.values.get(name)
    if values is None:
        return np.full(rows.days.shape, np.nan)
    return np.clip(np.asarray(values, dtype=np.float64), -_HUGE, _HUGE)


def _feature_values(feature: Feature, columns: Mapping[str, _Floats]) -> _Floats:
    """The column itself, or for `within` less the mean of all days before each day."""
    values = columns[feature.column]
    if not feature.within:
        return values
    known = ~np.isnan(values)
    count = np.cumsum(known) - known
    filled = np.where(known, values, 0.0)
    total = np.concatenate(([0.0], np.cumsum(filled)[:-1])) if filled.size else filled
    return np.where(count > 0, values - total / np.maximum(count, 1), np.nan)


def _at(days: NDArray[np.int64], wanted: NDArray[np.int64], values: _Floats) -> _Floats:
    """`values` on the calendar days `wanted`, NaN where there is no such day."""
    if not days.size:
        return np.full(wanted.shape, np.nan)
    place = np.minimum(np.searchsorted(days, wanted), days.size - 1)
    return np.where(days[place] == wanted, values[place], np.nan)


def _newest(values: _Floats) -> _Floats:
    """The last known value, shape (1,), or NaN."""
    known = values[~np.isnan(values)]
    return known[-1:] if known.size else np.full(1, np.nan)


def _scaled(values: _Floats, low: float, high: float) -> _Floats:
    """From `low` … `high` to -1 … 1, clipped; NaN stays."""
    # Halves first: the width of finite bounds may be no finite number.
    middle, half = low / 2 + high / 2, high / 2 - low / 2
    with np.errstate(all="ignore"):
        return np.clip((np.clip(values, low, high) - middle) / half, -1.0, 1.0)


def _truth(label: Label, values: _Floats) -> _Floats:
    """The label: 1 or 0 for a class, a scaled number else; NaN stays."""
    if not label.is_class:
        return _scaled(values, label.low, label.high)
    at_least, below = label.at_least, label.below
    holds = values < below if below is not None else values >= (at_least or 0.0)
    return np.where(np.isnan(values), np.nan, holds.astype(np.float64))


def _fill(x: _Floats, start: int, feature: Feature, scaled: _Floats) -> int:
    """Write a feature, and its indicator, from `start` on; returns where the next one starts."""
    known = ~np.isnan(scaled)
    x[..., start] = np.where(known, scaled, 0.0)
    if feature.indicator:
        x[..., start + 1] = known
    return start + 1 + feature.indicator
