"""One person's daily table and events in memory: folding readings into it, merging, reading it.

Lives here: `Reading` (what importers yield), `PersonTable`, its bytes. Pure. What a column means
stands in `node.columns`, where the bytes lie in `node.store`.

A cell is what one source says of one column on one day, with how many readings it rests on. Sources
stay apart, so that a phone and a watch that both counted the same steps are never added up: the
day's value is that of the source that saw more. Reading the same export again finds the same cells;
an export that reaches further replaces the day that an earlier one had only begun.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec
import numpy as np

from federated.errors import ImportDataError, StoreError
from federated.model import PersonRows
from federated.node.columns import COLUMNS, Column, check

#: Cells and events that one import may make; what is larger comes in parts.
MAX_CELLS: Final = 3_000_000
#: Days from 1900 to 2200, since 1970-01-01.
FIRST_DAY: Final = -25_567
LAST_DAY: Final = 84_006
MAX_SOURCE: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One value that an importer found, already in the column's unit and range.

    `day` counts from 1970-01-01 in the person's own time zone; `at` is Unix seconds (of the day's
    start, where no time is known). `found_unit` is the unit as the file had it.
    """

    person: str
    column: Column
    day: int
    at: int
    value: float = field(repr=False)
    source: str
    found_unit: str


class Cell(NamedTuple):
    """One source's value of a day, the readings it rests on, and the time of the last."""

    value: float
    readings: int
    at: int


class Event(msgspec.Struct, frozen=True, array_like=True):
    """One reading that is kept with its time."""

    column: str
    source: str
    at: int
    day: int
    value: float
    found_unit: str


class _Series(msgspec.Struct, frozen=True, array_like=True):
    """All days of one column from one source; little-endian arrays of i4, f8, i4, i8."""

    column: str
    source: str
    found_unit: str
    days: bytes
    values: bytes
    counts: bytes
    times: bytes


class _Wire(msgspec.Struct, frozen=True, array_like=True):
    version: int
    series: list[_Series]
    events: list[Event]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Wire)


