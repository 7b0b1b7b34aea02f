"""The own pages: signing in and everything that must not sign anybody in."""

from __future__ import annotations

import re

import pytest
from argon2 import PasswordHasher

from audit.errors import LogUnavailableError
from gateway.core.commands import Fetched
from gateway.identity.credentials import SESSION_COOKIE
from gateway.identity.forms import safe_next
from gateway.identity.model import Identified
from gateway.settings import SessionSettings
from tests.gateway.identity.workbench import (
    OWN,
    PASSWORD,
    Bench,
    Browser,
    bench,
    head,
    hidden,
    route,
)


async def _who(one: Bench, browser: Browser) -> object:
    request = head("GET", "/", ("cookie", f"{SESSION_COOKIE}={browser.cookies[SESSION_COOKIE]}"))
    return await one.identity.identifier.identify(request, route())


def _location(answer: Fetched) -> str | None:
    return answer.head.headers.get("location")


async def test_password_and_code_sign_in_and_lead_back(one: Bench, browser: Browser) -> None:
    account = one.clinician()
    done = await browser.sign_in(account, "/Patient/3?_format=json")
    assert (done.head.status, _location(done)) == (303, "/Patient/3?_format=json")
    found = await _who(one, browser)
    assert isinstance(found, Identified)
    assert (found.person, found.role, found.purpose) == ("Practitioner/7", "clinician", "TREAT")
    steps = [(entry.stage, entry.action, entry.outcome) for entry in one.entries()]
    assert steps == [
        ("intent", "login", None), ("outcome", "login", "success"),
        ("intent", "login", None), ("outcome", "login", "success"),
    ]  # fmt: skip


async def test_the_session_cookie_is_for_this_host_only(one: Bench, browser: Browser) -> None:
    done = await browser.sign_in(one.clinician())
    (line,) = [one for one in done.head.headers.all("set-cookie") if SESSION_COOKIE + "=" in one]
    assert line.endswith("; Path=/; Secure; HttpOnly; SameSite=Lax")
    assert "Domain" not in line


async def test_the_first_sign_in_sets_up_the_second_factor(one: Bench, browser: Browser) -> None:
    account = one.account()
    page = await browser.get("sign-in")
    second = await browser.submit(page, "sign-in", login="ADA", password=PASSWORD)
    seed = str(one.store.held[f"totp/{account.id}"]["seed"])
    shown = "".join(re.findall(r"<span>(.*?)</span>", second.body.decode()))
    assert shown == seed
    wrong = await browser.submit(second, "sign-in/enrol", code="000000")
    assert wrong.head.status == 401
    assert SESSION_COOKIE not in browser.cookies
    done = await browser.submit(wrong, "sign-in/enrol", code=one.code(account))
    assert done.head.status == 303
    assert isinstance(await _who(one, browser), Identified)


async def test_a_seed_in_use_is_never_shown_again(one: Bench, browser: Browser) -> None:
    account = one.clinician()
    page = await browser.get("sign-in")
    second = await browser.submit(page, "sign-in", login="ada", password=PASSWORD)
    assert str(one.store.held[f"totp/{account.id}"]["seed"])[:4] not in second.body.decode()
    fields = hidden(second, "sign-in/code")
    refused = await browser.post("sign-in/enrol", fields | {"code": one.code(account)})
    assert refused.head.status == 400
    assert SESSION_COOKIE not in browser.cookies


async def test_a_name_without_account_is_answered_as_a_wrong_password(
    one: Bench, browser: Browser
) -> None:
    one.clinician()
    bodies = []
    for login in ("ada", "bob"):
        page = await browser.get("sign-in")
        answer = await browser.submit(page, "sign-in", login=login, password="wrong " * 3)
        bodies.append(answer.body.decode().replace(login, "NAME"))
        assert answer.head.status == 401
    assert bodies[0] == bodies[1]
    assert [entry.outcome for entry in one.entries() if entry.outcome] == ["denied", "denied"]


