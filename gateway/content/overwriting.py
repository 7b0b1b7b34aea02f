"""A write that names by an id in its body which record it is about. Pure.

To many apps a POST with the id of a record that is there changes that record, and a PUT with
another id than the path's changes another one. So an id in a body counts: a record that is there
is asked about as what is changed, and what cannot be found out is refused. Nor may an object inside
of the record be taken for it: in a wrapper an app would find what was looked for outside.
Before and after: `gateway.content.writing`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from gateway.content.pointers import JSON, Pointer
from gateway.content.rules import MAX_ID, Rule, texts_in
from gateway.errors import BadRequestError, UnsupportedError
from policies.labels import MAX_DEPTH

#: What apps call it, where no rule says so.
_USUAL: Final = tuple(Pointer((name,)) for name in ("id", "_id", "uuid", "guid", "pk"))

LEAVE_OUT: Final = (
    "An id stands in the body, and it cannot be told which record it is about. Leave the id out, "
    "or change the record at its own address."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """An object inside of a record: `way` leads there, `names` are its members' in one spelling.

    Steps of the way are names of members, and numbers of the items of lists.
    """

    way: tuple[str | int, ...]
    content: dict[str, JSON] = field(repr=False)
    names: frozenset[str] = field(repr=False)

    def near(self, pointers: Iterable[Pointer]) -> list[Pointer]:
        """Those that may lead anywhere from here, in whatever spelling."""
        return [one for one in pointers if not one.steps or _folded(one.steps[0]) in self.names]

    def covered(self, pointer: Pointer, known: Iterable[Pointer]) -> bool:
        """Whether what `pointer` leads to from here is what a known one leads to from outside."""
        return any(_contains(one, self.way, pointer.steps) for one in known)


def ids_in(
    records: Iterable[JSON], within: Iterable[Inner], rule: Rule, *, sealed: bool
) -> frozenset[str]:
    """Ids by which the records name themselves. Raises `BadRequestError` for one that is none.

    Objects within them count as well, for an app may take the record out of a wrapper such as
    `{"data": {…}}`: but not where the rule says where the id stands and no field is `sealed`, so
    that an id of something else can be written.
    """
    pointers = _USUAL if rule.id is None else (rule.id,)
    found: set[str] = set()
    for record in records:
        found |= _ids_of(record, pointers, exact=rule.id is None)
    if rule.id is not None and not sealed:
        return frozenset(found)
    others = [one for one in (rule.patient, rule.author, rule.request_patient) if one]
    known = (*pointers, *others, *(one.pointer for one in rule.codes))
    for inner in within:
        own = [one for one in inner.near(pointers) if not inner.covered(one, known)]
        found |= _ids_of(inner.content, own, exact=True)
    return frozenset(found)


def ids_asked(parameters: Iterable[tuple[str, str]], rule: Rule) -> frozenset[str]:
    """Ids that the query names: many apps take its parameters for members of the body."""
    pointers = _USUAL if rule.id is None else (rule.id,)
    names = {_folded(one.steps[-1]) for one in pointers if one.steps}
    return frozenset(value for name, value in parameters if _folded(name) in names)


def _ids_of(record: JSON, pointers: Iterable[Pointer], *, exact: bool) -> set[str]:
    """`exact`: another spelling of the member is refused here, and not by who calls."""
    found: set[str] = set()
    for pointer in pointers:
        if exact and pointer.misspelt(record):
            raise UnsupportedError(LEAVE_OUT)
        named = [value for value in pointer.find(record) if value is not None]
        texts = texts_in(record, pointer)
        if len(named) != len(texts) or len(named) > 1:
            raise BadRequestError(
                f"Expected as id one text or number of at most {MAX_ID} characters."
            )
        found.update(texts)
    return found


def objects_within(record: JSON, sealed: Sequence[Pointer]) -> Iterator[Inner]:
    """Every object inside of a record that is not within something sealed.

    Raises `BadRequestError` for what is nested more deeply than labels are looked for.
    """
    waiting: list[tuple[tuple[str | int, ...], JSON]] = [((), record)]
    while waiting:
        way, value = waiting.pop()
        if len(way) > MAX_DEPTH:
            raise BadRequestError("The body is nested too deeply.", status=413)
        inside: Iterable[tuple[str | int, JSON]] = ()
        if isinstance(value, dict):
            inside = value.items()
            if way:
                yield Inner(way=way, content=value, names=frozenset(map(_folded, value)))
        elif isinstance(value, list):
            inside = enumerate(value)
        for name, one in inside:
            if isinstance(one, dict | list):
                place = (*way, name)
                if not any(_contains(other, place) for other in sealed):
                    waiting.append((place, one))


def verify_none_within(within: Iterable[Inner], fields: Sequence[Pointer]) -> None:
    """Raise `BadRequestError` if an object inside a record has a field that is protected outside.

    To an app that takes the record out of a wrapper it is that field, and it would be in the clear.
    """
    for inner in within:
        for one in inner.near(fields):
            hit = one.find(inner.content) or one.misspelt(inner.content)
            if hit and not inner.covered(one, fields):
                raise BadRequestError(
                    "A member that is protected here stands within another member as well: send "
                    "it where it belongs only."
                )


def verify_shape(record: JSON, pointers: Iterable[Pointer]) -> None:
    """Raise `UnsupportedError` if on the way of a pointer stands what it does not lead through.

    A text in place of an object, or an object in place of a list, is not looked into, but an app
    may read it.
    """
    if any(_misshapen(record, one.steps) for one in pointers):
        raise UnsupportedError(
            "Expected objects and lists where the rules of this route say, got something else."
        )


def _misshapen(value: JSON, steps: tuple[str, ...]) -> bool:
    if not steps or value is None:
        return False
    step, rest = steps[0], steps[1:]
    if isinstance(value, dict) and step != "*":
        return step in value and _misshapen(value[step], rest)
    if isinstance(value, list) and step == "*":
        return any(_misshapen(one, rest) for one in value)
    if isinstance(value, list) and step.isdecimal():
        return int(step) < len(value) and _misshapen(value[int(step)], rest)
    # Empty lists and objects are written alike by some programs.
    return value not in ({}, [])


def _contains(known: Pointer, way: tuple[str | int, ...], steps: tuple[str, ...] = ()) -> bool:
    """Whether `known` leads to the place `steps` from the end of `way`, or around it."""
    mine = known.steps
    if len(mine) > len(way) + len(steps):
        return False
    through = all(
        step in {"*", str(place)} if isinstance(place, int) else step == place != "*"
        for step, place in zip(mine, way, strict=False)
    )
    return through and all(
        step == other or (step == "*" and other.isdecimal())
        for step, other in zip(mine[len(way) :], steps, strict=False)
    )


def _folded(name: str) -> str:
    return name.strip().casefold()


def verify_same(ids: Collection[str], there: Collection[str | None]) -> None:
    """Raise `UnsupportedError` if a change names another record than it is sent to."""
    if not frozenset(ids) <= frozenset(there):
        raise UnsupportedError(LEAVE_OUT)
