"""SMART scopes: no more than was given."""

from __future__ import annotations

import pytest

from policies.model import Action, Principal, PrincipalKind, Resource
from policies.scopes import scopes_cover


def covers(
    *scopes: str,
    action: Action = "read",
    kind: PrincipalKind = "user",
    patient: str = "p1",
    own: str | None = None,
) -> bool:
    principal = Principal(kind=kind, id="x", scopes=frozenset(scopes), patient=own)
    resource = Resource(service="ehr", kind="ehr", type="Observation", patient=patient)
    return scopes_cover(principal, action, resource)


@pytest.mark.parametrize(
    ("scope", "action", "expected"),
    [
        ("user/Observation.rs", "read", True),
        ("user/Observation.rs", "search", True),
        ("user/Observation.r", "search", False),
        ("user/Observation.rs", "create", False),
        ("user/Observation.c", "create", True),
        ("user/Observation.u", "patch", True),
        ("user/Observation.d", "delete", True),
        ("user/*.cruds", "update", True),
        ("user/Observation.read", "read", True),
        ("user/Observation.write", "delete", True),
        ("user/Observation.write", "read", False),
        ("user/*.*", "delete", True),
        ("user/Condition.rs", "read", False),
        ("user/Observation.rs?category=x", "read", False),
        ("user/Observation.sr", "read", False),
        ("user/Observation.", "read", False),
        ("USER/Observation.rs", "read", False),
        ("user/Observation.rs extra", "read", False),
        ("openid", "read", False),
        ("user/*.cruds", "connect", False),
        ("system/*.cruds", "read", False),
    ],
)
def test_scope_covers(scope: str, action: Action, *, expected: bool) -> None:
    assert covers(scope, action=action) is expected


def test_patient_scopes_reach_only_the_patient_in_context() -> None:
    assert covers("patient/*.rs", own="p1")
    assert not covers("patient/*.rs", own="p2")
    assert not covers("patient/*.rs")


def test_services_have_system_scopes_only() -> None:
    assert covers("system/*.rs", kind="service")
    assert not covers("user/*.rs", kind="service")


def test_two_scopes_do_not_add_up_to_one_interaction() -> None:
    assert not covers("user/Observation.r", "user/Observation.s", action="export")
    assert covers("user/Observation.rs", action="export")
