"""The normal forms of values that a blind index finds, when stored and when searched for.

A stored value has one form by itself and, where it stands beside a `system` (Identifier, Coding,
ContactPoint), one with it, so that both `identifier=123` and `identifier=urn:x|123` find it (FHIR
R4 section 3.1.1.4.10). Case, compatibility characters and outer white space do not matter.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any, Final

from gateway.errors import UnsupportedError
from gateway.fhir.resources import Json

_WITH_SYSTEM: Final = frozenset({"Identifier", "Coding", "ContactPoint"})
#: FHIR R4 section 3.1.1.4.7: in a search `,`, `$`, `|` and the backslash are escaped by one.
_BAR: Final = re.compile(r"(?<!\\)(?:\\\\)*\|")
_ESCAPED: Final = re.compile(r"\\([,$|\\])")


def stored_forms(value: Any, *, parent_kind: str, parent: Json) -> list[str]:
    """All forms under which a value can be found. Empty for what is neither text nor boolean."""
    if isinstance(value, bool):
        value = "true" if value else "false"
    if not isinstance(value, str):
        return []
    own = _normal(value)
    if parent_kind not in _WITH_SYSTEM:
        return [own]
    system = parent.get("system")
    return [own, f"{system if isinstance(system, str) else ''}\0{own}"]


def searched_form(value: str, *, parent_kind: str) -> str:
    """The form of one searched value: split at commas before, its escapes not yet undone.

    Raises `UnsupportedError` for what equality cannot answer: a system alone, nothing at all.
    """
    bar = _BAR.search(value) if parent_kind in _WITH_SYSTEM else None
    system = None if bar is None else _unescaped(value[: bar.end() - 1])
    own = _normal(_unescaped(value if bar is None else value[bar.end() :]))
    if not own:
        raise UnsupportedError(
            "Expected a value to search for: of a protected element only whole values can be found."
        )
    return own if system is None else f"{system}\0{own}"


def _unescaped(value: str) -> str:
    return _ESCAPED.sub(r"\1", value)


def _normal(value: str) -> str:
    folded = unicodedata.normalize("NFKC", value).casefold()
    return unicodedata.normalize("NFKC", folded).strip()
