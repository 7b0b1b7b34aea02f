"""Where a store lies: the modes of its files, links, folders that are not one's own, its lock."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from federated.errors import StoreError
from federated.node.keeper import FileKeeper
from federated.node.store import Store, erase_at
from keys.private_files import private_lock
from tests.federated.node.tables import fill

ROOT = Path(__file__).resolve().parents[3]


_WATCHED = """
    import os, sys
    from pathlib import Path
    os.umask(0)
    seen = {}
    def look(event, arguments):
        if event in ("os.rename", "os.remove", "fcntl.flock"):
            for file in Path(sys.argv[1]).rglob("*"):
                try:
                    seen[file.name.partition(".0")[0]] = file.stat().st_mode & 0o777
                except FileNotFoundError:
                    pass
    sys.addaudithook(look)
    from federated.node.keeper import FileKeeper
    from federated.node.store import Store
    from tests.federated.node.tables import fill
    folder = Path(sys.argv[1])
    keeper = FileKeeper(folder / "device.keys")
    store = Store.create(folder / "device.store", keeper)
    fill(store, {"a": {"mood": [1.0]}, "b": {"mood": [1.0]}})
    with store.database.transaction():
        store.withdraw(store.person("a"), "study", now=1)
        keeper.set("while-the-journal-is-there", "1")
        look("os.rename", ())
    store.erase_person(store.person("a"))
    store.close()
    print(*(f"{mode:o} {name}" for name, mode in seen.items()), sep="\\n")
