"""Taking hold of a log's directory, and letting go of it for good.

Lives here: the lock of the one writer, the mark that keeps a log closed after tampering, and the
words for what a disk did. Used by: `audit.log`, `audit.publish`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from audit.errors import LogLockedError, LogTamperedError, LogUnavailableError
from audit.files import FILE_MODE, make_directory, write_all
from audit.journal import LOCK
from audit.recovery import HALTED


def take_lock(directory: Path) -> int:
    """Descriptor of the lock that one writer holds until it closes it. Raises `LogLockedError`."""
    try:
        make_directory(directory)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(directory / LOCK, flags, FILE_MODE)
    except OSError as error:
        raise not_opened(error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise LogLockedError(
            f"Another process writes to {directory}. Stop it, or hand entries to its socket."
        ) from error
    return descriptor


def mark_halted(directory_descriptor: int, error: LogTamperedError) -> None:
    """Leave the reason in the directory that was opened, wherever that is now."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    # It is there already, or there is no room for its text, or the directory is gone for good: the
    # process that noticed halts in any case.
    with contextlib.suppress(OSError):
        descriptor = os.open(HALTED, flags, FILE_MODE, dir_fd=directory_descriptor)
        try:
            write_all(descriptor, f"{error.code}: {error}\n".encode(), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def as_halt(error: Exception) -> LogUnavailableError:
    """The error with which a writer halts because of `error`."""
    if isinstance(error, LogTamperedError):
        return error
    reason = type(error).__name__
    if isinstance(error, OSError) and error.errno:
        reason = os.strerror(error.errno)
    return LogUnavailableError(
        f"The log's disk failed ({reason}); what it kept is not known, so nothing more is written. "
        "Look at the disk, then restart: what was acknowledged is checked on opening."
    )


def not_opened(error: OSError) -> LogUnavailableError:
    """The error for a directory that cannot be opened."""
    return LogUnavailableError(f"The log cannot be opened: {error}. Look at the path and the disk.")
