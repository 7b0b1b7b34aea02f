"""BALP: every event is valid FHIR, has its profile's slices, names only whoever was opened."""

from __future__ import annotations

import json
from base64 import b64decode
from typing import Any

import pytest
from fhir.resources.R4B.auditevent import AuditEvent
from hypothesis import given
from hypothesis import strategies as st

from audit.export.balp import BALP, DCM, ENTITY_ROLE, ENTITY_TYPE, PARTICIPATION, PROFILES, SEALED
from audit.model import ACTIONS, OUTCOMES, Actor, Entry, Resource
from audit.search import ERASED, Exchange, Names
from tests.audit.records import OTHER, make_entry
from tests.audit.records import SEALED as ACTOR

ORIGIN = "clinic.example/log"
#: After AUDIT_FORMATS.md and BALP 1.1: action, subtype, type of client, server and user.
TABLE = {
    "read": ("R", "read", "110152", "110153", "IRCP", "Read"),
    "create": ("C", "create", "110153", "110152", "AUT", "Create"),
    "update": ("U", "update", "110153", "110152", "AUT", "Update"),
    "patch": ("U", "patch", "110153", "110152", "AUT", "Update"),
    "delete": ("D", "delete", "110150", "custodian", "AUT", "Delete"),
    # The parameters flow from the client: StructureDefinition IHE.BasicAudit.Query.
    "search": ("E", "search", "110153", "110152", "IRCP", "Query"),
}


def events(entry: Entry, names: Names | None = None) -> list[dict[str, Any]]:
    pairs = [(7, make_entry())] if entry.stage == "outcome" else []
    exchange = Exchange.of([*pairs, (9, entry)])
    lines = list(BALP().rows(exchange, names, ORIGIN))
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines)
    found = [json.loads(line) for line in lines]
    for event in found:
        # Fails on anything that FHIR R4 does not know or misses.
        AuditEvent.model_validate(event)
    return found


def outcome(**changes: Any) -> Entry:
    return make_entry("outcome", **changes)


def agent(event: dict[str, Any], code: str) -> dict[str, Any]:
    (found,) = [a for a in event["agent"] if a["type"]["coding"][0]["code"] == code]
    return dict(found)


def entities(event: dict[str, Any], system: str, code: str) -> list[dict[str, Any]]:
    return [
        e for e in event["entity"] if (e["type"]["system"], e["type"]["code"]) == (system, code)
    ]


@pytest.mark.parametrize("action", TABLE)
def test_rest_interactions_have_the_slices_of_their_profile(action: str) -> None:
    code, subtype, client, server, user, profile = TABLE[action]
    (event,) = events(outcome(action=action, client=ACTOR))
    assert event["meta"]["profile"] == [f"{PROFILES}Patient{profile}"]
    assert event["type"]["code"] == "rest"
    assert [s["code"] for s in event["subtype"]] == [subtype]
    assert event["action"] == code
    assert event["outcome"] == "0"
    assert event["recorded"].endswith("Z")
    assert len(event["agent"]) == 3
    for kind in (client, server):
        one = agent(event, kind)
        assert one["who"]
        assert one["network"]["address"]
        assert one["requestor"] is False
        assert "media" not in one
    person = agent(event, user)
    assert person["type"]["coding"][0]["system"] == PARTICIPATION
    assert person["requestor"] is True
    assert person["who"]["identifier"] == {"system": SEALED, "value": ACTOR}
    assert person["role"][0]["coding"][0]["code"] == "clinician"
    assert person["purposeOfUse"][0]["coding"][0]["code"] == "TREAT"
    assert "network" not in person
    (patient,) = entities(event, ENTITY_TYPE, "1")
    assert patient["role"] == {"system": ENTITY_ROLE, "code": "1", "display": "Patient"}
    assert patient["what"]["type"] == "Patient"
    assert patient["what"]["identifier"]["value"] == OTHER
    (data,) = entities(event, ENTITY_TYPE, "2")
    if action == "search":
        assert data["role"]["code"] == "24"
        assert "what" not in data
        assert b64decode(data["query"]).decode().startswith("ehr/")
    else:
        assert data["role"]["code"] in {"3", "4", "20"}
        assert data["what"]["reference"] == "Observation/obs-1"
    if action == "delete":
        # Both lists are closed for what is deleted.
        assert len(event["entity"]) == 2
        assert all("policy" not in a for a in event["agent"])
    else:
        (transaction,) = [e for e in event["entity"] if e["type"]["code"] == "XrequestId"]
        assert transaction["what"]["identifier"]["value"] == "req-1"
    assert event["source"]["observer"]["identifier"]["value"] == f"https://{ORIGIN}"


def test_there_is_one_event_for_each_patient_with_an_id_of_its_own() -> None:
    patients = tuple(f"hg1.{n:012d}.{'p' * 60}" for n in range(5))
    found = events(outcome(action="search", patients=patients))
    assert [e["entity"][1]["what"]["identifier"]["value"] for e in found] == list(patients)
    assert [e["id"] for e in found] == [f"9-{n}" for n in range(5)]


def test_an_exchange_without_patients_is_one_event_of_the_plain_profile() -> None:
    (event,) = events(outcome(patients=()))
    assert event["meta"]["profile"] == [PROFILES + "Read"]
    assert entities(event, ENTITY_TYPE, "1") == []