class PersonTable:
    """What is known about one person, by column, source and day."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], dict[int, Cell]] = {}
        self.units: dict[tuple[str, str], str] = {}
        self.events: dict[tuple[str, str, int], Event] = {}

    def add(self, reading: Reading) -> bool:
        """Fold one reading in, in the order of the file. True if a cell or an event is new."""
        key = (reading.column.name, reading.source)
        days = self.cells.setdefault(key, {})
        self.units.setdefault(key, reading.found_unit)
        old = days.get(reading.day)
        days[reading.day] = _folded(reading.column, old, reading)
        grown = old is None
        if reading.column.event:
            grown |= (*key, reading.at) not in self.events
            event = Event(*key, reading.at, reading.day, float(reading.value), reading.found_unit)
            self.events[(*key, reading.at)] = event
        return grown

    def impossible(self) -> Iterator[tuple[str, int]]:
        """Take out the cells whose fold is out of range (26 hours asleep); yield column and day."""
        for (name, _), days in self.cells.items():
            for day in [day for day, cell in days.items() if not _possible(COLUMNS[name], cell)]:
                del days[day]
                yield name, day

    def merge(self, newer: PersonTable) -> bool:
        """Take over what is new in `newer`; return whether anything was.

        A cell that rests on fewer readings than the one that is there does not replace it: it is
        of an export that was made before the day was over.
        """
        changed = False
        for key, days in newer.cells.items():
            mine = self.cells.setdefault(key, {})
            for day, cell in days.items():
                old = mine.get(day)
                if old is None or (cell.readings >= old.readings and cell != old):
                    mine[day] = cell
                    changed = True
            self.units.setdefault(key, newer.units[key])
        for place, event in newer.events.items():
            if self.events.get(place) != event:
                self.events[place] = event
                changed = True
        return changed

    def rows(self, columns: Iterable[str]) -> PersonRows:
        """The daily table of these columns: days on which one of them has a value, ascending.

        What is lasting stands on every day, from the nearest day before on which it was recorded,
        or the first after.
        """
        wanted = sorted(set(columns))
        chosen = {name: self._chosen(name) for name in wanted}
        moving = [name for name in wanted if not COLUMNS[name].lasting and chosen[name]]
        of_days = moving or wanted
        known = sorted({day for name in of_days for day in chosen[name]})
        days = np.array(known, dtype=np.int64)
        values = {
            name: _spread(days, chosen[name], lasting=COLUMNS[name].lasting) for name in wanted
        }
        return PersonRows(days=days, values=values)

    def _chosen(self, name: str) -> dict[int, float]:
        found: dict[int, tuple[tuple[float, str], float]] = {}
        by_value = COLUMNS[name].fold == "sum"
        for (column, source), days in self.cells.items():
            if column != name:
                continue
            for day, cell in days.items():
                rank = (cell.value if by_value else float(cell.readings), source)
                best = found.get(day)
                if best is None or rank > best[0]:
                    found[day] = (rank, cell.value)
        return {day: value for day, (_, value) in found.items()}

    def encode(self) -> bytes:
        """The bytes that `decode` reads."""
        series = [
            _Series(name, source, self.units[name, source], *_arrays(days))
            for (name, source), days in self.cells.items()
            if days
        ]
        return _encoder.encode(_Wire(1, series, list(self.events.values())))

    @classmethod
    def decode(cls, raw: bytes) -> PersonTable:
        """Read what `encode` made. Raises `StoreError`."""
        table = cls()
        try:
            wire = _decoder.decode(raw)
            for one in wire.series:
                table.cells[one.column, one.source] = _cells(one)
                table.units[one.column, one.source] = one.found_unit
        except (msgspec.DecodeError, ValueError):
            raise StoreError("A person's rows are damaged or of another version.") from None
        table.events = {(e.column, e.source, e.at): e for e in wire.events}
        return table


def _folded(column: Column, old: Cell | None, reading: Reading) -> Cell:
    value = float(reading.value)
    if old is None:
        return Cell(value, 1, reading.at)
    count, at = old.readings + 1, max(old.at, reading.at)
    match column.fold:
        case "sum":
            return Cell(old.value + value, count, at)
        case "mean":
            return Cell(old.value + (value - old.value) / count, count, at)
        case "last":
            return Cell(value if reading.at >= old.at else old.value, count, at)


def _possible(column: Column, cell: Cell) -> bool:
    try:
        check(column, cell.value)
    except ImportDataError:
        return False
    return True


def _spread(
    days: np.ndarray[tuple[int], np.dtype[np.int64]], found: dict[int, float], *, lasting: bool
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    values = np.full(len(days), np.nan)
    if not found:
        return values
    at = np.array(sorted(found), dtype=np.int64)
    known = np.array([found[int(day)] for day in at])
    if lasting:
        place = np.searchsorted(at, days, side="right") - 1
        return known[np.maximum(place, 0)]
    place = np.searchsorted(days, at)
    # Days of a column that is lasting elsewhere are not among `days`.
    values[place] = known
    return values


def _arrays(days: dict[int, Cell]) -> tuple[bytes, bytes, bytes, bytes]:
    ordered = sorted(days)
    cells = [days[day] for day in ordered]
    return (
        np.array(ordered, dtype="<i4").tobytes(),
        np.array([cell.value for cell in cells], dtype="<f8").tobytes(),
        np.array([cell.readings for cell in cells], dtype="<i4").tobytes(),
        np.array([cell.at for cell in cells], dtype="<i8").tobytes(),
    )


def _cells(one: _Series) -> dict[int, Cell]:
    days = np.frombuffer(one.days, dtype="<i4").tolist()
    values = np.frombuffer(one.values, dtype="<f8").tolist()
    counts = np.frombuffer(one.counts, dtype="<i4").tolist()
    times = np.frombuffer(one.times, dtype="<i8").tolist()
    return {
        day: Cell(value, count, at)
        for day, value, count, at in zip(days, values, counts, times, strict=True)
    }
