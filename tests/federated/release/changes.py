"""Every single change of a document, for tests that must find each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every leaf, and of every table and list, which can get one more."""
    yield path
    if isinstance(value, dict):
        for name, one in value.items():
            yield from leaves(one, (*path, name))
    if isinstance(value, list):
        for place, one in enumerate(value):
            yield from leaves(one, (*path, place))


def others(value: Any) -> list[Any]:
    """Other values in place of this one: near ones, and ones of another kind."""
    if isinstance(value, dict):
        first = next(iter(value), None)
        fewer = {name: one for name, one in value.items() if name != first}
        return [{**value, "more": 1}, *([fewer] if value else []), [], None]
    if isinstance(value, list):
        return [[*value, *value[-1:]] if value else [1], *([value[1:]] if value else []), {}, None]
    if isinstance(value, str):
        middle = len(value) // 2
        flipped = value[:middle] + ("a" if value[middle : middle + 1] != "a" else "b")
        return [value + "x", flipped + value[middle + 1 :], "", 7, None, [value]]
    if isinstance(value, float):
        return [value * (1 + 1e-6) + 1e-300, value + 1, -value - 1, float("nan"), float("inf"), "1"]
    if isinstance(value, bool):
        return [not value, int(value), str(value), None]
    return [value + 1, value - 1, 0, -1, float(value), str(value), True, None]


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value there."""
    if not path:
        return value
    copy = json.loads(json.dumps(document))
    at = copy
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return copy


def spelled(path: tuple[Any, ...]) -> str:
    text = "".join("[]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")
    return "failures.*" if text.startswith("failures.") else text
