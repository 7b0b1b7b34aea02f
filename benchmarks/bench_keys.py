"""Sealing and opening a field, beside one call of the key server per field.

The peer is what an app does without envelope encryption: one transit encrypt or decrypt for each
field, on the same embedded OpenBao, over the same client, in the same run and by turns.
"""

from __future__ import annotations

import base64
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Result, alternate
from keys.database import KeyDatabase
from keys.embedded import EmbeddedServer
from keys.keyring import Keyring
from keys.layout import KEK
from keys.model import FieldContext
from keys.ports import KeyWrapper, WrappedKey, WrapRequest
from keys.settings import EmbeddedSettings, KeysSettings
from keys.store import KeyStore
from keys.table import KeyTable
from keys.transit import MAX_BATCH_ITEMS, TransitKeyWrapper
from keys.vault import VaultClient

FIELD = b"Moderate depressive episode; review in two weeks, sooner if."
#: Short rounds, many of them: the median is then of rounds that nothing interrupted.
FIELDS = 500
PEER_FIELDS = 20
PERSONS = 100
ROUNDS = 101


@dataclass
class CountingWrapper:
    """Counts requests to the key server, as `TransitKeyWrapper` batches them."""

    inner: KeyWrapper
    calls: int = 0

    def wrap(self, requests: Sequence[WrapRequest]) -> list[WrappedKey]:
        """Count and pass on."""
        self._count(requests)
        return self.inner.wrap(requests)

    def unwrap(self, wrapped: Sequence[WrappedKey]) -> list[bytes]:
        """Count and pass on."""
        self._count(wrapped)
        return self.inner.unwrap(wrapped)

    def rewrap(self, wrapped: Sequence[WrappedKey]) -> list[WrappedKey]:
        """Count and pass on."""
        self._count(wrapped)
        return self.inner.rewrap(wrapped)

    def epochs(self) -> tuple[int, int]:
        """Count and pass on."""
        self.calls += 1
        return self.inner.epochs()

    def roll(self) -> int:
        """Count and pass on."""
        self.calls += 1
        return self.inner.roll()

    def trim(self, oldest: int) -> None:
        """Count and pass on."""
        self.calls += 1
        self.inner.trim(oldest)

    def _count(self, items: Sequence[object]) -> None:
        self.calls += -(-len(items) // MAX_BATCH_ITEMS)


def run() -> dict[str, Result]:
    """Measure against a real OpenBao that is started for it."""
    with tempfile.TemporaryDirectory() as directory:
        settings = KeysSettings(
            table_url=f"sqlite:///{directory}/keys.sqlite3",
            embedded=EmbeddedSettings(directory=str(Path(directory) / "openbao")),
        )
        with EmbeddedServer(settings) as server, server.client("gateway") as client:
            database = KeyDatabase(settings.table_url)
            try:
                wrapper = CountingWrapper(TransitKeyWrapper(client))
                with closing(
                    KeyStore(table=KeyTable(database), wrapper=wrapper, settings=settings.cache)
                ) as store:
                    return _measure(Keyring(store), wrapper, client)
            finally:
                database.close()


def _measure(keyring: Keyring, wrapper: CountingWrapper, client: VaultClient) -> dict[str, Result]:
    contexts = [
        FieldContext(tenant="clinic", person=f"Patient/{n}", service="ehr", field="Condition.note")
        for n in range(PERSONS)
    ]
    keyring.prefetch("clinic", [context.person for context in contexts], create=True)
    texts = [keyring.seal(context, FIELD) for context in contexts]
    work = [(contexts[n % PERSONS], texts[n % PERSONS]) for n in range(FIELDS)]

    def seal() -> float:
        started = time.perf_counter()
        for context, _ in work:
            keyring.seal(context, FIELD)
        return _per_field_us(started, FIELDS)

    def unseal() -> float:
        started = time.perf_counter()
        for context, text in work:
            keyring.unseal(context, text)
        return _per_field_us(started, FIELDS)

    peer_seal, peer_unseal = _peers(client)
    for warm_up in (seal, unseal, peer_seal, peer_unseal):
        warm_up()
    before = wrapper.calls
    sealed, peer_sealed = alternate(seal, peer_seal, rounds=ROUNDS)
    opened, peer_opened = alternate(unseal, peer_unseal, rounds=ROUNDS)
    calls = (wrapper.calls - before) / (2 * ROUNDS * FIELDS) * 1000
    return {
        "keys.seal_us": Result.of(
            sealed, unit="us", peer="one transit encrypt a field", peer_rounds=peer_sealed
        ),
        "keys.unseal_us": Result.of(
            opened, unit="us", peer="one transit decrypt a field", peer_rounds=peer_opened
        ),
        "keys.vault_calls_per_1000_fields": Result(
            median=calls,
            spread=0.0,
            unit="calls",
            peer="one transit call a field",
            peer_median=1000.0,
        ),
    }


def _peers(client: VaultClient) -> tuple[Callable[[], float], Callable[[], float]]:
    context = base64.b64encode(b"Patient/1").decode()
    plaintext = base64.b64encode(FIELD).decode()
    mount = client.layout.transit

    def encrypt() -> str:
        body = {"context": context, "plaintext": plaintext}
        answer = client.call("POST", f"{mount}/encrypt/{KEK}", body)
        return str(answer["data"]["ciphertext"])

    ciphertext = encrypt()

    def seal() -> float:
        started = time.perf_counter()
        for _ in range(PEER_FIELDS):
            encrypt()
        return _per_field_us(started, PEER_FIELDS)

    def unseal() -> float:
        started = time.perf_counter()
        for _ in range(PEER_FIELDS):
            body = {"context": context, "ciphertext": ciphertext}
            client.call("POST", f"{mount}/decrypt/{KEK}", body)
        return _per_field_us(started, PEER_FIELDS)

    return seal, unseal


def _per_field_us(started: float, fields: int) -> float:
    return (time.perf_counter() - started) / fields * 1e6
