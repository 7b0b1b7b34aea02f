"""A request as Cedar sees it: the facts that rules may use, and nothing else.

Lives here: how relations, scopes, break-glass grants and labels become attributes and parents
(`packs/schema.cedarschema` names them all), and the bounds on what is handed to Cedar. No rule
lives here: these are facts, the packs say what follows from them.

What seldom changes (roles, kinds, labels, relations) goes into the two entities, so that their
parsed form can be kept; what changes with every request (times, ids) goes into the context.
"""

from __future__ import annotations

from typing import Any, Final

from policies.model import (
    ACTIONS,
    CAPACITIES,
    CONFIDENTIALITY,
    LABELS,
    PURPOSES,
    SECOND_FACTORS,
    SERVICE_KINDS,
    STUDY_ACTIONS,
    Principal,
    Request,
    Resource,
    StudyStanding,
)
from policies.scopes import scopes_cover

MAX_TEXT: Final = 512
MAX_NAMES: Final = 64
MAX_REASON: Final = 4_096
MAX_SCOPES: Final = 256

_KNOWN_LABELS: Final = frozenset(LABELS)
_LEVELS: Final = {
    level: CONFIDENTIALITY[: place + 1] for place, level in enumerate(CONFIDENTIALITY)
}
_PRINCIPAL_TYPES: Final = {"user": "User", "service": "Service", "anonymous": "Anonymous"}

type EntityKey = tuple[object, ...]


def oversized(request: Request) -> str | None:
    """Name the first part of a request that is larger than any real one, or nothing."""
    principal, resource, context = request.principal, request.resource, request.context
    texts = (
        principal.id, principal.patient, resource.service, resource.type, resource.id,
        resource.patient, resource.author, context.client,
        resource.destination.host if resource.destination else None,
    )  # fmt: skip
    if any(text is not None and len(text) > MAX_TEXT for text in texts):
        return "a name or id"
    if len(principal.roles) > MAX_NAMES or any(len(role) > MAX_TEXT for role in principal.roles):
        return "the list of roles"
    if len(resource.labels) > MAX_NAMES:
        return "the list of labels"
    if principal.scopes and (
        len(principal.scopes) > MAX_SCOPES or any(len(one) > MAX_TEXT for one in principal.scopes)
    ):
        return "the list of scopes"
    if context.break_glass and len(context.break_glass.reason) > MAX_REASON:
        return "the reason of the break-glass"
    return None


def unknown_word(request: Request) -> str | None:
    """Name the first word that is in no vocabulary, or nothing: no rule could speak of it."""
    resource = request.resource
    actions = ACTIONS if resource.study is None else STUDY_ACTIONS
    if request.action not in actions or request.context.purpose not in PURPOSES:
        return "an action or purpose"
    if resource.study is not None and resource.study.capacity not in CAPACITIES:
        return "a capacity"
    if resource.kind not in SERVICE_KINDS or resource.confidentiality not in _LEVELS:
        return "a kind of service or level of confidentiality"
    if not resource.labels <= _KNOWN_LABELS:
        return "a sensitivity label"
    if request.principal.assurance.second_factor not in SECOND_FACTORS:
        return "a second factor"
    return None


def principal_uid(request: Request) -> tuple[str, str]:
    """Type and id of the principal's entity."""
    return _PRINCIPAL_TYPES[request.principal.kind], request.principal.id


def resource_uid(request: Request) -> tuple[str, str]:
    """Type and id of the resource's entity: a class of records, a host, or a study."""
    if request.resource.study is not None:
        return "Study", request.resource.id or ""
    destination = request.resource.destination
    if destination is not None:
        return "Destination", destination.host
    return "Record", f"{request.resource.service}/{request.resource.type}"


def resource_parents(resource: Resource) -> list[tuple[str, str]]:
    """Groups that the resource belongs to. A level of confidentiality includes those below it."""
    if resource.study is not None:
        return []
    if resource.destination is not None:
        return [("ServiceKind", resource.kind)]
    levels = _LEVELS[resource.confidentiality]
    return [
        ("ServiceKind", resource.kind),
        ("ResourceType", resource.type),
        *(("Confidentiality", level) for level in levels),
        *(("Label", label) for label in sorted(resource.labels)),
    ]


def relation(principal: Principal, resource: Resource) -> tuple[bool, bool, bool, bool]:
    """Self, representative, care team, author: how the principal stands to the record."""
    patient, author = resource.patient, resource.author
    return (
        patient is not None and patient == principal.patient,
        patient is not None and patient in principal.represents,
        patient is not None and patient in principal.care_team,
        author is not None and (author == principal.id or author in principal.references),
    )


