"""What FHIR resources say: values by column, from Observations and QuestionnaireResponses.

What fills a column is known by its LOINC code (`node.columns`); all else is passed over. PHQ-9 and
GAD-7 come as panels with items, or as totals; where all items are there and no total, the total is
their sum, and a total that is not their sum is a bad row. A value that is only a bound (with a
comparator) is a bad row. Whose it is, when it was and which version counts stand in
`importers.fhir`. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import msgspec

from federated.errors import ImportDataError
from federated.node.columns import BY_LOINC, Column

#: Column → value and unit.
type Values = dict[str, tuple[float, str]]

_LOINC: Final = "http://loinc.org"
#: LOINC answer list LL358-3, which PHQ and GAD share.
_ANSWERS: Final[Mapping[str, float]] = {
    "LA6568-5": 0, "LA6569-3": 1, "LA6570-1": 2, "LA6571-9": 3,
}  # fmt: skip
_CODE = re.compile(r"(?:^|/)(\d{3,6}-\d)$").search
_ORDINAL: Final = "http://hl7.org/fhir/StructureDefinition/ordinalValue"
_MAX_DEPTH: Final = 16


class _Coding(msgspec.Struct):
    system: str = ""
    code: str = ""
    extension: list[dict[str, Any]] = []


class _Concept(msgspec.Struct):
    coding: list[_Coding] = []


class _Quantity(msgspec.Struct):
    value: float | None = None
    comparator: str = ""
    unit: str = ""
    code: str = ""


class _Period(msgspec.Struct):
    start: str = ""
    end: str = ""


class Reference(msgspec.Struct):
    """Whom a resource is about."""

    reference: str = ""


class Meta(msgspec.Struct, rename="camel"):
    """Which version of a resource this is."""

    version_id: str = ""
    last_updated: str = ""


class _Component(msgspec.Struct, rename="camel"):
    code: _Concept = msgspec.field(default_factory=_Concept)
    value_quantity: _Quantity | None = None
    value_integer: int | None = None
    value_codeable_concept: _Concept | None = None


class Observation(_Component):
    """What is read of one."""

    status: str = ""
    id: str = ""
    meta: Meta = msgspec.field(default_factory=Meta)
    subject: Reference = msgspec.field(default_factory=Reference)
    effective_date_time: str = ""
    effective_instant: str = ""
    effective_period: _Period | None = None
    component: list[_Component] = []


class _Answer(msgspec.Struct, rename="camel"):
    value_integer: int | None = None
    value_decimal: float | None = None
    value_coding: _Coding | None = None


class _Item(msgspec.Struct, rename="camel"):
    link_id: str = ""
    answer: list[_Answer] = []
    item: list[_Item] = []


class Response(msgspec.Struct):
    """What is read of a QuestionnaireResponse."""

    status: str = ""
    id: str = ""
    meta: Meta = msgspec.field(default_factory=Meta)
    subject: Reference = msgspec.field(default_factory=Reference)
    authored: str = ""
    item: list[_Item] = []


def is_known(found: Observation | Response) -> bool:
    """Whether a resource may say something of a column."""
    if isinstance(found, Response):
        return True
    return any(_column(part.code) is not None for part in (found, *found.component))


def values_of_observation(found: Observation) -> Values:
    """What an Observation and its components say. Raises `ImportDataError`."""
    values: Values = {}
    for part in (found, *found.component):
        column = _column(part.code)
        value = None if column is None else _value(part, column)
        if column is not None and value is not None:
            values[column.name] = value
    return _completed(values)


def values_of_items(found: Response) -> Values:
    """What a QuestionnaireResponse's items say. Raises `ImportDataError`."""
    values: Values = {}
    for item in _flat(found.item, 0):
        match = _CODE(item.link_id)
        column = BY_LOINC.get(match[1]) if match else None
        value = _answer(item.answer[0]) if item.answer else None
        if column is not None and value is not None:
            values[column.name] = (value, column.unit)
    return _completed(values)


def _column(concept: _Concept) -> Column | None:
    for coding in concept.coding:
        if coding.system == _LOINC and coding.code in BY_LOINC:
            return BY_LOINC[coding.code]
    return None


def _value(part: _Component, column: Column) -> tuple[float, str] | None:
    if part.value_quantity is not None and part.value_quantity.value is not None:
        quantity = part.value_quantity
        if quantity.comparator:
            raise ImportDataError(
                f"{column.name} is only a bound: a value with a comparator is no exact value."
            )
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


def _completed(values: Values) -> Values:
    for prefix, count in (("phq9", 9), ("gad7", 7)):
        _add_total(values, prefix, count)
    return values


def _add_total(values: Values, prefix: str, count: int) -> None:
    names = [f"{prefix}_item_{number}" for number in range(1, count + 1)]
    if not all(name in values for name in names):
        return
    total = sum(values[name][0] for name in names)
    said = values.setdefault(f"{prefix}_total", (total, "{score}"))
    if said[0] != total:
        raise ImportDataError(f"The total of {prefix} is not the sum of its items.")
