"""What transit keys do for Havengate besides signing: wrap data keys, and keyed hashes.

Each wrapped key is bound by the server itself to its `context`: the transit key is derived
(HKDF-SHA256 per context, then AES-256-GCM), so a wrapped key that is moved to another person does
not unwrap. Before: `keys.keyring` decides what to wrap. After: the key server, through
`keys.vault`.

https://openbao.org/api-docs/secret/transit/
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import batched
from typing import Any

from keys.errors import VaultRejectedError
from keys.layout import HMAC_KEY, KEK
from keys.ports import WrappedKey, WrapRequest
from keys.vault import VaultClient
from keys.vault_answers import data_of, decode_base64, integer

#: OpenBao refuses JSON bodies of more than 1,000 strings; an item has up to four.
MAX_BATCH_ITEMS = 200
_HMAC_BYTES = 32

_CIPHERTEXT = re.compile(r"vault:v([1-9][0-9]{0,8}):[A-Za-z0-9+/]+={0,2}", re.ASCII)


class TransitKeyWrapper:
    """`keys.ports.KeyWrapper` over one derived transit key of the server.

    Thread-safe. `roll` and `trim` need the operator role, `wrap` and `unwrap` the gateway's; with
    any other they raise `VaultDeniedError`.
    """

    def __init__(self, client: VaultClient, key: str = KEK) -> None:
        self._client = client
        self._key = key

    def wrap(self, requests: Sequence[WrapRequest]) -> list[WrappedKey]:
        """Wrap under the current epoch."""
        items = [
            {"context": _encode(item.context), "plaintext": _encode(item.key)} for item in requests
        ]
        texts = self._batches("encrypt", items, "ciphertext")
        return [
            WrappedKey(context=item.context, text=text, epoch=parse_epoch(text))
            for item, text in zip(requests, texts, strict=True)
        ]

    def unwrap(self, wrapped: Sequence[WrappedKey]) -> list[bytes]:
        """Open wrapped keys.

        Raises `VaultRejectedError` if one does not open: it is of another person or server,
        changed, or its epoch was trimmed.
        """
        texts = self._batches("decrypt", _ciphertexts(wrapped), "plaintext")
        return [decode_base64(text) for text in texts]

    def rewrap(self, wrapped: Sequence[WrappedKey]) -> list[WrappedKey]:
        """Move to the current epoch without the key leaving the server."""
        texts = self._batches("rewrap", _ciphertexts(wrapped), "ciphertext")
        return [
            WrappedKey(context=item.context, text=text, epoch=parse_epoch(text))
            for item, text in zip(wrapped, texts, strict=True)
        ]

    def epochs(self) -> tuple[int, int]:
        """Return the oldest epoch that can still unwrap, and the current one."""
        data = self._read()
        minimums = (
            integer(data, "min_decryption_version"),
            integer(data, "min_available_version"),
        )
        latest = integer(data, "latest_version")
        if latest < max(1, *minimums):
            raise VaultRejectedError(
                f"The key server says that epoch {latest} is current and that {max(minimums)} is "
                "the oldest, which cannot be."
            )
        return max(1, *minimums), latest

    def roll(self) -> int:
        """Begin a new epoch, forbid wrapping under older ones, and return its number.

        Sent once: after `VaultUnavailableError`, `epochs` tells whether it happened. Raises
        `VaultRejectedError` if the server agreed and there is no new epoch.
        """
        _, before = self.epochs()
        self._client.call("POST", f"{self._path('keys')}/rotate", {}, idempotent=False)
        _, latest = self.epochs()
        if latest <= before:
            raise VaultRejectedError(
                f"The key server agreed to roll but did not begin an epoch after {before}; ask its "
                "operator why."
            )
        self._configure(min_encryption_version=latest)
        return latest

    def trim(self, oldest: int) -> None:
        """Destroy all epochs before `oldest` for good, on the server and in its future backups.

        Does nothing if they are gone already. Raises `VaultRejectedError` if `oldest` does not
        exist, or if the server agreed and the epochs are still there: a receipt must not name them
        destroyed.
        """
        data = self._read()
        latest = integer(data, "latest_version")
        if not 1 <= oldest <= latest:
            raise VaultRejectedError(
                f"Epoch {oldest} cannot be the oldest to keep: epochs up to {latest} exist."
            )
        if integer(data, "min_available_version") >= oldest:
            return
        # The server trims only below both minimums; neither may go down on a repeated trim.
        self._configure(
            min_decryption_version=max(oldest, integer(data, "min_decryption_version")),
            min_encryption_version=max(oldest, integer(data, "min_encryption_version")),
        )
        self._client.call("POST", f"{self._path('keys')}/trim", {"min_available_version": oldest})
        if integer(self._read(), "min_available_version") < oldest:
            raise VaultRejectedError(
                f"The key server agreed to trim but did not destroy the epochs before {oldest}; "
                "ask its operator why."
            )

    def _read(self) -> dict[str, Any]:
        return data_of(self._client.call("GET", self._path("keys")))

    def _configure(self, **minimums: int) -> None:
        self._client.call("POST", f"{self._path('keys')}/config", minimums)

    def _batches(self, verb: str, items: list[dict[str, str]], wanted: str) -> Iterator[str]:
        for batch in batched(items, MAX_BATCH_ITEMS):
            answer = self._client.call("POST", self._path(verb), {"batch_input": batch})
            yield from _batch_results(answer, verb, wanted, len(batch))

    def _path(self, verb: str) -> str:
        return f"{self._client.layout.transit}/{verb}/{self._key}"


class VaultHMAC:
    """HMAC-SHA256 under a key that never leaves the server, in numbered versions."""

    def __init__(self, client: VaultClient, key: str = HMAC_KEY) -> None:
        self._client = client
        self._path = f"{client.layout.transit}/hmac/{key}/sha2-256"

    def compute(self, messages: Sequence[bytes], *, version: int = 0) -> list[tuple[int, bytes]]:
        """Return version and 32-byte code of each message; version 0 means the newest."""
        codes: list[tuple[int, bytes]] = []
        for batch in batched(messages, MAX_BATCH_ITEMS):
            items = [{"input": _encode(message)} for message in batch]
            body: dict[str, Any] = {"batch_input": items}
            if version:
                body["key_version"] = version
            answer = self._client.call("POST", self._path, body)
            texts = _batch_results(answer, "hmac", "hmac", len(batch))
            codes += [(parse_epoch(text), decode_base64(text.rpartition(":")[2])) for text in texts]
        if any(len(code) != _HMAC_BYTES or version not in {0, used} for used, code in codes):
            raise VaultRejectedError(
                f"The key server answered a keyed hash that has not {_HMAC_BYTES} bytes or is of "
                "another version than asked for."
            )
        return codes


def parse_epoch(text: str) -> int:
    """Return the key version that a transit text (`vault:v3:…`) names.

    Raises `VaultRejectedError`.
    """
    match = _CIPHERTEXT.fullmatch(text)
    if match is None:
        raise VaultRejectedError(
            "Expected a wrapped key of the form vault:v<epoch>:<base64>, got something else; the "
            "key table holds it wrongly, or the key server is not the one that wrote it."
        )
    return int(match[1])


def _ciphertexts(wrapped: Iterable[WrappedKey]) -> list[dict[str, str]]:
    return [{"context": _encode(item.context), "ciphertext": item.text} for item in wrapped]


def _batch_results(answer: dict[str, Any], verb: str, wanted: str, expected: int) -> list[str]:
    """Return one text for every item.

    Raises `VaultRejectedError` if an item failed or is missing.
    """
    results = data_of(answer).get("batch_results")
    whole = isinstance(results, list) and all(isinstance(item, dict) for item in results)
    if not isinstance(results, list) or not whole or len(results) != expected:
        raise VaultRejectedError(
            f"The key server answered {verb} without one result for each item."
        )
    failed = [
        number for number, item in enumerate(results) if item.get("error") or not item.get(wanted)
    ]
    if failed:
        reason = str(results[failed[0]].get("error") or "no result")[:120]
        raise VaultRejectedError(
            f"The key server refused to {verb} {len(failed)} of {expected} items, the first at "
            f"{failed[0]}: {reason}. The wrapped key was changed, belongs to another context, or "
            "its epoch was trimmed."
        )
    return [str(item[wanted]) for item in results]


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