async def test_an_unknown_name_costs_a_hash_as_a_known_one_does(
    one: Bench, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    hasher = type(one.identity.passwords._hasher)
    verify = hasher.verify

    def counted(self: PasswordHasher, kept: str, shown: str) -> bool:
        looked.append(kept)
        return verify(self, kept, shown)

    monkeypatch.setattr(hasher, "verify", counted)
    page = await browser.get("sign-in")
    await browser.submit(page, "sign-in", login="nobody", password=PASSWORD)
    assert len(looked) == 1


async def test_a_password_alone_signs_nobody_in(one: Bench, browser: Browser) -> None:
    one.clinician()
    page = await browser.get("sign-in")
    second = await browser.submit(page, "sign-in", login="ada", password=PASSWORD)
    assert second.head.status == 200
    assert SESSION_COOKIE not in browser.cookies
    with one.identity.directory.database.reading() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM sessions").scalar() == 0


async def test_a_ticket_is_good_in_its_own_visit_only(one: Bench, browser: Browser) -> None:
    account = one.clinician()
    page = await browser.get("sign-in")
    second = await browser.submit(page, "sign-in", login="ada", password=PASSWORD)
    ticket = hidden(second, "sign-in/code")["ticket"]
    other = Browser(one)
    theirs = hidden(await other.get("sign-in"), "sign-in")
    fields = theirs | {"ticket": ticket, "code": one.code(account)}
    assert (await other.post("sign-in/code", fields)).head.status == 400
    assert SESSION_COOKIE not in other.cookies


async def test_a_ticket_ends_with_time_and_with_the_password(one: Bench, browser: Browser) -> None:
    account = one.clinician()
    for spoil in ("time", "password", "lock"):
        page = await browser.get("sign-in")
        second = await browser.submit(page, "sign-in", login="ada", password=PASSWORD)
        if spoil == "time":
            one.clock.now += 1_000
        elif spoil == "password":
            new = one.identity.passwords.hash_now(PASSWORD)
            one.identity.directory.accounts.rehash(account.id, old=account.password_hash, new=new)
        else:
            one.identity.directory.accounts.lock(account.id)
        done = await browser.submit(second, "sign-in/code", code=one.code(account))
        assert done.head.status == 400, spoil
        assert SESSION_COOKIE not in browser.cookies


@pytest.mark.parametrize("appends", range(4))
async def test_nobody_is_signed_in_when_the_log_cannot_be_written(
    one: Bench, browser: Browser, appends: int
) -> None:
    account = one.clinician()
    one.log.fail, one.log.fail_at = LogUnavailableError("away"), appends
    page = await browser.get("sign-in")
    second = await browser.submit(page, "sign-in", login="ada", password=PASSWORD)
    if second.head.status == 200:
        done = await browser.submit(second, "sign-in/code", code=one.code(account))
        assert done.head.status == 503
    else:
        assert second.head.status == 503
    assert SESSION_COOKIE not in browser.cookies
    assert one.identity.directory.sessions.of(account.id) == []


async def test_nobody_is_signed_in_when_names_cannot_be_sealed(
    one: Bench, browser: Browser
) -> None:
    one.clinician()
    one.store.away = True
    page = await browser.get("sign-in")
    second = await browser.submit(page, "sign-in", login="ada", password=PASSWORD)
    assert second.head.status == 200
    done = await browser.submit(second, "sign-in/code", code="123456")
    assert done.head.status == 503


async def test_too_many_attempts_wait_even_with_the_right_password(
    one: Bench, browser: Browser
) -> None:
    account = one.clinician()
    for _ in range(5):
        page = await browser.get("sign-in")
        await browser.submit(page, "sign-in", login="ada", password="wrong wrong wrong")
    page = await browser.get("sign-in")
    answer = await browser.submit(page, "sign-in", login="ada", password=PASSWORD)
    assert answer.head.status == 429
    one.clock.now += 901
    assert (await browser.sign_in(account)).head.status == 303


async def test_codes_are_guessed_no_more_often_than_passwords(one: Bench, browser: Browser) -> None:
    account = one.clinician()
    for _ in range(5):
        page = await browser.get("sign-in")
        second = await browser.submit(page, "sign-in", login="ada", password=PASSWORD)
        await browser.submit(second, "sign-in/code", code="000000")
    page = await browser.get("sign-in")
    second = await browser.submit(page, "sign-in", login="ada", password=PASSWORD)
    done = await browser.submit(second, "sign-in/code", code=one.code(account))
    assert done.head.status != 303
    assert SESSION_COOKIE not in browser.cookies


@pytest.mark.parametrize("site", ["cross-site", "same-site", None])
async def test_forms_from_elsewhere_are_refused(
    one: Bench, browser: Browser, site: str | None
) -> None:
    await browser.sign_in(one.clinician())
    page = await browser.get("account")
    browser.site = site
    assert (await browser.submit(page, "sign-out")).head.status == 403
    browser.site = "same-origin"
    assert isinstance(await _who(one, browser), Identified)


async def test_a_form_without_our_code_is_refused(one: Bench, browser: Browser) -> None:
    account = one.clinician()
    await browser.sign_in(account)
    other = Browser(one)
    one.clock.now += 60
    await other.sign_in(account)
    foreign = hidden(await other.get("account"), "sign-out")
    for fields in ({}, {"csrf": ""}, {"csrf": "x" * 43}, foreign):
        assert (await browser.post("sign-out", fields)).head.status == 403
    assert isinstance(await _who(one, browser), Identified)


async def test_signing_out_ends_the_session_at_once(one: Bench, browser: Browser) -> None:
    await browser.sign_in(one.clinician())
    stolen = dict(browser.cookies)
    page = await browser.get("account")
    assert (await browser.submit(page, "sign-out")).head.status == 303
    browser.cookies = stolen
    assert not isinstance(await _who(one, browser), Identified)
    assert [entry.action for entry in one.entries()][-2:] == ["logout", "logout"]


async def test_the_session_is_new_after_sign_in_and_step_up(one: Bench, browser: Browser) -> None:
    account = one.clinician()
    await browser.sign_in(account)
    first = browser.cookies[SESSION_COOKIE]
    one.clock.now += 1_000
    page = await browser.get("step-up", "next=%2FPatient%2F3")
    wrong = await browser.submit(page, "step-up", code="000000")
    assert (wrong.head.status, browser.cookies[SESSION_COOKIE]) == (401, first)
    done = await browser.submit(wrong, "step-up", code=one.code(account))
    assert _location(done) == "/Patient/3"
    second = browser.cookies[SESSION_COOKIE]
    found = await _who(one, browser)
    assert isinstance(found, Identified)
    assert found.principal.assurance.second_factor_at == one.clock.now
    browser.cookies[SESSION_COOKIE] = first
    assert second != first
    assert not isinstance(await _who(one, browser), Identified)


async def test_a_code_counts_once(one: Bench, browser: Browser) -> None:
    account = one.clinician()
    code = one.code(account)
    for status in (303, 401):
        page = await browser.get("sign-in")
        second = await browser.submit(page, "sign-in", login="ada", password=PASSWORD)
        assert (await browser.submit(second, "sign-in/code", code=code)).head.status == status


async def test_break_glass_opens_one_record_for_a_time(one: Bench, browser: Browser) -> None:
    await browser.sign_in(one.clinician())
    page = await browser.get("break-glass")
    asked = {"patient": "3", "reason": "found unconscious", "minutes": "60"}
    done = await browser.submit(page, "break-glass", **asked)
    assert done.head.status == 303
    found = await _who(one, browser)
    assert isinstance(found, Identified)
    assert found.break_glass is not None
    assert found.break_glass.patients == {"3"}
    assert found.break_glass.ends_at == one.clock.now + 3_600
    entry = one.entries()[-1]
    assert (entry.action, entry.break_glass, entry.purpose) == ("admin", "granted", "BTG")
    assert len(entry.patients) == 1
    (grant,) = one.identity.directory.grants.since(0)
    assert entry.details["grant"] == grant.id
    assert b"unconscious" not in b"".join(one.log.held)
    page = await browser.get("break-glass")
    assert b"found unconscious" in page.body
    await browser.submit(page, "break-glass/end")
    closed = await _who(one, browser)
    assert isinstance(closed, Identified)
    assert closed.break_glass is None


EMERGENCY = {"patient": "3", "reason": "found unconscious", "minutes": "60"}


@pytest.mark.parametrize("code", [None, "", "000000", "used"])
async def test_a_browser_that_was_left_open_opens_no_record_without_a_code(
    one: Bench, browser: Browser, code: str | None
) -> None:
    account = one.clinician()
    used = one.code(account)
    one.clock.now -= 30
    await browser.sign_in(account)
    one.clock.now += 90
    page = await browser.get("break-glass")
    assert b'name="code"' in page.body
    given = {} if code is None else {"code": used if code == "used" else code}
    done = await browser.submit(page, "break-glass", **EMERGENCY, **given)
    assert done.head.status == 400
    assert b"This code is not right" in done.body
    assert b"found unconscious" in done.body
    assert one.identity.directory.grants.of(account.id) == []
    assert one.entries()[-1].reason == "wrong_code"


async def test_the_code_on_the_form_opens_the_record_and_makes_the_session_fresh(
    one: Bench, browser: Browser
) -> None:
    account = one.clinician()
    await browser.sign_in(account)
    before = dict(browser.cookies)
    one.clock.now += 300
    page = await browser.get("break-glass")
    done = await browser.submit(page, "break-glass", **EMERGENCY, code=one.code(account))
    assert done.head.status == 303
    assert browser.cookies != before
    found = await _who(one, browser)
    assert isinstance(found, Identified)
    assert found.break_glass is not None
    assert found.principal.assurance.second_factor_at == one.clock.now
    # A form that is sent twice opens nothing twice, and is no wrong code.
    again = await browser.get("break-glass")
    assert b'name="code"' not in again.body
    assert (await browser.submit(again, "break-glass", **EMERGENCY)).head.status == 303
    assert len(one.identity.directory.grants.of(account.id)) == 1


async def test_a_code_is_not_used_up_by_a_form_that_is_wrong_elsewhere(
    one: Bench, browser: Browser
) -> None:
    account = one.clinician()
    await browser.sign_in(account)
    one.clock.now += 300
    code = one.code(account)
    page = await browser.get("break-glass")
    wrong = await browser.submit(page, "break-glass", **EMERGENCY | {"reason": "?"}, code=code)
    assert wrong.head.status == 400
    done = await browser.submit(wrong, "break-glass", **EMERGENCY, code=code)
    assert done.head.status == 303


async def test_who_has_just_signed_in_needs_no_second_code(one: Bench, browser: Browser) -> None:
    account = one.clinician()
    await browser.sign_in(account)
    one.clock.now += 59
    page = await browser.get("break-glass")
    assert b'name="code"' not in page.body
    assert (await browser.submit(page, "break-glass", **EMERGENCY)).head.status == 303


async def test_codes_are_not_guessed_on_the_form(one: Bench, browser: Browser) -> None:
    account = one.clinician()
    await browser.sign_in(account)
    one.clock.now += 300
    page = await browser.get("break-glass")
    for _ in range(12):
        page = await browser.submit(page, "break-glass", **EMERGENCY, code="000000")
    assert b"This code is not right" not in page.body
    right = await browser.submit(page, "break-glass", **EMERGENCY, code=one.code(account))
    assert right.head.status == 400
    assert one.identity.directory.grants.of(account.id) == []


@pytest.mark.parametrize(
    "change",
    [{"patient": ""}, {"patient": "3 4"}, {"reason": "  short  "}, {"minutes": "600"},
     {"minutes": "-30"}],
)  # fmt: skip
async def test_break_glass_needs_patient_reason_and_an_end(
    one: Bench, browser: Browser, change: dict[str, str]
) -> None:
    account = one.clinician()
    await browser.sign_in(account)
    page = await browser.get("break-glass")
    asked = {"patient": "3", "reason": "found unconscious", "minutes": "60"} | change
    assert (await browser.submit(page, "break-glass", **asked)).head.status == 400
    assert one.identity.directory.grants.of(account.id) == []


@pytest.mark.parametrize("appends", range(2))
async def test_no_record_opens_that_is_not_in_the_log(
    one: Bench, browser: Browser, appends: int
) -> None:
    account = one.clinician()
    await browser.sign_in(account)
    page = await browser.get("break-glass")
    one.log.fail, one.log.fail_at = LogUnavailableError("away"), appends
    asked = {"patient": "3", "reason": "found unconscious", "minutes": "60"}
    assert (await browser.submit(page, "break-glass", **asked)).head.status == 503
    assert one.identity.directory.grants.of(account.id) == []


async def test_a_patient_opens_no_record_by_emergency(one: Bench, browser: Browser) -> None:
    account = one.enrolled(one.account(patient="3"))
    await browser.sign_in(account)
    page = await browser.get("account")
    fields = {"csrf": hidden(page, "sign-out")["csrf"], "patient": "4"}
    more = {"reason": "just curious today", "minutes": "30"}
    assert (await browser.post("break-glass", fields | more)).head.status == 400
    assert one.identity.directory.grants.of(account.id) == []


async def test_a_new_password_ends_all_other_sessions(one: Bench, browser: Browser) -> None:
    account = one.clinician()
    other = Browser(one)
    await other.sign_in(account)
    await browser.sign_in(account)
    page = await browser.get("account")
    new = "four loud herons dance"
    wrong = await browser.submit(page, "account/password", current="not it at all", new=new)
    weak = await browser.submit(page, "account/password", current=PASSWORD, new="password1234")
    assert (wrong.head.status, weak.head.status) == (400, 400)
    assert isinstance(await _who(one, other), Identified)
    done = await browser.submit(page, "account/password", current=PASSWORD, new=new)
    assert done.head.status == 303
    assert isinstance(await _who(one, browser), Identified)
    assert not isinstance(await _who(one, other), Identified)
    changed = one.identity.directory.accounts.get(account.id)
    assert changed is not None
    assert await one.identity.passwords.matches(changed.password_hash, new)


@pytest.mark.parametrize(
    "path",
    ["//evil.example", "https://evil.example", "/\\evil.example", "\\/evil.example", "evil",
     "/\t/evil.example", " /x", "/x\r\nset-cookie: a=b", "javascript:alert(1)", "", "/é", "/a b",
     "/" + "a" * 3_000],
)  # fmt: skip
def test_next_never_leads_off_this_host(path: str) -> None:
    assert safe_next(path, "/home") == "/home"


async def test_pages_allow_no_script_and_are_not_kept(one: Bench, browser: Browser) -> None:
    await browser.sign_in(one.clinician())
    for name in ("sign-in", "step-up", "break-glass", "account", "nowhere"):
        page = await browser.get(name)
        fields = page.head.headers
        policy = fields.get("content-security-policy") or ""
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert fields.get("cache-control") == "no-store"
        assert b"<script" not in page.body
        assert b"style=" not in page.body
        assert int(fields.get("content-length") or 0) == len(page.body)


async def test_what_is_typed_is_never_markup(one: Bench, browser: Browser) -> None:
    page = await browser.get("sign-in")
    answer = await browser.submit(page, "sign-in", login='"><img src=x>', password="x")
    assert b"<img" not in answer.body


async def test_no_secret_is_in_the_log_or_the_database(one: Bench, browser: Browser) -> None:
    account = one.clinician()
    await browser.sign_in(account)
    token = browser.cookies[SESSION_COOKIE]
    seed = str(one.store.held[f"totp/{account.id}"]["seed"])
    path = one.identity.directory.database.engine.url.database
    assert path is not None
    raw = b"".join(one.log.held)
    for suffix in ("", "-wal"):
        with open(path + suffix, "rb") as file:  # noqa: ASYNC230, PTH123 - a small file of a test
            raw += file.read()
    for secret in (token, seed, PASSWORD):
        assert secret.encode() not in raw
    assert b"Practitioner/7" not in b"".join(one.log.held)


async def test_other_methods_and_pages_are_told_apart(browser: Browser) -> None:
    assert (await browser.get("nowhere")).head.status == 404
    refused = await browser._send("DELETE", "account")
    assert (refused.head.status, refused.head.headers.get("allow")) == (405, "GET")
    assert (await browser.get("account")).head.status == 303
    assert _location(await browser.get("account")) == f"{OWN}sign-in?next=%2F.havengate%2Faccount"


async def test_a_form_too_large_or_of_another_type_is_refused(one: Bench) -> None:
    same = ("sec-fetch-site", "same-origin")
    form = ("content-type", "application/x-www-form-urlencoded")
    pages = one.identity.pages
    large = await pages.answer(head("POST", OWN + "sign-in", same, form), b"a=" + b"x" * 20_000)
    other = await pages.answer(
        head("POST", OWN + "sign-in", same, ("content-type", "text/plain")), b"a=b"
    )
    twice = await pages.answer(head("POST", OWN + "sign-in", same, form), b"login=a&login=b")
    statuses = (large.head.status, other.head.status, twice.head.status)
    assert statuses == (413, 415, 400)


async def test_addresses_are_limited_across_accounts(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    made = bench(
        tmp_path_factory.mktemp("limits"), sessions=SessionSettings(attempts_per_address=3)
    )
    statuses = []
    browser = Browser(made)
    for number in range(4):
        page = await browser.get("sign-in")
        answer = await browser.submit(page, "sign-in", login=f"n{number}", password="x")
        statuses.append(answer.head.status)
    assert statuses == [401, 401, 401, 429]
    made.identity.close()
