"""What must never get out, and what must still work, through the whole core."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core import commands as c
from gateway.identity.model import Identified
from gateway.settings import FieldSettings, LimitSettings
from policies.consent import parse_consent
from policies.model import Assurance, BreakGlass, Principal
from policies.settings import PoliciesSettings
from policies.store import load_in_force
from tests.gateway.fhir import real_content
from tests.gateway.fhir.clinic import (
    APP,
    NOW,
    SUBSTANCE,
    Answer,
    Clinic,
    FHIRApp,
    clinician,
    note,
    observation,
    patient,
)

NURSE = clinician(roles=frozenset({"nurse", "staff"}))
FRONT_DESK = replace(clinician(roles=frozenset({"front-desk", "staff"})), purpose="HOPERAT")


def people() -> list[dict[str, Any]]:
    return [patient("p1"), patient("p2"), patient("p3")]


def clinic(*resources: dict[str, Any], **more: Any) -> Clinic:
    return Clinic(FHIRApp([*people(), *resources]), **more)


# --- Reading --------------------------------------------------------------------------------------


def test_reads_a_record_of_a_patient_one_treats() -> None:
    here = clinic(observation("o1", "p1"))
    answer = here.get("/Observation/o1")
    assert answer.status == 200
    assert answer.json["id"] == "o1"
    assert answer.headers["etag"] == 'W/"1"'
    assert answer.headers["cache-control"] == "no-store"
    assert here.world.outcomes()[0].end.patients == ("Patient/p1",)


def same(one: Answer, other: Answer) -> bool:
    return (one.status, one.headers, one.body) == (other.status, other.headers, other.body)


@pytest.mark.parametrize(
    "hidden",
    [observation("x", "p3"), note("x", "p1"), note("x", "p1", label=SUBSTANCE),
     {"resourceType": "Observation", "id": "x", "status": "final"}],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["", "/_history/1", "/_history"])
def test_a_record_that_is_closed_reads_like_one_that_is_not_there(
    hidden: dict[str, Any], suffix: str
) -> None:
    target = f"/{hidden['resourceType']}/x{suffix}"
    with_it, without = clinic(hidden), clinic()
    assert with_it.get(target).status == 404
    assert same(with_it.get(target), without.get(target))
    if not suffix:
        assert same(with_it.ask("DELETE", target), without.ask("DELETE", target))


def test_what_a_patient_refused_is_told_to_those_who_treat_him_and_to_nobody_else() -> None:
    refusal = parse_consent(
        {
            "resourceType": "Consent",
            "id": "c1",
            "status": "active",
            "scope": {"coding": [{"code": "patient-privacy"}]},
            "category": [{"coding": [{"code": "59284-0"}]}],
            "patient": {"reference": "Patient/p1"},
            "provision": {
                "type": "deny",
                "class": [
                    {"system": "http://hl7.org/fhir/resource-types", "code": "DocumentReference"}
                ],
            },
        }
    )
    plain = note("n1", "p1")
    del plain["meta"]
    here = clinic(plain, observation("o1", "p1"), consents={"p1": (refusal,)})
    told = here.get("/DocumentReference/n1")
    assert told.status == 403
    assert told.json["issue"][0]["details"]["coding"][0]["code"] == "consent"
    assert here.get("/Observation/o1").status == 200
    assert replace(here, team=frozenset()).get("/DocumentReference/n1").status == 404


def test_a_patient_one_does_not_treat_offers_break_glass_whether_he_exists_or_not() -> None:
    here = clinic()
    assert same(here.get("/Patient/p3"), here.get("/Patient/p99"))
    assert here.get("/Patient/p3").json["issue"][0]["details"]["coding"][0]["code"] == "break_glass"
    assert "Fetch" not in here.world.names()


def test_without_a_second_factor_existence_is_not_told() -> None:
    who = clinician(assurance=Assurance(second_factor="none"))
    here = clinic(observation("x", "p3"), observation("mine", "p1"), who=who)
    answers = [here.get(f"/Observation/{one}") for one in ("x", "mine", "never")]
    assert {one.status for one in answers} == {401}
    assert same(answers[0], answers[1])
    assert same(answers[0], answers[2])


def test_asks_for_a_fresh_factor_where_it_would_open_the_record() -> None:
    who = clinician(assurance=Assurance(second_factor="totp", second_factor_at=NOW - 3_600))
    mine = note("n1", "p1", by="Practitioner/1")
    here = clinic(mine, who=who)
    assert here.get("/DocumentReference/n1").status == 401


def test_a_record_known_by_its_etag_is_decided_first() -> None:
    here = clinic(observation("o1", "p1"), observation("x", "p3"))
    assert here.get("/Observation/o1", if_none_match='W/"1"').status == 304
    assert here.get("/Observation/x", if_none_match='W/"1"').status == 404


def test_a_head_request_carries_no_body() -> None:
    answer = clinic(observation("o1", "p1")).ask("HEAD", "/Observation/o1")
    assert (answer.status, answer.body) == (200, b"")


def test_what_the_app_says_about_errors_is_not_passed_on() -> None:
    assert b"said the app" not in clinic().get("/Observation/none").body


@pytest.mark.parametrize(
    ("status", "kind", "body", "expected"),
    [
        (200, "text/html", b"<html>", 502),
        (200, "application/fhir+json", b"{", 502),
        (200, "application/fhir+json", b'{"resourceType":"Patient","id":"o1"}', 502),
        (200, "application/fhir+json", b'{"resourceType":"Observation","id":"o2"}', 502),
        (302, "application/fhir+json", b"", 502),
        (500, "application/fhir+json", b"secret", 502),
        (422, "application/fhir+json", b"secret", 422),
        (401, "application/fhir+json", b"secret", 502),
    ],
)
def test_releases_nothing_that_was_not_asked_for(
    status: int, kind: str, body: bytes, expected: int
) -> None:
    here = Clinic(lambda *_: (status, {"content-type": kind, "etag": '"s"'}, body))
    answer = here.get("/Observation/o1")
    assert answer.status == expected
    assert b"secret" not in answer.body
    assert "etag" not in answer.headers


def test_an_earlier_version_about_somebody_else_stays_closed() -> None:
    app = FHIRApp([*people(), observation("o1", "p1"), observation("o1", "p2")])
    here = Clinic(app)
    assert here.get("/Observation/o1/_history/2").status == 200
    assert here.get("/Observation/o1/_history/1").status == 404
    assert here.get("/Observation/o1/_history").json["entry"][0]["resource"]["subject"] == {
        "reference": "Patient/p2"
    }


def test_an_earlier_version_is_as_closed_as_the_record_is_now() -> None:
    before = note("n1", "p1")
    del before["meta"]
    here = Clinic(FHIRApp([*people(), before, note("n1", "p1")]))
    assert here.get("/DocumentReference/n1/_history/1").status == 404
    assert here.get("/DocumentReference/n1/_history").status == 404


def test_a_deletion_is_told_beside_a_version_that_is_open() -> None:
    app = FHIRApp([*people(), observation("o1", "p1"), note("x", "p1")])
    app.kept["Observation", "o1"].append(None)
    app.kept["DocumentReference", "x"].append(None)
    here = Clinic(app)
    methods = [e["request"]["method"] for e in here.get("/Observation/_history").json["entry"]]
    assert methods == ["DELETE", "PUT"]
    assert "entry" not in here.get("/DocumentReference/_history").json
    assert here.get("/Observation/o1").status == 404


def emergency(*patients: str) -> Identified:
    grant = BreakGlass(
        reason="found unconscious, must know what she takes",
        patients=frozenset(patients),
        begins_at=NOW - 60,
        ends_at=NOW + 3_600,
    )
    return replace(clinician(), break_glass=grant)


def test_break_glass_opens_the_records_of_its_patient_and_no_others() -> None:
    here = clinic(observation("x", "p3"), who=emergency("p3"), team=frozenset({"p1"}))
    assert here.get("/Observation/x").status == 200
    assert here.world.outcomes()[0].end.break_glass == "granted"
    assert here.get("/Observation?patient=p3").ids == ["x"]
    assert here.get("/Patient/p2").status == 403


def test_substance_use_records_carry_the_notice() -> None:
    here = clinic(note("n1", "p3", label=SUBSTANCE), who=emergency("p3"))
    answer = here.get("/DocumentReference/n1")
    assert answer.status == 200
    assert "42 CFR part 2" in answer.headers["redisclosure-notice"]
    assert "NORDSCLCD" in str(answer.json["meta"]["security"])
    found = here.get("/DocumentReference?patient=p3")
    assert "NORDSCLCD" in str(found.json["meta"]["security"])
    # The patient himself needs no notice: it is for those who receive the record of another.
    own = replace(clinician(patient="p3", roles=frozenset()), purpose="PATRQT")
    answer = here.as_(own).get("/DocumentReference/n1")
    assert answer.status == 200
    assert "redisclosure-notice" not in answer.headers


def test_patients_see_their_own_records_and_nobody_elses() -> None:
    own = replace(clinician(patient="p1", roles=frozenset()), purpose="PATRQT")
    here = clinic(observation("o1", "p1"), observation("x", "p2"), who=own, team=frozenset())
    assert here.get("/Observation").ids == ["o1"]
    assert here.get("/Observation/o1").status == 200
    assert here.get("/Observation/x").status == 404
    assert here.get("/Patient?_has:Observation:patient:code=a").ids == ["p1"]


def test_whoever_has_no_business_here_does_not_reach_the_app() -> None:
    nobody = clinician(roles=frozenset())
    here = clinic(observation("o1", "p1"), who=nobody, team=frozenset())
    for target in ("/Observation/o1", "/Observation", "/Observation/o1/_history"):
        assert here.get(target).status == 403
        assert "Fetch" not in here.world.names()


# --- Noninterference ------------------------------------------------------------------------------

_CODES = st.sampled_from(["a", "b"])
_PATIENTS = st.sampled_from(["p1", "p2", "p3"])
_RECORD = st.one_of(
    st.tuples(st.just("Observation"), _PATIENTS, _CODES, st.just("")),
    st.tuples(
        st.just("DocumentReference"),
        _PATIENTS,
        st.sampled_from(["PSYTHPN", "42CFRPart2", "N"]),
        st.sampled_from(["Practitioner/1", "Practitioner/2"]),
    ),
)
_QUERIES = [
    "/Observation", "/Observation?code=a", "/Observation?_count=1", "/Observation?_count=2",
    "/Observation?_summary=count", "/Observation?_total=accurate&_count=1",
    "/Observation?_total=none", "/Observation?_sort=code&_count=2", "/Observation?_elements=code",
    "/Observation?_include=Observation:subject", "/Observation?code=a,b&_count=3",
    "/Observation?subject:Patient.family=Family-p3", "/Observation?patient.family=Family-p1",
    "/Observation?_summary=data", "/Observation?_id=r0,r1,r2", "/Observation?code:not=a",
    "/Patient?_has:Observation:patient:code=a", "/Patient?_has:Observation:subject:code=b",
    "/Patient?_revinclude=Observation:subject", "/Patient", "/Patient?family=Family-p3",
    "/Patient?_has:DocumentReference:patient:status=current", "/Patient?_summary=count",
    "/DocumentReference", "/DocumentReference?_summary=count", "/DocumentReference?_count=1",
    "/DocumentReference?_total=accurate", "/DocumentReference?patient=p1",
    "/DocumentReference?_include=DocumentReference:subject", "/DocumentReference/_history",
    "/Patient/p1/Observation?_count=1", "/Patient/p1/DocumentReference", "/Observation/_history",
    "/Observation/r0", "/Observation/r1/_history", "/DocumentReference/r1",
    "/DocumentReference/r2/_history/1", "/DocumentReference/r0/_history",
]  # fmt: skip


def made(number: int, drawn: tuple[str, str, str, str]) -> dict[str, Any]:
    kind, of, what, by = drawn
    if kind == "Observation":
        return observation(f"r{number}", of, what)
    label = {"system": "http://terminology.hl7.org/CodeSystem/v3-ActCode", "code": what}
    return note(f"r{number}", of, by, label)


def is_closed(drawn: tuple[str, str, str, str]) -> bool:
    _, of, what, by = drawn
    return of == "p3" or (what in {"PSYTHPN", "42CFRPart2"} and by != "Practitioner/1")


def everything_seen(here: Clinic, target: str) -> list[tuple[int, dict[str, str], Any]]:
    """An answer and all further pages, the links' sealed texts made alike."""
    seen: list[tuple[int, dict[str, str], Any]] = []
    url: str | None = target
    while url is not None and len(seen) < 20:
        answer = here.get(url)
        content = answer.json if answer.body else None
        url = answer.link("next") if content else None
        for link in content.get("link", []) if content else []:
            if link["relation"] == "next":
                link["url"] = "next"
        seen.append((answer.status, answer.headers, content))
    return seen


