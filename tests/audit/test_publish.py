"""Publishing: what is signed is durable and continues what was signed before."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from audit.checkpoint import (
    SignedCheckpoint,
    parse_checkpoint,
    verifier_keys,
    verify_checkpoint,
)
from audit.errors import LogTamperedError, VerificationError, WitnessError
from audit.note import Signature, parse_note
from audit.publish import Publisher
from audit.verify import examine_log, verify_log
from keys.layout import AUDIT_SIGNING_KEY
from keys.signing import VaultSigner
from keys.vault import VaultClient
from tests.audit.conftest import ORIGIN, Log, entry
from tests.audit.local_witness import DirectWitness, local_witness


def size_of(log: Log) -> int:
    return verify_checkpoint(log.checkpoint, log.keys).checkpoint.size


def test_each_checkpoint_covers_what_is_sequenced_and_its_partial_tiles_lie_there(log: Log) -> None:
    writer = log.open()
    with Publisher(writer, log.signer) as publisher:
        for number in range(600):
            writer.append(entry(number))
            if number % 37 == 0:
                checkpoint = publisher.publish()
                assert checkpoint is not None
                assert checkpoint.size == number + 1 == size_of(log)
                verify_log(log.directory, log.keys)


def test_partial_tiles_go_once_the_full_one_is_published(log: Log) -> None:
    writer = log.open()
    with Publisher(writer, log.signer) as publisher:
        for number in range(300):
            writer.append(entry(number))
            if number in {10, 200, 254, 299}:
                publisher.publish()
            names = {p.name for p in log.directory.rglob("*.p")}
            if number == 254:
                assert sorted(p.name for p in (log.directory / "tile/0/000.p").iterdir()) == [
                    "11",
                    "201",
                    "255",
                ]
        assert names == {"001.p", "000.p"}
        assert not (log.directory / "tile/0/000.p").exists()
        assert not (log.directory / "tile/entries/000.p").exists()
        assert (log.directory / "tile/1/000.p/1").exists()


def test_nothing_is_signed_that_is_not_on_the_disk(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    named: set[Path] = set()
    real_sync, real_directory = os.fdatasync, os.fsync

    def data(descriptor: int) -> None:
        real_sync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def directory(descriptor: int) -> None:
        real_directory(descriptor)
        here = Path(f"/proc/self/fd/{descriptor}").readlink()
        named.update(p for p in here.iterdir() if not p.name.startswith("."))

    monkeypatch.setattr(os, "fdatasync", data)
    monkeypatch.setattr(os, "fsync", directory)
    real_sign = log.signer.sign
    checked = 0

    def sign(message: bytes) -> tuple[int, bytes]:
        nonlocal checked
        for path in (log.directory / "tile").rglob("*"):
            assert path in named, path
            assert path.is_dir() or path.stat().st_ino in synced, path
            checked += 1
        return real_sign(message)

    monkeypatch.setattr(log.signer, "sign", sign)
    writer = log.open()
    with Publisher(writer, log.signer) as publisher:
        for number in range(0, 600, 100):
            for one in range(number, number + 100):
                writer.append(entry(one))
            publisher.publish()
    assert checked > 20


def test_while_the_signer_is_away_entries_go_on_and_the_next_checkpoint_catches_up(
    log: Log,
) -> None:
    writer = log.open()
    with Publisher(writer, log.signer, interval_s=0.01).start() as publisher:
        writer.append(entry(0))
        log.signer.away = True
        until(lambda: publisher.status().error is not None, lambda: writer.append(entry(1)))
        size = writer.size
        for number in range(1000):
            writer.append(entry(number))
        until(lambda: writer.integrator.size >= size + 1000 - 256)
        status = publisher.status()
        assert status.error is not None
        assert "VaultUnavailableError" in status.error
        assert status.size <= size
        # However often it is tried, it leaves the partial tiles of one size behind, not of each.
        assert len(list((log.directory / "tile/entries").rglob("*.p/*"))) <= 3
        log.signer.away = False
        until(lambda: publisher.status().size == writer.size)
        assert publisher.status().error is None
    verify_log(log.directory, log.keys)


def until(holds: Callable[[], bool], act: Callable[[], object] = lambda: None) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        act()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_wrong_signature_is_never_published(log: Log) -> None:
    log.fill(3)
    writer = log.open()
    before = log.checkpoint
    writer.append(entry(3))
    log.signer.wrong = True
    with Publisher(writer, log.signer) as publisher:
        with pytest.raises(VerificationError):
            publisher.publish()
        assert log.checkpoint == before
        log.signer.wrong = False
        publisher.publish()
    assert size_of(log) == 4


def test_a_rotated_key_signs_the_next_checkpoint(log: Log) -> None:
    writer = log.open()
    with Publisher(writer, log.signer) as publisher:
        publisher.publish()
        log.signer.rotate()
        writer.append(entry(0))
        publisher.publish()
    assert size_of(log) == 1
    with pytest.raises(VerificationError):
        verify_checkpoint(log.checkpoint, log.keys[:1])


def test_the_same_tree_is_not_signed_twice(log: Log) -> None:
    writer = log.open()
    with Publisher(writer, log.signer) as publisher:
        writer.append(entry(0))
        for _ in range(5):
            publisher.publish()
    assert len(log.signer.signed) == 1
    with Publisher(writer, log.signer) as publisher:
        publisher.publish()
    assert len(log.signer.signed) == 1


def test_never_signs_over_a_tile_that_was_changed(log: Log) -> None:
    log.fill(600)
    writer = log.open()
    with Publisher(writer, log.signer) as publisher:
        writer.append(entry(600))
        (log.directory / "tile/1/000.p/2").write_bytes(b"y" * 64)
        signed = len(log.signer.signed)
        with pytest.raises(LogTamperedError, match=r"tile/1/000\.p/2"):
            publisher.publish()
    assert len(log.signer.signed) == signed
    with pytest.raises(LogTamperedError):
        writer.append(entry(601))


def test_a_checkpoint_that_the_tiles_do_not_continue_halts_the_log(log: Log) -> None:
    log.fill(600)
    writer = log.open()
    with Publisher(writer, log.signer) as publisher:
        assert publisher._signed is not None
        other = parse_checkpoint(publisher._signed.note.encode())
        forged = type(other.checkpoint)(origin=ORIGIN, size=599, root=b"z" * 32)
        publisher._signed = SignedCheckpoint(checkpoint=forged, note=other.note)
        signed = len(log.signer.signed)
        with pytest.raises(LogTamperedError, match="do not continue"):
            publisher.publish()
    assert len(log.signer.signed) == signed
    with pytest.raises(LogTamperedError):
        writer.append(entry(601))


class SlowWitness:
    """Fails as often as it is told, then signs."""

    name = "slow.example"

    def __init__(self, real: DirectWitness, failures: int) -> None:
        self._real = real
        self._failures = failures

    def cosign(
        self, signed: SignedCheckpoint, prove: Callable[[int], Sequence[bytes]]
    ) -> Sequence[Signature]:
        self._failures -= 1
        if self._failures >= 0:
            raise WitnessError("not now")
        return self._real.cosign(signed, prove)


def test_a_witness_that_fails_is_told_and_asked_again(log: Log, tmp_path: Path) -> None:
    witness = local_witness(tmp_path / "witness", log.keys)
    keys = witness.verifier_keys()
    writer = log.open()
    slow = SlowWitness(DirectWitness(witness), failures=2)
    with Publisher(writer, log.signer, witnesses=[slow]) as publisher:
        writer.append(entry(0))
        for _ in range(2):
            publisher.publish()
            assert publisher.status().witness_errors == {"slow.example": "not now"}
        assert examine_log(log.directory, log.keys, witness_keys=keys).cosigned_by == ()
        publisher.publish()
        assert publisher.status().witness_errors == {}
    report = verify_log(log.directory, log.keys, witness_keys=keys)
    assert report.cosigned_by == ("witness.example",)


def test_the_checkpoint_stays_readable_while_it_is_replaced(log: Log) -> None:
    writer = log.open()
    sizes: list[int] = []
    with Publisher(writer, log.signer, interval_s=0.001).start():
        for number in range(300):
            writer.append(entry(number))
            if (log.directory / "checkpoint").exists():
                sizes.append(size_of(log))
    assert sizes == sorted(sizes)


def test_a_key_that_a_real_key_server_holds_signs_before_and_after_its_rotation(
    log: Log, vault: Callable[[str], VaultClient]
) -> None:
    client = vault("audit")
    signer = VaultSigner(client, AUDIT_SIGNING_KEY)
    writer = log.open()
    with Publisher(writer, signer) as publisher:
        writer.append(entry(0))
        publisher.publish()
        before = log.checkpoint
        path = f"{client.layout.transit}/keys/{AUDIT_SIGNING_KEY}/rotate"
        vault("operator").call("POST", path, {})
        writer.append(entry(1))
        publisher.publish()
    keys = verifier_keys(ORIGIN, signer)
    assert verify_log(log.directory, keys, older_checkpoint=before).size == 2
    assert (
        parse_note(before).signatures[0].key_id != parse_note(log.checkpoint).signatures[0].key_id
    )
    with pytest.raises(VerificationError):
        verify_log(log.directory, log.keys)
