"""Explanations name what decided and what would truly change it."""

from __future__ import annotations

import pytest

from policies.bundle import load
from policies.cases import BUILT_IN, Case, load_cases
from policies.engine import Engine
from policies.explain import explain
from policies.model import Allowed

BUNDLE = load()
CASES = load_cases([BUILT_IN])


def case_of(rule: str) -> Case:
    return next(case for case in CASES if case.decides == rule)


@pytest.mark.parametrize(
    ("rule", "kind", "words"),
    [
        ("identity.second-factor", "second_factor", "with a second factor shown just now"),
        ("identity.fresh.restricted", "second_factor", "with a second factor shown just now"),
        ("necessary.care-team", "care_team", "on this patient's care team"),
        ("necessary.care-team", "break_glass", "with break-glass for this patient"),
        ("part2.consent", "consent", "with the patient's consent that names these records"),
        ("psynotes.author-only", "consent", "with the patient's consent that names these records"),
        ("service.purpose", "purpose", "for the purpose TREAT"),
    ],
)
def test_a_denial_says_which_circumstance_would_change_it(rule: str, kind: str, words: str) -> None:
    explanation = explain(BUNDLE, case_of(rule).request)
    assert not isinstance(explanation.decision, Allowed)
    assert any(rule in sentence for sentence in explanation.because)
    assert any(kind in change.kinds and words in change.text for change in explanation.changes)


def test_an_explanation_says_which_rule_would_change_it() -> None:
    for rule in ("necessary.care-team", "role.clinician.read", "consent.denied"):
        explanation = explain(BUNDLE, case_of(rule).request)
        assert any(one.kinds == ("rule",) and rule in one.text for one in explanation.changes)


def test_an_access_says_what_it_depends_on() -> None:
    explanation = explain(BUNDLE, case_of("role.clinician.read").request)
    kinds = {kind for one in explanation.changes for kind in one.kinds}
    assert {"second_factor", "care_team", "consent", "role", "rule"} <= kinds
    grant = explain(BUNDLE, case_of("break-glass.open").request)
    assert any("without the break-glass" in one.text for one in grant.changes)


def test_two_circumstances_are_named_together_when_one_is_not_enough() -> None:
    request = next(case for case in CASES if case.name == "nobody unknown reads a record").request
    explanation = explain(BUNDLE, request)
    assert explanation.because == (
        "No rule allows this.",
        "What can be done: Ask your administrator whether your role should allow this.",
    )
    assert all(len(one.kinds) == 1 or len(set(one.kinds)) == 2 for one in explanation.changes)


@pytest.mark.parametrize("case", CASES[::4], ids=lambda case: case.name)
def test_the_explained_decision_is_the_decision(case: Case) -> None:
    explanation = explain(BUNDLE, case.request)
    assert explanation.decision == Engine(BUNDLE).decide(case.request)
    assert explanation.because


def test_no_explanation_names_a_person() -> None:
    for case in CASES[::6]:
        told = repr(explain(BUNDLE, case.request))
        assert case.request.principal.id not in told or case.request.principal.id == "anonymous"
        assert "'p1'" not in told
