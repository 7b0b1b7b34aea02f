"""What becomes of hidden elements when somebody who did not see them updates the record.

He sends back what he saw. Hidden elements are taken from the record as it was, whatever he sends
there. Where they stand in a list, each of its members has to be found again: by its `id`, or
because all of it that he could see is unchanged. What cannot be found again is refused, because a
hidden element would be lost or come to stand at another's place.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from gateway.errors import UnsupportedError
from gateway.fhir.paths import Node, compile_paths, matching
from gateway.fhir.resources import Json
from gateway.fhir.veil import SUBSETTED, Way, visible

#: A member of a list as it was: its place, all of it, and what he saw of it.
type _Member = tuple[int, Json, Json]


def restore_hidden(new: Json, prior: Json, hidden: frozenset[str]) -> Json:
    """`new` with its hidden elements taken from `prior`, whatever `new` says there.

    The tag SUBSETTED goes. A narrative that `new` does not have is kept from `prior` unless it was
    generated from the elements. Raises `UnsupportedError` if members of a list with hidden elements
    cannot be told apart. Contained resources are taken as `new` has them: see `restore_contained`.
    """
    resource_type = str(prior.get("resourceType"))
    own = frozenset(path for path in hidden if path.startswith(f"{resource_type}."))
    if not own:
        return new
    restored = _object(new, prior, _tree(resource_type, own))
    text = prior.get("text")
    if "text" not in restored and isinstance(text, dict) and text.get("status") != "generated":
        restored = {**restored, "text": text}
    return _whole(restored)


def restore_contained(new: Json, shown: Json, prior: Json) -> Json:
    """`new` with the contained resources of `prior`, if not all of these were `shown`.

    They have no ids that last, so that they are taken over as a whole. Raises `UnsupportedError`
    unless `new` has them as they were shown.
    """
    whole = prior.get("contained")
    if shown.get("contained") == whole:
        return new
    if new.get("contained") != shown.get("contained"):
        raise UnsupportedError(
            "Expected the contained resources as you were shown them, because parts of them are "
            "hidden from you; got others. Leave them, or let somebody change it who sees all."
        )
    text = prior.get("text")
    if "text" in new or not isinstance(text, dict) or text.get("status") == "generated":
        return _whole({**new, "contained": whole})
    return _whole({**new, "contained": whole, "text": text})


@lru_cache(maxsize=512)
def _tree(resource_type: str, paths: frozenset[str]) -> Node[Way]:
    return compile_paths(resource_type, dict.fromkeys(sorted(paths), Way.REDACT), strict=False)


def _object(new: Json, prior: Json, tree: Node[Way]) -> Json:
    out = dict(new)
    for name, child in {**matching(new, tree), **matching(prior, tree)}.items():
        mine, theirs = new.get(name), prior.get(name)
        if child.leaf is not None:
            for key in (name, f"_{name}"):
                out.pop(key, None)
                if key in prior:
                    out[key] = prior[key]
            continue
        restored = _inside(mine, theirs, child)
        out.pop(name, None)
        if restored is not None:
            out[name] = restored
    return out


def _inside(new: Any, prior: Any, node: Node[Way]) -> Any:
    if isinstance(new, list) or isinstance(prior, list):
        return _list(_as_list(new), _as_list(prior), node)
    if isinstance(new, dict):
        return _object(new, prior if isinstance(prior, dict) else {}, node)
    if isinstance(prior, dict):
        # He left it out: what he saw of it goes, what he did not see stays.
        return _object({}, prior, node) or None
    return None


def _list(new: list[Any], prior: list[Any], node: Node[Way]) -> list[Any] | None:
    """Each member of `new` with what was hidden in the member of `prior` that it was."""
    shown: list[_Member] = []
    unseen: list[_Member] = []
    for place, one in enumerate(prior):
        if isinstance(one, dict):
            part = visible(one, node)
            (shown if part else unseen).append((place, one, part))
    restored: list[Any] = []
    for one in new:
        if not isinstance(one, dict):
            raise _lost(node)
        if not visible(one, node):
            # All of it is hidden: what he saw of a member that is kept below, or what he made up.
            continue
        same = _same(one, shown, node)
        shown = [other for other in shown if other is not same]
        restored.append(_object(one, same[1] if same else {}, node))
    # A member that is gone takes along what was hidden in it, and one that is new or changed may be
    # the one that is missing.
    if any(part is not one for _, one, part in shown):
        raise _lost(node)
    for place, one, _ in unseen:
        restored.insert(min(place, len(restored)), one)
    return restored or None


def _same(one: Json, shown: list[_Member], node: Node[Way]) -> _Member | None:
    """The member that this one was: of the same id, or else of the same visible part."""
    if one.get("id"):
        return next((member for member in shown if member[1].get("id") == one["id"]), None)
    part = visible(one, node)
    return next((member for member in shown if member[2] == part), None)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _lost(node: Node[Way]) -> UnsupportedError:
    return UnsupportedError(
        f"Expected {node.path} with the members that you were shown, unchanged or with new ones "
        "beside them, because parts of it are hidden from you; got something else. Leave it as it "
        "was, or let somebody change it who sees all of it."
    )


def _whole(resource: Json) -> Json:
    meta = resource.get("meta")
    if not isinstance(meta, dict) or not isinstance(tags := meta.get("tag"), list):
        return resource
    kept = [tag for tag in tags if not _is_subsetted(tag)]
    if len(kept) == len(tags):
        return resource
    rest = {name: value for name, value in meta.items() if name != "tag"}
    return {**resource, "meta": {**rest, "tag": kept} if kept else rest}


def _is_subsetted(tag: object) -> bool:
    return isinstance(tag, dict) and all(tag.get(k) == SUBSETTED[k] for k in ("system", "code"))
