"""FHIR R4 AuditEvents after IHE Basic Audit Log Patterns 1.1 (profiles.ihe.net/ITI/BALP), NDJSON.

One event for each patient of an exchange, and beside it one for the consent decision and one for a
broken glass. Comes after `audit.search`. Three things that a reader should know:

- BALP profiles only what succeeded. What did not is exported in the same shape with outcome 4
  (refused), 8 (failed or broken off) or 12 (announced, and no outcome in the log), without a
  profile in `meta`.
- BALP wants the raw search request. The log never holds it, because it may name people: the query
  says service and type, and nothing that was asked for.
- A sealed person is a reference by identifier of the system `urn:havengate:sealed`. Persons touched
  that are not patients can only be told from them once names are opened.
"""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING, Any, Final

import msgspec

from audit.export.csv import rfc3339
from audit.search import ERASED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from audit.search import Exchange, Names

PROFILES: Final = "https://profiles.ihe.net/ITI/BALP/StructureDefinition/IHE.BasicAudit."
DCM: Final = "http://dicom.nema.org/resources/ontology/DCM"
EVENT_TYPE: Final = "http://terminology.hl7.org/CodeSystem/audit-event-type"
INTERACTION: Final = "http://hl7.org/fhir/restful-interaction"
LIFECYCLE: Final = "http://terminology.hl7.org/CodeSystem/iso-21089-lifecycle"
PARTICIPATION: Final = "http://terminology.hl7.org/CodeSystem/v3-ParticipationType"
ENTITY_TYPE: Final = "http://terminology.hl7.org/CodeSystem/audit-entity-type"
ENTITY_ROLE: Final = "http://terminology.hl7.org/CodeSystem/object-role"
TRANSACTION: Final = "https://profiles.ihe.net/ITI/BALP/CodeSystem/BasicAuditEntityType"
AUTHORIZATION: Final = "https://profiles.ihe.net/ITI/BALP/CodeSystem/AuthZsubType"
RESOURCE_TYPES: Final = "http://hl7.org/fhir/resource-types"
REASON: Final = "http://terminology.hl7.org/CodeSystem/v3-ActReason"
SEALED: Final = "urn:havengate:sealed"
ACTION: Final = "urn:havengate:audit-action"

_CONFIDENTIALITY = "http://terminology.hl7.org/CodeSystem/v3-Confidentiality"
_SENSITIVITY = "http://terminology.hl7.org/CodeSystem/v3-ActCode"
_SOURCE, _DESTINATION = (DCM, "110153", "Source Role ID"), (DCM, "110152", "Destination Role ID")
_APPLICATION = (DCM, "110150", "Application")
_CUSTODIAN = (
    "http://terminology.hl7.org/CodeSystem/provenance-participant-type", "custodian", "Custodian",
)  # fmt: skip
_RECIPIENT = (PARTICIPATION, "IRCP", "information recipient")
_AUTHOR = (PARTICIPATION, "AUT", "author (originator)")
_SERVER_SOURCE = ("http://terminology.hl7.org/CodeSystem/security-source-type", "4")
#: Action code, subtype, BALP profile, and the types of client, server and user.
_Roles = tuple[str, str, str, tuple[str, str, str], tuple[str, str, str], tuple[str, str, str]]
_REST: dict[str, _Roles] = {
    "read": ("R", "read", "Read", _DESTINATION, _SOURCE, _RECIPIENT),
    "history": ("R", "history", "", _DESTINATION, _SOURCE, _RECIPIENT),
    "create": ("C", "create", "Create", _SOURCE, _DESTINATION, _AUTHOR),
    "update": ("U", "update", "Update", _SOURCE, _DESTINATION, _AUTHOR),
    "patch": ("U", "patch", "Update", _SOURCE, _DESTINATION, _AUTHOR),
    "delete": ("D", "delete", "Delete", _APPLICATION, _CUSTODIAN, _AUTHOR),
    # BALP: parameters flow from client to server, although the data flows back.
    "search": ("E", "search", "Query", _SOURCE, _DESTINATION, _RECIPIENT),
    "execute": ("E", "operation", "", _SOURCE, _DESTINATION, _RECIPIENT),
}
#: What is no REST interaction: type, subtype and action code.
_EXPORT, _DISCLOSE = (DCM, "110106", "Export"), (LIFECYCLE, "disclose", "Disclose Record")
_SIGN_IN = (DCM, "110114", "User Authentication")
_OTHERS = {
    "export": (_EXPORT, _DISCLOSE, "R"),
    "disclose": (_EXPORT, _DISCLOSE, "R"),
    "connect": ((LIFECYCLE, "transmit", "Transmit Record"), None, "E"),
    "login": (_SIGN_IN, (DCM, "110122", "Login"), "E"),
    "logout": (_SIGN_IN, (DCM, "110123", "Logout"), "E"),
    "stepup": (_SIGN_IN, None, "E"),
}
_ALERT = (DCM, "110113", "Security Alert")
_ACTIVITY = (DCM, "110100", "Application Activity")
_OUTCOMES = {"success": "0", "denied": "4", "failed": "8", "aborted": "8"}


