"""What a policy's head says, as sets, and what its conditions read: how a request finds its rules.

A policy whose head does not match is neither satisfied nor can it fail: Cedar evaluates the head
first and stops there. The same holds for the words that stand first in the first `when` or
`unless`, as long as evaluating them cannot fail itself: the purpose (every principal has one), the
groups of the resource, and yes-or-no attributes (the schema was checked: they are there). Leaving
such policies out of a decision therefore changes neither the answer nor the errors; a property test
holds the parts against the whole set. Any form that is not known here counts as "matches always".

Reads the JSON form of policies (Cedar's EST).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

Uid = tuple[str, str]
#: `principal` or `resource`, and the names of attributes: `resource.relation.author`.
Path = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What must hold before anything else of a policy is looked at. `None` stands for "any".

    `resource_any`: each is a set of groups of which the resource must be in at least one. `holds`
    and `holds_not`: attributes that must be true, and that must be false.
    """

    actions: frozenset[str] | None
    principal_type: str | None
    principal_in: Uid | None
    resource_type: str | None
    resource_in: Uid | None
    purposes: frozenset[str] | None
    resource_any: tuple[frozenset[Uid], ...]
    holds: tuple[Path, ...]
    holds_not: tuple[Path, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """Context attributes that conditions look at: at their value, or only whether they exist."""

    values: frozenset[str]
    presence: frozenset[str]


#: Types whose members have no entity below them but a principal or resource: `in` one of them can
#: be read off the parents that a request names.
_GROUPS: Final = frozenset({"Role", "ServiceKind", "Label", "Confidentiality", "ResourceType"})

_PURPOSE: Final = {".": {"left": {"Var": "principal"}, "attr": "purpose"}}


def parse_scope(policy: Mapping[str, Any]) -> Scope:
    """Read the head of a policy in JSON form."""
    principal_type, principal_in = _entity(policy["principal"])
    resource_type, resource_in = _entity(policy["resource"])
    guard = _guard(policy.get("conditions", []))
    return Scope(
        actions=_actions(policy["action"]),
        principal_type=principal_type,
        principal_in=principal_in,
        resource_type=resource_type,
        resource_in=resource_in,
        purposes=guard.purposes,
        resource_any=tuple(guard.groups),
        holds=tuple(guard.holds),
        holds_not=tuple(guard.holds_not),
    )


def _entity(head: Mapping[str, Any]) -> tuple[str | None, Uid | None]:
    group = head.get("in", head) if head.get("op") in {"is", "in"} else {}
    entity = group.get("entity")
    uid = (entity["type"], entity["id"]) if isinstance(entity, dict) and "type" in entity else None
    kind = head.get("entity_type") if head.get("op") == "is" else None
    return kind, uid if uid is not None and uid[0] in _GROUPS else None


def _actions(head: Mapping[str, Any]) -> frozenset[str] | None:
    if head.get("op") not in {"==", "in"}:
        return None
    entities = head.get("entities", [head.get("entity")])
    names = [entity.get("id") if isinstance(entity, dict) else None for entity in entities]
    known = frozenset(name for name in names if isinstance(name, str))
    return known if len(known) == len(set(names)) else None


@dataclass(slots=True, kw_only=True)
class _Guard:
    purposes: frozenset[str] | None = None
    groups: list[frozenset[Uid]] = field(default_factory=list)
    holds: list[Path] = field(default_factory=list)
    holds_not: list[Path] = field(default_factory=list)


def _guard(conditions: Sequence[Mapping[str, Any]]) -> _Guard:
    """Read the first words of the conditions, up to the first that is not known to be safe."""
    guard = _Guard()
    for condition in conditions:
        if condition.get("kind") == "when":
            known = all(_must_hold(guard, word) for word in _parts(condition["body"], "&&"))
        else:
            known = all(_must_not_hold(guard, word) for word in _parts(condition["body"], "||"))
        if not known:
            break
    return guard


def _must_hold(guard: _Guard, word: Mapping[str, Any]) -> bool:
    """Add one word of a `when`; false if it is of no form that is known here."""
    compared, uids = _membership(word)
    path = _path(word)
    if compared == _PURPOSE and {kind for kind, _ in uids} == {"Purpose"}:
        named = frozenset(name for _, name in uids)
        guard.purposes = named if guard.purposes is None else guard.purposes & named
    elif compared == {"Var": "resource"} and uids and {kind for kind, _ in uids} <= _GROUPS:
        guard.groups.append(uids)
    elif path is not None:
        guard.holds.append(path)
    else:
        return False
    return True


def _must_not_hold(guard: _Guard, word: Mapping[str, Any]) -> bool:
    """Add one word of an `unless`: if it is true, so is the whole, and nothing after it counts."""
    path = _path(word)
    if path is not None:
        guard.holds_not.append(path)
    return path is not None


def _path(word: object) -> Path | None:
    """The names in `resource.a.b` or `principal.a`."""
    names: list[str] = []
    while isinstance(word, dict) and isinstance(word.get("."), dict):
        names.append(word["."]["attr"])
        word = word["."]["left"]
    variable = word.get("Var") if isinstance(word, dict) else None
    if not names or variable not in {"principal", "resource"}:
        return None
    return (variable, *reversed(names))


def _parts(body: Mapping[str, Any], operator: str) -> list[Mapping[str, Any]]:
    """The parts of `a && b && c`, in the order in which they are evaluated."""
    parts: list[Mapping[str, Any]] = []
    stack = [body]
    while stack:
        node = stack.pop()
        both = node.get(operator)
        if isinstance(both, dict):
            stack += [both["right"], both["left"]]
        else:
            parts.append(node)
    return parts


def _membership(word: Mapping[str, Any]) -> tuple[object, frozenset[Uid]]:
    """What is compared, and with which entities, in `x == E`, `x in E` and `x in [E, …]`."""
    for operator in ("==", "in"):
        compared = word.get(operator)
        if isinstance(compared, dict):
            right = compared["right"]
            items = right.get("Set", [right]) if operator == "in" else [right]
            uids = [_uid(item) for item in items]
            if all(uid is not None for uid in uids):
                return compared["left"], frozenset(uid for uid in uids if uid is not None)
    return None, frozenset()


def _uid(literal: Mapping[str, Any]) -> Uid | None:
    value = literal.get("Value")
    entity = value.get("__entity") if isinstance(value, dict) else None
    return (entity["type"], entity["id"]) if isinstance(entity, dict) else None


def attributes_read(policy: Mapping[str, Any]) -> Reads | None:
    """Names of the context attributes that the conditions look at; `None` if it could be any."""
    found: dict[str, set[str]] = {".": set(), "has": set()}
    stack: list[object] = [policy.get("conditions", [])]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(node)
        elif isinstance(node, dict):
            if node.get("Var") == "context":
                return None
            for key, value in node.items():
                name = _context_attribute(key, value)
                if name is None:
                    stack.append(value)
                else:
                    found[key].add(name)
    values = frozenset(found["."])
    return Reads(values=values, presence=frozenset(found["has"]) - values)


def _context_attribute(key: str, value: object) -> str | None:
    if key not in {".", "has"} or not isinstance(value, dict):
        return None
    attribute = value.get("attr")
    from_context = value.get("left") == {"Var": "context"}
    return attribute if from_context and isinstance(attribute, str) else None
