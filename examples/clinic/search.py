"""FHIR search (R4, section 3.1.1): what a resource is found by, and a query as SQL.

`PARAMETERS` is common to all types: elements with one meaning have one name. A parameter that a
type has no element for finds nothing; an unknown one is refused. What cannot be read, such as a
date that is none, is not indexed, and does no harm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

Kind = Literal["token", "string", "reference", "date"]

_WHEN = ("effectiveDateTime", "effectivePeriod", "date", "dateTime", "period", "onsetDateTime")
PARAMETERS: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "_id": ("token", ("id",)),
    "_lastUpdated": ("date", ("meta.lastUpdated",)),
    "_tag": ("token", ("meta.tag",)),
    "_security": ("token", ("meta.security",)),
    "identifier": ("token", ("identifier",)),
    "status": ("token", ("status",)),
    "code": ("token", ("code", "medicationCodeableConcept")),
    "category": ("token", ("category",)),
    "type": ("token", ("type",)),
    "gender": ("token", ("gender",)),
    "clinical-status": ("token", ("clinicalStatus",)),
    "active": ("token", ("active",)),
    "name": ("string", ("name", "title")),
    "family": ("string", ("name.family",)),
    "given": ("string", ("name.given",)),
    "birthdate": ("date", ("birthDate",)),
    "date": ("date", (*_WHEN, "authoredOn", "recordedDate", "created", "issued")),
    "authoredon": ("date", ("authoredOn",)),
    "patient": ("reference", ("subject", "patient", "beneficiary")),
    "subject": ("reference", ("subject", "patient")),
    "encounter": ("reference", ("encounter", "context.encounter")),
    "author": ("reference", ("author",)),
    "performer": ("reference", ("performer",)),
    "requester": ("reference", ("requester",)),
    "participant": ("reference", ("participant.member", "participant.individual")),
    "general-practitioner": ("reference", ("generalPractitioner",)),
    "result": ("reference", ("result",)),
}
_NAME_PARTS = ("text", "family", "given", "prefix", "suffix")
_FIRST, _NEVER = (datetime(year, 1, 1, tzinfo=UTC) for year in (1, 9999))
_SMALLEST = (
    "(SELECT min(value) FROM term WHERE term.type=current.type AND term.id=current.id AND param=?)"
)
_LAST = "\U0010ffff"

type Term = tuple[str, str, str]
type Condition = tuple[str, list[Any]]


class SearchError(ValueError):
    """A query that is not understood. The message says what, and never repeats a value."""


def terms(resource: dict[str, Any]) -> Iterator[Term]:
    """Yield `(parameter, value, until)`; `until` differs from `value` for dates only."""
    for name, (kind, paths) in PARAMETERS.items():
        for path in paths:
            for node in _nodes(resource, path.split(".")):
                if kind == "date":
                    yield from ((name, *span) for span in _spans(node))
                else:
                    yield from ((name, value, value) for value in _INDEXED[kind](node))


def where(kind: str, query: Iterable[tuple[str, str]]) -> Condition:
    """The condition on `current` that all parameters of a query make together."""
    made = [_condition(kind, key, value) for key, value in query]
    return " AND ".join(["type=?", *(sql for sql, _ in made)]), [
        kind,
        *(arg for _, args in made for arg in args),
    ]


def order(sort: str) -> Condition:
    """The order that `_sort` asks for; ties by id, so that pages do not overlap."""
    parts, args = [], []
    for key in filter(None, sort.split(",")):
        name = _known(key.removeprefix("-"))
        parts.append(_SMALLEST + (" DESC" if key.startswith("-") else ""))
        args.append(name)
    return ", ".join([*parts, "length(id)", "id"]), args


# --- A query as SQL -------------------------------------------------------------------------------


def _condition(kind: str, key: str, value: str) -> Condition:
    if key.startswith("_has:"):
        try:
            _, other, reference, inner = key.split(":", 3)
        except ValueError:
            raise SearchError("_has needs a type, a reference and a parameter") from None
        sql, args = _condition(other, inner, value)
        inside = f"SELECT id FROM current WHERE type=? AND {sql}"  # noqa: S608 - no data
        pointing = f"SELECT value FROM term WHERE type=? AND param=? AND id IN ({inside})"  # noqa: S608 - no data
        return f"type||'/'||id IN ({pointing})", [other, _known(reference), other, *args]
    head, dot, rest = key.partition(".")
    name, _, modifier = head.partition(":")
    _known(name)
    if dot:
        return _chained(kind, name, modifier or "Patient", (rest, value))
    if modifier == "missing":
        no = "" if value == "false" else "NOT "
        return f"id {no}IN (SELECT id FROM term WHERE type=? AND param=?)", [kind, name]  # noqa: S608 - no data
    alternatives = [_match(name, modifier, one) for one in _split(value)]
    no = "NOT " if modifier == "not" else ""
    sql = " OR ".join(sql for sql, _ in alternatives)
    return f"id {no}IN (SELECT id FROM term WHERE type=? AND param=? AND ({sql}))", [  # noqa: S608 - no data
        kind,
        name,
        *(arg for _, args in alternatives for arg in args),
    ]


def _chained(kind: str, name: str, target: str, inner: tuple[str, str]) -> Condition:
    if PARAMETERS[name][0] != "reference":
        raise SearchError(f"{name} is no reference and cannot be chained")
    sql, args = _condition(target, *inner)
    inside = f"SELECT type||'/'||id FROM current WHERE type=? AND {sql}"  # noqa: S608 - no data
    pointing = f"SELECT id FROM term WHERE type=? AND param=? AND value IN ({inside})"  # noqa: S608 - no data
    return f"id IN ({pointing})", [kind, name, target, *args]


def _match(name: str, modifier: str, value: str) -> Condition:
    match PARAMETERS[name][0], modifier:
        case "string", "":
            return "value>=? AND value<?", [value.casefold(), value.casefold() + _LAST]
        case "string", "exact":
            return "value=?", [value.casefold()]
        case "string", "contains":
            return "instr(value, ?)>0", [value.casefold()]
        case "token", "" | "not":
            return "value=?", [value]
        case "reference", _ if modifier in {"", "identifier"} or modifier.istitle():
            return _reference(name, modifier, value)
        case "date", "":
            return _date(value)
    raise SearchError(f"the modifier of {name} is not supported")


def _reference(name: str, modifier: str, value: str) -> Condition:
    if modifier == "identifier":
        raise SearchError("references are not searched by identifier")
    if "/" in value:
        return "value=?", ["/".join(value.split("/")[-2:])]
    if modifier or name == "patient":
        return "value=?", [f"{modifier or 'Patient'}/{value}"]
    return "value LIKE '%/'||?", [value]


def _date(value: str) -> Condition:
    prefix, text = re.fullmatch(r"(eq|ne|gt|lt|ge|le|sa|eb)?(.*)", value, re.DOTALL).groups()  # type: ignore[union-attr] # matches anything
    span = next(_spans(text), None)
    if span is None:
        raise SearchError("a date is YYYY, YYYY-MM, YYYY-MM-DD or a time with its zone")
    begin, end = span
    conditions: dict[str, Condition] = {
        "eq": ("value>=? AND until<=?", [begin, end]),
        "ne": ("NOT (value>=? AND until<=?)", [begin, end]),
        "gt": ("until>?", [end]),
        "ge": ("until>?", [begin]),
        "lt": ("value<?", [begin]),
        "le": ("value<?", [end]),
        "sa": ("value>=?", [end]),
        "eb": ("until<=?", [begin]),
    }
    return conditions[prefix or "eq"]


def _known(name: str) -> str:
    if name not in PARAMETERS:
        raise SearchError("a search parameter is not known here; see /fhir/metadata")
    return name


def _split(value: str) -> list[str]:
    """Alternatives are separated by commas; a comma after a backslash is one."""
    parts = re.split(r"(?<!\\),", value)
    return [re.sub(r"\\([,|$\\])", r"\1", part) for part in parts]


# --- What is indexed ------------------------------------------------------------------------------


def _nodes(node: Any, path: list[str]) -> Iterator[Any]:
    if isinstance(node, list):
        for item in node:
            yield from _nodes(item, path)
    elif not path:
        if node is not None:
            yield node
    elif isinstance(node, dict):
        yield from _nodes(node.get(path[0]), path[1:])


def _tokens(node: Any) -> Iterator[str]:
    if isinstance(node, bool):
        yield "true" if node else "false"
    elif isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for coding in list(_nodes(node, ["coding"])) or [node]:
            value = coding.get("code") or coding.get("value") if isinstance(coding, dict) else None
            if isinstance(value, str):
                system = coding.get("system", "")
                yield from (value, f"{system}|{value}", f"{system}|")


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node.casefold()
    elif isinstance(node, dict):
        for part in _NAME_PARTS:
            for text in _nodes(node, [part]):
                yield from _strings(text)


def _references(node: Any) -> Iterator[str]:
    text = node.get("reference") if isinstance(node, dict) else None
    if isinstance(text, str):
        yield "/".join(text.partition("/_history/")[0].split("/")[-2:])


_INDEXED = {"token": _tokens, "string": _strings, "reference": _references}


def _spans(node: Any) -> Iterator[tuple[str, str]]:
    """First instant, and first instant after, as UTC text that sorts."""
    begin, end = (node.get("start"), node.get("end")) if isinstance(node, dict) else (node, node)
    try:
        low = _bounds(begin)[0] if begin else _FIRST
        high = _bounds(end)[1] if end else _NEVER
    except (TypeError, ValueError, OverflowError):
        return
    yield low.isoformat(timespec="microseconds"), high.isoformat(timespec="microseconds")


def _bounds(text: str) -> tuple[datetime, datetime]:
    if re.fullmatch(r"\d{4}", text):
        return _day(f"{text}-01-01"), _day(f"{int(text) + 1}-01-01")
    if re.fullmatch(r"\d{4}-\d\d", text):
        first = _day(f"{text}-01")
        return first, (first + timedelta(days=31)).replace(day=1)
    if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
        return _day(text), _day(text) + timedelta(days=1)
    moment = datetime.fromisoformat(text)
    moment = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    step = timedelta(milliseconds=1) if "." in text else timedelta(seconds=1)
    return moment, moment + step


def _day(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)
