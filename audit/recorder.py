"""From what happens to entries: names of persons are sealed, then the entry is sequenced.

Lives here: what callers say in clear (`Act`, `End`), the sealing, and the order of things. What an
entry may say stands in `audit.model`, its bytes in `audit.entry`. Before: the gateway, `keys`, the
command line. After: the log, which gives the index once the entry is durable.

Every method returns only when the entry is durable, and raises otherwise: a `KeysError` when a name
could not be sealed, an `AuditError` when the entry is malformed or was not written. Whoever gets an
exception must not go on, because what was to happen is not recorded. Nothing is written half: all
names are sealed and all bytes made before the first append, and parts of which one is missing count
as an exchange without that stage.

Persons are named by references such as `Patient/123` or by an account's stable id. After a person
was erased, sealing for them begins a new key, so that what happens later can still be recorded;
earlier entries stay blind.
"""

from __future__ import annotations

import asyncio
import ipaddress
import uuid
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Protocol

from audit.entry import encode_entry, encode_parts
from audit.errors import MalformedEntryError
from audit.model import PERSON_TYPES, PERSONAL_KINDS, VERSION, Actor, Entry, Resource

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from audit.model import Action, ActorKind, Assurance, Decision, Outcome, Stage
    from audit.ports import PersonSealer
    from keys.ports import Clock, KeyEvent

#: What a sealed text is bound to, beside tenant and person: it opens in this place only.
ACTOR_FIELD: Final = "audit.actor"
CLIENT_FIELD: Final = "audit.client"
PATIENT_FIELD: Final = "audit.patient"
#: Stands for tenant and name where the log speaks about itself.
LOG_TENANT: Final = "havengate"


#: Tenant, field, person and name: a text is sealed for one person, and stands for no other.
_Sealed = tuple[str, str, str, str]


class Sequenced(Protocol):
    """An entry that is durable."""

    @property
    def index(self) -> int:
        """Where it stands in the log."""
        ...


class Appender(Protocol):
    """The log, for threads: its writer, or a client that waits (`audit.transport`)."""

    def append(self, entry: bytes) -> Sequenced:
        """Append and wait. Raises an `AuditError` unless the entry is durable."""
        ...


class AsyncAppender(Protocol):
    """The log, for an event loop: its writer, or a client of it."""

    def append_async(self, entry: bytes) -> Awaitable[Sequenced]:
        """Append without blocking. Raises as `Appender.append`, at once or when awaited."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Who:
    """The actor in clear: `person` for a person or device, `name` for a service or the system."""

    kind: ActorKind
    person: str | None = field(default=None, repr=False)
    name: str | None = None
    role: str | None = None
    address: str | None = field(default=None, repr=False)
    assurance: Assurance | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """What is about to happen.

    `resources` are references (`Observation/7`) or types; ids of persons among them, and all of
    `patients`, are sealed. `break_glass` is the reason code of an override.
    """

    tenant: str
    who: Who
    action: Action
    service: str | None = None
    purpose: str | None = None
    resources: tuple[str, ...] = field(default=(), repr=False)
    patients: tuple[str, ...] = field(default=(), repr=False)
    labels: tuple[str, ...] = ()
    decision: Decision | None = None
    rules: tuple[str, ...] = ()
    consent: str | None = None
    obligations: tuple[str, ...] = ()
    break_glass: str | None = None
    reason: str | None = None
    bytes_in: int | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)
    key_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What came of it. Lists add to those of the act, single values replace them if given."""

    outcome: Outcome
    status: int | None = None
    reason: str | None = None
    decision: Decision | None = None
    consent: str | None = None
    break_glass: str | None = None
    resources: tuple[str, ...] = field(default=(), repr=False)
    patients: tuple[str, ...] = field(default=(), repr=False)
    labels: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    obligations: tuple[str, ...] = ()
    bytes_in: int | None = None
    bytes_out: int | None = None
    duration_us: int | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """An intent, or an opened stream, that is durable at `index`: what its later stages refer to.

    `sealed` keeps the sealed form of the names, by tenant, field, person and name, so that later
    stages need no key for them.
    """

    request: str
    index: int
    act: Act = field(repr=False)
    sealed: Mapping[_Sealed, str] = field(repr=False)


