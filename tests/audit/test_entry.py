"""Entries: canonical bytes, strict reading, parts, and what cannot be said."""

from __future__ import annotations

import json
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from audit import entry as entry_module
from audit.entry import (
    MAX_ENTRY_BYTES,
    encode_entry,
    encode_parts,
    join_parts,
    parse_entry,
    parse_head,
)
from audit.errors import MalformedEntryError
from audit.model import (
    ACTIONS,
    MAX_INTEGER,
    PERSON_TYPES,
    STAGES,
    Actor,
    Assurance,
    Entry,
    Resource,
)
from keys.ports import KeyEvent
from tests.audit.records import OTHER, SEALED, START_US, make_entry, urlsafe

JWT = (
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0."
    "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
)
SECRETS = {
    "a JSON Web Token": JWT,
    "the beginning of one": "eyJhbGciOiJub25lIn0",
    "an authorization header": "Bearer abc",
    "a basic header": "Basic dXNlcjpwYXNz",
    "an opaque token": "9f86d081884c7d659a2feaa0c55ad015",
    "a Vault token": "hvs." + "A" * 90,
    "free text": "patient says he cannot sleep",
    "a name": "Müller",
    "two lines": "read\nread",
    "a trailing newline": "read\n",
    "a JSON body": '{"name":"Ada"}',
    "a query string": "name=Ada&birthdate=1990-01-01",
    "a mail address": "ada@example.com",
    "a long string": "a" * 2000,
    "a lone surrogate": "\ud800",
    "a control character": "a\x00b",
    "nothing": "",
}
CODE_FIELDS = ["tenant", "service", "reason", "break_glass", "purpose", "consent", "client"]
LIST_FIELDS = ["labels", "rules", "obligations", "patients"]


def jcs(raw: bytes) -> bytes:
    """RFC 8785 for what entries use: ASCII keys, integers and strings."""
    value = json.loads(raw)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


codes = st.from_regex(
    r"([A-Z0-9]{1,24}|[a-z0-9]{1,8}([A-Z][a-z]{1,5}){0,2})([._:/-][a-z0-9]{1,8}){0,3}",
    fullmatch=True,
).filter(lambda text: not text.startswith("eyJ"))
integers = st.integers(0, MAX_INTEGER)
entries = st.builds(
    make_entry,
    st.sampled_from(sorted(STAGES)),
    time=integers,
    tenant=codes,
    action=st.sampled_from(sorted(ACTIONS)),
    labels=st.lists(codes, max_size=4).map(tuple),
    rules=st.lists(codes, max_size=4).map(tuple),
    reason=st.none() | codes,
    bytes_in=st.none() | integers,
    assurance=st.none() | st.builds(Assurance, level=codes, age_s=st.none() | integers),
    counts=st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True), integers, max_size=5
    ),
    resources=st.lists(
        st.builds(Resource, type=st.just("Observation"), id=st.none() | st.just("a.b-1")),
        max_size=3,
    ).map(tuple),
)


@given(entries)
def test_an_entry_reads_back_as_it_was_written(entry: Entry) -> None:
    raw = encode_entry(entry)
    assert parse_entry(raw) == entry
    head = parse_head(raw)
    assert (head.stage, head.request, head.time) == (entry.stage, entry.request, entry.time)


@given(entries)
def test_bytes_are_those_of_an_independent_canonicalizer(entry: Entry) -> None:
    raw = encode_entry(entry)
    assert raw == jcs(raw)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_encoder_escapes_every_string_as_rfc_8785_does(text: str) -> None:
    expected = json.dumps(text, ensure_ascii=False).encode()
    assert entry_module._encoder.encode(text) == expected


def test_the_encoder_escapes_control_characters_as_rfc_8785_does() -> None:
    # RFC 8785 section 3.2.2.2.
    short = {"\b": b"\\b", "\t": b"\\t", "\n": b"\\n", "\f": b"\\f", "\r": b"\\r"}
    for number in range(0x20):
        expected = short.get(chr(number), b"\\u%04x" % number)
        assert entry_module._encoder.encode(chr(number)) == b'"' + expected + b'"'
    assert entry_module._encoder.encode("\x7f\u2028/€") == '"\x7f\u2028/€"'.encode()
    with pytest.raises(UnicodeEncodeError):
        entry_module._encoder.encode("\ud800")


@given(entries, st.data())
def test_a_changed_byte_is_refused_or_another_entry(entry: Entry, data: st.DataObject) -> None:
    raw = bytearray(encode_entry(entry))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        changed = parse_entry(bytes(raw))
    except MalformedEntryError:
        return
    assert changed != entry
    assert encode_entry(changed) == bytes(raw)


