"""What all importers share: options, bad rows, times, files in folders and archives, progress.

A day is the person's own day. A time with its offset from UTC says it by itself; a time in UTC does
not, and is refused until somebody says the person's time zone. A night belongs to the day on which
it ends.
"""

from __future__ import annotations

import contextlib
import zipfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, Final, Protocol
from zoneinfo import ZoneInfo

import msgspec

from federated.errors import ImportDataError
from federated.node.columns import Column, convert
from federated.node.daily import FIRST_DAY, LAST_DAY, MAX_SOURCE, Reading, Retraction

#: What an importer yields.
type Found = Reading | Retraction | BadRow | Server
#: Called with bytes read so far and bytes in all.
type Progress = Callable[[int, int], None]

#: A JSON document that has to be read whole is refused above this.
MAX_JSON_BYTES: Final = 256 * 1024 * 1024
BLOCK_BYTES: Final = 1 << 20
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_DAY: Final = date(1970, 1, 1).toordinal()
_LATEST_VERSION: Final = 2**52 - 1
_SMALLEST_TABLE: Final = 1024
_SECONDS: Final = 86_400
_NO_DAY: Final = "The day is not one on which anybody could have been measured."


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to read: whose data it is, their time zone, a mapping; where the format needs it."""

    person: str | None = None
    time_zone: ZoneInfo | None = None
    mapping: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Whose ids name the people of an export: another server's may name others by the same."""

    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """What could not be taken. `line` counts lines, or entries, from 1. Never holds a value."""

    file: str
    line: int
    reason: str


class Importer(Protocol):
    """Reads one format."""

    @property
    def name(self) -> str:
        """As `--format` names it."""
        ...

    def recognises(self, path: Path, head: bytes) -> bool:
        """Whether a file (with its first bytes) or folder looks like this format."""
        ...

    def read(self, path: Path, options: Options, progress: Progress) -> Iterator[Found]:
        """Yield what is in it. Raises `ImportDataError` if it is not of this format at all."""
        ...


@dataclass(frozen=True, slots=True)
class Moment:
    """A time as the person saw it: the day there, and Unix seconds."""

    day: int
    at: int


def moment(found: datetime, zone: ZoneInfo | None) -> Moment:
    """The person's own day at a time. Raises `ImportDataError` if it cannot be known.

    A time without offset is what the person's clock showed.
    """
    if found.tzinfo is None:
        day = found.date()
        seconds = int(found.replace(tzinfo=zone or UTC).timestamp())
    else:
        if zone is not None:
            try:
                found = found.astimezone(zone)
            except OverflowError:
                raise ImportDataError(_NO_DAY) from None
        elif not found.utcoffset():
            raise ImportDataError(
                "The time is in UTC, which does not say the person's own day: name their time "
                "zone, as in --time-zone Europe/Vienna."
            )
        day = found.date()
        seconds = int(found.timestamp())
    return Moment(day_number(day), seconds)


def last_moment(end: datetime) -> datetime:
    """The last moment of a time that has an end: what ends at midnight is of the day before.

    Raises `ImportDataError` if there is none.
    """
    try:
        return end - timedelta(microseconds=1)
    except OverflowError:
        raise ImportDataError(_NO_DAY) from None


def day_number(day: date) -> int:
    """Days since 1970-01-01. Raises `ImportDataError` outside of 1900 to 2199."""
    number = day.toordinal() - _EPOCH_DAY
    if not FIRST_DAY <= number < LAST_DAY:
        raise ImportDataError(_NO_DAY)
    return number


def parse_time(text: str) -> datetime:
    """Read an ISO 8601 time. Raises `ImportDataError`, without the text."""
    try:
        return datetime.fromisoformat(text)
    except (ValueError, TypeError):
        raise ImportDataError("The time is not one that can be read.") from None


def written_at(text: object) -> int:
    """A version from the time at which something was written, in microseconds; 0 if unknown.

    Below 2^52, which is in the year 2112: no file makes its own readings newer for ever.
    """
    try:
        return min(max(0, microseconds(datetime.fromisoformat(str(text)))), _LATEST_VERSION)
    except (ValueError, OverflowError):
        return 0


def microseconds(found: datetime) -> int:
    """A time since 1970, in microseconds. Without offset it is taken for UTC."""
    known = found if found.tzinfo else found.replace(tzinfo=UTC)
    return (known - _EPOCH) // timedelta(microseconds=1)


def record_of(*parts: object) -> int:
    """64 bits that name a record by what makes it that record and no other."""
    text = repr(parts).encode("utf-8", "backslashreplace")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


