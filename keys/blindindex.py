"""Blind index: equality search over sealed fields by keyed tokens.

A token is `hgi1.<version>.<22 base64url characters>`: HMAC-SHA256, cut to 128 bits, of the value
under a key for tenant, service and field, itself derived from the tenant's index key of that
version. The app stores the token beside the sealed text and searches for it.

What it leaks is equality: whoever sees the tokens sees which records of one field share a value,
how often, and, knowing how values are distributed, guesses frequent ones. Use it for identifiers,
not for diagnoses.

The caller chooses the normal form of a value (case, spaces, Unicode form): only equal bytes match.

A rotation has two steps, each known to every process before the next: the new version is searched,
then it is written and the old one retired. So no process writes a token that another does not
search.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
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
#: Versions are remembered for this many tenants; those of more are read each time.
_TENANTS = 1000
_LABEL = "havengate/hgi1"


class BlindIndex:
    """Makes tokens.

    Thread-safe. Methods may raise `InvalidContextError`, `VaultError`, `KeyTableError`.
    """

    def __init__(
        self,
        store: KeyStore,
        *,
        settings: IndexSettings,
        recorder: KeyEventRecorder,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._window_s = settings.window_days * _DAY_S
        self._recorder = recorder
        self._sleep = sleep
        self._forget()
        store.call_when_emptied(self._forget)

    def token_for_write(self, *, tenant: str, service: str, field: str, value: bytes) -> str:
        """Return the token to store: of the newest version that every process searches."""
        place = _place(tenant, service, field)
        [token] = self._tokens(tenant, place, value, lambda rows: [_written(rows)])
        return token

    def tokens_for_search(
        self, *, tenant: str, service: str, field: str, value: bytes
    ) -> list[str]:
        """Return the tokens to search for, newest first: of every version within the window."""
        place = _place(tenant, service, field)
        return self._tokens(tenant, place, value, self._searched)

    def prefetch(self, *, tenant: str) -> None:
        """Bring what tokens of this tenant need into memory; a first key is made if need be."""
        check_name("tenant", tenant)
        self._store.prefetch([row.key_id for row in self._searched(self._versions(tenant))])

    def is_loaded(self, *, tenant: str) -> bool:
        """True if making tokens asks neither key table nor key server, for as long as is fresh."""
        rows = self._known.get(tenant)
        return (
            rows is not None
            and self._store.is_fresh()
            and self._store.is_loaded(
                {row.key_id for row in (_written(rows), *self._searched(rows))}
            )
        )

    def rotate(self, *, tenant: str, actor: str) -> int:
        """Begin a new version and return its number.

        When this returns, after twice `cache.refresh_s`, every process writes with it. The last one
        is searched for `window_days` more; within that time the app writes its tokens anew, and
        after it `retire` destroys the old key. An interrupted rotation is finished.
        """
        check_name("tenant", tenant)
        owner = _owner(tenant)
        self._store.for_sealing(owner)
        current = _written(self._store.table.versions(owner))
        version = current.version + 1
        request_id = secrets.token_hex(16)
        self._record("intent", request_id, tenant, actor, {"version": version})
        self._store.make_version(owner, version)
        self._sleep(self._store.refresh_s)
        self._store.table.retire(current.key_id, now=self._store.clock())
        self._store.empty()
        self._sleep(self._store.refresh_s)
        self._record("outcome", request_id, tenant, actor, {"version": version})
        return version

    def retire(self, *, actor: str) -> list[str]:
        """Destroy index keys whose window is over, of all tenants; return their ids."""
        destroyed: list[str] = []
        for owner in self._store.table.owners("index"):
            rows = self._store.table.versions(owner)
            searched = {row.key_id for row in self._searched(rows)}
            over = [row.key_id for row in rows if row.key_id not in searched]
            if not over:
                continue
            request_id = secrets.token_hex(16)
            self._record("intent", request_id, owner.tenant, actor, key_ids=over)
            destroyed += self._store.table.destroy(over, now=self._store.clock())
            self._store.empty()
            self._record("outcome", request_id, owner.tenant, actor, key_ids=over)
        return destroyed

    def _tokens(
        self,
        tenant: str,
        place: bytes,
        value: bytes,
        choose: Callable[[list[KeyRow]], list[KeyRow]],
    ) -> list[str]:
        for _ in range(ATTEMPTS):
            try:
                keys = [self._store.by_id(row.key_id) for row in choose(self._versions(tenant))]
                return [_token(key.version, key.mac(place), value) for key in keys]
            except KeyGoneError:
                continue
            except PersonErasedError:
                # Its window ended, and another process has destroyed it.
                self._forget()
        raise _restless()

    def _versions(self, tenant: str) -> list[KeyRow]:
        """Return the versions, oldest first, as the table had them at most `refresh_s` ago."""
        self._store.refresh()
        # Held while it is filled: what is read before an emptying goes into a dict nobody sees.
        known = self._known
        rows = known.get(tenant)
        if rows is None:
            # Makes the first key of a tenant that has none.
            self._store.for_sealing(_owner(tenant))
            rows = self._store.table.versions(_owner(tenant))
            if len(known) < _TENANTS:
                known[tenant] = rows
        return rows

    def _searched(self, rows: list[KeyRow]) -> list[KeyRow]:
        """Return what is not retired, and what was retired within the window; newest first.

        The window begins when the last process has heard of the retirement.
        """
        over = self._store.clock() - self._window_s - self._store.refresh_s
        return [row for row in reversed(rows) if row.retired_at is None or row.retired_at > over]

    def _forget(self) -> None:
        self._known: dict[str, list[KeyRow]] = {}

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


def _written(rows: list[KeyRow]) -> KeyRow:
    """Return the version that is written: the oldest not retired. A newer one is being announced.

    Raises `KeyTableError` if there is none, which only a damaged table gives.
    """
    for row in rows:
        if row.retired_at is None:
            return row
    raise KeyTableError(
        "expected an index key that may be written with, got only retired ones; restore the key "
        "table from a backup"
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
