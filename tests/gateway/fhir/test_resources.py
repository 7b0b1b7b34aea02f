"""Whose a resource is, who wrote it, which codes are in it. In doubt it is nobody's to see."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.fhir.definitions import compartment_of, elements_of, resource_types
from gateway.fhir.resources import (
    _AUTHORS,
    _NOT_PATIENT_TYPES,
    authors_of,
    codes_of,
    is_patient_type,
    owner_paths,
    patients_of,
    reference_target,
    unresolved,
)
from tests.gateway.fhir.real_content import resources

IDS = st.from_regex(r"[A-Za-z0-9\-.]{1,64}", fullmatch=True)


def observation(**other: Any) -> dict[str, Any]:
    return {"resourceType": "Observation", "subject": {"reference": "Patient/7"}, **other}


def test_tells_of_every_real_record_whose_it_is() -> None:
    for resource in resources():
        assert not unresolved(resource), resource["resourceType"]
        assert len(patients_of(resource)) == (1 if is_patient_type(resource["resourceType"]) else 0)


@given(
    IDS, st.sampled_from(["", "https://ehr.example/fhir/"]), st.sampled_from(["", "/_history/2"])
)
def test_understands_relative_absolute_and_versioned_references(
    id_: str, base: str, version: str
) -> None:
    reference = f"{base}Patient/{id_}{version}"
    assert reference_target(reference) == ("Patient", id_)
    assert patients_of(observation(subject={"reference": reference})) == {id_}


@pytest.mark.parametrize(
    "reference",
    [
        "", "7", "Patient", "Patient/", "/Patient/7", " Patient/7", "Patient/7 ", "Patient/7\n",
        "patient/7", "Patient/7/8", "Patient/7?x=1", "Patient/7#a", "Patient?identifier=7", "#p",
        "urn:uuid:1", "ftp://x/Patient/7", "https://Patient/7/..", "Patient/" + "7" * 65,
        "Patient/\uff17", "Patient//7", "Patient/7/_history/", "https://x?y=/Patient/7",
    ],
)  # fmt: skip
def test_takes_no_other_text_for_a_literal_reference(reference: str) -> None:
    assert reference_target(reference) is None
    assert unresolved(observation(subject={"reference": reference}))


@pytest.mark.parametrize(
    "subject",
    [
        None, {}, [], "Patient/7", 7, {"reference": 7}, {"reference": None},
        {"display": "Somebody"}, {"identifier": {"value": "7"}, "type": "Patient"},
        {"reference": "Group/1"}, {"reference": "#p"}, {"reference": "#nobody"},
        {"reference": "Location/3"}, [[{"reference": "Patient/7"}]],
    ],
)  # fmt: skip
def test_leaves_open_whose_it_is_when_the_owner_cannot_be_told(subject: Any) -> None:
    contained = [{"resourceType": "Patient", "id": "p"}]
    assert unresolved(observation(subject=subject, contained=contained))


def test_another_patient_does_not_stand_in_for_an_owner_who_cannot_be_told() -> None:
    performer = [{"reference": "Patient/5"}]
    for subject in ({"reference": "Group/1"}, {"display": "Somebody"}, {"reference": "#p"}):
        assert unresolved(observation(subject=subject, performer=performer))


@pytest.mark.parametrize("reference", ["urn:uuid:1", "#p", "Patient?name=x", "???"])
def test_leaves_open_whose_it_is_when_anybody_in_it_may_be_a_patient(reference: str) -> None:
    assert unresolved(observation(performer=[{"reference": reference}]))


@pytest.mark.parametrize(
    "performer",
    [
        {"display": "Dr. X"},
        {"reference": "Organization?identifier=1"},
        {"reference": "#o"},
        {"reference": "PractitionerRole/1"},
    ],
)
def test_is_not_irritated_by_who_surely_is_no_patient(performer: dict[str, Any]) -> None:
    contained = [{"resourceType": "Organization", "id": "o"}]
    assert not unresolved(observation(performer=[performer], contained=contained))


def test_counts_every_patient_of_the_compartment() -> None:
    message = {
        "resourceType": "Communication",
        "subject": {"reference": "Patient/1"},
        "sender": {"reference": "Patient/2"},
        "recipient": [{"reference": "Patient/3"}, {"reference": "Practitioner/4"}],
    }
    assert patients_of(message) == {"1", "2", "3"}
    appointment = {
        "resourceType": "Appointment",
        "participant": [{"actor": {"reference": "Patient/1"}}, {"actor": {"display": "Room"}}],
    }
    assert patients_of(appointment) == {"1"}
    assert not unresolved(appointment)


def test_a_patient_is_about_itself_and_not_about_its_links() -> None:
    linked = {"resourceType": "Patient", "id": "1", "link": [{"other": {"reference": "Patient/2"}}]}
    assert patients_of(linked) == {"1"}
    assert unresolved({"resourceType": "Patient"})
    assert unresolved({"resourceType": "Patient", "id": 7})


@pytest.mark.parametrize("resource", [{}, {"resourceType": None}, {"resourceType": ["Patient"]}])
def test_content_that_is_no_resource_is_nobodys_to_see(resource: dict[str, Any]) -> None:
    assert unresolved(resource)
    assert patients_of(resource) == frozenset()
    assert authors_of(resource) == frozenset()


def test_types_that_are_not_known_belong_to_patients() -> None:
    assert is_patient_type("Mood")
    assert unresolved({"resourceType": "Mood"})
    assert patients_of({"resourceType": "Mood", "patient": {"reference": "Patient/1"}}) == {"1"}


def test_only_types_outside_the_compartment_are_no_patient_types() -> None:
    assert resource_types() >= _NOT_PATIENT_TYPES
    assert {name for name in _NOT_PATIENT_TYPES if compartment_of(name)} == {"Schedule"}


def test_a_schedule_of_a_practitioner_is_nobodys_and_one_of_a_patient_is_his() -> None:
    schedule = {"resourceType": "Schedule", "actor": [{"reference": "Practitioner/1"}]}
    assert not unresolved(schedule)
    assert patients_of({**schedule, "actor": [{"reference": "Patient/1"}]}) == {"1"}
    assert unresolved({**schedule, "actor": [{"reference": "#p"}]})


def test_every_table_names_elements_that_fhir_defines_as_references() -> None:
    paths = [
        path for name in resource_types() for path in owner_paths(name) if compartment_of(name)
    ]
    paths += [f"{name}.{path}" for name, of in _AUTHORS.items() for path in of]
    for path in paths:
        owner, _, last = path.rpartition(".")
        assert "Reference" in elements_of(owner)[last].kinds, path


def test_names_those_who_wrote_and_not_those_who_took_part() -> None:
    note = {
        "resourceType": "DocumentReference",
        "subject": {"reference": "Patient/1"},
        "author": [
            {"reference": "Practitioner/7/_history/1"},
            {"reference": "#x"},
            {"display": "A"},
        ],
        "authenticator": {"reference": "Practitioner/8"},
    }
    assert authors_of(note) == {"Practitioner/7"}
    encounter = {
        "resourceType": "Encounter",
        "participant": [{"individual": {"reference": "Practitioner/9"}}],
    }
    assert authors_of(encounter) == frozenset()
    given = {
        "resourceType": "Immunization",
        "performer": [{"actor": {"reference": "Practitioner/1"}}],
    }
    assert authors_of(given) == {"Practitioner/1"}


def test_finds_codes_wherever_they_stand_but_no_units() -> None:
    resource = observation(
        code={"coding": [{"system": "http://loinc.org", "code": "1-8"}]},
        valueQuantity={"value": 1, "system": "http://unitsofmeasure.org", "code": "kg"},
        contained=[{"resourceType": "Condition", "code": {"coding": [{"code": "F32"}]}}],
    )
    assert codes_of(resource) == {("http://loinc.org", "1-8"), ("", "F32")}


JSON = st.recursive(
    st.none() | st.booleans() | st.text(max_size=8) | st.sampled_from(["Patient/1", "#a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["reference", "type", "id", "code", "resourceType", "actor"]), inner
        )
    ),
    max_leaves=12,
)


@given(
    st.sampled_from(sorted(resource_types())),
    st.dictionaries(
        st.sampled_from(["subject", "patient", "author", "performer", "participant", "contained"]),
        JSON,
    ),
)
def test_never_fails_whatever_the_content_is(name: str, content: dict[str, Any]) -> None:
    resource = {**content, "resourceType": name}
    if is_patient_type(name) and not patients_of(resource):
        assert unresolved(resource)
    authors_of(resource)
    codes_of(resource)
