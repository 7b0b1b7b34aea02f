"""A key server in memory that can be made to fail, counted, backed up and restored.

It keeps the contract of `keys.ports.KeyWrapper` (tests/keys/wrapper_contract.py) with real
cryptography: a wrapped key opens only under its epoch and its context, and not at all once that
epoch is trimmed.
"""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keys.errors import KeyTableError, VaultRejectedError, VaultUnavailableError
from keys.ports import KeyEvent, WrappedKey, WrapRequest

BATCH = 200


@dataclass
class FakeKeyServer:
    """Epochs of one key-encryption key. `calls` counts what the real adapter would send."""

    epoch_keys: dict[int, bytes] = field(default_factory=lambda: {1: os.urandom(32)})
    calls: dict[str, int] = field(default_factory=dict)
    available: bool = True
    before_call: Callable[[str], None] | None = None
    after_call: Callable[[str], None] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wrap(self, requests: Sequence[WrapRequest]) -> list[WrappedKey]:
        self._call("wrap", len(requests))
        result = [self._seal(request.context, request.key) for request in requests]
        self._done("wrap")
        return result

    def unwrap(self, wrapped: Sequence[WrappedKey]) -> list[bytes]:
        self._call("unwrap", len(wrapped))
        result = [self._open(item) for item in wrapped]
        self._done("unwrap")
        return result

    def rewrap(self, wrapped: Sequence[WrappedKey]) -> list[WrappedKey]:
        self._call("rewrap", len(wrapped))
        result = [self._seal(item.context, self._open(item)) for item in wrapped]
        self._done("rewrap")
        return result

    def epochs(self) -> tuple[int, int]:
        self._call("epochs", 1)
        with self._lock:
            return min(self.epoch_keys), max(self.epoch_keys)

    def roll(self) -> int:
        self._call("roll", 1)
        with self._lock:
            epoch = max(self.epoch_keys) + 1
            self.epoch_keys[epoch] = os.urandom(32)
        self._done("roll")
        return epoch

    def trim(self, oldest: int) -> None:
        self._call("trim", 1)
        with self._lock:
            if oldest > max(self.epoch_keys):
                raise VaultRejectedError("expected an epoch that exists")
            for epoch in [epoch for epoch in self.epoch_keys if epoch < oldest]:
                del self.epoch_keys[epoch]
        self._done("trim")

    def _seal(self, context: bytes, key: bytes) -> WrappedKey:
        with self._lock:
            epoch = max(self.epoch_keys)
            nonce = os.urandom(12)
            box = nonce + AESGCM(self.epoch_keys[epoch]).encrypt(nonce, key, context)
        text = f"vault:v{epoch}:{base64.b64encode(box).decode()}"
        return WrappedKey(context=context, text=text, epoch=epoch)

    def _open(self, item: WrappedKey) -> bytes:
        try:
            _, version, body = item.text.split(":")
            box = base64.b64decode(body)
            with self._lock:
                key = self.epoch_keys[int(version[1:])]
            return AESGCM(key).decrypt(box[:12], box[12:], item.context)
        except (KeyError, ValueError, InvalidTag) as error:
            raise VaultRejectedError("expected a wrapped key of a live epoch") from error

    def _call(self, name: str, items: int) -> None:
        if self.before_call is not None:
            self.before_call(name)
        if not self.available:
            raise VaultUnavailableError("expected an answer, got none")
        with self._lock:
            self.calls[name] = self.calls.get(name, 0) + -(-items // BATCH)

    def _done(self, name: str) -> None:
        if self.after_call is not None:
            self.after_call(name)


class FakeClock:
    """A clock that stands still until told otherwise."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class FakeRecorder:
    """Keeps events, or fails before the n-th one: what is then done must be nothing."""

    events: list[KeyEvent] = field(default_factory=list)
    fail_at: int | None = None

    def record(self, event: KeyEvent) -> int:
        if self.fail_at is not None and len(self.events) >= self.fail_at:
            raise LogDownError("expected to record, the log is down")
        self.events.append(event)
        return len(self.events) - 1


class LogDownError(KeyTableError):
    """The log cannot be written."""
