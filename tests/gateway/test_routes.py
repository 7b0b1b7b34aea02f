from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BadRequestError, GatewayConfigurationError
from gateway.routes import check_path, client_location, compile_routes, match, upstream_path
from gateway.settings import FieldSettings, RouteSettings, RuleSettings


def route(name: str = "app", **changes: object) -> RouteSettings:
    values: dict[str, object] = {"kind": "generic", "upstream": "http://127.0.0.1:8090"}
    return RouteSettings(name=name, **(values | changes))  # type: ignore[arg-type]


ROUTES = compile_routes([
    route("all", path="/"),
    route("fhir", kind="ehr", content="fhir", path="/fhir"),
    route("deep", path="/fhir/files/"),
    route("named", host="Forum.Example.org", path="/"),
    route("idn", host="praxis-müller.example"),
    route("six", host="[::1]"),
])  # fmt: skip


def found(authority: str, path: str) -> str | None:
    one = match(ROUTES, authority, path)
    return one.name if one else None


@pytest.mark.parametrize(
    ("authority", "path", "name"),
    [
        ("any.example", "/", "all"),
        ("any.example", "/x", "all"),
        ("any.example:8443", "/fhir", "fhir"),
        ("any.example", "/fhir/Patient/1", "fhir"),
        ("any.example", "/fhirx/Patient/1", "all"),
        ("any.example", "/fhir/files/1", "deep"),
        ("any.example", "/fhir/filesystem", "fhir"),
        ("FORUM.example.ORG:443", "/fhir/Patient/1", "named"),
        ("forum.example.org.", "/", "named"),
        ("evil-forum.example.org", "/", "all"),
        ("xn--praxis-mller-klb.example", "/", "idn"),
        ("[0:0:0:0:0:0:0:1]:8443", "/", "six"),
        ("[::2]", "/", "all"),
    ],
)
def test_the_named_host_and_the_longest_whole_prefix_win(
    authority: str, path: str, name: str
) -> None:
    assert found(authority, path) == name


UNSAFE = [
    "", "x", "*", "/a/../b", "/a/./b", "/..", "/a/%2e%2e/b", "/a/%2E./b", "/a/..;x=1/b", "//a",
    "/a//b", "/a%2fb", "/a%2Fb", "/a\\b", "/a%5cb", "/a%00b", "/a%0ab", "/a%7fb", "/a b", "/a%",
    "/a%zz", "/a%252fb", "/a%252e%252e/b", "/a%25%32%66b", "/a%c0%ae", "/a%ff", "/ä", "/a?b",
    "/a#b", "/%ef%bc%8e%ef%bc%8e/b", "/a%ef%bc%8fb", "/a/%20../b", "/a/..%20/b", "/a\x00b", "/a\n",
]  # fmt: skip


@pytest.mark.parametrize("path", UNSAFE)
def test_a_path_that_can_be_read_in_two_ways_has_no_route(path: str) -> None:
    with pytest.raises(BadRequestError):
        check_path(path)
    assert found("any.example", path) is None


def test_a_refused_path_is_not_repeated() -> None:
    with pytest.raises(BadRequestError) as refused:
        check_path("/patients/Jane%2fDoe")
    assert "Jane" not in str(refused.value)


@pytest.mark.parametrize(
    "path", ["/%66hir/Patient/1", "/FHIR/Patient/1", "/fhir;a=1/Patient/1", "/fh%69r", "/Fhir"]
)
def test_another_spelling_of_a_prefix_does_not_fall_through_to_looser_rules(path: str) -> None:
    assert found("any.example", path) is None


@pytest.mark.parametrize(
    "path", ["/.havengate/x", "/.havengate", "/.HavenGate/x", "/%2ehavengate/x", "/.havengate;/x"]
)
def test_the_gateways_own_pages_are_no_apps(path: str) -> None:
    assert found("any.example", path) is None


@pytest.mark.parametrize("authority", ["", "a b", "user@any.example", "a/b", "a:b:c", "[zz]", "a%"])
def test_a_host_that_is_none_has_no_route(authority: str) -> None:
    assert found(authority, "/") is None


def test_what_no_route_names_has_none() -> None:
    routes = compile_routes([route(path="/app")])
    assert match(routes, "x", "/other") is None


SEGMENT = st.text(st.sampled_from("ab.;%2eEfF5cC0/\\~"), max_size=6)


@given(st.lists(SEGMENT, max_size=4))
def test_whatever_passes_has_no_dots_slashes_or_double_encoding(parts: list[str]) -> None:
    path = "/" + "/".join(parts)
    try:
        check_path(path)
    except BadRequestError:
        return
    from urllib.parse import unquote

    once, twice = unquote(path), unquote(unquote(path))
    assert once == twice or not re.search(r"%[0-9a-fA-F]{2}", once)
    assert once.count("/") == path.count("/")
    assert "\\" not in once
    assert not {one.partition(";")[0] for one in once.split("/")} & {".", ".."}


