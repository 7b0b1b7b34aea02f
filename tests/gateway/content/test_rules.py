from __future__ import annotations

import re

import pytest

from gateway.content.handler import ContentHandler
from gateway.content.rules import compile_rules, patient_id
from gateway.core.handler import Inspected, Streamed
from gateway.core.messages import Headers, RequestHead
from gateway.errors import BadRequestError, GatewayConfigurationError, UnsupportedError
from gateway.settings import FieldSettings, RouteSettings, RuleSettings
from tests.gateway.content.script import route

PAGES = RuleSettings(path="/{rest*}", type="Page")
SITE = route(
    RuleSettings(path="/moods/{patient}", type="Mood"),
    RuleSettings(path="/moods/{patient}", type="Mood", methods=("POST",)),
    RuleSettings(path="/moods/stats", type="Statistics"),
    RuleSettings(path="/export.csv", type="Export", action="export"),
    RuleSettings(path="/list/", type="Mood", items="/items", patient="/patient"),
    RuleSettings(path="/static/{rest*}", type="Page"),
    PAGES,
)


def type_of(path: str, method: str = "GET") -> str:
    matched = compile_rules(SITE).match(method, path)
    assert matched is not None
    return matched.rule.type


@pytest.mark.parametrize(
    ("path", "type_"),
    [
        ("/moods/7", "Mood"),
        ("/m%6fods/7", "Mood"),
        ("/moods/stats", "Statistics"),
        ("/list/", "Mood"),
        ("/static/a/b.css", "Page"),
        ("/static/", "Page"),
        ("/", "Page"),
        ("/moods", "Page"),
        ("/moods/7/more", "Page"),
        ("/export.csv", "Export"),
    ],
)
def test_the_most_specific_template_wins_in_any_encoding(path: str, type_: str) -> None:
    assert type_of(path) == type_


@pytest.mark.parametrize(
    "path",
    [
        "/Moods/7", "/moods/7/", "/moods;x/7", "/moods/stats.json", "/MOODS/stats", "/list",
        "/List/", "/export.json", "/export", "/export.csv/", "/%4doods/7", "/moods/stats;a=1",
        "/mood%C5%BF/7",
    ],
)  # fmt: skip
def test_another_spelling_of_a_known_path_never_finds_looser_rules(path: str) -> None:
    with pytest.raises(BadRequestError, match="nearly that"):
        type_of(path)


def test_a_method_that_the_template_is_not_for_is_refused() -> None:
    assert type_of("/moods/7", "POST") == "Mood"
    with pytest.raises(UnsupportedError) as refused:
        type_of("/moods/7", "DELETE")
    assert refused.value.status == 405


@pytest.mark.parametrize("path", ["/moods/..", "/moods/%2e%2e", "/moods//7", "/moods/a%2fb"])
def test_a_path_that_can_be_read_in_two_ways_matches_no_rule(path: str) -> None:
    with pytest.raises(BadRequestError):
        type_of(path)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("7", "7"), (7, "7"), ("Patient/7", "7"), ("", None), ("Patient/", None), (True, None),
        (None, None), (7.0, None), ({}, None), (["7"], None), ("x/7", None), ("a\nb", None),
        ("x" * 300, None), (2**70, None),
    ],
)  # fmt: skip
def test_only_a_plain_id_names_a_patient(value: object, name: str | None) -> None:
    assert patient_id(value) == name


def rule(path: str = "/x", type: str = "Mood", **changes: object) -> RuleSettings:  # noqa: A002
    return RuleSettings(path=path, type=type, **changes)  # type: ignore[arg-type]


