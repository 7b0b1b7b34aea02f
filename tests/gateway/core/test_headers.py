from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.headers import (
    check_request,
    clean_request,
    clean_response,
    forwarded_for,
    is_service_worker,
    is_upgrade,
    never_stored,
)
from gateway.core.messages import Headers, RequestHead, ResponseHead
from gateway.errors import BadRequestError
from gateway.settings import LimitSettings

HOST = ("host", "clinic.example")


def request(*fields: tuple[str, str], **changes: str) -> RequestHead:
    given_: dict[str, Any] = {
        "method": "GET",
        "authority": "clinic.example",
        "path": "/",
        "client": "192.0.2.7",
        **changes,
    }
    return RequestHead(headers=Headers((HOST, *fields)), **given_)


def names(head: RequestHead | ResponseHead) -> set[str]:
    return {name for name, _ in head.headers}


def refused(head: RequestHead) -> int:
    with pytest.raises(BadRequestError) as caught:
        check_request(head)
    return caught.value.status


# --- What is refused ------------------------------------------------------------------------------


def test_an_ordinary_request_passes() -> None:
    check_request(request(("accept", "application/fhir+json"), ("content-length", "0")))


@pytest.mark.parametrize(
    "fields",
    [
        [("host", "clinic.example")],
        [("content-length", "1"), ("content-length", "1")],
        [("content-length", "+1")],
        [("content-length", "1, 1")],
        [("content-length", "٣")],
        [("content-length", "1" * 19)],
        [("content-length", "1"), ("transfer-encoding", "chunked")],
        [("x", "a\rb")],
        [("x", "a\nb")],
        [("x", "a\0b")],
        [("x y", "a")],
        [("x:", "a")],
        [("", "a")],
        [("X-Upper", "a")],
        [("x_havengate_identity", "a")],
        [("havengate_identity", "a")],
        [("content_length", "3")],
        [("transfer_encoding", "chunked")],
        [("connection", "content-length")],
        [("connection", "close, authorization")],
    ],
)
def test_refuses_what_two_readers_could_understand_differently(
    fields: list[tuple[str, str]],
) -> None:
    assert refused(request(*fields)) == 400


@pytest.mark.parametrize("coding", ["gzip, chunked", "xchunked", "identity", "chunked, chunked"])
def test_refuses_transfer_codings_that_it_does_not_undo(coding: str) -> None:
    assert refused(request(("transfer-encoding", coding))) == 501


def test_refuses_an_authority_that_differs_from_host() -> None:
    assert refused(request(authority="other.example")) == 400
    check_request(request(authority="CLINIC.example"))


def test_refuses_a_request_of_http_1_without_host() -> None:
    head = RequestHead(method="GET", authority="", path="/", http_version="1.1")
    assert refused(head) == 400
    assert refused(RequestHead(method="GET", authority="", path="/", http_version="1")) == 400


@pytest.mark.parametrize("authority", ["", "a b", "user@host", "a/b", "host:", "host:123456", "ü"])
def test_refuses_an_authority_that_is_no_host(authority: str) -> None:
    head = RequestHead(
        method="GET", authority=authority, path="/", headers=Headers((("host", authority),))
    )
    assert refused(head) == 400


@pytest.mark.parametrize("path", ["", "*", "a", "/a b", "/\x7f", "/é", "/%zz", "/%2", "/a#b"])
def test_refuses_a_target_that_is_no_path(path: str) -> None:
    assert refused(request(path=path)) == 400


@pytest.mark.parametrize("query", ["a b", "a#b", "é", "\n"])
def test_refuses_a_query_with_characters_that_cannot_stand_there(query: str) -> None:
    assert refused(request(query=query)) == 400


def test_refuses_more_and_larger_fields_and_targets_than_the_limits() -> None:
    limits = LimitSettings(header_bytes=200, header_fields=3, target_bytes=20)
    for head, status in (
        (request(*[("x", "a")] * 3), 431),
        (request(("x", "a" * 200)), 431),
        (request(path="/" + "a" * 20), 414),
    ):
        with pytest.raises(BadRequestError) as caught:
            check_request(head, limits)
        assert caught.value.status == status


