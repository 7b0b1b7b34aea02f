"""One reading of a request, or none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.messages import Headers, RequestHead
from gateway.errors import BadRequestError
from gateway.fhir.request import Interaction, parse_head, parse_interaction

JSON = (("content-type", "application/fhir+json"),)


def head(method: str, target: str, *headers: tuple[str, str]) -> RequestHead:
    path, _, query = target.partition("?")
    return RequestHead(
        method=method, authority="gateway.test", path=path, query=query, headers=Headers(headers)
    )


def understood(method: str, target: str, body: bytes = b"") -> Interaction:
    return parse_interaction(head(method, target, *(JSON if body else ())), body)


@pytest.mark.parametrize(
    ("method", "target", "name", "action"),
    [
        ("GET", "/Observation/1", "read", "read"),
        ("HEAD", "/Observation/1", "read", "read"),
        ("GET", "/Observation/1/_history/2", "vread", "history"),
        ("GET", "/Observation/1/_history", "history", "history"),
        ("GET", "/Observation/_history", "history", "history"),
        ("GET", "/Observation", "search", "search"),
        ("GET", "/Observation/?code=1", "search", "search"),
        ("GET", "/Observation?_summary=count", "search", "count"),
        ("GET", "/Patient/1/Observation", "search", "search"),
        ("GET", "/metadata", "capabilities", "read"),
        ("GET", "/Patient/1/$everything", "everything", "export"),
        ("GET", "/Patient/$export", "export", "export"),
        ("DELETE", "/Observation/1", "delete", "delete"),
        ("GET", "/?_hgpage=x", "page", "search"),
    ],
)
def test_understands_the_interactions_of_r4(
    method: str, target: str, name: str, action: str
) -> None:
    found = understood(method, target)
    assert (found.name, found.action) == (name, action)


@pytest.mark.parametrize(
    ("method", "target", "name"),
    [
        ("POST", "/Observation", "create"),
        ("PUT", "/Observation/1", "update"),
        ("POST", "/", "bundle"),
        ("POST", "/Observation/$validate", "validate"),
    ],
)
def test_understands_what_comes_with_a_body(method: str, target: str, name: str) -> None:
    found = understood(method, target, b'{"resourceType":"Observation"}')
    assert found.name == name
    assert found.content == {"resourceType": "Observation"}


@pytest.mark.parametrize(
    "target",
    [
        "/Observation/%31", "/Observation%2F1", "/Observation/..", "/Observation/.",
        "//Observation",
        "/Observation//1", "/Observation/a_b", f"/Observation/{'a' * 65}", "/observation/1",
        "/Observation/1/2", "/Observation/1/Patient", "/Patient/1/*", "/", "/_history", "/_search",
        "/Observation/$reindex", "/$meta", "/Patient/$everything", "/Encounter/1/$everything",
        "/Observation/1/$validate", "/Observation/1/_history/2/3", "/Observation\\1",
        "/Observation?_count=1&_count=2", "/Observation?_elements=a&_elements=b",
        "/Observation?_summary=true&_summary=count", "/Observation?code=%00",
        "/Observation?code=%ff",
        "/Observation?=1", "/Observation/1?_format=xml",
        "/Observation/1?_format=application/fhir%2Bxml",
        "/.well-known/smart-configuration", "/Observation/_history/1/x", "/Observation/_search",
    ],
)  # fmt: skip
def test_refuses_what_two_readers_could_read_differently(target: str) -> None:
    with pytest.raises(BadRequestError):
        parse_head(head("GET", target))


@pytest.mark.parametrize(
    "accept",
    ["application/fhir+xml", "text/xml, application/xml;q=0.9", "image/png", "text/turtle"],
)
def test_refuses_to_answer_in_what_cannot_be_looked_into(accept: str) -> None:
    for target in ("/Observation/1", "/Binary/1"):
        with pytest.raises(BadRequestError) as refused:
            parse_head(head("GET", target, ("accept", accept)))
        assert refused.value.status == 406


@pytest.mark.parametrize(
    "accept",
    [
        "application/fhir+json",
        "*/*",
        "application/json;q=0.5, text/xml",
        "text/html, */*;q=0.1",
        "",
    ],
)
def test_answers_whoever_can_read_json(accept: str) -> None:
    assert parse_head(head("GET", "/Observation/1", ("accept", accept))).name == "read"


@pytest.mark.parametrize("name", ["x-http-method-override", "x-http-method", "x-method-override"])
def test_the_method_is_the_one_on_the_line(name: str) -> None:
    with pytest.raises(BadRequestError):
        parse_head(head("POST", "/Observation", (name, "DELETE")))


@pytest.mark.parametrize(
    ("method", "target", "kind", "body", "status"),
    [
        ("POST", "/Observation", "application/fhir+xml", b"<x/>", 415),
        ("PATCH", "/Observation/1", "application/fhir+json", b"{}", 415),
        ("PATCH", "/Observation/1", "application/json-patch+json", b"{}", 400),
        ("POST", "/Observation", "application/fhir+json", b"[]", 400),
        ("POST", "/Observation", "application/fhir+json", b"{", 400),
        ("POST", "/Observation/_search", "application/json", b"{}", 415),
        ("POST", "/Observation/_search", "application/x-www-form-urlencoded", b"\xff=1", 400),
        ("DELETE", "/Observation/1", "application/fhir+json", b"{}", 400),
        ("PUT", "/Observation", "application/fhir+json", b"{}", 422),
        ("POST", "/Observation/1", "application/fhir+json", b"{}", 405),
    ],
)
def test_refuses_bodies_that_are_not_what_the_request_needs(
    method: str, target: str, kind: str, body: bytes, status: int
) -> None:
    with pytest.raises(BadRequestError) as refused:
        parse_interaction(head(method, target, ("content-type", kind)), body)
    assert refused.value.status == status


def test_a_parameter_in_the_query_and_in_the_form_stands_twice() -> None:
    kind = ("content-type", "application/x-www-form-urlencoded")
    asked = head("POST", "/Observation/_search?_count=1", kind)
    with pytest.raises(BadRequestError):
        parse_interaction(asked, b"_count=2")
    assert parse_interaction(asked, b"code=2").parameters == (("_count", "1"), ("code", "2"))


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("/Patient/7", {"7"}),
        ("/Patient?_id=7,8", {"7", "8"}),
        ("/Observation?_id=7", set()),
        ("/Observation?patient=7", {"7"}),
        ("/Observation?patient=Patient/7,8", {"7", "8"}),
        ("/Observation?subject=Patient/7", {"7"}),
        ("/Observation?subject:Patient=7", {"7"}),
        ("/Observation?subject=Group/7", set()),
        ("/Observation?patient:identifier=7", set()),
        ("/Patient/7/Observation", {"7"}),
        ("/Patient/7/Observation?subject=Patient/8", {"7", "8"}),
    ],
)
def test_finds_the_patients_that_a_request_names(target: str, named: set[str]) -> None:
    assert understood("GET", target).patients == named


@given(
    method=st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"]),
    path=st.text(st.sampled_from("PatientObs/._$%1-*~\\"), max_size=20),
    query=st.text(st.sampled_from("_idcount=&%1,:.+"), max_size=20),
    body=st.binary(max_size=20),
)
def test_anything_else_is_refused_and_nothing_breaks(
    method: str, path: str, query: str, body: bytes
) -> None:
    asked: Any = None
    try:
        asked = parse_interaction(head(method, f"/{path}?{query}", *JSON), body)
    except BadRequestError as error:
        assert 400 <= error.status < 500  # noqa: PT017 - both ends are right
        return
    assert isinstance(asked, Interaction)
    assert asked.id is None or asked.id not in {"", ".", ".."}
