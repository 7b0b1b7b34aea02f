"""One person's daily table and events in memory: folding readings into it, merging, reading it.

Lives here: `Reading` and `Retraction` (what importers yield), `PersonTable`, its bytes. Pure. What
a column means stands in `node.columns`, where the bytes lie in `node.store`.

A cell is what one source says of one column on one day, with how many readings it rests on. Sources
stay apart, so that a phone and a watch that both counted the same steps are never added up: the
day's value is that of the source that saw more.

Readings that say which record they are of are kept apart (`node.records`), and cells are made of
them: over any number of files each record counts once, in its newest version. All others are folded
as they come, since a sensor's stream is too long to be kept; of two exports that say something of
one day the newer counts, then the one with more readings, the later, the larger. Either way what is
known does not depend on the order in which exports came, nor on how often.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec
import numpy as np

from federated.errors import ImportDataError, StoreError
from federated.model import PersonRows
from federated.node.columns import COLUMNS, Column, check
from federated.node.records import Key, Part, Records, WireParts, WireStandings

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
    start, where no time is known). `found_unit` is the unit as the file had it. `record` names the
    record that the reading is of, in 64 bits, and is None in a stream of readings without names;
    `version` is larger for what was written later, and 0 where nothing is known of that.
    """

    person: str
    column: Column
    day: int
    at: int
    value: float = field(repr=False)
    source: str
    found_unit: str
    record: int | None = None
    version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retraction:
    """That a record was a mistake, from that version on."""

    person: str
    record: int
    version: int


class Cell(NamedTuple):
    """One source's value of a day, the readings it rests on, the time of the last, the version."""

    value: float
    readings: int
    at: int
    version: int = 0

    @property
    def rank(self) -> tuple[int, int, int, float]:
        """Of two cells of one day the one with the larger rank counts."""
        return self.version, self.readings, self.at, self.value


class Event(msgspec.Struct, frozen=True, array_like=True):
    """One reading that is kept with its time."""

    column: str
    source: str
    at: int
    day: int
    value: float
    found_unit: str


class _Series(msgspec.Struct, frozen=True, array_like=True):
    """All days of one column from one source; little-endian arrays of i4, f8, i4, i8, i8."""

    column: str
    source: str
    found_unit: str
    days: bytes
    values: bytes
    counts: bytes
    times: bytes
    versions: bytes = b""


class _Wire(msgspec.Struct, frozen=True, array_like=True):
    version: int
    series: list[_Series]
    events: list[Event]
    parts: list[WireParts] = []
    standings: WireStandings = WireStandings()
    units: list[tuple[str, str, str]] = []


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Wire)


