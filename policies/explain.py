"""Says in words why a request is allowed or denied, and what would change the answer.

What would change it is found by asking again: with one circumstance changed, then with two, and
without one of the rules that decided. Nothing is guessed from the text of the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final, Literal

from policies.bundle import Bundle
from policies.engine import Engine
from policies.model import (
    LABELS,
    PURPOSES,
    ROLES,
    Allowed,
    Assurance,
    BreakGlass,
    ConsentVerdict,
    Decision,
    Request,
)
from policies.obligations import in_words

ChangeKind = Literal[
    "second_factor", "care_team", "break_glass", "consent", "purpose", "role", "rule"
]

Alter = Callable[[Request], Request]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something that would turn the answer round. `text` is a sentence for people."""

    kinds: tuple[ChangeKind, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why, and what would change it. `because` has one sentence for each rule that decided."""

    decision: Decision
    because: tuple[str, ...]
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Alternative:
    kind: ChangeKind
    words: str
    alter: Alter


def explain(bundle: Bundle, request: Request) -> Explanation:
    """Decide `request` and say why. Takes some hundred decisions: for people, not for traffic."""
    engine = Engine(bundle)
    decision = engine.decide(request)
    allowed = isinstance(decision, Allowed)
    changes = [*_circumstances(engine, request, allowed=allowed)]
    changes += _rules(bundle, request, decision)
    return Explanation(
        decision=decision, because=tuple(_because(bundle, decision)), changes=tuple(changes)
    )


def _because(bundle: Bundle, decision: Decision) -> Iterable[str]:
    rules = {rule.id: rule for rule in bundle.rules}
    for name in decision.rules:
        rule = rules[name]
        what = rule.title if isinstance(decision, Allowed) else rule.reason or rule.title
        yield f"{what.rstrip('.')} ({name}; {rule.cites})."
    if isinstance(decision, Allowed):
        yield from (f"Required: {in_words(one)}." for one in decision.obligations)
        return
    if not decision.rules:
        yield decision.reason
    yield f"What can be done: {decision.remedy.text}"


def _circumstances(engine: Engine, request: Request, *, allowed: bool) -> list[Change]:
    """The smallest sets of circumstances that turn the answer round: single ones, else pairs."""
    alternatives = [*(_to_deny(request) if allowed else _to_allow(request))]

    def turned(chosen: tuple[_Alternative, ...]) -> bool:
        altered = request
        for one in chosen:
            altered = one.alter(altered)
        return isinstance(engine.decide(altered), Allowed) is not allowed

    for size in (1, 2):
        found = [
            _change(chosen, allowed=allowed)
            for chosen in combinations(alternatives, size)
            if len({one.kind for one in chosen}) == size and turned(chosen)
        ]
        if found:
            return found
    return []


def _change(chosen: tuple[_Alternative, ...], *, allowed: bool) -> Change:
    answer = "denied" if allowed else "allowed"
    words = " and ".join(one.words for one in chosen)
    return Change(kinds=tuple(one.kind for one in chosen), text=f"It would be {answer} {words}.")


def _rules(bundle: Bundle, request: Request, decision: Decision) -> Iterable[Change]:
    """Rules that decided, each of which, were it not there, would turn the answer round."""
    allowed = isinstance(decision, Allowed)
    for name in decision.rules:
        other = Engine(bundle.without(name)).decide(request)
        if isinstance(other, Allowed) is not allowed:
            answer = "denied" if allowed else "allowed"
            yield Change(kinds=("rule",), text=f"Without the rule {name} it would be {answer}.")


_GRANT_S: Final = 3_600.0


def _to_allow(request: Request) -> Iterable[_Alternative]:
    yield _Alternative(
        kind="second_factor",
        words="with a second factor shown just now",
        alter=lambda one: replace(
            one,
            principal=replace(
                one.principal,
                assurance=Assurance(second_factor="totp", second_factor_at=one.context.now),
            ),
        ),
    )
    patient = request.resource.patient
    if patient is not None:
        yield _Alternative(
            kind="care_team",
            words="on this patient's care team",
            alter=lambda one: replace(
                one,
                principal=replace(one.principal, care_team=one.principal.care_team | {patient}),
            ),
        )
        yield _Alternative(
            kind="break_glass",
            words="with break-glass for this patient",
            alter=lambda one: _break_glass(one, patient),
        )
        yield _Alternative(
            kind="consent",
            words="with the patient's consent that names these records",
            alter=lambda one: _consent(
                one, ConsentVerdict(permits=True, authorises=frozenset(LABELS))
            ),
        )
    for purpose in PURPOSES:
        if purpose not in {request.context.purpose, "BTG", "ETREAT"}:
            yield _Alternative(
                kind="purpose",
                words=f"for the purpose {purpose}",
                alter=lambda one, purpose=purpose: replace(  # type: ignore[misc]
                    one, context=replace(one.context, purpose=purpose)
                ),
            )
    for role in ROLES:
        if role not in request.principal.roles:
            yield _Alternative(
                kind="role",
                words=f"with the role {role}",
                alter=lambda one, role=role: replace(  # type: ignore[misc]
                    one, principal=replace(one.principal, roles=one.principal.roles | {role})
                ),
            )


def _to_deny(request: Request) -> Iterable[_Alternative]:
    yield _Alternative(
        kind="second_factor",
        words="without a second factor",
        alter=lambda one: replace(one, principal=replace(one.principal, assurance=Assurance())),
    )
    if request.resource.patient in request.principal.care_team:
        yield _Alternative(
            kind="care_team",
            words="outside the care team",
            alter=lambda one: replace(one, principal=replace(one.principal, care_team=frozenset())),
        )
    if request.context.break_glass is not None:
        yield _Alternative(
            kind="break_glass",
            words="without the break-glass",
            alter=lambda one: replace(one, context=replace(one.context, break_glass=None)),
        )
    yield _Alternative(
        kind="consent",
        words="if the patient refused it",
        alter=lambda one: _consent(one, ConsentVerdict(denies=True)),
    )
    for role in sorted(request.principal.roles):
        yield _Alternative(
            kind="role",
            words=f"without the role {role}",
            alter=lambda one, role=role: replace(  # type: ignore[misc]
                one, principal=replace(one.principal, roles=one.principal.roles - {role})
            ),
        )


def _break_glass(request: Request, patient: str) -> Request:
    now = request.context.now
    grant = BreakGlass(
        reason="what an emergency would be",
        patients=frozenset({patient}),
        begins_at=now,
        ends_at=now + _GRANT_S,
    )
    return replace(request, context=replace(request.context, purpose="BTG", break_glass=grant))


def _consent(request: Request, verdict: ConsentVerdict) -> Request:
    return replace(request, context=replace(request.context, consent=verdict))
