"""A Bundle is believed only where it is well-formed, and says nothing of what was left out."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.errors import UpstreamContentError
from gateway.fhir.bundles import entries, entry_resource, links_of, rebuilt
from gateway.fhir.resources import Json


def bundle(**other: Any) -> Json:
    return {"resourceType": "Bundle", "type": "searchset", **other}


@pytest.mark.parametrize(
    "wrong",
    [
        {}, {"resourceType": "Bundle"}, {"resourceType": "bundle", "type": "searchset"},
        bundle(type=1), bundle(entry={}), bundle(entry=None), bundle(entry=[None]),
        bundle(entry=[[]]), bundle(entry=[{"resource": None}]), bundle(entry=[{"resource": {}}]),
        bundle(entry=[{"resource": {"resourceType": 1}}]), bundle(entry=[{"fullUrl": 1}]),
        bundle(entry=[{"search": "match"}]), bundle(entry=[{"response": []}]), bundle(link={}),
        bundle(link=[{"relation": "next"}]), bundle(link=[{"url": "x"}]), bundle(link=["x"]),
    ],
)  # fmt: skip
def test_refuses_what_is_no_bundle(wrong: Json) -> None:
    with pytest.raises(UpstreamContentError):
        entries(wrong)


def test_gives_entries_resources_and_links() -> None:
    patient = {"resourceType": "Patient"}
    links = [{"relation": "next", "url": "x"}]
    whole = bundle(entry=[{"resource": patient}, {"response": {}}], link=links)
    assert [entry_resource(entry) for entry in entries(whole)] == [patient, None]
    assert links_of(whole) == links
    assert entries(bundle()) == []
    assert links_of(bundle()) == []


def test_keeps_nothing_of_the_old_bundle_that_its_content_no_longer_bears_out() -> None:
    old = bundle(
        id="1",
        total=7,
        timestamp="2026-01-01T00:00:00Z",
        meta={"versionId": "2", "lastUpdated": "x", "security": [{"code": "PSY"}], "tag": []},
        signature={},
        identifier={"value": "x"},
        extension=[],
        issues=[],
        link=[{"relation": "next", "url": "x"}],
        entry=[{"fullUrl": "a"}],
    )
    assert rebuilt(old, [], total=None, links=[]) == bundle(
        timestamp="2026-01-01T00:00:00Z", meta={"lastUpdated": "x"}
    )
    new = rebuilt(old, [{"fullUrl": "b"}], total=0, links=[{"relation": "self", "url": "y"}])
    assert (new["total"], new["entry"], new["link"]) == (
        0, [{"fullUrl": "b"}], [{"relation": "self", "url": "y"}],
    )  # fmt: skip
