"""The key server's side of re-identification: two transit keys, and officers who open one each.

`VaultHalves` is what the gateway's role may do, `VaultOfficer` what one officer's own login may do.
Who may open which half is decided by the policies in `vault_policies/`, not here; the flow is in
`keys.pseudonyms`.

https://openbao.org/api-docs/secret/transit/, https://openbao.org/api-docs/auth/token/
"""

from __future__ import annotations

import base64

from keys.errors import VaultDeniedError, VaultRejectedError
from keys.layout import FIRST_HALF_KEY, SECOND_HALF_KEY
from keys.pseudonyms import Half
from keys.vault import VaultClient
from keys.vault_answers import data_of, decode_base64

_KEYS: dict[Half, str] = {"first": FIRST_HALF_KEY, "second": SECOND_HALF_KEY}
_ROLE_PREFIX = "officer-"


class VaultHalves:
    """`keys.pseudonyms.ReidentificationHalves` with the gateway's role."""

    def __init__(self, client: VaultClient) -> None:
        self._client = client

    def encrypt(self, half: Half, *, context: bytes, plaintext: bytes) -> str:
        """Encrypt for one half."""
        body = {"context": _encode(context), "plaintext": _encode(plaintext)}
        path = f"{self._client.layout.transit}/encrypt/{_KEYS[half]}"
        return _text(self._client.call("POST", path, body), "ciphertext")


class VaultOfficer:
    """`keys.pseudonyms.Officer`: a client that is logged in as that officer."""

    def __init__(self, client: VaultClient) -> None:
        self._client = client

    def name(self) -> str:
        """Return the officer's login name as the server knows it.

        Raises `VaultDeniedError` for a login that is no officer's.
        """
        data = data_of(self._client.call("GET", "auth/token/lookup-self"))
        meta = data.get("meta")
        role = str(meta.get("role_name", "")) if isinstance(meta, dict) else ""
        if not role.startswith(_ROLE_PREFIX):
            raise VaultDeniedError(
                "expected an officer's own login, got one of another role; log in as an officer"
            )
        return role.removeprefix(_ROLE_PREFIX)

    def decrypt(self, half: Half, *, context: bytes, ciphertext: str) -> bytes:
        """Open one half, if the server lets this officer."""
        body = {"context": _encode(context), "ciphertext": ciphertext}
        path = f"{self._client.layout.transit}/decrypt/{_KEYS[half]}"
        return decode_base64(_text(self._client.call("POST", path, body), "plaintext"))


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _text(answer: dict[str, object], name: str) -> str:
    data = answer.get("data")
    if not isinstance(data, dict) or not isinstance(data.get(name), str):
        raise VaultRejectedError(f"expected the key server to answer with a {name}, got none")
    return str(data[name])
