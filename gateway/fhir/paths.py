"""Paths (`Patient.name.family`) as a tree that is walked along with a resource.

Arrays are gone through. A choice (`Observation.value`) is every name that begins with it and goes
on with a capital, also of kinds that FHIR R4 does not define there. Elements that repeat inside
themselves (`QuestionnaireResponse.item.item`, `Composition.section.section`) have one place for all
levels: what is said of the path holds at any depth.

Compiled once from settings or obligations; `matching` is what the walkers in `gateway.fhir.fields`
and `gateway.fhir.release` call for each object.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from gateway.errors import GatewayConfigurationError
from gateway.fhir.definitions import (
    Element,
    elements_of,
    is_primitive,
    is_resource_type,
    resource_types,
)
from gateway.fhir.resources import Json


@dataclass(slots=True, kw_only=True)
class Node[L]:
    """One place in a type. `path` has no indices; `kind` is empty where nothing is defined.

    `leaf` is what is said of this place. Filled while compiling, only read afterwards.
    """

    path: str
    kind: str = ""
    parent_kind: str = ""
    leaf: L | None = None
    names: dict[str, Node[L]] = field(default_factory=dict, repr=False)
    #: Names of choices → where names lead that begin so and are not in `names`.
    choices: dict[str, Node[L]] = field(default_factory=dict, repr=False)
    #: What `matching` looks up: keys of an object, siblings of primitives (`_name`) included.
    lookup: dict[str, tuple[str, Node[L]]] = field(default_factory=dict, repr=False)
    #: How keys of choices begin, siblings included.
    bases: tuple[str, ...] = ()

    def child(self, name: str, kind: str) -> Node[L]:
        """The place of a JSON name, made if it is not there yet."""
        if name not in self.names:
            self.names[name] = Node[L](path=f"{self.path}.{name}", kind=kind, parent_kind=self.kind)
        return self.names[name]


def matching[L](value: Json, node: Node[L]) -> dict[str, Node[L]]:
    """The JSON names (never a sibling's `_name`) in an object that lead somewhere, and where."""
    lookup = node.lookup
    found = dict([lookup[key] for key in value if key in lookup])
    if node.bases:
        for key in value:
            if key.startswith(node.bases) and key not in lookup:
                _match_choice(key.removeprefix("_"), node, found)
    return found


def _match_choice[L](name: str, node: Node[L], found: dict[str, Node[L]]) -> None:
    for base, child in node.choices.items():
        follows = name[len(base) : len(base) + 1]
        if name.startswith(base) and follows.isupper() and name not in node.names:
            found[name] = child


def compile_paths[L](resource_type: str, leaves: Mapping[str, L], *, strict: bool) -> Node[L]:
    """The tree of one type. Every path begins with it.

    strict: raises `GatewayConfigurationError` for what FHIR R4 does not define, with the nearest
    name. Otherwise such a name is taken as it is and as the name of a choice, and what would lead
    into a primitive means all of it.
    """
    root = Node[L](path=resource_type, kind=resource_type)
    for path, leaf in leaves.items():
        places = [_Place(node=root, above={resource_type: root})]
        for segment in path.split(".")[1:]:
            known = [below for place in places for below in _defined(place, segment)]
            if strict and not known:
                raise _undefined(path, segment, places[0].node.kind)
            open_ended = [place for place in places if not known or not place.node.kind]
            places = known + [below for place in open_ended for below in _any(place, segment)]
        for place in places:
            place.node.leaf = leaf
    _nest(_Place(node=root, above={resource_type: root}))
    _index(root, done=[])
    return root


def check_type(path: str) -> str:
    """The resource type that a path of the settings begins with.

    Raises `GatewayConfigurationError`, with the nearest name, for what FHIR R4 does not define.
    """
    resource_type, _, rest = path.partition(".")
    if is_resource_type(resource_type) and rest:
        return resource_type
    near = difflib.get_close_matches(resource_type, resource_types(), n=1)
    hint = f" Did you mean “{near[0]}”?" if near and near[0] != resource_type else ""
    raise GatewayConfigurationError(
        f"Expected a path of the form Type.element with a resource type of FHIR R4, found “{path}”."
        f"{hint} Correct `fields` of the route."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place[L]:
    """A node, and by their kinds the nodes above it and itself."""

    node: Node[L]
    above: dict[str, Node[L]]

    def below(self, name: str, kind: str) -> _Place[L]:
        """The place of a JSON name. A kind that nests and is above already is that same place."""
        if _nests(kind) and kind in self.above:
            node = self.node.names.setdefault(name, self.above[kind])
        else:
            node = self.node.child(name, kind)
        return _Place(node=node, above={**self.above, kind: node} if kind else self.above)

    def below_choice(self, base: str) -> _Place[L]:
        """The place of every name that begins with that of a choice and is not known by itself."""
        node = self.node.choices.setdefault(
            base, Node[L](path=f"{self.node.path}.{base}", parent_kind=self.node.kind)
        )
        return _Place(node=node, above=self.above)


def _defined[L](place: _Place[L], segment: str) -> list[_Place[L]]:
    """Where a defined segment leads: one place, or one for each kind of a choice and the rest."""
    element = _element(place.node.kind, segment)
    if element is None:
        return []
    places = [
        place.below(name, kind)
        for name, kind in element.json_names()
        if segment in {element.name, name}
    ]
    if element.choice and segment == element.name:
        places += [place.below(segment, ""), place.below_choice(segment)]
    return places


def _any[L](place: _Place[L], segment: str) -> list[_Place[L]]:
    """Where a segment that is not defined may lead."""
    if is_primitive(place.node.kind):
        return [place]
    return [place.below(segment, ""), place.below_choice(segment)]


def _element(kind: str, segment: str) -> Element | None:
    """An element by its name or, of a choice, by one of its names in JSON."""
    defined = elements_of(kind)
    by_json_name = (
        element
        for element in defined.values()
        if element.choice and any(segment == name for name, _ in element.json_names())
    )
    return defined.get(segment) or next(by_json_name, None)


def _nests(kind: str) -> bool:
    """Whether elements of this kind may stand inside each other with the same meaning."""
    return "." in kind or kind == "Extension"


def _nest[L](place: _Place[L]) -> None:
    """Lead back to where an element repeats inside itself, also by ways that no path names."""
    node = place.node
    if node.leaf is not None:
        return
    for element in elements_of(node.kind).values():
        for name, kind in element.json_names():
            if _nests(kind) and name not in node.names and _reachable(kind) & place.above.keys():
                place.below(name, kind)
    for name, child in list(node.names.items()):
        if all(child is not one for one in place.above.values()):
            _nest(place.below(name, child.kind))


def _index[L](node: Node[L], done: list[Node[L]]) -> None:
    """Fill `lookup` with the names by which a leaf can be reached."""
    done.append(node)
    for child in (*node.names.values(), *node.choices.values()):
        if all(child is not one for one in done):
            _index(child, done)
    node.bases = (*node.choices, *(f"_{base}" for base in node.choices))
    for name, child in node.names.items():
        if _leads(child, seen=[]):
            node.lookup[name] = node.lookup[f"_{name}"] = (name, child)


def _leads[L](node: Node[L], seen: list[Node[L]]) -> bool:
    if node.leaf is not None:
        return True
    seen.append(node)
    return any(
        _leads(child, seen)
        for child in (*node.names.values(), *node.choices.values())
        if all(child is not one for one in seen)
    )


@cache
def _reachable(kind: str) -> frozenset[str]:
    """This kind and all that nest and can stand below it."""
    found: set[str] = set()
    waiting = [kind]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            kinds = (kind for element in elements_of(one).values() for kind in element.kinds)
            waiting += [kind for kind in kinds if _nests(kind) and kind != "Extension"]
    return frozenset(found)


def _undefined(path: str, segment: str, kind: str) -> GatewayConfigurationError:
    near = difflib.get_close_matches(segment, elements_of(kind), n=1)
    hint = f" Did you mean “{near[0]}”?" if near else ""
    return GatewayConfigurationError(
        f"Expected elements that FHIR R4 defines, found “{segment}” in “{path}”.{hint} "
        "Correct `fields` of the route."
    )
