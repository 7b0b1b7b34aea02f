"""Signed notes, verifier keys, checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from audit.errors import AuditError, MalformedNoteError, VerificationError
from audit.note import (
    Note,
    Signature,
    VerifierKey,
    cosignature_message,
    encode_cosignature,
    parse_note,
    verify_note,
)

# The verifier key of C2SP signed-note's own example.
PUBLISHED_KEY = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
TEXT = "log.example/audit/1\n7\nLWC1VjXtdT8xLyWQUPTt3XzNPYt0rAPi2Kv3ZAW1yx0=\n"


def signed(text: str = TEXT, name: str = "log.example/audit/1") -> tuple[Note, VerifierKey]:
    private = Ed25519PrivateKey.generate()
    key = VerifierKey.ed25519(name, private.public_key().public_bytes_raw())
    line = Signature.by(key, private.sign(text.encode()))
    return Note(text=text, signatures=(line,)), key


def test_the_published_verifier_key_reads_and_writes_the_same() -> None:
    key = VerifierKey.parse(PUBLISHED_KEY)
    assert (key.name, key.key_id.hex(), key.algorithm) == ("example.com/foo", "530d903a", 1)
    assert key.text == PUBLISHED_KEY


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("530d903a", "530d903b"),
        lambda text: text.replace("foo", "bar"),
        lambda text: text[:-4],
        lambda text: text.replace("+Ae", "+Be"),
        lambda text: text.replace("example.com/foo", "example com"),
        lambda text: text.replace("+", " "),
        lambda _: "",
    ],
)
def test_refuses_a_verifier_key_that_was_changed(change: Callable[[str], str]) -> None:
    with pytest.raises(MalformedNoteError):
        VerifierKey.parse(change(PUBLISHED_KEY))


def test_a_note_verifies_and_ignores_keys_it_does_not_know() -> None:
    note, key = signed()
    stranger, _ = signed(name="somebody.example")
    both = note.with_signatures(stranger.signatures * 1)
    assert verify_note(parse_note(both.encode()), [key]) == note.signatures


def test_reads_at_least_16_signatures_and_refuses_a_flood() -> None:
    note, key = signed()
    strangers = [signed(name=f"w{n}.example")[0].signatures[0] for n in range(63)]
    assert verify_note(parse_note(note.with_signatures(strangers).encode()), [key])
    more = [signed(name=f"v{n}.example")[0].signatures[0] for n in range(2)]
    with pytest.raises(MalformedNoteError, match="more than"):
        parse_note(note.with_signatures(strangers + more).encode())


def test_refuses_a_note_if_one_known_key_fails_though_another_fits() -> None:
    note, key = signed()
    other, other_key = signed("another text\n", name="w.example")
    both = note.with_signatures(other.signatures)
    with pytest.raises(VerificationError, match="does not fit"):
        verify_note(both, [key, other_key])


def test_refuses_a_note_that_no_known_key_signed() -> None:
    note, _ = signed()
    _, stranger = signed()
    with pytest.raises(VerificationError, match="known"):
        verify_note(note, [stranger])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_changed_byte_of_a_note_with_one_signature_passes(data: st.DataObject) -> None:
    note, key = signed()
    encoded = bytearray(note.encode())
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(AuditError):
        verify_note(parse_note(bytes(encoded)), [key])


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        note = parse_note(data)
    except MalformedNoteError:
        return
    assert note.encode() == data


def test_the_text_ends_at_the_last_empty_line() -> None:
    note, key = signed("a\n\nb\n")
    assert parse_note(note.encode()).text == "a\n\nb\n"
    verify_note(parse_note(note.encode()), [key])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text\n",
        b"text\n\n",
        b"text\n\n\xe2\x80\x94 name AAAAAAA=",
        b"text\r\n\n\xe2\x80\x94 name AAAAAAA=\n",
        b"te\xff\n\n\xe2\x80\x94 name AAAAAAA=\n",
        b"text\n\n- name AAAAAAA=\n",
        b"text\n\n\xe2\x80\x94 name AAAA\n",
        b"text\n\n\xe2\x80\x94 na+me AAAAAAA=\n",
        b"text\n\n\xe2\x80\x94 name AAAAAAB=\n",
        b"x" * 70_000,
    ],
)
def test_refuses_what_is_not_a_note(data: bytes) -> None:
    with pytest.raises(MalformedNoteError):
        parse_note(data)


def test_a_cosignature_binds_its_time() -> None:
    private = Ed25519PrivateKey.generate()
    key = VerifierKey.cosigner("w.example", private.public_key().public_bytes_raw())
    raw = private.sign(cosignature_message(TEXT, 1_700_000_000))
    key.verify(TEXT, encode_cosignature(1_700_000_000, raw))
    for wrong in (encode_cosignature(1_700_000_001, raw), raw):
        with pytest.raises(VerificationError):
            key.verify(TEXT, wrong)


def test_a_log_key_does_not_pass_as_a_witness_key() -> None:
    private = Ed25519PrivateKey.generate()
    raw = private.public_key().public_bytes_raw()
    log_key, witness_key = VerifierKey.ed25519("n", raw), VerifierKey.cosigner("n", raw)
    assert log_key.key_id != witness_key.key_id
    with pytest.raises(VerificationError):
        witness_key.verify(TEXT, private.sign(TEXT.encode()))
