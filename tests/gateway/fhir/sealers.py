"""A sealer for tests: real AES-GCM and HMAC under keys in memory, bound as the real one binds."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from gateway.errors import NotAtHandError
from keys.errors import PersonErasedError, UnsealError
from keys.sealed import format_sealed, new_key_id, parse_sealed
from policies.model import Purpose


class MemorySealer:
    """Keys of persons are made when they are first needed and forgotten by `erase`.

    With `lacking` nothing is at hand when it is asked for the first time.
    """

    generation: int = 0

    def __init__(self, *, lacking: bool = False) -> None:
        self._lacking = lacking
        self._asked: set[tuple[str, str] | None] = set()
        self._keys: dict[str, tuple[str, bytes]] = {}
        self._gone: set[str] = set()
        self._index = os.urandom(32)

    def erase(self, person: str) -> None:
        key_id, _ = self._keys.pop(person)
        self._gone.add(key_id)

    def seal(self, *, person: str, service: str, field: str, plaintext: bytes) -> str:
        key_id, key = self._keys.setdefault(person, (new_key_id(), AESGCM.generate_key(256)))
        nonce = os.urandom(12)
        bound = f"{person}\0{service}\0{field}".encode()
        return format_sealed(key_id, nonce + AESGCM(key).encrypt(nonce, plaintext, bound))

    def opener(
        self, *, person: str, service: str, sealed: Sequence[tuple[str, str]]
    ) -> Callable[[], list[bytes]]:
        return lambda: [
            self.unseal(person=person, service=service, field=field, text=text)
            for field, text in sealed
        ]

    def unseal(self, *, person: str, service: str, field: str, text: str) -> bytes:
        key_id, message = parse_sealed(text)
        if key_id in self._gone:
            raise PersonErasedError("erased")
        own_id, key = self._keys.get(person, ("", b"\0" * 32))
        bound = f"{person}\0{service}\0{field}".encode()
        if own_id != key_id:
            raise UnsealError("another's")
        try:
            return AESGCM(key).decrypt(message[:12], message[12:], bound)
        except InvalidTag as error:
            raise UnsealError("changed or moved") from error

    def token_for_write(self, *, service: str, field: str, value: bytes) -> str:
        self._at_hand(None)
        text = f"{service}\0{field}\0".encode() + value
        return "hgi1.1." + hmac.new(self._index, text, hashlib.sha256).hexdigest()[:22]

    def tokens_for_search(self, *, service: str, field: str, value: bytes) -> list[str]:
        return [self.token_for_write(service=service, field=field, value=value)]

    def pseudonym(self, *, purpose: Purpose, kind: str, value: str) -> str:
        self._at_hand((purpose, f"{kind}/{value}"))
        text = f"{purpose}\0{kind}\0{value}".encode()
        return "hgp1." + hmac.new(self._index, text, hashlib.sha256).hexdigest()[:22]

    def _at_hand(self, name: tuple[str, str] | None) -> None:
        if self._lacking and name not in self._asked:
            self._asked.add(name)
            raise NotAtHandError(name)