FIELD = (FieldSettings(path="Mood:/note", seal=True),)
MISTAKES = [
    (route(rule("/a/{id}"), rule("/a/{patient}")), "neither is more specific"),
    (route(rule("/a/{id}"), rule("/{id}/b")), "neither is more specific"),
    (route(rule("x")), "begins with"),
    (route(rule("/a//b")), "no “//”"),
    (route(rule("/{id}/{id}")), "each variable once"),
    (route(rule("/{rest*}/a")), "at the end"),
    (route(rule("/{rest}")), "at the end"),
    (route(rule("/p-{id}")), "whole segment"),
    (route(rule("/a/%2fb")), "plain segments"),
    (route(rule(type="mood entry")), "a type of letters"),
    (route(rule(methods=("FETCH",))), "methods of"),
    (route(rule(methods=())), "methods of"),
    (route(rule(patient="patient")), "JSON pointer"),
    (route(rule(type="Page", patient="/patient")), "without being looked into"),
    (route(rule(total="/total")), "write items"),
    (route(rule(items="/a/*")), "name one member"),
    (route(rule(items="/a", keep=("/a/b",))), "overlap"),
    (route(rule(items="/a/b", keep=("/a",))), "overlap"),
    (route(rule(methods=("PUT",), request_patient="/patient")), "must be read first"),
    (route(rule(patient="/p"), fields={"Other:/note": {"seal": True}}), "no rule has the type"),
    (route(rule(patient="/p"), fields={"Mood:/note": {}}), "seal or mask"),
    (route(rule(), fields={"Mood:/note": {"seal": True}}), "where the patient stands"),
    (route(rule(patient="/p"), fields={"Mood:/a": {"mask": True, "index": "a"}}), "index"),
    (
        route(rule(patient="/p"), fields={"Mood:/a/*": {"seal": True, "index": "a"}}),
        "a member with a name",
    ),
    (
        route(rule(patient="/p"), fields={"Mood:/a": {"seal": True}, "Mood:/a/b": {"seal": True}}),
        "overlap",
    ),
]


@pytest.mark.parametrize(("settings", "says"), MISTAKES)
def test_rules_that_cannot_be_meant_are_refused_with_what_to_write(
    settings: RouteSettings, says: str
) -> None:
    with pytest.raises(GatewayConfigurationError, match=re.escape(says)) as refused:
        ContentHandler(settings)
    assert str(refused.value).startswith("Route “app”: ")


def head(method: str, target: str, **headers: str) -> RequestHead:
    path, _, query = target.partition("?")
    fields = tuple((name.replace("_", "-"), text) for name, text in headers.items())
    return RequestHead(
        method=method, authority="x", path=path, query=query, headers=Headers(fields)
    )


def test_json_is_looked_into_and_pages_pass() -> None:
    handler = ContentHandler(SITE)
    assert isinstance(handler.plan(head("GET", "/moods/7")), Inspected)
    plan = handler.plan(head("GET", "/static/a.css"))
    assert isinstance(plan, Streamed)
    assert [(one.type, one.action) for one in plan.questions] == [("Page", "read")]


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_what_no_rule_of_a_json_route_names_nobody_gets(method: str) -> None:
    handler = ContentHandler(route(rule("/known")))
    with pytest.raises(UnsupportedError) as refused:
        handler.plan(head(method, "/unknown"))
    assert refused.value.status == 404


@pytest.mark.parametrize(
    ("method", "action"), [("GET", "read"), ("HEAD", "read"), ("POST", "create"), ("PUT", "update")]
)
def test_an_opaque_route_asks_for_pages_and_for_patients_where_the_path_names_them(
    method: str, action: str
) -> None:
    settings = RouteSettings(
        name="app", kind="generic", upstream="http://127.0.0.1:1",
        rules=(rule("/p/{patient}/{rest*}", type="File", public=True),),
    )  # fmt: skip
    handler = ContentHandler(settings)
    plan = handler.plan(head(method, "/other"))
    assert isinstance(plan, Streamed)
    assert [(one.type, one.action, one.patient) for one in plan.questions] == [
        ("Page", action, None)
    ]
    assert not plan.public
    named = handler.plan(head("GET", "/p/7/photo.jpg"))
    assert isinstance(named, Streamed)
    assert [(one.type, one.patient) for one in named.questions] == [("File", "7")]
    assert named.public


@pytest.mark.parametrize(
    "one",
    [
        head("POST", "/moods/7", x_http_method_override="DELETE"),
        head("GET", "/static/a", x_method_override="DELETE"),
        head("GET", "/static/a", x_http_method="PUT"),
        head("POST", "/static/a?_method=DELETE"),
        head("POST", "/static/a?a=1&%5fmethod=DELETE"),
    ],
)
def test_a_method_in_disguise_is_refused(one: RequestHead) -> None:
    with pytest.raises(BadRequestError, match="method itself"):
        ContentHandler(SITE).plan(one)