def test_refuses_every_other_form_of_the_same_entry() -> None:
    raw = encode_entry(make_entry(bytes_in=7))
    value = json.loads(raw)
    spaced = json.dumps(value, sort_keys=True).encode()
    backwards = json.dumps(dict(reversed(value.items())), separators=(",", ":")).encode()
    others = [
        spaced,
        backwards,
        raw + b"\n",
        b" " + raw,
        b"\xef\xbb\xbf" + raw,
        raw[:-1],
        raw[:-1] + b',"x":1}',
        raw[:-1] + b',"v":1}',
        b'{"action":"read",' + raw[1:],
        raw.replace(b'"bytes_in":7', b'"bytes_in":7.0'),
        raw.replace(b'"bytes_in":7', b'"bytes_in":7e0'),
        raw.replace(b'"bytes_in":7', b'"bytes_in":"7"'),
        raw.replace(b'"bytes_in":7', b'"bytes_in":true'),
        raw.replace(b'"bytes_in":7', b'"bytes_in":-7'),
        raw.replace(b'"bytes_in":7', b'"bytes_in":9007199254740992'),
        raw.replace(b'"bytes_in":7', b'"bytes_in":7,"bytes_out":null'),
        raw.replace(b'"read"', b'"\\u0072ead"'),
        raw.replace(b'"v":1', b'"v":2'),
        raw.replace(b'"labels":["PSY"]', b'"labels":[]'),
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"[" * 20_000,
        raw + b" " * MAX_ENTRY_BYTES,
    ]
    for other in others:
        assert other != raw
        with pytest.raises(MalformedEntryError):
            parse_entry(other)


def test_the_error_does_not_quote_what_was_refused() -> None:
    raw = encode_entry(make_entry()).replace(b'"PSY"', b'"Ada Lovelace"')
    with pytest.raises(MalformedEntryError) as caught:
        parse_entry(raw)
    told: BaseException | None = caught.value
    while told is not None:
        assert "Lovelace" not in str(told)
        told = None if told.__suppress_context__ else told.__context__


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS.keys())
@pytest.mark.parametrize(
    "name", [*CODE_FIELDS, *LIST_FIELDS, "stage", "action", "decision", "outcome"]
)
def test_no_field_takes_a_secret_or_free_text(name: str, secret: str) -> None:
    value: Any = (secret,) if name in LIST_FIELDS else secret
    with pytest.raises(MalformedEntryError) as caught:
        make_entry(**{name: value})
    assert not secret or secret not in str(caught.value)


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS.keys())
def test_no_part_takes_a_secret_or_free_text(secret: str) -> None:
    with pytest.raises(MalformedEntryError):
        Actor(kind="person", sealed=secret)
    with pytest.raises(MalformedEntryError):
        Actor(kind="person", sealed=SEALED, role=secret)
    with pytest.raises(MalformedEntryError):
        Actor(kind="service", name=secret)
    with pytest.raises(MalformedEntryError):
        Assurance(level=secret)
    with pytest.raises(MalformedEntryError):
        Resource(type=secret + "1")
    with pytest.raises(MalformedEntryError):
        make_entry(counts={secret + " ": 1})


@pytest.mark.parametrize("name", sorted(SECRETS.keys() - {"an opaque token"}))
def test_ids_take_no_token_and_no_text(name: str) -> None:
    # An opaque token of the form of a resource's id cannot be told from one: see audit.model.
    with pytest.raises(MalformedEntryError):
        Resource(type="Observation", id=SECRETS[name])
    with pytest.raises(MalformedEntryError):
        make_entry(request=SECRETS[name])
    with pytest.raises(MalformedEntryError):
        make_entry(details={"key": SECRETS[name]})


@pytest.mark.parametrize("size", [24, 32, 48, 64])
def test_random_tokens_do_not_pass_as_codes(size: int) -> None:
    passed = 0
    for _ in range(200):
        try:
            make_entry(reason=urlsafe(size))
        except MalformedEntryError:
            continue
        passed += 1
    # By chance a token looks like words, and rarely.
    assert passed <= 200 * 0.03


@pytest.mark.parametrize("kind", sorted(PERSON_TYPES))
def test_refuses_the_id_of_a_person_as_resource(kind: str) -> None:
    assert Resource(type=kind).id is None
    with pytest.raises(MalformedEntryError):
        Resource(type=kind, id="bob")
    raw = encode_entry(make_entry()).replace(
        b'"type":"Observation"', b'"type":"%s"' % kind.encode()
    )
    with pytest.raises(MalformedEntryError):
        parse_entry(raw)
    with pytest.raises(MalformedEntryError):
        make_entry(consent=f"{kind}/bob")


