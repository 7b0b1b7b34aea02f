"""The plain values of `keys`: where a field stands, whose key it is, what was done and when.

No behaviour beyond validation lives here. Times are Unix seconds; `repr` shows nothing about a
person.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Literal, NamedTuple

from keys.errors import InvalidContextError

KeyKind = Literal["person", "system", "index", "pseudonym"]

MAX_NAME_CHARACTERS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldContext:
    """Where a sealed text belongs. It opens there and nowhere else.

    `field` is the path of the field within its resource, such as `Patient.name`. Raises
    `InvalidContextError` for an empty name, one of more than 1,024 characters, or one that no
    database can hold.
    """

    tenant: str
    person: str = field(repr=False)
    service: str
    field: str

    def __post_init__(self) -> None:
        for name, value in (
            ("tenant", self.tenant),
            ("person", self.person),
            ("service", self.service),
            ("field", self.field),
        ):
            check_name(name, value)


def check_name(what: str, value: str) -> None:
    """Raise `InvalidContextError` unless `value` can stand in the key table."""
    if value and len(value) <= MAX_NAME_CHARACTERS and "\0" not in value and _is_encodable(value):
        return
    raise InvalidContextError(
        f"expected a {what} of 1 to {MAX_NAME_CHARACTERS} Unicode characters without NUL, got "
        f"{len(value)} characters that do not qualify; correct the request or the route's "
        "configuration"
    )


def _is_encodable(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# A tuple, not a dataclass: it is hashed and compared for every field, and tuples do that in C.
class KeyOwner(NamedTuple):
    """Whose key: `name` is a person tag, or the name of a system, index or pseudonym key."""

    kind: KeyKind
    tenant: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRow:
    """One row of the key table. `owner_name`, `epoch` and `wrapped` are None once it is erased."""

    key_id: str
    kind: KeyKind
    tenant: str
    owner_name: str | None
    version: int
    epoch: int | None
    wrapped: str | None = field(repr=False)
    reserved: int
    created_at: float
    retired_at: float | None = None
    erased_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ErasureReceipt:
    """What was destroyed, when, and by when the last copy is dead.

    `proof` is the code of the error with which opening a text sealed just before failed; None if
    the person had no key. `backups_dead_by` is the first day (UTC) on which no backup, of the key
    table or of the key server, can bring a key back, provided epochs are rolled and trimmed on
    schedule (`EpochKeeper.check` says so). `log_index` is the entry that records the outcome.
    """

    request_id: str
    tenant: str
    key_ids: tuple[str, ...]
    pseudonyms_deleted: int
    destroyed_at: float
    backups_dead_by: date
    proof: str | None
    log_index: int
    already_erased: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RotationReport:
    """What `EpochKeeper.rotate` did.

    `resumed`: it finished an earlier one instead of rolling again.
    """

    epoch: int
    rewrapped: int
    resumed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TrimReport:
    """What `EpochKeeper.trim` did: epochs before `oldest` are gone for good. `trimmed` may be 0."""

    oldest: int
    trimmed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochStatus:
    """Counts and dates.

    `keys` counts live keys by kind, `keys_by_epoch` by the epoch that wraps them.
    """

    oldest_epoch: int
    current_epoch: int
    keys: Mapping[str, int]
    keys_by_epoch: Mapping[int, int]
    erased_keys: int
    roll_due_at: float
    #: When the oldest epoch that is no longer current may be destroyed; None if there is none.
    trim_due_at: float | None
    overdue: tuple[Literal["roll", "rewrap", "trim"], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """Result of opening every wrapped key once. Sound if both tuples are empty."""

    status: EpochStatus
    checked: int
    #: Ids of keys that the key server refuses to open.
    broken: tuple[str, ...]
    #: Ids of live keys whose epoch is already destroyed.
    below_oldest: tuple[str, ...]
    #: Persons whose erasure was begun and whose outcome is not in the log: erase them again.
    unfinished_erasures: int

    @property
    def sound(self) -> bool:
        """Whether every live key opens and no erasure is half done."""
        return not (self.broken or self.below_oldest or self.unfinished_erasures)