class _Drafting:
    """What both recorders share: names, time and ids of entries to be."""

    def __init__(self, *, sealer: PersonSealer, clock: Clock, ids: Callable[[], str]) -> None:
        self._sealer = sealer
        self._clock = clock
        self._ids = ids

    def _first(self, stage: Stage, act: Act, request: str | None) -> _Draft:
        return self._make(stage, request or self._ids(), act)

    def _last(self, stage: Stage, begun: Begun, end: End, *, sequence: int | None = None) -> _Draft:
        act = _merged(begun.act, end)
        return self._make(stage, begun.request, act, begun=begun, end=end, sequence=sequence)

    def _message(self, begun: Begun, act: Act, sequence: int) -> _Draft:
        return self._make("message", begun.request, act, begun=begun, sequence=sequence)

    def _make(
        self,
        stage: Stage,
        request: str,
        act: Act,
        *,
        begun: Begun | None = None,
        end: End | None = None,
        sequence: int | None = None,
    ) -> _Draft:
        return _Draft(
            stage=stage,
            request=request,
            act=act,
            end=end,
            sequence=sequence,
            time=int(self._clock() * 1_000_000),
            sealed=dict(begun.sealed) if begun else {},
        )


class Recorder(_Drafting):
    """Makes entries and waits until they are durable. Threads may share it."""

    def __init__(
        self, log: Appender, *, sealer: PersonSealer, clock: Clock, ids: Callable[[], str]
    ) -> None:
        super().__init__(sealer=sealer, clock=clock, ids=ids)
        self._log = log

    def intent(self, act: Act, *, request: str | None = None) -> Begun:
        """Record what is about to happen, before any effect."""
        return self._begin(self._first("intent", act, request))

    def opened(self, act: Act, *, request: str | None = None) -> Begun:
        """Record a stream that is about to be opened."""
        return self._begin(self._first("opened", act, request))

    def outcome(self, begun: Begun, end: End) -> int:
        """Record what came of an intent, before anything is released. Return the entry's index."""
        return self._append(self._last("outcome", begun, end))

    def message(self, begun: Begun, act: Act, *, sequence: int) -> int:
        """Record message `sequence` (from 1) of a stream, before it is passed on."""
        return self._append(self._message(begun, act, sequence))

    def closed(self, begun: Begun, end: End, *, sequence: int) -> int:
        """Record the end of a stream, after `sequence` messages."""
        return self._append(self._last("closed", begun, end, sequence=sequence))

    def _begin(self, draft: _Draft) -> Begun:
        return draft.begun(self._append(draft))

    def _append(self, draft: _Draft) -> int:
        draft.seal(self._sealer)
        indices = [self._log.append(raw).index for raw in draft.encode()]
        return indices[0]


class AsyncRecorder(_Drafting):
    """As `Recorder`, for an event loop, which it never blocks. Tasks may share it.

    `ready(tenant, persons)` says whether sealing for these persons is arithmetic only; otherwise,
    and always without it, names are sealed in a thread.
    """

    def __init__(
        self,
        log: AsyncAppender,
        *,
        sealer: PersonSealer,
        clock: Clock,
        ids: Callable[[], str],
        ready: Callable[[str, set[str]], bool] | None = None,
    ) -> None:
        super().__init__(sealer=sealer, clock=clock, ids=ids)
        self._log = log
        self._ready = ready

    async def intent(self, act: Act, *, request: str | None = None) -> Begun:
        """As `Recorder.intent`."""
        return await self._begin(self._first("intent", act, request))

    async def opened(self, act: Act, *, request: str | None = None) -> Begun:
        """As `Recorder.opened`."""
        return await self._begin(self._first("opened", act, request))

    async def outcome(self, begun: Begun, end: End) -> int:
        """As `Recorder.outcome`."""
        return await self._append(self._last("outcome", begun, end))

    async def message(self, begun: Begun, act: Act, *, sequence: int) -> int:
        """As `Recorder.message`."""
        return await self._append(self._message(begun, act, sequence))

    async def closed(self, begun: Begun, end: End, *, sequence: int) -> int:
        """As `Recorder.closed`."""
        return await self._append(self._last("closed", begun, end, sequence=sequence))

    async def _begin(self, draft: _Draft) -> Begun:
        return draft.begun(await self._append(draft))

    async def _append(self, draft: _Draft) -> int:
        names = draft.unsealed()
        if names:
            persons = {person for _, person, _ in names}
            if self._ready is not None and self._ready(draft.act.tenant, persons):
                draft.seal(self._sealer)
            else:
                # A key that is not in memory costs a call of the key server, which blocks.
                await asyncio.to_thread(draft.seal, self._sealer)
        indices = [(await self._log.append_async(raw)).index for raw in draft.encode()]
        return indices[0]


