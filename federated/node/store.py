"""A node's store: one person's on a device, many people's at a site. Encrypted, erasable at once.

Lives here: who is in it, their daily tables and events, what each import brought, erasing. Below
it: `node.database` (the encrypted file), `node.chest` (a key for each person), `node.daily` (a
table in memory). Beside it, in the same file: `consent`, `budget`, `receipts`.

A person's rows are one block, sealed under the person's own key and bound to the person's number,
inside a file that is encrypted again as a whole. One file for all people, so that an import, and
what a round costs thousands of people, is one transaction; a key for each, so that erasing one
person also reaches the backups (DESIGN.md). Rows are read in one place: `Store.rows`.
"""

from __future__ import annotations

import contextlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final, Literal

from federated.errors import LedgerError, StoreError
from federated.model import PersonRows
from federated.node import chest as chests
from federated.node import database as databases
from federated.node import place
from federated.node.chest import Chest
from federated.node.columns import COLUMNS
from federated.node.daily import Event, PersonTable
from federated.node.database import Database
from federated.node.generation import COUNTER_NAME, Generations
from federated.node.keeper import SecretKeeper
from keys import aead
from keys.errors import UnsealError
from keys.private_files import private_lock

type PersonState = Literal["taking_part", "paused", "left"]

#: The name under which a device keeps the one person whose it is.
OWNER: Final = "me"
#: What one person may have, however many imports it comes in: some 3 million days and events.
MAX_TABLE_BYTES: Final = 128 * 1024 * 1024
_CONTEXT: Final = b"havengate/device/rows/v1"
_FORGETS: Final = "forgets "
_PERSON = re.compile(r"[\w./:@-]{1,128}").fullmatch
#: All that a store has in its keeper.
_KEPT: Final = (databases.KEY_NAME, chests.KEY_NAME, chests.NEXT_NAME, COUNTER_NAME)


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Somebody in the store. `number` is the store's own; it never leaves it."""

    number: int
    name: str
    state: PersonState
    since: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportRecord:
    """One import: what came, from which kind of file. `content` is the SHA-256 of the file."""

    at: int
    format: str
    content: str
    people: int
    readings: int
    bad: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What the store has of one column of a person: how many days, from when to when, from whom."""

    column: str
    source: str
    found_unit: str
    days: int
    first_day: int
    last_day: int


class Store:
    """The store, open. Raises `StoreError`, never with a value in it."""

    def __init__(self, database: Database, chest: Chest, keeper: SecretKeeper) -> None:
        self.database = database
        self.keeper = keeper
        self.generations = Generations(database, keeper)
        self._chest = chest
        self._tag_key: bytes | None = None

    @classmethod
    def create(cls, path: Path, keeper: SecretKeeper) -> Store:
        """Make a new, empty store: the file, the chest beside it, their keys in the keeper."""
        path = place.verified(path)
        if any(keeper.get(name) is not None for name in _KEPT):
            raise StoreError(
                f"The keeper already has the keys of a store at {path}: if its file is lost, "
                "`havengate device erase` forgets them."
            )
        database = Database.create(path, keeper)
        store = cls(database, Chest(place.chest_path(path), keeper, database.transaction), keeper)
        with database.transaction():
            store._chest.create()
            database.run("INSERT INTO meta VALUES ('tag-key', ?)", [secrets.token_hex(32)])
            store.generations.begin()
        return store

    @classmethod
    def open(cls, path: Path, keeper: SecretKeeper) -> Store:
        """Open the store at `path`; finish an erasure that a crash interrupted.

        That it is the newest there is, is for `generations` to say: an older copy can be read, and
        erased.
        """
        path = place.verified(path)
        database = Database.open(path, keeper)
        store = cls(database, Chest(place.chest_path(path), keeper, database.transaction), keeper)
        try:
            store._finish_erasures()
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Close it. Closing twice does no harm."""
        self.database.close()

    # --- People ------------------------------------------------------------------------------

    def people(self) -> tuple[Person, ...]:
        """Everybody, in the order in which they came."""
        found = self.database.all("SELECT id, name, state, since FROM people ORDER BY id")
        return tuple(Person(number=n, name=name, state=s, since=t) for n, name, s, t in found)

    def person(self, name: str) -> Person:
        """Somebody by name. Raises `StoreError` if nobody has it."""
        found = self.database.one(
            "SELECT id, name, state, since FROM people WHERE name = ?", [name]
        )
        if found is None:
            raise StoreError("Nobody of that name is in the store: import something first.")
        return Person(number=found[0], name=found[1], state=found[2], since=found[3])

    def set_state(self, person: Person, state: PersonState, *, now: int) -> None:
        """Pause, resume or leave; holds for the next contact."""
        with self.database.transaction():
            self.generations.advance()
            self.database.run(
                "UPDATE people SET state = ?, since = ? WHERE id = ?", [state, now, person.number]
            )
            if state != "taking_part":
                self.forget_past(person)

    def withdraw(self, person: Person, study: str, *, now: int) -> None:
        """Take the person out of a study (its id) for good: later releases go without them."""
        with self.database.transaction():
            self.generations.advance()
            self.database.run(
                "INSERT OR IGNORE INTO withdrawals VALUES (?, ?, ?)", [person.number, study, now]
            )
            self.forget_past(person)

    def forget_past(self, person: Person) -> None:
        """Let go of what the person brought in earlier rounds of any training (`node.past`).

        How often is counted for each, so that no round that is under way writes it back.
        """
        with self.database.transaction():
            name = f"{_FORGETS}{person.number}"
            count = int(self.meta(name) or 0) + 1
            self.database.run("DELETE FROM past WHERE person = ?", [person.number])
            self.database.run("INSERT OR REPLACE INTO meta VALUES (?, ?)", [name, str(count)])

    def forgets(self) -> Mapping[int, int]:
        """How often each person's past was let go of, by number; nobody whose never was."""
        found = self.database.all(
            "SELECT name, value FROM meta WHERE name GLOB ?", [f"{_FORGETS}*"]
        )
        return {int(name.removeprefix(_FORGETS)): int(value) for name, value in found}

    def withdrawn(self, study: str) -> frozenset[int]:
        """Numbers of the people who withdrew from a study (its id)."""
        found = self.database.all("SELECT person FROM withdrawals WHERE study = ?", [study])
        return frozenset(number for (number,) in found)

    def tag(self, person: Person) -> str:
        """What the ledger calls a person: outlives an erasure and says nothing without the file.

        So somebody who is erased and comes back comes back to what was spent.
        """
        if self._tag_key is None:
            key = self.meta("tag-key")
            if key is None:
                raise StoreError("The store is damaged: it has no key for its ledger.")
            self._tag_key = bytes.fromhex(key)
        return hmac.digest(self._tag_key, person.name.encode(), "sha256").hex()[:32]

    # --- Rows --------------------------------------------------------------------------------

    def rows(self, person: Person, columns: frozenset[str]) -> PersonRows:
        """A person's daily table of these columns. The only place where rows are read for a study.

        Who asks has passed the guard, and what it costs is spent (`node.guard`).
        """
        unknown = columns - COLUMNS.keys()
        if unknown:
            raise StoreError(f"There is no column {min(unknown)[:64]!r} in the daily table.")
        return self._table(person.number).rows(columns)

    def holdings(self, person: Person) -> tuple[Holding, ...]:
        """What there is about a person, without a value: for the person's own eyes."""
        table = self._table(person.number)
        return tuple(
            Holding(
                column=name,
                source=source,
                found_unit=table.units[name, source],
                days=len(days),
                first_day=min(days),
                last_day=max(days),
            )
            for (name, source), days in sorted(table.cells.items())
            if days
        )

    def own_rows(self, person: Person) -> PersonRows:
        """The whole daily table of a person: for the person's own eyes."""
        table = self._table(person.number)
        return table.rows({column for column, _ in table.cells})

    def events(self, person: Person) -> tuple[Event, ...]:
        """A person's events in the order of their times: for the person's own eyes."""
        return tuple(sorted(self._table(person.number).events.values(), key=lambda e: e.at))

    def _table(self, number: int) -> PersonTable:
        found = self.database.one("SELECT sealed FROM rows WHERE person = ?", [number])
        if found is None:
            return PersonTable()
        key = self._chest.key(number)
        if key is None:
            raise StoreError("The person's key was destroyed: their rows cannot be read any more.")
        try:
            raw = aead.unseal(key, _associated(number), found[0])
        except UnsealError:
            raise StoreError(
                "A person's rows do not open with their key: they were changed or moved."
            ) from None
        return PersonTable.decode(raw)

    def merge(self, tables: Mapping[str, PersonTable], *, record: ImportRecord) -> tuple[int, int]:
        """Take over what an import found, all of it or nothing; people new to the store are added.

        Returns how many people are new and how many tables changed. If nothing changed, nothing is
        written. Raises `LedgerError` if this is an older copy: the keys of people who came since
        would be lost to the newest.
        """
        for name in tables:
            if not _PERSON(name):
                raise StoreError(
                    "A person's name must be 1 to 128 letters, digits, or any of . / : @ - _"
                )
        with self.database.transaction():
            self.generations.verify()
            known = {person.name: person.number for person in self.people()}
            fresh = [name for name in tables if name not in known]
            known.update(self._add(fresh, now=record.at))
            changed = self._merge_all({known[name]: table for name, table in tables.items()})
            if fresh or changed:
                self.database.run(
                    "INSERT INTO imports (at, format, content, people, readings, bad) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    [record.at, record.format, record.content, record.people, record.readings,
                     record.bad],
                )  # fmt: skip
        return len(fresh), changed

    def _add(self, names: Sequence[str], *, now: int) -> dict[str, int]:
        numbers = {
            name: self.database.insert(
                "INSERT INTO people (name, state, since, joined) VALUES (?, 'taking_part', ?, ?)",
                [name, now, now],
            )
            for name in names
        }
        if numbers:
            self.generations.advance()
            # Durable before the rows are: a key without rows does no harm, rows without a key do.
            self._chest.make(numbers.values())
        return numbers

    def _merge_all(self, tables: Mapping[int, PersonTable]) -> int:
        sealed: list[tuple[int, bytes]] = []
        for number, newer in tables.items():
            table = self._table(number)
            if table.merge(newer):
                sealed.append((number, self._seal(number, table)))
        self.database.run_many("INSERT OR REPLACE INTO rows VALUES (?, ?)", sealed)
        return len(sealed)

    def _seal(self, number: int, table: PersonTable) -> bytes:
        key = self._chest.key(number)
        if key is None:
            raise StoreError("The person's key was destroyed: nothing can be kept about them.")
        raw = table.encode()
        if len(raw) > MAX_TABLE_BYTES:
            raise StoreError(
                f"A person's daily table and events would have {len(raw)} bytes, at most "
                f"{MAX_TABLE_BYTES} can be kept: nothing of this import was."
            )
        return aead.seal(key, _associated(number), raw)

    def seal(self, person: Person, raw: bytes, *context: str) -> bytes:
        """Seal something about a person under their own key, bound to them and to `context`.

        Raises `StoreError` if their key was destroyed.
        """
        return aead.seal(self._own_key(person), _associated(person.number, *context), raw)

    def unseal(self, person: Person, sealed: bytes, *context: str) -> bytes:
        """What `seal` sealed. Raises `StoreError` if it does not open, or their key is gone."""
        try:
            return aead.unseal(self._own_key(person), _associated(person.number, *context), sealed)
        except UnsealError:
            raise StoreError("Something about a person does not open with their key.") from None

    def _own_key(self, person: Person) -> bytes:
        key = self._chest.key(person.number)
        if key is None:
            raise StoreError("The person's key was destroyed: nothing about them can be read.")
        return key

    def imports(self) -> tuple[ImportRecord, ...]:
        """What was imported, oldest first."""
        found = self.database.all(
            "SELECT at, format, content, people, readings, bad FROM imports ORDER BY id"
        )
        return tuple(
            ImportRecord(at=at, format=f, content=c, people=p, readings=r, bad=b)
            for at, f, c, p, r, b in found
        )

    # --- Small things of the node itself -------------------------------------------------------

    def meta(self, name: str) -> str | None:
        """A setting or memory of the node, such as the newest checkpoint."""
        found = self.database.one("SELECT value FROM meta WHERE name = ?", [name])
        return None if found is None else str(found[0])

    def set_meta(self, name: str, value: str) -> None:
        """Keep one, durably."""
        with self.database.transaction():
            self.generations.advance()
            self.database.run("INSERT OR REPLACE INTO meta VALUES (?, ?)", [name, value])

    # --- Erasing -------------------------------------------------------------------------------

    def erase_person(self, person: Person) -> None:
        """Destroy a person's key, here and in every copy, then everything that is about them.

        What was spent on them stays in the ledger, under a tag that says nothing without the store.
        """
        with self.database.transaction():
            self._chest.destroy([person.number])
            self._forget([person.number])

    def erase(self) -> None:
        """Destroy all keys, then the files. Nothing can be read from then on, in copies neither."""
        self.close()
        erase_at(self.database.path, self.keeper)

    def _forget(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.database.run("DELETE FROM meta WHERE name = ?", [f"{_FORGETS}{number}"])
            for table in ("rows", "past", "consents", "withdrawals", "receipts"):
                self.database.run(f"DELETE FROM {table} WHERE person = ?", [number])  # noqa: S608
            self.database.run("DELETE FROM people WHERE id = ?", [number])
        # An older copy stays one, and can be erased all the same.
        with contextlib.suppress(LedgerError):
            self.generations.advance()

    def _finish_erasures(self) -> None:
        if not (self._chest.unfinished() or self._keyless()):
            return
        with self.database.transaction():
            self._chest.settle()
            if lost := self._chest.destroyed(person.number for person in self.people()):
                self._forget(lost)

    def _keyless(self) -> frozenset[int]:
        return frozenset(person.number for person in self.people()) - self._chest.people()


def erase_at(path: Path, keeper: SecretKeeper) -> None:
    """Erase a store that may no longer open: forget its keys, remove its files.

    Holds the store's lock, so that nobody who is in the middle of a change brings keys back.
    Raises `StoreError`, after removing the files, if the keeper had no keys: they may be elsewhere.
    """
    real = place.real(path)
    with contextlib.ExitStack() as held:
        # Where it cannot be had (the folder is gone, or was taken away) the keys must go still.
        with contextlib.suppress(OSError):
            held.enter_context(private_lock(place.lock_path(real)))
        had_keys = any(keeper.get(name) is not None for name in _KEPT)
        keeper.delete(*_KEPT)
        try:
            place.remove(path)
        except OSError as error:
            raise StoreError(
                f"The keys are destroyed, so {real} cannot be read any more, but its files could "
                f"not be removed: {error.strerror}."
            ) from error
    if not had_keys:
        raise StoreError(
            f"There were no keys of {real} where they were looked for, and its files are gone. "
            "Unless it was erased before, its keys lie elsewhere and copies still open; erase it "
            "again with the --store and --key-file with which it was made."
        )


def content_hash(path: Path) -> str:
    """SHA-256 of a file, in hex; of a folder, that of its files' names and sizes."""
    digest = sha256()
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file():
                digest.update(f"{file.relative_to(path)}\n{file.stat().st_size}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _associated(number: int, *context: str) -> bytes:
    return aead.encode_parts([_CONTEXT, str(number), *context])
