from __future__ import annotations

import contextlib
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from keyring.errors import KeyringLocked

from federated.errors import StoreError
from federated.node.keeper import FileKeeper, RingKeeper, keeper_for
from federated.node.store import Store, erase_at
from keys.aead import KEY_BYTES
from tests.federated.node.tables import RECORD, fill, table

#: Doubles whose bytes do not come about by chance.
TELLTALE = [3.1415926535897, 2.7182818284590, 1.6180339887498]


def everything(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_gives_back_what_was_put_in(store: Store) -> None:
    fill(store, {"Patient/1": {"mood": [1.0, 2.0], "sleep_hours": [7.0]}})
    rows = store.rows(store.person("Patient/1"), frozenset({"mood", "sleep_hours"}))
    assert rows.days.tolist() == [19_000, 19_001]
    assert rows.values["mood"].tolist() == [1.0, 2.0]
    assert rows.values["sleep_hours"][0] == 7.0
    assert np.isnan(rows.values["sleep_hours"][1])


def test_reads_only_the_columns_that_are_asked_for(store: Store) -> None:
    fill(store, {"p": {"mood": [1.0], "phq9_total": [9.0]}})
    assert set(store.rows(store.person("p"), frozenset({"mood"})).values) == {"mood"}
    with pytest.raises(StoreError, match="no column"):
        store.rows(store.person("p"), frozenset({"name"}))


def test_what_is_lasting_stands_on_every_day(store: Store) -> None:
    fill(store, {"p": {"mood": [1.0, 2.0, 3.0], "sex": [1.0]}})
    rows = store.rows(store.person("p"), frozenset({"mood", "sex"}))
    assert rows.values["sex"].tolist() == [1.0, 1.0, 1.0]
    alone = store.rows(store.person("p"), frozenset({"sex"}))
    assert alone.days.tolist() == [19_000]


def test_no_value_name_or_column_is_ever_on_disk_in_clear(tmp_path: Path, store: Store) -> None:
    """Looks at every byte under the folder while a transaction is open, after, and at the end."""
    seen: list[bytes] = []
    person = "Patient/Dorothea-Unmistakable"
    with store.database.transaction():
        store.database.run("PRAGMA cache_spill = 2")
        for number in range(40):
            values = {"mood": TELLTALE * 300}
            store.merge({f"{person}-{number}": table(values)}, record=RECORD)
        seen.append(everything(tmp_path))
        assert (tmp_path / "device.store-journal").exists()
    # Temporary tables never leave memory.
    assert store.database.one("PRAGMA temp_store") == (2,)
    seen.append(everything(tmp_path))
    store.rows(store.person(f"{person}-3"), frozenset({"mood"}))
    store.close()
    seen.append(everything(tmp_path))
    telltales = [np.float64(value).tobytes() for value in TELLTALE]
    for content in seen:
        assert len(content) > 10_000
        for needle in (*telltales, b"Unmistakable", b"mood", b"SQLite format", b"CREATE TABLE"):
            assert needle not in content


def test_files_are_closed_to_others(tmp_path: Path, store: Store) -> None:
    fill(store, {"p": {"mood": [1.0]}})
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_wrong_key_opens_nothing(tmp_path: Path, store: Store, keeper: FileKeeper) -> None:
    fill(store, {"p": {"mood": [1.0]}})
    store.close()
    keeper.set("database", "00" * KEY_BYTES)
    with pytest.raises(StoreError, match="does not open"):
        Store.open(tmp_path / "device.store", keeper)


def test_a_wrong_key_says_nothing_on_standard_error(
    tmp_path: Path, store: Store, keeper: FileKeeper, capfd: pytest.CaptureFixture[str]
) -> None:
    store.close()
    keeper.set("database", "00" * KEY_BYTES)
    with pytest.raises(StoreError):
        Store.open(tmp_path / "device.store", keeper)
    assert capfd.readouterr().err == ""


def test_a_changed_byte_is_found(tmp_path: Path, store: Store, keeper: FileKeeper) -> None:
    fill(store, {"p": {"mood": [1.0] * 2000}})
    store.close()
    path = tmp_path / "device.store"
    content = bytearray(path.read_bytes())
    for place in range(2000, len(content), 4096):
        content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError):
        Store.open(path, keeper).rows(Store.open(path, keeper).person("p"), frozenset({"mood"}))


def test_one_persons_block_does_not_open_as_anothers(store: Store) -> None:
    fill(store, {"a": {"mood": [1.0]}, "b": {"mood": [2.0]}})
    a, b = store.person("a"), store.person("b")
    with store.database.transaction():
        found = store.database.one("SELECT sealed FROM rows WHERE person = ?", [a.number])
        assert found
        store.database.run("UPDATE rows SET sealed = ? WHERE person = ?", [found[0], b.number])
    with pytest.raises(StoreError, match="do not open"):
        store.rows(b, frozenset({"mood"}))


