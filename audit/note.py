"""Signed notes and verifier keys (C2SP signed-note). Pure.

Lives here: the outer form of a note, key ids, Ed25519 and cosignature verification. Not here: what
the text of a checkpoint says (`audit.checkpoint`).
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from audit.errors import MalformedNoteError, VerificationError

ED25519 = 0x01
COSIGNATURE = 0x04
#: A note larger than this, or with more signatures, is refused unread.
MAX_NOTE_BYTES = 65_536
MAX_SIGNATURES = 64

_DASH = "\N{EM DASH} "
_PUBLIC_KEY_BYTES = 32
_KEY_ID_BYTES = 4
_FIRST_PRINTABLE = 0x20
_TIME = struct.Struct(">Q")
_COSIGNATURE_BYTES = 72


def decode_base64(text: str | bytes, *, what: str) -> bytes:
    """Decode the one canonical spelling of standard base64. Raises `MalformedNoteError`."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedNoteError(f"{what} is not base64.") from error
    spelled = text.encode() if isinstance(text, str) else text
    if base64.b64encode(data) != spelled:
        raise MalformedNoteError(f"{what} is base64, but not in its canonical spelling.")
    return data


def encode_base64(data: bytes) -> str:
    """Standard base64 with padding."""
    return base64.b64encode(data).decode("ascii")


def parse_key_name(name: str) -> str:
    """Return `name` if it may name a key: not empty, no space, no `+`, no control character."""
    if not name or "+" in name or any(c.isspace() or ord(c) < _FIRST_PRINTABLE for c in name):
        raise MalformedNoteError("A key name has no spaces, no plus sign, and is not empty.")
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierKey:
    """A public key that signs notes under `name`. `algorithm` is `ED25519` or `COSIGNATURE`."""

    name: str
    algorithm: int
    public_key: bytes

    @classmethod
    def ed25519(cls, name: str, public_key: bytes) -> Self:
        """The key of a log, from the raw 32 bytes."""
        return cls(name=parse_key_name(name), algorithm=ED25519, public_key=public_key)

    @classmethod
    def cosigner(cls, name: str, public_key: bytes) -> Self:
        """The key of a witness, from the raw 32 bytes."""
        return cls(name=parse_key_name(name), algorithm=COSIGNATURE, public_key=public_key)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `name+hex(key id)+base64(type ‖ public key)`. Raises `MalformedNoteError`."""
        parts = text.strip().split("+", 2)
        if len(parts) != 3:  # noqa: PLR2004 - the three parts of the text
            raise MalformedNoteError("A verifier key reads name+id+key; parts are missing.")
        name, key_id, encoded = parts
        data = decode_base64(encoded, what="The last part of the verifier key")
        if len(data) != 1 + _PUBLIC_KEY_BYTES or data[0] not in {ED25519, COSIGNATURE}:
            raise MalformedNoteError(
                "The verifier key is of no known kind: expected Ed25519 (01) or cosignature (04) "
                "with 32 bytes."
            )
        key = cls(name=parse_key_name(name), algorithm=data[0], public_key=data[1:])
        if key.key_id.hex() != key_id:
            raise MalformedNoteError(
                f"The verifier key's id is {key_id}, its key gives {key.key_id.hex()}: "
                "the text was changed or cut; copy it again."
            )
        return key

    @property
    def key_id(self) -> bytes:
        """SHA-256(name ‖ 0x0A ‖ type ‖ public key), the first four bytes."""
        data = self.name.encode() + b"\n" + bytes([self.algorithm]) + self.public_key
        return sha256(data).digest()[:_KEY_ID_BYTES]

    @property
    def text(self) -> str:
        """The form that `parse` reads."""
        encoded = encode_base64(bytes([self.algorithm]) + self.public_key)
        return f"{self.name}+{self.key_id.hex()}+{encoded}"

    def verify(self, text: str, signature: bytes) -> None:
        """Prove that this key signed the note text. Raises `VerificationError`."""
        message, raw = text.encode(), signature
        if self.algorithm == COSIGNATURE:
            if len(signature) != _COSIGNATURE_BYTES:
                raise VerificationError(f"The cosignature by {self.name} has a wrong length.")
            message = cosignature_message(text, cosignature_time(signature))
            raw = signature[_TIME.size :]
        try:
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(raw, message)
        except (InvalidSignature, ValueError) as error:
            raise VerificationError(
                f"The signature by {self.name} ({self.key_id.hex()}) does not fit the text."
            ) from error


def cosignature_message(text: str, time_s: int) -> bytes:
    """What a witness signs (C2SP tlog-cosignature, Ed25519). `time_s` is Unix seconds."""
    return f"cosignature/v1\ntime {time_s}\n{text}".encode()


def cosignature_time(signature: bytes) -> int:
    """Unix seconds at which a witness says that it signed."""
    return int(_TIME.unpack_from(signature)[0])


def encode_cosignature(time_s: int, raw: bytes) -> bytes:
    """The signature field of a cosignature: u64be time ‖ Ed25519 signature."""
    return _TIME.pack(time_s) + raw


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """One signature line."""

    name: str
    key_id: bytes
    signature: bytes

    @classmethod
    def by(cls, key: VerifierKey, signature: bytes) -> Self:
        """The line for a signature made with the private half of `key`."""
        return cls(name=key.name, key_id=key.key_id, signature=signature)

    @property
    def line(self) -> str:
        """`— <name> <base64(key id ‖ signature)>` with its line end."""
        return f"{_DASH}{self.name} {encode_base64(self.key_id + self.signature)}\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A text that ends in a line end, and the signatures below it. Nothing is verified yet."""

    text: str
    signatures: tuple[Signature, ...]

    def encode(self) -> bytes:
        """The bytes that `parse_note` reads."""
        return (self.text + "\n" + "".join(s.line for s in self.signatures)).encode()

    def with_signatures(self, added: Iterable[Signature]) -> Note:
        """The note with more lines; a line by a key that is there already replaces the old one."""
        lines = {(s.name, s.key_id): s for s in self.signatures}
        lines.update({(s.name, s.key_id): s for s in added})
        return Note(text=self.text, signatures=tuple(lines.values()))