class BALP:
    """`audit.export.Format`."""

    name = "balp"

    def head(self) -> bytes:
        """Return nothing: NDJSON has no head."""
        return b""

    def rows(self, exchange: Exchange, names: Names | None, origin: str) -> Iterator[bytes]:
        """Yield one event for each patient, or one if no patient was touched."""
        view = _View(exchange, names, origin)
        for number, patient in enumerate(view.patients() or [None]):
            for suffix, event in view.events(patient):
                event["id"] = f"{exchange.log_index}-{number}{suffix}"
                yield msgspec.json.encode(event) + b"\n"


class _View:
    """One exchange as FHIR sees it."""

    def __init__(self, exchange: Exchange, names: Names | None, origin: str) -> None:
        self._entry = exchange.newest
        self._ended = exchange.ended
        self._names = names
        self._observer = {
            "identifier": {"system": "urn:ietf:rfc:3986", "value": f"https://{origin}"}
        }

    def patients(self) -> list[dict[str, Any] | None]:
        """References to the patients; opened persons of other kinds are left out."""
        if self._names is None:
            return [_sealed(text, "Patient") for text in self._entry.patients]
        opened = [name for name in self._names.patients if _kind(name) in {"Patient", ""}]
        return [_person(name, "Patient") for name in opened]

    def events(self, patient: dict[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Events about one patient, each with the ending of its id."""
        entry = self._entry
        yield "", self._main(patient)
        if entry.consent is not None and entry.decision in {"allow", "deny"}:
            yield "-consent", self._consent(patient, entry.consent)
        if entry.break_glass is not None:
            yield "-override", self._override(patient, entry.break_glass)

    def _main(self, patient: dict[str, Any] | None) -> dict[str, Any]:
        entry = self._entry
        if entry.action in _REST:
            return self._rest(patient, _REST[entry.action])
        kind, subtype, action = _OTHERS.get(entry.action, (_ACTIVITY, None, "E"))
        event = self._event(kind, subtype or (ACTION, entry.action, entry.action), action)
        disclosure = subtype is _DISCLOSE
        client, server = (_DESTINATION, _SOURCE) if disclosure else (_APPLICATION, _CUSTODIAN)
        event["agent"] = self._agents(client, server, _RECIPIENT)
        if disclosure:
            # BALP: the source of a disclosure is the one that recorded it.
            event["agent"][1]["who"] = self._observer
            if patient is not None and event["outcome"] == "0":
                event["meta"] = {"profile": [PROFILES + "PrivacyDisclosure.Source"]}
        data = [_entity(what, (ENTITY_TYPE, "2"), "3") for what in self._data(None)]
        event["entity"] = [self._transaction(), *_patient_entity(patient), *data]
        return event

    def _rest(self, patient: dict[str, Any] | None, roles: _Roles) -> dict[str, Any]:
        action, subtype, profile, client, server, user = roles
        event = self._event(
            (EVENT_TYPE, "rest", "Restful Operation"), (INTERACTION, subtype, subtype), action
        )
        event["agent"] = self._agents(client, server, user)
        entities = [self._transaction(), *_patient_entity(patient)]
        whats = self._data(patient)
        if subtype == "search":
            entities.append(self._query())
        else:
            first = _entity(whats.pop(0), (ENTITY_TYPE, "2"), "4")
            labels = [_label(code) for code in self._entry.labels]
            entities.append(first | ({"securityLabel": labels} if labels else {}))
        if subtype == "delete":
            # BALP closes the list of entities and agents' policies for what is deleted.
            entities = entities[1:]
            event["agent"] = [{k: v for k, v in a.items() if k != "policy"} for a in event["agent"]]
        else:
            # A slice takes one of its type: the others are told by the type of the resource.
            entities += [
                _entity(what, (RESOURCE_TYPES, what["type"]), "4")
                for what in whats
                if "type" in what
            ]
        event["entity"] = entities
        if profile and event["outcome"] == "0":
            event["meta"] = {"profile": [f"{PROFILES}{'Patient' if patient else ''}{profile}"]}
        return event

    def _consent(self, patient: dict[str, Any] | None, consent: str) -> dict[str, Any]:
        subtype = (AUTHORIZATION, "AuthZ-Consent", "Authorization Decision using Roles and Consent")
        event = self._event(_ALERT, subtype, "E")
        permit = self._entry.decision == "allow"
        event["outcome"] = "0" if permit else "8"
        event["outcomeDesc"] = "permit" if permit else f"deny {self._entry.reason or ''}".strip()
        client, _, *user = self._agents(_APPLICATION, _CUSTODIAN, _RECIPIENT)
        organization = ("http://terminology.hl7.org/CodeSystem/v3-RoleClass", "PROV", "provider")
        server = (
            "http://terminology.hl7.org/CodeSystem/extra-security-role-type",
            "authserver",
            "authorization server",
        )
        event["agent"] = [
            client,
            *user,
            _agent(organization, {"identifier": {"value": self._entry.tenant}}),
            _agent(server, self._observer),
        ]
        event["entity"] = [
            *_patient_entity(patient),
            {"type": _coding((RESOURCE_TYPES, "Consent")), "what": {"reference": consent}},
        ]
        if patient is not None and user:
            event["meta"] = {"profile": [PROFILES + "AuthZconsent"]}
        return event

    def _override(self, patient: dict[str, Any] | None, reason: str) -> dict[str, Any]:
        event = self._event(_ALERT, (DCM, "110127", "Emergency Override Started"), "E")
        event["outcomeDesc"] = reason
        event["agent"] = self._agents(_APPLICATION, _CUSTODIAN, _RECIPIENT)
        event["entity"] = [self._transaction(), *_patient_entity(patient)]
        return event

    def _event(
        self, kind: tuple[str, str, str], subtype: tuple[str, str, str], action: str
    ) -> dict[str, Any]:
        """Return what all events share."""
        entry = self._entry
        event: dict[str, Any] = {
            "resourceType": "AuditEvent",
            "type": _coding(kind),
            "subtype": [_coding(subtype)],
            "action": action,
            "recorded": rfc3339(entry.time),
            "outcome": self._outcome(),
            "source": {
                "site": entry.tenant,
                "observer": self._observer,
                "type": [_coding(_SERVER_SOURCE)],
            },
        }
        if entry.reason is not None:
            event["outcomeDesc"] = entry.reason
        elif not self._ended:
            event["outcomeDesc"] = "no outcome in the log"
        if entry.purpose is not None:
            event["purposeOfEvent"] = [_concept((REASON, entry.purpose))]
        return event

    def _outcome(self) -> str:
        if self._entry.outcome is not None:
            return _OUTCOMES[self._entry.outcome]
        if not self._ended:
            return "12"
        return "4" if self._entry.decision == "deny" else "0"

    def _agents(
        self, client: tuple[str, str, str], server: tuple[str, str, str], user: tuple[str, str, str]
    ) -> list[dict[str, Any]]:
        entry, actor = self._entry, self._entry.actor
        personal = actor.sealed is not None
        client_name = actor.name or "unrecorded"
        agents = [
            _agent(client, {"identifier": {"value": client_name}}, requestor=not personal)
            | {"network": self._network()},
            _agent(server, {"identifier": {"value": entry.service or "havengate"}})
            | {"network": {"address": entry.service or "havengate", "type": "1"}},
        ]
        if personal:
            agents.append(self._user(user))
        return agents

    def _user(self, kind: tuple[str, str, str]) -> dict[str, Any]:
        entry, actor = self._entry, self._entry.actor
        who = _sealed(actor.sealed or "", None)
        if self._names is not None:
            who = _person(self._names.actor or ERASED, None)
        agent = _agent(kind, who, requestor=True)
        if actor.role is not None:
            agent["role"] = [{"coding": [{"system": "urn:havengate:role", "code": actor.role}]}]
        if entry.purpose is not None:
            agent["purposeOfUse"] = [_concept((REASON, entry.purpose))]
        if entry.rules:
            agent["policy"] = [f"urn:havengate:policy:{rule}" for rule in entry.rules]
        return agent

    def _network(self) -> dict[str, str]:
        address = self._names.client if self._names is not None else self._entry.client
        if address is None:
            return {"address": "unrecorded"}
        clear = address != ERASED and not address.startswith("hg1.")
        return {"address": address, "type": "2"} if clear else {"address": address}

    def _data(self, patient: dict[str, Any] | None) -> list[dict[str, Any]]:
        """References to what was touched; never empty."""
        whats = [
            {"reference": f"{one.type}/{one.id}", "type": one.type}
            if one.id
            else patient
            if one.type == "Patient" and patient is not None
            else {"type": one.type, "display": one.type}
            for one in self._entry.resources
        ]
        return whats or [{"display": self._entry.service or self._entry.action}]

    def _query(self) -> dict[str, Any]:
        types = ",".join(one.type for one in self._entry.resources if one.id is None)
        path = f"{self._entry.service or 'havengate'}/{types}"
        return {
            "type": _coding((ENTITY_TYPE, "2", "System Object")),
            "role": _coding((ENTITY_ROLE, "24", "Query")),
            "query": b64encode(path.encode()).decode(),
        }

    def _transaction(self) -> dict[str, Any]:
        return {
            "type": _coding((TRANSACTION, "XrequestId")),
            "what": {"identifier": {"value": self._entry.request}},
        }


def _coding(parts: Sequence[str]) -> dict[str, str]:
    return dict(zip(("system", "code", "display"), parts, strict=False))


def _concept(parts: Sequence[str]) -> dict[str, Any]:
    return {"coding": [_coding(parts)]}


def _agent(kind: Sequence[str], who: dict[str, Any], *, requestor: bool = False) -> dict[str, Any]:
    return {"type": _concept(kind), "who": who, "requestor": requestor}


def _entity(what: dict[str, Any], kind: Sequence[str], role: str) -> dict[str, Any]:
    return {"what": what, "type": _coding(kind), "role": _coding((ENTITY_ROLE, role))}


def _patient_entity(patient: dict[str, Any] | None) -> list[dict[str, Any]]:
    if patient is None:
        return []
    kind, role = (ENTITY_TYPE, "1", "Person"), (ENTITY_ROLE, "1", "Patient")
    return [{"what": patient, "type": _coding(kind), "role": _coding(role)}]


def _label(code: str) -> dict[str, Any]:
    return _coding((_CONFIDENTIALITY if code in {*"ULMNRV"} else _SENSITIVITY, code))


def _sealed(text: str, kind: str | None) -> dict[str, Any]:
    reference: dict[str, Any] = {"identifier": {"system": SEALED, "value": text}}
    return reference | ({"type": kind} if kind else {})


def _kind(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def _person(name: str, kind: str | None) -> dict[str, Any]:
    if name == ERASED:
        return {"display": ERASED} | ({"type": kind} if kind else {})
    if _kind(name):
        return {"reference": name, "type": _kind(name)}
    return {"identifier": {"value": name}} | ({"type": kind} if kind else {})
