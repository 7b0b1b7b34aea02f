"""Obligations: what must be done with an answer that was allowed.

A closed sum type. Here they are read from a rule's annotations and joined when several rules
allowed; carrying them out is the gateway's work. Whoever enforces a decision names the obligations
that it can carry out, and the engine denies what would need another (compare XACML 3.0 section
7.18).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, assert_never

#: Annotations that start with this are obligations.
PREFIX: Final = "obligation_"

_FIELD = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}(?:\.[A-Za-z][A-Za-z0-9]{0,63}){1,7}").fullmatch
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,63}").fullmatch
_NUMBER = re.compile(r"[1-9][0-9]{0,8}").fullmatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Redact:
    """Remove these elements (`Type.element.element`) from what is released."""

    fields: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """Replace the values of these elements so that only their presence shows."""

    fields: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pseudonymise:
    """Replace the values of these elements by the pseudonyms of the request's purpose."""

    fields: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepUp:
    """The second factor was shown at most this long ago. The engine itself sees to it."""

    max_age_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitRows:
    """Release at most so many records in one answer."""

    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisclosureNotice:
    """Add the notice of the paragraph named (42 CFR 2.32)."""

    notice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExcludeFromCounts:
    """Leave records with these labels out of every total, as if they did not exist."""

    labels: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """Somebody else must look at this access within so many seconds."""

    within_s: int


Obligation = (
    Redact
    | Mask
    | Pseudonymise
    | StepUp
    | LimitRows
    | RedisclosureNotice
    | ExcludeFromCounts
    | Review
)

#: Every kind there is: what an enforcing point names that can carry out all of them.
ALL: Final[frozenset[type]] = frozenset(
    {Redact, Mask, Pseudonymise, StepUp, LimitRows, RedisclosureNotice, ExcludeFromCounts, Review}
)


def parse_obligation(name: str, value: str) -> Obligation:
    """Read one annotation. Raises ValueError, naming what was expected, if it is not known."""
    parse = _PARSERS.get(name.removeprefix(PREFIX))
    if parse is None:
        raise ValueError(f"unknown obligation “@{name}”; known are {', '.join(_PARSERS)}")
    return parse(value)


def parse_obligations(annotations: Mapping[str, str]) -> tuple[Obligation, ...]:
    """Read all of a rule's obligations. Raises ValueError at the first that is not known."""
    return tuple(
        parse_obligation(name, value or "")
        for name, value in sorted(annotations.items())
        if name.startswith("obligation")
    )


def _fields(value: str) -> frozenset[str]:
    return _list(value, _FIELD, "Type.element")


def _words(value: str) -> frozenset[str]:
    return _list(value, _WORD, "words")


def _list(value: str, matches: Callable[[str], object], expected: str) -> frozenset[str]:
    items = frozenset(item.strip() for item in value.split(","))
    if not all(matches(item) for item in items):
        raise ValueError(f"expected {expected}, separated by commas, found “{value}”")
    return items


def _number(value: str) -> int:
    if not _NUMBER(value):
        raise ValueError(f"expected a whole number greater than 0, found “{value}”")
    return int(value)


def _notice(value: str) -> RedisclosureNotice:
    if not _WORD(value):
        raise ValueError(f"expected the name of one notice, found “{value}”")
    return RedisclosureNotice(notice=value)


_PARSERS: Final[dict[str, Callable[[str], Obligation]]] = {
    "redact": lambda value: Redact(fields=_fields(value)),
    "mask": lambda value: Mask(fields=_fields(value)),
    "pseudonymise": lambda value: Pseudonymise(fields=_fields(value)),
    "step_up": lambda value: StepUp(max_age_s=_number(value)),
    "limit_rows": lambda value: LimitRows(rows=_number(value)),
    "notice": _notice,
    "exclude_from_counts": lambda value: ExcludeFromCounts(labels=_words(value)),
    "review": lambda value: Review(within_s=_number(value)),
}


def in_words(obligation: Obligation) -> str:
    """Say it in half a sentence, for explanations and the table of rules."""
    match obligation:
        case Redact(fields=fields):
            words = f"left out: {', '.join(sorted(fields))}"
        case Mask(fields=fields):
            words = f"masked: {', '.join(sorted(fields))}"
        case Pseudonymise(fields=fields):
            words = f"replaced by pseudonyms: {', '.join(sorted(fields))}"
        case StepUp(max_age_s=age_s):
            words = f"second factor at most {age_s} s old"
        case LimitRows(rows=rows):
            words = f"at most {rows} records"
        case RedisclosureNotice(notice=notice):
            words = f"with the notice of {notice}"
        case ExcludeFromCounts(labels=labels):
            words = f"out of counts: {', '.join(sorted(labels))}"
        case Review(within_s=within_s):
            words = f"reviewed within {within_s // 3600} h"
        case _:
            assert_never(obligation)
    return words


def join(obligations: Iterable[Obligation]) -> tuple[Obligation, ...]:
    """Everything that any rule asked for: fields and labels add up, the strictest bound wins."""
    joined: dict[tuple[str, str], Obligation] = {}
    for one in obligations:
        key = (type(one).__name__, one.notice if isinstance(one, RedisclosureNotice) else "")
        joined[key] = _both(joined[key], one) if key in joined else one
    return tuple(joined[key] for key in sorted(joined))


def _both[O: Obligation](a: O, b: O) -> O:
    """Two of one kind as one: sets add up, of two numbers the smaller is the stricter."""
    changes: dict[str, Any] = {}
    for one in dataclasses.fields(a):
        left, right = getattr(a, one.name), getattr(b, one.name)
        if isinstance(left, frozenset):
            changes[one.name] = left | right
        elif isinstance(left, int):
            changes[one.name] = min(left, right)
    return dataclasses.replace(a, **changes)
