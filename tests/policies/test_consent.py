"""What consents say: the order of decision, and every doubt against release."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from fhir.resources.R4B.consent import Consent as FHIRConsent
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.consent import MAX_CONSENTS, judge, parse_consent
from policies.model import Action, ConsentVerdict, Context, Principal, Purpose, Request, Resource

NOW = datetime(2026, 6, 15, 12, tzinfo=UTC).timestamp()
SYSTEM = "http://terminology.hl7.org/CodeSystem/"


def coding(system: str, code: str) -> dict[str, str]:
    return {"system": SYSTEM + system, "code": code}


def label(code: str) -> dict[str, str]:
    return coding("v3-Confidentiality" if len(code) == 1 else "v3-ActCode", code)


def consent(provision: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "resourceType": "Consent",
        "id": "c1",
        "status": "active",
        "scope": {"coding": [coding("consentscope", "patient-privacy")]},
        "category": [{"coding": [{"system": "http://loinc.org", "code": "59284-0"}]}],
        "patient": {"reference": "Patient/p1"},
        "policyRule": {"coding": [coding("v3-ActCode", "OPTIN")]},
        **({"provision": provision} if provision is not None else {}),
        **changes,
    }


def request(
    *,
    purpose: Purpose = "TREAT",
    action: Action = "read",
    labels: frozenset[str] = frozenset(),
    **resource: Any,
) -> Request:
    return Request(
        principal=Principal(kind="user", id="t1", references=frozenset({"Practitioner/7"})),
        action=action,
        resource=replace(
            Resource(
                service="ehr", kind="ehr", type="Condition", id="1", patient="p1", labels=labels
            ),
            **resource,
        ),
        context=Context(purpose=purpose, now=NOW),
    )


def verdict(asked: Request, *consents: dict[str, Any]) -> ConsentVerdict:
    for one in consents:
        FHIRConsent.model_validate(one)
    return judge([parse_consent(one) for one in consents], asked)


def said(found: ConsentVerdict) -> str:
    if found.unreadable:
        return "unreadable"
    return "deny" if found.denies else "permit" if found.permits else "silent"


PRACTITIONER = {
    "role": {"coding": [coding("v3-ParticipationType", "PRCP")]},
    "reference": {"reference": "Practitioner/7"},
}
OTHER = {**PRACTITIONER, "reference": {"reference": "Practitioner/8"}}
CONDITIONS = {"system": "http://hl7.org/fhir/resource-types", "code": "Condition"}


@pytest.mark.parametrize(
    ("provision", "expected"),
    [
        (None, "permit"),
        ({}, "permit"),
        ({"type": "deny"}, "deny"),
        ({"type": "permit", "period": {"start": "2026-01-01", "end": "2026-12-31"}}, "permit"),
        ({"type": "permit", "period": {"end": "2026-06-14"}}, "silent"),
        ({"type": "permit", "period": {"end": "2026-06-15"}}, "permit"),
        ({"type": "permit", "period": {"end": "2026"}}, "permit"),
        ({"type": "permit", "period": {"start": "2026-07"}}, "silent"),
        ({"type": "permit", "period": {"start": "2026-06-15T14:00:01+02:00"}}, "silent"),
        ({"type": "permit", "period": {"start": "2026-06-15T13:59:59+02:00"}}, "permit"),
        ({"type": "permit", "purpose": [coding("v3-ActReason", "TREAT")]}, "permit"),
        ({"type": "permit", "purpose": [coding("v3-ActReason", "HRESCH")]}, "silent"),
        ({"type": "deny", "purpose": [coding("v3-ActReason", "HRESCH")]}, "silent"),
        ({"type": "permit", "actor": [PRACTITIONER]}, "permit"),
        ({"type": "permit", "actor": [OTHER]}, "silent"),
        ({"type": "permit", "actor": [OTHER, PRACTITIONER]}, "permit"),
        ({"type": "permit", "class": [CONDITIONS]}, "permit"),
        ({"type": "permit", "class": [{**CONDITIONS, "code": "Observation"}]}, "silent"),
        ({"type": "permit", "action": [{"coding": [coding("consentaction", "access")]}]}, "permit"),
        (
            {"type": "permit", "action": [{"coding": [coding("consentaction", "correct")]}]},
            "silent",
        ),
        ({"type": "permit", "securityLabel": [label("HIV")]}, "silent"),
        ({"type": "permit", "securityLabel": [label("N")]}, "permit"),
        ({"type": "permit", "securityLabel": [label("L")]}, "silent"),
        ({"type": "deny", "securityLabel": [label("R")]}, "silent"),
        ({"type": "deny", "securityLabel": [label("N")]}, "deny"),
        # What cannot be judged counts against release.
        ({"type": "permit", "dataPeriod": {"start": "2020"}}, "silent"),
        ({"type": "deny", "dataPeriod": {"start": "2020"}}, "deny"),
        ({"type": "permit", "code": [{"coding": [{"code": "1"}]}]}, "silent"),
        ({"type": "deny", "code": [{"coding": [{"code": "1"}]}]}, "deny"),
        ({"type": "deny", "purpose": [coding("own", "SOMETHING")]}, "deny"),
        ({"type": "permit", "purpose": [coding("own", "SOMETHING")]}, "silent"),
        ({"type": "deny", "securityLabel": [label("SEX")]}, "deny"),
        (
            {"type": "deny", "data": [{"meaning": "related", "reference": {"reference": "X/1"}}]},
            "deny",
        ),
        (
            {
                "type": "permit",
                "data": [{"meaning": "instance", "reference": {"reference": "Condition/1"}}],
            },
            "permit",
        ),
        (
            {
                "type": "deny",
                "data": [{"meaning": "instance", "reference": {"reference": "Condition/2"}}],
            },
            "silent",
        ),
        # Nested provisions are exceptions; the deepest decides, and of one depth a denial.
        ({"type": "permit", "provision": [{"type": "deny", "actor": [PRACTITIONER]}]}, "deny"),
        ({"type": "permit", "provision": [{"type": "deny", "actor": [OTHER]}]}, "permit"),
        ({"type": "deny", "provision": [{"type": "permit", "class": [CONDITIONS]}]}, "permit"),
        (
            {"type": "deny", "provision": [{"type": "permit", "dataPeriod": {"start": "2020"}}]},
            "deny",
        ),
        (
            {
                "type": "permit",
                "provision": [
                    {
                        "type": "deny",
                        "class": [CONDITIONS],
                        "provision": [{"type": "permit", "actor": [PRACTITIONER]}],
                    }
                ],
            },
            "permit",
        ),
        (
            {
                "type": "permit",
                "provision": [
                    {"type": "permit", "class": [CONDITIONS]},
                    {"type": "deny", "actor": [PRACTITIONER]},
                ],
            },
            "deny",
        ),
    ],
)
def test_one_consent_says(provision: dict[str, Any] | None, expected: str) -> None:
    assert said(verdict(request(), consent(provision))) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"status": "inactive"}, "silent"),
        ({"status": "rejected"}, "silent"),
        ({"status": "entered-in-error"}, "silent"),
        ({"status": "draft"}, "silent"),
        ({"policyRule": {"coding": [coding("v3-ActCode", "OPTOUT")]}}, "deny"),
        ({"policyRule": {"text": "as discussed"}}, "silent"),
        ({"patient": {"reference": "Patient/p2"}}, "silent"),
        ({"patient": {"reference": "https://fhir.example/r4/Patient/p1"}}, "permit"),
        ({"scope": {"coding": [coding("consentscope", "research")]}}, "silent"),
        ({"scope": {"coding": [coding("consentscope", "treatment")]}}, "silent"),
    ],
)
def test_only_consents_in_force_about_this_patients_data_count(
    changes: dict[str, Any], expected: str
) -> None:
    assert said(verdict(request(), consent(**changes))) == expected


def test_a_research_consent_serves_research() -> None:
    scope = {"coding": [coding("consentscope", "research")]}
    assert said(verdict(request(purpose="HRESCH"), consent(scope=scope))) == "permit"


def test_between_consents_a_denial_wins() -> None:
    yes = consent({"type": "permit", "securityLabel": [label("42CFRPart2")]}, id="yes")
    no = consent({"type": "deny", "actor": [PRACTITIONER]}, id="no")
    found = verdict(request(labels=frozenset({"42CFRPart2"})), yes, no)
    assert found == ConsentVerdict(denies=True, consents=("no", "yes"))


def test_a_revoked_refusal_no_longer_denies() -> None:
    no = consent({"type": "deny"}, id="no", status="inactive")
    assert said(verdict(request(), consent(), no)) == "permit"


def test_a_general_permission_authorises_no_special_label() -> None:
    found = verdict(request(labels=frozenset({"42CFRPart2", "SUD"})), consent())
    assert (found.permits, found.authorises) == (True, frozenset())


@pytest.mark.parametrize(
    ("named", "authorised"),
    [
        ("42CFRPart2", {"SUD", "ETHUD", "42CFRPart2"}),
        ("SUD", {"SUD", "ETHUD", "42CFRPart2"}),
        ("PSY", {"PSY"}),
    ],
)
def test_a_permission_authorises_the_label_it_names(named: str, authorised: set[str]) -> None:
    labels = frozenset({"42CFRPart2", "SUD", "PSY", "PSYTHPN"})
    found = verdict(
        request(labels=labels), consent({"type": "permit", "securityLabel": [label(named)]})
    )
    assert found.authorises == authorised


def test_a_refusal_of_treatment_reaches_its_coordination() -> None:
    no = consent({"type": "deny", "purpose": [coding("v3-ActReason", "TREAT")]})
    assert said(verdict(request(purpose="COORD"), no)) == "deny"
    assert said(verdict(request(purpose="BTG"), no)) == "deny"
    assert said(verdict(request(purpose="HPAYMT"), no)) == "silent"


def test_a_record_of_nobody_needs_no_consent() -> None:
    assert verdict(request(patient=None), consent({"type": "deny"})) == ConsentVerdict()


@pytest.mark.parametrize(
    "broken",
    [
        consent(status="aktiv"),
        consent(scope={}),
        consent(scope={"coding": [coding("consentscope", "everything")]}),
        consent({"type": "perhaps"}),
        consent({"provision": [{}]}),
        consent({"period": {"start": "yesterday"}}),
        consent({"period": {"start": "2026-13-01"}}),
        consent({"period": {"start": "2027", "end": "2026"}}),
        consent({"period": {"end": "0000-12-31"}}),
        consent({"type": "permit", "modifierExtension": [{"url": "x"}]}),
        consent(modifierExtension=[{"url": "x"}]),
        consent(implicitRules="http://example.org/rules"),
        consent({"type": "permit", "actor": [{"role": {}}]}),
        consent({"type": "permit", "actor": "everybody"}),
        consent(patient={"display": "somebody"}),
        consent(patient={"reference": "Group/7"}),
        {"resourceType": "Patient"},
        {},
        None,
        [],
        "permit",
    ],
)
def test_what_cannot_be_understood_denies_what_it_may_concern(broken: Any) -> None:
    found = judge([parse_consent(consent()), parse_consent(broken)], request())
    assert found.unreadable


def test_an_unreadable_consent_of_somebody_else_or_not_in_force_concerns_nobody_here() -> None:
    other = consent({"type": "?"}, patient={"reference": "Patient/p2"})
    old = consent({"type": "?"}, status="inactive")
    found = judge([parse_consent(one) for one in (consent(), other, old)], request())
    assert said(found) == "permit"


def test_a_consent_nested_too_deep_is_unreadable() -> None:
    provision: dict[str, Any] = {"type": "permit"}
    for _ in range(5000):
        provision = {"type": "permit", "provision": [provision]}
    assert not parse_consent(consent(provision)).readable


def test_more_consents_than_any_patient_has_are_unreadable() -> None:
    many = [parse_consent(consent())] * (MAX_CONSENTS + 1)
    assert judge(many, request()) == ConsentVerdict(unreadable=True)


provisions = st.recursive(
    st.fixed_dictionaries({"type": st.sampled_from(["permit", "deny"])}),
    lambda inner: st.fixed_dictionaries(
        {
            "type": st.sampled_from(["permit", "deny"]),
            "provision": st.lists(inner, max_size=3),
            "purpose": st.lists(
                st.sampled_from(["TREAT", "HRESCH"]).map(lambda code: coding("v3-ActReason", code)),
                max_size=2,
            ),
        }
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(provisions, max_size=4), provisions)
def test_one_more_consent_never_turns_a_refusal_into_a_permission(
    given_: list[dict[str, Any]], more: dict[str, Any]
) -> None:
    before = [parse_consent(consent(one)) for one in given_]
    if judge(before, request()).denies:
        assert judge([*before, parse_consent(consent(more))], request()).denies


@settings(max_examples=200, deadline=None)
@given(provisions)
def test_a_constraint_that_cannot_be_judged_never_permits_more(provision: dict[str, Any]) -> None:
    plain = judge([parse_consent(consent(provision))], request())
    vague = {**provision, "dataPeriod": {"start": "2020"}}
    found = judge([parse_consent(consent(vague))], request())
    assert not found.permits or plain.permits
    assert found.denies or not plain.denies


OPTED_OUT = {"coding": [coding("v3-ActCode", "OPTOUT")]}
PERMIT_TREATMENT = {"type": "permit", "purpose": [coding("v3-ActReason", "TREAT")]}


def judged(resource: dict[str, Any], asked: Request) -> ConsentVerdict:
    FHIRConsent.model_validate(resource)
    return judge([parse_consent(resource)], asked)


def test_who_opted_out_and_permits_one_thing_denies_the_rest() -> None:
    one = consent(PERMIT_TREATMENT, policyRule=OPTED_OUT)
    assert judged(one, request()).permits
    assert judged(one, request(purpose="HRESCH")).denies
    over = {**PERMIT_TREATMENT, "period": {"end": "2020"}}
    assert not judged(consent(over, policyRule=OPTED_OUT), request(purpose="HRESCH")).denies


def actor(reference: str) -> dict[str, Any]:
    role = {"coding": [coding("v3-RoleClass", "PRCP")]}
    return {"role": role, "reference": {"reference": reference}}


@pytest.mark.parametrize(
    ("reference", "denies", "permits"),
    [
        ("Practitioner/7", True, True),
        ("Practitioner/8", False, False),
        ("https://ehr.example/fhir/Practitioner/7", True, False),
        ("Practitioner/7/_history/2", True, False),
        ("Organization/1", True, False),
        ("CareTeam/1", True, False),
        ("Patient/p1", True, False),
    ],
)
def test_an_actor_of_whom_nothing_is_known_is_refused_and_not_permitted(
    reference: str, *, denies: bool, permits: bool
) -> None:
    for direction, expected in (("deny", denies), ("permit", permits)):
        verdict = judged(consent({"type": direction, "actor": [actor(reference)]}), request())
        assert (verdict.denies if direction == "deny" else verdict.permits) is expected


def test_an_exception_to_what_may_not_apply_permits_nothing() -> None:
    inner = {"type": "permit", "securityLabel": [label("PSYTHPN")]}
    outer = {"type": "deny", "dataPeriod": {"start": "2020"}, "provision": [inner]}
    verdict = judged(consent(outer), request(labels=frozenset({"PSYTHPN"})))
    assert (verdict.denies, verdict.authorises) == (True, frozenset())


@pytest.mark.parametrize("action", ["export", "disclose", "connect", "execute", "patch", "count"])
@pytest.mark.parametrize("refused", ["access", "use"])
def test_who_refuses_access_refuses_every_way_to_see_the_record(
    refused: str, action: Action
) -> None:
    concept = {"coding": [coding("consentaction", refused)]}
    assert judged(consent({"type": "deny", "action": [concept]}), request(action=action)).denies


@pytest.mark.parametrize(
    ("code", "purpose"), [("CLINTRCH", "HRESCH"), ("HOPERAT", "HLEGAL"), ("PurposeOfUse", "TREAT")]
)
def test_a_refused_purpose_reaches_what_may_be_it(code: str, purpose: Purpose) -> None:
    provision = {"type": "deny", "purpose": [coding("v3-ActReason", code)]}
    assert judged(consent(provision), request(purpose=purpose)).denies
    provision = {"type": "permit", "purpose": [coding("v3-ActReason", code)]}
    assert not judged(consent(provision), request(purpose=purpose)).permits


def test_a_refused_record_is_refused_by_its_whole_address_too() -> None:
    data = {"meaning": "instance", "reference": {"reference": "https://ehr.example/Condition/1"}}
    assert judged(consent({"type": "deny", "data": [data]}), request()).denies
    assert not judged(consent({"type": "permit", "data": [data]}), request()).permits


def test_an_actor_whose_meaning_is_modified_makes_the_consent_unreadable() -> None:
    modified = {
        **actor("Practitioner/8"),
        "modifierExtension": [{"url": "x", "valueBoolean": True}],
    }
    assert judge(
        [parse_consent(consent({"type": "deny", "actor": [modified]}))], request()
    ).unreadable


def test_a_period_without_end_can_be_written_as_the_last_day() -> None:
    period = {"start": "2020-01-01", "end": "9999-12-31"}
    assert judged(consent({"type": "permit", "period": period}), request()).permits
