"""Where data keys come from: key table and key server behind one cache.

`KeyStore` finds, makes and renews keys by owner or id, and notices within `cache.refresh_s` that
another process has erased or rotated some. It does not know what keys are used for: `keys.keyring`
and the modules beside it do.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from keys import aead
from keys.datakeys import ATTEMPTS, DataKey, DataKeyCache, KeyName, SealBudget
from keys.errors import KeyTableError, PersonErasedError, UnknownKeyError, VaultRejectedError
from keys.model import KeyOwner, KeyRow
from keys.ports import Clock, KeyWrapper, WrappedKey, WrapRequest
from keys.sealed import new_key_id
from keys.settings import CacheSettings
from keys.table import EpochGoneError, KeyTable

#: Seals reserved in the key table at a time. A crash or an eviction loses at most this many of
#: 2**32.
SEALS_PER_RESERVATION = 2**16
#: Reservations are remembered for this many times as many keys as the cache holds.
_BUDGETS_PER_ENTRY = 4
#: Keys that are too old are looked for this often in the life of a key, and at least this often.
_SWEEPS_PER_LIFE = 10
_SWEEP_EVERY_S = 60.0


class KeyStore:
    """Data keys of all kinds. Thread-safe; several processes may share one key table.

    `clock` gives the time that rows carry, `monotonic` the one that ages in memory are measured
    with. Close it at the end. Make one in each process, after forking: a fork would share
    reservations, and has no thread that drops old keys.
    """

    def __init__(
        self,
        *,
        table: KeyTable,
        wrapper: KeyWrapper,
        settings: CacheSettings,
        clock: Clock = time.time,
        monotonic: Clock = time.monotonic,
        seals_per_key: int = aead.SEALS_PER_KEY,
        seals_per_reservation: int = SEALS_PER_RESERVATION,
    ) -> None:
        self.table = table
        self.wrapper = wrapper
        self.clock = clock
        self._settings = settings
        self._monotonic = monotonic
        self._cache = DataKeyCache(settings, monotonic)
        self._seals_per_key = seals_per_key
        self._reservation = min(seals_per_reservation, seals_per_key)
        self._budgets: OrderedDict[str, SealBudget] = OrderedDict()
        self._budgets_lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._generation: int | None = None
        self._refreshed_at = -math.inf
        self._when_emptied: list[Callable[[], None]] = []
        self._closed = threading.Event()
        self._sweeper = threading.Thread(
            target=_sweep_until,
            args=(self._closed, self._cache, settings.max_age_s),
            name="keys-sweeper",
            daemon=True,
        )
        self._sweeper.start()

    @property
    def refresh_s(self) -> float:
        """Within how many seconds this process notices what others do."""
        return self._settings.refresh_s

    # --- Keys -------------------------------------------------------------------------------------

    def by_id(self, key_id: str) -> DataKey:
        """Return the key that a sealed text names.

        Raises `PersonErasedError` if it was destroyed, `UnknownKeyError` if the table has none
        such.
        """
        self.refresh()
        key = self._cache.get(key_id)
        for _ in range(ATTEMPTS):
            key = key or self._cache.load([key_id], self._fetch).get(key_id)
            if key is not None:
                return key
            row = self.table.by_ids([key_id]).get(key_id)
            if row is None:
                raise UnknownKeyError(
                    f"expected key {key_id} in the key table, got none; check that keys.table_url "
                    "names this installation's table and that it was not restored from an older "
                    "backup"
                )
            if row.erased_at is not None:
                raise PersonErasedError(
                    f"expected key {key_id} to exist, but it was destroyed by an erasure; what it "
                    "sealed is gone for good"
                )
            # It came between the two reads.
        raise _restless(f"key {key_id}")

    def for_sealing(self, owner: KeyOwner) -> DataKey:
        """Return the owner's newest key, made now if there is none that may seal."""
        self.refresh()
        key = self._cache.get(owner)
        for _ in range(ATTEMPTS):
            key = key or self._cache.load([owner], self._fetch_or_make).get(owner)
            if key is not None:
                return key
            # We waited for a thread that was only reading ahead, and so made none.
        raise _restless(f"the newest {owner.kind} key")

    def prefetch(self, names: Collection[KeyName], *, create: bool = False) -> None:
        """Load many keys with as few calls as possible; what does not exist is left out.

        With `create`, owners without a key get one.
        """
        self.refresh()
        self._cache.load(list(names), self._fetch_or_make if create else self._fetch)

    def is_loaded(self, names: Iterable[KeyName]) -> bool:
        """True if all of these keys are in memory now, so that using them asks no key server."""
        return all(self._cache.get(name) is not None for name in names)

    def replenish(self, key: DataKey) -> None:
        """Reserve more seals for a key that has none left, or retire it for a successor."""
        with key.budget.refilling:
            if key.budget.left > 0:
                return
            granted = self.table.reserve(
                key.key_id, self._reservation, budget=self._seals_per_key, now=self.clock()
            )
            if granted:
                key.budget.add(self._reservation)
                return
        self._cache.forget_sealing(key)

    def make_version(self, owner: KeyOwner, version: int) -> None:
        """Make that version of the owner's key, unless another process just did.

        Every process knows of it within `refresh_s`.
        """
        self._make([(owner, version)], announced=True)

    # --- Emptying ---------------------------------------------------------------------------------

    def empty(self) -> None:
        """Forget every key in this process. Other processes follow within `cache.refresh_s`."""
        self._cache.empty()
        for callback in self._when_emptied:
            callback()

    def call_when_emptied(self, callback: Callable[[], None]) -> None:
        """Register what else must be forgotten whenever keys are."""
        self._when_emptied.append(callback)

    def cached_keys(self) -> int:
        """How many keys are in memory."""
        return len(self._cache)

    def close(self) -> None:
        """Forget every key and stop the clockwork. The store must not be used afterwards."""
        self._closed.set()
        self._sweeper.join()
        self.empty()

    def refresh(self) -> None:
        """Notice what other processes have rotated or erased, at most every `cache.refresh_s`.

        Raises `KeyTableError` if the table cannot be asked: nothing kept may be used then.
        """
        self._refresh(self._settings.refresh_s)

    def refresh_ahead(self) -> None:
        """`refresh`, twice as often: for half of `refresh_s` nothing will ask the key table."""
        self._refresh(self._settings.refresh_s / 2)

    def is_fresh(self) -> bool:
        """True if `refresh_ahead` would ask nothing now."""
        return self._is_younger(self._settings.refresh_s / 2)

    def _is_younger(self, age_s: float) -> bool:
        # A clock that stepped back gives a negative age, which is not fresh either.
        return 0 <= self._monotonic() - self._refreshed_at < age_s

    def _refresh(self, age_s: float) -> None:
        if self._is_younger(age_s):
            return
        with self._refreshing:
            if self._is_younger(age_s):
                return
            now = self._monotonic()
            generation = self.table.generation()
            if self._generation not in {None, generation}:
                self.empty()
            self._generation = generation
            self._refreshed_at = now

    # --- Fetching ---------------------------------------------------------------------------------

    def _fetch(self, names: Sequence[KeyName]) -> dict[KeyName, DataKey]:
        """Read and unwrap what exists: by id whether retired or not, by owner what may seal."""
        return self._unwrap_current(lambda: self._read(names))

    def _read(self, names: Sequence[KeyName]) -> dict[KeyName, KeyRow]:
        ids = [name for name in names if isinstance(name, str)]
        owners = [name for name in names if not isinstance(name, str)]
        rows: dict[KeyName, KeyRow] = {}
        if ids:
            found = self.table.by_ids(ids)
            rows.update({name: row for name, row in found.items() if row.erased_at is None})
        if owners:
            newest = self.table.newest(owners)
            rows.update({owner: row for owner, row in newest.items() if row.retired_at is None})
        return rows

    def _unwrap_current(self, read: Callable[[], dict[KeyName, KeyRow]]) -> dict[KeyName, DataKey]:
        """Unwrap what `read` finds; read again if a rotation and a trim overtook us in between."""
        rows = read()
        for _ in range(ATTEMPTS):
            try:
                return self._unwrap(rows)
            except VaultRejectedError:
                before, rows = rows, read()
                if rows == before:
                    raise
        raise EpochGoneError(
            f"expected to unwrap keys before their epoch was trimmed, failed {ATTEMPTS} times; "
            "see which process rolls and trims epochs without pause"
        )

    def _fetch_or_make(self, names: Sequence[KeyName]) -> dict[KeyName, DataKey]:
        """Read and unwrap the newest keys of owners, making those that are missing or retired."""
        owners = [name for name in names if not isinstance(name, str)]
        for _ in range(ATTEMPTS):
            newest = self.table.newest(owners)
            usable = {owner for owner, row in newest.items() if row.retired_at is None}
            wanted = [
                (owner, newest[owner].version + 1 if owner in newest else 1)
                for owner in owners
                if owner not in usable
            ]
            if not wanted:
                found = self._fetch(owners)
                if len(found) == len(set(owners)):
                    return found
                # Erased or retired between the two reads.
                continue
            self._make(wanted)
        raise _restless("new keys")

    def _make(self, wanted: Sequence[tuple[KeyOwner, int]], *, announced: bool = False) -> None:
        for _ in range(ATTEMPTS):
            rows = self._wrap_new(wanted)
            try:
                stored = self.table.insert(rows, announced=announced)
            except EpochGoneError:
                # A rotation and a trim overtook us between wrapping and storing.
                continue
            for key_id in stored:
                self._budget(key_id).add(self._reservation)
            return
        raise EpochGoneError(
            f"expected to store a new key before its epoch was trimmed, failed {ATTEMPTS} times; "
            "see which process rolls and trims epochs without pause"
        )

    def _wrap_new(self, wanted: Sequence[tuple[KeyOwner, int]]) -> list[KeyRow]:
        now = self.clock()
        named = [(new_key_id(), owner, version) for owner, version in wanted]
        wrapped = self.wrapper.wrap(
            [WrapRequest(context=_context(*item), key=os.urandom(aead.KEY_BYTES)) for item in named]
        )
        return [
            KeyRow(
                key_id=key_id,
                kind=owner.kind,
                tenant=owner.tenant,
                owner_name=owner.name,
                version=version,
                epoch=item.epoch,
                wrapped=item.text,
                # Whoever makes a key has its first block of seals.
                reserved=self._reservation,
                created_at=now,
            )
            for (key_id, owner, version), item in zip(named, wrapped, strict=True)
        ]

    def _unwrap(self, rows: Mapping[KeyName, KeyRow]) -> dict[KeyName, DataKey]:
        if not rows:
            return {}
        keys = self.wrapper.unwrap([wrapped_key(row) for row in rows.values()])
        return {
            name: DataKey(
                key_id=row.key_id,
                owner=owner_of(row),
                version=row.version,
                key=key,
                budget=self._budget(row.key_id),
            )
            for (name, row), key in zip(rows.items(), keys, strict=True)
        }

    def _budget(self, key_id: str) -> SealBudget:
        """Return what is left of earlier reservations: they outlive the key's stay in the cache."""
        with self._budgets_lock:
            budget = self._budgets.setdefault(key_id, SealBudget())
            self._budgets.move_to_end(key_id)
            while len(self._budgets) > self._settings.max_entries * _BUDGETS_PER_ENTRY:
                self._budgets.popitem(last=False)
            return budget


