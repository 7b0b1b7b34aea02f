"""JSON pointers (RFC 6901) with one addition: `*` stands for every item of an array.

A pointer is compiled once and never changes a value that it is given. Before: the configuration
file. After: `gateway.content.rules` and `gateway.content.fields`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

#: Parsed JSON.
type JSON = Any

MAX_STEPS: Final = 32
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}").fullmatch
_BAD_ESCAPE = re.compile(r"~(?![01])").search
_ABSENT: Final = object()


class Drop:
    """What a function gives to `Pointer.changed` to have the value taken out."""


DROP: Final = Drop()


@dataclass(frozen=True, slots=True)
class Pointer:
    """A compiled pointer. A member that is called `*` cannot be named."""

    steps: tuple[str, ...]

    def __str__(self) -> str:
        return "".join(f"/{one.replace('~', '~0').replace('/', '~1')}" for one in self.steps)

    def find(self, value: JSON) -> list[JSON]:
        """All values that it leads to, in order; none where a member is missing."""
        return list(_find(value, self.steps))

    def misspelt(self, value: JSON) -> bool:
        """Whether it leads somewhere else as well for a reader to whom `Name` is `name`."""
        return len(list(_find(value, self.steps, exact=False))) != len(self.find(value))

    def changed(self, value: JSON, change: Callable[[JSON], JSON | Drop]) -> JSON:
        """The value with everything that the pointer leads to changed by `change`.

        What is not on the way is shared with the old value.
        """
        return _changed(value, self.steps, change)

    def sibling(self, suffix: str) -> Pointer:
        """The pointer to the member beside, whose name ends in `suffix`."""
        return Pointer((*self.steps[:-1], self.steps[-1] + suffix))

    def covers(self, other: Pointer) -> bool:
        """Whether `other` leads to the same place, or to one within."""
        pairs = zip(self.steps, other.steps, strict=False)
        return len(self.steps) <= len(other.steps) and all(
            mine == its or "*" in {mine, its} for mine, its in pairs
        )


def parse_pointer(text: str) -> Pointer:
    """Compile. Raises ValueError, saying what was expected."""
    if text and not text.startswith("/"):
        raise ValueError(f"expected a JSON pointer such as /items/*/id, got “{text}”")
    if _BAD_ESCAPE(text):
        raise ValueError(f"expected ~0 for “~” and ~1 for “/” in the pointer, got “{text}”")
    steps = tuple(one.replace("~1", "/").replace("~0", "~") for one in text.split("/")[1:])
    if len(steps) > MAX_STEPS:
        raise ValueError(f"expected a pointer of at most {MAX_STEPS} steps")
    return Pointer(steps)


def _find(value: JSON, steps: tuple[str, ...], *, exact: bool = True) -> Iterator[JSON]:
    if not steps:
        yield value
        return
    step, rest = steps[0], steps[1:]
    if isinstance(value, dict):
        for one in _members(value, step, exact=exact):
            yield from _find(one, rest, exact=exact)
    elif isinstance(value, list):
        if step == "*":
            for item in value:
                yield from _find(item, rest, exact=exact)
        elif _INDEX(step) and int(step) < len(value):
            yield from _find(value[int(step)], rest, exact=exact)


def _members(value: dict[str, JSON], step: str, *, exact: bool) -> list[JSON]:
    if step == "*":
        return []
    if exact:
        return [value[step]] if step in value else []
    alike = step.strip().casefold()
    return [one for name, one in value.items() if name.strip().casefold() == alike]


def _changed(
    value: JSON, steps: tuple[str, ...], change: Callable[[JSON], JSON | Drop]
) -> JSON | Drop:
    if not steps:
        return change(value)
    step, rest = steps[0], steps[1:]
    if isinstance(value, dict):
        inner = value.get(step, _ABSENT) if step != "*" else _ABSENT
        if inner is _ABSENT:
            return value
        new = _changed(inner, rest, change)
        if new is DROP:
            return {name: one for name, one in value.items() if name != step}
        return value if new is inner else {**value, step: new}
    if isinstance(value, list):
        return _changed_list(value, step, rest, change)
    return value


def _changed_list(
    value: list[JSON], step: str, rest: tuple[str, ...], change: Callable[[JSON], JSON | Drop]
) -> JSON:
    if step == "*":
        items = [_changed(item, rest, change) for item in value]
    elif _INDEX(step) and int(step) < len(value):
        items = list(value)
        items[int(step)] = _changed(items[int(step)], rest, change)
    else:
        return value
    return [item for item in items if item is not DROP]
