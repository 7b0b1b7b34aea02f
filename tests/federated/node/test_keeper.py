from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from keyring.backend import KeyringBackend
from keyring.backends import SecretService, Windows, chainer, fail, kwallet, libsecret, macOS, null

from federated.errors import StoreError
from federated.node.keeper import FileKeeper, RingKeeper, keeper_for

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def ring(tmp_path: Path) -> Path:
    folder = tmp_path / "ring"
    folder.mkdir(mode=0o700)
    return folder / "device.keys"


def named(module: str, name: str) -> object:
    return type(name, (), {"__module__": module})()


def test_two_processes_lose_nothing_of_each_others_changes(ring: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.federated.node.hammer", "keep", str(ring), name],
            cwd=ROOT,
        )
        for name in ("a", "b")
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    keeper = FileKeeper(ring)
    for number in range(60):
        assert keeper.get(f"a-{number}") == keeper.get(f"b-{number}") == str(number)


def test_threads_lose_nothing_of_each_others_changes(ring: Path) -> None:
    keeper = FileKeeper(ring)

    def keep(name: str) -> None:
        for number in range(20):
            keeper.set(f"{name}-{number}", "x")
            keeper.delete(f"{name}-{number - 1}")

    threads = [threading.Thread(target=keep, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [keeper.get(f"{name}-19") for name in "abcd"] == ["x"] * 4
    assert keeper.get("a-18") is None


@pytest.mark.parametrize(
    "change", [lambda k: k.set("b", "2"), lambda k: k.delete("a")], ids=["set", "delete"]
)
def test_what_a_crash_left_beside_the_keys_goes_with_the_next_change(
    ring: Path, change: Callable[[FileKeeper], Any]
) -> None:
    keeper = FileKeeper(ring)
    keeper.set("a", "1")
    left = ring.with_name(".device.keys.0123456789abcdef")
    left.write_text('{"chest":"an old key"}')
    kept = [ring.with_name(name) for name in (".device.keys.bak", ".other.0123456789abcdef")]
    for file in kept:
        file.write_text("not ours")
    change(keeper)
    assert not left.exists()
    assert all(file.exists() for file in kept)


def test_the_last_secret_takes_file_lock_and_leftovers_with_it(ring: Path) -> None:
    keeper = FileKeeper(ring)
    keeper.set("a", "1")
    ring.with_name(".device.keys.0123456789abcdef").write_text("{}")
    keeper.delete("a", "never-there")
    assert list(ring.parent.iterdir()) == []
    keeper.delete("a")
    assert list(ring.parent.iterdir()) == []


def test_forgetting_where_nothing_ever_was_does_no_harm(tmp_path: Path) -> None:
    FileKeeper(tmp_path / "no" / "such" / "folder" / "k").delete("a")
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_the_key_file_stays_one(tmp_path: Path, ring: Path) -> None:
    """Else the keys would come to lie where the link is, and old ones stay behind it."""
    link = tmp_path / "link.keys"
    link.symlink_to(ring)
    keeper = FileKeeper(link)
    keeper.set("a", "1")
    keeper.set("a", "2")
    assert link.is_symlink()
    assert FileKeeper(ring).get("a") == "2"
    keeper.delete("a")
    assert not ring.exists()


def test_refuses_a_folder_for_keys_that_others_may_write_to(ring: Path) -> None:
    ring.parent.chmod(0o770)
    with pytest.raises(StoreError, match="0770"):
        FileKeeper(ring).set("a", "1")
    assert list(ring.parent.iterdir()) == []


def test_keys_that_cannot_be_reached_are_a_store_error(ring: Path) -> None:
    ring.mkdir()
    with pytest.raises(StoreError):
        FileKeeper(ring).get("a")
    with pytest.raises(StoreError):
        FileKeeper(ring).set("a", "1")


@pytest.mark.parametrize(
    "found",
    [object.__new__(fail.Keyring), object.__new__(null.Keyring),
     named("keyrings.alt.file", "PlaintextKeyring"), named("keyrings.alt.file", "EncryptedKeyring"),
     named("somebody", "Keyring"), named("keyring.backends.SecretService", "Other")],
    ids=lambda found: f"{type(found).__module__}.{type(found).__name__}",
)  # fmt: skip
def test_refuses_a_key_ring_that_is_not_known_to_encrypt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: object
) -> None:
    monkeypatch.setattr("keyring.get_keyring", lambda: found)
    assert not RingKeeper.available()
    with pytest.raises(StoreError, match=r"--key-file") as caught:
        keeper_for(tmp_path / "device.store", None)
    assert f"{type(found).__module__}.{type(found).__name__}" in str(caught.value)


@pytest.mark.parametrize(
    "known",
    [SecretService.Keyring, libsecret.Keyring, kwallet.DBusKeyring, kwallet.DBusKeyringKWallet4,
     macOS.Keyring, Windows.WinVaultKeyring],
    ids=lambda known: f"{known.__module__}.{known.__name__}",
)  # fmt: skip
def test_takes_the_key_rings_of_the_operating_systems(
    monkeypatch: pytest.MonkeyPatch, known: type[KeyringBackend]
) -> None:
    # Not made as usual: most of them exist on other systems only.
    monkeypatch.setattr("keyring.get_keyring", lambda: object.__new__(known))
    assert RingKeeper.available()


def test_a_chain_of_key_rings_is_as_good_as_its_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    good = macOS.Keyring.__new__(macOS.Keyring)
    bad = named("keyrings.alt.file", "PlaintextKeyring")
    chain = chainer.ChainerBackend.__new__(chainer.ChainerBackend)
    monkeypatch.setattr("keyring.get_keyring", lambda: chain)
    for links, expected in ([good], True), ([good, bad], False), ([], False):
        monkeypatch.setattr(chainer.ChainerBackend, "backends", links)
        assert RingKeeper.available() is expected
