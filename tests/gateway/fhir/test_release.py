"""What a rule hides is nowhere in what is released, and survives updates by who did not see it."""

from __future__ import annotations

import copy
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import GatewayConfigurationError, UnsupportedError, UpstreamContentError
from gateway.fhir.definitions import elements_of
from gateway.fhir.release import (
    carry_out,
    elements,
    hidden_parameters,
    hidden_paths,
    notice_text,
    restore_hidden,
    with_notice,
)
from gateway.fhir.resources import Json
from gateway.fhir.sealing import MASKED
from policies.obligations import (
    ExcludeFromCounts,
    LimitRows,
    Mask,
    Obligation,
    Pseudonymise,
    Redact,
    RedisclosureNotice,
    Review,
    StepUp,
)
from tests.gateway.fhir.real_content import of_type, resources

SECRET = "c0ffee-secret"
TAG = {
    "system": "http://terminology.hl7.org/CodeSystem/v3-ObservationValue",
    "code": "SUBSETTED",
    "display": "subsetted",
}


def pseudonym(kind: str, value: str) -> str:
    return f"hgp1.{kind}.{len(value)}"


def released(resource: Json, *obligations: Obligation, masks: frozenset[str] = frozenset()) -> Json:
    return carry_out(resource, obligations, masks=masks, pseudonym=pseudonym)


def redact(*paths: str) -> Redact:
    return Redact(fields=frozenset(paths))


def test_removes_elements_through_arrays_with_their_siblings() -> None:
    resource = {
        "resourceType": "Patient",
        "name": [{"family": SECRET, "_family": {"id": SECRET}, "given": ["A"]}, {"family": SECRET}],
        "birthDate": SECRET,
        "_birthDate": {"extension": [{"url": "x", "valueDateTime": SECRET}]},
    }
    assert released(resource, redact("Patient.name.family", "Patient.birthDate")) == {
        "resourceType": "Patient",
        "name": [{"given": ["A"]}],
        "meta": {"tag": [TAG]},
    }


@pytest.mark.parametrize(
    "name", ["valueString", "_valueString", "valueQuantity", "valueFuture", "_valueFuture", "value"]
)
def test_a_choice_is_hidden_in_every_form(name: str) -> None:
    resource = {"resourceType": "Observation", name: {"id": SECRET}, "status": "final"}
    for way in (redact("Observation.value"), Mask(fields=frozenset({"Observation.value"}))):
        assert SECRET.encode() not in orjson.dumps(released(resource, way))


def test_an_element_that_only_begins_like_a_hidden_one_stays() -> None:
    resource = {"resourceType": "Encounter", "reasonCode": [{"text": "a"}], "reason": 1}
    assert released(resource, redact("Encounter.reasonReference")) is resource


def test_what_nests_is_hidden_at_every_depth() -> None:
    inner = {"linkId": "2", "answer": [{"valueString": SECRET, "item": [{"text": "b"}]}]}
    answer = {"valueInteger": 1, "item": [{"linkId": "3", "item": [inner]}]}
    resource = {
        "resourceType": "QuestionnaireResponse",
        "item": [{"text": "a", "answer": [answer]}],
    }
    new = released(resource, redact("QuestionnaireResponse.item.answer.value"))
    assert SECRET.encode() not in orjson.dumps(new)
    assert b'"text":"b"' in orjson.dumps(new)


def test_the_narrative_and_contained_resources_do_not_say_it_either() -> None:
    contained = [
        {"resourceType": "Patient", "id": "p", "birthDate": SECRET, "text": {"div": SECRET}},
        {"resourceType": "Device", "id": "d", "text": {"div": SECRET}},
    ]
    resource = {
        "resourceType": "Observation",
        "text": {"div": SECRET},
        "contained": contained,
        "status": "final",
    }
    new = released(resource, redact("Patient.birthDate"))
    assert SECRET.encode() not in orjson.dumps(new)
    assert [one["id"] for one in new["contained"]] == ["p", "d"]
    assert new["meta"]["tag"] == [TAG]
    assert released(resource, redact("Encounter.account")) is resource


@pytest.mark.parametrize("name", [SECRET, [SECRET], [[{"family": SECRET}]], {"_x": [SECRET]}])
def test_what_stands_where_fhir_has_nothing_does_not_carry_a_hidden_element(name: Any) -> None:
    resource = {"resourceType": "Patient", "name": name, "_name": [{"family": SECRET}]}
    new = released(resource, redact("Patient.name.family"))
    assert "_name" not in new
    if not isinstance(name, dict):
        assert SECRET.encode() not in orjson.dumps(new)


