"""Nights from intervals of sleep that overlap, repeat and stand in any order.

Lives here: one export's intervals, by source, and the nights that they make. A source notes stages
one by one, sometimes twice, sometimes an hour of deep sleep within eight of sleep: what it says of
a night is the union of its intervals, and the whole night belongs to the day on which it ends, its
first stage too if that ended before midnight. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Final, Literal, NamedTuple
from zoneinfo import ZoneInfo

from federated.errors import ImportDataError
from federated.node.columns import COLUMNS
from federated.node.importers.reading import Moment, last_moment, moment

type Kind = Literal["asleep", "in_bed", "awake"]

#: Of one export, which a few years of nights do not come near; what is larger comes in parts.
MOST_INTERVALS: Final = 1_000_000
#: Who is up for longer begins another night (or nap). In seconds.
_LONGEST_WAKING: Final = 2 * 3600
#: What begins so long after a night began is another, however short the waking. In seconds.
_LONGEST_NIGHT: Final = 18 * 3600
_DAY: Final = 24 * 3600
_COLUMNS: Final[dict[Kind, str]] = {"asleep": "sleep_hours", "in_bed": "time_in_bed_hours"}


class _Interval(NamedTuple):
    start: int
    end: int
    day: int
    kind: Kind
    line: int


class Night(NamedTuple):
    """How long of one column, in seconds, in the night that ended at `when`; `line` is its last."""

    source: str
    column: str
    seconds: int
    when: Moment
    line: int


class Nights:
    """Collects intervals. Memory grows with the nights."""

    def __init__(self) -> None:
        self._found: dict[str, list[_Interval]] = {}
        self._count = 0

    def add(
        self,
        source: str,
        kind: Kind,
        *,
        start: datetime,
        end: datetime,
        zone: ZoneInfo | None,
        line: int,
    ) -> None:
        """Take an interval. Raises `ImportDataError` if it ends before it starts, or after a day.

        Also raised if there are more than `MOST_INTERVALS`, all of which lie in memory.

        `zone` as in `reading.moment`.
        """
        if (start.tzinfo is None) != (end.tzinfo is None) or not 0 <= (
            end - start
        ).total_seconds() <= _DAY:
            raise ImportDataError(
                f"{COLUMNS['sleep_hours'].name} must come from an interval of 0 to 24 h."
            )
        if start == end:
            return
        if self._count >= MOST_INTERVALS:
            raise ImportDataError(f"There are more than {MOST_INTERVALS} intervals of sleep.")
        self._count += 1
        ended = moment(last_moment(end), zone)
        # Ends are rounded up again: a night that ends at midnight is as long as any other.
        at = ended.at + 1
        length = round((end - start).total_seconds())
        self._found.setdefault(source, []).append(_Interval(at - length, at, ended.day, kind, line))

    def nights(self) -> Iterator[Night]:
        """Every night of every source."""
        for source, intervals in sorted(self._found.items()):
            for night in _apart(sorted(intervals)):
                last = max(night, key=lambda one: (one.end, one.day))
                for kind, column in _COLUMNS.items():
                    seconds = _union(one for one in night if one.kind == kind)
                    if seconds:
                        when = Moment(last.day, last.end)
                        yield Night(source, column, seconds, when, last.line)


def _apart(intervals: Sequence[_Interval]) -> Iterator[list[_Interval]]:
    """Intervals in the order of their starts, night by night."""
    night: list[_Interval] = []
    end = 0
    for one in intervals:
        waking, length = one.start - end, one.start - night[0].start if night else 0
        if night and (waking >= _LONGEST_WAKING or length >= _LONGEST_NIGHT):
            yield night
            night, end = [], one.end
        night.append(one)
        end = max(end, one.end)
    if night:
        yield night


def _union(intervals: Iterable[_Interval]) -> int:
    """Seconds that at least one covers; `intervals` in the order of their starts."""
    seconds, reached = 0, None
    for one in intervals:
        begins = one.start if reached is None else max(one.start, reached)
        seconds += max(0, one.end - begins)
        reached = one.end if reached is None else max(reached, one.end)
    return seconds