_RICH = [
    ("Observation", "p3", "a", ""), ("Observation", "p1", "a", ""),
    ("DocumentReference", "p2", "PSYTHPN", "Practitioner/2"), ("Observation", "p3", "b", ""),
    ("DocumentReference", "p1", "42CFRPart2", "Practitioner/2"), ("Observation", "p2", "b", ""),
    ("DocumentReference", "p1", "PSYTHPN", "Practitioner/1"), ("Observation", "p3", "a", ""),
    ("DocumentReference", "p1", "N", "Practitioner/2"), ("Observation", "p1", "b", ""),
    ("DocumentReference", "p3", "N", "Practitioner/2"),
]  # fmt: skip


def assert_same_without_closed(
    drawn: list[tuple[str, str, str, str]], query: str, page: int
) -> None:
    kept = [(made(number, one), is_closed(one)) for number, one in enumerate(drawn)]
    open_people = [one for one in people() if one["id"] != "p3"]
    with_them = FHIRApp([*people(), *(one for one, _ in kept)], page=page)
    without = FHIRApp([*open_people, *(one for one, closed in kept if not closed)], page=page)
    assert everything_seen(Clinic(with_them), query) == everything_seen(Clinic(without), query)


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("query", _QUERIES)
def test_every_kind_of_question_is_answered_as_if_closed_records_were_not_there(
    query: str, page: int
) -> None:
    assert_same_without_closed(_RICH, query, page)
    assert_same_without_closed(_RICH[::-1], query, page)