def test_refuses_unknown_expectations_and_methods() -> None:
    assert refused(request(("expect", "200-ok"))) == 417
    assert refused(request(method="get")) == 501
    check_request(request(("expect", "100-continue")))


@pytest.mark.parametrize("name", ["connection", "keep-alive", "upgrade", "proxy-connection", "te"])
def test_refuses_connection_fields_in_http_2(name: str) -> None:
    assert refused(request((name, "x"), http_version="2")) == 400


def test_http_2_may_say_te_trailers_and_needs_no_host() -> None:
    check_request(request(("te", "trailers"), http_version="2"))
    check_request(RequestHead(method="GET", authority="a.example", path="/", http_version="2"))


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), max_size=6))
def test_what_passes_the_check_has_only_tokens_and_no_control_characters(
    fields: list[tuple[str, str]],
) -> None:
    head = request(*fields)
    try:
        check_request(head)
    except BadRequestError:
        return
    wire = "\r\n".join(f"{name}: {value}" for name, value in clean_request(head).headers)
    assert len(wire.split("\r\n")) == len(clean_request(head).headers.fields)
    assert "\n" not in wire.replace("\r\n", "")


# --- What passes on -------------------------------------------------------------------------------

_OURS = st.sampled_from(["havengate-", "x-havengate-"]).flatmap(
    lambda prefix: st.text("abcdef-_", max_size=10).map(lambda rest: prefix + rest)
)


@settings(deadline=None)
@given(_OURS, st.booleans())
def test_the_gateways_own_names_never_pass_either_way(name: str, underscores: bool) -> None:  # noqa: FBT001
    name = name.replace("-", "_") if underscores else name
    head = request((name, "forged"))
    assert "forged" not in dict(clean_request(head).headers).values()
    if not underscores:
        answer = clean_response(ResponseHead(status=200, headers=Headers(((name, "forged"),))))
        assert "forged" not in dict(answer.headers).values()


def test_hop_by_hop_fields_and_what_connection_names_do_not_pass() -> None:
    hop = ["connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade",
           "proxy-authorization", "proxy-connection", "x-secret-of-this-hop"]  # fmt: skip
    fields = [(name, "x") for name in hop if name != "connection"]
    head = request(("connection", "close, X-Secret-Of-This-Hop"), *fields, ("accept", "a"))
    assert names(clean_request(head)).isdisjoint(hop)
    assert "accept" in names(clean_request(head))
    answer = ResponseHead(status=200, headers=Headers(head.headers.fields))
    assert names(clean_response(answer)).isdisjoint(hop)


def test_te_trailers_passes_alone() -> None:
    assert ("te", "trailers") in clean_request(request(("te", "trailers"))).headers.fields
    assert "te" not in names(clean_request(request(("te", "gzip"))))


@pytest.mark.parametrize(
    "name",
    ["forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-prefix", "x-real-ip",
     "x-original-url", "x_forwarded_for", "x_anything"],
)  # fmt: skip
def test_what_an_outsider_says_about_the_way_is_dropped(name: str) -> None:
    cleaned = clean_request(request((name, "forged")))
    assert "forged" not in dict(cleaned.headers).values()


def test_the_app_is_told_who_asked_for_what() -> None:
    told = dict(clean_request(request()).headers)
    assert told["forwarded"] == 'for=192.0.2.7;host="clinic.example";proto=https'
    assert told["x-forwarded-for"] == "192.0.2.7"
    assert told["x-forwarded-host"] == "clinic.example"
    assert told["via"] == "1.1 havengate"


def test_an_ipv6_address_is_quoted_and_no_address_is_unknown() -> None:
    assert 'for="[2001:db8::1]"' in forwarded_for(request(client="[2001:db8::1]"))[0][1]
    assert "for=unknown" in forwarded_for(request(client='x";host="evil'))[0][1]


