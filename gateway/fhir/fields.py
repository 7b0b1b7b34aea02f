"""Protected elements of FHIR resources: sealed on the way in, opened on the way out.

Settings are compiled once into a tree for each type. Wherever an element of a type is sealed, its
narrative is sealed, too, because it says the same in words; contained resources are gone through
like others. Tokens of indexed elements stand in `meta.tag`, where an app finds them by `_tag`.

Before: `gateway.settings.FieldSettings`. After: `gateway.fhir.handler`. How an element looks to the
app: `gateway.fhir.sealing`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gateway.core.enforcement import Sealer
from gateway.errors import GatewayConfigurationError, UnsupportedError
from gateway.fhir.blind import searched_form
from gateway.fhir.definitions import Element, elements_of, is_primitive
from gateway.fhir.parameters import elements_tested, overlap, parameters_testing
from gateway.fhir.paths import Node, check_type, compile_paths, matching
from gateway.fhir.resources import Json, owner_paths
from gateway.fhir.sealing import (
    MAX_DEPTH,
    OWN,
    Opening,
    Protecting,
    Tree,
    Unsealer,
    collect,
    sealed_in,
)
from gateway.settings import FieldSettings
from keys.sealed import looks_sealed

_INDEX: Final = f"{OWN}fhir/index/"
_PARAMETER: Final = re.compile(r"[a-z][A-Za-z0-9_-]{0,63}").fullmatch
#: The gateway itself has to read these in what an app answers, or they change what all of it means.
_NEVER_SEALED: Final = frozenset(
    {"id", "meta", "implicitRules", "language", "contained", "modifierExtension"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Indexed:
    """A place whose values a search parameter finds. `field` is what its tokens are bound to."""

    field: str
    parent_kind: str


class FieldPlan:
    """What is protected in the resources of one service. Made by `compile_fields`."""

    def __init__(
        self,
        *,
        service: str,
        trees: dict[str, Tree],
        indexed: dict[tuple[str, str], tuple[_Indexed, ...]],
        sealed: dict[str, frozenset[str]],
        masked: frozenset[str],
    ) -> None:
        self._service = service
        self._trees = trees
        self._indexed = indexed
        self._masked = masked
        self._parameters = {
            resource_type: parameters_testing(resource_type, paths)
            | {name for of, name in indexed if of == resource_type}
            for resource_type, paths in sealed.items()
        }

    def needs(self, resource: Json) -> bool:
        """Whether `protect` would seal anything: then the person's key must be in memory."""
        return any(_any(one, tree) for one, tree in self._parts(resource))

    def protect(self, resource: Json, *, person: str, sealer: Sealer) -> Json:
        """Replace every configured element by ciphertext. `person` is `Patient/<id>`.

        Raises `UnsupportedError` for content that looks sealed, bears our names, or has a protected
        element in a form that FHIR does not define; and whatever `sealer` raises.
        """
        _refuse_foreign(resource)
        own = Protecting(person=person, service=self._service, sealer=sealer, index=True)
        inner = Protecting(person=person, service=self._service, sealer=sealer, index=False)
        new = self._rewritten(resource, own.rewrite, inner.rewrite)
        return _tagged(new, own.tokens) if own.tokens else new

    def sealed_texts(self, resource: Json) -> list[str]:
        """All sealed texts in it, whose keys `unprotect` needs in memory."""
        found: list[str] = []
        for one, tree in self._parts(resource):
            collect(one, tree, found)
        return found

    def unprotect(self, resource: Json, *, person: str, sealer: Unsealer) -> Json:
        """Open what was sealed and remove our tags.

        An element of an erased person becomes absent, marked as masked. Raises
        `UpstreamContentError` for what is not authentic, and whatever else `sealer` raises.
        """
        walker = Opening(person=person, service=self._service, sealer=sealer)
        return _untagged(self._rewritten(resource, walker.rewrite, walker.rewrite))

    def search_tokens(
        self, resource_type: str, parameter: str, value: str, *, sealer: Sealer
    ) -> list[str] | None:
        """The tokens to search for instead of a value; None if the parameter is not indexed.

        `value` is one value: split at commas before, its escapes not yet undone. A record
        with any of the tokens under `index_system(parameter)` matches. Raises `UnsupportedError`
        for what equality cannot answer, and whatever `sealer` raises.
        """
        places = self._indexed.get((resource_type, parameter))
        if places is None:
            return None
        tokens: list[str] = []
        for place in places:
            form = searched_form(value, parent_kind=place.parent_kind)
            tokens += sealer.tokens_for_search(
                service=self._service, field=place.field, value=form.encode()
            )
        return tokens

    def sealed_parameters(self, resource_type: str) -> frozenset[str]:
        """Search parameters that would look into a sealed element, the indexed ones included."""
        return self._parameters.get(resource_type, frozenset())

    def masks(self, resource_type: str) -> frozenset[str]:
        """Paths that nobody sees in a resource of this type or in one contained in it."""
        # Any type may be contained in any.
        del resource_type
        return self._masked

    def _parts(self, resource: Json) -> Iterator[tuple[Json, Tree]]:
        """The resource and those contained in it, as far as anything of them is protected."""
        contained = resource.get("contained")
        for one in (resource, *(contained if isinstance(contained, list) else ())):
            if isinstance(one, dict) and (tree := self._tree(one)) is not None:
                yield one, tree

    def _rewritten(
        self,
        resource: Json,
        rewrite: Callable[[Json, Tree], Json],
        rewrite_contained: Callable[[Json, Tree], Json],
    ) -> Json:
        tree = self._tree(resource)
        new = resource if tree is None else _whole(rewrite(resource, tree))
        contained = resource.get("contained")
        if not isinstance(contained, list):
            return new
        inner = [
            _whole(rewrite_contained(one, tree))
            if isinstance(one, dict) and (tree := self._tree(one)) is not None
            else one
            for one in contained
        ]
        changed = any(a is not b for a, b in zip(inner, contained, strict=True))
        return {**new, "contained": inner} if changed else new

    def _tree(self, resource: Json) -> Tree | None:
        resource_type = resource.get("resourceType")
        return self._trees.get(resource_type) if isinstance(resource_type, str) else None


