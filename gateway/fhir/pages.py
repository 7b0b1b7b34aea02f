"""Where a search stands, what it goes by, and what it has found: what a link to go on holds.

Before and after: `gateway.fhir.search`. A link is sealed by `gateway.fhir.links`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

import orjson

from gateway.errors import BadRequestError
from gateway.fhir.query import Controls
from gateway.fhir.records import Record
from gateway.fhir.resources import Json
from policies.model import Action, Allowed
from policies.obligations import LimitRows, Obligation

NO_LIMIT: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in the app's pages to go on: a request, and how many of its matches were seen."""

    path: str
    query: str = field(default="", repr=False)
    form: bool = False
    index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What is asked of each record, and what stays the same from page to page."""

    kind: Literal["search", "everything", "history"]
    action: Action
    type: str
    tested: frozenset[str] = frozenset()
    rows: int = NO_LIMIT
    given: int = 0
    named: frozenset[str] = field(default=frozenset(), repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A record that may be released, not released yet."""

    record: Record
    allowed: Allowed
    entry: Json = field(repr=False)
    included: bool = False


@dataclass(slots=True, kw_only=True)
class Gathered:
    """What was found. `next`: where another match stands. `cut`: there are more than rows allow."""

    matches: list[Match] = field(default_factory=list)
    included: list[Match] = field(default_factory=list)
    next: Place | None = None
    cut: bool = False
    counted: int | None = None
    rows: int = NO_LIMIT

    @property
    def going(self) -> list[tuple[Record, Allowed]]:
        """Every record that may be in the answer, and how it was allowed."""
        return [(one.record, one.allowed) for one in (*self.matches, *self.included)]


def packed(place: Place, plan: Pass, controls: Controls) -> str:
    """What a link to the next page holds."""
    return orjson.dumps(
        [
            [place.path, place.query, place.form, place.index],
            [
                plan.kind,
                plan.action,
                plan.type,
                sorted(plan.tested),
                plan.rows,
                plan.given,
                sorted(plan.named),
            ],
            [controls.count, controls.summary, sorted(controls.elements)],
        ]
    ).decode()


def unpacked(link: str) -> tuple[Place, Pass, Controls]:
    """The same again. It was sealed by us: anything else in it is a mistake of ours."""
    try:
        where, what, how = orjson.loads(link)
        place = Place(path=where[0], query=where[1], form=where[2], index=where[3])
        plan = Pass(
            kind=what[0],
            action=what[1],
            type=what[2],
            tested=frozenset(what[3]),
            rows=what[4],
            given=what[5],
            named=frozenset(what[6]),
        )
        controls = Controls(count=how[0], summary=how[1], elements=frozenset(how[2]))
    except (ValueError, IndexError, TypeError) as error:
        raise BadRequestError("This link is not one for a further page. Search again.") from error
    return place, plan, controls


def row_limit(obligations: Iterable[Obligation]) -> int:
    """How many records a search may give altogether."""
    return min([one.rows for one in obligations if isinstance(one, LimitRows)], default=NO_LIMIT)
