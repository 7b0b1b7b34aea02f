"""Answers to "who saw this record, and why": found by the index, read from the log, proven.

Lives here: pages of exchanges (intent and outcome together), opening of sealed names when asked,
and the proof of what is shown. Before: `audit.index` and `audit.reader`. After: the command line
and the console. What may be asked stands in `audit.criteria`.

The index only proposes. Every entry shown was read from the log and checked against the question; a
row that does not fit its entry is an error, and `verify_entries` proves entries under a signed
checkpoint. What an index does not propose is not missed by reading: whoever distrusts the index
rebuilds it, or exports, which reads the log itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Self

from audit.checkpoint import verify_checkpoint
from audit.entry import join_parts, parse_entry
from audit.errors import MalformedEntryError, MalformedQueryError, VerificationError
from audit.model import FINAL_STAGES, Entry
from audit.proof import prove, verify_proof
from audit.recorder import ACTOR_FIELD, CLIENT_FIELD, PATIENT_FIELD
from keys.errors import PersonErasedError

if TYPE_CHECKING:
    from pathlib import Path

    from audit.checkpoint import SignedCheckpoint
    from audit.criteria import Criteria
    from audit.index import AuditIndex, EntrySource
    from audit.note import VerifierKey
    from audit.ports import PersonSealer

#: Stands for whoever was erased.
ERASED: Final = "«erased»"
#: Exchanges whose intent was seen and whose outcome was not yet, while the log is read through.
MAX_OPEN: Final = 100_000
BEGINNINGS: Final = frozenset({"intent", "opened"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """What the log holds about one request: index and entry of each stage, in the order of the log.

    Parts of one stage are joined and stand at the index of the first. A message of a stream and an
    entry of the log about itself stand alone.
    """

    entries: tuple[tuple[int, Entry], ...]
    #: Where all of it stands, each part of a stage included.
    indices: tuple[int, ...]

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, Entry]]) -> Self:
        """Make one of all entries of a request, whichever way they came."""
        found = dict(pairs)
        return cls(entries=_stages(found.items()), indices=tuple(sorted(found)))

    @property
    def log_index(self) -> int:
        """Where the newest of its entries stands."""
        return self.entries[-1][0]

    @property
    def newest(self) -> Entry:
        """The entry that says most: the outcome if there is one."""
        return self.entries[-1][1]

    @property
    def ended(self) -> bool:
        """Whether an outcome follows what was announced."""
        return self.newest.stage not in BEGINNINGS

    def stage(self, *names: str) -> tuple[int, Entry] | None:
        """The first entry of one of these stages."""
        return next((pair for pair in self.entries if pair[1].stage in names), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Exchanges, newest first; `before` asks for the next page and is None on the last one."""

    exchanges: tuple[Exchange, ...]
    before: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The names in one entry, opened. Erased persons are shown as such."""

    actor: str | None
    client: str | None
    patients: tuple[str, ...]


class Search:
    """Asks one index about one log."""

    def __init__(self, index: AuditIndex, log: EntrySource) -> None:
        self._index = index
        self._log = log

    def page(self, criteria: Criteria, *, limit: int = 50, before: int | None = None) -> Page:
        """Return at most `limit` exchanges of which an entry fits, newest first.

        Raises `VerificationError` if the index does not fit the log.
        """
        found: list[Exchange] = []
        while len(found) < limit:
            wanted = limit - len(found)
            rows = self._index.find(criteria, before=before, limit=wanted)
            found += self._exchanges(criteria, rows)
            if len(rows) < wanted:
                return Page(exchanges=tuple(found), before=None)
            before = rows[-1]
        return Page(exchanges=tuple(found), before=before)

    def _exchanges(self, criteria: Criteria, rows: Sequence[int]) -> Iterator[Exchange]:
        """Each exchange once: at the newest of its entries that fits."""
        read = {index: self._read(index) for index in rows}
        for index, entry in read.items():
            if not criteria.matches(entry):
                raise VerificationError(
                    f"The index proposes entry {index}, which is not what was asked for: the index "
                    "was changed or belongs to another log. Run havengate audit rebuild-index."
                )
        paired = {entry.request for entry in read.values() if entry.stage not in {"message", "log"}}
        together = self._index.of_requests(sorted(paired))
        for index, entry in read.items():
            if entry.stage in {"message", "log"}:
                yield Exchange.of([(index, entry)])
                continue
            siblings = [
                (other, read[other] if other in read else self._read(other))
                for other in together[entry.request]
            ]
            # Whoever reuses a request id gets one exchange for both, and a finding of `verify`.
            if not any(other > index and criteria.matches(sibling) for other, sibling in siblings):
                yield Exchange.of([(index, entry), *siblings])

    def _read(self, index: int) -> Entry:
        try:
            return parse_entry(self._log.entry(index))
        except (IndexError, MalformedEntryError) as error:
            raise VerificationError(
                f"The index names entry {index}, but the log has none that can be read there. "
                "Run havengate audit verify, then rebuild-index."
            ) from error


def _stages(pairs: Iterable[tuple[int, Entry]]) -> tuple[tuple[int, Entry], ...]:
    """Put the parts of each stage together; parts of which one is missing are left as they are."""
    stages: dict[str, dict[int, Entry]] = {}
    for index, entry in pairs:
        stages.setdefault(entry.stage, {})[index] = entry
    found: list[tuple[int, Entry]] = []
    for members in stages.values():
        try:
            found.append((min(members), join_parts(list(members.values()))))
        except MalformedEntryError:
            found += members.items()
    return tuple(sorted(found, key=lambda pair: pair[0]))


def with_persons(
    criteria: Criteria, sealer: PersonSealer, *, actor: str | None, patient: str | None
) -> Criteria:
    """Add persons to the question, by the ids of their keys.

    A person who was erased, or never sealed for, has none and is found nowhere. Raises
    `MalformedQueryError` without a tenant, because a person's keys belong to one.
    """
    if actor is None and patient is None:
        return criteria
    if criteria.tenant is None:
        raise MalformedQueryError("A person is known within a tenant: say --tenant as well.")
    tenant = criteria.tenant
    if actor is not None:
        criteria = replace(criteria, actors=tuple(sealer.key_ids(tenant=tenant, person=actor)))
    if patient is not None:
        criteria = replace(criteria, patients=tuple(sealer.key_ids(tenant=tenant, person=patient)))
    return criteria


def reveal(entry: Entry, sealer: PersonSealer) -> Names:
    """Open the names in an entry. Raises a `KeysError` unless each opens or was erased."""

    def opened(field: str, sealed: str | None) -> str | None:
        if sealed is None:
            return None
        try:
            return sealer.open_for_person(tenant=entry.tenant, field=field, text=sealed).decode()
        except PersonErasedError:
            return ERASED

    personal = entry.actor.sealed is not None
    return Names(
        actor=opened(ACTOR_FIELD, entry.actor.sealed) if personal else entry.actor.name,
        client=opened(CLIENT_FIELD, entry.client) if personal else entry.client,
        patients=tuple(opened(PATIENT_FIELD, sealed) or ERASED for sealed in entry.patients),
    )


def verify_entries(
    directory: Path, checkpoint: bytes, keys: Sequence[VerifierKey], found: Mapping[int, bytes]
) -> SignedCheckpoint:
    """Prove that each of these bytes stands at its index, under the published checkpoint.

    Returns the checkpoint. Raises `MalformedNoteError`, or `VerificationError` that names the first
    that does not stand there or is not published yet.
    """
    signed = verify_checkpoint(checkpoint, keys)
    size = signed.checkpoint.size
    for index, raw in found.items():
        if index >= size:
            raise VerificationError(
                f"Entry {index} is not published yet: the checkpoint covers {size}. Wait a second."
            )
        proof = prove(directory, index, checkpoint=checkpoint, size=size, entry=raw)
        verify_proof(proof, raw, keys)
    return signed


def read_exchanges(source: Iterable[tuple[int, bytes]]) -> Iterator[Exchange]:
    """Put exchanges together while a log is read through once, with bounded memory.

    An exchange comes when its outcome does, or at the end without one. If very many are open, the
    oldest comes without its outcome, which then comes by itself: nothing is left out.
    """
    waiting: dict[tuple[str, str], list[tuple[int, Entry]]] = {}
    for index, raw in source:
        entry = parse_entry(raw)
        if entry.stage in {"message", "log"}:
            yield Exchange.of([(index, entry)])
            continue
        kind = "stream" if entry.stage in {"opened", "closed"} else "exchange"
        key = (kind, entry.request)
        held = waiting.setdefault(key, [])
        held.append((index, entry))
        last = entry.part is None or sum(e.stage == entry.stage for _, e in held) == entry.parts
        if entry.stage in FINAL_STAGES and last:
            del waiting[key]
            yield Exchange.of(held)
        elif len(waiting) > MAX_OPEN:
            yield Exchange.of(waiting.pop(next(iter(waiting))))
    for held in waiting.values():
        yield Exchange.of(held)
