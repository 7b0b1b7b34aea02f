"""Durable files: the few ways in which `audit` writes to disk.

Lives here: atomic replacement, directory syncs, modes. Not here: what the bytes mean. Every call
goes through `os`, so that a test can kill the process at each one of them. Used by: journal,
integrate, publish, witness.
"""

from __future__ import annotations

import fcntl
import os
import stat
import sys
from pathlib import Path

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700


def sync_data(descriptor: int) -> None:
    """Force a file's content and size to the disk. Raises `OSError`; never to be tried again."""
    if sys.platform == "darwin":
        # fsync there stops at the drive's own cache.
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(descriptor)


def sync_directory(directory: Path) -> None:
    """Force a directory's names to the disk: until then a rename or a new file may vanish."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Make a directory (0700) and the missing ones above it, each durable in the one above it."""
    if directory.is_dir():
        return
    make_directory(directory.parent)
    directory.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    sync_directory(directory.parent)


def write_all(descriptor: int, data: bytes, offset: int) -> None:
    """Write the whole of `data` at `offset`, however often the kernel takes only a part."""
    done = os.pwrite(descriptor, data, offset)
    while done < len(data):
        done += os.pwrite(descriptor, memoryview(data)[done:], offset + done)


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step: a crash leaves the old file or the new one, complete.

    The content is durable on return; the name is once `sync_directory` was called for its
    directory.
    """
    temporary = path.with_name(f".{path.name}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, FILE_MODE)
    try:
        write_all(descriptor, data, 0)
        sync_data(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)


def replace_file_durably(path: Path, data: bytes) -> None:
    """As `replace_file`, and the name is durable too."""
    replace_file(path, data)
    sync_directory(path.parent)


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """Read a regular file. Raises `OSError`, or `ValueError` beyond `limit_bytes`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is not a regular file")
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise ValueError(f"{path} is larger than {limit_bytes} bytes")
    return data
