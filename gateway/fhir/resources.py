"""What a FHIR resource says about itself: whose it is, who wrote it, which codes are in it."""

from __future__ import annotations

from typing import Any

type Json = dict[str, Any]


def patients_of(resource: Json) -> frozenset[str]:
    """Ids, without type, of all patients that a resource is about."""
    raise NotImplementedError


def unresolved(resource: Json) -> bool:
    """Whether it is of a type that belongs to patients but whose it is cannot be told."""
    raise NotImplementedError


def is_patient_type(resource_type: str) -> bool:
    """Whether resources of this type belong to patients. Unknown types do."""
    raise NotImplementedError


def authors_of(resource: Json) -> frozenset[str]:
    """References (`Practitioner/7`) of who wrote it."""
    raise NotImplementedError


def codes_of(resource: Json) -> frozenset[tuple[str, str]]:
    """All codings in it, as (system, code)."""
    raise NotImplementedError


def reference_target(reference: str) -> tuple[str, str] | None:
    """Type and id that a reference leads to: relative, absolute or versioned."""
    raise NotImplementedError
