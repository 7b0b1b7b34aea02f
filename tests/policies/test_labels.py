"""Labels are found wherever codes stand, and are never taken away."""

from __future__ import annotations

from typing import Any

import pytest
from fhir.resources.R4B.bundle import Bundle as FHIRBundle
from fhir.resources.R4B.condition import Condition
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.errors import UnlabelledContentError
from policies.labels import MAX_DEPTH, Labeller, Labels
from policies.model import CONFIDENTIALITY, LABELS, ServiceKind
from policies.tables import load_tables

LABELLER = Labeller(load_tables())
ICD = "http://hl7.org/fhir/sid/icd-10-cm"
SNOMED = "http://snomed.info/sct"
LOINC = "http://loinc.org"
RXNORM = "http://www.nlm.nih.gov/research/umls/rxnorm"
ACT = "http://terminology.hl7.org/CodeSystem/v3-ActCode"
LEVEL = "http://terminology.hl7.org/CodeSystem/v3-Confidentiality"


def condition(system: str, code: str) -> dict[str, Any]:
    return {
        "resourceType": "Condition",
        "subject": {"reference": "Patient/1"},
        "code": {"coding": [{"system": system, "code": code}]},
    }


def labels(content: object, kind: ServiceKind = "ehr") -> Labels:
    return LABELLER.label(content, kind=kind).whole


@pytest.mark.parametrize(
    ("system", "code", "expected"),
    [
        (ICD, "F32.1", {"PSY"}),
        (ICD, "F321", {"PSY"}),
        (ICD, "f32.1", {"PSY"}),
        (ICD, "F10.20", {"PSY", "SUD", "ETHUD", "42CFRPart2"}),
        (ICD, "F11.20", {"PSY", "SUD", "42CFRPart2"}),
        (ICD, "F17.210", {"PSY"}),
        (ICD, "B20", {"HIV"}),
        (ICD, "Z21", {"HIV"}),
        (ICD, "T74.11XA", {"SDV"}),
        (ICD, "X78.1XXA", {"PSY"}),
        (ICD, "Z04.71", {"SDV"}),
        (ICD, "Z04.72", {"SDV"}),
        (ICD, "R45.88", {"PSY"}),
        (ICD, "T40.1X1A", {"SUD", "42CFRPart2"}),
        (ICD, "T39.1X2A", {"PSY"}),
        (ICD, "T43.622S", {"PSY"}),
        (ICD, "T36.92XA", {"PSY"}),
        (ICD, "T71.112A", {"PSY"}),
        (ICD, "T39.1X1A", set()),
        (ICD, "J45.909", set()),
        (ICD + "|2026", "B20", {"HIV"}),
        ("ICD-10", "B20", {"HIV"}),
        ("2.16.840.1.113883.6.90", "B20", {"HIV"}),
        (SNOMED + "/731000124108/version/20250301", "86406008", {"HIV"}),
        ("urn:oid:2.16.840.1.113883.6.90", "F32.1", {"PSY"}),
        ("HTTPS://hl7.org/fhir/sid/icd-10-cm/", "F32.1", {"PSY"}),
        (SNOMED, "370143000", {"PSY"}),
        (SNOMED, "86406008", {"HIV"}),
        (SNOMED, "706893006", {"SDV"}),
        (SNOMED, "38341003", set()),
        (LOINC, "44261-6", {"PSY"}),
        (LOINC, "75626-2", {"SUD", "ETHUD", "42CFRPart2"}),
        (LOINC, "8867-4", set()),
        (RXNORM, "1819", {"SUD", "42CFRPart2"}),
        (RXNORM, "36437", {"PSY"}),
        (RXNORM, "161", set()),
        ("http://example.org/own", "F32.1", set()),
    ],
)
def test_code_carries_its_labels(system: str, code: str, expected: set[str]) -> None:
    Condition.model_validate(condition(system, code.strip()))
    assert labels(condition(system, code)).codes == expected


def test_a_coding_without_a_system_is_looked_up_in_every_table() -> None:
    assert labels({"code": {"coding": [{"code": "F11.20"}]}}).codes >= {"SUD"}
    assert labels({"code": {"coding": [{"code": "86406008"}]}}).codes == {"HIV"}


