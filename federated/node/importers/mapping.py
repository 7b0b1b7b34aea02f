r"""Mapping files: what the columns of a table mean, in TOML. Strict: mistakes name the right word.

```toml
source = "PACO"            # of the readings, as receipts and holdings name it
delimiter = "\t"           # what stands between fields; default a comma
missing = ["NA", ""]       # texts that mean: nothing known; the empty text always does
person = "id"              # column that names the person; without it the file is one person's
person_prefix = "paco/"    # put before the name
only = { arm = ["A"] }     # only rows in which these columns hold one of these texts

[day]                      # one of:
column = "date"            # - a column with a day or time: ISO 8601, or as `format` (strptime)
format = "%d.%m.%Y"
# number_from = "2020-01-01"   with `column`: a number of days, this being day 1
# constant = "2018-01-01"      every row is of this day

[columns.mood]             # a column of the daily table, from columns of the file:
take = ["happy", "calm"]   # these,
combine = "mean"           # their mean or sum (one column: as it is),
minus = ["sad", "afraid"]  # less the mean (or sum) of these
unit = "{score}"           # what the result is in; converted to the column's own
# factors = { minutes = 0.016666666666666666 }   a column times this, before combining
# codes = { Male = 1, Female = 0 }               texts that stand for numbers
# scale = { from = [1, 4], to = [1, 7] }         one scale onto another, linearly
# valid = [1, 7]                                 what a field may hold; else the row is bad
# missing = ["7777", "9999"]                     more texts that mean: nothing known
# zero_below = 1e-50                             smaller ones are 0
```

Mappings that come with Havengate are named without a path: `paco`, `flueckiger`, `scharbert`,
`nhanes`.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from federated.errors import ImportDataError
from federated.node.columns import Column, column, known_units
from federated.node.daily import MAX_SOURCE

_SHIPPED: Final = Path(__file__).parent / "mappings"
_MOST_BYTES: Final = 65_536
_ENCODINGS: Final = frozenset({"utf-8", "utf-8-sig", "latin-1", "cp1252", "utf-16"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DayRule:
    """Where a row's day comes from."""

    column: str = ""
    format: str = ""
    number_from: date | None = None
    constant: date | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How one column of the daily table comes from columns of the file."""

    column: Column
    take: tuple[str, ...]
    minus: tuple[str, ...]
    combine: Literal["mean", "sum"]
    unit: str
    factors: Mapping[str, float]
    codes: Mapping[str, float]
    scale: tuple[tuple[float, float], tuple[float, float]] | None
    valid: tuple[float, float]
    missing: frozenset[str]
    zero_below: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TableMapping:
    """A whole mapping. `needed` are the columns that a file must have."""

    source: str
    delimiter: str
    encoding: str
    missing: frozenset[str]
    person: str | None
    person_prefix: str
    only: Mapping[str, frozenset[str]]
    day: DayRule
    rules: tuple[Rule, ...]
    needed: frozenset[str] = field(repr=False)


class _Scale(msgspec.Struct, forbid_unknown_fields=True, rename={"from_": "from"}):
    from_: tuple[float, float]
    to: tuple[float, float]


class _Day(msgspec.Struct, forbid_unknown_fields=True):
    column: str = ""
    format: str = ""
    number_from: str = ""
    constant: str = ""


class _Column(msgspec.Struct, forbid_unknown_fields=True):
    take: list[str]
    unit: str
    combine: Literal["mean", "sum"] = "sum"
    minus: list[str] = []
    factors: dict[str, float] = {}
    codes: dict[str, float] = {}
    scale: _Scale | None = None
    valid: tuple[float, float] = (-math.inf, math.inf)
    missing: list[str] = []
    zero_below: float = 0.0


class _File(msgspec.Struct, forbid_unknown_fields=True):
    source: str
    day: _Day
    columns: dict[str, _Column]
    delimiter: str = ","
    encoding: str = "utf-8-sig"
    missing: list[str] = []
    person: str | None = None
    person_prefix: str = ""
    only: dict[str, list[str]] = {}


def load_mapping(path: Path) -> TableMapping:
    """Read a mapping file, or one that comes along, by its name. Raises `ImportDataError`."""
    chosen = path
    if not path.suffix and path.name == str(path):
        chosen = _SHIPPED / f"{path}.toml"
        if not chosen.is_file():
            known = ", ".join(sorted(file.stem for file in _SHIPPED.glob("*.toml")))
            raise ImportDataError(f"No mapping {path} comes along; there are {known}.")
    try:
        raw = chosen.read_bytes()
    except OSError as error:
        raise ImportDataError(f"{path} cannot be read: {error.strerror}.") from error
    return parse_mapping(raw, str(path))


def parse_mapping(raw: bytes, name: str) -> TableMapping:
    """Read the text of a mapping. Raises `ImportDataError`."""
    if len(raw) > _MOST_BYTES:
        raise ImportDataError(f"{name} is larger than any mapping.")
    try:
        found = msgspec.convert(_refuse_unknown(tomllib.loads(raw.decode()), name), _File)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImportDataError(f"{name} is not TOML: {error}.") from error
    except msgspec.ValidationError as error:
        raise ImportDataError(f"{name} is not a mapping: {error}.") from error
    return _mapping(found, name)


def _refuse_unknown(table: dict[str, Any], name: str) -> dict[str, Any]:
    _check_keys(table, _File, name)
    if isinstance(table.get("day"), dict):
        _check_keys(table["day"], _Day, f"{name}: day")
    columns = table.get("columns", {})
    for key, one in columns.items() if isinstance(columns, dict) else ():
        if isinstance(one, dict):
            _check_keys(one, _Column, f"{name}: columns.{key}")
    return table


def _check_keys(table: Mapping[str, Any], kind: type[msgspec.Struct], where: str) -> None:
    for key in table:
        if key not in kind.__struct_fields__:
            near = difflib.get_close_matches(key, kind.__struct_fields__, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ImportDataError(f"{where}: there is no {key!r}{hint}")


def _mapping(found: _File, name: str) -> TableMapping:
    rules = tuple(_rule(key, one, name) for key, one in found.columns.items())
    if not rules:
        raise ImportDataError(f"{name} fills no column.")
    if len(found.delimiter) != 1 or found.encoding.lower() not in _ENCODINGS:
        raise ImportDataError(
            f"{name}: `delimiter` is one character, `encoding` one of {', '.join(_ENCODINGS)}."
        )
    if not found.source.isprintable() or not 0 < len(found.source) <= MAX_SOURCE:
        raise ImportDataError(f"{name}: `source` is a line of text.")
    day = _day(found.day, name)
    needed = {one for rule in rules for one in (*rule.take, *rule.minus)} | found.only.keys()
    needed |= {one for one in (found.person, day.column) if one}
    return TableMapping(
        source=found.source,
        delimiter=found.delimiter,
        encoding=found.encoding.lower(),
        missing=frozenset({"", *found.missing}),
        person=found.person,
        person_prefix=found.person_prefix,
        only={key: frozenset(texts) for key, texts in found.only.items()},
        day=day,
        rules=rules,
        needed=frozenset(needed),
    )


def _day(found: _Day, name: str) -> DayRule:
    if bool(found.constant) == bool(found.column) or (found.format and found.number_from):
        raise ImportDataError(
            f"{name}: [day] has a `column` (with `format` or `number_from`), or a `constant`."
        )
    try:
        return DayRule(
            column=found.column,
            format=found.format,
            number_from=date.fromisoformat(found.number_from) if found.number_from else None,
            constant=date.fromisoformat(found.constant) if found.constant else None,
        )
    except ValueError as error:
        raise ImportDataError(f"{name}: days in [day] read as 2018-01-31.") from error


def _rule(key: str, found: _Column, name: str) -> Rule:
    where = f"{name}: columns.{key}"
    target = column(key)
    if found.unit not in known_units(target):
        raise ImportDataError(f"{where}: {found.unit!r} cannot be converted into {target.unit}.")
    if not found.take:
        raise ImportDataError(f"{where}: `take` names at least one column.")
    if not found.factors.keys() <= {*found.take, *found.minus}:
        raise ImportDataError(f"{where}: `factors` are of columns that are taken.")
    scale = None
    if found.scale is not None:
        scale = (found.scale.from_, found.scale.to)
        if scale[0][0] == scale[0][1]:
            raise ImportDataError(f"{where}: `scale` comes from a range.")
    return Rule(
        column=target,
        take=tuple(found.take),
        minus=tuple(found.minus),
        combine=found.combine,
        unit=found.unit,
        factors=found.factors,
        codes=found.codes,
        scale=scale,
        valid=found.valid,
        missing=frozenset(found.missing),
        zero_below=found.zero_below,
    )
