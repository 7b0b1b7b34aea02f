"""Readings that say which record they are of: which version of it counts, and what a day has.

Lives here: one person's identified readings in memory, and their bytes. Comes before: importers
whose formats name records (a resource, a night, a data point). Comes after: `node.daily`, which
makes cells of them. Pure.

A record is one thing that a program noted, and may come again: the same, corrected, or taken back.
The newest version counts, and of one version that says two things the larger, so that what is known
does not depend on the order in which files came, nor on how often. What an older version said is
forgotten; that a record was taken back is kept, since the older version may still come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec
import numpy as np

#: Column and source.
type Key = tuple[str, str]


class Part(NamedTuple):
    """What one record says for one column, in the order in which the larger counts."""

    version: int
    day: int
    at: int
    value: float


class Standing(NamedTuple):
    """The newest version of a record that was seen, and whether it was taken back."""

    version: int
    gone: bool


class WireParts(msgspec.Struct, frozen=True, array_like=True):
    """All parts of one column and source; little-endian arrays of u8, i8, i4, i8, f8."""

    column: str
    source: str
    records: bytes
    versions: bytes
    days: bytes
    times: bytes
    values: bytes


class WireStandings(msgspec.Struct, frozen=True, array_like=True):
    """All records; little-endian arrays of u8, i8, u1."""

    records: bytes = b""
    versions: bytes = b""
    gone: bytes = b""


class Records:
    """One person's identified readings. A record is named by 64 bits (`reading.record_of`)."""

    def __init__(self) -> None:
        self.parts: dict[Key, dict[int, Part]] = {}
        self.standings: dict[int, Standing] = {}

    def add(self, key: Key, record: int, part: Part) -> bool:
        """Take what a record says of a column. True if it was not known of that column."""
        self._note(record, Standing(part.version, gone=False))
        parts = self.parts.setdefault(key, {})
        old = parts.get(record)
        if old is None or part > old:
            parts[record] = part
        return old is None

    def retract(self, record: int, version: int) -> None:
        """Take a record back, from that version on."""
        self._note(record, Standing(version, gone=True))

    def drop(self, key: Key, day: int) -> None:
        """Forget what is said of one day."""
        parts = self.parts.get(key, {})
        for record in [one for one, part in parts.items() if part.day == day]:
            del parts[record]

    def merge(self, newer: Records) -> bool:
        """Take over what `newer` knows; return whether anything of it was new."""
        self.settle()
        newer.settle()
        changed = False
        for record, standing in newer.standings.items():
            changed |= self._note(record, standing)
        for key, parts in newer.parts.items():
            mine = self.parts.setdefault(key, {})
            for record, part in parts.items():
                old = mine.get(record)
                counts = part.version == self.standings[record].version
                if counts and (old is None or part > old):
                    mine[record] = part
                    changed = True
        self.settle()
        return changed

    def settle(self) -> None:
        """Forget parts of older versions, and of records that were taken back."""
        for key in list(self.parts):
            kept = {r: part for r, part in self.parts[key].items() if self._counts(r, part)}
            if kept:
                self.parts[key] = kept
            else:
                del self.parts[key]

    def by_day(self, key: Key) -> dict[int, list[Part]]:
        """What counts for a column and source, by day, in an order that files do not decide."""
        days: dict[int, list[Part]] = {}
        for part in sorted(self.parts[key].values(), key=lambda p: (p.at, p.version, p.value)):
            days.setdefault(part.day, []).append(part)
        return days

    def encode(self) -> tuple[list[WireParts], WireStandings]:
        """What `decode` reads."""
        parts = [
            WireParts(
                *key,
                np.array(sorted(found), dtype="<u8").tobytes(),
                *_columns([found[record] for record in sorted(found)]),
            )
            for key, found in sorted(self.parts.items())
        ]
        known = sorted(self.standings)
        standings = [self.standings[record] for record in known]
        return parts, WireStandings(
            np.array(known, dtype="<u8").tobytes(),
            np.array([one.version for one in standings], dtype="<i8").tobytes(),
            bytes(one.gone for one in standings),
        )

    @classmethod
    def decode(cls, parts: Iterable[WireParts], standings: WireStandings) -> Records:
        """Read what `encode` made. Raises ValueError for what it cannot have made."""
        made = cls()
        known = np.frombuffer(standings.records, dtype="<u8").tolist()
        versions = np.frombuffer(standings.versions, dtype="<i8").tolist()
        for record, version, gone in zip(known, versions, standings.gone, strict=True):
            made.standings[record] = Standing(version, gone=bool(gone))
        for one in parts:
            found = dict(_parts(one))
            if not found.keys() <= made.standings.keys():
                raise ValueError("a part is of no record")
            made.parts[one.column, one.source] = found
        return made

    def _note(self, record: int, standing: Standing) -> bool:
        old = self.standings.get(record)
        if old is not None and standing <= old:
            return False
        self.standings[record] = standing
        return True

    def _counts(self, record: int, part: Part) -> bool:
        standing = self.standings[record]
        return part.version == standing.version and not standing.gone


def _columns(parts: list[Part]) -> tuple[bytes, bytes, bytes, bytes]:
    return (
        np.array([part.version for part in parts], dtype="<i8").tobytes(),
        np.array([part.day for part in parts], dtype="<i4").tobytes(),
        np.array([part.at for part in parts], dtype="<i8").tobytes(),
        np.array([part.value for part in parts], dtype="<f8").tobytes(),
    )


def _parts(one: WireParts) -> Iterator[tuple[int, Part]]:
    columns = (
        np.frombuffer(one.versions, dtype="<i8").tolist(),
        np.frombuffer(one.days, dtype="<i4").tolist(),
        np.frombuffer(one.times, dtype="<i8").tolist(),
        np.frombuffer(one.values, dtype="<f8").tolist(),
    )
    records = np.frombuffer(one.records, dtype="<u8").tolist()
    return zip(records, (Part(*row) for row in zip(*columns, strict=True)), strict=True)