def test_a_mask_shows_only_that_there_is_something() -> None:
    resource = {
        "resourceType": "Patient",
        "identifier": [{"value": SECRET}, {"value": SECRET}],
        "birthDate": SECRET,
        "name": [{"given": [SECRET, SECRET]}],
        "contact": [{"name": {"family": SECRET}}],
    }
    paths = {
        "Patient.identifier",
        "Patient.birthDate",
        "Patient.name.given",
        "Patient.contact.name",
    }
    new = released(resource, masks=frozenset(paths))
    assert new == {
        "resourceType": "Patient",
        "identifier": [MASKED],
        "_birthDate": MASKED,
        "name": [{"_given": [MASKED]}],
        "contact": [{"name": MASKED}],
        "meta": {"tag": [TAG]},
    }


def test_a_pseudonym_stands_for_a_person_in_every_reference_of_the_record() -> None:
    resource = {
        "resourceType": "Observation",
        "subject": {"reference": "Patient/7", "display": SECRET},
        "performer": [{"reference": "https://x.example/Patient/7/_history/1", "display": SECRET}],
        "focus": [{"reference": "Patient/8"}],
    }
    new = released(resource, Pseudonymise(fields=frozenset({"Observation.subject"})))
    stand_in = {
        "type": "Patient",
        "identifier": {
            "system": "https://havengate.internal/fhir/pseudonym",
            "value": "hgp1.Patient.1",
        },
    }
    assert new["subject"] == stand_in
    assert new["performer"] == [stand_in]
    assert new["focus"] == [{"reference": "Patient/8"}]


@pytest.mark.parametrize(
    ("path", "element", "expected"),
    [
        ("Patient.identifier", [{"system": "s", "value": SECRET}],
         [{"system": "s", "value": "hgp1.Patient.identifier.15"}]),
        ("Patient.name.family", None, None),
        ("Patient.birthDate", SECRET, None),
        ("Patient.multipleBirth", 3, None),
        ("Patient.address", [{"city": SECRET}], None),
        ("Patient.managingOrganization", {"reference": "#" + SECRET}, None),
        ("Patient.managingOrganization", {"identifier": {"value": SECRET}}, None),
        ("Patient.generalPractitioner", [{"reference": "Organization/1"}, {"display": SECRET}],
         None),
    ],
)  # fmt: skip
def test_what_can_have_no_pseudonym_is_masked(path: str, element: Any, expected: Any) -> None:
    name = path.split(".")[1]
    name = "multipleBirthInteger" if name == "multipleBirth" else name
    resource = {"resourceType": "Patient", name: element}
    new = released(resource, Pseudonymise(fields=frozenset({path})))
    assert SECRET.encode() not in orjson.dumps(new)
    if expected is not None:
        assert new[name] == expected
    elif element is not None:
        left = [new[key] for key in (name, f"_{name}") if key in new]
        assert left in ([MASKED], [[MASKED]])


def test_of_two_ways_the_one_that_hides_more_is_taken() -> None:
    resource = {"resourceType": "Patient", "identifier": [{"value": SECRET, "system": "s"}]}
    path = frozenset({"Patient.identifier"})
    ways: list[Obligation] = [Pseudonymise(fields=path), Mask(fields=path), Redact(fields=path)]
    assert "identifier" not in released(resource, *ways)
    assert "identifier" not in released(resource, *reversed(ways))
    for more in (Mask(fields=path), redact("Patient.identifier.value")):
        new = released(resource, Pseudonymise(fields=path), more)
        assert new["identifier"] == [MASKED]


PATHS = [
    "Patient.name", "Patient.name.family", "Patient.address.line", "Patient.extension",
    "Patient.identifier.value", "Patient.birthDate", "Patient.telecom", "Observation.value",
    "Observation.code.text", "Observation.code.coding.display", "Observation.component.value",
    "Observation.encounter", "Encounter.participant.individual", "Encounter.type", "Claim.item",
    "Claim.insurance.coverage", "CarePlan.activity.detail.code", "Condition.onset",
    "ExplanationOfBenefit.contained", "ExplanationOfBenefit.item.encounter",
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.sampled_from(PATHS), min_size=1, max_size=4),
    st.sampled_from([Redact, Mask, Pseudonymise]),
    st.integers(0, 10_000),
)
def test_no_value_of_a_hidden_element_is_left_in_any_real_record(
    paths: set[str], way: Any, start: int
) -> None:
    everything = resources()
    for resource in (everything[(start + step) % len(everything)] for step in range(15)):
        before = copy.deepcopy(resource)
        new = released(resource, way(fields=frozenset(paths)))
        assert resource == before
        own = [path for path in paths if path.startswith(resource["resourceType"] + ".")]
        for path in own:
            left = values(new, path.split(".")[1:])
            assert not [v for v in left if v in values(resource, path.split(".")[1:]) and v != {}]
        hidden = any(values(resource, path.split(".")[1:]) for path in own)
        assert (new is not resource) == (hidden or bool(new != resource))
        assert not hidden or ("text" not in new and TAG in new["meta"]["tag"])


