from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from federated.errors import StoreError
from federated.node import chest as chest_module
from federated.node.chest import Chest
from federated.node.keeper import FileKeeper
from federated.node.store import Store
from keys.aead import KEY_BYTES
from tests.federated.node.tables import fill

ROOT = Path(__file__).resolve().parents[3]


def secrets_of(keeper: FileKeeper) -> tuple[str | None, str | None]:
    return keeper.get(chest_module.KEY_NAME), keeper.get(chest_module.NEXT_NAME)


@pytest.mark.parametrize("reached", ["next key kept", "chest sealed", "key taken over"])
def test_who_only_reads_during_an_erasure_changes_nothing(
    store: Store, keeper: FileKeeper, reached: str
) -> None:
    """At each step of it another process may open the chest: the erasure is not its to finish."""
    fill(store, {"a": {"mood": [1.0]}, "b": {"mood": [2.0]}})
    a, b = (store.person(name).number for name in "ab")
    path, chest = store.database.path.with_name("device.store.keys"), store._chest
    kept = chest.key(b)
    assert kept
    keeper.set(chest_module.NEXT_NAME, "ab" * KEY_BYTES)
    if reached != "next key kept":
        chest._write(bytes.fromhex("ab" * KEY_BYTES), {b: kept})
    if reached == "key taken over":
        keeper.set(chest_module.KEY_NAME, "ab" * KEY_BYTES)
    before = (secrets_of(keeper), path.read_bytes())
    reader = Chest(path, keeper, store.database.transaction)
    assert reader.key(b) == kept
    assert (reader.key(a) is None) == (reached != "next key kept")
    assert (secrets_of(keeper), path.read_bytes()) == before


@pytest.mark.parametrize("reached", ["next key kept", "chest sealed", "key taken over"])
def test_the_next_change_finishes_an_erasure_that_a_crash_cut_short(
    store: Store, keeper: FileKeeper, reached: str
) -> None:
    fill(store, {"a": {"mood": [1.0]}, "b": {"mood": [2.0]}})
    b, chest = store.person("b").number, store._chest
    kept = chest.key(b)
    assert kept
    old = keeper.get(chest_module.KEY_NAME)
    keeper.set(chest_module.NEXT_NAME, "ab" * KEY_BYTES)
    if reached != "next key kept":
        chest._write(bytes.fromhex("ab" * KEY_BYTES), {b: kept})
    if reached == "key taken over":
        keeper.set(chest_module.KEY_NAME, "ab" * KEY_BYTES)
    store.close()
    opened = Store.open(store.database.path, keeper)
    begun = reached != "next key kept"
    assert [person.name for person in opened.people()] == (["b"] if begun else ["a", "b"])
    assert (keeper.get(chest_module.KEY_NAME) == old) != begun
    fill(opened, {"c": {"mood": [3.0]}})
    opened.erase_person(opened.person("c"))
    assert opened.rows(opened.person("b"), frozenset({"mood"})).values["mood"].tolist() == [2.0]
    assert keeper.get(chest_module.NEXT_NAME) is None
    assert keeper.get(chest_module.KEY_NAME) not in {old, "ab" * KEY_BYTES}
    opened.close()


def test_the_key_of_an_erasure_is_not_read_back_from_the_keeper(
    store: Store, keeper: FileKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever takes it out of the keeper meanwhile must not take everybody's keys with it."""
    fill(store, {"a": {"mood": [1.0]}, "b": {"mood": [2.0]}})
    write = Chest._write

    def taken_out(self: Chest, key: bytes, keys: dict[int, bytes]) -> None:
        write(self, key, keys)
        keeper.delete(chest_module.NEXT_NAME)

    monkeypatch.setattr(Chest, "_write", taken_out)
    store.erase_person(store.person("a"))
    monkeypatch.undo()
    store.close()
    opened = Store.open(store.database.path, keeper)
    assert opened.rows(opened.person("b"), frozenset({"mood"})).values["mood"].tolist() == [2.0]
    opened.close()


def test_erasing_while_others_open_the_store_loses_nobody_elses_keys(
    store: Store, keeper: FileKeeper
) -> None:
    people = {f"p{number}": {"mood": [1.0]} for number in range(40)}
    fill(store, {**people, "kept": {"mood": [3.0]}})
    place = [str(store.database.path), str(keeper._path)]
    hammer = [sys.executable, "-m", "tests.federated.node.hammer"]
    readers = [
        subprocess.Popen([*hammer, "open", *place], cwd=ROOT, stdin=subprocess.PIPE,
                         stderr=subprocess.PIPE)
        for _ in range(2)
    ]  # fmt: skip
    eraser = subprocess.run([*hammer, "erase", *place], cwd=ROOT, timeout=240, check=False)
    for reader in readers:
        _, errors = reader.communicate(timeout=240)
        assert reader.returncode == 0, errors.decode()[-2000:]
    assert eraser.returncode == 0
    assert [person.name for person in store.people()] == ["kept"]
    kept = store.rows(store.person("kept"), frozenset({"mood"}))
    assert kept.values["mood"].tolist() == [3.0]


def test_killed_at_every_line_of_an_erasure_all_others_still_open(
    tmp_path: Path, store: Store, keeper: FileKeeper
) -> None:
    """And who was erased never opens again, in a copy of the files neither."""
    fill(store, {f"p{number}": {"mood": [float(number)]} for number in range(3)})
    store.close()
    done = subprocess.run(
        [sys.executable, "-m", "tests.federated.node.crashes", "erase",
         str(store.database.path), str(keeper._path)],
        cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 60


def test_a_chest_of_before_an_erasure_is_refused(store: Store, keeper: FileKeeper) -> None:
    fill(store, {"a": {"mood": [1.0]}, "b": {"mood": [2.0]}})
    path = store.database.path.with_name("device.store.keys")
    shutil.copy(path, path.with_name("copy"))
    store.erase_person(store.person("a"))
    shutil.copy(path.with_name("copy"), path)
    with pytest.raises(StoreError, match="older than an erasure"):
        store.rows(store.person("b"), frozenset({"mood"}))


def test_what_a_crash_left_of_a_chest_goes_with_the_next_write(store: Store) -> None:
    left = store.database.path.with_name(".device.store.keys.0123456789abcdef")
    left.write_bytes(b"keys")
    fill(store, {"a": {"mood": [1.0]}})
    assert not left.exists()


def test_who_reads_while_an_erasure_is_done_in_between_looks_again(
    store: Store, keeper: FileKeeper
) -> None:
    """The file was read before it, the keeper is asked after it: they do not fit together."""
    fill(store, {"a": {"mood": [1.0]}, "b": {"mood": [2.0]}})
    number = store.person("b").number
    path = store.database.path.with_name("device.store.keys")

    class Late(FileKeeper):
        asked = False

        def get(self, name: str) -> str | None:
            if not self.asked:
                self.asked = True
                store.erase_person(store.person("a"))
            return super().get(name)

    late = Late(keeper._path)
    reader = Chest(path, late, store.database.transaction)
    assert reader.key(number) == store._chest.key(number)
    assert late.asked
