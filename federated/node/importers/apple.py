"""Apple Health: `export.xml`, by itself, in its folder or in `export.zip`.

Streams with expat: memory does not grow with the file. The export carries an internal DTD with
element declarations, which are passed over; a declaration of an entity, or a reference to something
outside, is refused (XML bombs, reading of local files). Each device of the person is a source of
its own, since a phone and a watch count the same steps.

Format: HealthKit's type identifiers; times as `2024-01-02 23:10:00 -0500`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from xml.parsers import expat

from federated.errors import ImportDataError
from federated.node.columns import COLUMNS, Column
from federated.node.daily import Reading
from federated.node.importers.reading import (
    BLOCK_BYTES,
    BadRow,
    Options,
    Part,
    Progress,
    bad,
    moment,
    parse_number,
    parse_time,
    parts,
    reading,
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
_ASLEEP: Final = "HKCategoryValueSleepAnalysisAsleep"
_IN_BED: Final = "HKCategoryValueSleepAnalysisInBed"
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

    def read(self, path: Path, options: Options, progress: Progress) -> Iterator[Reading | BadRow]:
        """Yield readings record by record."""
        found = False
        for part in parts(path, lambda name: name == "export.xml"):
            found = True
            yield from _read(part, options, progress)
        if not found:
            raise ImportDataError(f"There is no export.xml in {path}.")


def _read(part: Part, options: Options, progress: Progress) -> Iterator[Reading | BadRow]:
    collected: list[Reading | BadRow] = []
    parser = _parser(part.name, options, collected.append)
    done = part.before
    while block := part.opened.read(BLOCK_BYTES):
        _parse(parser, block, part.name, last=False)
        yield from collected
        collected.clear()
        done += len(block)
        progress(min(done, part.total), part.total)
    _parse(parser, b"", part.name, last=True)
    yield from collected


def _parse(parser: expat.XMLParserType, block: bytes, name: str, *, last: bool) -> None:
    try:
        parser.Parse(block, last)
    except expat.ExpatError as error:
        raise ImportDataError(
            f"{name}, line {error.lineno}: this is not well-formed XML; is the export complete?"
        ) from None


def _parser(
    name: str, options: Options, give: Callable[[Reading | BadRow], None]
) -> expat.XMLParserType:
    parser = expat.ParserCreate()
    parser.SetParamEntityParsing(expat.XML_PARAM_ENTITY_PARSING_NEVER)
    parser.buffer_text = True

    def refuse(*_: Any) -> bool:
        raise ImportDataError(
            f"{name}, line {parser.CurrentLineNumber}: the file declares or refers to an XML "
            "entity, which no export of Apple Health does. It is not read any further."
        )

    depth = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _MAX_DEPTH or (depth == 1 and tag != "HealthData"):
            raise ImportDataError(f"{name} is not an export of Apple Health.")
        if tag != "Record":
            return
        try:
            made = _record(attributes, options)
        except (ImportDataError, KeyError) as error:
            reason = error if isinstance(error, ImportDataError) else "an attribute is missing"
            give(bad(name, parser.CurrentLineNumber, ImportDataError(str(reason))))
        else:
            if made is not None:
                give(made)

    def end(_: str) -> None:
        nonlocal depth
        depth -= 1

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.EntityDeclHandler = refuse
    parser.ExternalEntityRefHandler = refuse
    parser.SkippedEntityHandler = refuse
    return parser


def _record(found: Mapping[str, str], options: Options) -> Reading | None:
    kind = found["type"]
    person = options.person or OWNER
    if kind == _SLEEP:
        return _sleep(found, options, person)
    column = _COLUMNS.get(kind)
    if column is None:
        return None
    when = moment(_time(found["startDate"]), options.time_zone)
    unit = found["unit"]
    return reading(
        column,
        parse_number(found["value"]),
        unit,
        person=person,
        when=when,
        source=_source(found),
    )


def _sleep(found: Mapping[str, str], options: Options, person: str) -> Reading | None:
    value = found["value"]
    if value.startswith(_ASLEEP):
        column = COLUMNS["sleep_hours"]
    elif value == _IN_BED:
        column = COLUMNS["time_in_bed_hours"]
    else:
        return None
    start, end = _time(found["startDate"]), _time(found["endDate"])
    return reading(
        column,
        (end - start).total_seconds(),
        "s",
        person=person,
        when=moment(end, options.time_zone),
        source=_source(found),
    )


def _source(found: Mapping[str, str]) -> str:
    return f"apple-health: {found['sourceName']}"


def _time(text: str) -> Any:
    """`2024-01-02 23:10:00 -0500`, which is ISO 8601 but for the second space."""
    return parse_time(text[:_OFFSET_AT] + text[_OFFSET_AT + 1 :])