def values(value: Any, names: list[str]) -> list[Any]:
    """Everything at a path, read in the simplest way."""
    if isinstance(value, list):
        return [found for item in value for found in values(item, names)]
    if not names:
        return [value]
    if not isinstance(value, dict):
        return []
    keys = [
        key for key in value
        if key == names[0] or (names[0] in {"value", "onset"} and key.startswith(names[0]))
    ]  # fmt: skip
    return [found for key in keys for found in values(value[key], names[1:])]


def test_obligations_about_other_things_change_nothing() -> None:
    resource = {"resourceType": "Patient", "text": {"div": "x"}}
    others = (
        StepUp(max_age_s=1),
        LimitRows(rows=1),
        RedisclosureNotice(notice="42CFR2.32"),
        ExcludeFromCounts(labels=frozenset({"PSY"})),
        Review(within_s=1),
        redact("Observation.value"),
    )
    assert released(resource, *others) is resource


def test_an_unknown_obligation_stops_everything() -> None:
    unknown: Any = object()
    with pytest.raises(AssertionError):
        released({"resourceType": "Patient"}, unknown)
    with pytest.raises(AssertionError):
        hidden_paths([unknown], frozenset(), "Patient")


@pytest.mark.parametrize("resource", [{}, {"resourceType": 1}, {"resourceType": None}, "x", None])
def test_what_is_no_resource_is_not_released(resource: Any) -> None:
    with pytest.raises(UpstreamContentError):
        released(resource, redact("Patient.name"))
    with pytest.raises(UpstreamContentError):
        released({"resourceType": "Observation", "contained": [resource]}, redact("Patient.name"))


def test_contained_resources_that_are_no_list_are_not_released() -> None:
    inner = {"resourceType": "Patient", "birthDate": SECRET}
    with pytest.raises(UpstreamContentError):
        released({"resourceType": "Observation", "contained": inner}, redact("Patient.birthDate"))


def test_a_resource_contained_in_a_contained_one_is_not_released() -> None:
    inner = {"resourceType": "Patient", "birthDate": SECRET}
    outer = {"resourceType": "Device", "contained": [inner]}
    with pytest.raises(UpstreamContentError):
        released({"resourceType": "Observation", "contained": [outer]}, redact("Patient.birthDate"))


# --- Asking for what is hidden --------------------------------------------------------------------


def test_parameters_that_test_a_hidden_element_are_named() -> None:
    obligations = [redact("Patient.identifier", "Observation.value")]
    hidden = hidden_paths(obligations, frozenset({"Patient.address.city"}), "Patient")
    assert hidden == {"Patient.identifier", "Patient.address.city"}
    named = hidden_parameters("Patient", hidden)
    assert named >= {"identifier", "address", "address-city", "_content", "_text", "_filter"}
    assert not named & {"gender", "address-country", "_id"}
    assert hidden_parameters("Patient", frozenset()) == frozenset()
    assert hidden_parameters("Observation", frozenset({"Observation.subject"})) >= {
        "patient", "subject",
    }  # fmt: skip


# --- Updates --------------------------------------------------------------------------------------

CONTACTS: list[Json] = [
    {"id": "a", "name": {"family": "A"}, "gender": "male"},
    {"name": {"family": "B"}, "gender": "female"},
    {"name": {"family": "C"}},
]
HIDDEN = frozenset({"Patient.contact.name", "Patient.birthDate", "Patient.maritalStatus.text"})
PRIOR: Json = {
    "resourceType": "Patient",
    "birthDate": "1970",
    "_birthDate": {"id": "x"},
    "maritalStatus": {"text": "single"},
    "contact": CONTACTS,
    "gender": "male",
    "text": {"status": "additional", "div": "<div/>"},
}


