"""What a person sees: the pages of the gateway and of the clinic behind it, in a real browser."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from examples.visitor import code_of
from tests.e2e.running import Site

CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium."""
    if shutil.which(CHROMIUM) is None:
        pytest.skip("Chromium is not installed: run `make apt`")
    with sync_playwright() as engine:
        started = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser without memory. Who issued the certificate is checked by other tests."""
    opened = browser.new_context(ignore_https_errors=True, locale="en-GB")
    opened.set_default_timeout(8_000)
    yield opened
    opened.close()


def sign_in(page: Page, site: Site, name: str, pictures: Path) -> None:
    """Show password and code, as the pages ask for them."""
    account = site.accounts[name]
    page.goto(f"{site.gateway.base}/.havengate/sign-in?next=/patients/1")
    page.screenshot(path=pictures / "sign-in.png")
    page.locator("input[name=login]").fill(name)
    page.locator("input[name=password]").fill(account["password"])
    page.locator("button[type=submit]").click()
    page.locator("input[name=code]").wait_for()
    page.screenshot(path=pictures / "code.png")
    page.locator("input[name=code]").fill(next_code(site, name))
    page.locator("button[type=submit]").click()


def next_code(site: Site, name: str) -> str:
    """A code that was not used before."""
    account = site.accounts[name]
    at = max(int(time.time()), account.get("next_code_at", 0))
    while at > time.time() + 30:
        time.sleep(0.2)
    account["next_code_at"] = (at // 30 + 1) * 30
    return code_of(account["second_factor_uri"], at)


def test_a_clinician_signs_in_sees_her_patient_and_breaks_the_glass(
    clinic_gateway: Site, context: BrowserContext, tmp_path: Path
) -> None:
    site = clinic_gateway
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    answer = page.goto(f"{site.gateway.base}/patients/1")
    assert answer is not None
    page.screenshot(path=tmp_path / "asked.png")
    assert answer.status == 401 or "/.havengate/sign-in" in page.url
    sign_in(page, site, "cruz", tmp_path)
    page.wait_for_url("**/patients/1")
    page.goto(f"{site.gateway.base}/patients/6")
    page.wait_for_load_state("networkidle")
    page.screenshot(path=tmp_path / "patient.png", full_page=True)
    own = next(one for one in context.cookies() if one["name"] == "__Host-havengate")
    assert (own["httpOnly"], own["secure"], own["path"]) == (True, True, "/")
    assert own["sameSite"] in {"Lax", "Strict"}
    assert not own["domain"].startswith(".")
    assert own["name"] not in page.evaluate("document.cookie")
    page.goto(f"{site.gateway.base}/.havengate/break-glass")
    page.screenshot(path=tmp_path / "break-glass.png", full_page=True)
    page.locator("input[name=patient]").fill("2")
    page.locator("textarea[name=reason]").fill("Brought in by ambulance, not responsive")
    page.locator("input[name=minutes][value='30']").check()
    if page.locator("input[name=code]").count():
        # Signing in was a while ago.
        page.locator("input[name=code]").fill(next_code(site, "cruz"))
    page.locator("main button[type=submit]").first.click()
    page.locator("input[name=grant]").first.wait_for(state="attached")
    page.goto(f"{site.gateway.base}/patients/2")
    page.wait_for_load_state("networkidle")
    page.screenshot(path=tmp_path / "opened.png", full_page=True)
    answer = page.goto(f"{site.gateway.base}/.havengate/no-such-page")
    page.screenshot(path=tmp_path / "error.png")
    assert answer is not None
    assert answer.status == 404
    assert problems == []
