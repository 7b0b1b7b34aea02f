"""From one person's rows to examples: what a model sees of a day, or of a whole person.

Pure, NumPy only, and total: whatever the rows hold, out come finite numbers from -1 to 1, or no
examples at all. NaN is what is not known; an infinity counts as the bound it is beyond. Time is
calendar days, never positions in the table: what was not recorded yesterday is not yesterday's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from federated.learning.spec import Examples, Label, TrainSpec
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
    reading = _reading(spec)
    table = _table(reading, rows)
    series = _series(reading, table)
    if spec.per == "person":
        label = _truth(spec.label, _newest(table[[reading.label]]))
        known = ~np.isnan(label)
        return Examples(x=_inputs(reading, _newest(series))[None][known], y=label[known])
    places, labels = _days_and_labels(spec, reading, table, rows)
    days = rows.days[places][:, None] - np.arange(spec.steps - 1, -1, -1)
    raw = np.empty((*days.shape, len(spec.features)))
    for lag, features in reading.by_lag:
        raw[..., features] = np.moveaxis(_at(rows.days, days - lag, series[features]), 0, -1)
    x = _inputs(reading, raw)
    return Examples(x=x if spec.kind == "gru" else x[:, 0, :], y=_truth(spec.label, labels))


def history_of(spec: TrainSpec, rows: PersonRows) -> History:
    """What the own mean and the last value would have predicted for each of `examples_of`.

    Known when the prediction is made: labels of days up to the example's, and of the example's own
    only if the label lies ahead. A person who is one example has no past.
    """
    reading = _reading(spec)
    table = _table(reading, rows)
    label = spec.label
    if spec.per == "person":
        none = np.full(np.count_nonzero(~np.isnan(_newest(table[[reading.label]]))), np.nan)
        return History(mean=none, last=none)
    places, _ = _days_and_labels(spec, reading, table, rows)
    seen = _scaled(table[reading.label], label.low, label.high)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """A specification as places in arrays. `inputs`, `indicators`: where each stands in an example.

    `columns`, `label`: rows of the table; `by_lag`: which features are taken from how long ago.
    """

    names: tuple[str, ...]
    label: int
    columns: NDArray[np.intp]
    within: tuple[int, ...]
    by_lag: tuple[tuple[int, NDArray[np.intp]], ...]
    low: _Floats
    high: _Floats
    width: int
    inputs: NDArray[np.intp]
    indicated: NDArray[np.intp]
    indicators: NDArray[np.intp]


@lru_cache(maxsize=64)
def _reading(spec: TrainSpec) -> _Reading:
    names, features = tuple(sorted(spec.columns)), spec.features
    indicated = np.array([one.indicator for one in features], dtype=np.intp)
    starts = np.arange(len(features)) + np.cumsum(indicated) - indicated
    lags = np.array([one.lag for one in features])
    return _Reading(
        names=names,
        label=names.index(spec.label.column),
        columns=np.array([names.index(one.column) for one in features]),
        within=tuple(place for place, one in enumerate(features) if one.within),
        by_lag=tuple((int(lag), np.flatnonzero(lags == lag)) for lag in np.unique(lags)),
        low=np.array([one.low for one in features]),
        high=np.array([one.high for one in features]),
        width=spec.inputs,
        inputs=starts,
        indicated=np.flatnonzero(indicated),
        indicators=starts[indicated == 1] + 1,
    )


def _table(reading: _Reading, rows: PersonRows) -> _Floats:
    """Columns by days, NaN where nothing is known; infinities as huge numbers."""
    table = np.full((len(reading.names), len(rows.days)), np.nan)
    for place, name in enumerate(reading.names):
        values = rows.values.get(name)
        if values is not None:
            table[place] = values
    return np.asarray(np.clip(table, -_HUGE, _HUGE))


def _series(reading: _Reading, table: _Floats) -> _Floats:
    """Each feature by days, before lags: the column, or less the mean of all days before."""
    series = table[reading.columns]
    for place in reading.within:
        values = series[place]
        known = ~np.isnan(values)
        filled = np.where(known, values, 0.0)
        count, total = np.cumsum(known) - known, np.cumsum(filled) - filled
        series[place] = np.where(count > 0, values - total / np.maximum(count, 1), np.nan)
    return series


def _days_and_labels(
    spec: TrainSpec, reading: _Reading, table: _Floats, rows: PersonRows
) -> tuple[NDArray[np.intp], _Floats]:
    """Which rows are examples, the newest `most`, and the value that is their label."""
    ahead = _at(rows.days, rows.days + spec.label.ahead, table[reading.label])
    there = ~np.all(np.isnan(table), axis=0)
    places = np.flatnonzero(there & ~np.isnan(ahead))[-spec.most :]
    return places, ahead[places]


def _at(days: NDArray[np.int64], wanted: NDArray[np.int64], values: _Floats) -> _Floats:
    """`values` (…, days) on the calendar days `wanted`, NaN where there is no such day."""
    if not days.size:
        return np.full((*values.shape[:-1], *wanted.shape), np.nan)
    place = np.minimum(np.searchsorted(days, wanted), days.size - 1)
    return np.where(days[place] == wanted, values[..., place], np.nan)


def _newest(values: _Floats) -> _Floats:
    """The last known value of each row of `values` (…, days), or NaN."""
    if not values.shape[-1]:
        return np.full(values.shape[:-1], np.nan)
    place = values.shape[-1] - 1 - np.argmax(~np.isnan(values[..., ::-1]), axis=-1)
    found = np.take_along_axis(values, np.expand_dims(place, -1), axis=-1)
    return np.asarray(found[..., 0])


def _inputs(reading: _Reading, raw: _Floats) -> _Floats:
    """Scaled features (…, features) as they stand in an example, beside their indicators."""
    scaled = _scaled(raw, reading.low, reading.high)
    known = ~np.isnan(scaled)
    x = np.empty((*raw.shape[:-1], reading.width))
    x[..., reading.inputs] = np.where(known, scaled, 0.0)
    x[..., reading.indicators] = known[..., reading.indicated]
    return x


def _scaled(values: _Floats, low: _Floats | float, high: _Floats | float) -> _Floats:
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
