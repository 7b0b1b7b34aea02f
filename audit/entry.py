"""The bytes of an entry: RFC 8785 (JSON Canonicalization Scheme) of objects, strings and integers.

Lives here: writing, strict reading, and a fast look at what verification needs. What an entry may
say stands in `audit.model`; who writes entries in `audit.recorder`. The log takes and gives these
bytes and does not read them.

Canonical means that one entry has exactly one text: keys sorted, no white space, no `null`, no
fraction, no escape that RFC 8785 does not write. A reader needs nothing but a JSON parser.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import structs

from audit.errors import MalformedEntryError
from audit.model import MAX_PARTS, Entry, Resource, Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Entry bundles carry the length in 16 bits (C2SP tlog-tiles).
MAX_ENTRY_BYTES: Final = 65_535

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Entry)


class Head(msgspec.Struct, frozen=True):
    """What pairs intents with outcomes and parts with each other; the rest is not looked at."""

    stage: Stage
    request: str
    time: int
    action: str
    part: int = 1
    parts: int = 1


_head_decoder = msgspec.json.Decoder(Head)


def encode_entry(entry: Entry) -> bytes:
    """Return the canonical bytes. Raises `MalformedEntryError` if they are more than 65,535."""
    raw = _encoder.encode(entry)
    if len(raw) > MAX_ENTRY_BYTES:
        raise MalformedEntryError(
            f"An entry has at most {MAX_ENTRY_BYTES} bytes; this one has {len(raw)}. "
            "Split it into parts."
        )
    return raw


def encode_parts(entry: Entry) -> list[bytes]:
    """Return the canonical bytes, spread over as many entries as the limit asks for.

    Each part repeats everything but the lists of patients and resources, which are divided among
    them in their order. Raises `MalformedEntryError` if what has to be repeated is too large.
    """
    raw = _encoder.encode(entry)
    if len(raw) <= MAX_ENTRY_BYTES:
        return [raw]
    widest = {"part": MAX_PARTS, "parts": MAX_PARTS}
    bare = structs.replace(entry, patients=(), resources=(), **widest)
    room = MAX_ENTRY_BYTES - len(encode_entry(bare)) - len(',"patients":[],"resources":[]')
    slices: list[tuple[list[str], list[Resource]]] = [([], [])]
    left = room
    items: tuple[str | Resource, ...] = (*entry.patients, *entry.resources)
    for item in items:
        size = len(_encoder.encode(item)) + 1
        if size > left:
            slices.append(([], []))
            left = room
        left -= size
        patients, resources = slices[-1]
        if isinstance(item, Resource):
            resources.append(item)
        else:
            patients.append(item)
    return [
        encode_entry(
            structs.replace(
                entry,
                patients=tuple(patients),
                resources=tuple(resources),
                part=number,
                parts=len(slices),
            )
        )
        for number, (patients, resources) in enumerate(slices, 1)
    ]


def join_parts(parts: Sequence[Entry]) -> Entry:
    """Put the parts of one stage together again; a whole entry is its own only part.

    Raises `MalformedEntryError` if one is missing, doubled, or belongs to something else.
    """
    ordered = sorted(parts, key=lambda entry: entry.part or 1)
    wanted = ordered[0].parts or 1
    alike = {_encoder.encode(_without_lists(entry)) for entry in ordered}
    if len(alike) != 1 or [entry.part or 1 for entry in ordered] != [*range(1, wanted + 1)]:
        raise MalformedEntryError(
            f"Expected parts 1 to {wanted} of one entry, got {len(ordered)} that are not these: "
            "the writer was stopped between them, or they belong to different exchanges."
        )
    return structs.replace(
        ordered[0],
        patients=tuple(patient for entry in ordered for patient in entry.patients),
        resources=tuple(resource for entry in ordered for resource in entry.resources),
        part=None,
        parts=None,
    )


def _without_lists(entry: Entry) -> Entry:
    return structs.replace(entry, patients=(), resources=(), part=None, parts=None)


def parse_entry(raw: bytes) -> Entry:
    """Return the entry that these bytes are, and no others are.

    Raises `MalformedEntryError` for anything that `encode_entry` would not have written: other keys
    or order, white space, fractions, doubled keys, needless escapes, values that break a rule.
    """
    if len(raw) > MAX_ENTRY_BYTES:
        raise MalformedEntryError(
            f"An entry has at most {MAX_ENTRY_BYTES} bytes, these are {len(raw)}: they are not an "
            "entry of this log."
        )
    try:
        entry = _decoder.decode(raw)
        if _encoder.encode(entry) == raw:
            return entry
    except (msgspec.DecodeError, MalformedEntryError, ValueError, RecursionError):
        pass
    # What went wrong would quote the bytes, so it is not chained.
    raise MalformedEntryError(
        f"These {len(raw)} bytes are not a canonical entry (RFC 8785, version 1): another program "
        "or another version wrote them."
    )


def parse_head(raw: bytes) -> Head:
    """Return only the pairing fields: several times as fast as `parse_entry`, and less strict.

    Raises `MalformedEntryError` if one of these fields is missing or of the wrong type.
    """
    try:
        return _head_decoder.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise MalformedEntryError(
            f"These {len(raw)} bytes are no entry: stage, request, time or action is missing."
        ) from None
