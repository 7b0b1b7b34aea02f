"""FHIR R4: Observations and QuestionnaireResponses, as a Bundle, single resources, or NDJSON.

What fills a column is known by its LOINC code (`node.columns`); all else is passed over. PHQ-9 and
GAD-7 come as panels with items, or as totals; where all items are there and no total, the total is
their sum, and a total that is not their sum is a bad row. Resources that were entered in error, are
preliminary, or say why there is no value, are passed over.

People are the subjects of the resources, by their references; a Bundle's `urn:uuid:` is led back to
the Patient that it stands for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from federated.errors import ImportDataError
from federated.node.columns import BY_LOINC, COLUMNS, Column
from federated.node.daily import Reading
from federated.node.importers.reading import (
    BadRow,
    Moment,
    Options,
    Part,
    Progress,
    bad,
    day_number,
    moment,
    parse_json,
    parse_time,
    parts,
    reading,
)
from federated.node.store import OWNER

_LOINC: Final = "http://loinc.org"
_FINAL: Final = frozenset({"final", "amended", "corrected"})
_COMPLETE: Final = frozenset({"completed", "amended"})
#: LOINC answer list LL358-3, which PHQ and GAD share.
_ANSWERS: Final[Mapping[str, float]] = {
    "LA6568-5": 0, "LA6569-3": 1, "LA6570-1": 2, "LA6571-9": 3,
}  # fmt: skip
_CODE = re.compile(r"(?:^|/)(\d{3,6}-\d)$").search
_ORDINAL: Final = "http://hl7.org/fhir/StructureDefinition/ordinalValue"
_MOST_LINE: Final = 16 << 20
_MAX_DEPTH: Final = 16
_DATE_LENGTH: Final = 10


class _Coding(msgspec.Struct):
    system: str = ""
    code: str = ""
    extension: list[dict[str, Any]] = []


class _Concept(msgspec.Struct):
    coding: list[_Coding] = []


class _Quantity(msgspec.Struct):
    value: float | None = None
    unit: str = ""
    code: str = ""


class _Period(msgspec.Struct):
    start: str = ""
    end: str = ""


class _Reference(msgspec.Struct):
    reference: str = ""


class _Component(msgspec.Struct, rename="camel"):
    code: _Concept = msgspec.field(default_factory=_Concept)
    value_quantity: _Quantity | None = None
    value_integer: int | None = None
    value_codeable_concept: _Concept | None = None


class _Observation(_Component):
    status: str = ""
    id: str = ""
    subject: _Reference = msgspec.field(default_factory=_Reference)
    effective_date_time: str = ""
    effective_instant: str = ""
    effective_period: _Period | None = None
    component: list[_Component] = []
    performer: list[_Reference] = []


class _Answer(msgspec.Struct, rename="camel"):
    value_integer: int | None = None
    value_decimal: float | None = None
    value_coding: _Coding | None = None


class _Item(msgspec.Struct, rename="camel"):
    link_id: str = ""
    answer: list[_Answer] = []
    item: list[_Item] = []


class _Response(msgspec.Struct):
    status: str = ""
    id: str = ""
    subject: _Reference = msgspec.field(default_factory=_Reference)
    authored: str = ""
    item: list[_Item] = []


class _Head(msgspec.Struct, rename="camel"):
    resource_type: str = ""
    id: str = ""


class _Entry(msgspec.Struct, rename="camel"):
    full_url: str = ""
    resource: msgspec.Raw = msgspec.Raw(b"{}")


class _Bundle(msgspec.Struct):
    entry: list[_Entry] = []


class FHIR:
    """The importer."""

    name = "fhir"

    def recognises(self, path: Path, head: bytes) -> bool:
        """By `resourceType` near the beginning, or NDJSON files in a folder."""
        if path.is_dir():
            return any(path.glob("*.ndjson"))
        return b'"resourceType"' in head

    def read(self, path: Path, options: Options, progress: Progress) -> Iterator[Reading | BadRow]:
        """Yield readings, resource by resource."""
        reader = _Reader(options)
        for part in parts(path, lambda name: name.endswith((".json", ".ndjson"))):
            for number, resource in _resources(part, reader, progress):
                try:
                    if isinstance(resource, ImportDataError):
                        raise resource
                    yield from reader.resource(resource)
                except ImportDataError as error:
                    yield bad(part.name, number, error)


def _resources(
    part: Part, reader: _Reader, progress: Progress
) -> Iterator[tuple[int, bytes | ImportDataError]]:
    first = part.opened.readline(_MOST_LINE)
    try:
        head = msgspec.json.decode(first, type=_Head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        head = None
    if head is None or head.resource_type == "Bundle":
        content = first + part.whole()
        yield from _bundle(content, part.name, reader)
        progress(part.before + len(content), part.total)
        return
    number, line, done = 1, first, part.before + len(first)
    while line:
        if line.strip():
            yield number, line
        line = part.opened.readline(_MOST_LINE)
        number, done = number + 1, done + len(line)
        progress(min(done, part.total), part.total)


def _bundle(content: bytes, name: str, reader: _Reader) -> Iterator[tuple[int, bytes]]:
    head = parse_json(content, name, _Head)
    if head.resource_type != "Bundle":
        yield 1, content
        return
    entries = parse_json(content, name, _Bundle).entry
    for entry in entries:
        found = parse_json(bytes(entry.resource), name, _Head)
        if found.resource_type == "Patient" and entry.full_url and found.id:
            reader.patients[entry.full_url] = f"Patient/{found.id}"
    for number, entry in enumerate(entries, start=1):
        yield number, bytes(entry.resource)


class _Reader:
    """Reads resources; knows whom a Bundle's references mean, and what was read already."""

    def __init__(self, options: Options) -> None:
        self.patients: dict[str, str] = {}
        self._options = options
        self._only = ""
        self._seen: set[tuple[str, str]] = set()

    def resource(self, raw: bytes) -> Iterable[Reading]:
        """The readings of one resource. Raises `ImportDataError`."""
        kind = parse_json(raw, "The resource", _Head).resource_type
        if kind == "Observation":
            found = parse_json(raw, "The Observation", _Observation)
            if found.status in _FINAL and self._first("O", found.id):
                return self._observation(found)
        elif kind == "QuestionnaireResponse":
            response = parse_json(raw, "The QuestionnaireResponse", _Response)
            if response.status in _COMPLETE and self._first("Q", response.id):
                return self._response(response)
        elif not kind:
            raise ImportDataError("This is not a FHIR resource: it has no resourceType.")
        return ()

    def _first(self, kind: str, identity: str) -> bool:
        if not identity:
            return True
        new = (kind, identity) not in self._seen
        self._seen.add((kind, identity))
        return new

    def _person(self, subject: _Reference) -> str:
        name = self.patients.get(subject.reference, subject.reference)
        if self._options.person is None:
            return name or OWNER
        # Everything is said to be one person's: then it must be.
        self._only = self._only or name
        if name != self._only:
            raise ImportDataError("The file speaks of several people, but one was named for it.")
        return self._options.person

    def _observation(self, found: _Observation) -> list[Reading]:
        values = _answers([found, *found.component])
        if not values:
            return []
        when = self._when(found)
        person = self._person(found.subject)
        source = "fhir"
        return _readings(values, person, when, source)

    def _when(self, found: _Observation) -> Moment:
        period = found.effective_period
        text = found.effective_date_time or found.effective_instant
        if period is not None:
            text = period.end or period.start
        return self._moment(text)

    def _moment(self, text: str) -> Moment:
        if len(text) < _DATE_LENGTH:
            raise ImportDataError("The time names no day, so it belongs to none.")
        if len(text) == _DATE_LENGTH:
            day = day_number(parse_time(text).date())
            return Moment(day, day * 86_400)
        found: datetime = parse_time(text)
        return moment(found, self._options.time_zone)

    def _response(self, found: _Response) -> list[Reading]:
        values: dict[str, tuple[float, str]] = {}
        for item in _flat(found.item, 0):
            match = _CODE(item.link_id)
            column = BY_LOINC.get(match[1]) if match else None
            value = _answer(item.answer[0]) if item.answer else None
            if column is not None and value is not None:
                values[column.name] = (value, column.unit)
        if not values:
            return []
        return _readings(values, self._person(found.subject), self._moment(found.authored), "fhir")


