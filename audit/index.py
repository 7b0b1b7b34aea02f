"""The search index: disposable, made from the log alone, without any key.

Lives here: bringing the index up to the log, noticing that it belongs to another one, and finding
candidates. Before: the log (`audit.reader`). After: `audit.search`, which reads every candidate
from the log again. Tables are in `audit.index_store`.

Persons are indexed by the id of the key that sealed them (the part between the dots of
`hg1.<key id>.<data>`). Whoever may use the keyring finds a person's key ids and by them the
entries; once the person is erased nothing leads from the person to the key id any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import msgspec
from sqlalchemy import ColumnElement, Select, delete, func, select, update

from audit.criteria import Criteria, code_words, key_id
from audit.errors import MalformedEntryError
from audit.index_store import FORMAT, Rows, Store, entries, labels, patients, rules, state
from audit.merkle import leaf_hash

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Table

#: A batch is stored once it has this many rows; it bounds memory and the loss of a crash.
BATCH_ROWS = 50_000


class EntrySource(Protocol):
    """Entries of one log as found on the disk; `audit.reader.LogReader` is one."""

    origin: str

    def size(self) -> int:
        """How many entries there are."""
        ...

    def entry(self, index: int) -> bytes:
        """One entry."""
        ...

    def read(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes]]:
        """Index and bytes, in order."""
        ...


class _Actor(msgspec.Struct, frozen=True):
    sealed: str | None = None


class _Resource(msgspec.Struct, frozen=True):
    type: str
    id: str | None = None


class _Indexed(msgspec.Struct, frozen=True):
    """What the index takes from an entry. Read without the model's checks, which cost more."""

    stage: str
    request: str
    time: int
    tenant: str
    action: str
    actor: _Actor
    service: str | None = None
    decision: str | None = None
    outcome: str | None = None
    reason: str | None = None
    break_glass: str | None = None
    patients: list[str] = []
    labels: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    obligations: tuple[str, ...] = ()
    resources: list[_Resource] = []


_decode = msgspec.json.Decoder(_Indexed).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Refreshed:
    """What `refresh` did: entries added, entries covered, and why it began anew, if it did."""

    added: int
    position: int
    rebuilt: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    format: int
    origin: str
    first: int
    position: int
    last_leaf: str


def _ignore(_position: int) -> None:
    """Tell nobody about progress."""


