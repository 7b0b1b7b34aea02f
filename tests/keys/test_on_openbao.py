"""The whole life of keys on a real OpenBao, with SQLite and PostgreSQL, and the server away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keys.errors import (
    PersonErasedError,
    VaultDeniedError,
    VaultRejectedError,
    VaultUnavailableError,
)
from keys.ports import KeyWrapper
from keys.sealed import parse_sealed
from keys.store import wrapped_key
from keys.transit import TransitKeyWrapper
from keys.vault import VaultClient
from tests.keys.workbench import TENANT, Workbench, workbench
from tests.openbao import running_server, wait_until
from tests.postgres import running_postgres

ACTOR = "operator"


def wire(where: Path | str, vault: Callable[[str], VaultClient]) -> Iterator[Workbench]:
    gateway: KeyWrapper = TransitKeyWrapper(vault("gateway"))
    operator: KeyWrapper = TransitKeyWrapper(vault("operator"))
    with workbench(where, wrapper=gateway, operator=operator) as made:
        yield made


@pytest.fixture
def bench(tmp_path: Path, vault: Callable[[str], VaultClient]) -> Iterator[Workbench]:
    yield from wire(tmp_path / "keys.sqlite3", vault)


@pytest.fixture
def on_postgres(tmp_path: Path, vault: Callable[[str], VaultClient]) -> Iterator[Workbench]:
    with running_postgres(tmp_path / "postgres") as url:
        yield from wire(url, vault)


def live_through_everything(bench: Workbench) -> None:
    persons = [f"person-{number}" for number in range(230)]
    bench.keyring.prefetch(TENANT, persons, create=True)
    texts = {person: bench.seal(person, person.encode()) for person in persons}
    backup = bench.table.by_ids([parse_sealed(text).key_id for text in texts.values()])

    rotation = bench.epochs.rotate(actor=ACTOR)
    assert rotation.rewrapped >= 231
    receipt = bench.eraser.erase(tenant=TENANT, person="person-7", actor=ACTOR)
    assert receipt.proof == "keys.person_erased"
    assert bench.store.wrapper.unwrap([wrapped_key(backup[receipt.key_ids[0]])])  # not yet dead
    bench.epochs.trim(actor=ACTOR, oldest=rotation.epoch)
    for row in backup.values():
        with pytest.raises(VaultRejectedError):
            bench.store.wrapper.unwrap([wrapped_key(row)])

    for person, text in texts.items():
        if person == "person-7":
            with pytest.raises(PersonErasedError):
                bench.unseal(person, text)
        else:
            assert bench.unseal(person, text) == person.encode()
    assert bench.epochs.check().sound


def test_keys_live_through_everything_on_sqlite(bench: Workbench) -> None:
    live_through_everything(bench)


def test_keys_live_through_everything_on_postgresql(on_postgres: Workbench) -> None:
    live_through_everything(on_postgres)


def test_the_gateway_cannot_roll_or_trim_and_the_operator_cannot_open(bench: Workbench) -> None:
    bench.seal("ada")
    [row] = bench.table.versions(bench.keyring.owner(TENANT, "ada"))
    with pytest.raises(VaultDeniedError):
        bench.store.wrapper.roll()
    with pytest.raises(VaultDeniedError):
        bench.epochs._operator.unwrap([wrapped_key(row)])


@pytest.mark.serial
def test_without_the_server_warm_keys_serve_and_others_fail_closed(tmp_path: Path) -> None:
    with (
        running_server(tmp_path / "server") as server,
        server.client("gateway") as client,
        workbench(tmp_path / "k", wrapper=TransitKeyWrapper(client)) as bench,
    ):
        text = bench.seal("ada")
        with server.stopped():
            assert bench.unseal("ada", text) == b"text"
            with pytest.raises(VaultUnavailableError):
                bench.seal("bob")
            bench.store.empty()
            with pytest.raises(VaultUnavailableError):
                bench.unseal("ada", text)
        server.wait_until_up()
        assert unseal_when_closed(bench, text) == b"text"


def unseal_when_closed(bench: Workbench, text: str) -> bytes:
    """Open once the client's circuit lets calls through again."""
    found: list[bytes] = []

    def opens() -> bool:
        try:
            found.append(bench.unseal("ada", text))
        except VaultUnavailableError:
            return False
        return True

    wait_until(opens, timeout_s=30)
    return found[0]
