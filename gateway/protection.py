"""Between the core and `keys`: seals and opens elements, makes index tokens, loads keys ahead.

Contexts are named as everywhere: tenant, person (`Patient/7`), service (the route's name), element.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Protocol

from gateway.errors import NotAtHandError
from keys.blindindex import BlindIndex
from keys.keyring import Keyring
from keys.model import FieldContext
from policies.model import Purpose


class PseudonymSource(Protocol):
    """Makes pseudonyms (`keys.pseudonyms.Pseudonymiser`)."""

    def pseudonym(self, *, tenant: str, purpose: str, person: str) -> str:
        """The name of a person within one purpose. Raises a `KeysError`."""
        ...


class PersonSeals:
    """Satisfies `gateway.identity.reasons.PersonSealer` for one tenant. Blocks: use a thread."""

    def __init__(self, *, tenant: str, keyring: Keyring) -> None:
        self._tenant = tenant
        self._keyring = keyring

    def seal(self, *, person: str, service: str, field: str, plaintext: bytes) -> str:
        """Seal under the newest key of the person, made if need be. Raises a `KeysError`."""
        return self._keyring.seal(self._context(person, service, field), plaintext)

    def unseal(self, *, person: str, service: str, field: str, text: str) -> bytes:
        """Open it. Raises a `KeysError`."""
        return self._keyring.unseal(self._context(person, service, field), text)

    def _context(self, person: str, service: str, field: str) -> FieldContext:
        return FieldContext(tenant=self._tenant, person=person, service=service, field=field)


class TenantSealer:
    """Satisfies `gateway.core.enforcement.Sealer` for one tenant. Threads may share it.

    What would ask key table or key server for a token or a pseudonym raises `NotAtHandError`;
    `make_ready` asks, in a thread. Pseudonyms are kept in memory: at most `pseudonyms_kept`, and
    until keys are forgotten (an erasure).
    """

    def __init__(
        self,
        *,
        tenant: str,
        keyring: Keyring,
        index: BlindIndex,
        pseudonyms: PseudonymSource,
        pseudonyms_kept: int = 10_000,
    ) -> None:
        self._tenant = tenant
        self._keyring = keyring
        self._index = index
        self._context = lru_cache(maxsize=4096)(self._make_context)
        self._pseudonyms = pseudonyms
        self._most_names = pseudonyms_kept
        self._names: dict[tuple[str, str], str] = {}
        self._generation = 0
        keyring.store.call_when_emptied(self._forget)

    @property
    def generation(self) -> int:
        """See `Sealer.generation`."""
        return self._generation

    def seal(self, *, person: str, service: str, field: str, plaintext: bytes) -> str:
        """See `Sealer.seal`."""
        return self._keyring.seal(self._context(person, service, field), plaintext)

    def unseal(self, *, person: str, service: str, field: str, text: str) -> bytes:
        """See `Sealer.unseal`."""
        return self._keyring.unseal(self._context(person, service, field), text)

    def opener(
        self, *, person: str, service: str, sealed: Sequence[tuple[str, str]]
    ) -> Callable[[], list[bytes]]:
        """See `Sealer.opener`."""
        located = [
            self._keyring.locate(self._context(person, service, field), text)
            for field, text in sealed
        ]
        return partial(self._keyring.unseal_located, located)

    def token_for_write(self, *, service: str, field: str, value: bytes) -> str:
        """See `Sealer.token_for_write`."""
        self._index_at_hand()
        return self._index.token_for_write(
            tenant=self._tenant, service=service, field=field, value=value
        )

    def tokens_for_search(self, *, service: str, field: str, value: bytes) -> list[str]:
        """See `Sealer.tokens_for_search`."""
        self._index_at_hand()
        return self._index.tokens_for_search(
            tenant=self._tenant, service=service, field=field, value=value
        )

    def pseudonym(self, *, purpose: Purpose, kind: str, value: str) -> str:
        """See `Sealer.pseudonym`. A reference keeps its type, so that it stays one."""
        name = (purpose, f"{kind}/{value}")
        known = self._names.get(name) if self._keyring.store.is_fresh() else None
        if known is None:
            raise NotAtHandError(name)
        return known

    def make_ready(self, name: tuple[str, str] | None) -> None:
        """Bring into memory what `NotAtHandError.name` says. Blocks; raises a `KeysError`."""
        self._keyring.store.refresh_ahead()
        if name is None:
            self._index.prefetch(tenant=self._tenant)
            return
        # Held while it is made: what was begun before an erasure goes where nobody looks.
        names = self._names
        if name in names:
            return
        purpose, person = name
        made = self._pseudonyms.pseudonym(tenant=self._tenant, purpose=purpose, person=person)
        if len(names) >= self._most_names:
            names.clear()
        names[name] = made

    def _index_at_hand(self) -> None:
        if not self._index.is_loaded(tenant=self._tenant):
            raise NotAtHandError

    def _make_context(self, person: str, service: str, field: str) -> FieldContext:
        return FieldContext(tenant=self._tenant, person=person, service=service, field=field)

    def _forget(self) -> None:
        self._generation += 1
        self._context.cache_clear()
        self._names = {}


def sealing_ready(keyring: Keyring) -> Callable[[str, Iterable[str]], bool]:
    """Tell of a tenant and persons if sealing for them asks nobody (`audit.recorder`)."""

    def ready(tenant: str, persons: Iterable[str]) -> bool:
        return keyring.store.is_fresh() and keyring.is_loaded(tenant, persons=persons)

    return ready


class KeyLoader:
    """Brings keys into memory: at once where they are there, otherwise in a thread.

    Keys in memory count as there only while the key table need not be asked whether they still
    are: neither may wait on the event loop.
    """

    def __init__(self, *, tenant: str, keyring: Keyring, sealer: TenantSealer) -> None:
        self._tenant = tenant
        self._keyring = keyring
        self._sealer = sealer

    async def make_ready(self, name: tuple[str, str] | None) -> None:
        """See `gateway.core.commands.MakeReady`."""
        await asyncio.to_thread(self._sealer.make_ready, name)

    async def load(self, persons: frozenset[str], texts: tuple[str, ...]) -> None:
        """Load keys to seal for persons, made if need be, and to open texts."""
        store = self._keyring.store
        if store.is_fresh() and self._keyring.is_loaded(self._tenant, persons=persons, texts=texts):
            return
        await asyncio.to_thread(self._load, persons, texts)

    def _load(self, persons: frozenset[str], texts: tuple[str, ...]) -> None:
        self._keyring.store.refresh_ahead()
        if persons:
            self._keyring.prefetch(self._tenant, persons, create=True)
        if texts:
            self._keyring.prefetch_texts(texts)
