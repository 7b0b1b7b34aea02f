"""Protected members of JSON records: sealed on the way to the app, opened on the way back.

A sealed value is one text at the same place. Inside stands first of which kind it was, so that a
number comes back as a number: `s` and the text itself, or `j` and its JSON. `null` is not sealed.

Search: the blind-index token of a value stands in the member beside it, called `<name>_index`, and
a query parameter that is called as `index` says is asked as `<index>_index=<token>`. That works for
an app that keeps members which it does not know and can filter by them, and for no other.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlencode

from gateway.content.bodies import parameters
from gateway.content.pointers import DROP, JSON, Drop, Pointer, parse_pointer
from gateway.core.enforcement import Sealer
from gateway.errors import (
    BadRequestError,
    GatewayConfigurationError,
    UnavailableError,
    UnsupportedError,
    UpstreamContentError,
)
from gateway.settings import FieldSettings
from keys.errors import KeysError, PersonErasedError, UnknownKeyError, UnsealError
from keys.sealed import looks_sealed

#: What stands in place of a value that nobody may see.
MASK: Final = "***"
INDEX_SUFFIX: Final = "_index"

_PARAMETER = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}").fullmatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Protected:
    """One protected place. `name` binds what is sealed to it."""

    name: str
    pointer: Pointer
    seal: bool
    index: str
    mask: bool


class JSONFields:
    """What is protected in the records of one service. Made by `compile_fields`."""

    def __init__(self, by_type: dict[str, tuple[Protected, ...]]) -> None:
        self._by_type = by_type

    def of(self, type_: str) -> tuple[Protected, ...]:
        """What is protected in records of a type."""
        return self._by_type.get(type_, ())

    def pointers(self, type_: str) -> tuple[Pointer, ...]:
        """Where something protected stands, or a token that is made here."""
        found = self.of(type_)
        tokens = (one.pointer.sibling(INDEX_SUFFIX) for one in found if one.index)
        return (*(one.pointer for one in found), *tokens)

    def protect(
        self, record: JSON, type_: str, *, person: str, service: str, sealer: Sealer
    ) -> JSON:
        """The record as the app keeps it. `person` is `Patient/<id>`.

        Raises `UnsupportedError` for a value that is a mask, claims to be sealed, or is a token,
        and `UnavailableError` without keys.
        """
        for one in self.of(type_):
            if one.mask:
                _refuse_masks(one, record)
            if one.index and one.pointer.sibling(INDEX_SUFFIX).find(record):
                raise UnsupportedError(f"Leave out what ends in “{INDEX_SUFFIX}”: it is made here.")
            if not one.seal:
                continue
            if one.index:
                record = _indexed(record, one, service=service, sealer=sealer)
            record = one.pointer.changed(
                record, _sealing(one, person=person, service=service, sealer=sealer)
            )
        return record

    def sealed_texts(self, record: JSON, type_: str) -> list[str]:
        """The sealed texts in a record, whose keys `unprotect` needs in memory."""
        return [
            value
            for one in self.of(type_)
            if one.seal
            for value in one.pointer.find(record)
            if isinstance(value, str) and looks_sealed(value)
        ]

    def unprotect(
        self, record: JSON, type_: str, *, person: str, service: str, sealer: Sealer
    ) -> JSON:
        """Open what was sealed; what is not (an app's older content) stays as it is.

        The values of a person who was erased are `null`. Raises `UpstreamContentError` for what is
        not authentic.
        """
        for one in self.of(type_):
            if one.seal:
                record = one.pointer.changed(
                    record, _opening(one, person=person, service=service, sealer=sealer)
                )
        return record

    def cleaned(self, record: JSON, type_: str) -> JSON:
        """The record without tokens, and with the mask where a value is masked for everybody."""
        for one in self.of(type_):
            if one.index:
                record = one.pointer.sibling(INDEX_SUFFIX).changed(record, lambda _: DROP)
            if one.mask:
                record = one.pointer.changed(record, masked)
        return record

    def misspelt(self, record: JSON, type_: str) -> bool:
        """Whether some app would find a protected member where it is not protected."""
        return any(
            one.pointer.misspelt(record)
            or bool(one.index and one.pointer.sibling(INDEX_SUFFIX).misspelt(record))
            for one in self.of(type_)
        )

    def hidden_from_all(self, record: JSON, type_: str) -> bool:
        """Whether a value is there that nobody may see."""
        return any(
            value is not None
            for one in self.of(type_)
            if one.mask
            for value in one.pointer.find(record)
        )

    def query(self, query: str, type_: str, *, service: str, sealer: Sealer) -> str:
        """The query with values that are searched for replaced by tokens.

        Raises `BadRequestError` for a token that somebody else made.
        """
        indexed = {one.index: one for one in self.of(type_) if one.index}
        if not indexed or not query:
            return query
        asked: list[tuple[str, str]] = []
        for name, value in parameters(query):
            if name.removesuffix(INDEX_SUFFIX) in indexed and name.endswith(INDEX_SUFFIX):
                raise BadRequestError("Ask for the value itself, not for what stands for it.")
            one = indexed.get(name)
            if one is None:
                asked.append((name, value))
                continue
            tokens = sealer.tokens_for_search(service=service, field=one.name, value=_normal(value))
            asked += [(name + INDEX_SUFFIX, token) for token in tokens]
        return urlencode(asked)


def masked(value: JSON) -> JSON:
    """What shows only that there is a value."""
    return None if value is None else MASK


def _normal(value: JSON) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value)
    return unicodedata.normalize("NFKC", text).casefold().strip().encode("utf-8", "surrogatepass")


def _refuse_masks(one: Protected, record: JSON) -> None:
    if MASK in one.pointer.find(record):
        raise UnsupportedError("What is masked cannot be written back: leave that member out.")


def _sealing(
    one: Protected, *, person: str, service: str, sealer: Sealer
) -> Callable[[JSON], JSON]:
    def seal(value: JSON) -> JSON:
        if value is None:
            return None
        if isinstance(value, str):
            if looks_sealed(value):
                raise UnsupportedError("A value claims to be sealed already: send the plain one.")
            plain = b"s" + value.encode("utf-8", "surrogatepass")
        else:
            plain = b"j" + json.dumps(value, separators=(",", ":")).encode("ascii")
        try:
            return sealer.seal(person=person, service=service, field=one.name, plaintext=plain)
        except KeysError as error:
            raise UnavailableError("Keys cannot be had.", "gateway.keys") from error

    return seal


def _opening(
    one: Protected, *, person: str, service: str, sealer: Sealer
) -> Callable[[JSON], JSON]:
    def unseal(value: JSON) -> JSON:
        if not isinstance(value, str) or not looks_sealed(value):
            return value
        try:
            plain = sealer.unseal(person=person, service=service, field=one.name, text=value)
            if plain[:1] == b"s":
                return plain[1:].decode("utf-8", "surrogatepass")
            if plain[:1] == b"j":
                return json.loads(plain[1:])
        except PersonErasedError:
            return None
        except (UnsealError, UnknownKeyError, ValueError, RecursionError) as error:
            raise _not_authentic() from error
        except KeysError as error:
            raise UnavailableError("Keys cannot be had.", "gateway.keys") from error
        raise _not_authentic()

    return unseal


def _not_authentic() -> UpstreamContentError:
    return UpstreamContentError(
        "A sealed value in the app's answer does not open as what it should be; it was changed, or "
        "moved from another record. See which record it is and restore it from a backup."
    )


def _indexed(record: JSON, one: Protected, *, service: str, sealer: Sealer) -> JSON:
    """The record with the tokens of the values in the members beside them."""
    name = one.pointer.steps[-1]

    def add(parent: JSON) -> JSON | Drop:
        if not isinstance(parent, dict) or name not in parent:
            return parent
        if parent[name] is None:
            # What is taken away must not be found any more.
            return {**parent, name + INDEX_SUFFIX: None}
        token = sealer.token_for_write(service=service, field=one.name, value=_normal(parent[name]))
        return {**parent, name + INDEX_SUFFIX: token}

    return Pointer(one.pointer.steps[:-1]).changed(record, add)


def compile_fields(
    settings: Sequence[FieldSettings], *, service: str, types: dict[str, bool]
) -> JSONFields:
    """Check and compile. `types` are those of the rules, and whether each has patients.

    Raises `GatewayConfigurationError` with the route and what to write instead.
    """
    by_type: dict[str, list[Protected]] = {}
    for one in settings:
        type_, _, pointer = one.path.partition(":")
        if type_ not in types:
            raise _wrong(service, f"no rule has the type of the field {one.path}: add one")
        if not (one.seal or one.mask):
            raise _wrong(service, f"expected seal or mask for {one.path}: neither is set")
        if one.seal and not types[type_]:
            raise _wrong(
                service,
                f"{one.path} would be sealed under the key of a patient: say in every rule for "
                f"{type_} where the patient stands",
            )
        try:
            compiled = parse_pointer(pointer)
        except ValueError as error:
            raise _wrong(service, str(error)) from error
        _check_index(one, compiled, service)
        mine = by_type.setdefault(type_, [])
        for other in mine:
            if compiled.covers(other.pointer) or other.pointer.covers(compiled):
                raise _wrong(service, f"{one.path} and {other.name} overlap: name one of them")
        mine.append(
            Protected(
                name=one.path, pointer=compiled, seal=one.seal, index=one.index, mask=one.mask
            )
        )
    return JSONFields({name: tuple(found) for name, found in by_type.items()})


def _check_index(one: FieldSettings, pointer: Pointer, service: str) -> None:
    if not pointer.steps:
        raise _wrong(service, f"expected a member of the record in {one.path}, got all of it")
    if not one.index:
        return
    if not one.seal or not _PARAMETER(one.index):
        raise _wrong(service, f"index of {one.path} is for sealed fields, and a word")
    if pointer.steps[-1] == "*" or pointer.steps[-1].isdecimal():
        raise _wrong(service, f"only a member with a name can be searched, not {one.path}")


def _wrong(service: str, what: str) -> GatewayConfigurationError:
    return GatewayConfigurationError(f"Route “{service}”: {what}.")
