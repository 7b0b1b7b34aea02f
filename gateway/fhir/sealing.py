"""How one protected element looks to the app, and how it is walked to.

An app validates what it stores, so ciphertext must be FHIR of the right type:

- string, markdown: the sealed text stands in place of the text;
- xhtml: the sealed text stands in the `div`;
- any other primitive: the value is absent and its sibling (`_birthDate`) holds our extension;
- a complex value: an object that holds only our extension.

What a client wrote into the sibling of a text (translations, originals) is sealed, too. In the
extension stands canonical JSON: of a primitive `[value, sibling]`, else of the value.

Before: the trees of `gateway.fhir.paths`. After: `gateway.fhir.fields`.
"""

from __future__ import annotations

import re
from itertools import zip_longest
from typing import Any, Final, Protocol

from gateway import json_text
from gateway.core.enforcement import Sealer
from gateway.errors import UnsupportedError, UpstreamContentError
from gateway.fhir.blind import stored_forms
from gateway.fhir.definitions import TEXTS, is_primitive
from gateway.fhir.paths import Node, matching
from gateway.fhir.resources import Json
from gateway.settings import FieldSettings
from keys.errors import PersonErasedError, UnsealError
from keys.sealed import looks_sealed

#: Under this stands everything of ours; nobody else may write it.
OWN: Final = "https://havengate.internal/"
SEALED_URL: Final = f"{OWN}fhir/sealed"
#: FHIR R4 extension data-absent-reason: there is something that is not shown.
MASKED: Final[Json] = {
    "extension": [
        {
            "url": "http://hl7.org/fhir/StructureDefinition/data-absent-reason",
            "valueCode": "masked",
        }
    ]
}
MAX_DEPTH: Final = 100

_DIV: Final = '<div xmlns="http://www.w3.org/1999/xhtml">{}</div>'
#: As an app may write it back: other white space and attributes.
_SEALED_DIV: Final = re.compile(r"\s*<div[^>]{0,256}>\s*(hg1\.[A-Za-z0-9._-]+)\s*</div>\s*")

type Tree = Node[FieldSettings]


class Unsealer(Protocol):
    """The part of a `Sealer` that opens."""

    def unseal(self, *, person: str, service: str, field: str, text: str) -> bytes:
        """See `Sealer.unseal`."""
        ...


class Walker:
    """Rewrites the elements that a tree leads to. Unchanged parts are shared, nothing is mutated.

    `protected` and `strange` say what happens; each direction has its own.
    """

    def __init__(self, *, person: str, service: str) -> None:
        self._person = person
        self._service = service

    def rewrite(self, at: Json, tree: Tree, depth: int = 0) -> Json:
        """The object with everything below it rewritten."""
        if depth > MAX_DEPTH:
            raise UnsupportedError(f"Expected elements nested at most {MAX_DEPTH} deep.")
        out = at
        for name, child in matching(at, tree).items():
            value, sibling = at.get(name), at.get(f"_{name}")
            if child.leaf is None:
                if sibling is not None:
                    self.strange(child)
                new: Any = self._inside(value, child, depth)
            else:
                new, new_sibling = self._pairs(value, sibling, child, at)
                if new_sibling is not sibling:
                    out = _with(at, out, f"_{name}", new_sibling)
            if new is not value:
                out = _with(at, out, name, new)
        return out

    def protected(self, value: Any, sibling: Any, node: Tree, parent: Json) -> tuple[Any, Any]:
        """What takes the place of one protected element and of its sibling."""
        raise NotImplementedError

    def strange(self, node: Tree) -> None:
        """Something stands where FHIR has none, above or at a protected element."""
        raise NotImplementedError

    def _inside(self, value: Any, node: Tree, depth: int) -> Any:
        if isinstance(value, dict):
            return self.rewrite(value, node, depth + 1)
        if isinstance(value, list):
            new = [self._inside(item, node, depth + 1) for item in value]
            return new if any(a is not b for a, b in zip(new, value, strict=True)) else value
        if value is not None:
            self.strange(node)
        return value

    def _pairs(self, value: Any, sibling: Any, node: Tree, parent: Json) -> tuple[Any, Any]:
        """Values and siblings of an element that may repeat, each by each."""
        if not isinstance(value, list) and not isinstance(sibling, list):
            return self.protected(value, sibling, node, parent)
        values = [] if value is None else value
        siblings = [] if sibling is None else sibling
        if not isinstance(values, list) or not isinstance(siblings, list):
            self.strange(node)
            return value, sibling
        pairs = [
            self.protected(one, other, node, parent) for one, other in zip_longest(values, siblings)
        ]
        new, new_siblings = [one for one, _ in pairs], [other for _, other in pairs]
        return _unless_empty(new, value), _unless_empty(new_siblings, sibling)


