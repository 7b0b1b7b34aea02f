"""Hides elements of one resource: removes, masks, or puts a pseudonym in their place.

What has another shape than FHIR R4 defines, above or at a hidden element, is removed as a whole: it
could hold the element in a place where nobody looks.

Before: a tree of `gateway.fhir.paths`. After: `gateway.fhir.release`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final

from gateway.fhir.paths import Node, matching
from gateway.fhir.resources import Json, reference_target
from gateway.fhir.sealing import MASKED, MAX_DEPTH, OWN

#: Says that something was left out.
SUBSETTED: Final[Json] = {
    "system": "http://terminology.hl7.org/CodeSystem/v3-ObservationValue",
    "code": "SUBSETTED",
    "display": "subsetted",
}
#: The system of pseudonyms that stand for persons in references.
PSEUDONYM_SYSTEM: Final = f"{OWN}fhir/pseudonym"
#: Primitive kinds in which a pseudonym can stand; an undefined one is tried.
_NAMES: Final = frozenset({"string", "markdown", "id", "uri", "url", "canonical", ""})


class Way(IntEnum):
    """What is done with an element. The greater hides more."""

    PSEUDONYMISE = 1
    MASK = 2
    REDACT = 3


class Hide:
    """Hides in one resource. Used once: it remembers which references got a pseudonym."""

    def __init__(self, *, pseudonym: Callable[[str, str], str]) -> None:
        self._pseudonym = pseudonym
        self._stand_ins: dict[tuple[str, str], Json] = {}

    def veil(self, resource: Json, tree: Node[Way]) -> Json:
        """The resource with everything hidden; the same object if there was nothing.

        Whoever got a pseudonym in one reference gets it in every reference of the resource.
        """
        new = self.part(resource, tree)
        if self._stand_ins and new is not None:
            new = self._replaced(new)
        return {"resourceType": resource["resourceType"]} if new is None else new

    def part(self, at: Json, tree: Node[Way], depth: int = 0) -> Json | None:
        """The object with everything hidden. None if nothing is left: FHIR has no empty objects."""
        found = matching(at, tree)
        if not found:
            return at
        out = dict(at)
        for name, child in found.items():
            sibling = out.pop(f"_{name}", None)
            value = out.pop(name, None)
            if child.leaf is None:
                new = self._inside(value, child, depth + 1)
            else:
                new, hidden = self._hidden(value, sibling, child)
                if hidden is not None:
                    out[f"_{name}"] = hidden
            if new is not None:
                out[name] = new
        if len(out) == len(at) and all(out.get(name) is at[name] for name in at):
            return at
        return out or None

    def _inside(self, value: Any, node: Node[Way], depth: int) -> Any:
        if depth > MAX_DEPTH:
            return None
        if isinstance(value, dict):
            return self.part(value, node, depth)
        if not isinstance(value, list):
            return None
        new = [self._inside(item, node, depth + 1) for item in value]
        if all(a is b for a, b in zip(new, value, strict=True)):
            return value
        return [item for item in new if item is not None] or None

    def _hidden(self, value: Any, sibling: Any, node: Node[Way]) -> tuple[Any, Any]:
        """What stands in place of an element and of its sibling."""
        # A mask in place of a resource would be no resource.
        if node.leaf is Way.REDACT or node.kind == "Resource":
            return None, None
        # A part of it has to be hidden by another rule: a pseudonym of the whole would show it.
        if node.leaf is Way.PSEUDONYMISE and not (node.names or node.choices):
            values = value if isinstance(value, list) else [value]
            names = [self._name(one, node) for one in values if one is not None]
            if names and None not in names:
                return (names if isinstance(value, list) else names[0]), None
        return _mask(value, sibling)

    def _name(self, value: Any, node: Node[Way]) -> Any:
        """The pseudonym of one value, or None if it can have none."""
        if isinstance(value, str) and node.kind in _NAMES:
            return self._pseudonym(node.path, value)
        if not isinstance(value, dict):
            return None
        if isinstance(value.get("reference"), str):
            target = reference_target(value["reference"])
            return None if target is None else self._stand_in(target)
        if isinstance(value.get("value"), str):
            system = value.get("system")
            system = system if isinstance(system, str) else ""
            name = self._pseudonym(node.path, f"{system}|{value['value']}")
            return {"system": system, "value": name} if system else {"value": name}
        return None

    def _stand_in(self, target: tuple[str, str]) -> Json:
        """A reference by a name that leads nowhere: a pseudonym is no id of the app."""
        if target not in self._stand_ins:
            name = self._pseudonym(*target)
            identifier = {"system": PSEUDONYM_SYSTEM, "value": name}
            self._stand_ins[target] = {"type": target[0], "identifier": identifier}
        return self._stand_ins[target]

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._replaced(item) for item in value]
        if not isinstance(value, dict):
            return value
        literal = value.get("reference")
        target = reference_target(literal) if isinstance(literal, str) else None
        if target is not None and target in self._stand_ins:
            return self._stand_ins[target]
        return {name: self._replaced(item) for name, item in value.items()}


def visible(value: Json, tree: Node[Way]) -> Json:
    """What is left when everything that a tree leads to is removed; the same object if nothing is.

    The tree must have no pseudonyms in it.
    """
    new = Hide(pseudonym=_no_pseudonym).part(value, tree)
    return {} if new is None else new


def _no_pseudonym(kind: str, value: str) -> str:
    raise NotImplementedError


def _mask(value: Any, sibling: Any) -> tuple[Any, Any]:
    """Only that there is something. How many stays unknown, too."""
    repeats = isinstance(value, list) or isinstance(sibling, list)
    values = value if isinstance(value, list) else [value]
    if any(isinstance(one, dict) for one in values):
        return ([MASKED] if repeats else MASKED), None
    return None, ([MASKED] if repeats else MASKED)
