"""JSON whose numbers pass as they were written. Used wherever content is read and written again.

A dose of `1.10` is not `1.1` (FHIR R4 datatypes, decimal: precision must be kept), and an integer
of more than 64 bits is not the nearest float. So a numeral that a reader would write otherwise than
it stands is a `Numeral`: a number that remembers its text and is written back with it. Almost no
body has one; whether it has is seen by a few searches over its bytes, which may be mistaken in one
direction only.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

import orjson

# Each begins with a fixed byte, which is looked for much faster than a class of bytes. A numeral
# inside of an object or list is followed by one of the bytes at the end; in a string, a code, an
# identifier or a time is followed by a quotation mark.
_INSIDE = re.compile(rb"\s*[{\[]").match
_ZERO_AT_THE_END = re.compile(rb"\.[0-9]+0[\s,\]}]").search
_MINUS_ZERO = re.compile(rb"-0[\s,\]}]").search
_SMALL = b"0.0000"
#: In the bytes with every digit and point made a zero.
_ZEROS = bytes.maketrans(b"123456789.", b"0" * 10)
_LONG_RUN = b"0" * 17
# From the beginning of a run only, and without giving any of it back: else a long one, which may be
# text, would be gone through once for each of its digits.
_LONG = re.compile(rb"(?<!0)0{17,}+[\s,\]}]").search
_POWERS = (b"0e", b"0E")
_EXPONENTS = (
    re.compile(rb"e[-+]?0+[\s,\]}]").search,
    re.compile(rb"E[-+]?0+[\s,\]}]").search,
)
_LEAST, _MOST = -(2**63), 2**63 - 1


class Numeral(float):
    """A number that is written as it was read. As a number it is the nearest float."""

    __slots__ = ("text",)

    text: str


def numeral(text: str) -> int | float:
    """The number that a numeral of JSON stands for; one that is written back as `text`.

    Raises ValueError for one out of the range of a float, which many readers take for infinity.
    """
    if text.lstrip("-").isdecimal():
        whole = int(text) if len(text) <= len(str(_LEAST)) else None
        if whole is not None and _LEAST <= whole <= _MOST and text != "-0":
            return whole
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is out of range")
    if repr(number) == text and "e" not in text:
        return number
    kept = Numeral(number)
    kept.text = text
    return kept


def loads(data: bytes) -> Any:
    """Read JSON. Raises ValueError, also for what is nested too deeply."""
    found = orjson.loads(data)
    if not _may_be_odd(data):
        return found
    try:
        return json.loads(
            data, parse_int=numeral, parse_float=numeral, parse_constant=refuse_constant
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _may_be_odd(data: bytes) -> bool:
    """Whether a numeral in it may be written otherwise than it stands.

    Such have an exponent, a zero at the end, more digits than a float or an integer of 64 bits
    holds, or are very small, or minus zero.
    """
    if _INSIDE(data) is None or _SMALL in data or _ZERO_AT_THE_END(data) or _MINUS_ZERO(data):
        return True
    zeros = data.translate(_ZEROS)
    if _LONG_RUN in zeros and _LONG(zeros):
        return True
    return any(power in zeros for power in _POWERS) and any(find(zeros) for find in _EXPONENTS)


def dumps(value: Any, *, sort_keys: bool = False) -> bytes:
    """Write JSON. Raises TypeError for what is none."""
    option = orjson.OPT_SORT_KEYS if sort_keys else 0
    return orjson.dumps(value, default=_verbatim, option=option)


def refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity, which some readers know."""
    raise ValueError(f"{name} is no JSON")


def _verbatim(value: object) -> orjson.Fragment:
    if isinstance(value, Numeral):
        return orjson.Fragment(value.text.encode("ascii"))
    raise TypeError


def dumps_escaped(value: Any) -> bytes:
    """The same in ASCII, for text with halves of surrogate pairs, which UTF-8 does not know."""
    return _escaped(value).encode("ascii")


def _escaped(value: Any) -> str:
    if isinstance(value, Numeral):
        return value.text
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{_escaped(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_escaped, value)) + "]"
    return json.dumps(value, allow_nan=False)
