"""The signed statement about who asks, for the app behind: a JWS by a key that Vault holds.

Compact serialisation (RFC 7515), EdDSA (RFC 8037), claims of RFC 7519. `sub` is pairwise: an app
meets the same person under the same name always, another app under another (OpenID Connect Core
section 8.1). A statement is made once per session, app and four minutes, so that Vault is not
asked for every request; it holds for five.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from gateway.errors import UnavailableError
from gateway.identity.model import Identified
from gateway.identity.shared_secret import SharedSecret
from gateway.routes import Route
from keys.ports import Clock, Signer

LIFETIME_S: Final = 300
KEPT_S: Final = 240.0
_JWKS_KEPT_S: Final = 60.0
_MAX_KEPT: Final = 4_096
#: What was signed under a key that was replaced meanwhile is signed again.
_ATTEMPTS: Final = 3

type _Name = tuple[object, ...]


@dataclass(slots=True)
class _Kept:
    made_at: float
    statement: asyncio.Task[bytes] = field(repr=False)


class Assertions:
    """Makes statements, on one event loop. `pairwise` must be the same in all processes."""

    def __init__(
        self, signer: Signer, *, issuer: str, pairwise: SharedSecret, clock: Clock
    ) -> None:
        self._signer = signer
        self._issuer = issuer
        self._pairwise = pairwise
        self._clock = clock
        self._kept: OrderedDict[_Name, _Kept] = OrderedDict()
        self._jwks: tuple[float, bytes] | None = None

    async def statement(self, route: Route, identified: Identified) -> bytes:
        """The statement, as a compact JWS. Raises a `KeysError` if Vault does not sign."""
        name, now = _name(route, identified), self._clock()
        kept = self._kept.get(name)
        if kept is None or not 0 <= now - kept.made_at < KEPT_S or _failed(kept.statement):
            claims = self._claims(route, identified, now)
            made = asyncio.get_running_loop().create_task(asyncio.to_thread(self._sign, claims))
            # What failed is raised to whoever waits; nobody may be left.
            made.add_done_callback(_failed)
            kept = _Kept(now, made)
            self._kept[name] = kept
            while len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        # Who waits and goes away must not take the statement from the others.
        return await asyncio.shield(kept.statement)

    async def jwks(self) -> bytes:
        """The public keys that verify statements (RFC 7517), all versions, at most a minute old."""
        now = self._clock()
        if self._jwks is None or not 0 <= now - self._jwks[0] < _JWKS_KEPT_S:
            refresh = getattr(self._signer, "refresh", self._signer.public_keys)
            keys = await asyncio.to_thread(refresh)
            found = [_jwk(keys[version]) for version in sorted(keys, reverse=True)]
            self._jwks = (now, msgspec.json.encode({"keys": found}))
        return self._jwks[1]

    def _claims(self, route: Route, identified: Identified, now: float) -> dict[str, Any]:
        principal, at = identified.principal, int(now)
        claims: dict[str, Any] = dict(identified.claims)
        auth_time = str(claims.pop("auth_time", ""))
        claims |= {
            "iss": self._issuer,
            "aud": route.name,
            "sub": self._pairwise.mac("sub", route.name, principal.kind, _subject(identified)),
            "kind": principal.kind,
            "roles": sorted(principal.roles),
            "purpose": identified.purpose,
            "acr": principal.assurance.second_factor,
            "iat": at,
            "exp": at + LIFETIME_S,
            "jti": uuid.uuid4().hex,
        }
        if principal.patient is not None:
            claims["patient"] = principal.patient
        if auth_time.isdecimal():
            claims["auth_time"] = int(auth_time)
        return claims

    def _sign(self, claims: Mapping[str, Any]) -> bytes:
        payload = _base64(msgspec.json.encode(claims))
        for _ in range(_ATTEMPTS):
            keys = self._signer.public_keys()
            newest = max(keys)
            header = {"alg": "EdDSA", "kid": thumbprint(keys[newest]), "typ": "JWT"}
            signed = _base64(msgspec.json.encode(header)) + b"." + payload
            version, signature = self._signer.sign(signed)
            if version == newest:
                return signed + b"." + _base64(signature)
        raise UnavailableError(
            "expected the key server to sign with the newest version of its key that it shows, got "
            "another each time; see who rotates that key without pause",
            "gateway.assertion_key",
        )


def thumbprint(public_key: bytes) -> str:
    """The name of a key: its RFC 7638 thumbprint, as RFC 8037 appendix A.3 has it."""
    text = '{"crv":"Ed25519","kty":"OKP","x":"' + _base64(public_key).decode("ascii") + '"}'
    return _base64(hashlib.sha256(text.encode("ascii")).digest()).decode("ascii")


def _jwk(public_key: bytes) -> dict[str, str]:
    return {
        "kty": "OKP",
        "crv": "Ed25519",
        "use": "sig",
        "alg": "EdDSA",
        "kid": thumbprint(public_key),
        "x": _base64(public_key).decode("ascii"),
    }


def _subject(identified: Identified) -> str:
    """Whom `sub` stands for: two programs, one with a key, may have one name in the log."""
    is_program = identified.principal.kind == "service"
    return identified.principal.id if is_program else identified.person


def _name(route: Route, identified: Identified) -> _Name:
    """Everything that a statement says, but for its times."""
    principal = identified.principal
    return (
        route.name, identified.person, identified.session, identified.purpose,
        principal.kind, principal.id, principal.roles, principal.patient, principal.assurance,
        tuple(sorted((name, str(value)) for name, value in identified.claims.items())),
    )  # fmt: skip


def _failed(statement: asyncio.Task[bytes]) -> bool:
    return statement.done() and (statement.cancelled() or statement.exception() is not None)


def _base64(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")