@dataclass(slots=True, kw_only=True)
class _Draft:
    """An entry on its way: what is said in clear, and the sealed names as they become known."""

    stage: Stage
    request: str
    act: Act
    end: End | None
    sequence: int | None
    time: int
    sealed: dict[_Sealed, str]

    def begun(self, index: int) -> Begun:
        """What the later stages of this exchange refer to, once it is durable at `index`."""
        return Begun(request=self.request, index=index, act=self.act, sealed=self.sealed)

    def unsealed(self) -> list[tuple[str, str, str]]:
        """Field, person and text of all names that have no sealed form yet."""
        who = self.act.who
        names: list[tuple[str, str, str]] = []
        if who.kind in PERSONAL_KINDS and who.person:
            names.append((ACTOR_FIELD, who.person, who.person))
            if who.address is not None:
                names.append((CLIENT_FIELD, who.person, _address(who.address)))
        names += [(PATIENT_FIELD, person, person) for person in _persons(self.act)]
        return [name for name in names if (self.act.tenant, *name) not in self.sealed]

    def seal(self, sealer: PersonSealer) -> None:
        """Seal all names. Raises a `KeysError` if one cannot be: then nothing is appended."""
        tenant = self.act.tenant
        for place, person, text in self.unsealed():
            self.sealed[tenant, place, person, text] = (
                sealer.name_for_person(tenant=tenant, person=person, field=place)
                if text == person
                else sealer.seal_for_person(
                    tenant=tenant, person=person, field=place, plaintext=text.encode()
                )
            )

    def encode(self) -> list[bytes]:
        """The entry's bytes, in parts if need be."""
        act, end = self.act, self.end
        return encode_parts(
            Entry(
                v=VERSION,
                stage=self.stage,
                request=self.request,
                time=self.time,
                tenant=act.tenant,
                actor=self._actor(),
                client=self._client(),
                assurance=act.who.assurance,
                action=act.action,
                service=act.service,
                purpose=act.purpose,
                resources=_resources(act),
                patients=tuple(
                    self.sealed[act.tenant, PATIENT_FIELD, name, name] for name in _persons(act)
                ),
                labels=act.labels,
                decision=act.decision,
                rules=act.rules,
                consent=act.consent,
                obligations=act.obligations,
                break_glass=act.break_glass,
                reason=act.reason,
                bytes_in=act.bytes_in,
                counts=dict(act.counts),
                details=dict(act.details),
                key_ids=act.key_ids,
                sequence=self.sequence,
                outcome=end.outcome if end else None,
                status=end.status if end else None,
                bytes_out=end.bytes_out if end else None,
                duration_us=end.duration_us if end else None,
            )
        )

    def _actor(self) -> Actor:
        who = self.act.who
        if who.kind in PERSONAL_KINDS:
            person = who.person or ""
            sealed = self.sealed.get((self.act.tenant, ACTOR_FIELD, person, person))
            return Actor(kind=who.kind, role=who.role, sealed=sealed)
        if who.person is not None:
            raise MalformedEntryError("Only a person or device is named as a person; use `name`.")
        return Actor(kind=who.kind, role=who.role, name=who.name)

    def _client(self) -> str | None:
        who = self.act.who
        if who.address is None:
            return None
        address = _address(who.address)
        if who.kind not in PERSONAL_KINDS:
            return address
        return self.sealed[self.act.tenant, CLIENT_FIELD, who.person or "", address]


