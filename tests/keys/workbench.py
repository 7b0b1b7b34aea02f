"""Everything of `keys` wired together over a database and a key server, for tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from keys.blindindex import BlindIndex
from keys.database import KeyDatabase
from keys.epochs import EpochKeeper
from keys.erasure import Eraser
from keys.keyring import Keyring
from keys.model import FieldContext
from keys.ports import KeyWrapper
from keys.settings import CacheSettings, EpochSettings, IndexSettings
from keys.store import SEALS_PER_RESERVATION, KeyStore
from keys.table import KeyTable
from tests.keys.fakes import FakeClock, FakeKeyServer, FakeRecorder

TENANT = "clinic-a"


@dataclass
class Workbench:
    """One process's view of the keys. `server` is what the wrapper is, when it is the fake."""

    database: KeyDatabase
    table: KeyTable
    server: FakeKeyServer
    clock: FakeClock
    recorder: FakeRecorder
    store: KeyStore
    keyring: Keyring
    epochs: EpochKeeper
    eraser: Eraser
    index: BlindIndex

    def seal(self, person: str, plaintext: bytes = b"text") -> str:
        return self.keyring.seal(context_of(person), plaintext)

    def unseal(self, person: str, text: str) -> bytes:
        return self.keyring.unseal(context_of(person), text)


def context_of(person: str, /, **changes: str) -> FieldContext:
    """Return a context that differs from the usual one only in what is named."""
    values = {"tenant": TENANT, "person": person, "service": "ehr", "field": "Patient.name"}
    return FieldContext(**{**values, **changes})


@contextmanager
def workbench(
    where: Path | str,
    *,
    server: FakeKeyServer | None = None,
    wrapper: KeyWrapper | None = None,
    operator: KeyWrapper | None = None,
    clock: FakeClock | None = None,
    recorder: FakeRecorder | None = None,
    cache: CacheSettings | None = None,
    seals_per_key: int = 2**32,
    seals_per_reservation: int = SEALS_PER_RESERVATION,
) -> Iterator[Workbench]:
    """Open the database at a path or URL and wire everything; close it at the end."""
    url = where if isinstance(where, str) else f"sqlite:///{where}"
    server = server or FakeKeyServer()
    clock = clock or FakeClock()
    recorder = recorder or FakeRecorder()
    database = KeyDatabase(url)
    table = KeyTable(database)
    store = KeyStore(
        table=table,
        wrapper=wrapper or server,
        settings=cache or CacheSettings(),
        clock=clock,
        monotonic=clock,
        seals_per_key=seals_per_key,
        seals_per_reservation=seals_per_reservation,
    )
    keyring = Keyring(store)
    epochs = EpochKeeper(
        store,
        operator=operator or wrapper or server,
        settings=EpochSettings(),
        recorder=recorder,
    )
    try:
        yield Workbench(
            database=database,
            table=table,
            server=server,
            clock=clock,
            recorder=recorder,
            store=store,
            keyring=keyring,
            epochs=epochs,
            eraser=Eraser(keyring, database=database, epochs=epochs, recorder=recorder),
            index=BlindIndex(
                store, settings=IndexSettings(), recorder=recorder, sleep=clock.advance
            ),
        )
    finally:
        store.close()
        database.close()


def database_files(path: Path) -> Mapping[str, bytes]:
    """Return the raw bytes of an SQLite database and whatever lies beside it."""
    return {file.name: file.read_bytes() for file in path.parent.glob(f"{path.name}*")}
