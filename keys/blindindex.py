"""Blind index: equality search over sealed fields by keyed tokens.

A token is `hgi1.<version>.<22 base64url characters>`: HMAC-SHA256, cut to 128 bits, of the value
under a key for tenant, service and field, itself derived from the tenant's index key of that
version. The app stores the token beside the sealed text and searches for it.

What it leaks is equality: whoever sees the tokens sees which records of one field share a value,
how often, and, knowing how values are distributed, guesses frequent ones. Use it for identifiers,
not for diagnoses.

The caller chooses the normal form of a value (case, spaces, Unicode form): only equal bytes match.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping, Sequence
from typing import Literal

from keys import aead
from keys.datakeys import ATTEMPTS, KeyGoneError
from keys.errors import KeyTableError, PersonErasedError
from keys.model import KeyOwner, KeyRow, check_name
from keys.ports import KeyEvent, KeyEventRecorder
from keys.sealed import encode_base64url
from keys.settings import IndexSettings
from keys.store import KeyStore

PREFIX = "hgi1."
TOKEN_BYTES = 16

_DAY_S = 86_400.0
_LABEL = "havengate/hgi1"


class BlindIndex:
    """Makes tokens.

    Thread-safe. Methods may raise `InvalidContextError`, `VaultError`, `KeyTableError`.
    """

    def __init__(
        self, store: KeyStore, *, settings: IndexSettings, recorder: KeyEventRecorder
    ) -> None:
        self._store = store
        self._window_s = settings.window_days * _DAY_S
        self._recorder = recorder

    def token_for_write(self, *, tenant: str, service: str, field: str, value: bytes) -> str:
        """Return the token to store: of the newest key version."""
        place = _place(tenant, service, field)
        for _ in range(ATTEMPTS):
            key = self._store.for_sealing(_owner(tenant))
            try:
                return _token(key.version, key.mac(place), value)
            except KeyGoneError:
                continue
        raise _restless()

    def tokens_for_search(
        self, *, tenant: str, service: str, field: str, value: bytes
    ) -> list[str]:
        """Return the tokens to search for, newest first: of every version within the window."""
        place = _place(tenant, service, field)
        for _ in range(ATTEMPTS):
            # Makes the first key of a tenant that has none.
            self._store.for_sealing(_owner(tenant))
            try:
                keys = [self._store.by_id(row.key_id) for row in self._searched(tenant)]
                return [_token(key.version, key.mac(place), value) for key in keys]
            except (KeyGoneError, PersonErasedError):
                continue
        raise _restless()

    def rotate(self, *, tenant: str, actor: str) -> int:
        """Begin a new version and return its number.

        The last one is searched for `window_days` more.

        Within that time the app writes its tokens anew; after it `retire` destroys the old key.
        """
        check_name("tenant", tenant)
        current = self._store.for_sealing(_owner(tenant))
        version = current.version + 1
        request_id = secrets.token_hex(16)
        self._record("intent", request_id, tenant, actor, {"version": version})
        self._store.make_version(_owner(tenant), version)
        self._store.table.retire(current.key_id, now=self._store.clock())
        self._store.empty()
        self._record("outcome", request_id, tenant, actor, {"version": version})
        return version

    def retire(self, *, actor: str) -> list[str]:
        """Destroy index keys whose window is over, of all tenants; return their ids."""
        destroyed: list[str] = []
        for owner in self._store.table.owners("index"):
            searched = {row.key_id for row in self._searched(owner.tenant)}
            over = [
                row.key_id
                for row in self._store.table.versions(owner)
                if row.key_id not in searched
            ]
            if not over:
                continue
            request_id = secrets.token_hex(16)
            self._record("intent", request_id, owner.tenant, actor, key_ids=over)
            destroyed += self._store.table.destroy(over, now=self._store.clock())
            self._store.empty()
            self._record("outcome", request_id, owner.tenant, actor, key_ids=over)
        return destroyed

    def _searched(self, tenant: str) -> list[KeyRow]:
        """Return the newest version, and those whose successor is younger than the window."""
        rows = self._store.table.versions(_owner(tenant))
        now = self._store.clock()
        successors = [*rows[1:], None]
        return [
            row
            for row, successor in reversed(list(zip(rows, successors, strict=True)))
            if successor is None or now < successor.created_at + self._window_s
        ]

    def _record(
        self,
        stage: Literal["intent", "outcome"],
        request_id: str,
        tenant: str,
        actor: str,
        detail: Mapping[str, str | int] | None = None,
        *,
        key_ids: Sequence[str] = (),
    ) -> None:
        self._recorder.record(
            KeyEvent(
                action="keys.index.rotate",
                stage=stage,
                request_id=request_id,
                tenant=tenant,
                actor=actor,
                succeeded=None if stage == "intent" else True,
                key_ids=tuple(key_ids),
                detail=detail or {},
            )
        )


def _owner(tenant: str) -> KeyOwner:
    return KeyOwner("index", tenant, "blind-index")


def _place(tenant: str, service: str, field: str) -> bytes:
    for what, name in (("tenant", tenant), ("service", service), ("field", field)):
        check_name(what, name)
    return aead.encode_parts([_LABEL, tenant, service, field])


def _token(version: int, subkey: bytes, value: bytes) -> str:
    tag = hmac.digest(subkey, value, "sha256")[:TOKEN_BYTES]
    return f"{PREFIX}{version}.{encode_base64url(tag)}"


def _restless() -> KeyTableError:
    return KeyTableError(
        f"expected the index key to last for one use in {ATTEMPTS} attempts, but it was rotated "
        "each time; see which process does that without pause"
    )