@settings(max_examples=60, deadline=None)
@given(drawn=st.lists(_RECORD, max_size=8), query=st.sampled_from(_QUERIES), page=st.integers(1, 4))
def test_answers_as_if_closed_records_were_not_there(
    drawn: list[tuple[str, str, str, str]], query: str, page: int
) -> None:
    assert_same_without_closed(drawn, query, page)


# --- Searching ------------------------------------------------------------------------------------


def test_fills_pages_with_what_is_open() -> None:
    closed = [observation(f"x{n}", "p3") for n in range(7)]
    mine = [observation(f"o{n}", "p1") for n in range(5)]
    app = FHIRApp([*people(), *closed[:4], *mine[:1], *closed[4:], *mine[1:]], page=2)
    here = Clinic(app)
    first = here.get("/Observation?_count=3")
    assert first.ids == ["o0", "o1", "o2"]
    assert "total" not in first.json
    link = first.link("next")
    assert link is not None
    assert "127.0.0.1" not in first.body.decode()
    second = here.get(link)
    assert second.ids == ["o3", "o4"]
    assert second.link("next") is None


def test_a_link_for_further_pages_fits_nobody_else() -> None:
    here = clinic(*(observation(f"o{n}", "p1") for n in range(4)))
    link = here.get("/Observation?_count=2").link("next")
    assert link is not None
    other = here.as_(clinician(id="practitioner-2"))
    assert other.get(link).status == 400
    assert here.get(f"{link}x").status == 400
    assert here.get(f"{link}&code=a").status == 400


