"""Checkpoints: what a log says about itself, signed (C2SP tlog-checkpoint, tlog-cosignature). Pure.

Comes before: `audit.note`. Comes after: `audit.publish` makes them, `audit.witness` cosigns them,
`audit.verify` starts from one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from audit.errors import MalformedNoteError, VerificationError
from audit.merkle import EMPTY_ROOT, HASH_BYTES
from audit.note import (
    ED25519,
    Note,
    Signature,
    VerifierKey,
    decode_base64,
    encode_base64,
    parse_key_name,
    parse_note,
    verify_note,
)
from audit.ports import Signer

#: Sizes are signed 64-bit numbers in most readers.
MAX_SIZE = 2**63 - 1
_LINES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The tree that a log commits to: its origin, how many entries, and their root."""

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        """The text that is signed."""
        return f"{self.origin}\n{self.size}\n{encode_base64(self.root)}\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedCheckpoint:
    """A checkpoint with the note that carries its signatures. Parsed, not verified."""

    checkpoint: Checkpoint
    note: Note


def parse_size(text: str, *, what: str) -> int:
    """Read a decimal number without sign, leading zero or other ornament."""
    if not (text.isascii() and text.isdigit()) or (text[0] == "0" and text != "0"):
        raise MalformedNoteError(f"{what} is not a decimal number.")
    if len(text) > len(str(MAX_SIZE)) or int(text) > MAX_SIZE:
        raise MalformedNoteError(f"{what} is larger than any log.")
    return int(text)


def parse_checkpoint_text(text: str) -> Checkpoint:
    """Read the signed text. Raises `MalformedNoteError`; extension lines are refused."""
    lines = text.split("\n")
    if len(lines) != _LINES + 1 or lines[-1]:
        raise MalformedNoteError(
            "A checkpoint has three lines: origin, size, root; extension lines are not accepted."
        )
    origin, size_text, root_text, _ = lines
    size = parse_size(size_text, what="The checkpoint's size")
    root = decode_base64(root_text, what="The checkpoint's root")
    if len(root) != HASH_BYTES or (size == 0 and root != EMPTY_ROOT):
        raise MalformedNoteError("The checkpoint's root is not the hash of a tree of its size.")
    return Checkpoint(origin=parse_key_name(origin), size=size, root=root)


def parse_checkpoint(data: bytes) -> SignedCheckpoint:
    """Read a checkpoint file. Raises `MalformedNoteError`; verifies no signature."""
    note = parse_note(data)
    return SignedCheckpoint(checkpoint=parse_checkpoint_text(note.text), note=note)


def verify_checkpoint(data: bytes, keys: Sequence[VerifierKey]) -> SignedCheckpoint:
    """Read a checkpoint and prove that the log itself signed it.

    `keys` are the verifier keys of all versions of the log's key, and may hold witnesses' keys: a
    known key's signature must fit, and one of them must be an Ed25519 key named as the origin.
    Raises `MalformedNoteError` or `VerificationError`.
    """
    signed = parse_checkpoint(data)
    origin = signed.checkpoint.origin
    own = {k.key_id for k in keys if k.algorithm == ED25519 and k.name == origin}
    verified = verify_note(signed.note, keys)
    if not any(s.name == origin and s.key_id in own for s in verified):
        raise VerificationError(f"The checkpoint of {origin} is not signed by that log's own key.")
    return signed


def signed_checkpoint(
    checkpoint: Checkpoint, *, version: int, signature: bytes, public_keys: Mapping[int, bytes]
) -> SignedCheckpoint:
    """Put the log's signature below its checkpoint, once it is proven to fit.

    Raises `VerificationError` if it does not: a wrong key or a fault on the way must not be
    published.
    """
    public_key = public_keys.get(version)
    if public_key is None:
        raise VerificationError(f"The signer used key version {version}, which it does not list.")
    key = VerifierKey.ed25519(checkpoint.origin, public_key)
    key.verify(checkpoint.text, signature)
    line = Signature.by(key, signature)
    note = Note(text=checkpoint.text, signatures=(line,))
    return SignedCheckpoint(checkpoint=checkpoint, note=note)


def sign_checkpoint(checkpoint: Checkpoint, signer: Signer) -> SignedCheckpoint:
    """Have a checkpoint signed. Raises what the signer raises, or `VerificationError`."""
    version, signature = signer.sign(checkpoint.text.encode())
    return signed_checkpoint(
        checkpoint, version=version, signature=signature, public_keys=signer.public_keys()
    )


def verifier_keys(origin: str, signer: Signer) -> tuple[VerifierKey, ...]:
    """The verifier keys of all versions of a log's key: what a reader has to know."""
    return tuple(VerifierKey.ed25519(origin, key) for key in signer.public_keys().values())
