"""FHIR R4 Consent resources: what a patient's consents say to one request.

Before: Consent resources of the patient, as parsed JSON. After: a `ConsentVerdict`, facts for the
rules; no consent decides by itself.

How it is decided, in this order:
1. Only consents count that are about the patient of the record, are `active`, and whose scope is
   privacy or research (research: for research only).
2. A consent that cannot be understood (wrong shape, unknown status, a modifier extension, implicit
   rules) is `unreadable` unless it can be told that it is another patient's or not in force.
3. Within one consent the deepest provision that matches decides: nested provisions are exceptions.
   Between provisions of the same depth a denial wins.
4. Between consents a denial wins: who wants to take back a refusal replaces the consent.
A constraint that cannot be judged from the request (a data period, a related record, a code list of
somebody else) counts as met for a denial and as not met for a permission. Dates without a zone are
UTC; a partial date is the whole day, month or year.

Special labels (psychotherapy notes, 42 CFR Part 2, HIV, violence) are authorised only by a
permission that names them: a general yes does not reach them. Source: FHIR R4 Consent, 42 CFR 2.31.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Final, Literal

import msgspec

from policies.model import (
    CONFIDENTIALITY,
    LABELS,
    PURPOSES,
    Action,
    ConsentVerdict,
    Purpose,
    Request,
    StudyAction,
)

MAX_CONSENTS: Final = 256
MAX_DEPTH: Final = 16

Direction = Literal["permit", "deny"]
_NOT_IN_FORCE: Final = frozenset({"draft", "proposed", "rejected", "inactive", "entered-in-error"})
_ABOUT_DATA: Final = frozenset({"patient-privacy", "research"})
_NOT_ABOUT_DATA: Final = frozenset({"treatment", "adr"})
_RULES: Final[dict[str, Direction]] = {
    "OPTIN": "permit",
    "OPTINR": "permit",
    "OPTOUT": "deny",
    "OPTOUTE": "deny",
}


class _Coding(msgspec.Struct, frozen=True):
    system: str = ""
    code: str = ""


class _Concept(msgspec.Struct, frozen=True):
    coding: tuple[_Coding, ...] = ()


class _Reference(msgspec.Struct, frozen=True):
    reference: str = ""


class _Period(msgspec.Struct, frozen=True):
    start: str | None = None
    end: str | None = None


class _Actor(msgspec.Struct, frozen=True):
    reference: _Reference


class _Data(msgspec.Struct, frozen=True):
    meaning: str
    reference: _Reference


class _Provision(msgspec.Struct, frozen=True, rename="camel"):
    type: Direction | None = None
    period: _Period | None = None
    actor: tuple[_Actor, ...] = ()
    action: tuple[_Concept, ...] = ()
    security_label: tuple[_Coding, ...] = ()
    purpose: tuple[_Coding, ...] = ()
    class_: tuple[_Coding, ...] = msgspec.field(default=(), name="class")
    code: tuple[_Concept, ...] = ()
    data_period: _Period | None = None
    data: tuple[_Data, ...] = ()
    provision: tuple[_Provision, ...] = ()


class _Consent(msgspec.Struct, frozen=True, rename="camel"):
    resource_type: Literal["Consent"]
    status: str
    scope: _Concept
    patient: _Reference
    id: str = ""
    policy_rule: _Concept | None = None
    provision: _Provision | None = None
    implicit_rules: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Consent:
    """One consent, understood or not. `patient` is `None` if it cannot be told whose it is."""

    id: str
    patient: str | None
    in_force: bool
    research_only: bool = False
    root: Direction | None = None
    #: The policy behind the provisions is a refusal: what they do not permit is denied.
    opted_out: bool = False
    provision: _Provision | None = None
    readable: bool = True


def parse_consent(resource: object) -> Consent:
    """Read one Consent resource. Never raises: what cannot be understood is kept as unreadable."""
    try:
        parsed = msgspec.convert(resource, _Consent)
        scopes = {coding.code for coding in parsed.scope.coding}
        _check(parsed, scopes)
        _check_modifiers(resource)
    except (msgspec.ValidationError, ValueError, OverflowError, RecursionError):
        return _unreadable(resource)
    return Consent(
        id=parsed.id,
        patient=_patient(parsed.patient.reference),
        in_force=parsed.status == "active" and not scopes <= _NOT_ABOUT_DATA,
        research_only=scopes & _ABOUT_DATA == {"research"},
        root=_root(parsed),
        opted_out=_policy(parsed) == "deny",
        provision=parsed.provision,
    )


def _check(consent: _Consent, scopes: set[str]) -> None:
    """Raise ValueError for what is well-formed JSON but cannot be relied upon."""
    if consent.status != "active" and consent.status not in _NOT_IN_FORCE:
        raise ValueError("unknown status")
    if not scopes or not scopes <= _ABOUT_DATA | _NOT_ABOUT_DATA:
        raise ValueError("unknown scope")
    if consent.implicit_rules:
        raise ValueError("modified meaning")
    if _patient(consent.patient.reference) is None:
        raise ValueError("no patient")
    if consent.provision is not None:
        _check_provision(consent.provision, depth=0)


def _check_modifiers(resource: object) -> None:
    """Raise ValueError if any part, an actor as well, says that it means something else."""
    stack = [resource]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if node.get("modifierExtension"):
                raise ValueError("modified meaning")
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)


def _check_provision(provision: _Provision, *, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    if depth and provision.type is None:
        raise ValueError("a nested provision without a type")
    for period in (provision.period, provision.data_period):
        if period is not None:
            _bounds(period)
    for nested in provision.provision:
        _check_provision(nested, depth=depth + 1)


def _unreadable(resource: object) -> Consent:
    raw = resource if isinstance(resource, dict) else {}
    patient = raw.get("patient")
    reference = patient.get("reference") if isinstance(patient, dict) else None
    status, name = raw.get("status"), raw.get("id")
    return Consent(
        id=name if isinstance(name, str) else "",
        patient=_patient(reference) if isinstance(reference, str) else None,
        in_force=not (isinstance(status, str) and status in _NOT_IN_FORCE),
        readable=False,
    )


def _root(consent: _Consent) -> Direction | None:
    """What holds where no provision says otherwise: the root's type, or else the policy rule."""
    if consent.provision is not None and consent.provision.type is not None:
        return consent.provision.type
    return _policy(consent)


