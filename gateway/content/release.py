"""What is done to a JSON record before it is released: obligations on `Type.member.member`.

The first word is the type of the route's rule; arrays are gone through. Nothing here decides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import assert_never

from gateway.content.fields import masked
from gateway.content.pointers import DROP, JSON, Drop
from policies.obligations import (
    ExcludeFromCounts,
    LimitRows,
    Mask,
    Obligation,
    Pseudonymise,
    Redact,
    RedisclosureNotice,
    Review,
    StepUp,
)


def carry_out(
    record: JSON,
    type_: str,
    obligations: Iterable[Obligation],
    *,
    pseudonym: Callable[[str, str], str],
) -> JSON:
    """The record with its members removed, masked and replaced as asked.

    `pseudonym` gets the path of the member and the value as text.
    """
    for one in obligations:
        match one:
            case Redact(fields=fields):
                record = _each(record, type_, fields, lambda _path: lambda _value: DROP)
            case Mask(fields=fields):
                record = _each(record, type_, fields, lambda _path: masked)
            case Pseudonymise(fields=fields):
                record = _each(record, type_, fields, _replacing(pseudonym))
            case StepUp() | Review() | LimitRows() | ExcludeFromCounts() | RedisclosureNotice():
                # They say nothing about the members of one record.
                pass
            case _:
                assert_never(one)
    return record


def hides(obligations: Iterable[Obligation], type_: str) -> bool:
    """Whether they hide anything in records of this type."""
    return any(
        path.partition(".")[0] == type_
        for one in obligations
        if isinstance(one, Redact | Mask | Pseudonymise)
        for path in one.fields
    )


def row_limit(obligations: Iterable[Obligation]) -> int | None:
    """At most so many records, if there is a bound."""
    return min((one.rows for one in obligations if isinstance(one, LimitRows)), default=None)


def out_of_counts(obligations: Iterable[Obligation]) -> frozenset[str]:
    """Labels whose records are in no total."""
    found = [one.labels for one in obligations if isinstance(one, ExcludeFromCounts)]
    return frozenset().union(*found)


def notices(obligations: Iterable[Obligation]) -> frozenset[str]:
    """Names of the notices that must go with the content."""
    return frozenset(one.notice for one in obligations if isinstance(one, RedisclosureNotice))


type _Change = Callable[[JSON], JSON | Drop]


def _each(record: JSON, type_: str, paths: Iterable[str], change: Callable[[str], _Change]) -> JSON:
    for path in paths:
        first, *steps = path.split(".")
        if first == type_:
            record = _changed(record, tuple(steps), change(path))
    return record


def _changed(value: JSON, steps: tuple[str, ...], change: _Change) -> JSON | Drop:
    if isinstance(value, list):
        items = [_changed(item, steps, change) for item in value]
        return [item for item in items if item is not DROP]
    if not steps:
        return change(value)
    if not isinstance(value, dict) or steps[0] not in value:
        return value
    new = _changed(value[steps[0]], steps[1:], change)
    # An array of which nothing is left goes as a whole: its length is as telling as its items.
    if new is DROP or (new == [] and value[steps[0]] != []):
        return {name: one for name, one in value.items() if name != steps[0]}
    return {**value, steps[0]: new}


def _replacing(pseudonym: Callable[[str, str], str]) -> Callable[[str], _Change]:
    def for_path(path: str) -> _Change:
        def replace(value: JSON) -> JSON:
            if value is None:
                return None
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            return pseudonym(path, text)

        return replace

    return for_path
