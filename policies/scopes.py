"""SMART App Launch 2.2 scopes: whether what a client was given covers an interaction.

`patient/Observation.rs`, `user/*.cruds`, `system/Patient.read` (version 1 words are understood as
version 2 prescribes). Lives here: only that question, as a fact for the rules. A scope limited by
search parameters (`…?category=…`) covers nothing: whether it holds cannot be told from the request,
and more than was given must never be taken.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from policies.model import Action, Principal, Resource, StudyAction

_SCOPE = re.compile(
    r"(?P<level>patient|user|system)/(?P<type>\*|[A-Z][A-Za-z]{1,63})"
    r"\.(?P<access>\*|read|write|c?r?u?d?s?)"
).fullmatch
_WORDS: Final = {"read": "rs", "write": "cud", "*": "cruds"}
#: What each interaction needs: all of the letters.
_NEEDS: Final[dict[Action | StudyAction, str]] = {
    "read": "r", "history": "r", "search": "s", "count": "s", "create": "c",
    "update": "u", "patch": "u", "delete": "d", "execute": "u", "export": "rs", "disclose": "rs",
}  # fmt: skip


def scopes_cover(principal: Principal, action: Action | StudyAction, resource: Resource) -> bool:
    """True if nothing limits the client, or one of its scopes covers the interaction.

    `patient/` scopes reach only the patient in context: the principal's own record, or one that he
    represents. A service account has only `system/` scopes, a person never.
    """
    if principal.scopes is None:
        return True
    needs = _NEEDS.get(action)
    if needs is None:
        return False
    levels = {"system"} if principal.kind == "service" else {"user"}
    if resource.patient is not None and (
        resource.patient == principal.patient or resource.patient in principal.represents
    ):
        levels.add("patient")
    return any(
        level in levels and kind in {"*", resource.type} and set(needs) <= access
        for level, kind, access in map(_parsed, principal.scopes)
    )


@lru_cache(maxsize=1024)
def _parsed(scope: str) -> tuple[str, str, frozenset[str]]:
    found = _SCOPE(scope)
    if found is None:
        return "", "", frozenset()
    letters = _WORDS.get(found["access"], found["access"])
    return found["level"], found["type"], frozenset(letters)
