"""What the rules and the gateway say can stand in the log: else the log would refuse to be written.

The log admits codes and nothing that might be content. A label or reason that it does not take
would close every record that carries it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from audit.model import Actor, Entry
from gateway.core.entries import _OBLIGATION_WORDS
from gateway.identity.model import NotIdentified
from policies.model import LABELS, PURPOSES, REMEDIES, ROLES, SECOND_FACTORS, SERVICE_KINDS
from policies.obligations import ALL
from policies.settings import PoliciesSettings
from policies.store import load_in_force

ROOT = Path(__file__).parents[2]


def entry(**changes: object) -> Entry:
    values = {
        "v": 1,
        "stage": "intent",
        "request": "0" * 32,
        "time": 1,
        "tenant": "clinic",
        "actor": Actor(kind="anonymous"),
        "action": "read",
        **changes,
    }
    return Entry(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("label", LABELS)
def test_every_label(label: str) -> None:
    assert entry(labels=(label,)).labels == (label,)


def test_every_rule_and_obligation() -> None:
    rules = tuple(rule.id for rule in load_in_force(PoliciesSettings()).engine.bundle.rules)
    assert entry(rules=rules).rules == rules
    assert {kind.__name__ for kind in ALL} == set(_OBLIGATION_WORDS)
    words = tuple(_OBLIGATION_WORDS.values())
    assert entry(obligations=words).obligations == words


@pytest.mark.parametrize("purpose", PURPOSES)
def test_every_purpose(purpose: str) -> None:
    assert entry(purpose=purpose).purpose == purpose


def test_every_role_kind_and_factor() -> None:
    for role in ROLES:
        sealed = "hg1.abcdefghijkl." + "A" * 64
        assert entry(actor=Actor(kind="person", role=role, sealed=sealed)).actor.role == role
    for word in (*SERVICE_KINDS, *SECOND_FACTORS):
        assert entry(details={"kind": word}).details == {"kind": word}


def test_every_reason_for_a_refusal() -> None:
    reasons = {*REMEDIES, *get_args(get_type_hints(NotIdentified)["reason"])}
    # Codes of errors and failures, as they stand in the source.
    for folder in ("gateway", "federated", "policies", "keys", "audit"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            reasons |= set(
                re.findall(r'"((?:gateway|federated|policies|keys|audit)[.][a-z_]+)"', text)
            )
    assert len(reasons) > 50
    for reason in sorted(reasons):
        assert entry(reason=reason).reason == reason
