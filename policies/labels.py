"""Finds the sensitivity labels of content: one pass over its JSON.

Labels come from codes (in a `Coding` anywhere, also in contained resources and in Bundles), from
the resource type and the kind of service, and from labels that are already there: a label is added,
never taken away, and confidentiality is only raised. A Bundle gets the high-water mark of its
parts.

What this cannot see: free text, `CodeableConcept.text`, codes that are in no table. A coding
without a system is looked up in every table: too many labels are safer than too few.

Codes and tables: `policies.tables`. Vocabulary: HL7 DS4P, v3 ActCode and v3 Confidentiality.
Before: parsed JSON. After: `policies.model.Resource`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from policies.errors import UnlabelledContentError
from policies.model import CONFIDENTIALITY, LABELS, Confidentiality, ServiceKind
from policies.tables import Tables

MAX_DEPTH: Final = 100
MAX_CODE: Final = 64
MAX_SYSTEM: Final = 256
#: Most look-ups of codes that are remembered.
MAX_FOUND: Final = 4_096

#: Labels that may stand on content, with older and broader codes of the same value set.
_KNOWN: Final = {label.upper(): label for label in LABELS} | {
    "ETH": "SUD",
    "OPIOIDUD": "SUD",
    "BH": "PSY",
    "MH": "PSY",
    "COGN": "PSY",
    "DVD": "PSY",
    "EMOTDIS": "PSY",
    "MST": "SDV",
    "VIO": "SDV",
}
#: HL7's own code system of labels: also where a type or category is written with one.
_LABEL_SYSTEM: Final = "v3-ActCode"
_RANK: Final = {level: rank for rank, level in enumerate(CONFIDENTIALITY)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Sensitivity labels and the level of confidentiality of one record."""

    codes: frozenset[str] = frozenset()
    confidentiality: Confidentiality = "N"

    def __or__(self, other: Labels) -> Labels:
        """The high-water mark of both."""
        return Labels(
            codes=self.codes | other.codes,
            confidentiality=max(self.confidentiality, other.confidentiality, key=_RANK.__getitem__),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Labels of a whole and, for a Bundle, of each of its entries in order."""

    whole: Labels
    entries: tuple[Labels, ...] = ()


class Labeller:
    """Labels parsed JSON. `substance_use_is_part_2`: records with SUD count as 42 CFR Part 2.

    Content with more than `max_values` values, or nested deeper than 100 levels, is refused with
    `UnlabelledContentError`: it must not be released. Time and memory are linear in the values.
    """

    def __init__(
        self, tables: Tables, *, substance_use_is_part_2: bool = True, max_values: int = 200_000
    ) -> None:
        self._tables = tables
        # The same few codes come again and again.
        self._find = lru_cache(maxsize=MAX_FOUND)(tables.find)
        self._complete = lru_cache(maxsize=MAX_FOUND)(self._completed)
        self._part_2 = substance_use_is_part_2
        self._max_values = max_values

    def label(self, content: object, *, kind: ServiceKind = "generic") -> Labelled:
        """Label one answer or one body. Raises `UnlabelledContentError`."""
        base = Labels(codes=self._tables.service_kinds.get(kind, frozenset()))
        budget = self._max_values
        if not isinstance(content, dict) or content.get("resourceType") != "Bundle":
            whole, _ = self._collect(content, budget)
            return Labelled(whole=self._complete(whole | base))
        entries: list[Labels] = []
        rest = {key: value for key, value in content.items() if key != "entry"}
        whole, budget = self._collect(rest, budget)
        listed = content.get("entry")
        for entry in listed if isinstance(listed, list) else [listed]:
            found, budget = self._collect(entry, budget)
            entries.append(self._complete(found | base))
            whole |= found
        return Labelled(whole=self._complete(whole | base), entries=tuple(entries))

    def label_codes(self, codings: Sequence[tuple[str, str]], *, kind: ServiceKind) -> Labels:
        """Labels of (system, code) pairs that a route's rules found in the JSON of another app."""
        found = frozenset().union(*(self._find(system, code) for system, code in codings))
        return self._complete(
            Labels(codes=found | self._tables.service_kinds.get(kind, frozenset()))
        )

    def _collect(self, content: object, budget: int) -> tuple[Labels, int]:
        """Everything in a value and below it, and how many more values may be looked at."""
        codes: set[str] = set()
        level: Confidentiality = "N"
        stack: list[tuple[object, int, bool]] = [(content, 0, False)]
        while stack:
            value, depth, in_consent = stack.pop()
            budget -= 1
            if budget < 0 or depth > MAX_DEPTH:
                raise self._too_large()
            if isinstance(value, list):
                stack += [(item, depth + 1, in_consent) for item in value]
            elif isinstance(value, dict):
                if "resourceType" in value:
                    in_consent = value["resourceType"] == "Consent"
                self._look(value, codes, in_consent=in_consent)
                for key, item in value.items():
                    if isinstance(item, dict | list):
                        if key == "security" or (key == "securityLabel" and not in_consent):
                            level = _declared(item, codes, level)
                        stack.append((item, depth + 1, in_consent))
                    else:
                        budget -= 1
        if budget < 0:
            raise self._too_large()
        return Labels(codes=frozenset(codes), confidentiality=level), budget

    def _too_large(self) -> UnlabelledContentError:
        return UnlabelledContentError(
            f"Expected at most {self._max_values} values nested at most {MAX_DEPTH} deep. "
            "Ask for less at once."
        )

    def _look(self, value: dict[str, Any], codes: set[str], *, in_consent: bool) -> None:
        kind = value.get("resourceType")
        if isinstance(kind, str):
            codes |= self._tables.resource_types.get(kind, frozenset())
        code = value.get("code")
        if isinstance(code, int):  # as apps do that take SNOMED CT for numbers
            code = str(code) if -(2**63) <= code < 2**63 else ""
        if isinstance(code, str) and len(code := code.strip()) <= MAX_CODE:
            system = value.get("system")
            known = isinstance(system, str) and len(system) <= MAX_SYSTEM
            codes |= self._find(str(system) if known else "", code)
            # A consent names labels without having them; anything else that names one has it.
            if not in_consent and known and str(system).rstrip("/").endswith(_LABEL_SYSTEM):
                label = _KNOWN.get(code.upper())
                codes |= {label} if label else set()

    def _completed(self, labels: Labels) -> Labels:
        """Add what the labels found imply, and raise confidentiality to what they ask for."""
        codes = set(labels.codes)
        for label in labels.codes:
            codes |= self._tables.implies.get(label, frozenset())
        if "SUD" in codes and self._part_2:
            codes.add("42CFRPart2")
        levels = [self._tables.confidentiality.get(label, "N") for label in codes]
        highest = max([labels.confidentiality, *levels], key=_RANK.__getitem__)
        return Labels(codes=frozenset(codes), confidentiality=highest)


def _declared(value: object, codes: set[str], level: Confidentiality) -> Confidentiality:
    """Take over what stands on the content: `meta.security`, `DocumentReference.securityLabel`.

    From any system: releases of FHIR name theirs differently, and clinics name their own. One label
    too many is safer than one too few.
    """
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict):
            continue
        nested = item.get("coding")
        if isinstance(nested, list):
            level = _declared(nested, codes, level)
        level = _declared_code(item, codes, level)
    return level


def _declared_code(
    coding: dict[str, Any], codes: set[str], level: Confidentiality
) -> Confidentiality:
    code = coding.get("code")
    if not isinstance(code, str):
        return level
    code = code.strip().upper()
    if code in _KNOWN:
        codes.add(_KNOWN[code])
    for named in CONFIDENTIALITY:
        if named == code and _RANK[named] > _RANK[level]:
            return named
    return level
