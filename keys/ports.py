"""What `keys` needs from outside: a server that wraps keys and a durable record of what was done.

The adapters are `keys.vault` (the real server) and, for the second port, whatever the program wires
in: `keys` does not know the audit log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class WrapRequest:
    """One key to wrap. `context` binds it: the same bytes are needed to unwrap."""

    context: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrappedKey:
    """A key as only the key server can open it. `text` is the server's own form (`vault:v3:…`)."""

    context: bytes
    text: str = field(repr=False)
    epoch: int


class KeyWrapper(Protocol):
    """Key-encryption keys in numbered epochs (versions of one Vault transit key).

    Every method is one or a few calls of the key server and raises a `VaultError`; each takes any
    number of items and batches them. Results stand in the order of the requests.
    """

    def wrap(self, requests: Sequence[WrapRequest]) -> list[WrappedKey]:
        """Wrap under the current epoch."""
        ...

    def unwrap(self, wrapped: Sequence[WrappedKey]) -> list[bytes]:
        """Open wrapped keys. Raises `VaultRejectedError` if one does not open."""
        ...

    def rewrap(self, wrapped: Sequence[WrappedKey]) -> list[WrappedKey]:
        """Move to the current epoch without the key leaving the server."""
        ...

    def epochs(self) -> tuple[int, int]:
        """The oldest epoch that can still unwrap, and the current one."""
        ...

    def roll(self) -> int:
        """Begin a new epoch and return its number."""
        ...

    def trim(self, oldest: int) -> None:
        """Destroy all epochs before `oldest` for good.

        What they wrapped cannot be opened by anybody.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyEvent:
    """Something that was, or is about to be, done to keys, for the audit log.

    `stage` is `intent` before the effect and `outcome` after it, with the same `request_id`.
    `actor` is who asked (a person or service name); `key_ids` are the keys concerned; `detail`
    holds codes, counts and dates only. An empty `tenant` means the keys of all tenants.
    """

    action: Literal[
        "keys.epoch.roll",
        "keys.epoch.rewrap",
        "keys.epoch.trim",
        "keys.person.erase",
        "keys.pseudonym.request",
        "keys.pseudonym.approve",
        "keys.pseudonym.reveal",
        "keys.index.rotate",
        "keys.officer.create",
    ]
    stage: Literal["intent", "outcome"]
    request_id: str
    tenant: str
    actor: str = field(repr=False)
    succeeded: bool | None = None
    key_ids: tuple[str, ...] = ()
    detail: Mapping[str, str | int] = field(default_factory=dict)


class KeyEventRecorder(Protocol):
    """Writes an event durably. When it raises, the effect must not happen."""

    def record(self, event: KeyEvent) -> int:
        """Return the index of the entry in the log once it is durable."""
        ...


class Clock(Protocol):
    """Unix time in seconds."""

    def __call__(self) -> float:
        """Return now."""
        ...


class Signer(Protocol):
    """An Ed25519 key that never leaves the key server, in numbered versions."""

    def public_keys(self) -> Mapping[int, bytes]:
        """Raw 32-byte public keys by version; the greatest number is the one that signs."""
        ...

    def sign(self, message: bytes) -> tuple[int, bytes]:
        """Return the version used and the 64-byte signature. Raises a `VaultError`."""
        ...
