"""Fitbit: the folder (or ZIP archive) of a Google Takeout or an account's export.

Files of JSON arrays, recognised by their names: `sleep-*.json`, `steps-*.json`, `heart_rate-*.json`
and others. Steps, distance and heart rate come with times in UTC, so the person's time zone must be
named; nights and daily minutes come with the person's own clock.

A night is known again by its `logId`, a day's minutes by the kind of file and the day: each counts
once, in whichever and in however many files it comes. A minute counts once in one import; a day of
which two imports have each a part is the longer part, so a folder is imported whole.

Heart rates are measured by trackers that are worn, so a day with one says so in `device_class`;
steps alone may be a phone's and say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Final

from federated.errors import ImportDataError
from federated.node.columns import COLUMNS
from federated.node.daily import Reading
from federated.node.importers.reading import (
    Found,
    Moment,
    Options,
    Progress,
    Seen,
    bad,
    day_number,
    moment,
    parse_json,
    parse_number,
    parse_time,
    parts,
    reading,
    record_of,
)
from federated.node.store import OWNER

_NAME = re.compile(
    r"(sleep|steps|distance|heart_rate|resting_heart_rate|sedentary_minutes|"
    r"moderately_active_minutes|very_active_minutes)-\d{4}-\d{2}-\d{2}\.json"
).fullmatch
_SOURCE: Final = "fitbit"
_MIN_CONFIDENCE: Final = 1
_WORN: Final = 1


class Fitbit:
    """The importer."""

    name = "fitbit"

    def recognises(self, path: Path, head: bytes) -> bool:
        """By the names of files."""
        if path.is_dir():
            return any(_NAME(file.name) for file in path.rglob("*.json"))
        return bool(_NAME(path.name)) or (path.suffix == ".zip" and b"Fitbit" in head)

    def read(self, path: Path, options: Options, progress: Progress) -> Iterator[Found]:
        """Yield readings, file by file; each file is read whole."""
        found, seen = False, Seen()
        worn: dict[int, Moment] = {}
        for part in parts(path, lambda name: bool(_NAME(name))):
            kind = _NAME(part.name)
            if kind is None:
                break
            found = True
            content = part.whole()
            entries = parse_json(content, part.name, list[dict[str, Any]])
            for number, entry in enumerate(entries, start=1):
                try:
                    if kind[1] not in _STREAMS or seen.first(kind[1], entry["dateTime"]):
                        for made in _READERS[kind[1]](entry, options):
                            if kind[1] == "heart_rate":
                                worn.setdefault(made.day, Moment(made.day, made.at))
                            yield made
                except (ImportDataError, KeyError, TypeError, AttributeError) as error:
                    known = error if isinstance(error, ImportDataError) else _MISSING
                    yield bad(part.name, number, known)
            progress(part.before + len(content), part.total)
        if not found:
            raise ImportDataError(f"There are no files of a Fitbit export in {path}.")
        for when in worn.values():
            record = record_of(_SOURCE, "device", when.day)
            yield _made("device_class", _WORN, "{code}", when, options, record)


_MISSING: Final = ImportDataError("The entry lacks a field, or it is of another kind.")


def _made(
    name: str, value: object, unit: str, when: Moment, options: Options, record: int | None = None
) -> Reading:
    return reading(
        COLUMNS[name],
        parse_number(value),
        unit,
        person=options.person or OWNER,
        when=when,
        source=_SOURCE,
        record=record,
    )


def _short(text: str) -> datetime:
    """`01/31/20 05:01:00`."""
    try:
        return datetime.strptime(text, "%m/%d/%y %H:%M:%S")  # noqa: DTZ007 - who calls knows the zone
    except ValueError:
        raise ImportDataError("The time is not one that can be read.") from None


def _in_utc(text: str, options: Options) -> Moment:
    return moment(_short(text).replace(tzinfo=UTC), options.time_zone)


def _series(name: str, unit: str) -> Callable[[dict[str, Any], Options], Iterator[Reading]]:
    def read(entry: dict[str, Any], options: Options) -> Iterator[Reading]:
        yield _made(name, entry["value"], unit, _in_utc(entry["dateTime"], options), options)

    return read


def _daily(
    name: str, unit: str, kind: str
) -> Callable[[dict[str, Any], Options], Iterator[Reading]]:
    def read(entry: dict[str, Any], options: Options) -> Iterator[Reading]:
        when = moment(_short(entry["dateTime"]), options.time_zone)
        yield _made(name, entry["value"], unit, when, options, record_of(_SOURCE, kind, when.day))

    return read


def _heart_rate(entry: dict[str, Any], options: Options) -> Iterator[Reading]:
    value = entry["value"]
    # Without confidence the sensor had no contact.
    if value.get("confidence", _MIN_CONFIDENCE) >= _MIN_CONFIDENCE:
        when = _in_utc(entry["dateTime"], options)
        yield _made("heart_rate", value["bpm"], "/min", when, options)


def _resting(entry: dict[str, Any], options: Options) -> Iterator[Reading]:
    value = entry["value"]
    # 0 with an error of 0 is how the export says that there was no measurement.
    if value.get("date") and value["value"]:
        when = moment(_short(f"{value['date']} 00:00:00"), options.time_zone)
        record = record_of(_SOURCE, "resting", when.day)
        yield _made("resting_heart_rate", value["value"], "/min", when, options, record)


def _sleep(entry: dict[str, Any], options: Options) -> Iterator[Reading]:
    try:
        day = date.fromisoformat(entry["dateOfSleep"])
    except ValueError:
        raise ImportDataError("The day is not one that can be read.") from None
    end = moment(parse_time(entry["endTime"]), options.time_zone)
    when = Moment(day_number(day), end.at)
    record = record_of(_SOURCE, "sleep", str(entry.get("logId", entry["endTime"])))
    yield _made("sleep_hours", entry["minutesAsleep"], "min", when, options, record)
    yield _made("time_in_bed_hours", entry["timeInBed"], "min", when, options, record)
    if entry.get("mainSleep", True) and entry.get("efficiency"):
        yield _made("sleep_efficiency", entry["efficiency"], "%", when, options, record)


_READERS: Final[Mapping[str, Callable[[dict[str, Any], Options], Iterator[Reading]]]] = {
    "sleep": _sleep,
    "steps": _series("steps", "{steps}"),
    "distance": _series("distance_km", "cm"),
    "heart_rate": _heart_rate,
    "resting_heart_rate": _resting,
    "sedentary_minutes": _daily("sedentary_minutes", "min", "sedentary"),
    "moderately_active_minutes": _daily("active_minutes", "min", "moderate"),
    "very_active_minutes": _daily("active_minutes", "min", "very"),
}
#: Files of so many entries that they are folded as they come.
_STREAMS: Final = frozenset({"steps", "distance", "heart_rate"})
