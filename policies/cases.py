"""Requests and test cases written as TOML, ours for the built-in rules and a clinic's own.

A file has `[who.NAME]` tables for persons and `[[case]]` entries:

    [who.therapist]
    id = "t1"
    roles = ["clinician"]
    second_factor_age_s = 60
    care_team = ["p1"]

    [[case]]
    name = "a therapist reads an observation of her patient"
    expect = "allow"
    decides = "role.clinician.read"
    action = "read"
    principal = {who = "therapist"}
    resource = {type = "Observation", patient = "p1"}

`decides` names a rule that must be among those that decided. Times are ages in seconds, so that a
case does not grow old. An unknown key is an error: a misspelt one would test nothing.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from policies.engine import Engine
from policies.errors import CaseError, MalformedRequestError, PolicyConfigurationError
from policies.model import (
    Action,
    Allowed,
    Assurance,
    BreakGlass,
    Capacity,
    Confidentiality,
    ConsentVerdict,
    Context,
    Decision,
    Destination,
    Principal,
    PrincipalKind,
    Purpose,
    RemedyKind,
    Request,
    Resource,
    ServiceKind,
    StudyAction,
    StudyStanding,
)

BUILT_IN: Final = Path(__file__).with_name("cases")
#: When cases happen. Only differences of times matter to the rules.
NOW: Final = 1_800_000_000.0


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class _Who(_Table, frozen=True, kw_only=True):
    kind: PrincipalKind = "user"
    id: str = "somebody"
    roles: frozenset[str] = frozenset()
    second_factor_age_s: float | None = None
    patient: str | None = None
    represents: frozenset[str] = frozenset()
    care_team: frozenset[str] = frozenset()
    references: frozenset[str] = frozenset()
    scopes: frozenset[str] | None = None
    purposes: frozenset[Purpose] = frozenset()


class _Host(_Table, frozen=True, kw_only=True):
    host: str
    listed_for: frozenset[Purpose] = frozenset()
    encrypted: bool = True


class _Study(_Table, frozen=True, kw_only=True):
    capacity: Capacity = "none"
    own_site: bool = False
    proposed_by_self: bool = False
    spoken_by_self: bool = False
    approved: bool = False


class _What(_Table, frozen=True, kw_only=True):
    type: str
    kind: ServiceKind = "ehr"
    service: str = ""
    id: str | None = None
    patient: str | None = None
    author: str | None = None
    labels: frozenset[str] = frozenset()
    confidentiality: Confidentiality = "N"
    destination: _Host | None = None
    study: _Study | None = None


class _Grant(_Table, frozen=True, kw_only=True):
    reason: str
    patients: frozenset[str]
    begun_s_ago: float = 60
    lasts_s: float = 3600


class _Said(_Table, frozen=True, kw_only=True):
    permits: bool = False
    denies: bool = False
    unreadable: bool = False
    authorises: frozenset[str] = frozenset()


class _Circumstances(_Table, frozen=True, kw_only=True):
    purpose: Purpose = "TREAT"
    client: str = ""
    break_glass: _Grant | None = None
    consent: _Said = _Said()


class _Question(_Table, frozen=True, kw_only=True):
    action: Action | StudyAction
    principal: _Who
    resource: _What
    context: _Circumstances = _Circumstances()


class _Expected(_Question, frozen=True, kw_only=True):
    name: str
    expect: Literal["allow", "deny"]
    decides: str = ""
    remedy: RemedyKind | None = None
    obligations: frozenset[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A request with what must come of it. `obligations` are the names of their kinds."""

    name: str
    where: str
    request: Request
    expect: Literal["allow", "deny"]
    decides: str
    remedy: RemedyKind | None
    obligations: frozenset[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """A case as it turned out. `problem` is empty if it turned out as expected."""

    case: Case
    decision: Decision
    problem: str


def parse_request(text: str) -> Request:
    """Read one request: a TOML file with `action`, `[principal]`, `[resource]`, `[context]`.

    Raises `MalformedRequestError`.
    """
    try:
        return _request(msgspec.convert(tomllib.loads(text), _Question, strict=False))
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise MalformedRequestError(f"This is not a request: {error}.") from error


def load_cases(directories: Iterable[Path]) -> list[Case]:
    """Read all cases of all `*.toml` files. Raises `CaseError` or `PolicyConfigurationError`."""
    cases: list[Case] = []
    for folder in directories:
        if not folder.is_dir():
            raise PolicyConfigurationError(
                f"There is no folder {folder}. Make it, or correct policies.cases_directory."
            )
        for file in sorted(folder.glob("*.toml")):
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CaseError(f"Cannot read {file} as UTF-8 text.") from error
            cases += parse_cases(text, where=str(file))
    return cases


def parse_cases(text: str, *, where: str) -> list[Case]:
    """Read the cases of one file. Raises `CaseError`."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CaseError(f"{where} is not TOML: {error}.") from error
    extra = set(raw) - {"who", "case"}
    if extra:
        raise CaseError(f"{where}: unknown key “{min(extra)}”; expected [who.NAME] and [[case]].")
    return [
        _case(one, raw.get("who", {}), f"{where}, case {number}")
        for number, one in enumerate(raw.get("case", []), start=1)
    ]


def _case(raw: Mapping[str, Any], who: Mapping[str, Any], where: str) -> Case:
    try:
        expected = msgspec.convert(_with_person(raw, who), _Expected, strict=False)
    except (msgspec.ValidationError, KeyError, TypeError) as error:
        raise CaseError(f"{where}: {error}.") from error
    return Case(
        name=expected.name,
        where=where,
        request=_request(expected),
        expect=expected.expect,
        decides=expected.decides,
        remedy=expected.remedy,
        obligations=expected.obligations,
    )


def _with_person(raw: Mapping[str, Any], who: Mapping[str, Any]) -> dict[str, Any]:
    """Replace `who = "name"` by that person; what stands beside it overrides."""
    principal = dict(raw.get("principal", {}))
    name = principal.pop("who", None)
    if name is None:
        return dict(raw)
    if name not in who:
        raise KeyError(f"there is no [who.{name}]")
    return {**raw, "principal": {**who[name], **principal}}


def _request(asked: _Question) -> Request:
    return Request(
        principal=_principal(asked.principal),
        action=asked.action,
        resource=_resource(asked.resource),
        context=_context(asked.context),
    )


def _principal(who: _Who) -> Principal:
    age_s = who.second_factor_age_s
    shown = (
        Assurance(second_factor="totp", second_factor_at=NOW - age_s) if age_s is not None else None
    )
    return Principal(
        kind=who.kind,
        id=who.id,
        roles=who.roles,
        assurance=shown or Assurance(),
        patient=who.patient,
        represents=who.represents,
        care_team=who.care_team,
        references=who.references,
        scopes=who.scopes,
        purposes=who.purposes,
    )


def _resource(what: _What) -> Resource:
    host = what.destination
    return Resource(
        service=what.service or what.kind,
        kind=what.kind,
        type=what.type,
        id=what.id,
        patient=what.patient,
        author=what.author,
        labels=what.labels,
        confidentiality=what.confidentiality,
        destination=None
        if host is None
        else Destination(host=host.host, listed_for=host.listed_for, encrypted=host.encrypted),
        study=None if what.study is None else _standing(what.study),
    )


def _standing(study: _Study) -> StudyStanding:
    return StudyStanding(
        capacity=study.capacity,
        own_site=study.own_site,
        proposed_by_self=study.proposed_by_self,
        spoken_by_self=study.spoken_by_self,
        approved=study.approved,
    )


def _context(given: _Circumstances) -> Context:
    grant, said = given.break_glass, given.consent
    begun_at = NOW - grant.begun_s_ago if grant else 0.0
    return Context(
        purpose=given.purpose,
        now=NOW,
        client=given.client,
        break_glass=None
        if grant is None
        else BreakGlass(
            reason=grant.reason,
            patients=grant.patients,
            begins_at=begun_at,
            ends_at=begun_at + grant.lasts_s,
        ),
        consent=ConsentVerdict(
            permits=said.permits,
            denies=said.denies,
            unreadable=said.unreadable,
            authorises=said.authorises,
        ),
    )


def run_cases(engine: Engine, cases: Sequence[Case]) -> list[CaseResult]:
    """Decide every case; none stops the others."""
    results = []
    for case in cases:
        decision = engine.decide(case.request)
        results.append(CaseResult(case=case, decision=decision, problem=_problem(case, decision)))
    return results


def _problem(case: Case, decision: Decision) -> str:
    answer = "allow" if isinstance(decision, Allowed) else "deny"
    if answer != case.expect:
        by = ", ".join(decision.rules) or "no rule"
        return f"expected {case.expect}, found {answer} by {by}"
    if case.decides and case.decides not in decision.rules:
        return f"expected {case.decides} to decide, found {', '.join(decision.rules) or 'no rule'}"
    if isinstance(decision, Allowed):
        found = frozenset(type(one).__name__ for one in decision.obligations)
        if case.obligations is not None and case.obligations != found:
            return f"expected obligations {sorted(case.obligations)}, found {sorted(found)}"
    elif case.remedy is not None and case.remedy != decision.remedy.kind:
        return f"expected remedy {case.remedy}, found {decision.remedy.kind}"
    return ""
