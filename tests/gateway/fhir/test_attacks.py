"""What somebody may try who has few rights, or whose app is broken: none of it may work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest

from gateway.settings import FieldSettings, LimitSettings
from tests.gateway.fhir.clinic import (
    PSYNOTE,
    Clinic,
    FHIRApp,
    clinician,
    note,
    observation,
    patient,
)

FHIR = {"content-type": "application/fhir+json"}
MASKED_NOTE = (FieldSettings(path="Observation.note", mask=True),)


def people() -> list[dict[str, Any]]:
    return [patient("p1"), patient("p2"), patient("p3")]


def clinic(*resources: dict[str, Any], **more: Any) -> Clinic:
    return Clinic(FHIRApp([*people(), *resources]), **more)


def requests(here: Clinic) -> list[tuple[str, str, str]]:
    assert isinstance(here.app, FHIRApp)
    return here.app.requests


# --- What reaches the app -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    ["Subscription", "SearchParameter", "StructureDefinition", "OperationDefinition",
     "CompartmentDefinition", "CapabilityStatement", "SubscriptionTopic", "AccessPolicy", "Bot"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nobody_changes_what_the_app_does_as_if_it_were_a_record(kind: str, method: str) -> None:
    # A subscription would send records out, whomever it claims to belong to.
    content = {"resourceType": kind, "id": "x", "subject": {"reference": "Patient/p1"}}
    here = clinic(content)
    target = f"/{kind}" if method == "POST" else f"/{kind}/x"
    assert here.ask(method, target, None if method == "DELETE" else content).status == 422
    entry = {"request": {"method": method, "url": target[1:]}, "resource": content}
    bundle = {"resourceType": "Bundle", "type": "transaction", "entry": [entry]}
    assert here.ask("POST", "/", bundle).status == 422
    assert not requests(here)


def test_staff_do_not_write_the_consent_that_opens_a_note_to_them() -> None:
    provision = {"type": "permit", "securityLabel": [PSYNOTE]}
    consent = {
        "resourceType": "Consent",
        "id": "c1",
        "status": "active",
        "scope": {"coding": [{"code": "patient-privacy"}]},
        "category": [{"coding": [{"code": "59284-0"}]}],
        "patient": {"reference": "Patient/p1"},
    }
    here = clinic(note("n1", "p1"), {**consent, "provision": {"type": "deny"}})
    permit = {**consent, "provision": provision}
    assert here.ask("POST", "/Consent", permit).status == 403
    assert here.ask("PUT", "/Consent/c1", permit).status in {403, 404}
    assert here.ask("DELETE", "/Consent/c1").status in {403, 404}
    assert {method for method, _, _ in requests(here)} <= {"GET"}
    own = replace(clinician(patient="p1", roles=frozenset()), purpose="PATRQT")
    assert here.as_(own).ask("POST", "/Consent", permit).status == 201


def test_staff_do_not_make_themselves_those_who_treat_a_patient() -> None:
    mine = {"reference": "Practitioner/1"}
    subject = {"reference": "Patient/p3"}
    visit = {
        "resourceType": "Encounter",
        "id": "e1",
        "status": "in-progress",
        "class": {"code": "AMB"},
        "subject": subject,
        "participant": [{"individual": mine}],
    }
    team = {
        "resourceType": "CareTeam",
        "id": "t1",
        "status": "active",
        "subject": subject,
        "participant": [{"member": mine}],
    }
    person = {**patient("p3"), "generalPractitioner": [mine]}
    there = {**visit, "participant": []}, {**team, "participant": []}
    both = clinician(roles=frozenset({"clinician", "billing", "staff"}))
    for who in (both, replace(both, purpose="HPAYMT")):
        here = clinic(*there).as_(who)
        for content in (visit, team, person):
            name, one = content["resourceType"], content["id"]
            if content is not person:
                assert here.ask("POST", f"/{name}", content).status == 403
            assert here.ask("PUT", f"/{name}/{one}", content).status in {403, 404}
            entry = {"request": {"method": "PUT", "url": f"{name}/{one}"}, "resource": content}
            bundle = {"resourceType": "Bundle", "type": "transaction", "entry": [entry]}
            assert here.ask("POST", "/", bundle).status in {403, 404}
        assert {method for method, _, _ in requests(here)} <= {"GET"}
    # Who treats already adds a colleague.
    own = {**team, "subject": {"reference": "Patient/p1"}}
    assert clinic().ask("POST", "/CareTeam", own).status == 201


def test_whose_a_record_is_is_not_said_twice_in_other_letters() -> None:
    here = clinic()
    for more in ("Subject", "sUBJECT"):
        content = {**observation("", "p1"), more: {"reference": "Patient/p3"}}
        assert here.ask("POST", "/Observation", content).status == 422
    assert not requests(here)


def test_headers_that_tell_an_app_to_do_more_do_not_reach_it() -> None:
    app = FHIRApp([*people(), observation("o1", "p1")])
    seen: list[set[str]] = []

    def watched(head: Any, body: bytes) -> Any:
        seen.append({name for name, _ in head.headers})
        return app(head, body)

    here = Clinic(watched)
    more: dict[str, Any] = {
        "x_cascade": "delete",
        "x_rewrite_history": "true",
        "x_medplum_on_behalf_of": "ProjectMembership/1",
        "x_request_id": "r1",
    }
    assert here.ask("PUT", "/Observation/o1", observation("o1", "p1"), **more).status == 200
    names = set[str]().union(*seen)
    assert {"x-request-id", "x-forwarded-for"} <= names
    assert names.isdisjoint({"x-cascade", "x-rewrite-history", "x-medplum-on-behalf-of"})


@pytest.mark.parametrize(
    "query",
    ["_ELEMENTS=id,subject", "_Summary=text", "+_elements=id", "_elements%20=id", "_elements[]=id",
     "_getpages=1", "_graph=x", "_cascade=delete", "_sort=_tag", "_offset=1"],
)  # fmt: skip
def test_no_parameter_makes_the_app_leave_out_what_labels_are_found_in(query: str) -> None:
    here = clinic(note("x", "p1"))
    assert here.get(f"/DocumentReference?{query}").status == 422
    assert not requests(here)


def test_an_order_of_versions_is_not_asked_of_the_app() -> None:
    here = clinic()
    assert here.get("/Patient/_history?_sort=birthdate").status == 422
    assert here.get("/Patient/_history?_sort=-_lastUpdated").status == 200
    assert len(requests(here)) > 0


def test_the_last_observations_are_not_told_because_closed_ones_would_take_their_place() -> None:
    here = clinic()
    assert here.get("/Observation/$lastn?patient=p1").status == 422
    assert not requests(here)


def test_a_record_that_comes_into_being_meanwhile_is_not_overwritten() -> None:
    app = FHIRApp(people())
    sent: list[str | None] = []

    def watched(head: Any, body: bytes) -> Any:
        if head.method == "PUT":
            sent.append(head.headers.get("if-none-match"))
        return app(head, body)

    assert Clinic(watched).ask("PUT", "/Observation/n", observation("n", "p1")).status == 201
    assert sent == ["*"]


# --- Histories ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["unlisted", "elsewhere"])
def test_what_a_search_does_not_find_does_not_count_as_deleted(lost: str) -> None:
    # Before they were labelled these were open to everybody on the care team.
    ids = ("n1", "n2")
    before = [note(one, "p1") for one in ids]
    for one in before:
        del one["meta"]
    app = FHIRApp([*people(), *before, *(note(one, "p1") for one in ids)])

    def forgetful(head: Any, body: bytes) -> Any:
        status, headers, content = app(head, body)
        if "_id=" in head.query:
            bundle = orjson.loads(content)
            bundle["entry"] = bundle["entry"][:1] if lost == "elsewhere" else []
            bundle["link"] = [{"relation": "next", "url": "http://other.example/fhir/x"}]
            content = orjson.dumps(bundle)
        return status, headers, content

    answer = Clinic(forgetful).get("/DocumentReference/_history")
    assert answer.status == 200
    assert "entry" not in answer.json


def test_pages_without_end_come_to_an_end() -> None:
    records = [observation(f"o{n}", "p1") for n in range(3)]
    app = FHIRApp([*people(), *records])
    asked = 0

    def endless(head: Any, body: bytes) -> Any:
        nonlocal asked
        status, headers, content = app(head, body)
        if "_id=" in head.query or "more=" in head.query:
            asked += 1
            assert asked < 200
            bundle = orjson.loads(content)
            bundle["entry"] = []
            url = f"http://127.0.0.1:9/fhir/Observation?more={asked}"
            bundle["link"] = [{"relation": "next", "url": url}]
            content = orjson.dumps(bundle)
        return status, headers, content

    here = Clinic(endless, limits=LimitSettings(looked_through=20))
    assert len(here.get("/Observation/_history").ids) == 3


# --- Writing back ---------------------------------------------------------------------------------


def test_what_is_hidden_in_contained_records_survives_an_update() -> None:
    inner = observation("in", "p1", note=[{"text": "in confidence"}])
    whole = {**observation("o1", "p1"), "contained": [inner]}
    for outer in (whole, {**note("o1", "p1", "Practitioner/1"), "meta": {}, "contained": [inner]}):
        app = FHIRApp([*people(), outer])
        here = Clinic(app, fields=MASKED_NOTE)
        target = f"/{outer['resourceType']}/o1"
        shown = here.get(target).json
        assert "confidence" not in str(shown)
        del shown["meta"]
        assert here.ask("PUT", target, {**shown, "language": "de"}).status == 200
        now = app.now(outer["resourceType"], "o1")
        assert now is not None
        assert now["contained"] == [inner]
        assert now["language"] == "de"
        other = {**shown, "contained": [{**shown["contained"][0], "status": "amended"}]}
        assert here.ask("PUT", target, other).status == 422
        assert (
            here.ask("PUT", target, {k: v for k, v in shown.items() if k != "contained"}).status
            == 422
        )


def test_words_beside_the_elements_do_not_tell_what_is_hidden() -> None:
    text = {"status": "additional", "div": "<div>in confidence</div>"}
    here = clinic(observation("o1", "p1", text=text), fields=MASKED_NOTE)
    assert b"confidence" not in here.get("/Observation/o1").body
    generated = {"status": "generated", "div": "<div>final</div>"}
    here = clinic(observation("o1", "p1", text=generated), fields=MASKED_NOTE)
    assert here.get("/Observation/o1").json["text"] == generated


# --- A broken app ---------------------------------------------------------------------------------

SEALED = (FieldSettings(path="Observation.valueString", seal=True, index="value-string"),)


def broken(of: str) -> Clinic:
    """A clinic in which somebody changed a sealed record of this patient behind the gateway."""
    here = clinic(observation("plain", "p1"), fields=SEALED)
    assert isinstance(here.app, FHIRApp)
    made = here.ask("POST", "/Observation", observation("", "p1", valueString="hers")).json["id"]
    kept = here.app.now("Observation", made)
    assert kept is not None
    here.app.store({**kept, "subject": {"reference": f"Patient/{of}"}})
    return here


def test_a_record_that_cannot_be_opened_closes_only_itself_to_those_who_may_not_read_it() -> None:
    here = broken("p3")
    assert here.get("/Observation").ids == ["plain"]
    assert here.get("/Observation/new-1").status == 404


def test_a_record_that_cannot_be_opened_is_not_left_out_in_silence() -> None:
    here = broken("p2")
    assert here.get("/Observation").status == 502
    assert here.get("/Observation/new-1").status == 502


def test_a_validator_does_not_tell_what_only_the_app_sees() -> None:
    def quoting(head: Any, body: bytes) -> Any:
        if "$validate" not in head.path:
            return FHIRApp(people())(head, body)
        words = [*orjson.loads(body)["meta"]["tag"], orjson.loads(body)["valueString"], "mild"]
        issue = [
            {"severity": "warning", "code": "invalid", "diagnostics": f"strange: {word}",
             "details": {"text": str(word)}, "expression": [str(word)]}
            for word in words
        ]  # fmt: skip
        return 200, FHIR, orjson.dumps({"resourceType": "OperationOutcome", "issue": issue})

    here = Clinic(quoting, fields=SEALED)
    answer = here.ask("POST", "/Observation/$validate", observation("o", "p1", valueString="a"))
    assert answer.status == 200
    assert len(answer.json["issue"]) == 3
    assert "mild" in str(answer.json)
    for secret in (b"hgi1", b"hg1.", b"havengate.internal"):
        assert secret not in answer.body


@pytest.mark.parametrize("status", ["412 Precondition Failed", "500", "", None, 409])
def test_a_part_of_a_transaction_that_failed_is_not_told_as_done(status: Any) -> None:
    def failing(head: Any, body: bytes) -> Any:
        del head, body
        part = {"response": {"status": status} if status is not None else {}}
        answer = {"resourceType": "Bundle", "type": "transaction-response", "entry": [part]}
        return 200, FHIR, orjson.dumps(answer)

    content = observation("", "p1")
    entry = {"request": {"method": "POST", "url": "Observation"}, "resource": content}
    bundle = {"resourceType": "Bundle", "type": "transaction", "entry": [entry]}
    assert Clinic(failing).ask("POST", "/", bundle).status == 502


@pytest.mark.parametrize("one", ["a\r\nset-cookie: x=1", "../x", 7, ["x"], None, ""])
def test_ids_and_versions_of_the_app_do_not_become_headers_unread(one: Any) -> None:
    def odd(head: Any, body: bytes) -> Any:
        made = {**orjson.loads(body), "id": one, "meta": {"versionId": one}}
        return 201, FHIR, orjson.dumps(made)

    answer = Clinic(odd).ask("POST", "/Observation", observation("", "p1"))
    assert answer.status in {201, 502}
    location = answer.headers.get("location", "")
    assert "set-cookie" not in location
    assert not location.endswith(("/", "..", "x"))


def test_a_limit_of_rows_counts_what_comes_beside_them() -> None:
    desk = replace(clinician(roles=frozenset({"front-desk", "staff"})), purpose="HOPERAT")
    many = [
        patient(f"q{n:02}", managingOrganization={"reference": "Organization/1"}) for n in range(40)
    ]
    app = FHIRApp(many)

    def including(head: Any, body: bytes) -> Any:
        status, headers, content = app(head, body)
        bundle = orjson.loads(content)
        for n, entry in enumerate(list(bundle["entry"])):
            of = entry["resource"]["id"]
            more = patient(f"z{n}{of}", link=[{"other": {"reference": f"Patient/{of}"}}])
            bundle["entry"].append({"resource": more, "search": {"mode": "include"}})
        return status, headers, orjson.dumps(bundle)

    here = Clinic(including, who=desk)
    url: str | None = "/Patient?_count=10&_revinclude=Patient:link"
    ids: list[str] = []
    while url is not None:
        answer = here.get(url)
        ids += [one for one in answer.ids if one]
        url = answer.link("next")
    assert len(set(ids)) <= 25


def test_a_note_that_is_labelled_in_odd_places_is_still_a_note() -> None:
    plain = note("x", "p1")
    del plain["meta"]
    for odd in (
        {**plain, "meta": {"security": PSYNOTE}},
        {**plain, "securityLabel": [{"coding": [PSYNOTE]}]},
        {**plain, "meta": {"security": [{"code": " psythpn "}]}},
        {**plain, "contained": [{**observation("c", "p1"), "meta": {"security": [PSYNOTE]}}]},
    ):
        here = clinic(odd)
        answers = (here.get("/DocumentReference/x"), here.get("/DocumentReference"))
        assert b"c2VjcmV0" not in answers[0].body + answers[1].body, odd


def test_bytes_that_carry_no_labels_are_not_released_to_anybody() -> None:
    binary = {
        "resourceType": "Binary",
        "id": "b1",
        "contentType": "text/plain",
        "securityContext": {"reference": "Patient/p1"},
        "data": "U2VjcmV0IG9mIHRoZSBub3RlLg==",
    }
    here = clinic(binary, observation("o1", "p1"))
    assert here.ask("GET", "/Observation/o1").status == 200
    assert here.ask("GET", "/Binary/b1").status == 404
    assert here.ask("PUT", "/Binary/b1", binary).status in {403, 404, 422}
    assert {method for method, _, _ in requests(here)} <= {"GET"}
