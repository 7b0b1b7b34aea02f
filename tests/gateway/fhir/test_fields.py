"""The app gets ciphertext that it takes for FHIR, and nobody can plant or move any."""

from __future__ import annotations

import copy
import re
from typing import Any

import orjson
import pytest
from fhir.resources.R4B import get_fhir_model_class
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import GatewayConfigurationError, UnsupportedError, UpstreamContentError
from gateway.fhir.fields import FieldPlan, compile_fields, index_system
from gateway.fhir.resources import Json
from gateway.fhir.sealing import SEALED_URL
from gateway.settings import FieldSettings
from keys.errors import PersonErasedError
from tests.gateway.fhir.real_content import of_type, resources
from tests.gateway.fhir.sealers import MemorySealer

ME = "Patient/7"


def plan(*paths: str, **indexed: str) -> FieldPlan:
    fields = [FieldSettings(path=path, seal=True) for path in paths]
    fields += [
        FieldSettings(path=path.replace("__", "."), seal=True, index=parameter)
        for path, parameter in indexed.items()
    ]
    return compile_fields(fields, service="ehr")


PLAN = plan(
    "Patient.name.given", "Patient.birthDate", "Patient.address", "Patient.telecom.value",
    "Patient.maritalStatus", "Patient.deceased", "Patient.multipleBirth",
    "Observation.value", "Observation.component.value", "Observation.note.text",
    "Observation.effective", "Condition.code", "Condition.onset", "Procedure.performed",
    "Claim.total", "MedicationRequest.dosageInstruction", "CarePlan.activity.detail.description",
    "QuestionnaireResponse.item.answer.value", "QuestionnaireResponse.item.text",
    "Composition.section.text.div",
    Patient__name__family="family", Patient__identifier__value="identifier",
)  # fmt: skip


def patient(**other: Any) -> Json:
    return {
        "resourceType": "Patient",
        "id": "7",
        "name": [{"family": "Fry", "given": ["Al"]}],
        **other,
    }