def _policy(consent: _Consent) -> Direction | None:
    codes = consent.policy_rule.coding if consent.policy_rule else ()
    directions = {_RULES[coding.code] for coding in codes if coding.code in _RULES}
    return "deny" if "deny" in directions else next(iter(directions), None)


def _patient(reference: str) -> str | None:
    found = re.fullmatch(r"(?:.*/)?Patient/([A-Za-z0-9.-]{1,64})(?:/_history/[^/]+)?", reference)
    return found[1] if found else None


def judge(
    consents: Sequence[Consent],
    request: Request,
    *,
    codes: frozenset[tuple[str, str]] | None = None,
) -> ConsentVerdict:
    """What `consents` say to `request` (its own `context.consent` is not looked at).

    `codes` are (system, code) pairs of the record if they are known.
    """
    patient = request.resource.patient
    if patient is None:
        return ConsentVerdict()
    patient = _patient(patient) or patient
    if len(consents) > MAX_CONSENTS:
        return ConsentVerdict(unreadable=True)
    mine = [one for one in consents if one.in_force and one.patient in {patient, None}]
    answers = [(one, _answer(one, request, codes)) for one in mine if one.readable]
    denies = any(direction == "deny" for _, (direction, _) in answers)
    permits = not denies and any(direction == "permit" for _, (direction, _) in answers)
    authorised: frozenset[str] = frozenset()
    if permits:
        authorised = authorised.union(*(labels for _, (_, labels) in answers))
    return ConsentVerdict(
        permits=permits,
        denies=denies,
        unreadable=any(not one.readable for one in mine),
        authorises=authorised,
        consents=tuple(sorted(one.id for one, (direction, _) in answers if direction and one.id)),
    )


_Answer = tuple[Direction | None, frozenset[str]]
_SILENT: Final[_Answer] = (None, frozenset())