@pytest.mark.parametrize("word", ["FAIL", "F", "1819", "596", "final", ""])
def test_an_ordinary_word_or_short_number_is_no_code(word: str) -> None:
    assert labels({"code": word}).codes == frozenset()


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda one: {"resourceType": "Encounter", "contained": [one]},
        lambda one: {"resourceType": "Parameters", "parameter": [{"resource": one}]},
        lambda one: {"resourceType": "Encounter", "reasonCode": [one["code"]]},
        lambda one: {"extension": [{"valueCodeableConcept": one["code"]}]},
        lambda one: [{"a": [[[one]]]}],
        lambda one: {"resourceType": "Bundle", "entry": [{"resource": one}]},
        lambda one: {"resourceType": "Bundle", "entry": {"resource": one}},
        lambda one: {"resourceType": "Bundle", "contained": [one], "entry": []},
    ],
)
def test_codes_are_found_anywhere(wrapped: Any) -> None:
    assert "HIV" in labels(wrapped(condition(ICD, "B20"))).codes


def test_a_bundle_has_the_high_water_mark_of_its_entries() -> None:
    bundle = {
        "resourceType": "Bundle",
        "type": "searchset",
        "entry": [
            {"resource": condition(ICD, "J45.9")},
            {"resource": condition(ICD, "B20")},
            {"resource": {"resourceType": "Basic", "code": {"text": "x"}, "meta": tagged("V")}},
        ],
    }
    FHIRBundle.model_validate(bundle)
    found = LABELLER.label(bundle, kind="ehr")
    assert found.whole == Labels(codes=frozenset({"HIV"}), confidentiality="V")
    assert [one.confidentiality for one in found.entries] == ["N", "R", "V"]
    assert [one.codes for one in found.entries] == [frozenset(), {"HIV"}, frozenset()]


def tagged(*codes: str) -> dict[str, Any]:
    return {
        "security": [
            {"system": LEVEL if code in CONFIDENTIALITY else ACT, "code": code} for code in codes
        ]
    }


def test_psychotherapy_notes_are_very_restricted() -> None:
    note = {"resourceType": "DocumentReference", "meta": tagged("PSYTHPN")}
    assert labels(note) == Labels(codes=frozenset({"PSY", "PSYTHPN"}), confidentiality="V")


def test_of_several_levels_the_highest_holds_in_any_order() -> None:
    for codes in (("V", "N"), ("N", "V"), ("R", "V", "L")):
        assert labels({"resourceType": "Basic", "meta": tagged(*codes)}).confidentiality == "V"
    inner = {"resourceType": "Basic", "meta": tagged("V")}
    outer = {"resourceType": "Basic", "meta": tagged("L"), "contained": [inner]}
    assert labels(outer).confidentiality == "V"


def test_a_label_on_a_document_counts() -> None:
    note = {
        "resourceType": "DocumentReference",
        "securityLabel": [{"coding": [{"system": ACT, "code": "PSYTHPN"}]}],
    }
    assert "PSYTHPN" in labels(note).codes


@pytest.mark.parametrize(
    "system",
    [
        ACT,
        ACT.replace("http:", "https:"),
        ACT + "|2018-08-12",
        "http://hl7.org/fhir/v3/ActCode",
        "http://clinic.example/labels",
        7,
        None,
    ],
)
@pytest.mark.parametrize(
    ("code", "meant"), [("PSYTHPN", "PSYTHPN"), ("sud", "SUD"), ("VIO", "SDV")]
)
def test_a_label_counts_under_whatever_system_it_stands(
    system: object, code: str, meant: str
) -> None:
    for content in (
        {"meta": {"security": [{"system": system, "code": code}]}},
        {"securityLabel": [{"coding": [{"system": system, "code": code}]}]},
    ):
        found = labels({"resourceType": "DocumentReference", **content})
        assert meant in found.codes
        assert found.confidentiality in {"R", "V"}


def test_a_level_counts_under_the_names_that_older_releases_gave_it() -> None:
    security = [{"system": "http://hl7.org/fhir/v3/Confidentiality", "code": "V"}]
    assert labels({"meta": {"security": security}}).confidentiality == "V"


def test_a_document_contained_in_a_consent_keeps_its_label() -> None:
    note = {"resourceType": "DocumentReference", "securityLabel": [{"coding": [{"code": "HIV"}]}]}
    assert labels({"resourceType": "Consent", "contained": [note]}).codes == {"HIV"}


@pytest.mark.parametrize("code", [86406008, "86406008" + " " * 70])
def test_a_code_written_as_a_number_or_padded_is_found(code: object) -> None:
    assert labels({"system": SNOMED, "code": code}).codes == {"HIV"}


def test_what_a_consent_speaks_of_does_not_label_the_consent() -> None:
    consent = {
        "resourceType": "Consent",
        "provision": {"securityLabel": [{"system": ACT, "code": "PSYTHPN"}]},
    }
    assert labels(consent).codes == frozenset()