def test_what_a_link_leads_to_is_decided_again() -> None:
    here = clinic(*(observation(f"o{n}", "p1") for n in range(4)))
    link = here.get("/Observation?_count=2").link("next")
    assert link is not None
    assert replace(here, team=frozenset()).get(link).ids == []
    of_one = here.get("/Observation?patient=p1&_count=2").link("next")
    assert of_one is not None
    assert replace(here, team=frozenset()).get(of_one).status == 403


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.example/fhir/Observation?x=1",
        "/other/Observation",
        "../../admin",
        "http://[",
        "",
    ],
)
def test_links_of_the_app_to_elsewhere_are_not_followed(url: str) -> None:
    app = FHIRApp([*people(), observation("o1", "p1")])

    def led_away(head: Any, body: bytes) -> Any:
        status, headers, content = app(head, body)
        bundle = orjson.loads(content)
        bundle["link"] = [{"relation": "next", "url": url}]
        return status, headers, orjson.dumps(bundle)

    here = Clinic(led_away)
    assert here.get("/Observation").ids == ["o1"]
    assert len(app.requests) == 1


@pytest.mark.parametrize(
    "form", ["?{}", "/fhir/Observation?{}", "http://127.0.0.1:9/fhir/Observation?{}"]
)
def test_links_of_the_app_may_be_written_in_any_way(form: str) -> None:
    app = FHIRApp([*people(), observation("o1", "p1"), observation("o2", "p1")], page=1)

    def led_on(head: Any, body: bytes) -> Any:
        status, headers, content = app(head, body)
        bundle = orjson.loads(content)
        for link in bundle["link"]:
            link["url"] = form.format(link["url"].partition("?")[2])
        return status, headers, orjson.dumps(bundle)

    assert Clinic(led_on).get("/Observation").ids == ["o1", "o2"]


def test_a_limit_of_rows_holds_over_all_pages() -> None:
    who = FRONT_DESK
    many = [patient(f"q{n:02}") for n in range(40)]
    here = Clinic(FHIRApp(many), who=who)
    pages = everything_seen(here, "/Patient?_count=20")
    given_out = [
        entry
        for _, _, page in pages
        for entry in page["entry"]
        if entry["search"]["mode"] == "match"
    ]
    assert len(given_out) == 25
    assert pages[-1][2]["entry"][-1]["resource"]["resourceType"] == "OperationOutcome"


@pytest.mark.parametrize(
    "query",
    ["maritalStatus=x", "_filter=a", "_content=a", "_text=a", "_query=a", "_list=a",
     "_contained=true", "unheard-of=1", "_sort=unheard-of", "_tag:missing=true",
     "_tag=https://havengate.internal/fhir/index/phone|", "general-practitioner.name=x"],
)  # fmt: skip
def test_a_search_that_could_tell_what_is_hidden_is_refused(query: str) -> None:
    # Nurses do not see maritalStatus, so a parameter that nobody defines may test just that.
    here = clinic(who=NURSE)
    answer = here.get(f"/Patient?{query}")
    assert answer.status == 422
    assert "Fetch" not in here.world.names()


