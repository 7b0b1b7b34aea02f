"""How figures are written for people: as many digits as their interval bears."""

from __future__ import annotations

import math
from typing import Final

#: Digits of the interval's width that are told.
_DIGITS: Final = 2
_MOST_DECIMALS: Final = 9


def figures(value: float, low: float, high: float) -> tuple[str, str, str]:
    """The value and its interval's ends, all with the decimals that the width gives two digits of.

    Without a width (equal or endless ends) four significant digits. Thousands in groups, a true
    minus sign.
    """
    width = high - low
    if not (math.isfinite(width) and width > 0):
        return number(value), number(low), number(high)
    decimals = _DIGITS - 1 - math.floor(math.log10(width))
    decimals = min(max(decimals, 0), _MOST_DECIMALS)
    return _fixed(value, decimals), _fixed(low, decimals), _fixed(high, decimals)


def number(value: float) -> str:
    """Four significant digits; thousands in groups."""
    if value == 0:
        return "0"
    text = f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"  # noqa: PLR2004 - five digits
    return text.replace("-", "\N{MINUS SIGN}")


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    if not text.strip("-0.,"):
        text = text.lstrip("-")
    return text.replace("-", "\N{MINUS SIGN}")
