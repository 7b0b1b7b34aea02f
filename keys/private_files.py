"""Files that hold secrets: created closed to others, replaced whole, read with care.

`keys.embedded`, `keys.bootstrap` and `keys.certificates` write through here; `keys.vault` reads its
credentials through here. Nothing here knows what a file means.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from keys.errors import KeyConfigurationError

_LARGEST_SECRET_BYTES = 64 * 1024


def make_private_directory(path: Path) -> None:
    """Create `path` with mode 0700, its parents by the umask.

    Raises `KeyConfigurationError` if it exists and is not a directory of ours that is closed to
    others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise KeyConfigurationError(
                f"{path} must be a directory; remove what stands there or configure another path."
            ) from None
        _verify_owner_only(path, status, wanted="0700")


def write_private(path: Path, content: bytes) -> None:
    """Write `content` with mode 0600 so that after a crash the old or the new file is there, whole.

    The temporary file is created with `O_EXCL` under a random name: nobody can have put a link or
    an open file in its place. File and directory are synced before this returns.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files that a crash left of `write_private(path, …)`: they hold secrets too.

    Only for who keeps every other writer of `path` away meanwhile, as by `private_lock`.
    """
    leftover = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}").fullmatch
    with os.scandir(path.parent) as entries:
        found = [entry.name for entry in entries if leftover(entry.name)]
    for name in found:
        path.with_name(name).unlink(missing_ok=True)


@contextlib.contextmanager
def private_lock(path: Path) -> Iterator[None]:
    """Hold the lock file at `path` alone, among all threads and processes; wait for it.

    It is made with mode 0600 and never followed through a link. Who holds it may remove it: who
    waited for the removed one takes the next. Raises `OSError`.
    """
    descriptor = _locked(path)
    try:
        yield
    finally:
        os.close(descriptor)


def _locked(path: Path) -> int:
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.lstat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def verify_own_directory(path: Path) -> None:
    """Raise `KeyConfigurationError` if somebody else could replace the files in `path`."""
    try:
        status = path.stat()
    except OSError as error:
        raise KeyConfigurationError(
            f"{path} must be a directory of this user; make it with `mkdir -m 0700 {path}`."
        ) from error
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o022:
        raise KeyConfigurationError(
            f"{path} has mode {mode:04o}: others could replace the files in it; run "
            f"`chmod go-w {path}`, or choose a directory of your own."
        )
    _verify_owner(path, status)


def close_to_others(path: Path) -> None:
    """Give a file that is there mode 0600, if it is open to group or others.

    For what is encrypted itself; what is a secret is refused by `read_private`. Raises
    `KeyConfigurationError` if it is no regular file (a link, too), or another user's.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):
        raise KeyConfigurationError(
            f"{path} must be a regular file; remove what stands there or choose another directory."
        )
    _verify_owner(path, status)
    if stat.S_IMODE(status.st_mode) & 0o077:
        path.chmod(0o600)


def read_private(path: Path, *, largest_bytes: int = _LARGEST_SECRET_BYTES) -> bytes:
    """Return the content of a regular file that only its owner may use.

    Raises `KeyConfigurationError` if it is missing, empty, too large, or open to group or others.
    """
    try:
        # A pipe without a writer would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise KeyConfigurationError(f"{path} must be a regular file that holds a secret.")
            _verify_owner_only(path, status, wanted="0600")
            content = file.read(largest_bytes + 1)
    except OSError as error:
        raise KeyConfigurationError(
            f"{path} cannot be read ({error.strerror}); it must hold a secret and belong to this "
            "user."
        ) from error
    if not content.strip() or len(content) > largest_bytes:
        raise KeyConfigurationError(
            f"{path} must hold between 1 and {largest_bytes} bytes, found {len(content)}; "
            "write the secret into it again."
        )
    return content


def read_private_text(path: Path) -> str:
    """Return one secret that is printable ASCII text, without the line end around it.

    Raises `KeyConfigurationError` as `read_private` does, and if the file holds anything else.
    """
    text = read_private(path).decode("ascii", errors="replace").strip()
    if not text.isascii() or not text.isprintable():
        raise KeyConfigurationError(
            f"{path} must hold one line of printable ASCII; write the secret into it again."
        )
    return text


def sync_directory(path: Path) -> None:
    """Make the names in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _verify_owner_only(path: Path, status: os.stat_result, *, wanted: str) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise KeyConfigurationError(
            f"{path} has mode {mode:04o} and can be reached by others; "
            f"run `chmod {wanted} {path}` and replace the secret, for it may have been read."
        )
    _verify_owner(path, status)


def _verify_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in {os.geteuid(), 0}:
        raise KeyConfigurationError(
            f"{path} belongs to user {status.st_uid}, expected {os.geteuid()}; run this as that "
            f"user (`sudo -u '#{status.st_uid}' …`), or change the owner if it is wrong."
        )
