"""The chest: one key for each person of a store, sealed in one file, under one key in the keeper.

Lives here: making, finding and destroying people's keys. `node.store` seals rows with them.

Destroying a person's key re-seals the rest of the chest under a *new* chest key and forgets the old
one: every older copy of the file, in a backup too, is dead from then on, and with it the person's
key and all that was sealed with it. Two steps lie between, so both chest keys are in the keeper for
a moment; whoever opens the chest after a crash finishes what was begun.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from federated.errors import StoreError
from federated.node.keeper import SecretKeeper
from keys import aead
from keys.errors import UnsealError
from keys.private_files import write_private

KEY_NAME: Final = "chest"
NEXT_NAME: Final = "chest-next"
_CONTEXT: Final = b"havengate/device/chest/v1"


class Chest:
    """People's keys by the person's number in the store.

    Not safe for writing from two processes at once: the caller holds the store's lock.
    """

    def __init__(self, path: Path, keeper: SecretKeeper) -> None:
        self._path = path
        self._keeper = keeper
        self._keys: dict[int, bytes] = {}
        self._seen: tuple[int, int] | None = None

    def create(self) -> None:
        """Make an empty chest and its key."""
        self._keeper.set(KEY_NAME, secrets.token_hex(aead.KEY_BYTES))
        self._write(self._keeper_key(KEY_NAME), {})

    def key(self, person: int) -> bytes | None:
        """The person's key, or nothing if there never was one or it was destroyed."""
        self._refresh()
        return self._keys.get(person)

    def people(self) -> frozenset[int]:
        """Who has a key."""
        self._refresh()
        return frozenset(self._keys)

    def make(self, people: Iterable[int]) -> None:
        """Make a new key for each; durable when this returns. Old keys of theirs are replaced."""
        self._refresh()
        added = {person: secrets.token_bytes(aead.KEY_BYTES) for person in people}
        self._write(self._keeper_key(KEY_NAME), {**self._keys, **added})

    def destroy(self, people: Iterable[int]) -> None:
        """Destroy their keys here and in every copy of the file. Doing it again does no harm."""
        self._refresh()
        gone = set(people)
        left = {person: key for person, key in self._keys.items() if person not in gone}
        self._keeper.set(NEXT_NAME, secrets.token_hex(aead.KEY_BYTES))
        self._write(self._keeper_key(NEXT_NAME), left)
        self._finish()

    def erase(self) -> None:
        """Destroy all keys, then the file."""
        self._keeper.delete(KEY_NAME, NEXT_NAME)
        self._path.unlink(missing_ok=True)
        self._keys, self._seen = {}, None

    def _finish(self) -> None:
        following = self._keeper.get(NEXT_NAME)
        if following is not None:
            self._keeper.set(KEY_NAME, following)
            self._keeper.delete(NEXT_NAME)

    def _refresh(self) -> None:
        try:
            found = self._path.stat()
            if self._seen == (found.st_ino, found.st_mtime_ns):
                return
            sealed = self._path.read_bytes()
        except OSError as error:
            raise StoreError(f"{self._path} cannot be read: {error.strerror}.") from error
        self._keys = self._open(sealed)
        self._seen = (found.st_ino, found.st_mtime_ns)

    def _open(self, sealed: bytes) -> dict[int, bytes]:
        following = self._keeper.get(NEXT_NAME)
        if following is not None:
            try:
                keys = self._unseal(self._keeper_key(NEXT_NAME), sealed)
            except UnsealError:
                # The crash came before the chest was sealed anew: nothing was destroyed yet.
                self._keeper.delete(NEXT_NAME)
            else:
                self._finish()
                return keys
        try:
            return self._unseal(self._keeper_key(KEY_NAME), sealed)
        except UnsealError:
            raise StoreError(
                f"{self._path} does not open with the key in the keeper: it was changed, restored "
                "from a copy that is older than an erasure, or belongs to another store."
            ) from None

    @staticmethod
    def _unseal(key: bytes, sealed: bytes) -> dict[int, bytes]:
        return msgspec.msgpack.decode(aead.unseal(key, _CONTEXT, sealed), type=dict[int, bytes])

    def _keeper_key(self, name: str) -> bytes:
        return secret_key(self._keeper, name)

    def _write(self, key: bytes, keys: dict[int, bytes]) -> None:
        try:
            write_private(self._path, aead.seal(key, _CONTEXT, msgspec.msgpack.encode(keys)))
            found = self._path.stat()
        except OSError as error:
            raise StoreError(f"{self._path} cannot be written: {error.strerror}.") from error
        self._keys, self._seen = keys, (found.st_ino, found.st_mtime_ns)


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