def test_nothing_of_the_client_is_told_to_the_outside() -> None:
    cleaned = clean_request(request(), forwarded=False)
    assert not any("192.0.2.7" in value for _, value in cleaned.headers)


def test_via_keeps_the_way_so_far() -> None:
    cleaned = clean_request(request(("via", "1.0 a"), ("via", "1.1 b"), http_version="2"))
    assert cleaned.headers.all("via") == ["1.0 a, 1.1 b, 2 havengate"]


def test_host_and_expect_stay_here() -> None:
    assert names(clean_request(request(("expect", "100-continue")))).isdisjoint({"host", "expect"})


def test_repetitions_and_order_are_kept() -> None:
    cleaned = clean_request(request(("x-b", "1"), ("x-a", "1"), ("x-b", "2")))
    assert cleaned.headers.fields[:3] == (("x-b", "1"), ("x-a", "1"), ("x-b", "2"))


def test_an_answer_says_nothing_about_what_runs_behind() -> None:
    fields = [(name, "secret") for name in ("server", "x-powered-by", "alt-svc", "proxy-status")]
    cleaned = clean_response(ResponseHead(status=200, headers=Headers(tuple(fields))))
    assert "secret" not in dict(cleaned.headers).values()


def test_an_app_cannot_widen_the_reach_of_a_script_to_the_whole_host() -> None:
    head = ResponseHead(status=200, headers=Headers((("service-worker-allowed", "/"),)))
    assert "service-worker-allowed" not in names(clean_response(head))


@pytest.mark.parametrize(
    "field",
    [
        ("service-worker", "script"),
        ("service-worker", " SCRIPT"),
        ("service-worker", "whatever"),
        ("sec-fetch-dest", "serviceworker"),
        ("sec-fetch-dest", "ServiceWorker "),
    ],
)
def test_a_request_for_the_script_of_a_service_worker_is_recognised(
    field: tuple[str, str],
) -> None:
    assert is_service_worker(request(field))
    assert not is_service_worker(request(("sec-fetch-dest", "script")))


def test_strict_transport_security_is_ours() -> None:
    head = ResponseHead(status=200, headers=Headers((("strict-transport-security", "max-age=0"),)))
    assert clean_response(head).headers.all("strict-transport-security") == ["max-age=31536000"]


def test_cookies_of_an_answer_stay_apart() -> None:
    fields = (("set-cookie", "a=1"), ("set-cookie", "b=2"))
    cleaned = clean_response(ResponseHead(status=200, headers=Headers(fields)))
    assert cleaned.headers.all("set-cookie") == ["a=1", "b=2"]


def test_protected_content_is_never_stored() -> None:
    fields = (("cache-control", "public, max-age=9"), ("expires", "x"), ("etag", "y"))
    head = never_stored(ResponseHead(status=200, headers=Headers(fields)))
    assert head.headers.fields == (("etag", "y"), ("cache-control", "no-store"))


@pytest.mark.parametrize(
    "head",
    [
        request(("connection", "upgrade"), ("upgrade", "websocket")),
        request(("upgrade", "WebSocket, h2c")),
        request(("sec-websocket-key", "x"), http_version="2"),
        request(method="CONNECT"),
    ],
)
def test_an_upgrade_is_noticed(head: RequestHead) -> None:
    assert is_upgrade(head)


def test_an_offer_of_cleartext_http_2_is_no_upgrade() -> None:
    assert not is_upgrade(request(("connection", "upgrade"), ("upgrade", "h2c")))
    assert not is_upgrade(request())


def test_crumbs_of_cookies_reach_the_app_as_one_field() -> None:
    fields = (
        ("host", "gateway.test"),
        ("cookie", "a=1"),
        ("accept", "*/*"),
        ("cookie", "b=2; c=3"),
    )
    head = RequestHead(
        method="GET", authority="gateway.test", path="/", headers=Headers(fields), http_version="2"
    )
    assert clean_request(head).headers.all("cookie") == ["a=1; b=2; c=3"]
