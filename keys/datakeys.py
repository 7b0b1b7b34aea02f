"""Data keys in memory: each held where it is erased with its last use, in a cache with bounds.

`DataKey` holds the key; once it is destroyed every use of it raises. `DataKeyCache` bounds age,
uses and number, and makes sure that a missing key is fetched once however many threads wait for it.
Which keys are fetched, and from where, is the business of `keys.store`.

Python copies bytes freely: erasing covers the copy held here, not what the interpreter and the HTTP
client made of it on the way (see DESIGN.md).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future

from cryptography.hazmat.primitives.hmac import HMAC

from keys import aead
from keys.errors import KeyExhaustedError, KeyTableError
from keys.model import KeyOwner
from keys.ports import Clock
from keys.settings import CacheSettings

#: What a key is asked for by: its id, or its owner for the newest one that may seal.
KeyName = str | KeyOwner

#: A key that is destroyed while it is fetched or used is fetched again, at most this often.
ATTEMPTS = 64


class KeyGoneError(KeyTableError):
    """This copy of the key was destroyed after it was handed out: fetch it again."""

    code = "keys.key_gone"


class SealBudget:
    """Seals of one key that this process has reserved in the key table and not yet made."""

    __slots__ = ("_left", "_lock", "refilling")

    def __init__(self, left: int = 0) -> None:
        self._left = left
        self._lock = threading.Lock()
        #: Held by the one thread that reserves more.
        self.refilling = threading.Lock()

    @property
    def left(self) -> int:
        """How many seals may be made without asking the key table."""
        return self._left

    def take(self) -> None:
        """Count one seal before it is made. Raises `KeyExhaustedError` if none is left."""
        with self._lock:
            if self._left <= 0:
                raise KeyExhaustedError(
                    "expected seals reserved for this key, got none left; reserve more in the key "
                    "table"
                )
            self._left -= 1

    def add(self, count: int) -> None:
        """Add seals that the key table has granted."""
        with self._lock:
            self._left += count


class DataKey:
    """One key and what is bound to everything it seals. Thread-safe.

    It is kept as a keyed hash, never as bytes: OpenSSL erases that with its last reference, and a
    key that is gone cannot be mistaken for one of zeros.
    """

    __slots__ = (
        "_hash",
        "budget",
        "key_id",
        "loaded_at",
        "owner",
        "uses",
        "version",
        "version_part",
    )

    def __init__(
        self, *, key_id: str, owner: KeyOwner, version: int, key: bytes, budget: SealBudget
    ) -> None:
        self.key_id = key_id
        self.owner = owner
        self.version = version
        self.version_part = aead.encode_parts([str(version)])
        self.budget = budget
        #: Kept by the cache, under its lock.
        self.loaded_at = 0.0
        self.uses = 0
        self._hash: HMAC | None = aead.key_hash(key)

    def __repr__(self) -> str:
        return f"DataKey({self.key_id}, version {self.version})"

    def derive(self, label: bytes, salt: bytes, associated: bytes) -> bytes:
        """Derive the keys of one message (`keys.aead.derive`). Raises `KeyGoneError`."""
        return aead.derive(self._alive(), label, salt, associated)

    def mac(self, message: bytes) -> bytes:
        """HMAC-SHA512 cut to 32 bytes, for tags and tokens. Raises `KeyGoneError`."""
        return aead.expand(self._alive(), message)[: aead.KEY_BYTES]

    def destroy(self) -> None:
        """Forget the key. A derivation in progress ends well; every later one raises."""
        self._hash = None

    def _alive(self) -> HMAC:
        # Read once: what another thread forgets meanwhile stays whole until this use of it ends.
        found = self._hash
        if found is None:
            raise KeyGoneError(
                "expected a live copy of the key, got one destroyed meanwhile; fetch it again"
            )
        return found


class DataKeyCache:
    """Data keys by id, and the id of the key that seals for each owner. Thread-safe.

    A key is dropped once it is `max_age_s` old, was handed out `max_uses` times, or is the least
    recently used of more than `max_entries`. A clock that steps back empties the cache.
    """

    def __init__(self, settings: CacheSettings, clock: Clock) -> None:
        self._max_age_s = settings.max_age_s
        self._max_uses = settings.max_uses
        self._max_entries = settings.max_entries
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, DataKey] = OrderedDict()
        self._sealing: dict[KeyOwner, str] = {}
        self._flights: dict[KeyName, Future[DataKey | None]] = {}
        self._last_seen = clock()
        self._emptied = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: KeyName) -> DataKey | None:
        """Return the key if it is here and still within its bounds, and count the use."""
        with self._lock:
            return self._get(name, self._now())

    def load(
        self,
        names: Sequence[KeyName],
        fetch: Callable[[Sequence[KeyName]], Mapping[KeyName, DataKey]],
    ) -> dict[KeyName, DataKey]:
        """Return the keys, fetching what is missing. Names that `fetch` leaves out are left out.

        A name is fetched by one thread at a time; the others wait for its result or its error. What
        was fetched while the cache was emptied is fetched again: it may have been erased in
        between.
        """
        found: dict[KeyName, DataKey] = {}
        missing = list(dict.fromkeys(names))
        for _ in range(ATTEMPTS):
            mine: list[KeyName] = []
            try:
                waits, emptied = self._claim(missing, found, mine)
                if mine:
                    found.update(self._fetch(mine, fetch, emptied))
            except BaseException as error:
                self._fail(mine, error)
                raise
            missing = [name for name in mine if name not in found and emptied != self._emptied]
            for name, flight in waits.items():
                try:
                    key = flight.result()
                except CancelledError:
                    missing.append(name)
                else:
                    if key is not None:
                        found[name] = key
            if not missing:
                return found
        raise KeyTableError(
            f"expected the cache to stand still once in {ATTEMPTS} attempts, but it is emptied "
            "faster than keys load; see which process rotates or erases keys without pause"
        )

    def empty(self) -> None:
        """Forget every key, also those being fetched right now."""
        with self._lock:
            self._empty()

    def forget_sealing(self, key: DataKey) -> None:
        """Have the next seal for this key's owner ask which key is the newest."""
        with self._lock:
            if self._sealing.get(key.owner) == key.key_id:
                del self._sealing[key.owner]

    def sweep(self) -> None:
        """Drop what is too old, used or not."""
        with self._lock:
            now = self._now()
            for key in [key for key in self._entries.values() if not self._is_usable(key, now)]:
                self._drop(key)

    # --- Below: the lock is held ------------------------------------------------------------------

    def _now(self) -> float:
        now = self._clock()
        if now < self._last_seen:
            # Ages are no longer known. Frozen or shrunken ages would let keys live longer.
            self._empty()
        self._last_seen = now
        return now

    def _get(self, name: KeyName, now: float) -> DataKey | None:
        key_id = name if isinstance(name, str) else self._sealing.get(name)
        key = self._entries.get(key_id) if key_id is not None else None
        if key is None:
            return None
        if not self._is_usable(key, now):
            self._drop(key)
            return None
        key.uses += 1
        self._entries.move_to_end(key.key_id)
        return key

    def _is_usable(self, key: DataKey, now: float) -> bool:
        return now - key.loaded_at < self._max_age_s and key.uses < self._max_uses

    def _drop(self, key: DataKey) -> None:
        # Not destroyed here: a thread may be about to use it. It is erased with its last reference.
        del self._entries[key.key_id]
        if self._sealing.get(key.owner) == key.key_id:
            del self._sealing[key.owner]

    def _empty(self) -> None:
        self._emptied += 1
        for key in self._entries.values():
            key.destroy()
        self._entries.clear()
        self._sealing.clear()

    # --- Single flight ----------------------------------------------------------------------------

    def _claim(
        self, names: Sequence[KeyName], found: dict[KeyName, DataKey], mine: list[KeyName]
    ) -> tuple[dict[KeyName, Future[DataKey | None]], int]:
        """Sort the names: here already, being fetched by others, and now ours to fetch.

        `mine` is the caller's, who must land what stands there even if this is interrupted.
        """
        waits: dict[KeyName, Future[DataKey | None]] = {}
        with self._lock:
            now = self._now()
            for name in names:
                key = self._get(name, now)
                if key is not None:
                    found[name] = key
                elif name in self._flights:
                    waits[name] = self._flights[name]
                else:
                    mine.append(name)
                    self._flights[name] = Future()
            return waits, self._emptied

    def _fetch(
        self,
        mine: list[KeyName],
        fetch: Callable[[Sequence[KeyName]], Mapping[KeyName, DataKey]],
        emptied: int,
    ) -> dict[KeyName, DataKey]:
        """Fetch what this thread has claimed and tell those who wait."""
        with self._lock:
            began_at = self._now()
        fetched = self._insert(fetch(mine), began_at, emptied)
        with self._lock:
            for name in mine:
                if fetched is None:
                    self._flights[name].cancel()
                else:
                    self._flights[name].set_result(fetched.get(name))
                del self._flights[name]
        return fetched or {}

    def _fail(self, mine: list[KeyName], error: BaseException) -> None:
        """Tell those who wait for this thread that nothing will come: none may wait for ever."""
        with self._lock:
            for name in mine:
                flight = self._flights.pop(name, None)
                if flight is None or flight.done():
                    continue
                if isinstance(error, Exception) and len(mine) == 1:
                    flight.set_exception(error)
                else:
                    # The error may be about another key of the batch, or this thread is being
                    # ended: the others try for themselves.
                    flight.cancel()

    def _insert(
        self, fetched: Mapping[KeyName, DataKey], began_at: float, emptied: int
    ) -> dict[KeyName, DataKey] | None:
        """Keep what was fetched; None if the cache was emptied meanwhile."""
        with self._lock:
            now = self._now()
            if self._emptied != emptied:
                for key in fetched.values():
                    key.destroy()
                return None
            kept: dict[KeyName, DataKey] = {}
            for name, key in fetched.items():
                kept[name] = self._keep(key, began_at, now)
                if isinstance(name, KeyOwner):
                    self._sealing[name] = key.key_id
            while len(self._entries) > self._max_entries:
                self._drop(next(iter(self._entries.values())))
            return kept

    def _keep(self, key: DataKey, began_at: float, now: float) -> DataKey:
        kept = self._entries.get(key.key_id)
        if kept is not None and self._is_usable(kept, now):
            # Asked for by id and by owner, it arrives twice; the first copy stays.
            kept.uses += 1
            return kept
        # Its age counts from before the request, so that a slow answer is not a longer life.
        key.loaded_at = began_at
        key.uses = 1
        self._entries[key.key_id] = key
        return key
