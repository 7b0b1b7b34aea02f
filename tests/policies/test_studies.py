"""Studies and records never mix, and whoever asks about a study is somebody with a fresh factor."""

from __future__ import annotations

from dataclasses import replace

import pytest

from policies.bundle import load
from policies.engine import Engine
from policies.model import (
    ACTIONS,
    ROLES,
    STUDY_ACTIONS,
    Allowed,
    Assurance,
    Context,
    Denied,
    Principal,
    Request,
    Resource,
    StudyStanding,
)

NOW = 1_800_000_000.0
ENGINE = Engine(load())
STUDY = Resource(service="studies", kind="generic", type="Study", id="s", study=StudyStanding())
EVERYTHING = StudyStanding(capacity="site", own_site=True, approved=True)


def ask(action: str, resource: Resource, **changes: object) -> Request:
    principal = Principal(
        kind="user",
        id="x",
        roles=frozenset(ROLES),
        assurance=Assurance(second_factor="totp", second_factor_at=NOW),
    )
    return Request(
        principal=replace(principal, **changes),  # type: ignore[arg-type]
        action=action,  # type: ignore[arg-type]
        resource=resource,
        context=Context(purpose="HRESCH", now=NOW),
    )


@pytest.mark.parametrize("action", STUDY_ACTIONS)
def test_a_person_with_every_role_may_do_it(action: str) -> None:
    decision = ENGINE.decide(ask(action, replace(STUDY, study=EVERYTHING)))
    assert isinstance(decision, Allowed)


@pytest.mark.parametrize("action", ACTIONS)
def test_no_rule_of_records_opens_a_study(action: str) -> None:
    decision = ENGINE.decide(ask(action, replace(STUDY, study=EVERYTHING)))
    assert isinstance(decision, Denied)
    assert decision.failure == "policies.unknown_word"


@pytest.mark.parametrize("action", STUDY_ACTIONS)
def test_no_rule_of_studies_opens_a_record(action: str) -> None:
    decision = ENGINE.decide(ask(action, replace(STUDY, study=None, kind="ehr")))
    assert isinstance(decision, Denied)
    assert decision.failure == "policies.unknown_word"


@pytest.mark.parametrize("action", STUDY_ACTIONS)
@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "service"},
        {"kind": "anonymous"},
        {"assurance": Assurance()},
        {"assurance": Assurance(second_factor="totp", second_factor_at=NOW - 901)},
        {"assurance": Assurance(second_factor="totp", second_factor_at=NOW + 60)},
    ],
)
def test_nobody_else_may_do_anything(action: str, changes: dict[str, object]) -> None:
    decision = ENGINE.decide(ask(action, replace(STUDY, study=EVERYTHING), **changes))
    assert isinstance(decision, Denied)


def test_an_unknown_capacity_is_denied() -> None:
    standing = replace(EVERYTHING, capacity="king")  # type: ignore[arg-type]
    decision = ENGINE.decide(ask("study-approve", replace(STUDY, study=standing)))
    assert isinstance(decision, Denied)
    assert decision.failure == "policies.unknown_word"


def test_an_answer_that_is_kept_is_not_another_studys() -> None:
    yes = replace(STUDY, study=EVERYTHING)
    assert isinstance(ENGINE.decide(ask("study-run", yes)), Allowed)
    no = replace(STUDY, study=replace(EVERYTHING, approved=False))
    assert isinstance(ENGINE.decide(ask("study-run", no)), Denied)
    assert isinstance(ENGINE.decide(ask("study-run", yes)), Allowed)
