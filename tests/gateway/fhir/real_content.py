"""Synthetic patients that we did not write: Synthea's, as FHIR R4 transaction bundles."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import orjson

HERE = Path(__file__).parents[4] / "shared" / "data" / "fhir_synthea_r4"


@cache
def resources() -> list[dict[str, Any]]:
    """All resources, their `urn:uuid:` references made literal as a server makes them."""
    found: list[dict[str, Any]] = []
    for path in sorted(HERE.glob("*.json")):
        bundle = orjson.loads(path.read_bytes())
        names = {
            entry["fullUrl"]: f"{entry['resource']['resourceType']}/{entry['resource']['id']}"
            for entry in bundle["entry"]
        }
        found += [_literal(entry["resource"], names) for entry in bundle["entry"]]
    assert len(found) > 500, f"expected Synthea's bundles in {HERE}"
    return found


def of_type(resource_type: str) -> list[dict[str, Any]]:
    return [one for one in resources() if one["resourceType"] == resource_type]


def _literal(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_literal(item, names) for item in value]
    if isinstance(value, dict):
        return {key: _literal(item, names) for key, item in value.items()}
    return names.get(value, value) if isinstance(value, str) else value