def _answer(consent: Consent, request: Request, codes: _Codes) -> _Answer:
    if consent.research_only and request.context.purpose != "HRESCH":
        return _SILENT
    if consent.provision is None:
        return consent.root, frozenset()
    answer = _provision(consent.provision, consent.root, request, codes)
    silent = answer[0] is None and _period(consent.provision.period, request.context.now)
    # "I opt out, but permit …": what lies outside the permission is what was opted out of.
    if silent and consent.opted_out and consent.root == "permit":
        return "deny", frozenset()
    return answer


def _provision(
    provision: _Provision, direction: Direction | None, request: Request, codes: _Codes
) -> _Answer:
    """The deepest provisions that match decide; a denial wins among those of one depth."""
    met = _met(provision, direction, request, codes)
    if met is False:
        return _SILENT
    nested = [_provision(one, one.type, request, codes) for one in provision.provision]
    if any(found == "deny" for found, _ in nested):
        return "deny", frozenset()
    permitted = [labels for found, labels in nested if found == "permit"]
    # An exception to what may not even apply permits nothing.
    if permitted and met:
        return "permit", frozenset().union(*permitted)
    if direction == "permit" and met is None:
        return _SILENT
    return direction, _authorised(provision) if direction == "permit" else frozenset()


# --- does a provision match? True, False, or None when it cannot be told --------------------------

_Codes = frozenset[tuple[str, str]] | None


def _met(
    provision: _Provision, direction: Direction | None, request: Request, codes: _Codes
) -> bool | None:
    answers = (
        _period(provision.period, request.context.now),
        _any(_actor(one, request) for one in provision.actor),
        _any(
            _action(coding, direction, request.action)
            for one in provision.action
            for coding in one.coding
        ),
        _labels(provision.security_label, direction, request),
        _any(_purpose(one, direction, request.context.purpose) for one in provision.purpose),
        _any(_class(one, request) for one in provision.class_),
        _code(provision.code, codes),
        None if provision.data_period is not None else True,
        _any(_data(one, request) for one in provision.data),
    )
    if False in answers:
        return False
    return None if None in answers else True


def _any(answers: Iterable[bool | None]) -> bool | None:
    """One of several suffices; none at all is no constraint."""
    found = list(answers)
    if not found or True in found:
        return True
    return None if None in found else False


def _period(period: _Period | None, now: float) -> bool:
    if period is None:
        return True
    start, end = _bounds(period)
    return start <= now <= end


def _actor(actor: _Actor, request: Request) -> bool | None:
    """Somebody else only if that can be told: who belongs to an organisation or a team cannot."""
    reference, principal = actor.reference.reference, request.principal
    mine = {principal.id, *principal.references}
    if reference in mine:
        return True
    kind, name = _target(reference)
    targets = {_target(one) for one in mine}
    known = kind in _PERSONS and any(kind == own for own, _ in targets)
    return False if known and (kind, name) not in targets else None


_PERSONS: Final = frozenset({"Practitioner", "Patient", "RelatedPerson"})


def _target(reference: str) -> tuple[str, str]:
    """Type and id of a reference, whatever server or version it names."""
    parts = reference.partition("/_history/")[0].rstrip("/").split("/")
    return (parts[-2], parts[-1]) if len(parts) > 1 else ("", reference)


#: http://terminology.hl7.org/CodeSystem/consentaction
_ACTIONS: Final[dict[str, frozenset[Action]]] = {
    "collect": frozenset({"create"}),
    "access": frozenset({"read", "history", "search", "count"}),
    "use": frozenset({"read", "history", "search", "count", "execute"}),
    "disclose": frozenset({"export", "disclose", "connect"}),
    "correct": frozenset({"update", "patch", "delete"}),
}


#: To refuse access or use is to refuse every way to come to see the record.
_SHOWING: Final[frozenset[Action]] = (
    _ACTIONS["use"] | _ACTIONS["disclose"] | frozenset({"update", "patch"})
)


def _action(
    coding: _Coding, direction: Direction | None, action: Action | StudyAction
) -> bool | None:
    covered = _ACTIONS.get(coding.code)
    if covered is not None and direction == "deny" and coding.code in {"access", "use"}:
        covered |= _SHOWING
    return None if covered is None else action in covered