def texts(value: Any) -> set[str]:
    """All strings in a value."""
    if isinstance(value, dict):
        return set().union(*(texts(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(texts(item) for item in value))
    return {value} if isinstance(value, str) else set()


def test_every_real_record_comes_back_as_it_was_and_is_fhir_in_between() -> None:
    sealer = MemorySealer()
    kinds: dict[str, int] = {}
    for resource in resources():
        before = copy.deepcopy(resource)
        sealed = PLAN.protect(resource, person=ME, sealer=sealer)
        assert resource == before
        assert bool(PLAN.sealed_texts(sealed)) == PLAN.needs(resource)
        assert PLAN.unprotect(sealed, person=ME, sealer=sealer) == before
        kind = resource["resourceType"]
        kinds[kind] = kinds.get(kind, 0) + 1
        # Validation by a library that knows nothing of us; a few of each type, as it is slow.
        if kinds[kind] <= 3 and kind in {"Patient", "Observation", "Condition", "Procedure"}:
            get_fhir_model_class(kind).model_validate(sealed)
    assert kinds["Observation"] > 300


def test_nothing_of_a_protected_element_is_left_in_what_the_app_gets() -> None:
    sealer = MemorySealer()
    for resource in of_type("Patient"):
        sealed = orjson.dumps(PLAN.protect(resource, person=ME, sealer=sealer))
        secret = {resource["birthDate"], resource["text"]["div"], resource["maritalStatus"]["text"]}
        for name in resource["name"]:
            secret |= {name["family"], *name["given"]}
        for address in resource["address"]:
            secret |= {address["postalCode"], *address["line"]}
        secret |= {one["value"] for one in resource["telecom"] + resource["identifier"]}
        # The identifier of the record is one of its ids, which stay.
        for text in secret - {resource["id"]}:
            assert f'"{text}"'.encode() not in sealed


SECRET = "c0ffee-secret"
ELEMENT = st.recursive(
    st.sampled_from([SECRET, 1, True, None, {"text": SECRET}, {"id": SECRET}]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


NAMES = [
    "valueString", "_valueString", "valueQuantity", "_valueQuantity", "valueCodeableConcept",
    "valueBoolean", "valueFuture", "_valueFuture",
]  # fmt: skip
VALUES = st.dictionaries(st.sampled_from(NAMES), ELEMENT, min_size=1)


@settings(max_examples=400)
@given(VALUES, st.none() | VALUES | st.lists(VALUES) | st.just(SECRET), st.none() | ELEMENT)
def test_whatever_shape_a_protected_element_has_it_is_sealed_or_refused(
    content: Json, component: Any, note: Any
) -> None:
    sealer = MemorySealer()
    resource = {"resourceType": "Observation", **content, "component": component}
    resource["note"] = SECRET if note == 1 else [{"text": note}]
    try:
        sealed = PLAN.protect(resource, person=ME, sealer=sealer)
    except UnsupportedError:
        return
    assert SECRET.encode() not in orjson.dumps(sealed)
    opened = PLAN.unprotect(sealed, person=ME, sealer=sealer)
    assert without_nothing(opened) == without_nothing(resource)


def without_nothing(value: Any) -> Any:
    """JSON without nulls and lists of nulls, which say nothing."""
    if isinstance(value, dict):
        return {k: new for k, v in value.items() if (new := without_nothing(v)) is not None}
    if isinstance(value, list):
        new = [without_nothing(item) for item in value]
        return new if any(item is not None for item in new) else None
    return value


def test_values_of_extensions_are_sealed_where_settings_say_so() -> None:
    sealer = MemorySealer()
    made = plan("Patient.extension.value")
    for resource in of_type("Patient"):
        sealed = made.protect(resource, person=ME, sealer=sealer)
        values = re.findall(rb'"value[A-Z][A-Za-z]*":([^{,}]*)', orjson.dumps(sealed["extension"]))
        values = [value for value in values if value]
        assert values
        assert all(value.startswith(b'"hg1.') for value in values)
        assert made.unprotect(sealed, person=ME, sealer=sealer) == resource


def nested(depth: int) -> Json:
    item: Json = {"linkId": "1", "text": SECRET, "answer": [{"valueString": SECRET}]}
    for level in range(depth):
        if level % 2:
            item = {"linkId": "1", "item": [item]}
        else:
            item = {"linkId": "1", "answer": [{"valueInteger": 3, "item": [item]}]}
    return {"resourceType": "QuestionnaireResponse", "status": "completed", "item": [item]}


@pytest.mark.parametrize(
    "contained",
    [
        {"resourceType": "Patient", "birthDate": SECRET},
        [{"resourceType": "Device", "contained": [{"resourceType": "Patient"}]}],
        SECRET,
    ],
)
def test_what_is_contained_where_nobody_looks_is_refused(contained: Any) -> None:
    resource = {"resourceType": "Observation", "contained": contained}
    with pytest.raises(UnsupportedError):
        PLAN.protect(resource, person=ME, sealer=MemorySealer())


@pytest.mark.parametrize("depth", range(6))
def test_elements_that_nest_are_sealed_at_every_depth(depth: int) -> None:
    sealer = MemorySealer()
    sealed = PLAN.protect(nested(depth), person=ME, sealer=sealer)
    assert SECRET.encode() not in orjson.dumps(sealed)
    assert PLAN.unprotect(sealed, person=ME, sealer=sealer) == nested(depth)


def test_the_narrative_and_contained_resources_do_not_say_it_either() -> None:
    sealer = MemorySealer()
    resource = {
        "resourceType": "Observation",
        "text": {"status": "additional", "div": f"<div>{SECRET}</div>"},
        "contained": [{"resourceType": "Patient", "id": "p", "name": [{"family": SECRET}]}],
    }
    assert PLAN.needs(resource)
    sealed = PLAN.protect(resource, person=ME, sealer=sealer)
    assert SECRET.encode() not in orjson.dumps(sealed)
    assert sealed["text"]["div"].startswith('<div xmlns="http://www.w3.org/1999/xhtml">hg1.')
    assert PLAN.unprotect(sealed, person=ME, sealer=sealer) == resource
    written_otherwise = copy.deepcopy(sealed)
    inner = sealed["text"]["div"].partition(">")[2].partition("<")[0]
    written_otherwise["text"]["div"] = f'<div class="x" xml:lang="en">\n {inner} </div>\n'
    assert PLAN.unprotect(written_otherwise, person=ME, sealer=sealer) == resource


def test_a_text_keeps_its_place_and_what_a_client_wrote_beside_it_is_sealed_too() -> None:
    sealer = MemorySealer()
    translated = {"extension": [{"url": "urn:translation", "valueString": SECRET}]}
    resource = patient(name=[{"family": SECRET, "_family": translated, "given": ["A", None],
                              "_given": [None, translated]}])  # fmt: skip
    sealed = PLAN.protect(resource, person=ME, sealer=sealer)
    assert SECRET.encode() not in orjson.dumps(sealed)
    assert sealed["name"][0]["family"].startswith("hg1.")
    assert PLAN.unprotect(sealed, person=ME, sealer=sealer) == resource


# --- Planting and moving --------------------------------------------------------------------------


def stolen(sealer: MemorySealer, person: str = ME) -> str:
    text = PLAN.protect(patient(), person=person, sealer=sealer)["name"][0]["family"]
    assert isinstance(text, str)
    return text


def places(text: str) -> list[Json]:
    extension = {"extension": [{"url": SEALED_URL, "valueString": text}]}
    return [
        patient(gender=text),
        patient(name=[{"family": text}]),
        patient(name=[{"family": f"\n {text}"}]),
        patient(name=[{"text": f"<div>{text}</div>"}]),
        patient(_gender=extension),
        patient(extension=[{"url": SEALED_URL, "valueString": "anything"}]),
        patient(contact=[{"name": extension}]),
        patient(contained=[{"resourceType": "Observation", "valueString": text}]),
        {"resourceType": "Basic", "code": {"text": text}},
        patient(meta={"tag": [{"system": index_system("family"), "code": "hgi1.1.x"}]}),
    ]


@pytest.mark.parametrize("place", range(10))
def test_nobody_can_write_what_only_the_gateway_writes(place: int) -> None:
    sealer = MemorySealer()
    with pytest.raises(UnsupportedError):
        PLAN.protect(places(stolen(sealer))[place], person=ME, sealer=sealer)


def test_text_sealed_for_another_person_is_not_opened() -> None:
    sealer = MemorySealer()
    theirs, _ = stolen(sealer, "Patient/8"), stolen(sealer)
    with pytest.raises(UpstreamContentError):
        PLAN.unprotect(patient(name=[{"family": theirs}]), person=ME, sealer=sealer)


def test_text_sealed_for_another_element_is_not_opened() -> None:
    sealer = MemorySealer()
    with pytest.raises(UpstreamContentError):
        PLAN.unprotect(patient(name=[{"given": [stolen(sealer)]}]), person=ME, sealer=sealer)


def test_a_sealed_sibling_is_not_opened_as_the_text_itself() -> None:
    sealer = MemorySealer()
    sealed = PLAN.protect(
        patient(name=[{"family": "A", "_family": {"id": "x"}}]), person=ME, sealer=sealer
    )
    [name] = sealed["name"]
    name["family"] = name.pop("_family")["extension"][0]["valueString"]
    with pytest.raises(UpstreamContentError):
        PLAN.unprotect(sealed, person=ME, sealer=sealer)


SEALER = MemorySealer()
STOLEN = stolen(SEALER)


@given(st.integers(4, len(STOLEN) - 1), st.sampled_from("Aa0_-. é"))
def test_a_changed_text_is_not_opened(at: int, other: str) -> None:
    text = STOLEN[:at] + other + STOLEN[at + 1 :]
    changed = patient(name=[{"family": text}])
    if text == STOLEN:
        assert PLAN.unprotect(changed, person=ME, sealer=SEALER) == patient(
            name=[{"family": "Fry"}]
        )
        return
    with pytest.raises(UpstreamContentError) as raised:
        PLAN.unprotect(changed, person=ME, sealer=SEALER)
    assert "Fry" not in str(raised.value)


def test_plain_text_from_before_the_gateway_passes_as_it_is() -> None:
    old = patient(birthDate="1970-01-01", address=[{"city": "X"}], meta={"versionId": "1"})
    assert PLAN.unprotect(old, person=ME, sealer=MemorySealer()) == old
    assert PLAN.sealed_texts(old) == []


# --- Erasure --------------------------------------------------------------------------------------


def test_what_was_sealed_for_an_erased_person_is_absent_and_marked_as_masked() -> None:
    sealer = MemorySealer()
    whole = of_type("Patient")[0]
    sealed = PLAN.protect(whole, person=ME, sealer=sealer)
    sealer.erase(ME)
    left = PLAN.unprotect(sealed, person=ME, sealer=sealer)
    get_fhir_model_class("Patient").model_validate(left)
    assert "hg1." not in orjson.dumps(left).decode()
    assert "birthDate" not in left
    assert "text" not in left
    reason = left["_birthDate"]["extension"]
    assert reason == [
        {
            "url": "http://hl7.org/fhir/StructureDefinition/data-absent-reason",
            "valueCode": "masked",
        }
    ]
    assert left["address"] == [{"extension": reason}] * len(whole["address"])


# --- Index ----------------------------------------------------------------------------------------


def tags(resource: Json) -> set[str]:
    return {tag["code"] for tag in resource["meta"]["tag"]}


@pytest.mark.parametrize(
    ("stored", "searched"),
    [
        ({"value": "AB-1"}, "ab-1"),
        ({"value": " \uff21\uff22-1 "}, "AB-1"),
        ({"value": "Straße"}, "STRASSE"),
        ({"value": "1", "system": "urn:x"}, "1"),
        ({"value": "1", "system": "urn:x"}, "urn:x|1"),
        ({"value": "1"}, "|1"),
        ({"value": "a|b,c$d\\e", "system": "urn:x"}, r"urn:x|a\|b\,c\$d\\e"),
    ],
)
def test_an_indexed_value_is_found_by_its_token(stored: Json, searched: str) -> None:
    sealer = MemorySealer()
    sealed = PLAN.protect(patient(identifier=[stored]), person=ME, sealer=sealer)
    tokens = PLAN.search_tokens("Patient", "identifier", searched, sealer=sealer)
    assert tokens is not None
    assert set(tokens) <= tags(sealed)


@pytest.mark.parametrize("searched", ["2", "urn:y|1", "|1", "urn:x|2", "1x"])
def test_another_value_is_not_found(searched: str) -> None:
    sealer = MemorySealer()
    stored = {"value": "1", "system": "urn:x"}
    sealed = PLAN.protect(patient(identifier=[stored]), person=ME, sealer=sealer)
    tokens = PLAN.search_tokens("Patient", "identifier", searched, sealer=sealer)
    assert tokens
    assert not set(tokens) & tags(sealed)


@pytest.mark.parametrize("searched", ["", " ", "urn:x|", "|"])
def test_what_equality_cannot_answer_is_refused(searched: str) -> None:
    with pytest.raises(UnsupportedError):
        PLAN.search_tokens("Patient", "identifier", searched, sealer=MemorySealer())


def test_only_indexed_parameters_have_tokens_and_their_tags_do_not_reach_clients() -> None:
    sealer = MemorySealer()
    assert PLAN.search_tokens("Patient", "given", "Al", sealer=sealer) is None
    assert PLAN.search_tokens("Group", "family", "Fry", sealer=sealer) is None
    for meta in ({}, {"meta": {"versionId": "1"}}, {"meta": {"tag": [{"code": "mine"}]}}):
        resource = patient(**meta)
        sealed = PLAN.protect(resource, person=ME, sealer=sealer)
        assert index_system("family") in texts(sealed)
        assert PLAN.unprotect(sealed, person=ME, sealer=sealer) == resource


def test_parameters_that_look_into_sealed_elements_are_named() -> None:
    assert PLAN.sealed_parameters("Patient") >= {
        "family", "given", "name", "phonetic", "birthdate", "address", "address-city", "identifier",
        "death-date", "deceased", "phone", "email", "_text", "_content", "_filter",
    }  # fmt: skip
    assert not PLAN.sealed_parameters("Patient") & {"gender", "_id", "_lastUpdated", "active"}
    assert PLAN.sealed_parameters("Observation") >= {"value-string", "code-value-quantity", "date"}
    assert PLAN.sealed_parameters("Encounter") == frozenset()


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ([{"path": "Patient.nme.family", "seal": True}], "“name”"),
        ([{"path": "Patent.name", "seal": True}], "“Patient”"),
        ([{"path": "Patient", "seal": True}], "Type.element"),
        ([{"path": "HumanName.family", "seal": True}], "Type.element"),
        ([{"path": "Patient.birthDate.x", "mask": True}], "“x”"),
        ([{"path": "Patient.name"}], "nothing is to be done"),
        ([{"path": "Patient.name.family", "index": "family", "mask": True}], "`seal` beside"),
        ([{"path": "Patient.id", "seal": True}], "read this one itself"),
        ([{"path": "Patient.contained", "seal": True}], "read this one itself"),
        ([{"path": "Observation.subject", "seal": True}], "whose the record is"),
        ([{"path": "Observation.subject.reference", "seal": True}], "whose the record is"),
        ([{"path": "Appointment.participant", "seal": True}], "whose the record is"),
        ([{"path": "Condition.note", "seal": True}], "Condition.note.text"),
        ([{"path": "Patient.text", "seal": True}], "Patient.text.status"),
        ([{"path": "Patient.name", "seal": True, "index": "name"}], "name its part"),
        ([{"path": "Patient.birthDate", "seal": True, "index": "family"}], "none of them"),
        ([{"path": "Patient.birthDate", "seal": True, "index": "A B"}], "another name"),
        ([{"path": "Patient.name", "seal": True}] * 2, "twice"),
        ([{"path": "Patient.name", "seal": True}, {"path": "Patient.name.family", "seal": True}],
         "a part of this one"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused_in_words(
    fields: list[dict[str, Any]], says: str
) -> None:
    with pytest.raises(GatewayConfigurationError) as raised:
        compile_fields([FieldSettings(**one) for one in fields], service="ehr")
    assert says in str(raised.value)


def test_masks_are_named_for_what_may_be_contained_too() -> None:
    made = compile_fields([FieldSettings(path="Patient.address", mask=True)], service="ehr")
    assert made.masks("Observation") == {"Patient.address"}
    assert not made.needs(patient(address=[{"city": "X"}]))


def test_what_the_sealer_cannot_do_stops_everything() -> None:
    class Broken(MemorySealer):
        def seal(self, *, person: str, service: str, field: str, plaintext: bytes) -> str:
            raise PersonErasedError("erased")

    with pytest.raises(PersonErasedError):
        PLAN.protect(patient(), person=ME, sealer=Broken())