def seen() -> Json:
    return released(PRIOR, Redact(fields=HIDDEN))


def test_an_update_keeps_what_was_hidden() -> None:
    assert restore_hidden(seen(), PRIOR, HIDDEN) == {**PRIOR, "meta": {}}
    masked = released(PRIOR, Mask(fields=HIDDEN))
    assert restore_hidden(masked, PRIOR, HIDDEN) == {**PRIOR, "meta": {}}


def test_an_update_cannot_write_what_is_hidden() -> None:
    forgeries: list[Json] = [
        {"birthDate": "2000"},
        {"_birthDate": {}},
        {"maritalStatus": {"text": "forged"}},
        {"maritalStatus": "forged"},
    ]
    for forged in forgeries:
        new = restore_hidden({**seen(), **forged}, PRIOR, HIDDEN)
        assert (new["birthDate"], new["_birthDate"]) == ("1970", {"id": "x"})
        assert new["maritalStatus"] == {"text": "single"}
    absent = {"resourceType": "Patient"}
    assert "birthDate" not in restore_hidden({**absent, "birthDate": "2000"}, absent, HIDDEN)


def test_an_update_changes_what_is_not_hidden() -> None:
    change = {**seen(), "gender": "other", "text": {"status": "generated", "div": "<div>n</div>"}}
    new = restore_hidden(change, PRIOR, HIDDEN)
    assert new == {**PRIOR, "meta": {}, "gender": "other", "text": change["text"]}


def test_members_of_a_list_get_back_what_was_theirs() -> None:
    change = seen()
    added = {"gender": "other", "name": {"family": "forged"}}
    first = {**change["contact"][0], "gender": "other"}
    change["contact"] = [change["contact"][1], added, first]
    new = restore_hidden(change, PRIOR, HIDDEN)
    assert new["contact"] == [
        CONTACTS[1],
        {"gender": "other"},
        CONTACTS[2],
        {**CONTACTS[0], "gender": "other"},
    ]


@pytest.mark.parametrize("contact", [None, [], [{"gender": "other"}], ["x"], {"id": "a"}])
def test_members_that_cannot_be_found_again_are_refused(contact: Any) -> None:
    with pytest.raises(UnsupportedError):
        restore_hidden({**seen(), "contact": contact}, PRIOR, HIDDEN)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.sampled_from(PATHS), min_size=1, max_size=4), st.sampled_from([Redact, Mask]))
def test_sending_back_what_was_seen_changes_no_real_record(paths: set[str], way: Any) -> None:
    hidden = frozenset(paths)
    for resource in (*of_type("Patient"), *of_type("Encounter")[:5], *of_type("CarePlan")[:3]):
        new = restore_hidden(released(resource, way(fields=hidden)), resource, hidden)
        without = {key: value for key, value in resource.items() if key not in {"text", "meta"}}
        assert {k: v for k, v in new.items() if k not in {"text", "meta"}} == without


# --- Parts and notices ----------------------------------------------------------------------------


def test_elements_keeps_what_was_asked_for_and_what_must_not_be_missing() -> None:
    resource = {
        "resourceType": "Observation",
        "id": "1",
        "status": "final",
        "code": {"text": "x"},
        "modifierExtension": [],
        "text": {},
        "contained": [],
        "subject": {},
        "valueString": "v",
        "_valueString": {},
        "note": [],
    }
    part = elements(resource, frozenset({"value"}))
    assert part.keys() == {
        "resourceType", "id", "meta", "status", "code", "modifierExtension", "valueString",
        "_valueString",
    }  # fmt: skip
    assert part["meta"]["tag"] == [TAG]


def test_elements_keeps_every_mandatory_element_of_real_records() -> None:
    for resource in resources()[::7]:
        part = elements(resource, frozenset())
        for element in elements_of(resource["resourceType"]).values():
            if element.required and element.name in resource:
                assert element.name in part


def test_a_notice_labels_the_record_once_and_has_its_text() -> None:
    resource = {"resourceType": "Condition", "meta": {"security": [{"code": "SUD"}]}}
    assert with_notice(resource, []) is resource
    new = with_notice(resource, {"42CFR2.32"})
    assert [one["code"] for one in new["meta"]["security"]] == ["SUD", "NORDSCLCD"]
    assert with_notice(new, ["42CFR2.32"]) is new
    assert notice_text("42CFR2.32").startswith("42 CFR part 2 prohibits")
    with pytest.raises(GatewayConfigurationError):
        with_notice(resource, ["another"])