def test_several_resources_keep_the_data_slice_single() -> None:
    resources = tuple(Resource(type="Observation", id=f"o{n}") for n in range(3))
    (event,) = events(outcome(resources=resources))
    assert len(entities(event, ENTITY_TYPE, "2")) == 1
    told = [e["what"]["reference"] for e in event["entity"] if "reference" in e.get("what", {})]
    assert told == ["Observation/o0", "Observation/o1", "Observation/o2"]


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        (outcome(outcome="denied", decision="deny", reason="consent-missing"), "4"),
        (outcome(outcome="failed", status=502), "8"),
        (outcome(outcome="aborted"), "8"),
        (make_entry(), "12"),
    ],
)
def test_failures_carry_their_code_and_claim_no_profile(entry: Entry, code: str) -> None:
    (event,) = events(entry)
    assert event["outcome"] == code
    assert "meta" not in event
    if code == "12":
        assert event["outcomeDesc"] == "no outcome in the log"


@pytest.mark.parametrize(("decision", "code"), [("allow", "0"), ("deny", "8")])
def test_a_decision_by_consent_is_an_event_of_its_own(decision: str, code: str) -> None:
    result = "success" if decision == "allow" else "denied"
    _, event = events(outcome(consent="Consent/c1", decision=decision, outcome=result))
    assert event["meta"]["profile"] == [PROFILES + "AuthZconsent"]
    assert (event["type"]["system"], event["type"]["code"]) == (DCM, "110113")
    assert event["subtype"][0]["code"] == "AuthZ-Consent"
    assert (event["action"], event["outcome"]) == ("E", code)
    assert {a["type"]["coding"][0]["code"] for a in event["agent"]} == {
        "110150",
        "IRCP",
        "PROV",
        "authserver",
    }
    assert agent(event, "authserver")["who"] == event["source"]["observer"]
    assert [e["type"]["code"] for e in event["entity"]] == ["1", "Consent"]
    assert event["entity"][1]["what"]["reference"] == "Consent/c1"


def test_a_broken_glass_is_an_event_of_its_own() -> None:
    _, event = events(outcome(break_glass="imminent-danger", purpose="BTG"))
    assert event["type"]["code"] == "110113"
    assert event["subtype"][0] == {
        "system": DCM,
        "code": "110127",
        "display": "Emergency Override Started",
    }
    assert event["outcomeDesc"] == "imminent-danger"


@pytest.mark.parametrize("action", ["disclose", "export"])
def test_a_disclosure_names_source_and_recipient(action: str) -> None:
    (event,) = events(outcome(action=action))
    assert event["meta"]["profile"] == [PROFILES + "PrivacyDisclosure.Source"]
    assert (event["type"]["code"], event["action"]) == ("110106", "R")
    assert event["subtype"][0]["code"] == "disclose"
    assert agent(event, "110153")["who"] == event["source"]["observer"]
    assert agent(event, "110152")["network"]
    assert len(event["entity"]) >= 2


def test_opened_names_are_references_and_erased_persons_are_said_to_be() -> None:
    names = Names(
        actor="Practitioner/ada",
        client="192.0.2.7",
        patients=("Patient/bob", ERASED, "RelatedPerson/mum"),
    )
    found = events(outcome(patients=(OTHER,) * 3, client=ACTOR), names)
    assert [e["entity"][1]["what"] for e in found] == [
        {"reference": "Patient/bob", "type": "Patient"},
        {"display": ERASED, "type": "Patient"},
    ]
    assert agent(found[0], "IRCP")["who"]["reference"] == "Practitioner/ada"
    assert agent(found[0], "110152")["network"] == {"address": "192.0.2.7", "type": "2"}


@given(
    st.sampled_from(sorted(ACTIONS)),
    st.sampled_from(sorted(OUTCOMES)),
    st.sampled_from(["person", "service", "device", "anonymous", "system"]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.booleans(),
)
def test_every_entry_is_valid_fhir(
    action: str, result: str, kind: str, patients: int, resources: int, more: object
) -> None:
    personal, named = kind in {"person", "device"}, kind in {"service", "system"}
    entry = outcome(
        action=action,
        outcome=result,
        actor=Actor(
            kind=kind,  # type: ignore[arg-type] # one of the kinds
            sealed=ACTOR if personal else None,
            name="sync" if named else None,
        ),
        client=ACTOR if personal else "192.0.2.1",
        patients=(OTHER,) * patients,
        resources=tuple(Resource(type="Patient") for _ in range(resources)),
        consent="Consent/c" if more else None,
        break_glass="danger" if more else None,
        purpose="TREAT" if more else None,
        labels=("R", "PSY") if more else (),
    )
    found = events(entry)
    assert len(found) == max(1, patients) * (3 if more else 1)
    for event in found:
        assert sum(a["requestor"] for a in event["agent"]) <= 1
        assert len({json.dumps(a["type"]) for a in event["agent"]}) == len(event["agent"])


def test_the_log_about_itself_is_valid_fhir() -> None:
    (event,) = events(
        make_entry(
            "log",
            action="log.prune",
            actor=Actor(kind="system", name="havengate"),
            patients=(),
            resources=(),
            labels=(),
        )
    )
    assert event["type"]["code"] == "110100"
    assert event["subtype"][0]["code"] == "log.prune"
