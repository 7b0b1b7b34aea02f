"""The encrypted database below a store: opening it, its schema, its transactions, its end.

SQLCipher encrypts and authenticates every page, those of the journal too; temporary tables stay in
memory. The key is 32 random bytes, given raw: there is no password to stretch (PBKDF2), so opening
costs no more than reading. Lives here: the file and how it is written. What stands in the tables is
the business of `node.store`, `consent`, `budget` and `receipts`.

A write holds the store's lock file and one immediate transaction, with full syncs: after a crash
all of it is there or nothing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from sqlcipher3 import dbapi2

from federated.errors import StoreError
from federated.node.chest import secret_key
from federated.node.keeper import SecretKeeper
from federated.node.place import lock_path
from keys import aead
from keys.private_files import private_lock

KEY_NAME: Final = "database"
_VERSION: Final = 3
_SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE people (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL CHECK (state IN ('taking_part', 'paused', 'left')), since INTEGER NOT NULL,
    joined INTEGER NOT NULL
);
CREATE TABLE rows (person INTEGER PRIMARY KEY, sealed BLOB NOT NULL);
CREATE TABLE imports (
    id INTEGER PRIMARY KEY, at INTEGER NOT NULL, format TEXT NOT NULL, content TEXT NOT NULL,
    people INTEGER NOT NULL, readings INTEGER NOT NULL, bad INTEGER NOT NULL
);
CREATE TABLE consents (
    id INTEGER PRIMARY KEY AUTOINCREMENT, person INTEGER NOT NULL, study TEXT NOT NULL,
    kinds TEXT NOT NULL, columns TEXT NOT NULL, purposes TEXT NOT NULL,
    given_at INTEGER NOT NULL, revoked_at INTEGER
);
CREATE INDEX consents_person ON consents (person);
CREATE TABLE withdrawals (
    person INTEGER NOT NULL, study TEXT NOT NULL, at INTEGER NOT NULL, PRIMARY KEY (person, study)
) WITHOUT ROWID;
CREATE TABLE spends (
    number INTEGER PRIMARY KEY, who TEXT NOT NULL, study TEXT NOT NULL, query TEXT NOT NULL,
    run TEXT NOT NULL, round INTEGER NOT NULL, cost TEXT NOT NULL, at INTEGER NOT NULL,
    state TEXT NOT NULL, link TEXT NOT NULL, UNIQUE (who, study, query, run, round)
);
CREATE TABLE receipts (
    id INTEGER PRIMARY KEY AUTOINCREMENT, person INTEGER, at INTEGER NOT NULL,
    outcome TEXT NOT NULL, study TEXT NOT NULL, content TEXT NOT NULL
);
CREATE INDEX receipts_person ON receipts (person);
"""
_PAST: Final = """
CREATE TABLE past (
    person INTEGER NOT NULL, study TEXT NOT NULL, query TEXT NOT NULL, until INTEGER NOT NULL,
    sealed BLOB NOT NULL, PRIMARY KEY (person, study, query)
) WITHOUT ROWID
"""
#: What makes a store of the version before one of this version.
_MIGRATIONS: Final = {2: _PAST}


