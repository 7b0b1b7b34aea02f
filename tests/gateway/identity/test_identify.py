"""One credential, one answer; what is the gateway's own does not reach the app."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.messages import Headers
from gateway.errors import BadRequestError
from gateway.identity.credentials import SESSION_COOKIE, is_same_origin, strip
from gateway.identity.model import Identified, NotIdentified
from gateway.identity.purposes import default_purpose
from policies.model import Principal, Purpose
from tests.gateway.identity.workbench import Bench, head, route

BEARER = ("authorization", "Bearer hgs_lab_x")


async def _ask(
    one: Bench, *fields: tuple[str, str], method: str = "GET"
) -> Identified | NotIdentified:
    return await one.identity.identifier.identify(head(method, "/", *fields), route())


async def test_nothing_shown_is_nobody(one: Bench) -> None:
    found = await _ask(one, ("cookie", "theme=dark"))
    assert found == NotIdentified(reason="no_credentials")


async def test_two_credentials_are_none(one: Bench) -> None:
    cookie = f"{SESSION_COOKIE}={one.session(one.clinician())}"
    for fields in (
        (("cookie", cookie), BEARER),
        (BEARER, BEARER),
        (("cookie", f"{cookie}; {cookie}"),),
        (("cookie", cookie), ("cookie", f"a=b; {SESSION_COOKIE}=")),
        (("cookie", cookie), ("authorization", "Basic YTpi")),
        (("cookie", cookie), ("authorization", "")),
    ):
        found = await _ask(one, *fields)
        assert isinstance(found, NotIdentified)
        assert (found.reason, found.credentials_given) == ("ambiguous", True)


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic YTpi", "Bearer a b", "Bearer a,b", "Bearer hgs_",
               "Bearer \N{LATIN SMALL LETTER E WITH ACUTE}", "Bearer x.y.z"],
)  # fmt: skip
async def test_what_is_shown_and_wrong_is_refused(one: Bench, header: str) -> None:
    found = await _ask(one, ("authorization", header))
    assert isinstance(found, NotIdentified)
    assert (found.reason, found.credentials_given) == ("bad_token", True)


@pytest.mark.parametrize("token", ["", "x", "x" * 5_000, "\N{PILE OF POO}", "\udcff"])
async def test_an_invented_session_is_refused(one: Bench, token: str) -> None:
    found = await _ask(one, ("cookie", f"{SESSION_COOKIE}={token}"))
    assert isinstance(found, NotIdentified)
    assert found.credentials_given


@pytest.mark.parametrize(
    ("fields", "let_in"),
    [
        ((("sec-fetch-site", "same-origin"),), True),
        ((("sec-fetch-site", "none"),), True),
        ((("sec-fetch-site", "cross-site"), ("origin", "https://clinic.example")), False),
        ((("sec-fetch-site", "same-site"),), False),
        ((("sec-fetch-site", "same-origin"), ("sec-fetch-site", "cross-site")), False),
        ((("origin", "https://clinic.example"),), True),
        ((("origin", "https://clinic.example:443"),), True),
        ((("origin", "https://CLINIC.example"),), True),
        ((("origin", "http://clinic.example"),), False),
        ((("origin", "https://clinic.example:8443"),), False),
        ((("origin", "https://evil.clinic.example"),), False),
        ((("origin", "https://clinic.example.evil.example"),), False),
        ((("origin", "https://clinic.example/x"),), False),
        ((("origin", "https://x@clinic.example"),), False),
        ((("origin", "null"),), False),
        ((("origin", ""),), False),
        ((("origin", "https://clinic.example"), ("origin", "https://clinic.example")), False),
        ((("referer", "https://clinic.example/"),), False),
        ((), False),
    ],
)
async def test_a_cookie_changes_nothing_from_another_site(
    one: Bench, fields: tuple[tuple[str, str], ...], *, let_in: bool
) -> None:
    cookie = ("cookie", f"{SESSION_COOKIE}={one.session(one.clinician())}")
    for method in ("POST", "PUT", "PATCH", "DELETE", "PROPFIND", "get"):
        found = await _ask(one, cookie, *fields, method=method)
        assert isinstance(found, Identified) is let_in, method
        if isinstance(found, NotIdentified):
            assert found.reason == "cross_site"
    assert isinstance(await _ask(one, cookie, *fields), Identified)


def test_the_port_of_the_request_counts() -> None:
    request = head("POST", "/", ("origin", "https://h:8443"), authority="h:8443")
    assert is_same_origin(request)
    assert not is_same_origin(head("POST", "/", ("origin", "https://h"), authority="h:8443"))


async def test_the_purpose_is_the_stated_one_or_that_of_the_role(one: Bench) -> None:
    cookie = ("cookie", f"{SESSION_COOKIE}={one.session(one.clinician())}")
    found = await _ask(one, cookie)
    assert isinstance(found, Identified)
    assert found.purpose == "TREAT"
    stated = await _ask(one, cookie, ("havengate-purpose", "HOPERAT"))
    assert isinstance(stated, Identified)
    assert stated.purpose == "HOPERAT"
    for wrong in ("treat", "", "TREAT, BTG", "X"):
        with pytest.raises(BadRequestError) as caught:
            await _ask(one, cookie, ("havengate-purpose", wrong))
        assert not wrong or f"{wrong} " not in str(caught.value).replace("as TREAT,", "")
    with pytest.raises(BadRequestError):
        await _ask(one, cookie, ("havengate-purpose", "TREAT"), ("havengate-purpose", "TREAT"))


@pytest.mark.parametrize(
    ("roles", "purpose"),
    [({"clinician"}, "TREAT"), ({"nurse"}, "TREAT"), ({"billing"}, "HPAYMT"),
     ({"researcher"}, "HRESCH"), ({"quality"}, "HOPERAT"), ({"care-coordinator"}, "CAREMGT"),
     ({"front-desk"}, "HOPERAT"), ({"records-officer"}, "PATRQT"),
     ({"administrator"}, "HSYSADMIN"), ({"security-officer"}, "HOPERAT"), (set(), "PATRQT")],
)  # fmt: skip
def test_each_role_has_its_usual_purpose(roles: set[str], purpose: Purpose) -> None:
    principal = Principal(kind="user", id="x", roles=frozenset(roles))
    assert default_purpose(principal, {}) == purpose
    for role in roles:
        assert default_purpose(principal, {role: "HLEGAL"}) == "HLEGAL"


def test_the_app_gets_other_cookies_and_nothing_of_ours() -> None:
    stripped = strip(
        Headers(
            (
                ("cookie", f"a=1; {SESSION_COOKIE}=secret; b=2"),
                ("authorization", "Bearer secret"),
                ("cookie", f"__host-havengate-visit=secret;{SESSION_COOKIE}=secret"),
                ("havengate-purpose", "TREAT"),
                ("accept", "*/*"),
            )
        )
    )
    assert stripped.fields == (("cookie", "a=1; b=2"), ("accept", "*/*"))


_NAMES = st.sampled_from(["a", SESSION_COOKIE, SESSION_COOKIE.upper(), f" {SESSION_COOKIE} ", ""])


@given(
    st.lists(
        st.lists(st.tuples(_NAMES, st.sampled_from(["secret", ""])), max_size=4).map(
            lambda pairs: ";".join(f"{name}={value}" for name, value in pairs)
        ),
        max_size=3,
    )
)
def test_no_spelling_of_our_cookie_passes(lines: list[str]) -> None:
    stripped = strip(Headers(tuple(("cookie", line) for line in lines)))
    assert "havengate" not in str(stripped).lower()


async def test_nothing_secret_is_shown_by_repr(one: Bench) -> None:
    token = one.session(one.clinician())
    found = await _ask(one, ("cookie", f"{SESSION_COOKIE}={token}"))
    assert isinstance(found, Identified)
    assert token not in repr(found)
    assert "Practitioner/7" not in repr(found)
