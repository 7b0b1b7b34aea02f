"""The printable form of a sealed field: `hg1.<key id>.<message>`.

`<key id>` is 12 and `<message>` any number of base64url characters without padding (RFC 4648
section 5). There is exactly one text for one sequence of bytes: what is not canonical is refused,
so a stored text cannot be changed without changing what it says. No cryptography here: `keys.aead`
comes before, the `keys.keyring` after.
"""

from __future__ import annotations

import binascii
import os
import re
from typing import NamedTuple

from keys.errors import MalformedSealedTextError

PREFIX = "hg1."
KEY_ID_BYTES = 9
KEY_ID_CHARACTERS = 12

_MESSAGE_AT = len(PREFIX) + KEY_ID_CHARACTERS + 1
_TO_URL = bytes.maketrans(b"+/", b"-_")
_FROM_URL = bytes.maketrans(b"-_", b"+/")
#: What the decoder wants behind a text whose length leaves this remainder by 4.
_PADDING = (b"", b"", b"==", b"=")
_ALPHABET = re.compile(r"[A-Za-z0-9_-]*")
_KEY_ID = re.compile(r"[A-Za-z0-9_-]{12}")
#: The last character of such a text carries 6, none, 2 or 4 bits; the unused ones are zero.
_LAST = (
    frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_") | {""},
    frozenset[str](),
    frozenset("AQgw"),
    frozenset("AEIMQUYcgkosw048"),
)


# A tuple, not a dataclass: one is made for every field that is opened.
class SealedText(NamedTuple):
    """The two parts of a sealed text."""

    key_id: str
    message: bytes


def encode_base64url(raw: bytes) -> str:
    """Encode without padding (RFC 4648 section 5)."""
    return binascii.b2a_base64(raw, newline=False).rstrip(b"=").translate(_TO_URL).decode("ascii")


def parse_base64url(text: str) -> bytes:
    """Decode the canonical form only: no padding, no other characters, no stray bits.

    Raises `ValueError`; the callers say what was malformed.
    """
    # The decoder passes over foreign characters and stray bits: both are refused before it.
    if not _ALPHABET.fullmatch(text) or text[-1:] not in _LAST[len(text) % 4]:
        raise ValueError("not canonical base64url")
    return binascii.a2b_base64(text.encode().translate(_FROM_URL) + _PADDING[len(text) % 4])


def new_key_id() -> str:
    """Return 72 random bits as 12 characters: says nothing about whose key it is."""
    return encode_base64url(os.urandom(KEY_ID_BYTES))


def format_sealed(key_id: str, message: bytes) -> str:
    """Return the text of a message that `key_id` sealed."""
    return f"{PREFIX}{key_id}.{encode_base64url(message)}"


def looks_sealed(text: str) -> bool:
    """Whether a value claims to be sealed text. Says nothing about whether it opens."""
    return text.startswith(PREFIX)


def parse_sealed(text: str) -> SealedText:
    """Take a sealed text apart.

    Raises `MalformedSealedTextError` for anything not exactly of the form.
    """
    if not text.startswith(PREFIX) or text[_MESSAGE_AT - 1 : _MESSAGE_AT] != ".":
        raise _malformed("a text of the form hg1.<key id>.<message>")
    key_id = text[len(PREFIX) : _MESSAGE_AT - 1]
    if not _KEY_ID.fullmatch(key_id):
        raise _malformed("a key id of 12 base64url characters")
    try:
        message = parse_base64url(text[_MESSAGE_AT:])
    except ValueError as error:
        raise _malformed("canonical base64url without padding") from error
    return SealedText(key_id, message)


def _malformed(expected: str) -> MalformedSealedTextError:
    # The text itself stays out of the message: it may be a plaintext that was never sealed.
    return MalformedSealedTextError(
        f"expected {expected}, got something else; check that the field was sealed by Havengate "
        "and that nothing on the way shortened or re-encoded it"
    )
