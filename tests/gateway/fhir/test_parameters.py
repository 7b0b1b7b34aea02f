"""Which elements a search parameter looks into; what is not known may test anything."""

from __future__ import annotations

import pytest

from gateway.fhir.definitions import elements_of, parameters_of, resource_types
from gateway.fhir.parameters import elements_tested, overlap, parameters_testing


@pytest.mark.parametrize(
    ("resource_type", "parameter", "paths"),
    [
        ("Patient", "name", {"Patient.name"}),
        ("Patient", "family", {"Patient.name.family"}),
        ("Patient", "death-date", {"Patient.deceased"}),
        ("Patient", "phone", {"Patient.telecom"}),
        ("Observation", "patient", {"Observation.subject"}),
        ("Observation", "code:text", {"Observation.code"}),
        ("Observation", "code-value-string", {"Observation.code", "Observation.value"}),
        ("Condition", "onset-date", {"Condition.onset"}),
        ("Appointment", "patient", {"Appointment.participant.actor"}),
        ("Task", "patient", {"Task.for"}),
        ("Patient", "_id", {"Patient.id"}),
        ("Mood", "_tag", {"Mood.meta.tag"}),
    ],
)
def test_names_what_a_parameter_tests(resource_type: str, parameter: str, paths: set[str]) -> None:
    assert set(elements_tested(resource_type, parameter) or ()) == paths


@pytest.mark.parametrize(
    ("resource_type", "parameter"),
    [
        ("Patient", "mood"), ("Mood", "patient"), ("Observation", "subject.name"), ("Patient", ""),
        ("Patient", "_has:Observation:patient:code"), ("Patient", "_text"), ("Patient", "_content"),
        ("Patient", "_filter"), ("Patient", "Name"), ("Observation", "subject:Patient.name"),
    ],
)  # fmt: skip
def test_a_parameter_that_is_not_known_may_test_anything(
    resource_type: str, parameter: str
) -> None:
    name, _, rest = parameter.partition(":")
    found = elements_tested(resource_type, parameter)
    if "." in rest:
        assert found == elements_tested(resource_type, name)
    else:
        assert found is None


def test_every_path_of_the_table_is_defined() -> None:
    for resource_type in resource_types():
        for paths in parameters_of(resource_type).values():
            for path in paths:
                kind = resource_type
                for name in path.split(".")[1:]:
                    defined = elements_of(kind)
                    assert not defined or name in defined or kind == "Resource", path
                    kind = defined[name].kinds[0] if name in defined else ""


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Patient.name", "Patient.name.family", True),
        ("Patient.name.family", "Patient.name.given", False),
        ("Observation.value", "Observation.valueString", True),
        ("Observation.value", "Observation.valueset", False),
        ("Observation.value", "Observation.valueQuantity.unit", True),
        ("Patient.name", "Person.name", False),
    ],
)
def test_paths_overlap_when_one_leads_into_the_other(one: str, other: str, same: bool) -> None:  # noqa: FBT001
    assert overlap(one, other) is same
    assert overlap(other, one) is same


def test_what_tests_everything_tests_anything_hidden() -> None:
    found = parameters_testing("Observation", {"Observation.note"})
    assert found == {"_text", "_content", "_filter", "_query", "_list"}
    assert parameters_testing("Observation", {"Patient.name"}) == frozenset()