_TREATMENT: Final[frozenset[Purpose]] = frozenset({"TREAT", "CAREMGT", "COORD"})
_EMERGENCY: Final[frozenset[Purpose]] = frozenset({"ETREAT", "BTG"})
# Below HOPERAT in the code system.
_OPERATIONS: Final[frozenset[Purpose]] = frozenset({"HSYSADMIN", "HLEGAL", "CAREMGT"})


def _purpose(coding: _Coding, direction: Direction | None, purpose: Purpose) -> bool | None:
    """Treatment includes its coordination; a refusal of it includes emergencies, too.

    Of a purpose that is finer than ours (a clinical trial within research) it cannot be told.
    """
    if coding.code == purpose:
        return True
    if coding.code == "TREAT" and purpose in _TREATMENT:
        return True
    if coding.code == "TREAT" and purpose in _EMERGENCY and direction == "deny":
        return True
    if coding.code == "HOPERAT" and purpose in _OPERATIONS and direction == "deny":
        return True
    return False if coding.code in PURPOSES else None


#: What a label in a permission reaches (42 CFR Part 2 is about substance use).
_REACH: Final[dict[str, frozenset[str]]] = {
    "SUD": frozenset({"SUD", "ETHUD", "42CFRPart2"}),
    "42CFRPart2": frozenset({"SUD", "ETHUD", "42CFRPart2"}),
}


def _reach(code: str) -> frozenset[str]:
    return _REACH.get(code, frozenset({code}) & frozenset(LABELS))


def _labels(
    labels: Sequence[_Coding], direction: Direction | None, request: Request
) -> bool | None:
    return _any(_label(one.code, direction, request) for one in labels)


def _label(code: str, direction: Direction | None, request: Request) -> bool | None:
    """A level permits records up to it and denies records from it on; a label means itself."""
    resource = request.resource
    for rank, level in enumerate(CONFIDENTIALITY):
        if level == code:
            own = CONFIDENTIALITY.index(resource.confidentiality)
            return own >= rank if direction == "deny" else own <= rank
    reach = _reach(code)
    return bool(reach & resource.labels) if reach else None


def _authorised(provision: _Provision) -> frozenset[str]:
    reached = (_reach(one.code) for one in provision.security_label)
    return frozenset().union(*reached)


def _class(coding: _Coding, request: Request) -> bool | None:
    if coding.system.rstrip("/").endswith("resource-types"):
        return coding.code == request.resource.type
    return None


def _code(concepts: Sequence[_Concept], codes: _Codes) -> bool | None:
    if not concepts:
        return True
    if codes is None:
        return None
    listed = {(coding.system, coding.code) for one in concepts for coding in one.coding}
    return None if not listed else not listed.isdisjoint(codes)


def _data(data: _Data, request: Request) -> bool | None:
    if data.meaning != "instance" or not data.reference.reference or request.resource.id is None:
        return None
    reference, mine = data.reference.reference, (request.resource.type, request.resource.id)
    if reference == "/".join(mine):
        return True
    return None if _target(reference) == mine else False


# --- FHIR dates ----------------------------------------------------------------------------------

_DATE = re.compile(r"(\d{4})(?:-(\d{2})(?:-(\d{2}))?)?").fullmatch


def _bounds(period: _Period) -> tuple[float, float]:
    """First and last instant of a period. Raises ValueError for what is not a FHIR dateTime."""
    start = float("-inf") if period.start is None else _instants(period.start)[0]
    end = float("inf") if period.end is None else _instants(period.end)[1]
    if start > end:
        raise ValueError("a period that ends before it starts")
    return start, end


def _instants(text: str) -> tuple[float, float]:
    partial = _DATE(text)
    if partial is None:
        if "T" not in text:
            raise ValueError("not a FHIR dateTime")
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return moment.timestamp(), moment.timestamp()
    year, month, day = int(partial[1]), partial[2], partial[3]
    first = datetime(year, int(month or 1), int(day or 1), tzinfo=UTC)
    last_month = int(month or 12)
    last_day = int(day) if day else calendar.monthrange(year, last_month)[1]
    last = datetime(year, last_month, last_day, tzinfo=UTC)
    if last.date() == date.max:  # how many systems write "for ever"
        return first.timestamp(), float("inf")
    last += timedelta(days=1)
    return first.timestamp(), last.timestamp() - 0.001