_OWN_RULE = """
@id("clinic.violence-in-words")
@title("Of records about violence the clinic shows no values")
@cites("45 CFR 164.502(b)")
@grants("nothing")
@obligation_redact("Observation.value")
permit (principal, action, resource is Record in Label::"SDV");
"""


def test_an_element_hidden_in_some_records_alone_does_not_decide_whether_they_are_found(
    tmp_path: Path,
) -> None:
    (tmp_path / "own.cedar").write_text(_OWN_RULE)
    own = load_in_force(PoliciesSettings(directory=str(tmp_path)))
    label = {"system": "http://terminology.hl7.org/CodeSystem/v3-ActCode", "code": "SDV"}

    def asked(words: str, query: str) -> Answer:
        closed = observation("s1", "p1", valueString=words, meta={"security": [label]})
        plain = observation("o1", "p1", valueString="b")
        return clinic(closed, plain, rules=lambda: own).get(f"/Observation?{query}")

    assert "valueString" not in asked("a", "code=a").json["entry"][0]["resource"]
    assert asked("a", "code=a").ids == ["s1", "o1"]
    for query in ("value-string=a", "value-string=b", "value-string:not=a", "_sort=value-string"):
        assert same(asked("a", query), asked("c", query))
        assert "s1" not in asked("a", query).ids


@pytest.mark.parametrize(
    "query",
    ["_elements=status", "_summary=data", "_summary=text", "_summary=count", "_total=accurate",
     "_format=json", "_pretty=true"],
)  # fmt: skip
def test_what_would_hide_labels_never_reaches_the_app(query: str) -> None:
    here = clinic(note("x", "p1"), note("mine", "p1", by="Practitioner/1"))
    assert isinstance(here.app, FHIRApp)
    answer = here.get(f"/DocumentReference?{query}")
    assert answer.status == 200
    assert here.get(f"/DocumentReference/mine?{query}").status == 200
    name = query.partition("=")[0]
    assert not any(name in asked for _, _, asked in here.app.requests)


def test_a_sealed_element_is_found_by_its_exact_value_and_in_no_other_way() -> None:
    sealed = (FieldSettings(path="Patient.name.family", seal=True, index="family"),)
    here = Clinic(FHIRApp(), fields=sealed, team=frozenset({"p1", "p2"}))
    app = here.app
    assert isinstance(app, FHIRApp)
    service = replace(here, who=importer())
    for one in ("p1", "p2"):
        assert service.ask("PUT", f"/Patient/{one}", patient(one)).status == 201
    assert b"Family" not in b"".join(app.bodies)
    found = here.get("/Patient?family=family-P1")
    assert found.ids == ["p1"]
    assert found.json["entry"][0]["resource"]["name"] == [{"family": "Family-p1"}]
    assert b"havengate.internal" not in found.body
    assert "Family" not in str(app.requests)
    assert here.get("/Observation?patient.family=Family-p1").status == 200
    for query in (
        "family:contains=Fam",
        "family:exact=Family-p1",
        "_sort=family",
        "name=Family-p1",
    ):
        assert here.get(f"/Patient?{query}").status == 422


def importer() -> Identified:
    principal = Principal(
        kind="service",
        id="importer",
        roles=frozenset({"app"}),
        scopes=frozenset({"system/*.cruds"}),
        purposes=frozenset({"TREAT"}),
    )
    return Identified(principal=principal, means="service", person="importer", purpose="TREAT")


def test_a_count_beyond_what_may_be_looked_through_is_refused() -> None:
    many = [observation(f"o{n}", "p1") for n in range(30)]
    app = FHIRApp([*people(), *many], page=10)
    here = Clinic(app, limits=LimitSettings(looked_through=20))
    assert here.get("/Observation?_summary=count").status == 422
    assert "total" not in here.get("/Observation?_total=accurate").json
    assert Clinic(app).get("/Observation?_summary=count").json["total"] == 30


def test_a_chain_over_too_many_records_is_refused() -> None:
    many = [patient(f"q{n:03}", name=[{"family": "Same"}]) for n in range(201)]
    team = frozenset(one["id"] for one in many)
    own = observation("o1", "q001")
    for number, status in ((200, 200), (201, 422)):
        here = Clinic(FHIRApp([*many[:number], own]), team=team)
        assert here.get("/Observation?patient.family=Same").status == status


def test_a_request_names_only_so_many_patients() -> None:
    ids = ",".join(f"q{n}" for n in range(300))
    here = clinic()
    assert here.get(f"/Observation?patient={ids}").status == 422
    assert "LoadFacts" not in here.world.names()