class Seen:
    """Remembers which records came, 64 bits of each: 12 to 36 bytes of memory a record.

    Two different ones are taken for one with a probability below 10^-5 among ten million.
    """

    def __init__(self) -> None:
        self._table = array("Q", [0]) * _SMALLEST_TABLE
        self._count = 0

    def first(self, *parts: object) -> bool:
        """Whether these parts did not come before. Remembers them."""
        # 0 means: empty.
        record = record_of(*parts) or 1
        place = _place(self._table, record)
        if self._table[place] == record:
            return False
        self._table[place] = record
        self._count += 1
        if 3 * self._count > 2 * len(self._table):
            old, self._table = self._table, array("Q", [0]) * (2 * len(self._table))
            for one in old:
                if one:
                    self._table[_place(self._table, one)] = one
        return True


def _place(table: array[int], record: int) -> int:
    """Where a record stands in an open hash table of 2^k places, or is to be put."""
    last = len(table) - 1
    place = record & last
    while table[place] not in {0, record}:
        place = (place + 1) & last
    return place


def parse_number(text: object) -> float:
    """Read a number. Raises `ImportDataError`, without the text."""
    try:
        if isinstance(text, bool) or not isinstance(text, int | float | str):
            raise TypeError  # noqa: TRY301 - one way out for all that is no number
        return float(text)
    except (ValueError, TypeError, OverflowError):
        raise ImportDataError("There is something where a number must stand.") from None


def reading(
    column: Column,
    value: float,
    unit: str,
    *,
    person: str,
    when: Moment,
    source: str,
    record: int | None = None,
    version: int = 0,
) -> Reading:
    """A reading in the column's own unit. Raises `ImportDataError`."""
    plain = "".join(c for c in source if c.isprintable())
    return Reading(
        person=person,
        column=column,
        day=when.day,
        at=when.at,
        value=convert(column, value, unit),
        source=plain[:MAX_SOURCE] or "unknown",
        found_unit=unit,
        record=record,
        version=version,
    )


@contextlib.contextmanager
def reading_of(path: Path) -> Iterator[None]:
    """Translate what files and archives raise."""
    try:
        yield
    except (OSError, EOFError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise ImportDataError(f"{path} cannot be read ({type(error).__name__}).") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One file of a folder or an archive. `before` is how much of the whole came before it."""

    name: str
    opened: IO[bytes]
    before: int
    total: int

    def whole(self, most: int = MAX_JSON_BYTES) -> bytes:
        """All of it. Raises `ImportDataError` if that is more than `most` bytes."""
        content = self.opened.read(most + 1)
        if len(content) > most:
            raise ImportDataError(f"{self.name} has more than {most} bytes: split it.")
        return content


def parts(path: Path, wanted: Callable[[str], bool]) -> Iterator[Part]:
    """The files of a folder, or of a ZIP archive, or the file itself, in the order of their names.

    `wanted` chooses by the name without folders. Sizes that an archive states are not believed:
    who reads bounds what is read.
    """
    with reading_of(path):
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and wanted(file.name))
            total, before = sum(file.stat().st_size for file in files), 0
            for file in files:
                with file.open("rb") as opened:
                    yield Part(name=file.name, opened=opened, before=before, total=total)
                before += file.stat().st_size
        elif zipfile.is_zipfile(path):
            yield from _archived(path, wanted)
        else:
            with path.open("rb") as opened:
                yield Part(name=path.name, opened=opened, before=0, total=path.stat().st_size)


def _archived(path: Path, wanted: Callable[[str], bool]) -> Iterator[Part]:
    with zipfile.ZipFile(path) as archive:
        members = sorted(
            (one for one in archive.infolist() if wanted(one.filename.rpartition("/")[2])),
            key=lambda one: one.filename,
        )
        total, before = sum(one.file_size for one in members), 0
        for member in members:
            with archive.open(member) as opened:
                name = member.filename.rpartition("/")[2]
                yield Part(name=name, opened=opened, before=before, total=total)
            before += member.file_size


def parse_json(content: bytes, name: str, kind: Any = Any) -> Any:
    """Read JSON as `kind`. Raises `ImportDataError`, without what stands there."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        # The text of these names places and types only.
        raise ImportDataError(f"{name} is not as its format says: {error}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ImportDataError(f"{name} is not JSON.") from None


def bad(file: str, line: int, error: Exception) -> BadRow:
    """A bad row from what was raised about it."""
    return BadRow(file=file, line=line, reason=str(error))