@lru_cache(maxsize=1024)
def _address(text: str) -> str:
    """Return the usual form of an IP address; a link-local zone says nothing to a reader."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        raise MalformedEntryError("The client's address is not an IP address.") from None
    return str(getattr(address, "ipv4_mapped", None) or address)


def _persons(act: Act) -> tuple[str, ...]:
    """All persons touched, each once: those named as such and those that are resources."""
    among = (ref for ref in act.resources if "/" in ref and ref.partition("/")[0] in PERSON_TYPES)
    return tuple(dict.fromkeys((*act.patients, *among)))


def _resources(act: Act) -> tuple[Resource, ...]:
    """All resources touched, each once; of persons only the type."""
    pairs = dict.fromkeys(ref.partition("/")[::2] for ref in act.resources)
    bare = dict.fromkeys((kind, "" if kind in PERSON_TYPES else name) for kind, name in pairs)
    return tuple(Resource(type=kind, id=name or None) for kind, name in bare)


def _merged(act: Act, end: End) -> Act:
    """The act as it turned out."""

    def both(first: tuple[str, ...], then: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*first, *then))) if then else first

    return replace(
        act,
        resources=both(act.resources, end.resources),
        patients=both(act.patients, end.patients),
        labels=both(act.labels, end.labels),
        rules=both(act.rules, end.rules),
        obligations=both(act.obligations, end.obligations),
        decision=end.decision or act.decision,
        consent=end.consent or act.consent,
        break_glass=end.break_glass or act.break_glass,
        reason=end.reason or act.reason,
        bytes_in=act.bytes_in if end.bytes_in is None else end.bytes_in,
        counts={**act.counts, **end.counts},
        details={**act.details, **end.details},
    )


def log_entry(
    action: Action, *, time_s: float, request: str, counts: Mapping[str, int] | None = None
) -> bytes:
    """Return an entry of the log about itself: pruned, repaired, the clock stepped back."""
    return encode_entry(
        Entry(
            v=VERSION,
            stage="log",
            request=request,
            time=max(0, int(time_s * 1_000_000)),
            tenant=LOG_TENANT,
            actor=Actor(kind="system", name=LOG_TENANT),
            action=action,
            counts=dict(counts or {}),
        )
    )


def clock_step_entry(before_s: float, after_s: float) -> bytes:
    """Return the entry that says by how much the clock went back (for `LogWriter.open`)."""
    stepped_us = max(0, int((before_s - after_s) * 1_000_000))
    counts = {"stepped_back_us": stepped_us}
    return log_entry("log.clock", time_s=after_s, request=str(uuid.uuid4()), counts=counts)


def repair_entry(*, cut_bytes: int, time_s: float) -> bytes:
    """Return the entry that says how many bytes, never acknowledged, a crash had left behind."""
    counts = {"cut_bytes": cut_bytes}
    return log_entry("log.repair", time_s=time_s, request=str(uuid.uuid4()), counts=counts)


class KeyEventLog:
    """Satisfies `keys.ports.KeyEventRecorder`: what is done to keys goes into the same log.

    An actor that is in `services` is named in clear; anybody else is a person and sealed. `record`
    returns the entry's index once it is durable and raises otherwise: then nothing may be done.
    What concerns the keys of all tenants is recorded for `tenant`, whose staff did it.
    """

    def __init__(
        self,
        log: Appender,
        *,
        sealer: PersonSealer,
        clock: Clock,
        tenant: str,
        services: frozenset[str] = frozenset({"havengate"}),
    ) -> None:
        self._log = log
        self._sealer = sealer
        self._clock = clock
        self._tenant = tenant
        self._services = services

    def record(self, event: KeyEvent) -> int:
        """Append one event of `keys`."""
        who = (
            Who(kind="service", name=event.actor)
            if event.actor in self._services
            else Who(kind="person", person=event.actor)
        )
        texts = {name: value for name, value in event.detail.items() if isinstance(value, str)}
        numbers = {name: value for name, value in event.detail.items() if isinstance(value, int)}
        draft = _Draft(
            stage=event.stage,
            request=event.request_id,
            act=Act(
                tenant=event.tenant or self._tenant,
                who=who,
                action=event.action,
                key_ids=event.key_ids,
                details=texts,
                counts=numbers,
            ),
            end=End(outcome="success" if event.succeeded else "failed")
            if event.stage == "outcome"
            else None,
            sequence=None,
            time=int(self._clock() * 1_000_000),
            sealed={},
        )
        draft.seal(self._sealer)
        indices = [self._log.append(raw).index for raw in draft.encode()]
        return indices[0]
