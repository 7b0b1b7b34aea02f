from __future__ import annotations

import math

import pytest

from federated.release.figures import figures, number

MINUS = "\N{MINUS SIGN}"


@pytest.mark.parametrize(
    ("value", "low", "high", "told"),
    [
        (4.17312, 3.72601, 4.62011, ("4.17", "3.73", "4.62")),
        (0.02331, -0.3626, 0.4092, ("0.02", f"{MINUS}0.36", "0.41")),
        (1234.56, 1100.0, 1400.0, ("1,235", "1,100", "1,400")),
        (41.25, 36.1, 46.4, ("41", "36", "46")),
        (-0.0004, -0.004, 0.004, (f"{MINUS}0.0004", f"{MINUS}0.0040", "0.0040")),
        (3.0, 3.0, 3.0, ("3", "3", "3")),
    ],
)
def test_tells_two_digits_of_the_width(
    value: float, low: float, high: float, told: tuple[str, str, str]
) -> None:
    assert figures(value, low, high) == told


def test_what_rounds_to_nothing_has_no_sign() -> None:
    assert figures(-0.001, -0.4, 0.4)[0] == "0.00"


def test_an_endless_interval_is_told_as_it_is() -> None:
    assert figures(1.23456, -math.inf, math.inf) == ("1.235", f"{MINUS}inf", "inf")


def test_numbers_have_four_digits_and_groups() -> None:
    assert [number(one) for one in (0, 0.12345, 9400, 1234567)] == [
        "0",
        "0.1235",
        "9,400",
        "1,234,567",
    ]
