"""What a person does with Kolibri, in a browser that does not know whether a gateway is between."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM = "/usr/bin/chromium"
#: The only account of the server that the fixture starts.
ACCOUNT = ("therapist", "dune-otter-42")
#: What `drive` sees.
EXPECTED = (
    "signed in",
    "created a class",
    "the class is there after a reload",
    "a wrong password is refused",
)


def drive(
    base_url: str,
    headers: Mapping[str, str] = {},
    *,
    cookies: Sequence[Any] = (),
    picture: str | None = None,
) -> list[str]:
    """Sign in, write a class, read it again, sign out; return what was seen.

    `cookies` (as Playwright takes them) are there before the first page. Certificates are not
    checked: whoever calls has done so. `picture` names a file for a picture of the last page.
    """
    seen: list[str] = []
    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(
            extra_http_headers=dict(headers), ignore_https_errors=True, locale="en-GB"
        )
        context.set_default_timeout(30_000)
        context.add_cookies(list(cookies))
        page = context.new_page()
        _sign_in(page, base_url, ACCOUNT[1])
        page.wait_for_url("**/device/**")
        seen.append("signed in")
        _use(page, base_url, seen)
        page.goto(f"{base_url}/en/logout/")
        _sign_in(page, base_url, "a wrong one")
        expect(page.get_by_text("Incorrect")).to_be_visible()
        seen.append("a wrong password is refused")
        if picture:
            page.screenshot(path=picture)
        browser.close()
    return seen


def _sign_in(page: Page, base_url: str, password: str) -> None:
    page.goto(f"{base_url}/en/auth/#/signin")
    page.get_by_label("Username").fill(ACCOUNT[0])
    page.get_by_role("button", name="Next").click()
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Sign in").click()


def _use(page: Page, base_url: str, seen: list[str]) -> None:
    name = f"Sleep {uuid.uuid4().hex[:8]}"
    page.goto(f"{base_url}/en/facility/#/classes")
    # What the page still fetches when it is shown redraws it, and takes an open dialog away.
    page.wait_for_load_state("networkidle")
    page.get_by_role("button", name="New class").click()
    page.get_by_label("Class name").fill(name)
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("link", name=name)).to_be_visible()
    seen.append("created a class")
    page.reload()
    expect(page.get_by_role("link", name=name)).to_be_visible()
    seen.append("the class is there after a reload")
