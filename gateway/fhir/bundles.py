"""FHIR Bundles: taken apart and put together. Searchsets, histories, transactions and the rest.

An app's Bundle is believed only where it is well-formed (FHIR R4 Bundle). What is put together has
nothing of the old one but what it still bears out.
"""

from __future__ import annotations

from typing import Any, Final

from gateway.errors import UpstreamContentError
from gateway.fhir.resources import Json

#: What may stay of a Bundle whose entries have changed. Its id, version and signature name another
#: content; its labels were the high-water mark of what may have been left out.
_KEPT: Final = ("resourceType", "type", "timestamp", "language")
_KEPT_OF_META: Final = ("lastUpdated", "profile")


def entries(bundle: Json) -> list[Json]:
    """The entries of a Bundle. Raises `UpstreamContentError` if it is not well-formed."""
    if bundle.get("resourceType") != "Bundle" or not isinstance(bundle.get("type"), str):
        raise _malformed("a Bundle with a type")
    found = _dicts(bundle, "entry")
    for entry in found:
        if not isinstance(entry.get("fullUrl", ""), str):
            raise _malformed("an entry whose fullUrl is a string")
        if not all(
            isinstance(entry.get(part, {}), dict) for part in ("search", "request", "response")
        ):
            raise _malformed("an entry whose search, request and response are objects")
        entry_resource(entry)
    links_of(bundle)
    return found


def entry_resource(entry: Json) -> Json | None:
    """The resource of an entry, if it has one. Raises `UpstreamContentError` if it is none."""
    if "resource" not in entry:
        return None
    resource = entry["resource"]
    if not isinstance(resource, dict) or not isinstance(resource.get("resourceType"), str):
        raise _malformed("an entry whose resource has a resourceType")
    return resource


def rebuilt(bundle: Json, entries: list[Json], *, total: int | None, links: list[Json]) -> Json:
    """The Bundle with other entries, links and total (none if None).

    Only type, timestamp, language, time of last update and profiles are kept of the old one.
    """
    new: Json = {key: bundle[key] for key in _KEPT if key in bundle}
    meta = bundle.get("meta")
    if isinstance(meta, dict) and (kept := {k: meta[k] for k in _KEPT_OF_META if k in meta}):
        new["meta"] = kept
    if total is not None:
        new["total"] = total
    # FHIR R4 section 2.6.2: an array is never empty.
    if links:
        new["link"] = links
    if entries:
        new["entry"] = entries
    return new


def links_of(bundle: Json) -> list[Json]:
    """The links of a Bundle: `{"relation": …, "url": …}`. Raises `UpstreamContentError`."""
    found = _dicts(bundle, "link")
    for link in found:
        if not isinstance(link.get("relation"), str) or not isinstance(link.get("url"), str):
            raise _malformed("a link with relation and url")
    return found


def _dicts(bundle: Json, key: str) -> list[Json]:
    found: Any = bundle.get(key, [])
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise _malformed(f"a Bundle whose {key} is a list of objects")
    return found


def _malformed(expected: str) -> UpstreamContentError:
    return UpstreamContentError(
        f"Expected {expected} (FHIR R4 Bundle), got something else. Nothing of it was released; "
        "look at what the app answers."
    )
