"""The printable form: one text for one message, and nothing else is accepted."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keys.errors import MalformedSealedTextError
from keys.sealed import (
    encode_base64url,
    format_sealed,
    looks_sealed,
    new_key_id,
    parse_base64url,
    parse_sealed,
)

ALPHABET = string.ascii_letters + string.digits + "-_"
key_ids = st.text(ALPHABET, min_size=12, max_size=12)


@given(key_ids, st.binary(max_size=200))
def test_parses_what_it_formats(key_id: str, message: bytes) -> None:
    text = format_sealed(key_id, message)
    assert text.isascii()
    assert looks_sealed(text)
    assert parse_sealed(text) == (key_id, message)


@given(st.text(max_size=60))
def test_a_text_that_parses_is_the_only_one_for_its_message(text: str) -> None:
    try:
        raw = parse_base64url(text)
    except ValueError:
        return
    assert encode_base64url(raw) == text


@given(st.text(ALPHABET, max_size=9))
def test_accepts_exactly_the_canonical_texts(text: str) -> None:
    padded = text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4)
    try:
        raw = parse_base64url(text)
    except ValueError:
        canonical = len(text) % 4 != 1 and encode_base64url(_decode(padded)) == text
        assert not canonical
    else:
        assert raw == _decode(padded)


def _decode(padded: str) -> bytes:
    import base64

    return base64.b64decode(padded)


@given(key_ids, st.binary(min_size=1, max_size=30), st.data())
def test_another_spelling_of_the_same_message_is_refused(
    key_id: str, message: bytes, data: st.DataObject
) -> None:
    text = format_sealed(key_id, message)
    at = data.draw(st.integers(0, len(text) - 1))
    character = data.draw(st.characters())
    changed = text[:at] + character + text[at + 1 :]
    try:
        parsed = parse_sealed(changed)
    except MalformedSealedTextError:
        return
    assert (parsed == (key_id, message)) == (changed == text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hg1.",
        "hg1.abcdefghijkl",
        "hg1.abcdefghijklAAAA",
        "hg1.abcdefghijk.AAAA",
        "hg1.abcdefghijklm.AAAA",
        "hg2.abcdefghijkl.AAAA",
        "hg1.abcdefghijkl.AAA=",
        "hg1.abcdefghijkl.AAAA\n",
        " hg1.abcdefghijkl.AAAA",
        "hg1.abcdefghijkl.AA+A",
        "hg1.abcdefghijkl.AB",
        "hg1.abcdefghijkl.A",
        "hg1.abc\ndefghijk.AAAA",
        "hg1.abcdefghijkl.AA.A",
        "hg1.abcdéfghijkl.AAAA",
        "Ada Example, 1 January 1970",
    ],
)
def test_refuses_what_is_not_of_the_form(text: str) -> None:
    with pytest.raises(MalformedSealedTextError):
        parse_sealed(text)


def test_the_error_does_not_repeat_the_text() -> None:
    with pytest.raises(MalformedSealedTextError) as caught:
        parse_sealed("Ada Example")
    assert "Ada" not in str(caught.value)
    assert "Ada" not in str(caught.value.diagnostics())


def test_key_ids_are_opaque_and_do_not_repeat() -> None:
    made = {new_key_id() for _ in range(1000)}
    assert len(made) == 1000
    assert {len(key_id) for key_id in made} == {12}
