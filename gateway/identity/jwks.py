"""Keys of an identity provider (RFC 7517), from a file or over HTTPS.

Read when first needed and again after `REFRESH_S`; for a key id that is not among them at most
every `UNKNOWN_KEY_EVERY_S`, so that nobody can make the gateway call by inventing ids. While the
provider cannot be reached the last set counts for `STALE_S`; then nobody of it comes in.
"""

from __future__ import annotations

import asyncio
import http.client
import ssl
import time
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

import msgspec
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt import PyJWK
from jwt.exceptions import PyJWKError, PyJWTError

from gateway.errors import GatewayConfigurationError, UnavailableError
from gateway.settings import IdentityProviderSettings
from keys.ports import Clock

REFRESH_S: Final = 300.0
UNKNOWN_KEY_EVERY_S: Final = 30.0
STALE_S: Final = 3_600.0
_TIMEOUT_S: Final = 5.0
_MAX_BYTES: Final = 262_144
_MAX_KEYS: Final = 64
_PIECE_BYTES: Final = 16_384
_MIN_RSA_BITS: Final = 2_048
#: Key type and curve that an algorithm needs (RFC 7518 section 3.1, RFC 8037 section 3.1).
_NEEDS: Final = {
    "RS256": ("RSA", None), "PS256": ("RSA", None),
    "ES256": ("EC", "P-256"), "ES384": ("EC", "P-384"), "EdDSA": ("OKP", "Ed25519"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Held:
    keys: tuple[dict[str, Any], ...] = field(repr=False)
    read_at: float


class KeySet:
    """The keys of one provider."""

    def __init__(self, settings: IdentityProviderSettings, *, clock: Clock) -> None:
        self._file = Path(settings.jwks_file) if settings.jwks_file else None
        self._url = _checked_url(settings) if self._file is None else None
        self._ca_file = settings.ca_file
        self._clock = clock
        self._held: _Held | None = None
        self._tried_at = float("-inf")
        self._lock = asyncio.Lock()

    async def find(self, kid: str | None, algorithm: str) -> PyJWK | None:
        """The key of that id for that algorithm, or None; without an id, the only one there is.

        Raises `UnavailableError` if there is no set that may still be used.
        """
        held = self._held
        now = self._clock()
        if held is None or now - held.read_at > REFRESH_S:
            held = await self._renewed(now)
        found = _choose(held.keys, kid, algorithm)
        if found is None and now - self._tried_at >= UNKNOWN_KEY_EVERY_S:
            held = await self._renewed(now)
            found = _choose(held.keys, kid, algorithm)
        return found

    async def _renewed(self, now: float) -> _Held:
        async with self._lock:
            held = self._held
            recent = now - self._tried_at < UNKNOWN_KEY_EVERY_S
            # Others may have read it, or failed to, while this one waited.
            if not recent:
                self._tried_at = now
                try:
                    held = _Held(await asyncio.to_thread(self._read), now)
                except (OSError, http.client.HTTPException, ValueError):
                    held = self._held
                else:
                    self._held = held
        if held is None or now - held.read_at > STALE_S:
            raise UnavailableError(
                "expected the keys of the identity provider, got none that are recent enough; "
                "check that it runs and that gateway.identity.providers names its keys",
                "gateway.jwks_unavailable",
            )
        return held

    def _read(self) -> tuple[dict[str, Any], ...]:
        if self._file is not None:
            return parse_keys(self._file.read_bytes())
        if self._url is None:
            raise ValueError("There is neither a file nor a URL.")
        return parse_keys(_fetch(self._url, self._ca_file))


def parse_keys(raw: bytes) -> tuple[dict[str, Any], ...]:
    """The keys of a set. Raises `ValueError` for anything that is not one."""
    if len(raw) > _MAX_BYTES:
        raise ValueError(f"A key set may have {_MAX_BYTES} bytes.")
    try:
        found = msgspec.json.decode(raw, type=dict[str, Any])["keys"]
    except (msgspec.MsgspecError, KeyError) as error:
        raise ValueError("This is no JSON Web Key Set.") from error
    if not isinstance(found, list) or len(found) > _MAX_KEYS:
        raise ValueError("This is no JSON Web Key Set.")
    # Unknown kinds of keys are to be left out (RFC 7517 section 5), secret ones have no place here.
    return tuple(one for one in found if isinstance(one, dict) and one.get("kty") != "oct")


def _choose(keys: tuple[dict[str, Any], ...], kid: str | None, algorithm: str) -> PyJWK | None:
    """The one key that is meant. With several of which none is named, none is."""
    named = [one for one in keys if one.get("kid") == kid] if kid is not None else list(keys)
    if kid is None and len(keys) != 1:
        return None
    fitting = [one for one in named if _fits(one, algorithm)]
    if len(fitting) != 1:
        return None
    try:
        key = PyJWK(fitting[0], algorithm=algorithm)
    except (PyJWTError, PyJWKError, ValueError, TypeError, KeyError):
        return None
    if isinstance(key.key, RSAPublicKey) and key.key.key_size < _MIN_RSA_BITS:
        return None
    return key


def _fits(key: dict[str, Any], algorithm: str) -> bool:
    kind, curve = _NEEDS.get(algorithm, ("", None))
    operations = key.get("key_ops", ["verify"])
    return (
        key.get("kty") == kind
        and (curve is None or key.get("crv") == curve)
        and key.get("alg", algorithm) == algorithm
        and key.get("use", "sig") == "sig"
        and isinstance(operations, list)
        and "verify" in operations
    )


def _checked_url(settings: IdentityProviderSettings) -> SplitResult:
    try:
        url = urlsplit(settings.jwks_url)
        port = url.port
    except ValueError:
        url, port = urlsplit(""), None
    if url.scheme == "https" and url.hostname and not url.username and port != 0:
        return url
    if url.scheme == "http" and _is_loopback(url.hostname or ""):
        return url
    raise GatewayConfigurationError(
        "expected jwks_file, or jwks_url with https (plain http on loopback only), for each of "
        "gateway.identity.providers, got neither; correct the configuration file"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _fetch(url: SplitResult, ca_file: str) -> bytes:
    """The body of one GET: no redirects, no proxies, bounded in time and size."""
    deadline = time.monotonic() + 2 * _TIMEOUT_S
    connection: http.client.HTTPConnection
    host = url.hostname or ""
    if url.scheme == "https":
        context = ssl.create_default_context(cafile=ca_file or None)
        connection = http.client.HTTPSConnection(
            host, url.port, timeout=_TIMEOUT_S, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, url.port, timeout=_TIMEOUT_S)
    try:
        target = f"{url.path or '/'}?{url.query}" if url.query else url.path or "/"
        connection.request("GET", target, headers={"Accept": "application/json"})
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            raise ValueError(f"Expected status 200, got {answer.status}.")
        found = bytearray()
        while piece := answer.read1(_PIECE_BYTES):
            found += piece
            if len(found) > _MAX_BYTES or time.monotonic() > deadline:
                raise ValueError("The answer is too long or too slow.")
        return bytes(found)
    finally:
        connection.close()
