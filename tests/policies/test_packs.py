"""The built-in rules: each is decided by a case of its own, and the promises hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from policies.bundle import Rule, load
from policies.cases import BUILT_IN, Case, load_cases, run_cases
from policies.engine import Engine
from policies.model import Allowed, Decision
from policies.table import rule_table

BUNDLE = load()
ENGINE = Engine(BUNDLE)
CASES = load_cases([BUILT_IN])
DOCUMENT = Path(__file__).parents[2] / "docs" / "policies.md"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_holds(case: Case) -> None:
    (result,) = run_cases(ENGINE, [case])
    assert not result.problem


def differs(rule: Rule, before: Decision, after: Decision) -> bool:
    """Allowed turned denied or back; a rule that only adds must change what is added or refused."""
    if isinstance(before, Allowed) is not isinstance(after, Allowed):
        return True
    if rule.effect == "forbid" or rule.grants:
        return False
    return (
        isinstance(before, Allowed)
        and isinstance(after, Allowed)
        and (before.obligations != after.obligations)
    )


@pytest.mark.parametrize("rule", BUNDLE.rules, ids=lambda rule: rule.id)
def test_every_rule_alone_decides_one_of_its_cases(rule: Rule) -> None:
    without = Engine(BUNDLE.without(rule.id))
    mine = [case for case in CASES if case.decides == rule.id]
    assert mine, f"{rule.id} has no case"
    assert any(
        differs(rule, ENGINE.decide(case.request), without.decide(case.request)) for case in mine
    )


@pytest.mark.parametrize("rule", BUNDLE.rules, ids=lambda rule: rule.id)
def test_every_rule_cites_the_paragraph_it_implements(rule: Rule) -> None:
    assert "CFR" in rule.cites or "SMART" in rule.cites


def test_the_table_in_the_documentation_is_current() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == rule_table(BUNDLE)