class AuditIndex:
    """One index in one database. Thread-safe. Failures of the database: `IndexUnavailableError`."""

    def __init__(self, url: str) -> None:
        """Open the index, or make an empty one. Raises `AuditConfigurationError` for a bad URL."""
        self._store = Store(url)
        try:
            self._store.create()
        except BaseException:
            self._store.close()
            raise

    @classmethod
    def anew(cls, url: str) -> Self:
        """Throw away what is there, damaged or not, and open an empty index."""
        store = Store(url)
        try:
            store.discard()
        finally:
            store.close()
        return cls(url)

    def close(self) -> None:
        """Close all connections."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def position(self) -> int:
        """Index of the first entry that is not indexed yet."""
        found = self._state()
        return 0 if found is None else found.position

    def refresh(
        self,
        log: EntrySource,
        *,
        first: int = 0,
        progress: Callable[[int], None] = _ignore,
    ) -> Refreshed:
        """Index what the log has and the index has not, in batches stored whole or not at all.

        `first` is the first entry that was not pruned. An index of another log, or one that is
        ahead of a restored log, is emptied first. May be repeated, interrupted, and run twice at
        once.
        """
        reason = self._why_anew(log, first)
        if reason is not None:
            self._begin(log.origin, first)
        added = 0
        while True:
            position = self.position()
            for rows, last in _batches(log, position):
                if not self._add(rows, position, last):
                    # Somebody else indexes this log too: go on from where they are.
                    break
                added += len(rows.entries)
                position += len(rows.entries)
                progress(position)
            else:
                return Refreshed(added=added, position=position, rebuilt=reason)

    def forget(self, before: int) -> None:
        """Remove the rows of pruned entries. Their words match nothing any more."""
        with self._store.translated(), self._store.engine.begin() as connection:
            for table in (entries, patients, labels, rules):
                connection.execute(delete(table).where(table.c.log_index < before))
            moved = update(state).where(state.c.first < before).values(first=before)
            connection.execute(moved)

    def find(self, criteria: Criteria, *, before: int | None = None, limit: int = 50) -> list[int]:
        """Indices of entries that may fit, newest first, all below `before`."""
        if criteria.actors == () or criteria.patients == ():
            return []
        query = self._select(criteria, before).limit(limit)
        with self._store.translated(), self._store.engine.connect() as connection:
            return [row.log_index for row in connection.execute(query)]

    def of_requests(self, requests: Sequence[str], *, limit: int = 10_000) -> dict[str, list[int]]:
        """Indices of all entries of these exchanges, messages of streams left out, oldest first."""
        query = (
            select(entries.c.request, entries.c.log_index)
            .where(entries.c.request.in_(requests), entries.c.stage != "message")
            .order_by(entries.c.log_index)
            .limit(limit)
        )
        found: dict[str, list[int]] = {request: [] for request in requests}
        with self._store.translated(), self._store.engine.connect() as connection:
            for request, index in connection.execute(query):
                found[request].append(index)
        return found

    def count(self) -> int:
        """How many entries are indexed."""
        with self._store.translated(), self._store.engine.connect() as connection:
            return connection.execute(select(func.count()).select_from(entries)).scalar_one()

    def _select(self, asked: Criteria, before: int | None) -> Select[tuple[int]]:
        """Begin with the table that narrows most and go through it in the order of the log."""
        order: ColumnElement[int] = entries.c.log_index
        query: Select[Any] = select(entries.c.log_index).where(*_conditions(asked))
        for table, value in ((labels, asked.label), (rules, asked.rule)):
            if value is not None:
                query = query.join(table, table.c.log_index == entries.c.log_index)
                query = query.where(_key(table) == value)
                order = table.c.log_index
        if asked.words:
            query, order = self._store.with_words(query, asked.words)
        if before is not None:
            query = query.where(order < before)
        return query.order_by(order.desc())

    def _state(self) -> _State | None:
        with self._store.translated(), self._store.engine.connect() as connection:
            row = connection.execute(select(state)).mappings().one_or_none()
        return None if row is None else _State(**row)

    def _why_anew(self, log: EntrySource, first: int) -> str | None:
        found = self._state()
        if found is None:
            return "there was none"
        if (found.format, found.origin) != (FORMAT, log.origin):
            return "it belongs to another log or version"
        if found.position > log.size():
            return "it is ahead of the log, which was restored from an older copy"
        if found.position < first:
            return "the log was pruned beyond it"
        if found.position == max(first, found.first):
            return None
        last = leaf_hash(log.entry(found.position - 1)).hex()
        return None if last == found.last_leaf else "the log has another entry where it ends"

    def _begin(self, origin: str, first: int) -> None:
        found = self._state()
        if found is not None and found.format != FORMAT:
            # Its tables may be of another shape.
            self._store.discard()
            self._store.create()
        mark = "?" if self._store.is_sqlite else "%s"
        with self._store.writing() as cursor:
            self._store.empty(cursor)
            cursor.execute(
                f"INSERT INTO audit_index_state VALUES ({', '.join([mark] * 5)})",  # noqa: S608 - placeholders
                (FORMAT, origin, first, first, ""),
            )

    def _add(self, rows: Rows, start: int, last_leaf: str) -> bool:
        mark = "?" if self._store.is_sqlite else "%s"
        with self._store.writing() as cursor:
            cursor.execute(
                f"UPDATE audit_index_state SET position = {mark}, last_leaf = {mark} "  # noqa: S608 - placeholders
                f"WHERE position = {mark}",
                (start + len(rows.entries), last_leaf, start),
            )
            if cursor.rowcount != 1:
                return False
            self._store.insert(cursor, rows)
        return True


def _conditions(asked: Criteria) -> Iterator[ColumnElement[bool]]:
    """What can be said about the columns of `entries`."""
    if asked.patients is not None:
        touched = select(patients.c.log_index).where(patients.c.key_id.in_(asked.patients))
        yield entries.c.log_index.in_(touched)
    if asked.actors is not None:
        yield entries.c.actor_key.in_(asked.actors)
    if asked.since_us is not None:
        yield entries.c.time >= asked.since_us
    if asked.until_us is not None:
        yield entries.c.time < asked.until_us
    for name in ("tenant", "stage", "request", "service", "action", "decision", "outcome"):
        value = getattr(asked, name)
        if value is not None:
            yield entries.c[name] == value


def _key(table: Table) -> Any:
    return next(iter(table.c))


def _batches(log: EntrySource, start: int) -> Iterator[tuple[Rows, str]]:
    """Rows, and the leaf hash of the last entry in them."""
    rows, raw = Rows(), b""
    for index, raw in log.read(start):
        _index(rows, index, raw)
        if len(rows) >= BATCH_ROWS:
            yield rows, leaf_hash(raw).hex()
            rows = Rows()
    if rows.entries:
        yield rows, leaf_hash(raw).hex()


def _index(rows: Rows, index: int, raw: bytes) -> None:
    try:
        entry = _decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise MalformedEntryError(
            f"Entry {index} of the log was not written by Havengate. Run havengate audit verify."
        ) from None
    rows.entries.append(
        (
            index,
            entry.time,
            entry.stage,
            entry.request,
            entry.tenant,
            key_id(entry.actor.sealed),
            entry.service,
            entry.action,
            entry.decision,
            entry.outcome,
        )
    )
    for sealed in entry.patients:
        rows.patients.append((sealed.split(".", 2)[1], index))
    for label in entry.labels:
        rows.labels.append((label, index))
    for rule in entry.rules:
        rows.rules.append((rule, index))
    words = code_words(
        entry.action,
        entry.service,
        entry.reason,
        entry.break_glass,
        entry.labels,
        entry.rules,
        entry.obligations,
    )
    for resource in entry.resources:
        words += f" {resource.type} {resource.id or ''}"
    rows.words.append((index, words))
