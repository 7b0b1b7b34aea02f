"""Between the core and `keys`: seals and opens elements, makes index tokens, loads keys ahead.

Contexts are named as everywhere: tenant, person (`Patient/7`), service (the route's name), element.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Protocol

from keys.blindindex import BlindIndex
from keys.keyring import Keyring
from keys.model import FieldContext
from policies.model import Purpose


class PseudonymSource(Protocol):
    """Makes pseudonyms (`keys.pseudonyms.Pseudonymiser`)."""

    def pseudonym(self, *, tenant: str, purpose: str, person: str) -> str:
        """The name of a person within one purpose. Raises a `KeysError`."""
        ...


class TenantSealer:
    """Satisfies `gateway.core.enforcement.Sealer` for one tenant. Threads may share it.

    Pseudonyms are kept for a while, because making one asks the key table: at most
    `pseudonyms_kept`, and until keys are forgotten (an erasure).
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
        self._pseudonym = lru_cache(maxsize=pseudonyms_kept)(
            lambda purpose, person: pseudonyms.pseudonym(
                tenant=tenant, purpose=purpose, person=person
            )
        )
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
        return self._index.token_for_write(
            tenant=self._tenant, service=service, field=field, value=value
        )

    def tokens_for_search(self, *, service: str, field: str, value: bytes) -> list[str]:
        """See `Sealer.tokens_for_search`."""
        return self._index.tokens_for_search(
            tenant=self._tenant, service=service, field=field, value=value
        )

    def pseudonym(self, *, purpose: Purpose, kind: str, value: str) -> str:
        """See `Sealer.pseudonym`. A reference keeps its type, so that it stays one."""
        return self._pseudonym(purpose, f"{kind}/{value}")

    def _make_context(self, person: str, service: str, field: str) -> FieldContext:
        return FieldContext(tenant=self._tenant, person=person, service=service, field=field)

    def _forget(self) -> None:
        self._generation += 1
        self._context.cache_clear()
        self._pseudonym.cache_clear()


class KeyLoader:
    """Brings keys into memory: at once where they are there, otherwise in a thread."""

    def __init__(self, *, tenant: str, keyring: Keyring) -> None:
        self._tenant = tenant
        self._keyring = keyring

    def ready(self, tenant: str, persons: Iterable[str]) -> bool:
        """True if sealing for these persons asks no key server (`audit.recorder`)."""
        return self._keyring.is_loaded(tenant, persons=persons)

    async def load(self, persons: frozenset[str], texts: tuple[str, ...]) -> None:
        """Load keys to seal for persons, made if need be, and to open texts."""
        if self._keyring.is_loaded(self._tenant, persons=persons, texts=texts):
            return
        await asyncio.to_thread(self._load, persons, texts)

    def _load(self, persons: frozenset[str], texts: tuple[str, ...]) -> None:
        if persons:
            self._keyring.prefetch(self._tenant, persons, create=True)
        if texts:
            self._keyring.prefetch_texts(texts)