def test_an_error_in_a_transaction_leaves_nothing_behind(store: Store) -> None:
    fill(store, {"a": {"mood": [1.0]}})
    with pytest.raises(StoreError):
        store.merge({"b": table({"mood": [2.0]}), "not a name": table({})}, record=RECORD)

    def import_that_fails_late() -> None:
        with store.database.transaction():
            fill(store, {"c": {"mood": [3.0]}})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        import_that_fails_late()
    assert [person.name for person in store.people()] == ["a"]


def test_importing_the_same_twice_changes_no_byte(tmp_path: Path, store: Store) -> None:
    fill(store, {"a": {"mood": [1.0, 2.0]}})
    before = (tmp_path / "device.store").read_bytes()
    fill(store, {"a": {"mood": [1.0, 2.0]}})
    assert (tmp_path / "device.store").read_bytes() == before
    assert len(store.imports()) == 1


def test_an_erased_person_is_gone_from_old_copies_too(
    tmp_path: Path, store: Store, keeper: FileKeeper
) -> None:
    fill(store, {"a": {"mood": [1.0]}, "b": {"mood": [2.0]}})
    store.close()
    backup = tmp_path / "backup"
    backup.mkdir()
    for file in tmp_path.glob("device.store*"):
        shutil.copy(file, backup / file.name)
    opened = Store.open(tmp_path / "device.store", keeper)
    opened.erase_person(opened.person("a"))
    assert [person.name for person in opened.people()] == ["b"]
    assert opened.rows(opened.person("b"), frozenset({"mood"})).values["mood"].tolist() == [2.0]
    opened.close()
    with pytest.raises(StoreError, match="older than an erasure"):
        Store.open(backup / "device.store", keeper)


def test_an_erasure_that_a_crash_interrupted_is_finished(
    tmp_path: Path, store: Store, keeper: FileKeeper
) -> None:
    fill(store, {"a": {"mood": [1.0]}, "b": {"mood": [2.0]}})
    store._chest.destroy([store.person("a").number])
    store.close()
    opened = Store.open(tmp_path / "device.store", keeper)
    assert [person.name for person in opened.people()] == ["b"]


def test_an_older_chest_is_refused_and_forgets_nobody_who_came_since(
    tmp_path: Path, store: Store, keeper: FileKeeper
) -> None:
    """Of people who came after it there are no keys in it, as if they had been erased."""
    fill(store, {"a": {"mood": [1.0]}})
    chest = tmp_path / "device.store.keys"
    older = chest.read_bytes()
    fill(store, {"b": {"mood": [2.0]}})
    newest = chest.read_bytes()
    store.close()
    chest.write_bytes(older)
    with pytest.raises(StoreError, match="newest copy"):
        Store.open(tmp_path / "device.store", keeper)
    chest.write_bytes(newest)
    opened = Store.open(tmp_path / "device.store", keeper)
    assert opened.rows(opened.person("b"), frozenset({"mood"})).values["mood"].tolist() == [2.0]
    opened._chest.destroy([opened.person("b").number])
    opened.close()
    opened = Store.open(tmp_path / "device.store", keeper)
    assert [person.name for person in opened.people()] == ["a"]
    opened.close()


def test_erasing_the_store_destroys_the_keys_and_the_files(
    tmp_path: Path, store: Store, keeper: FileKeeper
) -> None:
    fill(store, {"a": {"mood": [1.0]}})
    copy = tmp_path / "copy.store"
    shutil.copy(tmp_path / "device.store", copy)
    store.erase()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy.store", "ring"]
    assert not list((tmp_path / "ring").iterdir())
    with pytest.raises(StoreError, match="no key"):
        Store.open(copy, keeper)


def test_a_store_that_does_not_open_can_still_be_erased(
    tmp_path: Path, store: Store, keeper: FileKeeper
) -> None:
    store.close()
    (tmp_path / "device.store").write_bytes(b"rubbish")
    erase_at(tmp_path / "device.store", keeper)
    assert [file.name for file in tmp_path.iterdir()] == ["ring"]


def test_no_store_is_made_over_another(tmp_path: Path, store: Store, keeper: FileKeeper) -> None:
    with pytest.raises(StoreError, match="already"):
        Store.create(tmp_path / "device.store", keeper)
    other = FileKeeper(tmp_path / "other.keys")
    with pytest.raises(StoreError, match="cannot be made"):
        Store.create(tmp_path / "device.store", other)


def test_keys_in_a_file_that_others_can_read_are_refused(
    tmp_path: Path, store: Store, keeper: FileKeeper
) -> None:
    store.close()
    (tmp_path / "ring" / "device.keys").chmod(0o644)
    with pytest.raises(StoreError, match="0644"):
        Store.open(tmp_path / "device.store", keeper)


