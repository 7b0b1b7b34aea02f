"""The chest: one key for each person of a store, sealed in one file, under one key in the keeper.

Lives here: making, finding and destroying people's keys. `node.store` seals rows with them.

Destroying a person's key re-seals the rest of the chest under a *new* chest key and forgets the old
one: every older copy of the file, in a backup too, is dead from then on, and with it the person's
key and all that was sealed with it. Two steps lie between, so both chest keys are in the keeper for
a moment. Who only reads takes the one that fits and changes nothing: the erasure may be under way.
What a crash cut short is finished by `settle`, under the store's lock.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import msgspec

from federated.errors import StoreError
from federated.node.keeper import SecretKeeper
from keys import aead
from keys.errors import UnsealError
from keys.private_files import remove_leftovers, write_private

KEY_NAME: Final = "chest"
NEXT_NAME: Final = "chest-next"
_CONTEXT: Final = b"havengate/device/chest/v1"
#: Where the chest notes the largest number that it ever had a key of. Nobody has this number.
_NEWEST: Final = 0
_NUMBER_BYTES: Final = 8


class Chest:
    """People's keys by the person's number in the store.

    `alone` holds the store's lock; every change is made under it, and reading waits for it only
    where the file and the keeper do not fit together, as in the middle of a change.
    """

    def __init__(
        self, path: Path, keeper: SecretKeeper, alone: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._path = path
        self._keeper = keeper
        self._alone = alone
        self._keys: dict[int, bytes] = {}
        self._seen: tuple[int, ...] | None = None

    def create(self) -> None:
        """Make an empty chest and its key."""
        with self._alone():
            self._keeper.set(KEY_NAME, secrets.token_hex(aead.KEY_BYTES))
            self._write(secret_key(self._keeper, KEY_NAME), {})

    def key(self, person: int) -> bytes | None:
        """The person's key, or nothing if there never was one or it was destroyed."""
        self._refresh()
        return self._keys.get(person)

    def people(self) -> frozenset[int]:
        """Who has a key."""
        self._refresh()
        return frozenset(self._keys) - {_NEWEST}

    def destroyed(self, people: Iterable[int]) -> frozenset[int]:
        """Who of the store's people has no key any more.

        Raises `StoreError` if one came after this copy of the chest, which never had their key.
        """
        lost = frozenset(people) - self.people()
        if lost and max(lost) > self._newest():
            raise StoreError(
                f"{self._path} is older than the store: it has no keys of people who came since. "
                "Put its newest copy back."
            )
        return lost

    def _newest(self) -> int:
        return max(int.from_bytes(self._keys.get(_NEWEST, b"")), *self._keys, 0)

    def make(self, people: Iterable[int]) -> None:
        """Make a new key for each; durable when this returns. Old keys of theirs are replaced."""
        with self._alone():
            self.settle()
            added = {person: secrets.token_bytes(aead.KEY_BYTES) for person in people}
            newest = max(self._newest(), *added, 0)
            added[_NEWEST] = newest.to_bytes(_NUMBER_BYTES)
            self._write(secret_key(self._keeper, KEY_NAME), {**self._keys, **added})

    def destroy(self, people: Iterable[int]) -> None:
        """Destroy their keys here and in every copy of the file. Doing it again does no harm."""
        with self._alone():
            self.settle()
            gone = set(people)
            left = {person: key for person, key in self._keys.items() if person not in gone}
            following = secrets.token_bytes(aead.KEY_BYTES)
            self._keeper.set(NEXT_NAME, following.hex())
            self._write(following, left)
            self._finish(following)

    def settle(self) -> None:
        """Finish an erasure that a crash cut short after the chest was sealed anew."""
        with self._alone():
            key, self._keys, self._seen = self._read()
            if key != secret_key(self._keeper, KEY_NAME):
                self._finish(key)

    def unfinished(self) -> bool:
        """Whether an erasure was begun and may wait for `settle`."""
        return self._keeper.get(NEXT_NAME) is not None

    def _finish(self, following: bytes) -> None:
        self._keeper.set(KEY_NAME, following.hex())
        self._keeper.delete(NEXT_NAME)

    def _refresh(self) -> None:
        try:
            if self._seen == _identity(self._path):
                return
        except OSError as error:
            raise StoreError(f"{self._path} cannot be read: {error.strerror}.") from error
        with contextlib.suppress(StoreError):
            _, self._keys, self._seen = self._read()
            return
        with self._alone():
            # Nobody changes it now: what does not open at this moment does not open.
            _, self._keys, self._seen = self._read()

    def _read(self) -> tuple[bytes, dict[int, bytes], tuple[int, ...]]:
        """The key that fits, what is inside, and which file that was."""
        try:
            seen = _identity(self._path)
            sealed = self._path.read_bytes()
        except OSError as error:
            raise StoreError(f"{self._path} cannot be read: {error.strerror}.") from error
        names = [KEY_NAME] if self._keeper.get(NEXT_NAME) is None else [KEY_NAME, NEXT_NAME]
        for name in names:
            key = secret_key(self._keeper, name)
            with contextlib.suppress(UnsealError):
                return key, self._unseal(key, sealed), seen
        raise StoreError(
            f"{self._path} does not open with the key in the keeper: it was changed, restored "
            "from a copy that is older than an erasure, or belongs to another store."
        )

    @staticmethod
    def _unseal(key: bytes, sealed: bytes) -> dict[int, bytes]:
        return msgspec.msgpack.decode(aead.unseal(key, _CONTEXT, sealed), type=dict[int, bytes])

    def _write(self, key: bytes, keys: dict[int, bytes]) -> None:
        try:
            remove_leftovers(self._path)
            write_private(self._path, aead.seal(key, _CONTEXT, msgspec.msgpack.encode(keys)))
            self._keys, self._seen = keys, _identity(self._path)
        except OSError as error:
            raise StoreError(f"{self._path} cannot be written: {error.strerror}.") from error


def _identity(path: Path) -> tuple[int, ...]:
    """Tells one version of a file from the next."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def secret_key(keeper: SecretKeeper, name: str) -> bytes:
    """A 32-byte key out of the keeper. Raises `StoreError` if it is gone or is none."""
    text = keeper.get(name)
    try:
        key = bytes.fromhex(text or "")
    except ValueError:
        key = b""
    if len(key) != aead.KEY_BYTES:
        raise StoreError(
            f"The keeper has no key {name!r} for this store: it was erased, or the store belongs "
            "to another user. What it held cannot be read."
        )
    return key