"""


def test_every_file_ever_made_is_closed_to_others_under_any_umask(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir(mode=0o700)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_WATCHED), str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    modes = {name: mode for mode, name in map(str.split, done.stdout.splitlines())}
    for name in ("device.store", "device.store-journal", "device.store.lock", "device.store.keys",
                 "device.keys", "device.keys.lock"):  # fmt: skip
        assert name in modes
    assert any(name.startswith(".device.keys.") for name in modes)
    assert any(name.startswith(".device.store.keys.") for name in modes)
    assert set(modes.values()) == {"600"}


def test_a_file_that_came_back_open_to_others_is_closed(store: Store, keeper: FileKeeper) -> None:
    store.close()
    files = list(store.database.path.parent.glob("device.store*"))
    for file in files:
        file.chmod(0o644)
    Store.open(store.database.path, keeper).close()
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600] * len(files)


def test_a_folder_that_others_may_write_to_is_refused(
    tmp_path: Path, store: Store, keeper: FileKeeper
) -> None:
    store.close()
    tmp_path.chmod(0o777)
    with pytest.raises(StoreError, match="0777"):
        Store.open(store.database.path, keeper)
    with pytest.raises(StoreError, match="0777"):
        Store.create(tmp_path / "new.store", FileKeeper(tmp_path / "ring" / "new"))
    # What is to be destroyed is not kept for that.
    erase_at(store.database.path, keeper)
    assert not list(tmp_path.glob("device*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("which", [".", "device.store", "device.store.keys", "device.store.lock"])
def test_what_belongs_to_somebody_else_is_refused(
    tmp_path: Path, store: Store, keeper: FileKeeper, which: str
) -> None:
    store.close()
    os.chown(tmp_path / which, 12345, 12345)
    with pytest.raises(StoreError, match="belongs to user 12345"):
        Store.open(store.database.path, keeper)


@pytest.mark.parametrize("suffix", [".keys", ".lock"])
def test_a_link_in_place_of_a_file_beside_the_store_is_refused(
    tmp_path: Path, store: Store, keeper: FileKeeper, suffix: str
) -> None:
    store.close()
    beside = tmp_path / f"device.store{suffix}"
    beside.rename(tmp_path / "elsewhere")
    beside.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="regular file"):
        Store.open(store.database.path, keeper)


def test_a_link_that_takes_the_place_of_the_lock_is_never_followed(
    tmp_path: Path, store: Store
) -> None:
    (tmp_path / "device.store.lock").unlink()
    (tmp_path / "device.store.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(StoreError, match="lock"):
        fill(store, {"a": {"mood": [1.0]}})
    assert not (tmp_path / "victim").exists()


def test_a_link_to_a_store_is_the_same_store_with_the_same_lock(
    tmp_path: Path, store: Store, keeper: FileKeeper
) -> None:
    fill(store, {"a": {"mood": [1.0]}})
    link = tmp_path / "link.store"
    link.symlink_to(store.database.path)
    other = Store.open(link, keeper)
    other.set_state(other.person("a"), "paused", now=1)
    store.set_state(store.person("a"), "left", now=2)
    other.generations.verify()
    other.close()
    store.close()
    assert not list(tmp_path.glob("link.store?*"))
    erase_at(link, keeper)
    assert [file.name for file in tmp_path.iterdir()] == ["ring"]


def test_the_store_is_erased_only_when_nobody_is_in_the_middle_of_a_change(
    store: Store, keeper: FileKeeper
) -> None:
    """Else the change would put keys back that were destroyed."""
    fill(store, {"a": {"mood": [1.0]}})
    path = store.database.path
    eraser = threading.Thread(target=erase_at, args=(path, FileKeeper(keeper._path)))
    with store.database.transaction():
        store.set_state(store.person("a"), "paused", now=1)
        eraser.start()
        eraser.join(0.5)
        assert eraser.is_alive()
        assert keeper.get("database") is not None
    eraser.join(60)
    assert not keeper._path.exists()
    with pytest.raises(StoreError, match="erased"):
        store.set_state(store.person("a"), "left", now=1)
    with pytest.raises(StoreError):
        store.erase_person(store.person("a"))
    assert list(path.parent.glob("device*")) == []
    assert list(keeper._path.parent.iterdir()) == []


def test_who_waited_for_the_lock_of_an_erased_store_does_not_share_it_with_the_next(
    tmp_path: Path,
) -> None:
    path, order = tmp_path / "lock", []

    def wait() -> None:
        with private_lock(path):
            order.append(path.exists())

    waiting = [threading.Thread(target=wait) for _ in range(3)]
    with private_lock(path):
        for thread in waiting:
            thread.start()
        waiting[0].join(0.3)
        path.unlink()
        with private_lock(path):
            waiting[0].join(0.3)
            assert order == []
    for thread in waiting:
        thread.join(60)
    assert order == [True] * 3


def test_keys_are_destroyed_where_the_folder_is_gone(
    tmp_path: Path, store: Store, keeper: FileKeeper
) -> None:
    store.close()
    folder = tmp_path / "gone"
    erase_at(folder / "device.store", keeper)
    assert not keeper._path.exists()


def test_what_a_crash_left_of_keys_goes_with_the_store(store: Store, keeper: FileKeeper) -> None:
    folder = store.database.path.parent
    left = [folder / ".device.store.keys.0123456789abcdef",
            keeper._path.with_name(".device.keys.0123456789abcdef")]  # fmt: skip
    for file in left:
        file.write_text("keys")
    store.erase()
    assert not any(file.exists() for file in left)


def test_no_store_is_made_over_the_keys_of_one_that_was_half_made(
    tmp_path: Path, store: Store, keeper: FileKeeper
) -> None:
    store.close()
    keeper.delete("counter")
    shutil.move(store.database.path, tmp_path / "kept-elsewhere")
    with pytest.raises(StoreError, match="already has the keys"):
        Store.create(store.database.path, keeper)


def test_nothing_shows_a_key(store: Store, keeper: FileKeeper) -> None:
    fill(store, {"a": {"mood": [1.0]}})
    number = store.person("a").number
    secrets = [keeper.get("database"), keeper.get("chest"), store.meta("tag-key")]
    secrets += [(store._chest.key(number) or b"").hex()]
    shown = "".join(
        repr(one) for one in (store, store.database, store._chest, keeper, store.generations)
    )
    for secret in secrets:
        assert secret
        assert secret not in shown
        assert repr(bytes.fromhex(secret))[2:-1] not in shown
