"""The key table: every data key, wrapped, with its owner, version, epoch and life.

Here are the statements on `data_keys`, `key_state` and `key_epochs`; each method is one
transaction. Keys in the clear never come near this module. Before it: `keys.database`. After it:
`keys.store`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, and_, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from keys.database import KeyDatabase
from keys.errors import KeyTableError
from keys.model import KeyOwner, KeyRow
from keys.schema import data_keys, key_epochs, key_erasures, key_state

#: SQLite allows 32,766 bound values in a statement; PostgreSQL 65,535.
_CHUNK = 5_000


class EpochGoneError(KeyTableError):
    """A key was wrapped by an epoch that has been, or is about to be, destroyed: wrap it again."""

    code = "keys.epoch_gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrapped:
    """A new wrapping for one row, valid only if the row still carries the `old` one."""

    key_id: str
    old: str = field(repr=False)
    new: str = field(repr=False)
    epoch: int


class KeyTable:
    """The rows. Thread-safe. Every method raises `KeyTableError` if the database fails."""

    def __init__(self, database: KeyDatabase) -> None:
        self._database = database

    # --- Reading ---------------------------------------------------------------------------------

    def generation(self) -> int:
        """Return the number that changes whenever caches must be emptied."""
        with self._database.reading() as connection:
            return int(connection.execute(select(key_state.c.generation)).scalar_one())

    def by_ids(self, key_ids: Collection[str]) -> dict[str, KeyRow]:
        """Return the rows that exist, erased ones too."""
        with self._database.reading() as connection:
            return {
                row.key_id: row
                for chunk in _chunks(key_ids)
                for row in _rows(connection, select(data_keys).where(data_keys.c.key_id.in_(chunk)))
            }

    def newest(self, owners: Collection[KeyOwner]) -> dict[KeyOwner, KeyRow]:
        """Return each owner's newest key, which may be retired.

        Owners without a key are left out.
        """
        found: dict[KeyOwner, KeyRow] = {}
        with self._database.reading() as connection:
            for row in self._of_owners(connection, owners):
                if row.owner_name is None:
                    continue
                owner = KeyOwner(row.kind, row.tenant, row.owner_name)
                if owner not in found or found[owner].version < row.version:
                    found[owner] = row
        return found

    def versions(self, owner: KeyOwner) -> list[KeyRow]:
        """Return all live keys of an owner, oldest version first."""
        with self._database.reading() as connection:
            return sorted(self._of_owners(connection, [owner]), key=lambda row: row.version)

    def owners(self, kind: str) -> list[KeyOwner]:
        """Return all owners of live keys of one kind."""
        columns = (data_keys.c.kind, data_keys.c.tenant, data_keys.c.owner_name)
        statement = select(*columns).where(data_keys.c.kind == kind, _live()).distinct()
        with self._database.reading() as connection:
            return [KeyOwner(*row) for row in connection.execute(statement)]

    def page(self, *, after: str, limit: int, below_epoch: int | None = None) -> list[KeyRow]:
        """Return up to `limit` live rows after the id `after`, if asked only of older epochs."""
        statement = select(data_keys).where(_live(), data_keys.c.key_id > after)
        if below_epoch is not None:
            statement = statement.where(data_keys.c.epoch < below_epoch)
        with self._database.reading() as connection:
            return _rows(connection, statement.order_by(data_keys.c.key_id).limit(limit))

    def counts(self) -> tuple[dict[str, int], dict[int, int], int]:
        """Return live keys by kind, live keys by epoch, and the number of erased ones."""
        by_kind = select(data_keys.c.kind, func.count()).where(_live()).group_by(data_keys.c.kind)
        by_epoch = (
            select(data_keys.c.epoch, func.count()).where(_live()).group_by(data_keys.c.epoch)
        )
        erased = select(func.count()).where(data_keys.c.erased_at.is_not(None))
        with self._database.reading() as connection:
            return (
                {str(kind): int(n) for kind, n in connection.execute(by_kind)},
                {int(epoch): int(n) for epoch, n in connection.execute(by_epoch)},
                int(connection.execute(erased).scalar_one()),
            )

    def unfinished_erasures(self) -> int:
        """Return how many erasures destroyed keys but did not get to record their outcome."""
        statement = select(func.count()).where(key_erasures.c.log_index.is_(None))
        with self._database.reading() as connection:
            return int(connection.execute(statement).scalar_one())

    # --- Writing keys ----------------------------------------------------------------------------

    def insert(self, rows: Sequence[KeyRow], *, announced: bool = False) -> list[str]:
        """Add keys and return the ids of those stored. A version that exists already stays.

        `announced` has every process look at its keys anew: what it knows of an owner has changed.
        Raises `EpochGoneError` if a row was wrapped by an epoch behind the fence of a trim.
        """
        dialect = sqlite if self._database.is_sqlite else postgresql
        statement = dialect.insert(data_keys).on_conflict_do_nothing()
        with self._database.writing() as connection:
            # Shared with other writers, but not with a trim, which locks the row for itself.
            oldest = connection.execute(
                select(key_state.c.oldest_epoch).with_for_update(read=True)
            ).scalar_one()
            if any(row.epoch is None or row.epoch < oldest for row in rows):
                raise EpochGoneError(
                    f"expected keys wrapped by epoch {oldest} or newer, got an older one; wrap "
                    "them again"
                )
            connection.execute(statement, [_values(row) for row in rows])
            if announced:
                bump_generation(connection)
            stored = data_keys.c.key_id.in_([row.key_id for row in rows])
            return list(connection.execute(select(data_keys.c.key_id).where(stored)).scalars())

    def reserve(self, key_id: str, count: int, *, budget: int, now: float) -> bool:
        """Reserve `count` seals before any of them is made.

        Durable on return, so a crash can only over-count. When the budget does not allow them, the
        key is retired and False returned.
        """
        row = data_keys.c
        usable = and_(row.key_id == key_id, row.retired_at.is_(None), _live())
        granted = (
            update(data_keys)
            .where(usable, row.reserved + count <= budget)
            .values(reserved=row.reserved + count)
        )
        with self._database.writing() as connection:
            if connection.execute(granted).rowcount == 1:
                return True
            connection.execute(update(data_keys).where(usable).values(retired_at=now))
            return False

    def retire(self, key_id: str, *, now: float) -> None:
        """Let a key seal nothing more. It still opens."""
        statement = update(data_keys).where(
            data_keys.c.key_id == key_id, data_keys.c.retired_at.is_(None), _live()
        )
        with self._database.writing() as connection:
            connection.execute(statement.values(retired_at=now))
            bump_generation(connection)

    def destroy(self, key_ids: Collection[str], *, now: float) -> list[str]:
        """Destroy wrapped keys by id and forget whose they were; return those that were live."""
        with self._database.writing() as connection:
            return destroy_keys(connection, data_keys.c.key_id.in_(list(key_ids)), now=now)

    def replace(self, rewrapped: Sequence[Rewrapped]) -> int:
        """Store new wrappings of rows that have not changed meanwhile; return how many."""
        stored = 0
        with self._database.writing() as connection:
            for item in rewrapped:
                statement = (
                    update(data_keys)
                    .where(data_keys.c.key_id == item.key_id, data_keys.c.wrapped == item.old)
                    .values(wrapped=item.new, epoch=item.epoch)
                )
                stored += connection.execute(statement).rowcount
        return stored

    # --- Epochs ----------------------------------------------------------------------------------

    def epochs(self) -> dict[int, tuple[float, float | None]]:
        """Return when each epoch began, and when all keys had been moved to it."""
        with self._database.reading() as connection:
            return {
                row.epoch: (row.began_at, row.rewrapped_at)
                for row in connection.execute(select(key_epochs))
            }

    def note_epoch(self, epoch: int, *, now: float) -> None:
        """Remember when an epoch began, unless it is known already."""
        dialect = sqlite if self._database.is_sqlite else postgresql
        statement = dialect.insert(key_epochs).on_conflict_do_nothing()
        with self._database.writing() as connection:
            connection.execute(statement, {"epoch": epoch, "began_at": now})

    def note_rewrapped(self, epoch: int, *, now: float) -> None:
        """Remember that all keys are wrapped by `epoch`, and have every cache emptied."""
        statement = update(key_epochs).where(key_epochs.c.epoch == epoch).values(rewrapped_at=now)
        with self._database.writing() as connection:
            connection.execute(statement)
            bump_generation(connection)

    def fence(self, oldest: int) -> int:
        """Forbid keys wrapped before `oldest` from now on; return how many stand in the way.

        The fence stands only if that number is 0.
        """
        blocked = select(func.count()).where(_live(), data_keys.c.epoch < oldest)
        raised = update(key_state).where(key_state.c.oldest_epoch < oldest)
        with self._database.writing() as connection:
            # Locked first: a key inserted between the count and the fence would be dead at birth.
            connection.execute(select(key_state.c.id).with_for_update())
            in_the_way = int(connection.execute(blocked).scalar_one())
            if in_the_way == 0:
                connection.execute(raised.values(oldest_epoch=oldest))
            return in_the_way

    def _of_owners(self, connection: Connection, owners: Collection[KeyOwner]) -> list[KeyRow]:
        groups: dict[tuple[str, str], list[str]] = {}
        for owner in owners:
            groups.setdefault((owner.kind, owner.tenant), []).append(owner.name)
        return [
            row
            for (kind, tenant), names in groups.items()
            for chunk in _chunks(names)
            for row in _rows(
                connection,
                select(data_keys).where(
                    data_keys.c.kind == kind,
                    data_keys.c.tenant == tenant,
                    data_keys.c.owner_name.in_(chunk),
                ),
            )
        ]


def destroy_keys(connection: Connection, which: Any, *, now: float) -> list[str]:
    """Destroy the live keys that match, in the caller's transaction; return their ids."""
    statement = (
        update(data_keys)
        .where(which, _live())
        .values(wrapped=None, epoch=None, owner_name=None, erased_at=now)
        .returning(data_keys.c.key_id)
    )
    destroyed = sorted(connection.execute(statement).scalars())
    bump_generation(connection)
    return destroyed


def bump_generation(connection: Connection) -> None:
    """Have every process empty its cache within `cache.refresh_s`."""
    connection.execute(update(key_state).values(generation=key_state.c.generation + 1))


def _live() -> Any:
    return data_keys.c.erased_at.is_(None)


def _rows(connection: Connection, statement: Any) -> list[KeyRow]:
    return [KeyRow(**row) for row in connection.execute(statement).mappings()]


def _values(row: KeyRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in data_keys.c.keys()}  # noqa: SIM118 (not a dict)


def _chunks(values: Iterable[str]) -> list[list[str]]:
    items = sorted(values)
    return [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
