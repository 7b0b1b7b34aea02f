"""What an audit entry may say: its parts, and the rule for each of them.

Lives here: `Entry` and the structs inside it, the closed vocabularies, and the checks that run
whenever one is made or read. Lives elsewhere: bytes (`audit.entry`), how persons get sealed
(`audit.recorder`).

The checks keep out what must never be in a log: bodies, tokens and free text. Every string is a
word from a closed set, an identifier of bounded length over a small alphabet, or text that `keys`
has sealed. No field takes a space, a quote, a newline or anything that is not ASCII; nothing may
begin like a JSON Web Token; codes are made of words, not of random characters. What form alone
cannot tell is a secret that stands where a resource id belongs: callers pass ids from routes, never
query strings or headers.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal, get_args

import msgspec
from msgspec.structs import force_setattr

from audit.errors import MalformedEntryError

if TYPE_CHECKING:
    from collections.abc import Callable

VERSION: Final = 1
#: The largest integer that every JSON reader keeps exact (RFC 8785 section 3.2.2.3, RFC 7493).
MAX_INTEGER: Final = 2**53 - 1
#: More parts than this are refused. They hold the names of some 400,000 patients.
MAX_PARTS: Final = 1024
#: Most names in `counts` and in `details`.
MAX_NAMES: Final = 32

Stage = Literal["intent", "outcome", "opened", "message", "closed", "log"]
ActorKind = Literal["person", "service", "device", "anonymous", "system"]
Decision = Literal["allow", "deny", "none"]
Outcome = Literal["success", "denied", "failed", "aborted"]

#: Interactions of FHIR and of sign-in, what is done to the log itself, to keys, and in studies.
Action = Literal[
    "read", "history", "search", "create", "update", "patch", "delete", "execute",
    "connect", "export", "disclose", "consent", "login", "logout", "stepup", "admin",
    "log.prune", "log.repair", "log.clock",
    "keys.epoch.roll", "keys.epoch.rewrap", "keys.epoch.trim",
    "keys.person.erase", "keys.index.rotate",
    "keys.pseudonym.request", "keys.pseudonym.approve", "keys.pseudonym.reveal",
    "keys.officer.create",
    "study.propose", "study.approve", "study.publish", "study.run", "study.reserve",
    "study.spend", "study.mend", "study.refuse", "study.release", "study.withdraw",
]  # fmt: skip

STAGES: Final[frozenset[str]] = frozenset(get_args(Stage))
ACTOR_KINDS: Final[frozenset[str]] = frozenset(get_args(ActorKind))
DECISIONS: Final[frozenset[str | None]] = frozenset({None, *get_args(Decision)})
OUTCOMES: Final[frozenset[str]] = frozenset(get_args(Outcome))
ACTIONS: Final[frozenset[str]] = frozenset(get_args(Action))

#: FHIR resources whose id names a person: they appear sealed in `patients`, never in `resources`.
PERSON_TYPES: Final = frozenset({"Patient", "Practitioner", "RelatedPerson", "Person"})
#: Actors that are, or belong to, a natural person: their name and address are sealed.
PERSONAL_KINDS: Final = frozenset({"person", "device"})
NAMED_KINDS: Final = frozenset({"service", "system"})
#: Stages that end an exchange or stream, and so carry an `outcome`.
FINAL_STAGES: Final = frozenset({"outcome", "closed"})

# None of them matches the beginning of a JSON Web Token, `eyJ`, which is the base64 of `{"`.
# A segment of a code is SHOUTED, lower-case or camelCase, as names are and random text is not.
# One label of HL7's is spelt as none of these.
_SEGMENT = (
    "(?:42CFRPart2|[A-Z0-9]{1,24}|(?=[A-Za-z0-9]{1,24}(?![A-Za-z0-9]))[a-z0-9]*(?:[A-Z][a-z0-9]+)*)"
)
_REQUEST = re.compile(r"(?!eyJ)[A-Za-z0-9][A-Za-z0-9-]{0,63}").fullmatch
_CODE = re.compile(rf"(?!eyJ){_SEGMENT}(?:[._:/-]{_SEGMENT}){{0,5}}").fullmatch
_PURPOSE = re.compile(r"[A-Z][A-Z0-9]{1,23}").fullmatch
_TYPE = re.compile(r"(?!eyJ)[A-Za-z]{1,48}").fullmatch
_ID = re.compile(r"(?!eyJ)[A-Za-z0-9._~-]{1,64}").fullmatch
_REFERENCE = re.compile(r"(?!eyJ)[A-Za-z]{1,48}/(?!eyJ)[A-Za-z0-9.-]{1,64}").fullmatch
_VALUE = re.compile(r"(?!eyJ)[A-Za-z0-9][A-Za-z0-9._:+-]{0,63}").fullmatch
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}").fullmatch
_ADDRESS = re.compile(r"[0-9a-f.:]{2,45}").fullmatch
_KEY_ID = re.compile(r"[A-Za-z0-9_-]{12}").fullmatch
_SEALED = re.compile(r"hg1\.[A-Za-z0-9_-]{1,64}\.[A-Za-z0-9_-]{16,1024}").fullmatch

_CODE_HELP = "one to six words of at most 24 letters or digits, joined by one of . _ : / -"
_ID_HELP = "at most 64 of A-Z a-z 0-9 . _ ~ -"
_SEALED_HELP = "text sealed by `keys`, of the form hg1.<key id>.<data>"


def _refuse(field: str, expected: str) -> MalformedEntryError:
    return MalformedEntryError(
        f"An entry's `{field}` must be {expected}. What was given is not shown, because it may be "
        "secret; correct the caller."
    )


def _text(field: str, value: str | None, matches: Callable[[str], object], expected: str) -> None:
    if value is not None and (type(value) is not str or not matches(value)):
        raise _refuse(field, expected)


def _integer(field: str, value: int | None, least: int = 0, most: int = MAX_INTEGER) -> None:
    if value is not None and (type(value) is not int or not least <= value <= most):
        raise _refuse(field, f"an integer from {least} to {most}")


# The same few codes come with every entry: what was found right is not looked at again.
@lru_cache(maxsize=8192, typed=True)
def _check_code(field: str, value: str | None) -> None:
    _text(field, value, _CODE, _CODE_HELP)


@lru_cache(maxsize=8192, typed=True)
def _check_codes(field: str, values: tuple[str, ...]) -> None:
    if type(values) is not tuple or None in values:
        raise _refuse(field, "a tuple of codes")
    for value in values:
        _text(field, value, _CODE, _CODE_HELP)


@lru_cache(maxsize=1024, typed=True)
def _sorted_names(field: str, names: tuple[str, ...]) -> tuple[str, ...]:
    if len(names) > MAX_NAMES or any(type(n) is not str or not _NAME(n) for n in names):
        raise _refuse(field, f"at most {MAX_NAMES} values, named by at most 32 of a-z 0-9 _")
    return tuple(sorted(names))


def _sorted_map[T](field: str, given: dict[str, T]) -> dict[str, T]:
    """Return a private copy in the order of RFC 8785."""
    if type(given) is not dict or None in given.values():
        raise _refuse(field, "a dict of values")
    return {name: given[name] for name in _sorted_names(field, tuple(given))}


class _Part(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """Immutable, without defaults in its bytes, and closed to keys that it does not know."""


class Actor(_Part, frozen=True, kw_only=True):
    """Who acts. Persons and devices are `sealed`; only services and the system have a `name`."""

    kind: ActorKind
    name: str | None = None
    role: str | None = None
    sealed: str | None = None

    def __post_init__(self) -> None:
        """Refuse a person in clear and a service without a name."""
        if self.kind not in ACTOR_KINDS:
            raise _refuse("actor.kind", "one of " + ", ".join(sorted(ACTOR_KINDS)))
        if (self.sealed is not None) != (self.kind in PERSONAL_KINDS):
            raise _refuse("actor.sealed", "given for a person or device, and only for these")
        if (self.name is not None) != (self.kind in NAMED_KINDS):
            raise _refuse("actor.name", "given for a service or the system, and only for these")
        _check_code("actor.name", self.name)
        _check_code("actor.role", self.role)
        _text("actor.sealed", self.sealed, _SEALED, _SEALED_HELP)


class Assurance(_Part, frozen=True, kw_only=True):
    """How sure the gateway is of the actor: the level, and how old the second factor is."""

    age_s: int | None = None
    level: str

    def __post_init__(self) -> None:
        """Check both."""
        _integer("assurance.age_s", self.age_s)
        _text("assurance.level", self.level, _CODE, _CODE_HELP)


class Resource(_Part, frozen=True, kw_only=True):
    """One resource, or (without `id`) any of a type. Persons never carry their id here."""

    id: str | None = None
    type: str

    def __post_init__(self) -> None:
        """Check both, and keep persons' ids out."""
        _text("resources.type", self.type, _TYPE, "at most 48 letters")
        if self.id is not None:
            _text("resources.id", self.id, _ID, _ID_HELP)
            if self.type in PERSON_TYPES:
                raise _refuse("resources.id", "absent for a person, who belongs into `patients`")


