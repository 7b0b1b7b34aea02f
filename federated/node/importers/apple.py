"""Apple Health: `export.xml`, by itself, in its folder or in `export.zip`.

Streams with expat: memory does not grow with the file. The export carries an internal DTD with
element declarations, which are passed over; a declaration of an entity, or a reference to something
outside, is refused (XML bombs, reading of local files). Each device of the person is a source of
its own, since a phone and a watch count the same steps. A record that comes twice counts once, and
overlapping sleep of one source is a union (`importers.nights`). An export holds everything, so of
two the one that was made later counts.

What kind of device measured on a day is what the export says of it (`model:Watch`), never a guess
from a name: other makers' devices, and what was entered by hand, say nothing of it.

Format: HealthKit's type identifiers; times as `2024-01-02 23:10:00 -0500`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from xml.parsers import expat

from federated.errors import ImportDataError
from federated.node.columns import COLUMNS, Column
from federated.node.daily import Reading
from federated.node.importers.nights import Kind, Nights
from federated.node.importers.reading import (
    BLOCK_BYTES,
    Found,
    Moment,
    Options,
    Part,
    Progress,
    Seen,
    bad,
    moment,
    parse_number,
    parse_time,
    parts,
    reading,
    written_at,
)
from federated.node.store import OWNER

_QUANTITY: Final = "HKQuantityTypeIdentifier"
_COLUMNS: Final[Mapping[str, Column]] = {
    f"{_QUANTITY}StepCount": COLUMNS["steps"],
    f"{_QUANTITY}DistanceWalkingRunning": COLUMNS["distance_km"],
    f"{_QUANTITY}AppleExerciseTime": COLUMNS["active_minutes"],
    f"{_QUANTITY}TimeInDaylight": COLUMNS["outside_hours"],
    f"{_QUANTITY}HeartRate": COLUMNS["heart_rate"],
    f"{_QUANTITY}RestingHeartRate": COLUMNS["resting_heart_rate"],
    f"{_QUANTITY}HeartRateVariabilitySDNN": COLUMNS["heart_rate_variability"],
    f"{_QUANTITY}BodyMass": COLUMNS["body_weight_kg"],
}
_SLEEP: Final = "HKCategoryTypeIdentifierSleepAnalysis"
_STATES: Final[Mapping[str, Kind]] = {
    "HKCategoryValueSleepAnalysisAsleep": "asleep",
    "HKCategoryValueSleepAnalysisInBed": "in_bed",
    "HKCategoryValueSleepAnalysisAwake": "awake",
}
#: Of an HKDevice's description: its model → `device_class`.
_MODEL: Final = re.compile(r"[,<] ?model:([^,>]+)[,>]").search
_CLASSES: Final[Mapping[str, int]] = {"iPhone": 0, "Watch": 1}
_MAX_DEPTH: Final = 64
_OFFSET_AT: Final = 19


class AppleHealth:
    """The importer."""

    name = "apple-health"

    def recognises(self, path: Path, head: bytes) -> bool:
        """By the root element, or by the names in an archive or folder."""
        if path.is_dir():
            return (path / "export.xml").is_file()
        return b"<HealthData" in head or (path.suffix == ".zip" and b"apple_health_export/" in head)

    def read(self, path: Path, options: Options, progress: Progress) -> Iterator[Found]:
        """Yield readings record by record."""
        found = False
        for part in parts(path, lambda name: name == "export.xml"):
            found = True
            yield from _read(part, options, progress)
        if not found:
            raise ImportDataError(f"There is no export.xml in {path}.")


def _read(part: Part, options: Options, progress: Progress) -> Iterator[Found]:
    reader = _Reader(part.name, options)
    done = part.before
    while block := part.opened.read(BLOCK_BYTES):
        _parse(reader.parser, block, part.name, last=False)
        yield from reader.taken()
        done += len(block)
        progress(min(done, part.total), part.total)
    _parse(reader.parser, b"", part.name, last=True)
    yield from reader.taken()
    yield from reader.nights()
    yield from reader.devices()


def _parse(parser: expat.XMLParserType, block: bytes, name: str, *, last: bool) -> None:
    try:
        parser.Parse(block, last)
    except expat.ExpatError as error:
        raise ImportDataError(
            f"{name}, line {error.lineno}: this is not well-formed XML; is the export complete?"
        ) from None


class _Reader:
    """What the parser calls: keeps what was found until it is taken."""

    def __init__(self, name: str, options: Options) -> None:
        self._name = name
        self._options = options
        self._person = options.person or OWNER
        self._collected: list[Found] = []
        self._nights = Nights()
        #: Day → a moment of it, and the class of what measured on it.
        self._devices: dict[int, tuple[Moment, int]] = {}
        self._seen = Seen()
        self._version = 0
        self._depth = 0
        self.parser = parser = expat.ParserCreate()
        parser.SetParamEntityParsing(expat.XML_PARAM_ENTITY_PARSING_NEVER)
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.EntityDeclHandler = self._refuse
        parser.ExternalEntityRefHandler = self._refuse
        parser.SkippedEntityHandler = self._refuse

    def taken(self) -> list[Found]:
        """What was found since."""
        found, self._collected = self._collected, []
        return found

    def nights(self) -> Iterator[Found]:
        """What the whole file says of nights."""
        for night in self._nights.nights():
            try:
                yield reading(
                    COLUMNS[night.column],
                    night.seconds,
                    "s",
                    person=self._person,
                    when=night.when,
                    source=night.source,
                    version=self._version,
                )
            except ImportDataError as error:
                yield bad(self._name, night.line, error)

    def devices(self) -> Iterator[Found]:
        """What the whole file says of devices, day by day."""
        for when, device in self._devices.values():
            yield reading(
                COLUMNS["device_class"], device, "{code}", person=self._person, when=when,
                source="apple-health", version=self._version,
            )  # fmt: skip

    def _refuse(self, *_: Any) -> bool:
        raise ImportDataError(
            f"{self._name}, line {self.parser.CurrentLineNumber}: the file declares or refers to "
            "an XML entity, which no export of Apple Health does. It is not read any further."
        )

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth > _MAX_DEPTH or (self._depth == 1 and tag != "HealthData"):
            raise ImportDataError(f"{self._name} is not an export of Apple Health.")
        if tag == "ExportDate":
            self._version = written_at(_spaced(attributes.get("value", "")))
        if tag != "Record":
            return
        try:
            self._record(attributes)
        except (ImportDataError, KeyError) as error:
            reason = error if isinstance(error, ImportDataError) else "an attribute is missing"
            line = self.parser.CurrentLineNumber
            self._collected.append(bad(self._name, line, ImportDataError(str(reason))))

    def _end(self, _: str) -> None:
        self._depth -= 1

    def _record(self, found: Mapping[str, str]) -> None:
        kind = found["type"]
        if kind == _SLEEP:
            self._sleep(found)
            return
        column = _COLUMNS.get(kind)
        if column is None:
            return
        made = self._quantity(column, found)
        what = (found.get("endDate"), found["unit"], found["value"])
        if self._seen.first(kind, made.source, found["startDate"], *what):
            self._collected.append(made)
            self._measured(found, Moment(made.day, made.at))

    def _quantity(self, column: Column, found: Mapping[str, str]) -> Reading:
        return reading(
            column,
            parse_number(found["value"]),
            found["unit"],
            person=self._person,
            when=moment(_time(found["startDate"]), self._options.time_zone),
            source=_source(found),
            version=self._version,
        )

    def _measured(self, found: Mapping[str, str], when: Moment) -> None:
        model = _MODEL(found.get("device", ""))
        device = None if model is None else _CLASSES.get(model[1])
        if device is None:
            return
        known = self._devices.get(when.day)
        if known is None or device > known[1]:
            self._devices[when.day] = (when, device)

    def _sleep(self, found: Mapping[str, str]) -> None:
        # Stages of sleep are AsleepCore, AsleepREM and so on.
        state = next((s for name, s in _STATES.items() if found["value"].startswith(name)), None)
        if state is not None:
            self._measured(found, moment(_time(found["endDate"]), self._options.time_zone))
            self._nights.add(
                _source(found),
                state,
                start=_time(found["startDate"]),
                end=_time(found["endDate"]),
                zone=self._options.time_zone,
                line=self.parser.CurrentLineNumber,
            )


def _source(found: Mapping[str, str]) -> str:
    return f"apple-health: {found['sourceName']}"


def _time(text: str) -> datetime:
    return parse_time(_spaced(text))


def _spaced(text: str) -> str:
    """`2024-01-02 23:10:00 -0500`, which is ISO 8601 but for the second space."""
    return text[:_OFFSET_AT] + text[_OFFSET_AT + 1 :]
