"""What a clinician wrote as 1.10 is read as 1.10 by whoever comes after him."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gateway import json_text
from gateway.content import bodies

NUMERAL = st.from_regex(
    re.compile(r"-?(0|[1-9][0-9]{0,25})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?", re.ASCII),
    fullmatch=True,
).filter(lambda text: abs(float(text)) < 1e300)
STRINGS = st.text(st.characters(codec="utf-8")).map(json.dumps)
#: Texts of JSON, with every numeral that there can be, and white space in every place.
SPACE = st.sampled_from(["", " ", "\n", "\t "])


@st.composite
def texts(draw: st.DrawFn, depth: int = 3) -> str:
    kind = draw(st.integers(0, 3 if depth else 1))
    if kind == 0:
        return draw(NUMERAL)
    if kind == 1:
        return draw(STRINGS | st.sampled_from(["true", "false", "null"]))
    between = draw(SPACE)
    parts = [draw(texts(depth=depth - 1)) for _ in range(draw(st.integers(0, 4)))]
    if kind == 2:
        return "[" + f"{between},{between}".join(parts) + between + "]"
    members = [f'"m{number}"{between}:{between}{one}' for number, one in enumerate(parts)]
    return "{" + between + f",{between}".join(members) + "}"


def numerals(text: str) -> list[str]:
    """The numerals of a text of JSON, as they stand."""
    found: list[str] = []

    def keep(one: str) -> int:
        found.append(one)
        return 0

    json.loads(text, parse_int=keep, parse_float=keep)
    return found


ODD = [
    "1.10", "-1.10", "100.00", "1.0", "0.0", "-0.0", "-0", "0", "1e5", "1E5", "1e+05", "1.50e-3",
    "0.00001", "0.0001", "0.000010", "10.00001", "123456789012345678", "9223372036854775807",
    "9223372036854775808", "18446744073709551616", "-9223372036854775809", "1234567890123456.7",
    "0.1000000000000000055511151231257827", "5e-324", "4.35", "0.30000000000000004", "37.0",
    "1" * 300,
]  # fmt: skip


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize(
    "form", ["{}", " {} ", "[{}]", '{{"a":{}}}', '{{"a": [1,{}]}}', "[\n{},2]"]
)
def test_a_numeral_passes_as_it_was_written(text: str, form: str) -> None:
    whole = form.format(text)
    for read, write in (
        (json_text.loads, json_text.dumps),
        (bodies.parse_json, bodies.dump_json),
        (json_text.loads, json_text.dumps_escaped),
    ):
        assert numerals(write(read(whole.encode())).decode()) == numerals(whole)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts())
@example("[-0]")
@example("[0.10]")
def test_every_numeral_of_every_text_passes_byte_by_byte(text: str) -> None:
    for read, write in (
        (json_text.loads, json_text.dumps),
        (bodies.parse_json, bodies.dump_json),
    ):
        value = read(text.encode())
        again = write(value)
        assert numerals(again.decode()) == numerals(text)
        assert json.loads(again) == json.loads(text)
        assert read(again) == value


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(NUMERAL)
def test_what_the_search_passes_over_is_written_by_the_fast_way_as_it_was_read(text: str) -> None:
    raw = f'{{"a":{text}}}'.encode()
    if type(json_text.loads(raw)["a"]) is not json_text.Numeral:
        assert orjson.dumps(orjson.loads(raw)) == raw


def test_an_ordinary_body_is_read_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(json, "loads", never)
    body = {
        "id": "123456789012345678901234567890", "when": "2026-11-28T15:17:04.1200Z", "n": 120,
        "value": 5.5, "code": "900000000000207008", "text": "1.10",
        "system": "urn:oid:2.16.840.1.113883.6.96", "at": "07:04.120Z", "big": 1_700_000_000_000,
    }  # fmt: skip
    assert json_text.loads(orjson.dumps(body)) == body


@pytest.mark.parametrize(
    "text",
    ["1e400", "-1e999", "NaN", "[Infinity]", "[1.10,NaN]", "01.10", "1.", ".5", "+1.10", "[1.10",
     '{"a":1.10,}', '["\\ud800",1.10]', "1" * 400, "[" * 2_000 + "1.10" + "]" * 2_000],
)  # fmt: skip
def test_what_is_no_json_is_refused_with_odd_numerals_too(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - libraries say it in their own words
        json_text.loads(text.encode())


@pytest.mark.parametrize("piece", [b"1", b"0", b"0.1", b"1e1", b".0", b"-0", b"1 "])
def test_a_long_run_of_digits_in_text_is_gone_through_once(piece: bytes) -> None:
    """Gone through once for each of its digits, this would not end before the test is given up."""
    text = (piece * 3_000_000)[:3_000_000]
    assert json_text.loads(b'{"a":"' + text + b'"}') == {"a": text.decode()}


def test_a_numeral_is_still_a_number() -> None:
    value = json_text.loads(b"[1.10,1e2,36893488147419103232]")
    assert value == [1.1, 100.0, 2.0**65]
    assert all(isinstance(one, float) for one in value)
    assert json_text.loads(b"9223372036854775807 ") == 9_223_372_036_854_775_807


def test_members_are_sorted_where_asked_for() -> None:
    value = json_text.loads(b'{"b":1.10,"a":2}')
    assert json_text.dumps(value, sort_keys=True) == b'{"a":2,"b":1.10}'


def test_halves_of_surrogate_pairs_stay_escaped_beside_numerals() -> None:
    body = b'{"a":"\\ud800","n":1.10,"l":[1e3,"\xc3\xa9",null]}'
    again = bodies.dump_json(bodies.parse_json(body))
    assert again == b'{"a":"\\ud800","n":1.10,"l":[1e3,"\\u00e9",null]}'
