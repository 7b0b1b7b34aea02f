from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.content.pointers import DROP, parse_pointer

NAMES = st.sampled_from(["a", "b", "0", "1", "~", "/", "", "~1"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=12,
)
STEPS = st.lists(NAMES | st.just("*"), max_size=4)


def walk(value: Any, steps: list[str]) -> list[Any]:
    """What a pointer leads to, step by step over all that is there."""
    here = [value]
    for step in steps:
        there = []
        for one in here:
            if isinstance(one, dict) and step != "*" and step in one:
                there.append(one[step])
            elif isinstance(one, list) and step == "*":
                there += one
            elif isinstance(one, list) and step.isdecimal() and int(step) < len(one):
                there.append(one[int(step)])
        here = there
    return here


def written(steps: list[str]) -> str:
    return "".join("/" + one.replace("~", "~0").replace("/", "~1") for one in steps)


@given(VALUES, STEPS)
def test_a_pointer_finds_what_a_walk_finds(value: Any, steps: list[str]) -> None:
    pointer = parse_pointer(written(steps))
    assert str(pointer) == written(steps)
    assert pointer.find(value) == walk(value, steps)


@given(VALUES, STEPS)
def test_changing_reaches_the_same_places_and_never_the_old_value(
    value: Any, steps: list[str]
) -> None:
    pointer, before = parse_pointer(written(steps)), copy.deepcopy(value)
    seen: list[Any] = []

    def mark(one: Any) -> str:
        seen.append(one)
        return "changed"

    changed = pointer.changed(value, mark)
    assert seen == walk(before, steps)
    assert pointer.find(changed) == ["changed"] * len(seen)
    assert value == before


@given(VALUES, STEPS.filter(bool))
def test_what_is_dropped_is_gone(value: Any, steps: list[str]) -> None:
    pointer = parse_pointer(written(steps))
    left = pointer.changed(value, lambda _: DROP)
    # Behind an item that was named by its place the next one moves up.
    if not any(one.isdecimal() for one in steps):
        assert pointer.find(left) == []


def test_rfc_6901_section_5() -> None:
    document = {
        "foo": ["bar", "baz"], "": 0, "a/b": 1, "c%d": 2, "e^f": 3, "g|h": 4, "i\\j": 5,
        'k"l': 6, " ": 7, "m~n": 8,
    }  # fmt: skip
    expected = {
        "": document, "/foo": ["bar", "baz"], "/foo/0": "bar", "/": 0, "/a~1b": 1, "/c%d": 2,
        "/e^f": 3, "/g|h": 4, "/i\\j": 5, '/k"l': 6, "/ ": 7, "/m~0n": 8,
    }  # fmt: skip
    for pointer, value in expected.items():
        assert parse_pointer(pointer).find(document) == [value]


@pytest.mark.parametrize("text", ["a", "#/a", "/a~", "/a~2b", "/" + "/".join("a" * 40)])
def test_what_is_no_pointer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_pointer(text)


@pytest.mark.parametrize(
    ("one", "other", "covers"),
    [("/a", "/a/b", True), ("/a/*", "/a/0", True), ("/a/b", "/a", False), ("/a", "/ab", False)],
)
def test_a_pointer_covers_what_is_within(*, one: str, other: str, covers: bool) -> None:
    assert parse_pointer(one).covers(parse_pointer(other)) is covers
