"""What outsiders, staff, apps behind and mistakes try on identity, and must not reach."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from audit.errors import LogUnavailableError
from gateway.core.messages import Headers
from gateway.identity.claims import identified_by
from gateway.identity.credentials import SESSION_COOKIE, strip
from gateway.identity.forms import VISIT_COOKIE
from gateway.identity.grants import ROLES_THAT_MAY
from gateway.identity.model import Identified, NotIdentified
from gateway.identity.revocations import Revocable
from gateway.settings import IdentityProviderSettings
from policies.model import ROLES
from tests.gateway.identity.workbench import (
    OWN,
    PASSWORD,
    Bench,
    Browser,
    head,
    hidden,
    route,
)

PROVIDER = IdentityProviderSettings(issuer="https://idp.example", audience="https://ehr.example/r4")
WRONG = "wrong wrong wrong"


async def _guess(browser: Browser, login: str, password: str = WRONG) -> int:
    page = await browser.get("sign-in")
    return (await browser.submit(page, "sign-in", login=login, password=password)).head.status


async def _state(one: Bench, browser: Browser) -> Identified | NotIdentified:
    request = head("GET", "/", ("cookie", f"{SESSION_COOKIE}={browser.cookies[SESSION_COOKIE]}"))
    return await one.identity.identifier.identify(request, route())


def _who(**changes: object) -> Identified | None:
    claims = {"sub": "u-1", "azp": "portal"} | changes
    return identified_by(claims, PROVIDER, roles=frozenset(ROLES))


# --- Guessing, and keeping others out by guessing -------------------------------------------------


async def test_a_padded_name_gives_no_more_guesses(one: Bench, browser: Browser) -> None:
    one.clinician()
    for _ in range(5):
        assert await _guess(browser, "ada") == 401
    for spaces in (1, 253, 254, 255, 256, 300):
        assert await _guess(browser, " " * spaces + "ada") == 429, spaces


async def test_guesses_from_elsewhere_keep_nobody_out_of_a_known_browser(
    one: Bench, browser: Browser
) -> None:
    account = one.clinician()
    await browser.sign_in(account)
    browser.cookies.pop(SESSION_COOKIE)
    for number in range(60):
        await _guess(Browser(one, client=f"198.51.100.{number}"), "ada")
    assert await _guess(Browser(one, client="203.0.113.9"), "ada", PASSWORD) == 429
    assert (await browser.sign_in(account)).head.status == 303


async def test_guesses_behind_one_address_keep_nobody_out_of_a_known_browser(
    one: Bench, browser: Browser
) -> None:
    account = one.clinician()
    await browser.sign_in(account)
    browser.cookies.pop(SESSION_COOKIE)
    for number in range(60):
        one.identity.directory.attempts.book("password", f"n{number}", address=browser.client)
    assert await _guess(Browser(one), "somebody") == 429
    assert (await browser.sign_in(account)).head.status == 303


async def test_guesses_from_one_place_keep_nobody_out_elsewhere(one: Bench) -> None:
    account = one.clinician()
    for _ in range(20):
        await _guess(Browser(one, client="198.51.100.1"), "ada")
    assert (await Browser(one, client="203.0.113.9").sign_in(account)).head.status == 303


async def test_wrong_codes_from_elsewhere_keep_nobody_out_of_a_known_browser(
    one: Bench, browser: Browser
) -> None:
    account = one.clinician()
    await browser.sign_in(account)
    other = Browser(one, client="198.51.100.1")
    page = await other.get("sign-in")
    second = await other.submit(page, "sign-in", login="ada", password=PASSWORD)
    for _ in range(8):
        await other.submit(second, "sign-in/code", code="000000")
    page = await browser.get("step-up")
    done = await browser.submit(page, "step-up", code=one.code(account))
    assert done.head.status == 303


async def test_a_known_browser_has_no_more_guesses_than_others(
    one: Bench, browser: Browser
) -> None:
    account = one.clinician()
    await browser.sign_in(account)
    browser.cookies.pop(SESSION_COOKIE)
    statuses = [await _guess(browser, "ada") for _ in range(20)]
    assert statuses.count(401) == 10
    assert await _guess(browser, "ada", PASSWORD) == 429


async def test_a_browser_is_known_for_those_who_signed_in_with_it_alone(
    one: Bench, browser: Browser
) -> None:
    one.clinician("ada")
    eve = one.enrolled(one.account("eve", roles=frozenset({"front-desk"})))
    await browser.sign_in(eve)
    statuses = [await _guess(browser, "ada") for _ in range(8)]
    assert statuses.count(401) == 5


async def test_a_browser_known_to_an_attacker_beforehand_is_not_believed(
    one: Bench, browser: Browser
) -> None:
    account = one.clinician()
    planted = "A" * 43
    browser.cookies["__Host-havengate-device"] = planted
    await browser.sign_in(account)
    assert browser.cookies["__Host-havengate-device"] != planted
    thief = Browser(one, cookies={"__Host-havengate-device": planted})
    statuses = [await _guess(thief, "ada") for _ in range(8)]
    assert statuses.count(401) == 5


async def test_a_reset_forgets_known_browsers(one: Bench, browser: Browser) -> None:
    account = one.clinician()
    await browser.sign_in(account)
    one.identity.directory.accounts.reset(account.id, account.password_hash)
    one.enrolled(replace(account, must_set_second_factor=True))
    statuses = [await _guess(browser, "ada") for _ in range(8)]
    assert statuses.count(401) == 5


async def test_a_network_of_many_addresses_counts_as_one(one: Bench) -> None:
    one.clinician()
    statuses = [
        await _guess(Browser(one, client=f"2001:db8:1:2::{number}"), "ada") for number in range(8)
    ]
    assert statuses.count(401) == 5


# --- Second factors -------------------------------------------------------------------------------


async def test_a_seed_shown_to_one_visit_is_never_confirmed_by_another(
    one: Bench, browser: Browser
) -> None:
    account = one.account()
    thief = Browser(one)
    page = await thief.get("sign-in")
    await thief.submit(page, "sign-in", login="ada", password=PASSWORD)
    seen = str(one.store.held[f"totp/{account.id}"]["seed"])
    page = await browser.get("sign-in")
    second = await browser.submit(page, "sign-in", login="ada", password=PASSWORD)
    done = await browser.submit(second, "sign-in/enrol", code=one.code(account))
    assert done.head.status == 303
    assert one.store.held[f"totp/{account.id}"]["seed"] != seen


async def test_a_mistyped_first_code_does_not_change_the_seed(one: Bench, browser: Browser) -> None:
    account = one.account()
    page = await browser.get("sign-in")
    second = await browser.submit(page, "sign-in", login="ada", password=PASSWORD)
    seed = one.store.held[f"totp/{account.id}"]["seed"]
    wrong = await browser.submit(second, "sign-in/enrol", code="000000")
    assert one.store.held[f"totp/{account.id}"]["seed"] == seed
    done = await browser.submit(wrong, "sign-in/enrol", code=one.code(account))
    assert done.head.status == 303


# --- Tokens ---------------------------------------------------------------------------------------


def test_whoever_opened_an_app_beside_a_record_is_not_that_patient() -> None:
    for changes in (
        {"scope": "openid launch patient/*.rs"},
        {"scope": "launch/patient patient/*.rs"},
        {"scope": "user/*.rs"},
        {"roles": ["chief-physician"]},
        {"roles": {"odd": 1}},
    ):
        found = _who(patient="3", **changes)
        assert found is None or found.principal.patient is None, changes
        assert found is None or found.person != "Patient/3"


def test_a_user_of_another_server_is_nobody_here() -> None:
    for base in ("https://other.example/r4", "http://ehr.example/r4", "https://ehr.example/r4/x"):
        for name in ("Patient/3", "Practitioner/7"):
            assert _who(fhirUser=f"{base}/{name}") is None
    for named in ("Patient/3", "https://ehr.example/r4/Patient/3"):
        found = _who(fhirUser=named)
        assert found is not None
        assert found.principal.patient == "3"


@pytest.mark.parametrize("stated", ["TREAT", "BTG"])
def test_a_header_asks_for_no_purpose_that_the_token_does_not_state(
    one: Bench, stated: str
) -> None:
    found = _who(roles=["clinician"], purpose_of_use=["HPAYMT", "HOPERAT"])
    assert found is not None
    identifier = replace(one.identity.identifier, purposes={"clinician": "TREAT"})
    ask = head("GET", "/", ("havengate-purpose", stated))
    with pytest.raises(Exception, match="purpose"):
        identifier._purpose(ask, found)
    assert identifier._purpose(head("GET", "/"), found) == "HPAYMT"
    other = head("GET", "/", ("havengate-purpose", "HOPERAT"))
    assert identifier._purpose(other, found) == "HOPERAT"


def test_a_revoked_token_stays_revoked_for_as_long_as_it_would_be_taken(one: Bench) -> None:
    revocations = one.identity.directory.revocations
    a = Revocable(token="a", subject=None, issued_at=0.0)
    revocations.revoke("a", until=one.clock.now + 10)
    one.clock.now += 11
    revocations.revoke("b", until=one.clock.now + 10)
    assert revocations.read(a)
    one.clock.now += 10_000
    revocations.revoke("c", until=one.clock.now + 10)
    assert not revocations.read(a)


def test_two_programs_never_have_one_name_for_an_app(one: Bench) -> None:
    by_token = _who(sub="portal", client_id="portal", azp=None, roles=["app"])
    assert by_token is not None
    by_key = replace(by_token, means="service", principal=replace(by_token.principal, id="portal"))
    claims = one.identity.assertions._claims
    assert claims(route(), by_token, 0)["sub"] != claims(route(), by_key, 0)["sub"]


# --- The own pages, and scripts of an app on the same host ----------------------------------------


@pytest.mark.parametrize(
    "script",
    [("sec-fetch-mode", "cors"), ("sec-fetch-mode", "same-origin"), ("sec-fetch-mode", "no-cors"),
     ("sec-fetch-dest", "iframe"), ("sec-fetch-dest", "empty"), ("sec-fetch-dest", "object")],
)  # fmt: skip
async def test_a_script_of_an_app_reads_and_sends_none_of_our_forms(
    one: Bench, browser: Browser, script: tuple[str, str]
) -> None:
    account = one.clinician()
    await browser.sign_in(account)
    code = hidden(await browser.get("account"), "sign-out")["csrf"]
    cookie = ("cookie", f"{SESSION_COOKIE}={browser.cookies[SESSION_COOKIE]}")
    same = ("sec-fetch-site", "same-origin")
    pages = one.identity.pages
    for name in ("break-glass", "account", "step-up", "sign-in"):
        shown = await pages.answer(head("GET", OWN + name, cookie, same, script), b"")
        assert shown.head.status == 403, name
        assert b"csrf" not in shown.body
    form = ("content-type", "application/x-www-form-urlencoded")
    body = f"csrf={code}&patient=3&reason=just+curious+today&minutes=60".encode()
    sent = await pages.answer(head("POST", f"{OWN}break-glass", cookie, same, script, form), body)
    assert sent.head.status == 403
    assert one.identity.directory.grants.of(account.id) == []


async def test_pages_answer_a_browser_that_goes_there(one: Bench, browser: Browser) -> None:
    await browser.sign_in(one.clinician())
    fields = (
        ("cookie", f"{SESSION_COOKIE}={browser.cookies[SESSION_COOKIE]}"),
        ("sec-fetch-site", "none"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document"),
    )  # fmt: skip
    shown = await one.identity.pages.answer(head("GET", f"{OWN}account", *fields), b"")
    assert shown.head.status == 200
    keys = head("GET", f"{OWN}jwks.json", ("sec-fetch-mode", "cors"))
    assert (await one.identity.pages.answer(keys, b"")).head.status == 200


@pytest.mark.parametrize("role", ["front-desk", "billing", "administrator", "moderator"])
async def test_only_those_who_treat_open_a_record_by_emergency(
    one: Bench, browser: Browser, role: str
) -> None:
    account = one.enrolled(one.account(roles=frozenset({role})))
    await browser.sign_in(account)
    assert b"emergency is for people who treat" in (await browser.get("break-glass")).body
    fields = {"csrf": hidden(await browser.get("account"), "sign-out")["csrf"], "patient": "4"}
    more = {"reason": "just curious today", "minutes": "30"}
    assert (await browser.post("break-glass", fields | more)).head.status == 400
    assert one.identity.directory.grants.of(account.id) == []


async def test_asking_twice_for_one_record_leaves_room_for_others(
    one: Bench, browser: Browser
) -> None:
    await browser.sign_in(one.clinician())
    page = await browser.get("break-glass")
    asked = {"reason": "found unconscious", "minutes": "60"}
    for _ in range(7):
        done = await browser.submit(page, "break-glass", patient="3", **asked)
        assert done.head.status == 303
    assert (await browser.submit(page, "break-glass", patient="4", **asked)).head.status == 303
    found = await _state(one, browser)
    assert isinstance(found, Identified)
    assert found.break_glass is not None
    assert found.break_glass.patients == {"3", "4"}


@pytest.mark.parametrize("appends", range(2))
async def test_signing_out_works_when_the_log_does_not(
    one: Bench, browser: Browser, appends: int
) -> None:
    await browser.sign_in(one.clinician())
    page = await browser.get("account")
    kept = Browser(one, cookies=dict(browser.cookies))
    one.log.fail, one.log.fail_at = LogUnavailableError("away"), appends
    done = await browser.submit(page, "sign-out")
    assert SESSION_COOKIE not in browser.cookies
    assert done.head.status == 303
    assert isinstance(await _state(one, kept), NotIdentified)


async def test_signing_in_over_a_planted_visit_or_session_gives_new_ones(
    one: Bench, browser: Browser
) -> None:
    planted = one.session(one.enrolled(one.account("eve")))
    browser.cookies |= {SESSION_COOKIE: planted, VISIT_COOKIE: "V" * 22}
    await browser.sign_in(one.clinician())
    found = await _state(one, browser)
    assert isinstance(found, Identified)
    assert found.person == "Practitioner/7"
    assert browser.cookies[SESSION_COOKIE] != planted
    request = head("GET", "/", ("cookie", f"{SESSION_COOKIE}={planted}"))
    assert isinstance(await one.identity.identifier.identify(request, route()), NotIdentified)


def test_nothing_of_ours_reaches_the_app() -> None:
    ours = "__Host-havengate=a; __Host-havengate-visit=b; __Host-havengate-device=c; theme=dark"
    assert strip(Headers((("cookie", ours),))).all("cookie") == ["theme=dark"]


def test_those_who_may_open_a_record_are_those_of_the_rules() -> None:
    pack = Path("policies/packs/70-break-glass.cedar").read_text(encoding="utf-8")
    rule = pack[pack.index('@id("break-glass.open")') : pack.index('@id("break-glass.needed")')]
    assert set(re.findall(r'Role::"([a-z-]+)"', rule)) == ROLES_THAT_MAY


async def test_the_reason_of_an_emergency_is_not_in_clear_in_the_database(
    one: Bench, browser: Browser
) -> None:
    await browser.sign_in(one.clinician())
    page = await browser.get("break-glass")
    asked = {"patient": "3", "reason": "overdose of somebody", "minutes": "60"}
    await browser.submit(page, "break-glass", **asked)
    path = one.identity.directory.database.engine.url.database
    assert path is not None
    raw = b""
    for suffix in ("", "-wal"):
        with open(path + suffix, "rb") as file:  # noqa: ASYNC230, PTH123 - a small file of a test
            raw += file.read()
    assert b"overdose" not in raw
    assert b"overdose of somebody" in (await browser.get("break-glass")).body


async def test_a_reason_moved_to_another_grant_is_none(one: Bench) -> None:
    account = one.clinician()
    grants = one.identity.directory.grants
    for patient in ("3", "4"):
        grants.open(account.id, patient=patient, reason=f"fell in room {patient}", duration_s=60)
    with one.identity.directory.database.writing() as connection:
        (sealed,) = connection.exec_driver_sql(
            "SELECT reason FROM grants WHERE patient = '3'"
        ).one()
        connection.exec_driver_sql("UPDATE grants SET reason = ?", (sealed,))
    assert {one.patient: one.reason for one in grants.of(account.id)} == {
        "3": "fell in room 3", "4": "",
    }  # fmt: skip
