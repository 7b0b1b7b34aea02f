"""A query from a few lines of TOML, and back.

    kind = "mean"                       kind = "association"
    name = "sleep"                      name = "sleep-and-mood"
    column = "sleep_hours"              x = { column = "sleep_quality" }
    low = 0.0                           y = { column = "mood", low = -6.0, high = 6.0 }
    high = 12.0                         days = 21

A query of one quantity says it at the top, one of two names each. Bounds and unit that are left out
are the column's own in the daily table. Keys that are not known are refused with the nearest that
is. In Python the query's class is made directly, with the same words.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from federated.analytics.association import Association
from federated.analytics.base import BaseQuery
from federated.analytics.conditional import OwnAverageSplit
from federated.analytics.counts import Count, Histogram
from federated.analytics.groups import ArmContrast, GroupMeans
from federated.analytics.means import Mean, Variance
from federated.analytics.quantiles import Quantiles
from federated.analytics.quantity import Quantity
from federated.analytics.trend import WeeklyTrend
from federated.errors import ImportDataError, ManifestError
from federated.node.columns import Column
from federated.node.columns import column as column_of

KINDS: Final[Mapping[str, type[BaseQuery]]] = {
    "count": Count,
    "histogram": Histogram,
    "mean": Mean,
    "variance": Variance,
    "quantiles": Quantiles,
    "association": Association,
    "split": OwnAverageSplit,
    "contrast": ArmContrast,
    "groups": GroupMeans,
    "trend": WeeklyTrend,
}
_NAMES: Final[Mapping[type[BaseQuery], str]] = {kind: name for name, kind in KINDS.items()}
_QUANTITY: Final = tuple(field.name for field in dataclasses.fields(Quantity))
_QUANTITIES: Final = ("of", "outcome", "by", "x", "y")
_MOST_BYTES: Final = 8192


def parse_query(toml: bytes) -> BaseQuery:
    """A query from a TOML document. Raises `ManifestError`, one line for the first mistake."""
    if len(toml) > _MOST_BYTES:
        raise ManifestError(f"A query's declaration has at most {_MOST_BYTES} bytes.")
    try:
        table = tomllib.loads(toml.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ManifestError(f"The query is not TOML: {error}.") from error
    return query_from(table)


def query_from(ask: Mapping[str, Any]) -> BaseQuery:
    """A query from its declaration. Raises `ManifestError`, one line for the first mistake."""
    given = dict(ask)
    kind = given.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ManifestError(_unknown("A query's `kind`", str(kind), KINDS))
    query = KINDS[kind]
    what = f"A query of kind {kind}"
    fields = {field.name: field for field in dataclasses.fields(query)}
    _refuse_unknown(given, [*fields, *(_QUANTITY if "of" in fields else ())], what)
    if "of" in fields and "of" not in given:
        given["of"] = {name: given.pop(name) for name in _QUANTITY if name in given}
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and given.get(name, {}) == {}:
            raise ManifestError(f"{what} needs `{'column' if name == 'of' else name}`.")
        if name in _QUANTITIES:
            _fill(given, name, what)
    if isinstance(given.get("arm"), str):
        _column(given["arm"])
    return _convert(query, given, what)


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key in given:
        if key not in known:
            raise ManifestError(_unknown(f"{what}: the key", key, known))


def _fill(given: dict[str, Any], name: str, what: str) -> None:
    """Make a quantity of a table, and check that a column by its name alone exists."""
    if isinstance(given.get(name), Mapping):
        given[name] = _quantity(given[name], f"{what}: `{name}`")
    elif isinstance(given.get(name), str):
        _column(given[name])


def declaration_of(query: BaseQuery) -> dict[str, Any]:
    """What `query_from` makes the same query from: plain values, defaults left out."""
    kind = _NAMES.get(type(query))
    if kind is None:
        raise ManifestError(f"{query.name}: a query of this class cannot be declared.")
    declared: dict[str, Any] = {"kind": kind}
    for field in dataclasses.fields(query):
        value = getattr(query, field.name)
        if value == field.default or (isinstance(value, float) and math.isinf(value)):
            continue
        plain = dataclasses.asdict(value) if isinstance(value, Quantity) else value
        if field.name == "of":
            declared |= plain
        else:
            declared[field.name] = list(plain) if isinstance(plain, tuple) else plain
    return declared


def _convert(query: type[BaseQuery], given: Mapping[str, Any], what: str) -> BaseQuery:
    try:
        return msgspec.convert(dict(given), type=query)
    except msgspec.ValidationError as error:
        raise ManifestError(f"{what}: {error}.") from error


def _quantity(given: Mapping[str, Any], what: str) -> Quantity:
    filled = dict(given)
    _refuse_unknown(filled, _QUANTITY, what)
    if not isinstance(filled.get("column"), str):
        raise ManifestError(f"{what} needs a `column`.")
    known = _column(filled["column"])
    change = filled.get("summary") == "change"
    filled.setdefault("low", known.low - known.high if change else known.low)
    filled.setdefault("high", known.high - known.low if change else known.high)
    filled.setdefault("unit", known.unit.strip("{}"))
    try:
        return msgspec.convert(filled, type=Quantity)
    except msgspec.ValidationError as error:
        raise ManifestError(f"{what}: {error}.") from error


def _column(name: str) -> Column:
    try:
        return column_of(name)
    except ImportDataError as error:
        raise ManifestError(str(error)) from error


def _unknown(what: str, key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    hint = f" Did you mean {near[0]}?" if near else f" There are: {', '.join(sorted(known))}."
    return f"{what} {key[:64]!r} is not known.{hint}"