def _sweep_until(closed: threading.Event, cache: DataKeyCache, max_age_s: float) -> None:
    """Drop keys that are too old also while nobody asks for any."""
    while not closed.wait(min(max_age_s / _SWEEPS_PER_LIFE, _SWEEP_EVERY_S)):
        cache.sweep()


def _restless(what: str) -> KeyTableError:
    return KeyTableError(
        f"expected {what} to last for one read in {ATTEMPTS} attempts, but it came and went each "
        "time; see which process erases or rotates keys without pause"
    )


def owner_of(row: KeyRow) -> KeyOwner:
    """Return whose key a live row is. Raises `PersonErasedError` for an erased one."""
    if row.owner_name is None:
        raise PersonErasedError(f"expected a live key, but {row.key_id} was destroyed")
    return KeyOwner(row.kind, row.tenant, row.owner_name)


def wrapped_key(row: KeyRow) -> WrappedKey:
    """Return a live row's key as the key server knows it. Raises `PersonErasedError` if erased."""
    owner = owner_of(row)
    if row.wrapped is None or row.epoch is None:
        raise PersonErasedError(f"expected a live key, but {row.key_id} was destroyed")
    context = _context(row.key_id, owner, row.version)
    return WrappedKey(context=context, text=row.wrapped, epoch=row.epoch)


def _context(key_id: str, owner: KeyOwner, version: int) -> bytes:
    """What a wrapped key is bound to: moved to another row, it does not open."""
    return aead.encode_parts(["havengate/key/1", key_id, *owner, str(version)])