def test_index_tokens_never_leave() -> None:
    # As it is when a sealed element was removed in the app itself.
    sealed = (FieldSettings(path="Observation.valueString", seal=True),)
    tag = {"system": "https://havengate.internal/fhir/index/value", "code": "hgi1.1.abc"}
    here = clinic(observation("o1", "p1", meta={"tag": [tag]}), fields=sealed)
    assert b"hgi1" not in here.get("/Observation/o1").body


def test_sealed_content_moved_to_another_patient_is_not_released() -> None:
    sealed = (FieldSettings(path="Observation.valueString", seal=True),)
    here = clinic(fields=sealed)
    assert here.ask("POST", "/Observation", observation("", "p1", valueString="hers")).status == 201
    assert isinstance(here.app, FHIRApp)
    [kept] = [v[-1] for (kind, _), v in here.app.kept.items() if kind == "Observation"]
    assert kept is not None
    here.app.store({**kept, "id": "moved", "subject": {"reference": "Patient/p2"}})
    answer = here.get("/Observation/moved")
    assert answer.status == 502
    assert b"hers" not in answer.body
    here.app.store({**kept, "id": "both", "performer": [{"reference": "Patient/p2"}]})
    assert here.get("/Observation/both").status == 404


def test_results_of_includes_are_decided_like_others() -> None:
    here = clinic(observation("o1", "p1"), observation("x", "p3"))
    found = here.get("/Observation?_include=Observation:subject")
    assert found.ids == ["o1", "p1"]
    back = here.get("/Patient?_revinclude=Observation:subject")
    assert back.ids == ["p1", "p2", "o1"]


def test_a_search_may_come_as_a_form() -> None:
    here = clinic(observation("o1", "p1"), observation("x", "p3"))
    kind = "application/x-www-form-urlencoded"
    found = here.ask("POST", "/Observation/_search", raw=b"code=a&patient=p1", content_type=kind)
    assert found.ids == ["o1"]
    assert found.link("self") is None


# --- Writing --------------------------------------------------------------------------------------


def test_creates_a_record_of_a_patient_one_treats() -> None:
    here = clinic()
    answer = here.ask("POST", "/Observation", observation("ignored", "p1"))
    assert answer.status == 201
    assert answer.headers["location"] == "https://gateway.test/fhir/Observation/new-1/_history/1"
    assert here.world.intents()[0].act.patients == ("Patient/p1",)


@pytest.mark.parametrize(
    "content",
    [
        {"resourceType": "Observation", "status": "final"},
        observation("x", "p3"),
        {**observation("x", "p1"), "subject": {"reference": "Patient?identifier=1"}},
        {**observation("x", "p1"), "subject": {"reference": "#p"}},
        {**observation("x", "p1"), "subject": {"reference": "urn:uuid:1"}},
        {**observation("x", "p1"), "subject": {"display": "p1"}},
    ],
)
def test_nothing_is_written_for_a_patient_not_known_or_not_treated(content: Any) -> None:
    here = clinic(observation("x", "p1"))
    app = here.app
    assert isinstance(app, FHIRApp)
    assert here.ask("POST", "/Observation", content).status in {403, 422}
    assert here.ask("PUT", "/Observation/x", {**content, "id": "x"}).status in {403, 422}
    assert {method for method, _, _ in app.requests} == {"GET"}


def test_a_record_moves_to_another_patient_only_with_both() -> None:
    app = FHIRApp([*people(), observation("mine", "p1"), observation("x", "p3")])
    here = Clinic(app)
    assert here.ask("PUT", "/Observation/x", observation("x", "p1")).status == 404
    assert here.ask("PUT", "/Observation/mine", observation("mine", "p3")).status == 403
    assert here.ask("PUT", "/Observation/mine", observation("mine", "p2")).status == 200
    patch = [{"op": "replace", "path": "/subject/reference", "value": "Patient/p3"}]
    kind = "application/json-patch+json"
    assert here.ask("PATCH", "/Observation/mine", patch, content_type=kind).status == 403
    assert [m for m, _, _ in app.requests if m != "GET"] == ["PUT"]


def test_a_note_of_another_is_neither_read_nor_overwritten() -> None:
    app = FHIRApp([*people(), note("n1", "p1")])
    here = Clinic(app)
    plain = note("n1", "p1", by="Practitioner/1")
    del plain["meta"]
    assert here.ask("PUT", "/DocumentReference/n1", plain).status == 404
    assert here.ask("DELETE", "/DocumentReference/n1").status == 404
    assert {method for method, _, _ in app.requests} == {"GET"}