def test_the_prefix_is_taken_away_only_if_asked_for() -> None:
    kept, taken = (
        compile_routes([route(path="/app", strip_path=strip, upstream="http://127.0.0.1:1/base")])[
            0
        ]
        for strip in (False, True)
    )
    assert upstream_path(kept, "/app/x") == "/base/app/x"
    assert upstream_path(taken, "/app/x") == "/base/x"
    assert upstream_path(taken, "/app") == "/base/"


@pytest.mark.parametrize(
    ("strip", "location", "seen"),
    [
        (True, "http://127.0.0.1:1/base/x?y=1", "/app/x?y=1"),
        (True, "/base/x", "/app/x"),
        (False, "/base/app/x", "/app/x"),
        (False, "http://127.0.0.1:1", "/"),
        (True, "https://elsewhere.example/base/x", "https://elsewhere.example/base/x"),
        (True, "//elsewhere.example/x", "//elsewhere.example/x"),
        (True, "x", "x"),
    ],
)
def test_redirects_of_the_app_to_itself_lead_through_the_gateway(
    *, strip: bool, location: str, seen: str
) -> None:
    [one] = compile_routes(
        [route(path="/app", strip_path=strip, upstream="http://127.0.0.1:1/base")]
    )
    assert client_location(one, location) == seen


PERSONAL = RuleSettings(path="/p/{patient}", type="Mood")
MISTAKES = [
    ([route(path="/a"), route("b", path="/a/")], "nothing distinguishes"),
    ([route(path="/a"), route("b", path="/A")], "nothing distinguishes"),
    ([route(host="x.org"), route("b", host="X.org")], "nothing distinguishes"),
    ([route(path="/a"), route("APP", path="/b")], "a name of its own"),
    ([route("havengate")], "not “havengate”"),
    ([route("a b")], "name of letters"),
    ([route(path="a")], "a path such as"),
    ([route(path="/a/../b")], "a path such as"),
    ([route(path="/a%2fb")], "a path such as"),
    ([route(path="/.havengate/x")], "the gateway's own"),
    ([route(host="https://x")], "host"),
    ([route(host="x:80")], "host"),
    ([route(upstream="127.0.0.1:8080")], "expected in upstream a URL"),
    ([route(upstream="ftp://x")], "expected in upstream a URL"),
    ([route(upstream="http://127.0.0.1:99999")], "expected in upstream a URL"),
    ([route(upstream="https://me:pw@x.org")], "without a name"),
    ([route(upstream="https://x.org/?a=1")], "without a name"),
    ([route(upstream="http://10.0.0.7:8080")], "write https://"),
    ([route(upstream="http://127.0.0.1:1", insecure_upstream=True)], "leave it out"),
    ([route(upstream="https://app:1", insecure_upstream=True)], "leave it out"),
    ([route(patient_consents="none")], "patient_consents"),
    ([route(path="/fhir", upstream="http://127.0.0.1:1/fhir")], "strip_path = true"),
    ([route(content="fhir", rules=(PERSONAL,))], "FHIR needs no rules"),
    ([route(content="json")], "lets nothing pass"),
    ([route(fields=(FieldSettings(path="Mood:/note", seal=True),))], "content = “json”"),
    (
        [route(content="json", rules=(PERSONAL,), patient_facts="none",
               fields=(FieldSettings(path="Patient.name"),))],
        "Mood:/note",
    ),
    ([route(content="fhir", fields=(FieldSettings(path="Mood:/note"),))], "Patient.telecom"),
    ([route(content="json", rules=(PERSONAL,))], "patient_facts"),
    ([route(content="json", rules=(PERSONAL,), patient_facts="upstream")], "patient_facts"),
    ([route(patient_facts="nowhere")], "the name of a route"),
    ([route(patient_facts="b"), route("b", path="/b")], "the name of a route"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "says"), MISTAKES)
def test_a_route_that_cannot_be_meant_is_refused_with_what_to_write(
    settings: list[RouteSettings], says: str
) -> None:
    with pytest.raises(GatewayConfigurationError, match=re.escape(says)) as refused:
        compile_routes(settings)
    assert str(refused.value).startswith("Route “")


@pytest.mark.parametrize(
    "upstream",
    ["http://localhost:1", "http://127.8.9.1", "http://[::1]:8080", "https://app.example.org/x"],
)
def test_plain_http_goes_no_further_than_this_machine(upstream: str) -> None:
    assert compile_routes([route(upstream=upstream)])


def test_plain_http_to_another_machine_needs_to_be_called_insecure() -> None:
    clear = "http://records:8080/fhir"
    with pytest.raises(GatewayConfigurationError, match="insecure_upstream"):
        compile_routes([route(upstream=clear)])
    [one] = compile_routes([route(upstream=clear, insecure_upstream=True)])
    assert (one.upstream_scheme, one.upstream_authority) == ("http", "records:8080")
