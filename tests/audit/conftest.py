"""What tests of the log share: a signer in memory, a log, entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.checkpoint import verifier_keys
from audit.log import LogWriter
from audit.note import VerifierKey
from audit.publish import Publisher
from keys.errors import VaultUnavailableError

ORIGIN = "log.example/audit/1"


class MemorySigner:
    """`keys.ports.Signer` in memory, in versions; it can be made to fail."""

    def __init__(self) -> None:
        self._keys = [Ed25519PrivateKey.generate()]
        self.away = False
        self.wrong = False
        self.signed: list[bytes] = []

    def rotate(self) -> None:
        self._keys.append(Ed25519PrivateKey.generate())

    def public_keys(self) -> Mapping[int, bytes]:
        keys = enumerate(self._keys, 1)
        return {version: key.public_key().public_bytes_raw() for version, key in keys}

    def sign(self, message: bytes) -> tuple[int, bytes]:
        if self.away:
            raise VaultUnavailableError("The key server is away, as the test wants it.")
        self.signed.append(message)
        return len(self._keys), self._keys[-1].sign(b"other" if self.wrong else message)


def entry(number: int, *, stage: str = "log", request: str | None = None, size: int = 0) -> bytes:
    """A canonical entry; its number can be read back with `number_of`."""
    name = f"r{number}" if request is None else request
    padding = "x" * size
    return (
        f'{{"note":"{padding}","request":"{name}","stage":"{stage}","time":{10**15 + number}}}'
    ).encode()


@dataclass
class Log:
    """A log in a directory, opened and closed at will."""

    directory: Path
    signer: MemorySigner = field(default_factory=MemorySigner)
    writer: LogWriter | None = None

    def open(self) -> LogWriter:
        self.writer = LogWriter.open(self.directory, origin=ORIGIN)
        return self.writer

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    @property
    def keys(self) -> tuple[VerifierKey, ...]:
        return verifier_keys(ORIGIN, self.signer)

    @property
    def checkpoint(self) -> bytes:
        return (self.directory / "checkpoint").read_bytes()

    def fill(self, count: int, *, first: int = 0, size: int = 0) -> None:
        """Append entries and publish, with a writer of its own."""
        with (
            LogWriter.open(self.directory, origin=ORIGIN) as writer,
            Publisher(writer, self.signer) as publisher,
        ):
            for number in range(first, first + count):
                writer.append(entry(number, size=size))
            publisher.publish()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    made = Log(tmp_path / "log")
    yield made
    made.close()