def test_an_update_goes_with_the_version_that_was_decided() -> None:
    app = FHIRApp([*people(), observation("o1", "p1")])
    sent: list[str | None] = []

    def watched(head: Any, body: bytes) -> Any:
        if head.method == "PUT":
            sent.append(head.headers.get("if-match"))
        return app(head, body)

    here = Clinic(watched)
    assert here.ask("PUT", "/Observation/o1", observation("o1", "p1")).status == 200
    assert sent == ['W/"1"']
    stale = here.ask("PUT", "/Observation/o1", observation("o1", "p1"), if_match='W/"1"')
    assert stale.status == 412
    assert len(sent) == 1


def test_what_was_hidden_survives_an_update_by_somebody_who_did_not_see_it() -> None:
    # No built-in role updates Patients of which it does not see all; a mask is hidden from all.
    masked = (FieldSettings(path="Observation.note", mask=True),)
    whole = observation("o1", "p1", note=[{"text": "in confidence"}])
    app = FHIRApp([*people(), whole])
    here = Clinic(app, fields=masked)
    shown = here.get("/Observation/o1").json
    assert "confidence" not in str(shown)
    assert here.ask("PUT", "/Observation/o1", {**shown, "status": "amended"}).status == 200
    now = app.now("Observation", "o1")
    assert now is not None
    assert (now["status"], now["note"]) == ("amended", whole["note"])
    assert "SUBSETTED" not in str(now)
    kind = "application/json-patch+json"
    for path in ("/note", "/note/0/text", "", "/text", "/contained/-"):
        for op in ("test", "add"):
            patch = [{"op": op, "path": path, "value": "in confidence"}]
            assert here.ask("PATCH", "/Observation/o1", patch, content_type=kind).status == 422
    patch = [{"op": "replace", "path": "/status", "value": "final"}]
    assert here.ask("PATCH", "/Observation/o1", patch, content_type=kind).status == 200
    now = app.now("Observation", "o1")
    assert now is not None
    assert (now["status"], now["note"]) == ("final", whole["note"])


def test_a_patch_cannot_grow_without_end() -> None:
    here = clinic(observation("o1", "p1", note=[{"text": "x"}]))
    doubling = [{"op": "copy", "from": "/note", "path": "/note/-"}] * 4
    kind = "application/json-patch+json"
    answer = here.ask("PATCH", "/Observation/o1", doubling, content_type=kind)
    assert answer.status == 400
    for path in ("/id", "/resourceType"):
        patch = [{"op": "replace", "path": path, "value": "other"}]
        assert here.ask("PATCH", "/Observation/o1", patch, content_type=kind).status == 400


def test_a_part_of_a_record_does_not_replace_it() -> None:
    here = clinic(observation("o1", "p1", valueString="words"))
    part = here.get("/Observation/o1?_elements=status,subject").json
    assert part["subject"] == {"reference": "Patient/p1"}
    assert here.ask("PUT", "/Observation/o1", part).status == 422


def test_a_sealed_patient_gets_an_id_before_it_is_sealed() -> None:
    sealed = (FieldSettings(path="Patient.name.family", seal=True, index="family"),)
    here = Clinic(FHIRApp(), fields=sealed)
    answer = here.ask("POST", "/Patient", patient("ignored"))
    assert answer.status == 201
    assert answer.headers["location"].startswith("https://gateway.test/fhir/Patient/chosen-1")
    assert isinstance(here.app, FHIRApp)
    assert here.app.requests[-1][:2] == ("PUT", "/fhir/Patient/chosen-1")
    assert b"Family" not in b"".join(here.app.bodies)


def test_says_so_when_the_app_lets_nobody_choose_ids() -> None:
    sealed = (FieldSettings(path="Patient.name.family", seal=True, index="family"),)
    here = Clinic(lambda *_: (405, {}, b""), fields=sealed)
    assert here.ask("POST", "/Patient", patient("ignored")).status == 502


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("PUT", "/Observation?code=a", {}),
        ("DELETE", "/Observation?code=a", {}),
        ("POST", "/Observation", {"if_none_exist": "code=a"}),
        ("PUT", "/Observation/o1", {"if_none_match": "*"}),
    ],
)
def test_conditional_changes_are_refused(method: str, target: str, headers: dict[str, Any]) -> None:
    here = clinic(observation("o1", "p1"))
    assert here.ask(method, target, observation("o1", "p1"), **headers).status in {400, 422}
    assert isinstance(here.app, FHIRApp)
    assert not here.app.requests


def test_nothing_is_sent_when_the_intent_cannot_be_written() -> None:
    here = clinic(observation("o1", "p1"))
    assert isinstance(here.app, FHIRApp)
    for method in ("PUT", "DELETE"):
        content = observation("o1", "p1") if method == "PUT" else None
        here.ask(method, "/Observation/o1", content)
        place = here.world.names().index("RecordIntent")
        changes = [
            number
            for number, one in enumerate(here.world.asked)
            if isinstance(one, c.Fetch) and one.head.method != "GET"
        ]
        assert all(number > place for number in changes)