def test_a_diary_is_about_mental_health_whatever_it_says() -> None:
    assert labels({"text": "slept well"}, kind="mood").codes == {"PSY"}
    assert labels({"resourceType": "QuestionnaireResponse"}).codes == {"PSY"}


def test_a_clinic_outside_part_2_says_so() -> None:
    outside = Labeller(load_tables(), substance_use_is_part_2=False)
    found = outside.label(condition(ICD, "F11.20"), kind="ehr").whole
    assert found.codes == {"PSY", "SUD"}


def test_codes_of_other_apps_are_labelled_by_their_rules() -> None:
    assert LABELLER.label_codes([(ICD, "F32")], kind="generic").confidentiality == "R"


def test_content_that_is_too_deep_or_too_large_is_refused() -> None:
    deep: Any = {"code": {"coding": [{"system": ICD, "code": "B20"}]}}
    for _ in range(MAX_DEPTH - 10):
        deep = [deep]
    assert labels(deep).codes == {"HIV"}
    for _ in range(20):
        deep = [deep]
    with pytest.raises(UnlabelledContentError):
        labels(deep)
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UnlabelledContentError):
        labels(deep)
    small = Labeller(load_tables(), max_values=1000)
    for large in (
        [0] * 1001,
        {str(n): n for n in range(1001)},
        {"resourceType": "Bundle", "entry": [{}] * 1001},
        {"resourceType": "Bundle", "entry": [{str(n): n for n in range(1001)}]},
    ):
        with pytest.raises(UnlabelledContentError) as caught:
            small.label(large)
        assert caught.value.diagnostics()["code"] == "policies.content_unlabelled"


@pytest.mark.parametrize(
    "content",
    [
        None,
        1,
        "x",
        [],
        {},
        {"resourceType": 5},
        {"resourceType": "Bundle", "entry": 7},
        {"resourceType": "Bundle", "entry": [None, 3, "x"]},
        {"meta": {"security": "V"}},
        {"meta": {"security": [None, 1, {"code": 5}, {"system": 7, "code": "V"}]}},
        {"system": 3, "code": "B20"},
        {"coding": [{"code": ["B20"]}]},
    ],
)
def test_nonsense_is_labelled_without_failing(content: object) -> None:
    LABELLER.label(content, kind="ehr")


values = st.recursive(
    st.none() | st.booleans() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "code",
                    "system",
                    "coding",
                    "meta",
                    "security",
                    "entry",
                    "resource",
                    "resourceType",
                    "x",
                ]
            ),
            inner
            | st.sampled_from([ICD, SNOMED, ACT, LEVEL, "F10.1", "B20", "Bundle", "V", "PSYTHPN"]),
            max_size=5,
        )
    ),
    max_leaves=30,
)


@settings(max_examples=300, deadline=None)
@given(values, st.frozensets(st.sampled_from(LABELS)), st.sampled_from(CONFIDENTIALITY))
def test_labelling_never_lowers_what_is_there(
    content: object, present: frozenset[str], level: str
) -> None:
    plain = labels({"resourceType": "Basic", "meta": tagged(*present, level)})
    with_content = labels(
        {"resourceType": "Basic", "meta": tagged(*present, level), "extension": content}
    )
    rank = CONFIDENTIALITY.index
    assert present <= plain.codes <= with_content.codes
    assert rank(with_content.confidentiality) >= rank(plain.confidentiality) >= rank("N")
    assert rank(plain.confidentiality) >= rank(level)


@settings(max_examples=200, deadline=None)
@given(st.lists(values, max_size=5))
def test_no_entry_has_a_label_that_the_bundle_lacks(contents: list[object]) -> None:
    bundle = {"resourceType": "Bundle", "entry": [{"resource": one} for one in contents]}
    found = LABELLER.label(bundle, kind="ehr")
    assert len(found.entries) == len(contents)
    for entry, content in zip(found.entries, contents, strict=True):
        assert entry.codes <= found.whole.codes
        assert entry | found.whole == found.whole
        assert entry == labels({"resource": content})


def test_a_label_written_as_a_type_or_category_counts_and_in_a_consent_does_not() -> None:
    labeller = Labeller(load_tables([]))
    code = {"system": "http://terminology.hl7.org/CodeSystem/v3-ActCode", "code": "PSYTHPN"}
    note = {"resourceType": "DocumentReference", "type": {"coding": [code]}}
    assert "PSYTHPN" in labeller.label(note, kind="ehr").whole.codes
    consent = {"resourceType": "Consent", "provision": {"securityLabel": [code]}}
    assert "PSYTHPN" not in labeller.label(consent, kind="ehr").whole.codes
