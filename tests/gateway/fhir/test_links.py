"""A paging link says nothing, fits nobody else, and does not last."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BadRequestError
from gateway.fhir.links import LIFE_S, MAX_TOKEN_CHARACTERS, Pager
from keys.sealed import encode_base64url, parse_base64url

NOW = 1_800_000_000.0
PAGER = Pager(b"k" * 32)
LINK = "https://app.internal/fhir?_tag=hgi1.1.secret&_cursor=7"


def sealed(link: str = LINK) -> str:
    return PAGER.seal(link, principal="Practitioner/1", route="ehr", now=NOW)


def opened(token: str, *, now: float = NOW, principal: str = "Practitioner/1") -> str:
    return PAGER.open(token, principal=principal, route="ehr", now=now)


@given(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=300))
def test_opens_what_it_sealed_for_the_same_person_and_app(link: str) -> None:
    token = sealed(link)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", token)
    assert opened(token) == link


def test_says_nothing() -> None:
    assert sealed() != sealed()
    raw = parse_base64url(sealed())
    assert b"app" not in raw
    assert b"secret" not in raw
    assert len(sealed("a")) == len(sealed("a" * 50))


@pytest.mark.parametrize(
    ("principal", "route", "key"),
    [
        ("Practitioner/2", "ehr", b"k" * 32),
        ("Practitioner/1", "crm", b"k" * 32),
        ("Practitioner/1e", "hr", b"k" * 32),
        ("", "Practitioner/1ehr", b"k" * 32),
        ("Practitioner/1", "ehr", b"K" * 32),
    ],
)
def test_fits_nobody_else(principal: str, route: str, key: bytes) -> None:
    with pytest.raises(BadRequestError) as raised:
        Pager(key).open(sealed(), principal=principal, route=route, now=NOW)
    assert raised.value.status == 400


@given(st.integers(0), st.integers(1, 255))
def test_a_changed_link_is_refused(at: int, flip: int) -> None:
    raw = bytearray(parse_base64url(sealed()))
    raw[at % len(raw)] ^= flip
    with pytest.raises(BadRequestError):
        opened(encode_base64url(bytes(raw)))


@given(st.text(max_size=60))
def test_anything_else_is_refused(token: str) -> None:
    with pytest.raises(BadRequestError):
        opened(token)


@pytest.mark.parametrize("cut", [1, 2, 4, 16, 40, 80])
def test_a_cut_link_is_refused(cut: int) -> None:
    with pytest.raises(BadRequestError):
        opened(sealed()[:-cut])


def test_lasts_one_hour_and_not_longer() -> None:
    token = sealed()
    assert opened(token, now=NOW + LIFE_S - 1)
    for now in (NOW + LIFE_S, NOW + 1e9, NOW - 1, float("nan"), float("inf")):
        with pytest.raises(BadRequestError) as raised:
            opened(token, now=now)
        assert raised.value.status == 410


def test_is_bounded() -> None:
    with pytest.raises(ValueError, match="shorter"):
        sealed("a" * MAX_TOKEN_CHARACTERS)
    with pytest.raises(BadRequestError):
        opened("A" * (MAX_TOKEN_CHARACTERS + 1))
    with pytest.raises(ValueError, match="32 bytes"):
        Pager(b"short")