class Entry(_Part, frozen=True, kw_only=True):
    """One entry of the log. Fields stand in the order of their bytes (RFC 8785: sorted).

    `time` is Unix time in microseconds, `duration_us` microseconds, `bytes_in` and `bytes_out`
    bytes. `patients` are sealed references to the persons touched. `part` of `parts` says that the
    lists of one exchange did not fit one entry; every part repeats all other fields. `sequence`
    numbers what happens in a stream. `counts` and `details` hold what an action has beside that:
    numbers, codes, key ids and dates.
    """

    action: Action
    actor: Actor
    assurance: Assurance | None = None
    break_glass: str | None = None
    bytes_in: int | None = None
    bytes_out: int | None = None
    client: str | None = None
    consent: str | None = None
    counts: dict[str, int] = {}
    decision: Decision | None = None
    details: dict[str, str] = {}
    duration_us: int | None = None
    key_ids: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    obligations: tuple[str, ...] = ()
    outcome: Outcome | None = None
    part: int | None = None
    parts: int | None = None
    patients: tuple[str, ...] = ()
    purpose: str | None = None
    reason: str | None = None
    request: str
    resources: tuple[Resource, ...] = ()
    rules: tuple[str, ...] = ()
    sequence: int | None = None
    service: str | None = None
    stage: Stage
    status: int | None = None
    tenant: str
    time: int
    v: int

    def __post_init__(self) -> None:
        """Apply every rule. Raises `MalformedEntryError`, which names the field, not the value."""
        try:
            self._check_words()
            self._check_texts()
        except TypeError:
            # An unhashable or foreign type where a string or tuple belongs.
            raise _refuse("fields", "of the types that the model names") from None
        self._check_numbers()
        if self.counts or self.details:
            self._check_maps()

    def _check_words(self) -> None:
        if type(self.v) is not int or self.v != VERSION:
            raise _refuse("v", f"{VERSION}")
        if self.stage not in STAGES:
            raise _refuse("stage", "one of " + ", ".join(sorted(STAGES)))
        if self.action not in ACTIONS:
            raise _refuse("action", "one of " + ", ".join(sorted(ACTIONS)))
        if self.decision not in DECISIONS:
            raise _refuse("decision", "allow, deny or none")
        if (self.outcome is not None) != (self.stage in FINAL_STAGES):
            raise _refuse("outcome", "given in the stages outcome and closed, and only there")
        if self.outcome is not None and self.outcome not in OUTCOMES:
            raise _refuse("outcome", "one of " + ", ".join(sorted(OUTCOMES)))

    def _check_texts(self) -> None:
        if type(self.actor) is not Actor:
            raise _refuse("actor", "an Actor")
        if self.assurance is not None and type(self.assurance) is not Assurance:
            raise _refuse("assurance", "an Assurance")
        if None in (self.tenant, self.request):
            raise _refuse("tenant, request", "given")
        _text("request", self.request, _REQUEST, "at most 64 of A-Z a-z 0-9 -")
        if self.client is not None:
            matches = _SEALED if self.actor.kind in PERSONAL_KINDS else _ADDRESS
            _text("client", self.client, matches, "an IP address, sealed if the actor is a person")
        _check_code("tenant", self.tenant)
        _check_code("service", self.service)
        _check_code("reason", self.reason)
        _check_code("break_glass", self.break_glass)
        _text("purpose", self.purpose, _PURPOSE, "a code of HL7 PurposeOfUse, such as TREAT")
        self._check_consent()
        self._check_lists()

    def _check_consent(self) -> None:
        if self.consent is not None:
            _text("consent", self.consent, _REFERENCE, "a reference such as Consent/<id>")
            if self.consent.partition("/")[0] in PERSON_TYPES:
                raise _refuse("consent", "a reference to a consent, not to a person")

    def _check_lists(self) -> None:
        for values in (self.patients, self.resources, self.key_ids):
            if type(values) is not tuple:
                raise _refuse("patients, resources, key_ids", "tuples")
        _check_codes("labels", self.labels)
        _check_codes("rules", self.rules)
        _check_codes("obligations", self.obligations)
        for key_id in self.key_ids:
            _text("key_ids", key_id, _KEY_ID, "the id of a key, 12 characters of base64url")
        for patient in self.patients:
            if type(patient) is not str or not _SEALED(patient):
                raise _refuse("patients", _SEALED_HELP)
        for resource in self.resources:
            if type(resource) is not Resource:
                raise _refuse("resources", "made of Resource")

    def _check_numbers(self) -> None:
        _integer("time", self.time)
        for value in (self.bytes_in, self.bytes_out, self.duration_us, self.sequence):
            if value is not None:
                _integer("bytes_in, bytes_out, duration_us, sequence", value)
        if self.status is not None:
            _integer("status", self.status, 100, 999)
        if self.part is not None or self.parts is not None:
            if self.part is None or self.parts is None:
                raise _refuse("part, parts", "given together")
            _integer("parts", self.parts, 2, MAX_PARTS)
            _integer("part", self.part, 1, self.parts)

    def _check_maps(self) -> None:
        if self.counts:
            force_setattr(self, "counts", _sorted_map("counts", self.counts))
        if self.details:
            force_setattr(self, "details", _sorted_map("details", self.details))
        for number in self.counts.values():
            _integer("counts", number)
        for value in self.details.values():
            _text("details", value, _VALUE, "at most 64 of A-Z a-z 0-9 . _ : + -")
