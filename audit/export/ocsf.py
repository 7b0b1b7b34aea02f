"""OCSF 1.3 events for a SIEM, as NDJSON (schema.ocsf.io). Comes after `audit.search`.

Sign-in is Authentication (class 3002), what is done to keys and to the log is Entity Management
(3004), everything else API Activity (6003). What OCSF has no attribute for stands in `unmapped`.
`time` is in milliseconds. Persons are `sealed` text in `actor.user.uid` unless names were opened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from audit.model import PERSONAL_KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from audit.model import Entry
    from audit.search import Exchange, Names

VERSION: Final = "1.3.0"
AUTHENTICATION: Final = 3002
ENTITY_MANAGEMENT: Final = 3004
API_ACTIVITY: Final = 6003

_CLASS_NAMES = {
    AUTHENTICATION: ("Authentication", 3, "Identity & Access Management"),
    ENTITY_MANAGEMENT: ("Entity Management", 3, "Identity & Access Management"),
    API_ACTIVITY: ("API Activity", 6, "Application Activity"),
}
#: Class and activity of each action; 99 is "Other", named in `activity_name`.
_CREATE, _READ, _UPDATE, _DELETE, _OTHER = 1, 2, 3, 4, 99
_ACTIVITIES = {
    "login": (AUTHENTICATION, 1), "logout": (AUTHENTICATION, 2), "stepup": (AUTHENTICATION, 99),
    "read": (API_ACTIVITY, _READ), "history": (API_ACTIVITY, _READ),
    "search": (API_ACTIVITY, _READ), "create": (API_ACTIVITY, _CREATE),
    "update": (API_ACTIVITY, _UPDATE), "patch": (API_ACTIVITY, _UPDATE),
    "delete": (API_ACTIVITY, _DELETE),
    "keys.epoch.roll": (ENTITY_MANAGEMENT, _CREATE),
    "keys.epoch.rewrap": (ENTITY_MANAGEMENT, _UPDATE),
    "keys.epoch.trim": (ENTITY_MANAGEMENT, _DELETE),
    "keys.person.erase": (ENTITY_MANAGEMENT, _DELETE),
    "keys.index.rotate": (ENTITY_MANAGEMENT, _UPDATE),
    "keys.officer.create": (ENTITY_MANAGEMENT, _CREATE),
    "keys.pseudonym.request": (ENTITY_MANAGEMENT, _OTHER),
    "keys.pseudonym.approve": (ENTITY_MANAGEMENT, _OTHER),
    "keys.pseudonym.reveal": (ENTITY_MANAGEMENT, _READ),
    "study.propose": (ENTITY_MANAGEMENT, _CREATE), "study.approve": (ENTITY_MANAGEMENT, _OTHER),
    "study.publish": (ENTITY_MANAGEMENT, _OTHER), "study.mend": (ENTITY_MANAGEMENT, _UPDATE),
    "study.reserve": (API_ACTIVITY, _OTHER), "study.spend": (API_ACTIVITY, _OTHER),
    "study.run": (API_ACTIVITY, _READ), "study.release": (API_ACTIVITY, _READ),
    "study.refuse": (API_ACTIVITY, _OTHER), "study.withdraw": (ENTITY_MANAGEMENT, _OTHER),
    "log.prune": (ENTITY_MANAGEMENT, _DELETE),
    "log.repair": (ENTITY_MANAGEMENT, _UPDATE),
    "log.clock": (ENTITY_MANAGEMENT, _OTHER),
}  # fmt: skip
_ACTIVITY_NAMES = {_CREATE: "Create", _READ: "Read", _UPDATE: "Update", _DELETE: "Delete"}
_SIGN_IN_NAMES = {1: "Logon", 2: "Logoff"}
_UNKNOWN, _SUCCESS, _FAILURE = 0, 1, 2
_INFORMATIONAL, _MEDIUM, _HIGH = 1, 3, 4


class OCSF:
    """`audit.export.Format`."""

    name = "ocsf"

    def head(self) -> bytes:
        """Return nothing: NDJSON has no head."""
        return b""

    def rows(self, exchange: Exchange, names: Names | None, origin: str) -> Iterator[bytes]:
        """Yield one event."""
        yield msgspec.json.encode(_event(exchange, names, origin)) + b"\n"


def _event(exchange: Exchange, names: Names | None, origin: str) -> dict[str, Any]:
    entry = exchange.newest
    class_uid, activity_id = _ACTIVITIES.get(entry.action, (API_ACTIVITY, _OTHER))
    class_name, category_uid, category_name = _CLASS_NAMES[class_uid]
    activities = _SIGN_IN_NAMES if class_uid == AUTHENTICATION else _ACTIVITY_NAMES
    status_id, status = _status(exchange)
    event: dict[str, Any] = {
        "activity_id": activity_id,
        "activity_name": activities.get(activity_id, entry.action),
        "category_name": category_name,
        "category_uid": category_uid,
        "class_name": class_name,
        "class_uid": class_uid,
        "type_uid": class_uid * 100 + activity_id,
        "time": entry.time // 1000,
        "severity_id": _severity(entry, status_id),
        "status": status,
        "status_id": status_id,
        "metadata": {
            "version": VERSION,
            "uid": str(exchange.log_index),
            "correlation_uid": entry.request,
            "log_name": origin,
            "tenant_uid": entry.tenant,
            "product": {"name": "Havengate", "vendor_name": "Havengate"},
        },
        "actor": _actor(entry, names),
        "src_endpoint": _source(entry, names),
        "unmapped": _unmapped(entry, names),
    }
    if entry.reason is not None:
        event["status_detail"] = entry.reason
    if entry.duration_us is not None:
        event["duration"] = entry.duration_us // 1000
    event |= _of_class(class_uid, entry, event["actor"])
    return event


def _of_class(class_uid: int, entry: Entry, actor: dict[str, Any]) -> dict[str, Any]:
    """Return what the class asks for beside the base event."""
    service = {"name": entry.service or "havengate"}
    if class_uid == AUTHENTICATION:
        return {"user": actor["user"], "service": service}
    if class_uid == ENTITY_MANAGEMENT:
        kind = ".".join(entry.action.split(".")[:2])
        name = entry.details.get("key_id", kind)
        return {"entity": {"name": name, "type": kind}}
    resources = [
        {"type": one.type, "labels": list(entry.labels)} | ({"uid": one.id} if one.id else {})
        for one in entry.resources
    ]
    found: dict[str, Any] = {
        "api": {"operation": entry.action, "service": service},
        "dst_endpoint": {"name": entry.service or "havengate"},
    }
    if resources:
        found["resources"] = resources
    if entry.status is not None:
        found["http_response"] = {"code": entry.status}
    return found


def _status(exchange: Exchange) -> tuple[int, str]:
    if exchange.newest.outcome is None and not exchange.ended:
        return _UNKNOWN, "Unknown"
    return (_SUCCESS, "Success") if _succeeded(exchange.newest) else (_FAILURE, "Failure")


def _succeeded(entry: Entry) -> bool:
    if entry.outcome is None:
        return entry.decision != "deny"
    return entry.outcome == "success"


def _severity(entry: Entry, status_id: int) -> int:
    if entry.break_glass is not None:
        return _HIGH
    return _INFORMATIONAL if status_id == _SUCCESS else _MEDIUM


def _actor(entry: Entry, names: Names | None) -> dict[str, Any]:
    actor = entry.actor
    if actor.kind in PERSONAL_KINDS:
        user = {"uid": (names.actor if names else actor.sealed) or "unknown", "type_id": 1}
    else:
        user = {"uid": actor.name or actor.kind, "type_id": 3 if actor.name else 0}
    if actor.role is not None:
        user["type"] = actor.role
    return {"user": user}


def _source(entry: Entry, names: Names | None) -> dict[str, str]:
    """Return where the request came from; a sealed address is no `ip`."""
    if names is not None and names.client is not None:
        return {"ip": names.client} if names.client[0] != "«" else {"uid": names.client}
    if entry.client is None:
        return {"name": "unrecorded"}
    return {"uid" if entry.actor.kind in PERSONAL_KINDS else "ip": entry.client}


def _unmapped(entry: Entry, names: Names | None) -> dict[str, Any]:
    patients = names.patients if names else entry.patients
    found = {
        "stage": entry.stage,
        "patients": list(patients),
        "labels": list(entry.labels),
        "rules": list(entry.rules),
        "obligations": list(entry.obligations),
        "decision": entry.decision,
        "purpose_of_use": entry.purpose,
        "consent": entry.consent,
        "break_glass": entry.break_glass,
        "bytes_in": entry.bytes_in,
        "bytes_out": entry.bytes_out,
        "counts": entry.counts,
        "details": entry.details,
    }
    return {name: value for name, value in found.items() if value not in (None, [], {})}