def entity_key(request: Request) -> EntityKey:
    """Everything that the entities and the choice of rules are made of: equal keys, equal both."""
    principal, resource, context = request.principal, request.resource, request.context
    consent = context.consent
    return (
        request.action, principal.kind, principal.id, principal.roles, principal.purposes,
        context.purpose,
        resource.service, resource.kind, resource.type, resource.labels,
        resource.confidentiality, resource.patient is None, resource.destination,
        resource.study, None if resource.study is None else resource.id,
        relation(principal, resource), principal.scopes is None,
        second_factor_age_s(request) is None,
        scopes_cover(principal, request.action, resource),
        consent.permits, consent.denies, consent.unreadable, consent.authorises,
    )  # fmt: skip


def entities(request: Request) -> list[dict[str, Any]]:
    """The principal and the resource in Cedar's JSON form."""
    principal = request.principal
    kind, name = principal_uid(request)
    attributes: dict[str, Any] = {"purpose": _entity("Purpose", request.context.purpose)}
    if principal.kind == "service":
        attributes["registered"] = [_entity("Purpose", one) for one in sorted(principal.purposes)]
    if principal.kind == "user":
        attributes["secondFactor"] = second_factor_age_s(request) is not None
    roles = [] if principal.kind == "anonymous" else sorted(principal.roles)
    resource_kind, resource_name = resource_uid(request)
    return [
        {
            "uid": {"type": kind, "id": name},
            "attrs": attributes,
            "parents": [{"type": "Role", "id": role} for role in roles],
        },
        {
            "uid": {"type": resource_kind, "id": resource_name},
            "attrs": _resource_attributes(request),
            "parents": [
                {"type": group, "id": one} for group, one in resource_parents(request.resource)
            ],
        },
    ]


def _resource_attributes(request: Request) -> dict[str, Any]:
    principal, resource, consent = request.principal, request.resource, request.context.consent
    if resource.study is not None:
        return _study_attributes(resource.study)
    if resource.destination is not None:
        listed = request.context.purpose in resource.destination.listed_for
        return {"listed": listed, "encrypted": resource.destination.encrypted}
    is_self, representative, care_team, author = relation(principal, resource)
    return {
        "hasPatient": resource.patient is not None,
        "relation": {
            "isSelf": is_self,
            "representative": representative,
            "careTeam": care_team,
            "author": author,
        },
        "consent": {
            "permits": consent.permits,
            "denies": consent.denies,
            "unreadable": consent.unreadable,
            "authorises": [
                _entity("Label", label) for label in sorted(consent.authorises & _KNOWN_LABELS)
            ],
        },
        "scopeLimits": principal.scopes is not None,
        "scopeCovers": scopes_cover(principal, request.action, resource),
    }


def _study_attributes(study: StudyStanding) -> dict[str, Any]:
    return {
        "capacity": study.capacity,
        "ownSite": study.own_site,
        "proposedBySelf": study.proposed_by_self,
        "spokenBySelf": study.spoken_by_self,
        "approved": study.approved,
    }


def _entity(kind: str, name: str) -> dict[str, dict[str, str]]:
    return {"__entity": {"type": kind, "id": name}}


def circumstances(request: Request) -> dict[str, Any]:
    """The whole context record. Times are whole seconds; an age is never less than it truly is."""
    resource, context = request.resource, request.context
    facts: dict[str, Any] = {
        "now": int(context.now),
        "client": context.client,
        "service": resource.service,
    }
    if resource.id is not None:
        facts["id"] = resource.id
    if resource.patient is not None:
        facts["patient"] = resource.patient
    if resource.destination is not None:
        facts["host"] = resource.destination.host
    age_s = second_factor_age_s(request)
    if age_s is not None:
        facts["secondFactorAgeSeconds"] = age_s
    grant = context.break_glass
    if grant is not None:
        begun = grant.begins_at <= context.now
        facts["breakGlass"] = {
            "covers": resource.patient is not None and resource.patient in grant.patients,
            "secondsLeft": int(grant.ends_at - context.now) if begun else 0,
            "lastsSeconds": int(grant.ends_at - grant.begins_at),
            "reasonLength": len(grant.reason.strip()),
        }
    return facts


def second_factor_age_s(request: Request) -> int | None:
    """Whole seconds since the second factor, rounded up; nothing if none, or if it lies ahead."""
    assurance = request.principal.assurance
    if assurance.second_factor == "none" or assurance.second_factor_at is None:
        return None
    age_s = request.context.now - assurance.second_factor_at
    # A second factor of the future is a broken or forged clock, not a fresh one.
    return None if age_s < 0 else -int(-age_s // 1)
