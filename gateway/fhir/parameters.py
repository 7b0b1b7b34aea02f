"""Which elements a search parameter looks into."""

from __future__ import annotations


def elements_tested(resource_type: str, parameter: str) -> frozenset[str] | None:
    """Paths (`Observation.value`) that a search parameter tests; None: it may test anything."""
    raise NotImplementedError
