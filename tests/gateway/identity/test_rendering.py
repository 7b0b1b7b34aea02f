"""What pages draw: a second factor as a picture that a phone reads, and that has no address."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import zxingcpp

from tests.gateway.identity.workbench import PASSWORD, Bench, Browser


async def test_another_program_reads_the_seed_from_the_picture(
    one: Bench, browser: Browser
) -> None:
    account = one.account()
    page = await browser.get("sign-in")
    shown = await browser.submit(page, "sign-in", login="ada", password=PASSWORD)
    (drawn,) = re.findall(r"<svg .*?</svg>", shown.body.decode(), re.DOTALL)
    (found,) = zxingcpp.read_barcodes(_pixels(drawn))
    address = urlsplit(found.text)
    assert (address.scheme, address.netloc) == ("otpauth", "totp")
    assert parse_qs(address.query)["secret"] == [str(one.store.held[f"totp/{account.id}"]["seed"])]


async def test_the_picture_is_part_of_the_page_and_fetched_from_nowhere(
    one: Bench, browser: Browser
) -> None:
    one.account()
    page = await browser.get("sign-in")
    shown = await browser.submit(page, "sign-in", login="ada", password=PASSWORD)
    (drawn,) = re.findall(r"<svg .*?</svg>", shown.body.decode(), re.DOTALL)
    # The browser would fetch these, or refuse them under the page's policy.
    for forbidden in ("href", "src=", "style", "script", "url(", "xmlns"):
        assert forbidden not in drawn


def _pixels(drawing: str) -> Any:
    """The dark lines of a drawing, four pixels for each of its units."""
    (size,) = map(int, re.findall(r'viewBox="0 0 (\d+) \1"', drawing))
    (path,) = re.findall(r'<path stroke="#000" d="([^"]+)"', drawing)
    picture = np.full((size, size), 255, dtype=np.uint8)
    x = y = 0.0
    for command, numbers in re.findall(r"([Mmh])([^Mmh]*)", path):
        given = [float(number) for number in re.findall(r"-?[\d.]+", numbers)]
        if command == "h":
            picture[int(y), int(x) : int(x + given[0])] = 0
            x += given[0]
        elif command == "m":
            x, y = x + given[0], y + given[1]
        else:
            x, y = given
    return picture.repeat(4, axis=0).repeat(4, axis=1)
