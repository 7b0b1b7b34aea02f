"""What tests of entries, index, search and exports share: a sealer, a log in memory, examples."""

from __future__ import annotations

import asyncio
import os
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from audit.model import Actor, Assurance, Entry, Resource
from audit.recorder import Act, AsyncRecorder, Recorder, Who
from keys.errors import PersonErasedError, UnknownKeyError, UnsealError
from keys.sealed import format_sealed, new_key_id, parse_sealed

if TYPE_CHECKING:
    from audit.model import Stage

START_US = 1_800_000_000_000_000
SEALED = "hg1.AAAAAAAAAAAA." + "b" * 60
OTHER = "hg1.BBBBBBBBBBBB." + "c" * 60


class LocalSealer:
    """Keys of persons in memory, AES-256-GCM: `audit.ports.PersonSealer` without a key server."""

    def __init__(self) -> None:
        self._keys: dict[str, bytes | None] = {}
        self._of: dict[tuple[str, str], list[str]] = {}
        self.calls = 0
        self.fail: Exception | None = None

    def seal_for_person(self, *, tenant: str, person: str, field: str, plaintext: bytes) -> str:
        self.calls += 1
        if self.fail is not None:
            raise self.fail
        ids = self._of.setdefault((tenant, person), [])
        if not ids:
            ids.append(new_key_id())
            self._keys[ids[0]] = AESGCM.generate_key(256)
        key = self._keys[ids[-1]]
        assert key is not None
        nonce = os.urandom(12)
        sealed = AESGCM(key).encrypt(nonce, plaintext, f"{tenant}\0{field}".encode())
        return format_sealed(ids[-1], nonce + sealed)

    def name_for_person(self, *, tenant: str, person: str, field: str) -> str:
        return self.seal_for_person(
            tenant=tenant, person=person, field=field, plaintext=person.encode()
        )

    def open_for_person(self, *, tenant: str, field: str, text: str) -> bytes:
        parsed = parse_sealed(text)
        if parsed.key_id not in self._keys:
            raise UnknownKeyError("no such key")
        key = self._keys[parsed.key_id]
        if key is None:
            raise PersonErasedError("erased")
        try:
            return AESGCM(key).decrypt(
                parsed.message[:12], parsed.message[12:], f"{tenant}\0{field}".encode()
            )
        except (InvalidTag, ValueError) as error:
            raise UnsealError("does not open") from error

    def key_ids(self, *, tenant: str, person: str) -> Sequence[str]:
        return list(self._of.get((tenant, person), ()))

    def erase(self, *, tenant: str, person: str) -> None:
        for key_id in self._of.pop((tenant, person), []):
            self._keys[key_id] = None


@dataclass
class Place:
    index: int


@dataclass
class MemoryLog:
    """Appends, and reads by index. `fail_at` says how many appends go well before `fail`."""

    held: list[bytes] = field(default_factory=list)
    fail: Exception | None = None
    fail_at: int = 0
    origin: str = "test.example/log"

    def append(self, entry: bytes) -> Place:
        if self.fail is not None:
            if self.fail_at == 0:
                raise self.fail
            self.fail_at -= 1
        self.held.append(entry)
        return Place(len(self.held) - 1)

    async def append_async(self, entry: bytes) -> Place:
        await asyncio.sleep(0)
        return self.append(entry)

    def size(self) -> int:
        return len(self.held)

    def entry(self, index: int) -> bytes:
        return self.held[index]

    def read(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes]]:
        stop = len(self.held) if end is None else end
        yield from enumerate(self.held[start:stop], start)


class Ticker:
    """A clock that goes on by a second with each look."""

    def __init__(self, now_s: float = START_US / 1e6) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        self.now_s += 1
        return self.now_s


def make_recorder(log: MemoryLog, sealer: LocalSealer) -> Recorder:
    numbers = iter(range(1_000_000))
    return Recorder(log, sealer=sealer, clock=Ticker(), ids=lambda: f"req-{next(numbers)}")


def make_async_recorder(log: MemoryLog, sealer: LocalSealer) -> AsyncRecorder:
    numbers = iter(range(1_000_000))
    return AsyncRecorder(log, sealer=sealer, clock=Ticker(), ids=lambda: f"req-{next(numbers)}")


def make_act(**changes: Any) -> Act:
    values: dict[str, Any] = {
        "tenant": "clinic-1",
        "who": Who(
            kind="person",
            person="Practitioner/ada",
            role="clinician",
            address="192.0.2.7",
            assurance=Assurance(level="aal2", age_s=60),
        ),
        "action": "read",
        "service": "ehr",
        "purpose": "TREAT",
        "resources": ("Observation/obs-1",),
        "patients": ("Patient/bob",),
        "labels": ("R", "PSY"),
        "decision": "allow",
        "rules": ("treating-clinician",),
    }
    return Act(**values | changes)


def make_entry(stage: Stage = "intent", **changes: Any) -> Entry:
    values: dict[str, Any] = {
        "v": 1,
        "stage": stage,
        "request": "req-1",
        "time": START_US,
        "tenant": "clinic-1",
        "actor": Actor(kind="person", role="clinician", sealed=SEALED),
        "action": "read",
        "service": "ehr",
        "purpose": "TREAT",
        "resources": (Resource(type="Observation", id="obs-1"),),
        "patients": (OTHER,),
        "labels": ("PSY",),
        "decision": "allow",
        "rules": ("treating-clinician",),
    }
    if stage in {"outcome", "closed"}:
        values |= {"outcome": "success", "status": 200}
    return Entry(**values | changes)


def urlsafe(size: int) -> str:
    return urlsafe_b64encode(os.urandom(size)).decode().rstrip("=")