def compile_fields(settings: Sequence[FieldSettings], *, service: str) -> FieldPlan:
    """Check and compile.

    Raises `GatewayConfigurationError` for what FHIR R4 does not define or what cannot be protected
    so that an app still takes it.
    """
    by_type: dict[str, dict[str, FieldSettings]] = {}
    for one in settings:
        resource_type = check_type(one.path)
        _check(one, resource_type)
        compile_paths(resource_type, {one.path: one}, strict=True)
        if one.seal:
            of_type = by_type.setdefault(resource_type, {})
            if one.path in of_type:
                raise _wrong(one, "a path that is named once", "it is named twice")
            of_type[one.path] = one
    trees: dict[str, Tree] = {}
    indexed: dict[tuple[str, str], tuple[_Indexed, ...]] = {}
    for resource_type, leaves in by_type.items():
        text = f"{resource_type}.text.div"
        tree = compile_paths(
            resource_type, {text: FieldSettings(path=text, seal=True), **leaves}, strict=True
        )
        for node in _leaves(tree):
            _check_sealable(node)
        _add_indexed(indexed, resource_type, leaves.values())
        trees[resource_type] = tree
    return FieldPlan(
        service=service,
        trees=trees,
        indexed=indexed,
        sealed={name: frozenset(leaves) for name, leaves in by_type.items()},
        masked=frozenset(one.path for one in settings if one.mask),
    )


def index_system(parameter: str) -> str:
    """The system of the tags under which the tokens of a search parameter are stored."""
    return f"{_INDEX}{parameter}"


def _check(one: FieldSettings, resource_type: str) -> None:
    """What can be said of a setting by itself."""
    if not (one.seal or one.mask):
        raise _wrong(one, "`seal` or `mask`", "nothing is to be done with it")
    if one.index and not one.seal:
        raise _wrong(one, "`seal` beside `index`", "an app can search a readable element itself")
    if not one.seal:
        return
    if one.path.split(".")[1] in _NEVER_SEALED:
        raise _wrong(one, "an element of the content", "the gateway has to read this one itself")
    if any(overlap(one.path, owner) for owner in owner_paths(resource_type)):
        raise _wrong(one, "an element that does not say whose the record is", "this one does")
    if one.index:
        if not _PARAMETER(one.index):
            raise _wrong(one, "a search parameter such as `identifier` as `index`", "another name")
        tested = elements_tested(resource_type, one.index)
        if tested is not None and not any(overlap(one.path, path) for path in tested):
            raise _wrong(one, f"elements that `{one.index}` looks into", "this is none of them")


def _check_sealable(node: Tree) -> None:
    if node.leaf is None:
        return
    in_choice = node.path != node.leaf.path
    missing = [] if in_choice else [e.name for e in _mandatory(node.kind)]
    if missing:
        parts = ", ".join(f"{node.leaf.path}.{name}" for name in missing)
        raise _wrong(
            node.leaf, "an element without mandatory parts", f"an app would miss {parts}; seal that"
        )
    if node.names or node.choices:
        raise _wrong(node.leaf, "sealed elements beside each other", "one is a part of this one")
    if node.leaf.index and node.kind and not is_primitive(node.kind):
        raise _wrong(node.leaf, "a single value to index", f"this is a {node.kind}; name its part")


