"""Where a store lies: its files by their names, whether the place is its owner's alone, its end.

A folder that others may write to, a link or somebody else's file in place of one of the store's
would let them replace it, or hold its lock. What is inside the files is of no concern here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from federated.errors import StoreError
from keys.errors import KeyConfigurationError
from keys.private_files import (
    close_to_others,
    remove_leftovers,
    sync_directory,
    verify_own_directory,
)

_SQLITE_SUFFIXES: Final = ("-journal", "-wal", "-shm")


def real(path: Path) -> Path:
    """The store's one name: all who open it, through whatever link, have one lock."""
    return Path(os.path.realpath(path))


def chest_path(path: Path) -> Path:
    """The chest of the store at `path` (`node.chest`)."""
    return path.with_name(path.name + ".keys")


def lock_path(path: Path) -> Path:
    """The lock file of the store at `path`."""
    return path.with_name(path.name + ".lock")


def is_part(path: Path, file: Path) -> bool:
    """Whether `file` stands where the store at `path` has one of its own files."""
    found = real(path)
    own = {found, chest_path(found), lock_path(found)}
    own |= {found.with_name(found.name + suffix) for suffix in _SQLITE_SUFFIXES}
    return real(file) in own


def verified(path: Path) -> Path:
    """Return the real path; close the files that are there to others.

    Raises `StoreError` if somebody else could replace the store's files, or has made them.
    """
    found = real(path)
    try:
        verify_own_directory(found.parent)
        for file in (found, chest_path(found), lock_path(found)):
            close_to_others(file)
    except KeyConfigurationError as error:
        raise StoreError(str(error)) from error
    except OSError as error:
        raise StoreError(f"{found} cannot be closed to others: {error.strerror}.") from error
    return found


def remove(path: Path) -> None:
    """Remove all files of the store at `path`, what a crash left too. Raises `OSError`."""
    found = real(path)
    if not found.parent.is_dir():
        return
    for file in (chest_path(found), found):
        file.unlink(missing_ok=True)
        remove_leftovers(file)
    for suffix in _SQLITE_SUFFIXES:
        found.with_name(found.name + suffix).unlink(missing_ok=True)
    if path.is_symlink():
        path.unlink()
    lock_path(found).unlink(missing_ok=True)
    sync_directory(found.parent)