def parse_note(data: bytes) -> Note:
    """Split a note at its last empty line. Raises `MalformedNoteError`; verifies no signature."""
    if len(data) > MAX_NOTE_BYTES:
        raise MalformedNoteError(f"The note is larger than {MAX_NOTE_BYTES} bytes.")
    try:
        whole = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedNoteError(f"The note is not UTF-8 at byte {error.start}.") from error
    if any(ord(c) < _FIRST_PRINTABLE and c != "\n" for c in whole):
        raise MalformedNoteError("The note holds a control character.")
    split = whole.rfind("\n\n")
    if split < 0 or not whole.endswith("\n"):
        raise MalformedNoteError("The note has no empty line above its signatures, or is cut off.")
    return Note(text=whole[: split + 1], signatures=parse_signature_lines(whole[split + 2 :]))


def parse_signature_lines(text: str) -> tuple[Signature, ...]:
    """Read signature lines, each with its line end. Raises `MalformedNoteError`."""
    lines = text.split("\n")
    if lines.pop() or not lines:
        raise MalformedNoteError("A note ends with at least one signature line and its line end.")
    if len(lines) > MAX_SIGNATURES:
        raise MalformedNoteError(f"The note has more than {MAX_SIGNATURES} signatures.")
    return tuple(_parse_signature_line(line) for line in lines)


def _parse_signature_line(line: str) -> Signature:
    name, space, encoded = line.removeprefix(_DASH).partition(" ")
    if not line.startswith(_DASH) or not space:
        raise MalformedNoteError("A signature line does not read `— name base64`.")
    data = decode_base64(encoded, what="A signature")
    if len(data) <= _KEY_ID_BYTES:
        raise MalformedNoteError("A signature is shorter than its key id.")
    return Signature(
        name=parse_key_name(name), key_id=data[:_KEY_ID_BYTES], signature=data[_KEY_ID_BYTES:]
    )


def verify_note(note: Note, keys: Sequence[VerifierKey]) -> tuple[Signature, ...]:
    """Verify every signature whose key is among `keys`; ignore the others; return those verified.

    Raises `VerificationError` if a known key's signature fails, or if no known key signed.
    """
    known = {(key.name, key.key_id): key for key in keys}
    verified: list[Signature] = []
    for signature in note.signatures:
        key = known.get((signature.name, signature.key_id))
        if key is not None:
            key.verify(note.text, signature.signature)
            verified.append(signature)
    if not verified:
        names = ", ".join(sorted({f"{s.name} ({s.key_id.hex()})" for s in note.signatures}))
        raise VerificationError(
            f"No signature is by a key that is known here; the note is signed by {names}. "
            "Pass the verifier keys of all versions of the log's key."
        )
    return tuple(verified)
