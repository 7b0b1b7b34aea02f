"""Where a store's keys lie: in the key ring of the operating system, or in a file of mode 0600.

Lives here: the port and its two adapters. What the secrets are for stands in `node.database` and
`node.chest`. Values are text, a few dozen bytes each. Who can read the key ring (or the file) can
read the store: it protects a stolen disk, a backup and a lost phone, not a session that is open.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from federated.errors import StoreError
from federated.node import place
from keys.errors import KeyConfigurationError
from keys.private_files import (
    private_lock,
    read_private,
    remove_leftovers,
    sync_directory,
    verify_own_directory,
    write_private,
)

#: Key rings that encrypt what they keep. There are others, which only look like it.
_ENCRYPTING: Final = frozenset({
    "keyring.backends.SecretService.Keyring",
    "keyring.backends.libsecret.Keyring",
    "keyring.backends.kwallet.DBusKeyring",
    "keyring.backends.kwallet.DBusKeyringKWallet4",
    "keyring.backends.macOS.Keyring",
    "keyring.backends.Windows.WinVaultKeyring",
})  # fmt: skip


class SecretKeeper(Protocol):
    """Keeps a few named secrets. Every method raises `StoreError` and nothing else."""

    def get(self, name: str) -> str | None:
        """The secret, or nothing."""
        ...

    def set(self, name: str, value: str) -> None:
        """Keep it, durably, before this returns."""
        ...

    def delete(self, *names: str) -> None:
        """Forget them for good; those that are not there are forgotten already."""
        ...


class FileKeeper:
    """One JSON file of mode 0600, replaced whole, under a lock file beside it.

    A file system may keep the blocks of an earlier version until it uses them again, and a backup
    that takes this file takes the keys: where there is a key ring, use it.
    """

    def __init__(self, path: Path) -> None:
        # A link stays one: replacing it would put the keys where the link is, and leave the old.
        self._path = Path(os.path.realpath(path))
        self._lock = self._path.with_name(self._path.name + ".lock")

    def get(self, name: str) -> str | None:
        """Read the file anew: another process may have changed it."""
        return self._read().get(name)

    def set(self, name: str, value: str) -> None:
        """Replace the file."""
        try:
            verify_own_directory(self._path.parent)
        except KeyConfigurationError as error:
            raise StoreError(str(error)) from error
        with self._alone():
            self._write({**self._read(), name: value})

    def delete(self, *names: str) -> None:
        """Replace the file without them; remove it with the last."""
        if not self._path.parent.is_dir():
            return
        with self._alone():
            left = {name: value for name, value in self._read().items() if name not in names}
            if left:
                self._write(left)
                return
            self._path.unlink(missing_ok=True)
            remove_leftovers(self._path)
            self._lock.unlink(missing_ok=True)
            sync_directory(self._path.parent)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            with private_lock(self._lock):
                yield
        except OSError as error:
            raise StoreError(f"{self._path} cannot be written: {error.strerror}.") from error

    def _read(self) -> dict[str, str]:
        try:
            return msgspec.json.decode(read_private(self._path), type=dict[str, str])
        except msgspec.DecodeError:
            raise StoreError(f"{self._path} does not hold the keys of a store.") from None
        except KeyConfigurationError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return {}
            raise StoreError(str(error)) from error

    def _write(self, secrets: dict[str, str]) -> None:
        # What a crash left would keep keys that were forgotten since.
        remove_leftovers(self._path)
        write_private(self._path, msgspec.json.encode(secrets))


class RingKeeper:
    """The key ring of the operating system: Keychain, Secret Service, KWallet.

    `service` tells the stores of one user apart.
    """

    def __init__(self, service: str) -> None:
        self._service = service

    @staticmethod
    def available() -> bool:
        """Whether there is a key ring that is known to encrypt what it keeps."""
        import keyring
        from keyring.backends.chainer import ChainerBackend

        found = keyring.get_keyring()
        links = found.backends if isinstance(found, ChainerBackend) else [found]
        return bool(links) and all(_name(link) in _ENCRYPTING for link in links)

    def get(self, name: str) -> str | None:
        """Ask the key ring."""
        import keyring

        found: str | None = self._asked(keyring.get_password, name)
        return found

    def set(self, name: str, value: str) -> None:
        """Give it to the key ring."""
        import keyring

        self._asked(keyring.set_password, name, value)

    def delete(self, *names: str) -> None:
        """Have the key ring forget them."""
        import keyring

        for name in names:
            if self.get(name) is not None:
                self._asked(keyring.delete_password, name)

    def _asked(self, call: Callable[..., Any], *arguments: str) -> Any:
        try:
            return call(self._service, *arguments)
        except Exception as error:  # noqa: BLE001 - see below
            # Each key ring brings errors of its own; their texts may hold what was to be kept.
            raise StoreError(
                f"The key ring of the operating system did not answer ({type(error).__name__}): "
                "unlock it, or keep the keys in a file with --key-file."
            ) from None


def keeper_for(store: Path, key_file: Path | None) -> SecretKeeper:
    """The keeper of the store at `store`: its file if one is named, else the key ring.

    Raises `StoreError` if neither is there: keys are never put into a file unasked. Also if the
    file named is one of the store's own.
    """
    if key_file is not None:
        if place.is_part(store, key_file):
            raise StoreError(
                f"{key_file} is where the store keeps a file of its own: give the file for the "
                "keys another name."
            )
        return FileKeeper(key_file)
    if not RingKeeper.available():
        import keyring

        raise StoreError(
            "There is no key ring of the operating system here that is known to encrypt what it "
            f"keeps (found {_name(keyring.get_keyring())}): name a file of mode 0600 for the keys "
            "with --key-file, on a disk that no backup takes."
        )
    return RingKeeper(f"havengate-device:{store.resolve()}")


def _name(ring: object) -> str:
    return f"{type(ring).__module__}.{type(ring).__qualname__}"
