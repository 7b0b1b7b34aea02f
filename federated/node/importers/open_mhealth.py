"""Open mHealth data points: one JSON object, an array of them, or one in each line.

Schemas of the namespace `omh` (openmhealth.org): step-count, sleep-duration, total-sleep-time,
sleep-episode, heart-rate, minutes-moderate-activity, body-weight. Others are passed over.

A point is known again by its schema, its source and the beginning of its time: whatever says the
same later, under the same id or another, replaces it, by the time at which it was created. What
several schemas say of one night are several sources, and never added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from federated.errors import ImportDataError
from federated.node.columns import COLUMNS, Column
from federated.node.daily import Reading
from federated.node.importers.reading import (
    Found,
    Moment,
    Options,
    Part,
    Progress,
    bad,
    last_moment,
    microseconds,
    moment,
    parse_json,
    parse_number,
    parse_time,
    parts,
    reading,
    record_of,
    written_at,
)
from federated.node.store import OWNER

#: Schema → fields of the body, each with its column, and the unit where an old version has none.
_SCHEMAS: Final[Mapping[str, tuple[tuple[str, str, str], ...]]] = {
    "step-count": (("step_count", "steps", "steps"),),
    "sleep-duration": (("sleep_duration", "sleep_hours", ""),),
    "total-sleep-time": (("total_sleep_time", "sleep_hours", ""),),
    "sleep-episode": (
        ("total_sleep_time", "sleep_hours", ""),
        ("sleep_maintenance_efficiency_percentage", "sleep_efficiency", "%"),
    ),
    "heart-rate": (("heart_rate", "heart_rate", ""),),
    "minutes-moderate-activity": (("minutes_moderate_activity", "active_minutes", ""),),
    "body-weight": (("body_weight", "body_weight_kg", ""),),
}
_SECONDS: Final[Mapping[str, float]] = {
    "ms": 0.001, "sec": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0,
}  # fmt: skip
_MOST_LINE: Final = 1 << 20


class OpenMHealth:
    """The importer."""

    name = "open-mhealth"

    def recognises(self, path: Path, head: bytes) -> bool:
        """By the words of a header."""
        return path.is_file() and b'"schema_id"' in head and b'"namespace"' in head

    def read(self, path: Path, options: Options, progress: Progress) -> Iterator[Found]:
        """Yield readings, point by point."""
        for part in parts(path, lambda name: name.endswith((".json", ".ndjson", ".jsonl"))):
            for number, point in _points(part, progress):
                try:
                    if isinstance(point, ImportDataError):
                        raise point
                    yield from _point(point, options)
                except ImportDataError as error:
                    yield bad(part.name, number, error)
                except (KeyError, TypeError, AttributeError):
                    missing = ImportDataError("The data point lacks a field.")
                    yield bad(part.name, number, missing)


def _points(part: Part, progress: Progress) -> Iterator[tuple[int, Any]]:
    first = part.opened.readline(_MOST_LINE)
    one_a_line = first.rstrip().endswith(b"}") and first.lstrip().startswith(b"{")
    done = part.before + len(first)
    if not one_a_line:
        content = first + part.whole()
        found = parse_json(content, part.name)
        yield from enumerate(found if isinstance(found, list) else [found], start=1)
        progress(part.before + len(content), part.total)
        return
    number, line = 1, first
    while line:
        if line.strip():
            try:
                yield number, parse_json(line, "The line")
            except ImportDataError as error:
                yield number, error
        line = part.opened.readline(_MOST_LINE)
        number, done = number + 1, done + len(line)
        progress(min(done, part.total), part.total)


def _point(point: Any, options: Options) -> Iterator[Reading]:
    header, body = point["header"], point["body"]
    schema = header["schema_id"]
    fields = _SCHEMAS.get(schema["name"], ()) if schema["namespace"] == "omh" else ()
    if not fields:
        return
    provenance = header.get("acquisition_provenance") or {}
    origin = f"open-mhealth: {provenance.get('source_name', 'unknown')}"
    beginning, when = _when(body["effective_time_frame"], options)
    record = record_of("open-mhealth", schema["name"], origin, microseconds(beginning))
    version = written_at(header.get("creation_date_time"))
    for name, column, plain_unit in fields:
        if name not in body:
            continue
        value, unit = _value(body[name], plain_unit)
        chosen = _at_rest(body) if column == "heart_rate" else COLUMNS[column]
        source = f"{origin} ({schema['name']})" if column == "sleep_hours" else origin
        yield reading(
            chosen, value, unit, person=options.person or OWNER, when=when, source=source,
            record=record, version=version,
        )  # fmt: skip


def _value(found: Any, plain_unit: str) -> tuple[float, str]:
    if isinstance(found, dict):
        return parse_number(found["value"]), str(found["unit"])
    if not plain_unit:
        raise ImportDataError("A value stands without its unit.")
    return parse_number(found), plain_unit


def _at_rest(body: Mapping[str, Any]) -> Column:
    relation = body.get("temporal_relationship_to_physical_activity")
    return COLUMNS["resting_heart_rate" if relation == "at rest" else "heart_rate"]


def _when(frame: Mapping[str, Any], options: Options) -> tuple[datetime, Moment]:
    """The beginning, and the end as the person saw it; twice the point in time if it is one."""
    if "date_time" in frame:
        point = parse_time(frame["date_time"])
        return point, moment(point, options.time_zone)
    interval = frame["time_interval"]
    if "end_date_time" in interval:
        end = parse_time(interval["end_date_time"])
        start = parse_time(interval.get("start_date_time", interval["end_date_time"]))
        return start, moment(last_moment(end), options.time_zone)
    start = parse_time(interval["start_date_time"])
    length = interval["duration"]
    factor = _SECONDS.get(str(length["unit"]))
    if factor is None:
        raise ImportDataError("The unit of a duration is not known.")
    try:
        end = start + timedelta(seconds=parse_number(length["value"]) * factor)
    except (OverflowError, ValueError):
        raise ImportDataError("A duration is longer than any can be.") from None
    return start, moment(last_moment(end), options.time_zone)
