"""Reads what a FHIR app answers about relations: pages of a search, care teams, encounters.

Pure. What is not exactly as FHIR R4 has it tells nothing. Before: `gateway.facts`, which asks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

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


def own_target(base: str, link: str, path: str) -> tuple[str, str]:
    """Path and query of the next page, which is the same app's. Raises `UnreadableError`.

    The app may name itself otherwise than the route does, so only path and query are followed.
    """
    try:
        parts = urlsplit(link)
    except ValueError as error:
        raise UnreadableError from error
    target = parts.path or path
    below = target == base or target.startswith(f"{base}/")
    if not below or "/../" in target or not target.isascii() or not parts.query.isascii():
        raise UnreadableError
    return target, parts.query


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Reads relations as of a `day` (ISO 8601, UTC). `own` is how references to the app begin."""

    own: str
    day: str

    def relations(self, resource: dict[str, Any]) -> tuple[str | None, frozenset[str]]:
        """Whose resource it is, and the references of those who treat by it."""
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
        """Whether a period is not over and has begun, as far as whole days say."""
        if period is None:
            return True
        if not isinstance(period, dict):
            return False
        start, end = period.get("start", ""), period.get("end", self.day)
        if not isinstance(start, str) or not isinstance(end, str):
            return False
        # A date may be cut to month or year; ISO 8601 sorts as text.
        return start[:10] <= self.day and end[:10] >= self.day[: len(end[:10])]


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