def _mandatory(kind: str) -> list[Element]:
    return [element for element in elements_of(kind).values() if element.required]


def _add_indexed(
    indexed: dict[tuple[str, str], tuple[_Indexed, ...]],
    resource_type: str,
    leaves: Iterable[FieldSettings],
) -> None:
    for leaf in leaves:
        if leaf.index:
            tree: Tree = compile_paths(resource_type, {leaf.path: leaf}, strict=True)
            place = _Indexed(field=leaf.path, parent_kind=_leaves(tree)[0].parent_kind)
            key = (resource_type, leaf.index)
            indexed[key] = (*indexed.get(key, ()), place)


def _leaves[L](root: Node[L]) -> list[Node[L]]:
    """All places of which something is said, each once."""
    found: list[Node[L]] = []
    waiting, seen = [root], {id(root)}
    while waiting:
        node = waiting.pop()
        if node.leaf is not None:
            found.append(node)
        for child in (*node.names.values(), *node.choices.values()):
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
    return found


def _wrong(one: FieldSettings, expected: str, found: str) -> GatewayConfigurationError:
    return GatewayConfigurationError(
        f"Field “{one.path}”: expected {expected}; {found}. Correct `fields` of the route."
    )


def _any(at: Any, tree: Tree) -> bool:
    if isinstance(at, list):
        return any(_any(item, tree) for item in at)
    return isinstance(at, dict) and any(
        child.leaf is not None or _any(at.get(name), child)
        for name, child in matching(at, tree).items()
    )


def _refuse_foreign(resource: Json) -> None:
    """Refuse what only the gateway may write: else somebody plants ciphertext or index tokens.

    Raises `UnsupportedError`, also for content nested deeper than 100 levels.
    """
    contained = resource.get("contained")
    inner = contained if isinstance(contained, list) else [contained]
    # FHIR R4 invariant dom-2: contained resources are gone through, those in them are not.
    if any(isinstance(one, dict) and "contained" in one for one in inner):
        raise UnsupportedError("Expected contained resources that contain no others.")
    if contained is not None and not isinstance(contained, list):
        raise UnsupportedError("Expected contained resources as a list.")
    stack: list[tuple[object, int]] = [(resource, 0)]
    while stack:
        value, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise UnsupportedError(f"Expected elements nested at most {MAX_DEPTH} deep.")
        if isinstance(value, dict):
            stack += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            stack += [(item, depth + 1) for item in value]
        elif isinstance(value, str):
            # An app may cut off white space, or take the text out of the mark-up around it.
            start = value.lstrip()
            if looks_sealed(start) or start.startswith(OWN) or sealed_in(value) is not None:
                raise UnsupportedError(
                    "Expected content of your own, got text in the form that only the gateway "
                    "writes (sealed text, or names under havengate.internal). Remove it."
                )


def _tagged(resource: Json, tokens: set[tuple[str, str]]) -> Json:
    meta = resource.get("meta", {})
    if not isinstance(meta, dict) or not isinstance(tags := meta.get("tag", []), list):
        raise UnsupportedError("Expected meta.tag as FHIR R4 defines it, a list of codings.")
    own = [{"system": index_system(name), "code": token} for name, token in sorted(tokens)]
    return {**resource, "meta": {**meta, "tag": [*tags, *own]}}


def _untagged(resource: Json) -> Json:
    """Without tags of ours; `meta` goes with them if nothing else is in it."""
    meta = resource.get("meta")
    if not isinstance(meta, dict) or not isinstance(tags := meta.get("tag"), list):
        return resource
    kept = [tag for tag in tags if not _is_own(tag)]
    if len(kept) == len(tags):
        return resource
    rest = {name: value for name, value in meta.items() if name != "tag"}
    if kept:
        rest["tag"] = kept
    if rest:
        return {**resource, "meta": rest}
    return {name: value for name, value in resource.items() if name != "meta"}


def _is_own(tag: object) -> bool:
    return isinstance(tag, dict) and str(tag.get("system", "")).startswith(OWN)


def _whole(resource: Json) -> Json:
    """Without a narrative that has lost its text: it must have one."""
    text = resource.get("text")
    if isinstance(text, dict) and "_div" in text and "div" not in text:
        return {name: value for name, value in resource.items() if name != "text"}
    return resource
