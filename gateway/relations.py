"""Reads what a FHIR app answers about relations: pages of a search, care teams, encounters.

Pure. What is not exactly as FHIR R4 has it tells nothing. Before: `gateway.facts`, which asks.
"""

from __future__ import annotations

import re
from calendar import monthrange
from dataclasses import dataclass
from datetime import MAXYEAR, UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from gateway.errors import BadRequestError
from gateway.routes import check_path

_DATE = re.compile(r"([0-9]{4})(?:-([0-9]{2})(?:-([0-9]{2}))?)?").fullmatch
_MOMENT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}(?:\.[0-9]{1,9})?(?:Z|[+-][0-9]{2}:[0-9]{2})?"
).fullmatch
_REFERENCE = re.compile(r"([A-Z][A-Za-z]{1,63}/[A-Za-z0-9.-]{1,64})(?:/_history/[^/]+)?").fullmatch


class UnreadableError(Exception):
    """The app's answer is there, but cannot be relied upon. Never leaves `gateway.facts`."""


def resources_of(bundle: dict[str, Any], type_: str) -> list[dict[str, Any]]:
    """The matches on a page. Raises `UnreadableError` for anything that is no such resource."""
    entries = bundle.get("entry", [])
    if bundle.get("type") != "searchset" or not isinstance(entries, list):
        raise UnreadableError
    found = []
    for entry in entries:
        resource = entry.get("resource") if isinstance(entry, dict) else None
        if not isinstance(resource, dict):
            raise UnreadableError
        kind = resource.get("resourceType")
        if kind == type_:
            found.append(resource)
        elif kind != "OperationOutcome" or _says_failure(resource):
            raise UnreadableError
    return found


def _says_failure(outcome: dict[str, Any]) -> bool:
    """Whether the app says with its answer that it is not the whole one."""
    issues = outcome.get("issue")
    if not isinstance(issues, list):
        return True
    return any(
        not isinstance(issue, dict) or issue.get("severity") not in {"information", "success"}
        for issue in issues
    )


def is_all(bundle: dict[str, Any], found: int) -> bool:
    """Whether the app does not say itself that there are more."""
    total = bundle.get("total")
    return total is None or (type(total) is int and total <= found)


def next_link(bundle: dict[str, Any]) -> str | None:
    """Where the next page is, if there is one. Raises `UnreadableError`."""
    links = bundle.get("link", [])
    if not isinstance(links, list):
        raise UnreadableError
    for link in links:
        if not isinstance(link, dict):
            raise UnreadableError
        if link.get("relation") == "next":
            if not isinstance(link.get("url"), str):
                raise UnreadableError
            return str(link["url"])
    return None


def verify_filtered(
    bundle: dict[str, Any], parameter: str, wanted: frozenset[str] = frozenset()
) -> None:
    """Raise `UnreadableError` if the app says that it has not looked at a parameter.

    Nor may it say that it left some of `wanted` (ids without type) out: it has not searched for
    them. The `self` link holds the parameters that were used (FHIR R4,
    http.html#conformance-of-search).
    """
    for link in _listed(bundle.get("link")):
        if not isinstance(link, dict) or link.get("relation") != "self":
            continue
        try:
            used = parse_qsl(urlsplit(str(link.get("url"))).query, keep_blank_values=True)
        except ValueError as error:
            raise UnreadableError from error
        names = {name.partition(":")[0] for name, _ in used}
        # A link without any parameter says nothing about them.
        if names and parameter not in names:
            raise UnreadableError(f"an answer that did not take {parameter} into account")
        named = {
            value.rpartition("/")[2]
            for name, values in used
            if name.partition(":")[0] == parameter
            for value in values.split(",")
        }
        if names and not wanted <= named:
            raise UnreadableError(f"an answer that did not take all of {parameter} into account")


def own_target(base: str, link: str, path: str) -> tuple[str, str]:
    """Path and query of the next page, which is the same app's. Raises `UnreadableError`.

    The app may name itself otherwise than the route does, so only path and query are followed.
    """
    try:
        parts = urlsplit(link)
    except ValueError as error:
        raise UnreadableError from error
    target = parts.path or path
    try:
        check_path(target)
    except BadRequestError as error:
        raise UnreadableError from error
    below = target == base or target.startswith(f"{base}/")
    if not below or not parts.query.isascii():
        raise UnreadableError
    return target, parts.query


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Reads relations as of `now` (Unix time). `own` is how references to the app begin."""

    own: str
    now: float

    def relations(self, resource: dict[str, Any]) -> tuple[str | None, frozenset[str]]:
        """Whose resource it is, and the references of those who treat by it."""
        if _means_otherwise(resource):
            return None, frozenset()
        match resource.get("resourceType"), resource.get("status"):
            case ("CareTeam", "active"):
                member = "member"
            case ("Encounter", "in-progress"):
                member = "individual"
            case ("Patient", _):
                patient = resource.get("id")
                listed = _listed(resource.get("generalPractitioner"))
                doctors = frozenset(one for each in listed if (one := self.reference(each)))
                return patient if isinstance(patient, str) else None, doctors
            case _:
                return None, frozenset()
        kind, _, name = (self.reference(resource.get("subject")) or "").partition("/")
        if kind != "Patient" or not self.holds(resource.get("period")):
            return None, frozenset()
        return name, frozenset(
            found
            for one in _listed(resource.get("participant"))
            if isinstance(one, dict)
            and not _means_otherwise(one)
            and self.holds(one.get("period"))
            and (found := self.reference(one.get(member)))
        )

    def reference(self, value: object) -> str | None:
        """`Practitioner/7`, if it is one on the app itself: another server's 7 is somebody else."""
        reference = value.get("reference") if isinstance(value, dict) else None
        if not isinstance(reference, str):
            return None
        found = _REFERENCE(reference.removeprefix(self.own))
        return found[1] if found else None

    def holds(self, period: object) -> bool:
        """Whether a period has begun and is not over. What is no FHIR dateTime holds never.

        A date without time lasts all of its day, month or year in UTC (FHIR R4 datatypes, Period).
        """
        if period is None:
            return True
        if not isinstance(period, dict):
            return False
        try:
            begun = "start" not in period or _instants(period["start"])[0] <= self.now
            return begun and ("end" not in period or self.now < _instants(period["end"])[1])
        except (ValueError, OverflowError):
            return False


def _instants(text: object) -> tuple[float, float]:
    """When a dateTime begins, and when it is over. Raises ValueError for anything else."""
    if not isinstance(text, str):
        raise ValueError("no text")  # noqa: TRY004 - one kind of error for whoever asks
    found = _DATE(text)
    if found is None:
        if not _MOMENT(text):
            raise ValueError("no dateTime")
        moment = datetime.fromisoformat(text)
        at = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        return at, at
    year, month, day = int(found[1]), found[2], found[3]
    first = datetime(year, int(month or 1), int(day or 1), tzinfo=UTC)
    last_month = int(month or 12)
    last_day = int(day) if day else monthrange(year, last_month)[1]
    last = datetime(year, last_month, last_day, tzinfo=UTC)
    if last.year == MAXYEAR:  # how many systems write "for ever"
        return first.timestamp(), float("inf")
    return first.timestamp(), (last + timedelta(days=1)).timestamp()


def _means_otherwise(part: dict[str, Any]) -> bool:
    """Whether it says that it must not be understood as usual (FHIR R4 extensibility)."""
    return bool(part.get("modifierExtension") or part.get("implicitRules"))


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
