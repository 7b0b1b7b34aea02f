"""What `audit` needs from outside: keys that seal who is meant, and a signer for checkpoints.

`keys.keyring.Keyring` and `keys.vault` provide them; tests may hand in others that pass the same
contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from keys.ports import Signer

__all__ = ["PersonSealer", "Signer"]


class PersonSealer(Protocol):
    """Seals what names a person under that person's key: erasing the person blinds the entry."""

    def seal_for_person(self, *, tenant: str, person: str, field: str, plaintext: bytes) -> str:
        """Return printable sealed text: the key's id stands in it, nothing about the person."""
        ...

    def name_for_person(self, *, tenant: str, person: str, field: str) -> str:
        """Seal the person's own name. May give the same text again while the person's key lives."""
        ...

    def open_for_person(self, *, tenant: str, field: str, text: str) -> bytes:
        """Open a text from `seal_for_person` without knowing whose it is.

        Raises `keys.errors.PersonErasedError` once the person is erased.
        """
        ...

    def key_ids(self, *, tenant: str, person: str) -> Sequence[str]:
        """Ids of all keys this person ever had and still has: what to look for in sealed texts."""
        ...