def _answers(parts_: Iterable[_Component]) -> dict[str, tuple[float, str]]:
    """Column → value and unit."""
    values: dict[str, tuple[float, str]] = {}
    for part in parts_:
        column = _column(part.code)
        value = None if column is None else _value(part, column)
        if column is not None and value is not None:
            values[column.name] = value
    return values


def _column(concept: _Concept) -> Column | None:
    for coding in concept.coding:
        if coding.system == _LOINC and coding.code in BY_LOINC:
            return BY_LOINC[coding.code]
    return None


def _value(part: _Component, column: Column) -> tuple[float, str] | None:
    if part.value_quantity is not None and part.value_quantity.value is not None:
        quantity = part.value_quantity
        return quantity.value, quantity.code or quantity.unit or "1"  # type: ignore[return-value]
    if part.value_integer is not None:
        return float(part.value_integer), column.unit
    if part.value_codeable_concept is not None:
        for coding in part.value_codeable_concept.coding:
            value = _coded(coding)
            if value is not None:
                return value, column.unit
    return None


def _answer(answer: _Answer) -> float | None:
    if answer.value_integer is not None:
        return float(answer.value_integer)
    if answer.value_decimal is not None:
        return answer.value_decimal
    return None if answer.value_coding is None else _coded(answer.value_coding)


def _coded(coding: _Coding) -> float | None:
    for extension in coding.extension:
        value = extension.get("valueDecimal")
        if extension.get("url") == _ORDINAL and isinstance(value, int | float):
            return float(value)
    return _ANSWERS.get(coding.code)


def _flat(items: Iterable[_Item], depth: int) -> Iterator[_Item]:
    if depth > _MAX_DEPTH:
        raise ImportDataError("The items are nested deeper than those of any questionnaire.")
    for item in items:
        yield item
        yield from _flat(item.item, depth + 1)


def _readings(
    values: dict[str, tuple[float, str]], person: str, when: Moment, source: str
) -> list[Reading]:
    for prefix, count in (("phq9", 9), ("gad7", 7)):
        _complete(values, prefix, count)
    return [
        reading(COLUMNS[name], value, unit, person=person, when=when, source=source)
        for name, (value, unit) in values.items()
    ]


def _complete(values: dict[str, tuple[float, str]], prefix: str, count: int) -> None:
    names = [f"{prefix}_item_{number}" for number in range(1, count + 1)]
    if not all(name in values for name in names):
        return
    total = sum(values[name][0] for name in names)
    said = values.setdefault(f"{prefix}_total", (total, "{score}"))
    if said[0] != total:
        raise ImportDataError(f"The total of {prefix} is not the sum of its items.")
