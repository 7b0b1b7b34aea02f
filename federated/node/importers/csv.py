"""Tables: CSV in any dialect, read by a mapping file that says what each column of the table is.

Lives here: reading rows; `importers.mapping` reads the TOML file. Rows stream; several of one day
are folded as the column says (momentary answers become the day's mean). Nothing is guessed: units,
scales, codes and missing values stand in the mapping.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Final

from federated.errors import ImportDataError
from federated.node.columns import convert
from federated.node.daily import Reading
from federated.node.importers.mapping import DayRule, Rule, TableMapping, load_mapping
from federated.node.importers.reading import (
    BadRow,
    Found,
    Moment,
    Options,
    Progress,
    bad,
    day_number,
    moment,
    parse_number,
    parse_time,
    parts,
)
from federated.node.store import OWNER

#: A field, and a line, longer than this is not data. In characters.
_MOST_FIELD: Final = 65_536
_MOST_LINE: Final = 1 << 20
_TELL_EVERY: Final = 1000


class MappedCSV:
    """The importer."""

    name = "csv"

    def recognises(self, path: Path, head: bytes) -> bool:
        """Never by itself: a table says nothing about its units."""
        del path, head
        return False

    def read(self, path: Path, options: Options, progress: Progress) -> Iterator[Found]:
        """Yield readings, row by row."""
        if options.mapping is None:
            raise ImportDataError(
                "A table is read by a mapping: name its TOML file with --mapping."
            )
        mapping = load_mapping(options.mapping)
        csv.field_size_limit(_MOST_FIELD)
        for part in parts(path, lambda name: name.endswith((".csv", ".tsv", ".txt"))):
            yield from _table(part.opened, part.name, mapping, options, progress, part.total)


def _table(
    opened: IO[bytes],
    name: str,
    mapping: TableMapping,
    options: Options,
    progress: Progress,
    total: int,
) -> Iterator[Found]:
    text = TextIOWrapper(opened, encoding=mapping.encoding, newline="")
    rows = csv.reader(_lines(text, name), delimiter=mapping.delimiter, strict=True)
    try:
        header = next(rows, [])
        _verify_header(header, name, mapping)
        places = [(key, place) for place, key in enumerate(header) if key in mapping.needed]
        for row in rows:
            if len(row) != len(header):
                reason = f"The row has {len(row)} fields, the header {len(header)}."
                yield BadRow(file=name, line=rows.line_num, reason=reason)
                continue
            wanted = {key: row[place] for key, place in places}
            yield from _row(wanted, name, rows.line_num, mapping, options)
            if not rows.line_num % _TELL_EVERY:
                progress(min(opened.tell(), total), total)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ImportDataError(
            f"{name}, after line {rows.line_num}: this is not a table of {mapping.encoding} text "
            f"({type(error).__name__})."
        ) from None
    finally:
        text.detach()
    progress(total, total)


def _lines(text: TextIOWrapper, name: str) -> Iterator[str]:
    """The lines of a file. One without end would else be read whole before it is looked at."""
    while line := text.readline(_MOST_LINE + 1):
        if len(line) > _MOST_LINE:
            raise ImportDataError(f"{name} has a line that is longer than {_MOST_LINE} characters.")
        yield line


def _verify_header(header: list[str], name: str, mapping: TableMapping) -> None:
    missing = sorted(mapping.needed - set(header))
    if missing:
        raise ImportDataError(
            f"{name} has no column {missing[0]!r}, which the mapping reads: is it the right file, "
            f"and {mapping.delimiter!r} what stands between its fields?"
        )
    if len(set(header)) != len(header):
        raise ImportDataError(f"{name} has two columns of one name.")


def _row(
    row: Mapping[str, str], name: str, line: int, mapping: TableMapping, options: Options
) -> Iterator[Found]:
    try:
        if not all(row[key] in allowed for key, allowed in mapping.only.items()):
            return
        when = _when(row, mapping.day, options)
        person = options.person or OWNER
        if mapping.person is not None:
            person = mapping.person_prefix + _named(row[mapping.person].strip(), mapping)
    except ImportDataError as error:
        yield bad(name, line, error)
        return
    for rule in mapping.rules:
        try:
            value = _value(row, rule, mapping)
        except ImportDataError as error:
            yield bad(name, line, error)
            continue
        if value is not None:
            yield Reading(
                person=person, column=rule.column, day=when.day, at=when.at, value=value,
                source=mapping.source, found_unit=rule.unit,
            )  # fmt: skip


def _named(text: str, mapping: TableMapping) -> str:
    """Whose row it is. Rows that do not say it would together become one person."""
    if text in mapping.missing:
        raise ImportDataError("The row names no person.")
    return _whole_number(text)


def _whole_number(text: str) -> str:
    """Some programs write the number of a person as 93703.0."""
    return text.removesuffix(".0") if text.removesuffix(".0").isdecimal() else text


def _when(row: Mapping[str, str], rule: DayRule, options: Options) -> Moment:
    if rule.constant is not None:
        return _at_midnight(rule.constant)
    text = row[rule.column].strip()
    if rule.number_from is not None:
        number = parse_number(text)
        if number != round(number) or abs(number) > 10**6:
            raise ImportDataError("The number of the day is not one.")
        try:
            return _at_midnight(rule.number_from + timedelta(days=int(number) - 1))
        except OverflowError:
            raise ImportDataError("The number of the day is not one.") from None
    found = _parse_day(text, rule.format)
    if isinstance(found, datetime):
        return moment(found, options.time_zone)
    return _at_midnight(found)


def _parse_day(text: str, form: str) -> date | datetime:
    if not form:
        found = parse_time(text)
        return found if len(text) > len("2024-01-31") else found.date()
    try:
        found = datetime.strptime(text, form)  # noqa: DTZ007 - the person's own clock
    except ValueError:
        raise ImportDataError("The day is not as the mapping says.") from None
    return found


def _at_midnight(day: date) -> Moment:
    number = day_number(day)
    return Moment(number, int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()))


def _value(row: Mapping[str, str], rule: Rule, mapping: TableMapping) -> float | None:
    taken = _numbers(row, rule.take, rule, mapping)
    if not taken:
        return None
    value = math.fsum(taken) / (len(taken) if rule.combine == "mean" else 1)
    if rule.minus:
        less = _numbers(row, rule.minus, rule, mapping)
        if not less:
            return None
        value -= math.fsum(less) / (len(less) if rule.combine == "mean" else 1)
    if rule.scale is not None:
        (low, high), (to_low, to_high) = rule.scale
        value = to_low + (value - low) * (to_high - to_low) / (high - low)
    return convert(rule.column, value, rule.unit)


def _numbers(
    row: Mapping[str, str], names: tuple[str, ...], rule: Rule, mapping: TableMapping
) -> list[float]:
    """The numbers of these columns, in the rule's unit; none if one is missing."""
    found = []
    for name in names:
        text = row[name].strip()
        if text in mapping.missing or text in rule.missing:
            return []
        if rule.codes:
            if text not in rule.codes:
                raise ImportDataError(f"{name} holds something that the mapping has no code for.")
            value = rule.codes[text]
        else:
            value = parse_number(text)
        if abs(value) < rule.zero_below:
            value = 0.0
        low, high = rule.valid
        if not low <= value <= high:
            raise ImportDataError(f"{name} must lie from {low:g} to {high:g}.")
        found.append(value * rule.factors.get(name, 1.0))
    return found