class Protecting(Walker):
    """Seals. `tokens` collects (search parameter, token) of what is indexed."""

    def __init__(self, *, person: str, service: str, sealer: Sealer, index: bool) -> None:
        super().__init__(person=person, service=service)
        self._sealer = sealer
        self._index = index
        self.tokens: set[tuple[str, str]] = set()

    def protected(self, value: Any, sibling: Any, node: Tree, parent: Json) -> tuple[Any, Any]:
        """Seal one element. Raises `UnsupportedError` for a value of another kind."""
        if value is None and sibling is None:
            return None, None
        if isinstance(value, list) or (sibling is not None and not isinstance(sibling, dict)):
            self.strange(node)
        if self._index and node.leaf is not None and node.leaf.index and value is not None:
            self._note_tokens(value, node.leaf, node, parent)
        if isinstance(value, dict):
            if is_primitive(node.kind) or sibling is not None:
                self.strange(node)
            return self._extension(value, node.path), None
        if node.kind in TEXTS or node.kind == "xhtml":
            if value is not None and not isinstance(value, str):
                self.strange(node)
            hidden = None if sibling is None else self._of_primitive(None, sibling, node)
            return self._text(value, node), hidden
        if node.kind and not is_primitive(node.kind):
            self.strange(node)
        return None, self._of_primitive(value, sibling, node)

    def strange(self, node: Tree) -> None:
        """Refuse: an app might keep what we cannot protect."""
        raise UnsupportedError(
            f"Expected {node.path} in the form that FHIR R4 defines, because it is a protected "
            "element; got something else. Correct the resource."
        )

    def _text(self, value: str | None, node: Tree) -> str | None:
        if value is None:
            return None
        sealed = self._seal(value.encode(), node.path)
        return _DIV.format(sealed) if node.kind == "xhtml" else sealed

    def _of_primitive(self, value: Any, sibling: Any, node: Tree) -> Json:
        return self._extension([value, sibling], f"{node.path}._")

    def _extension(self, value: Any, field: str) -> Json:
        plaintext = json_text.dumps(value, sort_keys=True)
        return {"extension": [{"url": SEALED_URL, "valueString": self._seal(plaintext, field)}]}

    def _seal(self, plaintext: bytes, field: str) -> str:
        return self._sealer.seal(
            person=self._person, service=self._service, field=field, plaintext=plaintext
        )

    def _note_tokens(self, value: Any, leaf: FieldSettings, node: Tree, parent: Json) -> None:
        for form in stored_forms(value, parent_kind=node.parent_kind, parent=parent):
            token = self._sealer.token_for_write(
                service=self._service, field=leaf.path, value=form.encode()
            )
            self.tokens.add((leaf.index, token))


class Opening(Walker):
    """Opens. What is not sealed stays as it is: it was there before the gateway came."""

    def __init__(self, *, person: str, service: str, sealer: Unsealer) -> None:
        super().__init__(person=person, service=service)
        self._sealer = sealer

    def protected(self, value: Any, sibling: Any, node: Tree, parent: Json) -> tuple[Any, Any]:
        """Open one element, or say that it is masked if the person was erased."""
        del parent
        try:
            if (text := sealed_in(sibling)) is not None:
                plain, sibling = _pair(self._unseal(text, f"{node.path}._"))
                if plain is not None:
                    return plain, sibling
            if (text := sealed_in(value)) is not None:
                opened = self._unseal(text, node.path)
                value = json_text.loads(opened) if isinstance(value, dict) else opened.decode()
        except PersonErasedError:
            return (MASKED, sibling) if isinstance(value, dict) else (None, MASKED)
        except (UnsealError, ValueError) as error:
            # `from None`: what a decoder complains about would be a part of the plaintext.
            raise UpstreamContentError(
                f"Expected {node.path} as it was sealed for this person, got something that is not "
                "authentic. Look who changes records behind the gateway."
            ) from (error if isinstance(error, UnsealError) else None)
        return value, sibling

    def strange(self, node: Tree) -> None:
        """Nothing sealed can stand there."""

    def _unseal(self, text: str, field: str) -> bytes:
        return self._sealer.unseal(
            person=self._person, service=self._service, field=field, text=text
        )


def sealed_in(value: object) -> str | None:
    """The sealed text of a protected element in the form that the app has."""
    if isinstance(value, str):
        if looks_sealed(value):
            return value
        found = _SEALED_DIV.fullmatch(value) if value.lstrip().startswith("<div") else None
        return found[1] if found else None
    if not isinstance(value, dict):
        return None
    extensions = value.get("extension")
    for one in extensions if isinstance(extensions, list) else ():
        if isinstance(one, dict) and one.get("url") == SEALED_URL:
            text = one.get("valueString")
            return text if isinstance(text, str) else ""
    return None


def collect(at: Any, tree: Tree, into: list[str]) -> None:
    """Add the sealed texts at all places that a tree leads to."""
    if isinstance(at, list):
        for item in at:
            collect(item, tree, into)
    elif isinstance(at, dict):
        for name, child in matching(at, tree).items():
            if child.leaf is None:
                collect(at.get(name), child, into)
                continue
            for found in (at.get(name), at.get(f"_{name}")):
                each = found if isinstance(found, list) else [found]
                into += [text for one in each if (text := sealed_in(one)) is not None]


def _with(at: Json, out: Json, name: str, value: Any) -> Json:
    """`out` with another value, or without it; a copy is made of `at` the first time."""
    new = dict(at) if out is at else out
    if value is None:
        new.pop(name, None)
    else:
        new[name] = value
    return new


def _unless_empty(new: list[Any], old: Any) -> Any:
    unchanged = isinstance(old, list) and len(old) == len(new)
    if unchanged and all(a is b for a, b in zip(new, old, strict=True)):
        return old
    return new if any(one is not None for one in new) else None


def _pair(plaintext: bytes) -> tuple[Any, Any]:
    value, sibling = json_text.loads(plaintext)
    return value, sibling
