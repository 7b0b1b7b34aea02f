"""FHIR Bundles: taken apart and put together."""

from __future__ import annotations

from gateway.fhir.resources import Json


def entries(bundle: Json) -> list[Json]:
    """The entries of a Bundle. Raises `UpstreamContentError` if it is not well-formed."""
    raise NotImplementedError


def entry_resource(entry: Json) -> Json | None:
    """The resource of an entry, if it has one."""
    raise NotImplementedError


def rebuilt(bundle: Json, entries: list[Json], *, total: int | None, links: list[Json]) -> Json:
    """The Bundle with other entries, links and total; what its content no longer bears out goes."""
    raise NotImplementedError


def links_of(bundle: Json) -> list[Json]:
    """The links of a Bundle: `{"relation": …, "url": …}`."""
    raise NotImplementedError
