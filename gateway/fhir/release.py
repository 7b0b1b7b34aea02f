"""What is done to a resource before it is released: obligations, `_elements`, notices.

Who may not see an element must not learn it in another way either: the narrative, which may say the
same in words, goes with it, and contained resources are treated like others. What was left out is
marked with the tag SUBSETTED (FHIR R4 section 2.6.4.1), so that nobody takes the rest for all.

Before: a resource opened by `gateway.fhir.fields`, obligations from the rules. After: the answer.
How a hidden element survives an update by somebody who did not see it: `gateway.fhir.hidden`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any, Final, assert_never

from gateway.errors import GatewayConfigurationError, UpstreamContentError
from gateway.fhir.definitions import elements_of
from gateway.fhir.hidden import restore_hidden
from gateway.fhir.parameters import parameters_testing
from gateway.fhir.paths import Node, compile_paths
from gateway.fhir.resources import Json
from gateway.fhir.veil import SUBSETTED, Hide, Way
from policies.obligations import (
    ExcludeFromCounts,
    LimitRows,
    Mask,
    Obligation,
    Pseudonymise,
    Redact,
    RedisclosureNotice,
    Review,
    StepUp,
)

__all__ = [
    "carry_out",
    "elements",
    "hidden_parameters",
    "hidden_paths",
    "notice_text",
    "restore_hidden",
    "with_notice",
]

#: HL7 DS4P handling instruction (v3 ActCode, RefrainPolicy).
_NO_REDISCLOSURE: Final[Json] = {
    "system": "http://terminology.hl7.org/CodeSystem/v3-ActCode",
    "code": "NORDSCLCD",
    "display": "no redisclosure without consent directive",
}
#: Notices by the name that rules give them. 42 CFR 2.32(a)(2) admits this short form.
_NOTICES: Final = {
    "42CFR2.32": "42 CFR part 2 prohibits unauthorized use or disclosure of these records.",
}
#: What `_elements` never leaves out, beside what is mandatory or changes the meaning.
_ALWAYS: Final = frozenset({"resourceType", "id", "meta"})


def carry_out(
    resource: Json,
    obligations: Iterable[Obligation],
    *,
    masks: frozenset[str],
    pseudonym: Callable[[str, str], str],
) -> Json:
    """Redact, mask and pseudonymise, in contained resources, too.

    `masks`: paths that nobody sees (`FieldPlan.masks`). `pseudonym` gets a kind and a value: of a
    reference the type and id it leads to, of anything else the path and the value. Of two ways for
    one element the one that hides more is taken. What has no pseudonym (a number, a date, a complex
    value that is neither Reference nor Identifier) is masked.

    Raises `UpstreamContentError` if it is no resource, `AssertionError` for an unknown obligation.
    """
    ways = _ways(obligations, masks)
    new, changed = _veiled(resource, ways, pseudonym)
    contained = new.get("contained", [])
    if ways and contained:
        inner = [_veiled_inside(one, ways, pseudonym) for one in _listed(contained)]
        if changed or any(of_inner for _, of_inner in inner):
            changed = True
            new = {**new, "contained": [_without(one, "text") for one, _ in inner]}
    return _subsetted(_without(new, "text")) if changed else resource


def hidden_paths(
    obligations: Iterable[Obligation], masks: frozenset[str], resource_type: str
) -> frozenset[str]:
    """Paths of the elements that `carry_out` would hide in a resource of this type."""
    return frozenset(
        path for path in _ways(obligations, masks) if path.startswith(f"{resource_type}.")
    )


def hidden_parameters(resource_type: str, hidden: frozenset[str]) -> frozenset[str]:
    """Search and sort parameters of a type that would test a hidden element.

    To ask with one would be to ask what the element says. A parameter for which
    `gateway.fhir.parameters.elements_tested` says None is not among them: while anything is hidden
    it must be refused as well.
    """
    return parameters_testing(resource_type, hidden)


def elements(resource: Json, names: frozenset[str]) -> Json:
    """The part of a resource that `_elements` asks for (FHIR R4 section 3.1.1.5.8).

    Kept beside it: type, id, meta, and what is mandatory or changes the meaning of the rest. Of an
    unknown type nothing is known to be mandatory.
    """
    defined = elements_of(str(resource.get("resourceType")))
    kept = _ALWAYS | {
        json_name
        for element in defined.values()
        if element.required or element.modifier or element.name in names
        for json_name, _ in element.json_names()
    }
    kept |= names
    part = {name: value for name, value in resource.items() if name.removeprefix("_") in kept}
    return resource if len(part) == len(resource) else _subsetted(part)


def with_notice(resource: Json, notices: Collection[str]) -> Json:
    """The resource or Bundle with the label that forbids redisclosure, if there is any notice.

    The label stays with the record when it is stored elsewhere. The text is given beside it
    (`notice_text`). Raises `GatewayConfigurationError` for a notice that is not known.
    """
    for name in notices:
        notice_text(name)
    return _labelled(resource, "security", _NO_REDISCLOSURE) if notices else resource


def notice_text(name: str) -> str:
    """The text of a notice.

    Raises `GatewayConfigurationError`: without it nothing may be released.
    """
    if name not in _NOTICES:
        raise GatewayConfigurationError(
            f"Expected a notice that is known ({', '.join(_NOTICES)}), got “{name}” from a rule. "
            "Correct the rule; until then what it allows is not released."
        )
    return _NOTICES[name]


def _ways(obligations: Iterable[Obligation], masks: frozenset[str]) -> Mapping[str, Way]:
    """Each path with the way that hides most. Raises for an unknown obligation."""
    ways: dict[str, Way] = dict.fromkeys(masks, Way.MASK)
    for one in obligations:
        match one:
            case Redact(fields=fields):
                way = Way.REDACT
            case Mask(fields=fields):
                way = Way.MASK
            case Pseudonymise(fields=fields):
                way = Way.PSEUDONYMISE
            case StepUp() | LimitRows() | RedisclosureNotice() | ExcludeFromCounts() | Review():
                continue
            case _:
                assert_never(one)
        for path in fields:
            ways[path] = max(way, ways.get(path, way))
    return ways


def _veiled(
    resource: Any, ways: Mapping[str, Way], pseudonym: Callable[[str, str], str]
) -> tuple[Json, bool]:
    resource_type = resource.get("resourceType") if isinstance(resource, dict) else None
    if not isinstance(resource_type, str):
        raise UpstreamContentError(
            "Expected resources with a resourceType, got something else. Nothing of it was "
            "released; look at what the app answers."
        )
    prefix = f"{resource_type}."
    own = frozenset((path, way) for path, way in ways.items() if path.startswith(prefix))
    if not own:
        return resource, False
    hide = Hide(pseudonym=pseudonym)
    new = hide.veil(resource, _tree(resource_type, own))
    if new is resource and _says_more(resource.get("text")):
        new = _without(resource, "text")
    return new, new is not resource


def _says_more(text: Any) -> bool:
    """Whether a narrative may say what stands in no element (FHIR R4 NarrativeStatus)."""
    return text is not None and not (
        isinstance(text, dict) and text.get("status") in {"generated", "empty"}
    )


def _listed(contained: Any) -> list[Any]:
    if not isinstance(contained, list):
        raise UpstreamContentError(
            "Expected contained resources as a list, got something else. Nothing of it was "
            "released; look at what the app answers."
        )
    return contained


def _veiled_inside(
    resource: Any, ways: Mapping[str, Way], pseudonym: Callable[[str, str], str]
) -> tuple[Json, bool]:
    # FHIR R4 invariant dom-2.
    if isinstance(resource, dict) and "contained" in resource:
        raise UpstreamContentError(
            "Expected contained resources that contain no others, got one that does. Nothing of it "
            "was released; look at what the app answers."
        )
    return _veiled(resource, ways, pseudonym)


@lru_cache(maxsize=512)
def _tree(resource_type: str, ways: frozenset[tuple[str, Way]]) -> Node[Way]:
    return compile_paths(resource_type, dict(sorted(ways)), strict=False)


def _without(resource: Json, name: str) -> Json:
    if name not in resource:
        return resource
    return {key: value for key, value in resource.items() if key != name}


def _subsetted(resource: Json) -> Json:
    return _labelled(resource, "tag", SUBSETTED)


def _labelled(resource: Json, where: str, label: Json) -> Json:
    """With a coding in `meta`, once. What an app has there that is no FHIR is replaced."""
    meta = resource.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    there = meta.get(where)
    labels = there if isinstance(there, list) else []
    same = ("system", "code")
    if any(isinstance(one, dict) and all(one.get(k) == label[k] for k in same) for one in labels):
        return resource
    return {**resource, "meta": {**meta, where: [*labels, label]}}