class Database:
    """One encrypted file, open. Safe to use from several threads; several processes may have it.

    Every method raises `StoreError`, whose message never holds what stands in the file.
    """

    def __init__(self, path: Path, keeper: SecretKeeper) -> None:
        self.path = path
        self._keeper = keeper
        self._guard = threading.RLock()
        self._depth = 0
        self._before: list[Callable[[], object]] = []
        self._after: list[Callable[[], object]] = []
        self._connection = self._connect()
        self._file = self._identity()

    @classmethod
    def create(cls, path: Path, keeper: SecretKeeper) -> Database:
        """Make a new, empty one. Raises `StoreError` if there is something at `path`."""
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise StoreError(
                f"A store cannot be made at {path}: {error.strerror}; name a new file."
            ) from error
        try:
            keeper.set(KEY_NAME, secrets.token_hex(aead.KEY_BYTES))
        except BaseException:
            # Else no store could be made here any more once the place for the keys is mended.
            path.unlink(missing_ok=True)
            raise
        database = cls(path, keeper)
        with database.transaction():
            for statement in (*filter(str.strip, _SCHEMA.split(";\n")), _PAST):
                database.run(statement)
            database.run(f"PRAGMA user_version = {_VERSION}")
        return database

    @classmethod
    def open(cls, path: Path, keeper: SecretKeeper) -> Database:
        """Open one that is there. Raises `StoreError` if it is missing or the key does not fit."""
        if not path.is_file():
            raise StoreError(f"There is no store at {path}: make one with `havengate device init`.")
        database = cls(path, keeper)
        try:
            database._migrate()
        except BaseException:
            database.close()
            raise
        return database

    def _migrate(self) -> None:
        """Bring an older store to this version. Raises `StoreError` for an unknown one."""
        if self._version() == _VERSION:
            return
        with self.transaction():
            # Another program may have done it meanwhile.
            while (version := self._version()) != _VERSION:
                if version not in _MIGRATIONS:
                    raise StoreError(
                        f"{self.path} is a store of another version: use the program it is from."
                    )
                self.run(_MIGRATIONS[version])
                self.run(f"PRAGMA user_version = {version + 1}")

    def _version(self) -> int:
        found = self.one("PRAGMA user_version")
        return int(found[0]) if found else 0

    def _connect(self) -> dbapi2.Connection:
        key = secret_key(self._keeper, KEY_NAME)
        try:
            connection = dbapi2.connect(
                self.path, isolation_level=None, check_same_thread=False, timeout=60
            )
            # SQLCipher would report a wrong key on standard error beside the exception.
            connection.execute("PRAGMA cipher_log_level = NONE")
            connection.execute(f"PRAGMA key = \"x'{key.hex()}'\"")
            for pragma in ("synchronous = EXTRA", "secure_delete = ON", "temp_store = MEMORY"):
                connection.execute(f"PRAGMA {pragma}")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except dbapi2.Error:
            raise StoreError(
                f"{self.path} does not open: the key in the keeper is not its key, or the file was "
                "changed."
            ) from None
        return connection

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is run inside is there when this ends, or, after an error, nothing of it.

        Nested ones belong to the outermost. Holds the store's lock: one writer at a time.
        """
        with self._guard:
            if self._depth:
                self._depth += 1
                try:
                    yield
                finally:
                    self._depth -= 1
                return
            # Before, so that no lock is made where nothing is any more; after, so that it holds.
            self._verify_still_there()
            with self._locked():
                self._verify_still_there()
                self.run("BEGIN IMMEDIATE")
                self._depth = 1
                self._before, self._after = [], []
                try:
                    yield
                    for step in self._before:
                        step()
                    self.run("COMMIT")
                    for step in self._after:
                        step()
                except BaseException:
                    # After some failures (a full disk) the database has rolled back by itself.
                    with contextlib.suppress(StoreError):
                        self.run("ROLLBACK")
                    raise
                finally:
                    self._depth = 0

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _verify_still_there(self) -> None:
        """An open file outlives its name; what was erased must not be answered from."""
        if self._file is None or self._identity() != self._file:
            raise StoreError(
                f"{self.path} was erased or replaced while it was open: nothing is answered from "
                "what it was."
            )

    def before_commit(self, step: Callable[[], object]) -> None:
        """Within a transaction: have `step` done as the last of it, once however often asked."""
        if step not in self._before:
            self._before.append(step)

    def after_commit(self, step: Callable[[], object]) -> None:
        """Within a transaction: have `step` done once all is durable, before the lock is given up.

        Once however often asked. If it raises, what was committed stays.
        """
        if step not in self._after:
            self._after.append(step)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(private_lock(lock_path(self.path)))
            except OSError as error:
                raise StoreError(
                    f"The lock of {self.path} cannot be taken: {error.strerror}."
                ) from error
            yield

    def run(self, statement: str, values: Sequence[Any] = ()) -> int:
        """Run one statement; return how many rows it changed."""
        with self._guard, _translated():
            return int(self._connection.execute(statement, values).rowcount)

    def insert(self, statement: str, values: Sequence[Any]) -> int:
        """Run one INSERT; return the number of the new row."""
        with self._guard, _translated():
            return int(self._connection.execute(statement, values).lastrowid or 0)

    def run_many(self, statement: str, values: Sequence[Sequence[Any]]) -> int:
        """Run one statement for each; return how many rows that changed in all."""
        with self._guard, _translated():
            return int(self._connection.executemany(statement, values).rowcount)

    def one(self, statement: str, values: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        """The first row, or nothing."""
        with self._guard, _translated():
            found: tuple[Any, ...] | None = self._connection.execute(statement, values).fetchone()
            return found

    def all(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows."""
        with self._guard, _translated():
            found: list[tuple[Any, ...]] = self._connection.execute(statement, values).fetchall()
            return found

    def close(self) -> None:
        """Close it. Closing twice does no harm."""
        with self._guard:
            self._connection.close()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except dbapi2.Error as error:
        # The text of the library may name tables; values are only ever bound, never in the text.
        raise StoreError(
            f"The store could not be read or written ({type(error).__name__}): is the disk full, "
            "was the file changed, or is it in use by another program?"
        ) from None