def test_several_threads_read_and_write_one_store(store: Store) -> None:
    def work(number: int) -> None:
        for turn in range(5):
            fill(store, {f"p{number}": {"mood": [float(turn)] * (turn + 1)}})
            store.rows(store.person(f"p{number}"), frozenset({"mood"}))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        rows = store.rows(store.person(f"p{number}"), frozenset({"mood"}))
        assert rows.values["mood"].tolist() == [4.0] * 5


_WRITER = """
    import sys
    from pathlib import Path
    from federated.node.keeper import FileKeeper
    from federated.node.store import Store
    from tests.federated.node.tables import fill
    store = Store.open(Path(sys.argv[1]), FileKeeper(Path(sys.argv[2])))
    number = 0
    while True:
        number += 1
        fill(store, {f"{number}-{one}": {"mood": [float(number % 6)] * 50} for one in range(5)})
        print(number, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_whole_imports(
    tmp_path: Path, store: Store, keeper: FileKeeper
) -> None:
    store.close()
    path = tmp_path / "device.store"
    for attempt in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_WRITER), str(path), str(keeper._path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[3],
        )
        assert process.stdout
        said = int(process.stdout.readline())
        time.sleep(0.011 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        opened = Store.open(path, keeper)
        by_import: dict[str, int] = {}
        for person in opened.people():
            number = person.name.split("-")[0]
            by_import[number] = by_import.get(number, 0) + 1
            values = opened.rows(person, frozenset({"mood"})).values["mood"].tolist()
            assert values == [float(int(number) % 6)] * 50
        assert set(by_import.values()) == {5}
        assert len(by_import) >= said
        assert len(opened.imports()) == len(by_import)
        opened.close()


class MemoryRing:
    """A key ring of the operating system, in memory. `__module__` and name: as one that is."""

    __module__, __qualname__ = "keyring.backends.SecretService", "Keyring"

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], str] = {}
        self.locked = False

    def get_password(self, service: str, username: str) -> str | None:
        if self.locked:
            raise KeyringLocked("locked; it holds s3cret")
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.kept[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        del self.kept[service, username]


def test_keys_lie_in_the_key_ring_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = MemoryRing()
    monkeypatch.setattr("keyring.get_keyring", lambda: ring)
    monkeypatch.setattr("keyring.get_password", ring.get_password)
    monkeypatch.setattr("keyring.set_password", ring.set_password)
    monkeypatch.setattr("keyring.delete_password", ring.delete_password)
    keeper = keeper_for(tmp_path / "device.store", None)
    assert isinstance(keeper, RingKeeper)
    store = Store.create(tmp_path / "device.store", keeper)
    fill(store, {"a": {"mood": [1.0]}})
    store.close()
    assert {name for _, name in ring.kept} == {"database", "chest", "counter"}
    key = bytes.fromhex(next(v for (_, name), v in ring.kept.items() if name == "database"))
    content = everything(tmp_path)
    assert key not in content
    assert key.hex().encode() not in content
    ring.locked = True
    with pytest.raises(StoreError, match="unlock it") as caught:
        Store.open(tmp_path / "device.store", keeper)
    assert "s3cret" not in str(caught.value)
    ring.locked = False
    Store.open(tmp_path / "device.store", keeper).erase()
    assert ring.kept == {}


def test_nobody_writes_between_a_commit_and_what_follows_it(
    store: Store, keeper: FileKeeper
) -> None:
    """What follows is the keeper's counter: two writers must not set it in the wrong order."""
    other = Store.open(store.database.path, keeper)
    entered, early = threading.Event(), []

    def write() -> None:
        with other.database.transaction():
            entered.set()

    rival = threading.Thread(target=write)

    def follow() -> None:
        rival.start()
        early.append(entered.wait(1.0))

    with store.database.transaction():
        store.database.run("INSERT INTO meta VALUES ('x', '1')")
        store.database.after_commit(follow)
    rival.join()
    other.close()
    assert early == [False]
    assert entered.is_set()


def test_one_persons_table_does_not_grow_without_bound(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many imports it comes in; the one that is too much is left out whole."""
    monkeypatch.setattr("federated.node.store.MAX_TABLE_BYTES", 5_000)

    def import_days(number: int) -> None:
        days = table({"mood": [1.0] * 20}, first_day=10_000 + number * 20)
        store.merge({"a": days}, record=RECORD)

    kept = 0
    while len(store.imports()) == kept < 50:
        kept += 1
        with contextlib.suppress(StoreError):
            import_days(kept)
    kept -= 1
    with pytest.raises(StoreError, match="5000"):
        import_days(kept + 1)
    assert 2 < kept < 20
    rows = store.rows(store.person("a"), frozenset({"mood"}))
    assert len(rows.days) == 20 * kept == 20 * len(store.imports())