class PersonTable:
    """What is known about one person, by column, source and day."""

    def __init__(self) -> None:
        self.cells: dict[Key, dict[int, Cell]] = {}
        self.units: dict[Key, str] = {}
        self.events: dict[tuple[str, str, int], Event] = {}
        self._records = Records()
        self._made: dict[Key, set[int]] = {}
        self._made_events: set[tuple[str, str, int]] = set()
        self._out_of_range: list[tuple[Key, int]] = []
        self._settled = True

    @property
    def empty(self) -> bool:
        """Whether there is nothing in it that would have to be kept."""
        self.settle()
        return not any(self.cells.values()) and not self._records.standings

    def take(self, found: Reading | Retraction) -> bool:
        """Fold in what an importer found. True if it opened a new cell, or was a new record."""
        if isinstance(found, Retraction):
            self._records.retract(found.record, found.version)
            self._settled = False
            return True
        return self.add(found)

    def add(self, reading: Reading) -> bool:
        """Fold one reading in. True if a cell, an event or a record is new."""
        key = (reading.column.name, reading.source)
        self._unit(key, reading.found_unit)
        if reading.record is not None:
            part = Part(reading.version, reading.day, reading.at, float(reading.value))
            self._settled = False
            return self._records.add(key, reading.record, part)
        days = self.cells.setdefault(key, {})
        old = days.get(reading.day)
        days[reading.day] = _folded(reading.column, old, reading)
        grown = old is None
        if reading.column.event:
            event = Event(*key, reading.at, reading.day, float(reading.value), reading.found_unit)
            grown |= (*key, reading.at) not in self.events
            self._event(event)
        return grown

    def settle(self) -> None:
        """Make the cells and events of identified readings anew, if there are new ones."""
        if self._settled:
            return
        self._settled = True
        self._unmake()
        self._records.settle()
        for key in self._records.parts:
            self._make(key)

    def _unmake(self) -> None:
        for key, made in self._made.items():
            for day in made:
                del self.cells[key][day]
        for place in self._made_events:
            del self.events[place]
        self._made, self._made_events, self._out_of_range = {}, set(), []

    def _make(self, key: Key) -> None:
        column, cells = COLUMNS[key[0]], self.cells.setdefault(key, {})
        made = self._made.setdefault(key, set())
        for day, parts in self._records.by_day(key).items():
            cell = _fold(column, parts)
            if not _possible(column, cell):
                self._out_of_range.append((key, day))
                continue
            cells[day] = cell
            made.add(day)
            for part in parts if column.event else ():
                place = (*key, part.at)
                self.events[place] = Event(*place, day, part.value, self.units[key])
                self._made_events.add(place)

    def impossible(self) -> Iterator[tuple[str, int]]:
        """Take out the cells whose fold is out of range (26 hours asleep); yield column and day."""
        self.settle()
        for key, day in self._out_of_range:
            self._records.drop(key, day)
            yield key[0], day
        self._out_of_range = []
        for (name, _), days in self.cells.items():
            for day in [day for day, cell in days.items() if not _possible(COLUMNS[name], cell)]:
                del days[day]
                yield name, day

    def merge(self, newer: PersonTable) -> bool:
        """Take over what is new in `newer`; return whether anything was.

        In which order tables are merged, and how often, makes no difference. A day of which records
        together say more than can be is left out.
        """
        self.settle()
        newer.settle()
        for key, unit in newer.units.items():
            self._unit(key, unit)
        changed = self._records.merge(newer._records)
        self._settled = not changed
        self.settle()
        for key, days in newer.cells.items():
            theirs, ours = newer._made.get(key, set()), self._made.get(key, set())
            for day in days.keys() - theirs - ours:
                changed |= self._better(key, day, days[day])
        for place in newer.events.keys() - newer._made_events - self._made_events:
            changed |= self._event(newer.events[place])
        return changed

    def _better(self, key: Key, day: int, cell: Cell) -> bool:
        mine = self.cells.setdefault(key, {})
        old = mine.get(day)
        if old is not None and cell.rank <= old.rank:
            return False
        mine[day] = cell
        return True

    def _event(self, event: Event) -> bool:
        place = (event.column, event.source, event.at)
        old = self.events.get(place)
        if old is not None and (event.value, event.day) <= (old.value, old.day):
            return False
        self.events[place] = event
        return True

    def _unit(self, key: Key, unit: str) -> None:
        """One unit is shown of a source: the same one whichever came first."""
        self.units[key] = min(self.units.get(key, unit), unit)

    def rows(self, columns: Iterable[str]) -> PersonRows:
        """The daily table of these columns: days on which one of them has a value, ascending.

        What is lasting stands on every day, from the nearest day before on which it was recorded,
        or the first after.
        """
        self.settle()
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
        """The bytes that `decode` reads; equal for equal tables."""
        self.settle()
        series = []
        for key, days in sorted(self.cells.items()):
            made = self._made.get(key, set())
            counted = {day: cell for day, cell in days.items() if day not in made}
            if counted:
                series.append(_Series(*key, self.units[key], *_arrays(counted)))
        events = [
            self.events[place] for place in sorted(self.events) if place not in self._made_events
        ]
        parts, standings = self._records.encode()
        units = [(*key, self.units[key]) for key in sorted(self._records.parts)]
        return _encoder.encode(_Wire(1, series, events, parts, standings, units))

    @classmethod
    def decode(cls, raw: bytes) -> PersonTable:
        """Read what `encode` made. Raises `StoreError`."""
        table = cls()
        try:
            wire = _decoder.decode(raw)
            for one in wire.series:
                table.cells[one.column, one.source] = _cells(one)
                table.units[one.column, one.source] = one.found_unit
            for column, source, unit in wire.units:
                table.units[column, source] = unit
            table.events = {(e.column, e.source, e.at): e for e in wire.events}
            table._records = Records.decode(wire.parts, wire.standings)
            table._settled = False
            table.settle()
        except (msgspec.DecodeError, ValueError, KeyError):
            raise StoreError("A person's rows are damaged or of another version.") from None
        return table


def _folded(column: Column, old: Cell | None, reading: Reading) -> Cell:
    value = float(reading.value)
    if old is None:
        return Cell(value, 1, reading.at, reading.version)
    count, at = old.readings + 1, max(old.at, reading.at)
    version = max(old.version, reading.version)
    match column.fold:
        case "sum":
            return Cell(old.value + value, count, at, version)
        case "mean":
            return Cell(old.value + (value - old.value) / count, count, at, version)
        case "last":
            last = max((old.at, old.value), (reading.at, value))
            return Cell(last[1], count, at, version)


def _fold(column: Column, parts: Sequence[Part]) -> Cell:
    """One day's cell of identified readings, in the order of their times."""
    match column.fold:
        case "sum":
            value = math.fsum(part.value for part in parts)
        case "mean":
            value = math.fsum(part.value for part in parts) / len(parts)
        case "last":
            value = parts[-1].value
    return Cell(value, len(parts), parts[-1].at, max(part.version for part in parts))


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


def _arrays(days: dict[int, Cell]) -> tuple[bytes, bytes, bytes, bytes, bytes]:
    ordered = sorted(days)
    cells = [days[day] for day in ordered]
    return (
        np.array(ordered, dtype="<i4").tobytes(),
        np.array([cell.value for cell in cells], dtype="<f8").tobytes(),
        np.array([cell.readings for cell in cells], dtype="<i4").tobytes(),
        np.array([cell.at for cell in cells], dtype="<i8").tobytes(),
        np.array([cell.version for cell in cells], dtype="<i8").tobytes(),
    )


def _cells(one: _Series) -> dict[int, Cell]:
    days = np.frombuffer(one.days, dtype="<i4").tolist()
    values = np.frombuffer(one.values, dtype="<f8").tolist()
    counts = np.frombuffer(one.counts, dtype="<i4").tolist()
    times = np.frombuffer(one.times, dtype="<i8").tolist()
    # Stores that were written before versions were kept have none.
    versions = np.frombuffer(one.versions or bytes(8 * len(days)), dtype="<i8").tolist()
    rows = zip(values, counts, times, versions, strict=True)
    return {day: Cell(*row) for day, row in zip(days, rows, strict=True)}