# --- Bundles --------------------------------------------------------------------------------------


def entry(method: str, url: str, content: Any = None, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"request": {"method": method, "url": url}, **more}
    return found if content is None else {**found, "resource": content}


def bundle(kind: str, *entries: dict[str, Any]) -> dict[str, Any]:
    return {"resourceType": "Bundle", "type": kind, "entry": list(entries)}


def test_a_batch_answers_each_entry_alone() -> None:
    app = FHIRApp([*people(), observation("o1", "p1"), observation("x", "p3")])
    here = Clinic(app)
    answer = here.ask(
        "POST",
        "/",
        bundle(
            "batch",
            entry("GET", "Observation/o1"),
            entry("GET", "Observation/x"),
            entry("GET", "Observation/never"),
            entry("POST", "Observation", observation("", "p1")),
            entry("POST", "Observation", observation("", "p3")),
            entry("PUT", "Observation/x", observation("x", "p1")),
            entry("GET", "Observation?code=a"),
            entry("PATCH", "Observation/o1"),
            entry("GET", "Observation/../x"),
        ),
    )
    assert answer.status == 200
    parts = answer.json["entry"]
    told = [one["response"]["status"][:3] for one in parts]
    assert told == ["200", "404", "404", "201", "403", "404", "200", "422", "400"]
    assert parts[1] == parts[2]
    assert [method for method, _, _ in app.requests if method != "GET"] == ["POST"]


def test_one_denied_entry_refuses_a_whole_transaction() -> None:
    app = FHIRApp(people())
    good, bad = observation("", "p1"), observation("", "p3")
    here = Clinic(app)
    looked_up = {**good, "performer": [{"reference": "Practitioner?identifier=1"}]}
    for closed in (bad, looked_up, {**good, "subject": {"reference": "Patient?family=x"}}):
        parts = (entry("POST", "Observation", good), entry("POST", "Observation", closed))
        assert here.ask("POST", "/", bundle("transaction", *parts)).status in {403, 422}
    assert not app.requests
    done = here.ask("POST", "/", bundle("transaction", entry("POST", "Observation", good)))
    assert done.status == 200
    assert done.json["entry"][0]["response"]["status"] == "201 Created"


def test_records_of_a_patient_created_beside_them_are_his() -> None:
    sealed = (FieldSettings(path="Patient.name.family", seal=True, index="family"),)
    here = Clinic(FHIRApp(), fields=sealed, who=importer())
    own = observation("", "x")
    own["subject"] = {"reference": "urn:uuid:1"}
    parts = (
        entry("POST", "Observation", own),
        entry("POST", "Patient", patient(""), fullUrl="urn:uuid:1"),
    )
    assert here.ask("POST", "/", bundle("transaction", *parts)).status == 200
    assert isinstance(here.app, FHIRApp)
    kept = here.app.now("Observation", "new-1")
    assert kept is not None
    assert kept["subject"] == {"reference": "Patient/chosen-1"}
    assert b"Family" not in b"".join(here.app.bodies)


def test_a_bundle_changes_a_record_once() -> None:
    app = FHIRApp([*people(), observation("o1", "p1")])
    twice = [entry("PUT", "Observation/o1", observation("o1", "p1"))] * 2
    for kind in ("batch", "transaction"):
        assert Clinic(app).ask("POST", "/", bundle(kind, *twice)).status == 400
    assert {method for method, _, _ in app.requests} == {"GET"}


# --- Copies, abilities ----------------------------------------------------------------------------


def test_a_copy_leaves_out_what_is_never_exported() -> None:
    who = replace(clinician(roles=frozenset({"records-officer", "staff"})), purpose="PATRQT")
    here = clinic(observation("o1", "p1"), note("x", "p1"), observation("y", "p2"), who=who)
    answer = here.get("/Patient/p1/$everything")
    assert sorted(answer.ids) == ["o1", "p1"]
    assert clinic().get("/Patient/p1/$everything").status == 403
    assert here.get("/Patient/$export").status == 422


def test_says_what_the_app_can_do() -> None:
    assert clinic().get("/metadata").json["resourceType"] == "CapabilityStatement"


def test_real_records_pass_whole() -> None:
    everything = real_content.resources()
    team = frozenset(one["id"] for one in everything if one["resourceType"] == "Patient")
    app = FHIRApp(everything)
    here = Clinic(app, team=team)
    one = next(
        one
        for one in real_content.of_type("Observation")
        if not one.get("meta", {}).get("security")
    )
    answer = here.get(f"/Observation/{one['id']}")
    assert answer.status == 200
    assert answer.json == app.now("Observation", one["id"])
    assert APP not in answer.body.decode()
