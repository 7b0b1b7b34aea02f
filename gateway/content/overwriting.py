"""A write that names by an id in its body which record it is about. Pure.

To many apps a POST with the id of a record that is there changes that record, and a PUT with
another id than the path's changes another one. So an id in a body counts: a record that is there
is asked about as what is changed, and what cannot be found out is refused.
Before and after: `gateway.content.writing`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from gateway.content.pointers import JSON, Pointer
from gateway.content.rules import MAX_ID, Rule, texts_in
from gateway.errors import BadRequestError, UnsupportedError

#: What apps call it, where no rule says so.
_USUAL: Final = tuple(Pointer((name,)) for name in ("id", "_id", "uuid", "guid", "pk"))

LEAVE_OUT: Final = (
    "An id stands in the body, and it cannot be told which record it is about. Leave the id out, "
    "or change the record at its own address."
)


def ids_in(records: Iterable[JSON], rule: Rule) -> frozenset[str]:
    """Ids by which the records name themselves. Raises `BadRequestError` for one that is none."""
    pointers = _USUAL if rule.id is None else (rule.id,)
    found: set[str] = set()
    for record in records:
        for pointer in pointers:
            if rule.id is None and pointer.misspelt(record):
                raise UnsupportedError(LEAVE_OUT)
            named = [value for value in pointer.find(record) if value is not None]
            texts = texts_in(record, pointer)
            if len(named) != len(texts) or len(named) > 1:
                raise BadRequestError(
                    f"Expected as id one text or number of at most {MAX_ID} characters."
                )
            found.update(texts)
    return frozenset(found)


def verify_same(ids: Collection[str], there: Collection[str | None]) -> None:
    """Raise `UnsupportedError` if a change names another record than it is sent to."""
    if not frozenset(ids) <= frozenset(there):
        raise UnsupportedError(LEAVE_OUT)
