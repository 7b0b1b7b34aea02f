"""Cases of a clinic test what they say, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from policies.bundle import load
from policies.cases import load_cases, parse_cases, parse_request, run_cases
from policies.engine import Engine
from policies.errors import CaseError, MalformedRequestError, PolicyConfigurationError

ENGINE = Engine(load())
GOOD = """
[who.therapist]
id = "t1"
roles = ["clinician"]
second_factor_age_s = 60
care_team = ["p1"]

[[case]]
name = "reads"
expect = "allow"
decides = "role.clinician.read"
obligations = []
action = "read"
principal = {who = "therapist"}
resource = {type = "Observation", patient = "p1"}
"""


def problem(text: str) -> str:
    (result,) = run_cases(ENGINE, parse_cases(text, where="own.toml"))
    return result.problem


def test_a_case_that_holds_has_no_problem() -> None:
    assert not problem(GOOD)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ('"allow"', '"deny"', "expected deny, found allow by role.clinician.read"),
        ("role.clinician.read", "role.nurse.read", "expected role.nurse.read to decide"),
        ("obligations = []", 'obligations = ["Redact"]', "expected obligations ['Redact']"),
        ('care_team = ["p1"]', "", "expected allow, found deny by necessary.care-team"),
        ('who = "therapist"', 'who = "therapist", roles = []', "found deny by no rule"),
    ],
)
def test_a_case_that_does_not_hold_says_why(before: str, after: str, expected: str) -> None:
    assert expected in problem(GOOD.replace(before, after))


def test_a_wrong_remedy_is_a_problem() -> None:
    text = GOOD.replace('care_team = ["p1"]', "").replace('"allow"', '"deny"')
    text = text.replace("role.clinician.read", "necessary.care-team").replace(
        "obligations = []", 'remedy = "consent"'
    )
    assert problem(text) == "expected remedy consent, found break_glass"


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        GOOD + "\n[other]\n",
        GOOD.replace("decides", "decide"),
        GOOD.replace("patient =", "patent ="),
        GOOD.replace('"read"', '"peek"'),
        GOOD.replace('who = "therapist"', 'who = "nobody"'),
        GOOD.replace("care_team", "careteam"),
        GOOD.replace("principal", "principle"),
    ],
)
def test_a_misspelt_case_is_refused_and_named(text: str) -> None:
    with pytest.raises(CaseError, match=r"own\.toml"):
        parse_cases(text, where="own.toml")


def test_a_request_that_is_none_is_refused() -> None:
    with pytest.raises(MalformedRequestError):
        parse_request('action = "read"')


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyConfigurationError, match="cases_directory"):
        load_cases([tmp_path / "nowhere"])
