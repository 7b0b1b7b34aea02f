"""Examples are made of calendar days, of the past alone, and of whatever the rows hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from federated.learning.examples import examples_of, history_of
from federated.learning.spec import Feature, Label, TrainSpec
from federated.model import PersonRows
from tests.federated.analytics.samples import hostile_rows
from tests.federated.learning.samples import GRU, LOW_MOOD, PERSON, SPECS, TOMORROW, table

X = Feature(column="x", low=0, high=10)
Y = Label(column="y", low=0, high=10, at_least=5)
NAN = float("nan")


def spec_of(*features: Feature, label: Label = Y, most: int = 64) -> TrainSpec:
    return TrainSpec(name="s", features=features, label=label, most=most)


def test_a_value_is_scaled_by_its_bounds_and_counts_as_the_bound_it_is_beyond() -> None:
    rows = table([1, 2, 3, 4, 5, 6], x=[0, 5, 10, 99, np.inf, -np.inf], y=[1] * 6)
    assert examples_of(spec_of(X), rows).x[:, 0].tolist() == [-1, 0, 1, 1, 1, -1]


def test_what_is_missing_is_the_middle_and_the_indicator_says_so() -> None:
    rows = table([1, 2], x=[NAN, 10], y=[1, 9])
    made = examples_of(spec_of(replace(X, indicator=True)), rows)
    assert made.x.tolist() == [[0, 0], [1, 1]]
    assert made.y.tolist() == [0, 1]


def test_a_lag_counts_calendar_days_and_not_rows() -> None:
    rows = table([1, 2, 5], x=[10, 0, 5], y=[1, 1, 1])
    made = examples_of(spec_of(replace(X, lag=1, indicator=True)), rows)
    assert made.x.tolist() == [[0, 0], [1, 1], [0, 0]]


def test_a_label_ahead_is_taken_from_that_calendar_day() -> None:
    rows = table([1, 2, 4, 5], x=[0, 10, 5, 5], y=[1, 9, 1, 9])
    made = examples_of(spec_of(X, label=replace(Y, ahead=1)), rows)
    assert made.x[:, 0].tolist() == [-1, 0]
    assert made.y.tolist() == [1, 1]


def test_within_is_less_the_mean_of_strictly_earlier_days() -> None:
    within = Feature(column="x", low=-10, high=10, within=True, indicator=True)
    rows = table([1, 2, 4, 5], x=[2, 6, NAN, 10], y=[1] * 4)
    made = examples_of(spec_of(within), rows).x
    assert made[:, 0] == pytest.approx([0, 0.4, 0, 0.6])
    assert made[:, 1].tolist() == [0, 1, 0, 1]


def test_nothing_of_the_future_is_in_an_example() -> None:
    random = np.random.default_rng(1)
    columns = {name: random.normal(2, 2, 30) for name in ("mood", "sleep_quality", "phq9_total")}
    rows = PersonRows(days=np.arange(30), values=columns)
    for spec in SPECS:
        if spec.per == "person":
            continue
        whole = examples_of(spec, rows).x
        changed = {name: values.copy() for name, values in columns.items()}
        for values in changed.values():
            values[20:] += 1
        again = examples_of(spec, PersonRows(days=rows.days, values=changed)).x
        assert np.array_equal(whole[:20], again[:20])
        assert not np.array_equal(whole[20], again[20])


def test_a_day_without_the_label_is_no_example() -> None:
    rows = table([1, 2, 3], x=[1, 2, 3], y=[NAN, 6, NAN])
    made = examples_of(spec_of(X), rows)
    assert made.y.tolist() == [1]
    assert made.x[:, 0] == pytest.approx([-0.6])


def test_a_day_on_which_only_other_columns_are_known_is_no_example() -> None:
    label = replace(Y, ahead=1)
    rows = table([1, 2], x=[NAN, 1], y=[NAN, 9], other=[3, 3])
    assert len(examples_of(spec_of(X, label=label), rows).y) == 0


def test_only_the_newest_examples_are_kept_and_their_past_is_not_forgotten() -> None:
    within = Feature(column="x", low=-10, high=10, within=True)
    rows = table([1, 2, 3], x=[0, 4, 8], y=[1, 9, 9])
    made = examples_of(spec_of(within, most=1), rows)
    assert made.x[:, 0] == pytest.approx([0.6])


def test_a_sequence_ends_with_the_examples_day_and_missing_days_are_zeros() -> None:
    spec = replace(GRU, features=(replace(X, indicator=True),), label=Y, steps=4)
    rows = table([1, 2, 4], x=[10, 0, 5], y=[NAN, NAN, 9])
    made = examples_of(spec, rows)
    assert made.x.tolist() == [[[1, 1], [-1, 1], [0, 0], [0, 1]]]
    assert made.y.tolist() == [1]


def test_a_person_is_one_example_of_each_columns_newest_value() -> None:
    rows = table([1, 5, 9], sleep_quality=[1, 7, NAN], mood=[0, NAN, NAN], phq9_total=[3, 12, NAN])
    made = examples_of(PERSON, rows)
    assert made.x.tolist() == [[1, 0, 1]]
    assert made.y.tolist() == [1]
    nobody = table([1], sleep_quality=[3])
    assert examples_of(PERSON, nobody).x.shape == (0, 3)


def test_below_is_a_class_too() -> None:
    rows = table([1, 2, 3], x=[1, 1, 1], y=[1.4, 1.5, np.inf])
    made = examples_of(spec_of(X, label=replace(LOW_MOOD, column="y")), rows)
    assert made.y.tolist() == [1, 0, 0]


def test_the_bounds_of_doubles_are_bounds() -> None:
    rows = table([1, 2, 3], x=[-1e308, 0, 1e308], y=[1, 1, 1])
    wide = Feature(column="x", low=-1.7e308, high=1.7e308)
    narrow = Feature(column="x", low=0, high=5e-324)
    made = examples_of(spec_of(wide, narrow), rows).x
    assert np.isfinite(made).all()
    assert np.abs(made).max() <= 1


@pytest.mark.filterwarnings("error")
@settings(deadline=None, max_examples=60)
@given(rows=hostile_rows())
def test_whatever_the_rows_hold_examples_are_finite_and_bounded(rows: PersonRows) -> None:
    for spec in SPECS:
        made = examples_of(spec, rows)
        past = history_of(spec, rows)
        assert len(made.x) == len(made.y) == len(past.mean) == len(past.last) <= spec.most
        assert made.x.shape[1:] == (
            (spec.steps, spec.inputs) if spec.kind == "gru" else (spec.inputs,)
        )
        assert np.isfinite(made.x).all()
        assert np.abs(made.x).max(initial=0) <= 1
        assert np.abs(made.y).max(initial=0) <= 1
        for guess in (past.mean, past.last):
            assert np.abs(guess[~np.isnan(guess)]).max(initial=0) <= 1


def test_the_own_past_knows_nothing_of_the_day_that_is_predicted() -> None:
    rows = table([1, 2, 4], x=[1, 1, 1], y=[0, 10, 5])
    number = Label(column="y", low=0, high=10)
    spec = TrainSpec(name="s", features=(X,), label=number, kind="linear")
    past = history_of(spec, rows)
    assert np.isnan(past.mean[0])
    assert past.mean[1:].tolist() == [-1, 0]
    assert past.last[1:].tolist() == [-1, 1]


def test_the_own_past_of_a_label_ahead_ends_with_the_examples_own_day() -> None:
    spec = TrainSpec(name="s", features=(X,), label=TOMORROW, kind="linear")
    rows = table([1, 2, 3], x=[1, 1, 1], mood=[-6, 6, 0])
    past = history_of(spec, rows)
    assert past.mean.tolist() == [-1, 0]
    assert past.last.tolist() == [-1, 1]


def test_the_own_past_of_a_class_is_a_score_that_rises_with_it() -> None:
    rows = table([1, 2], x=[1, 1], mood=[-6, 6])
    past = history_of(spec_of(X, label=LOW_MOOD), rows)
    assert past.last[1] == 1
    assert (
        history_of(spec_of(X, label=replace(LOW_MOOD, below=None, at_least=2)), rows).last[1] == 0
    )
