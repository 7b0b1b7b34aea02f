"""One question to the rules, and the names under which the log knows what it is about."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field

from policies.labels import Labels
from policies.model import Action

_ID = re.compile(r"(?!eyJ)[A-Za-z0-9.-]{1,64}").fullmatch
_TYPE = re.compile(r"(?!eyJ)[A-Za-z]{1,48}").fullmatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One thing that is asked for. `patient` and `id` are ids without type.

    `authors` are references (`Practitioner/7`) of those who wrote it.
    """

    action: Action
    type: str
    id: str | None = field(default=None, repr=False)
    patient: str | None = field(default=None, repr=False)
    authors: frozenset[str] = field(default=frozenset(), repr=False)
    labels: Labels = field(default_factory=Labels)
    codes: frozenset[tuple[str, str]] | None = field(default=None, repr=False)


def patient_reference(patient: str) -> str:
    """`Patient/<id>`, the name of a patient in keys and log.

    An id of an app that FHIR would not admit is replaced by a digest of it: the same id always has
    the same name, and the name can stand wherever names stand.
    """
    return f"Patient/{_safe_id(patient)}"


def resource_reference(question: Question) -> str | None:
    """`Type/<id>` or `Type` for the log, or None if the type is no word."""
    if not _TYPE(question.type):
        return None
    if question.id is None:
        return question.type
    return f"{question.type}/{_safe_id(question.id)}"


def _safe_id(text: str) -> str:
    if _ID(text):
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return "x-" + base64.b32encode(digest[:20]).decode().lower()