def test_refuses_a_person_in_clear_and_a_service_without_name() -> None:
    for wrong in (
        {"kind": "person", "name": "ada"},
        {"kind": "person"},
        {"kind": "device", "name": "phone"},
        {"kind": "service", "sealed": SEALED},
        {"kind": "service"},
        {"kind": "anonymous", "name": "x"},
        {"kind": "robot", "name": "x"},
    ):
        with pytest.raises(MalformedEntryError):
            Actor(**wrong)  # type: ignore[arg-type] # wrong on purpose
    with pytest.raises(MalformedEntryError):
        make_entry(client="192.0.2.7")
    assert make_entry(actor=Actor(kind="anonymous"), client="192.0.2.7").client == "192.0.2.7"


@pytest.mark.parametrize(
    "changes",
    [
        {"time": -1},
        {"time": 1.5},
        {"time": True},
        {"bytes_in": MAX_INTEGER + 1},
        {"status": 99},
        {"status": 1000},
        {"part": 1},
        {"parts": 2},
        {"part": 3, "parts": 2},
        {"part": 1, "parts": 1},
        {"counts": {"a": -1}},
        {"counts": {"a": None}},
        {"counts": {f"a{n}": 1 for n in range(33)}},
        {"counts": {1: 1}},
        {"v": True},
        {"v": 2},
        {"labels": ["PSY"]},
        {"labels": (None,)},
        {"labels": ([],)},
        {"patients": ["x"]},
        {"resources": ("Observation/1",)},
        {"actor": "ada"},
        {"assurance": "aal2"},
        {"tenant": None},
        {"request": None},
        {"outcome": "success"},
    ],
)
def test_refuses_wrong_numbers_and_types(changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedEntryError):
        make_entry(**changes)


def test_an_outcome_is_part_of_final_stages_and_of_no_other() -> None:
    with pytest.raises(MalformedEntryError):
        make_entry("outcome", outcome=None)
    with pytest.raises(MalformedEntryError):
        make_entry("closed", outcome=None)


def test_counts_are_a_private_sorted_copy() -> None:
    given_counts = {"b": 1, "a": 2}
    entry = make_entry(counts=given_counts)
    given_counts["c"] = 3
    assert list(entry.counts.items()) == [("a", 2), ("b", 1)]


def test_every_action_on_keys_can_be_said() -> None:
    assert set(get_args(get_type_hints(KeyEvent)["action"])) <= ACTIONS


def test_what_fits_is_one_entry() -> None:
    assert encode_parts(make_entry()) == [encode_entry(make_entry())]


@pytest.mark.parametrize(("patients", "resources"), [(500, 0), (0, 2000), (3000, 3000)])
def test_what_does_not_fit_is_divided_and_joined_again(patients: int, resources: int) -> None:
    entry = make_entry(
        "outcome",
        patients=tuple(f"hg1.{n:012d}.{'d' * 120}" for n in range(patients)),
        resources=tuple(Resource(type="Observation", id=f"o{n}") for n in range(resources)),
    )
    raws = encode_parts(entry)
    assert len(raws) > 1
    assert all(len(raw) <= MAX_ENTRY_BYTES for raw in raws)
    # Full to the brim: no part is less than what another item would have needed.
    assert all(len(raw) > MAX_ENTRY_BYTES - 300 for raw in raws[:-1])
    parts = [parse_entry(raw) for raw in raws]
    assert {part.request for part in parts} == {entry.request}
    assert [(part.part, part.parts) for part in parts] == [
        (n, len(raws)) for n in range(1, len(raws) + 1)
    ]
    assert join_parts(parts[::-1]) == entry


def test_parts_do_not_join_when_one_is_missing_doubled_or_foreign() -> None:
    parts = [parse_entry(raw) for raw in encode_parts(make_entry(patients=(OTHER,) * 2000))]
    foreign = structs.replace(parts[0], request="req-2")
    for wrong in (parts[1:], parts[:-1], [*parts, parts[0]], [foreign, *parts[1:]]):
        with pytest.raises(MalformedEntryError):
            join_parts(wrong)


def test_an_entry_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(MalformedEntryError):
        encode_parts(make_entry(labels=tuple(f"label-{n}" for n in range(10_000))))
    with pytest.raises(MalformedEntryError):
        encode_entry(make_entry(patients=(OTHER,) * 2000))


def test_time_stands_in_microseconds() -> None:
    assert json.loads(encode_entry(make_entry()))["time"] == START_US
