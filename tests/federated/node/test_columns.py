from __future__ import annotations

import math

import pytest

from federated.errors import ImportDataError
from federated.node.columns import _FACTORS, BY_LOINC, COLUMNS, column, convert


def test_every_column_has_a_unit_that_is_known_and_a_range_that_is_not_empty() -> None:
    for one in COLUMNS.values():
        assert _FACTORS[one.unit][one.unit] == 1.0
        assert one.low < one.high
        assert one.meaning


def test_no_loinc_code_fills_two_columns() -> None:
    codes = [code for one in COLUMNS.values() for code in one.codes]
    assert len(codes) == len(set(codes)) == len(BY_LOINC)


def test_an_unknown_column_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ImportDataError, match="Did you mean sleep_hours"):
        column("sleep_hour")


@pytest.mark.parametrize(
    ("name", "value", "unit", "expected"),
    [
        ("sleep_hours", 450, "min", 7.5),
        ("sleep_hours", 27_000, "s", 7.5),
        ("distance_km", 1, "mi", 1.609344),
        ("heart_rate", 1.2, "count/s", 72),
        ("sleep_efficiency", 0.9, "1", 90),
    ],
)
def test_units_are_converted(name: str, value: float, unit: str, expected: float) -> None:
    assert convert(column(name), value, unit) == pytest.approx(expected)


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(ImportDataError, match="fortnight"):
        convert(column("sleep_hours"), 1, "fortnight")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 28.0, 3.5])
def test_a_value_that_cannot_be_is_refused_and_not_said(value: float) -> None:
    with pytest.raises(ImportDataError) as caught:
        convert(column("phq9_total"), value, "{score}")
    assert str(value) not in str(caught.value)
