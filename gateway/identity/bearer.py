"""Bearer tokens of identity providers: JSON Web Tokens (RFC 7519), checked as RFC 8725 asks.

The token chooses nothing: its issuer must be one of the configured, and issuer, audience and
algorithm are that provider's. A right token is remembered for a minute at most, so that a request
costs microseconds; whether it was revoked is asked every time.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import jwt
import msgspec

from gateway.errors import AccountError, GatewayConfigurationError
from gateway.identity.claims import account_of_subject, identified_by
from gateway.identity.jwks import KeySet
from gateway.identity.model import Identified
from gateway.identity.revocations import (
    Revocable,
    Revocations,
    subject_of,
    token_with_id,
    token_without_id,
)
from gateway.settings import IdentityProviderSettings
from keys.ports import Clock
from policies.model import ROLES

MAX_TOKEN_CHARACTERS: Final = 16_384
_KEPT_S: Final = 60.0
_MAX_KEPT: Final = 10_000
_TYPES: Final = frozenset({"jwt", "at+jwt", "application/at+jwt", "application/jwt"})
_MAX_NAME: Final = 512

Refusal = Literal["bad_token", "expired_token", "revoked"]


class _BadTokenError(Exception):
    """A token that is not accepted. `reason` is a code; nothing of the token is in it."""

    def __init__(self, reason: Refusal = "bad_token") -> None:
        super().__init__(reason)
        self.reason: Refusal = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class _Right:
    """A token that was verified."""

    identified: Identified = field(repr=False)
    revocable: Revocable
    until: float


class BearerTokens:
    """Verifies tokens of all configured providers, on one event loop."""

    def __init__(
        self,
        settings: Sequence[IdentityProviderSettings],
        *,
        revocations: Revocations,
        clock: Clock,
        roles: Sequence[str] = ROLES,
    ) -> None:
        self._providers = {one.issuer: one for one in settings}
        if len(self._providers) != len(settings):
            raise GatewayConfigurationError("expected each issuer once, got one twice")
        if any(not (one.issuer and one.audience and one.algorithms) for one in settings):
            raise GatewayConfigurationError(
                "expected issuer, audience and algorithms for each of gateway.identity.providers, "
                "got an empty one; correct the configuration file"
            )
        self._keys = {one.issuer: KeySet(one, clock=clock) for one in settings}
        self._revocations = revocations
        self._clock = clock
        self._roles = frozenset(roles)
        self._kept: OrderedDict[bytes, _Right] = OrderedDict()

    async def identify(self, token: str) -> Identified | Refusal:
        """Who shows this token, or why it is refused.

        Raises `UnavailableError` if the provider's keys cannot be had, and `DirectoryError` if it
        cannot be told whether the token was revoked.
        """
        if len(token) > MAX_TOKEN_CHARACTERS or not token.isascii():
            return "bad_token"
        name = hashlib.sha256(token.encode()).digest()
        right = self._kept.get(name)
        if right is None or self._clock() >= right.until:
            try:
                right = await self._verified(token)
            except _BadTokenError as error:
                return error.reason
            self._keep(name, right)
        if await self._is_revoked(right.revocable):
            return "revoked"
        return right.identified

    async def _is_revoked(self, revocable: Revocable) -> bool:
        known = self._revocations.contains(revocable)
        if known is None:
            known = await asyncio.to_thread(self._revocations.read, revocable)
        return known

    def _keep(self, name: bytes, right: _Right) -> None:
        self._kept[name] = right
        self._kept.move_to_end(name)
        while len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)

    async def _verified(self, token: str) -> _Right:
        header, unverified = _parse(token)
        provider = self._providers.get(_text(unverified.get("iss")))
        if provider is None:
            raise _BadTokenError
        algorithm = _checked_header(header, provider)
        kid = header.get("kid")
        if kid is not None and (not isinstance(kid, str) or len(kid) > _MAX_NAME):
            raise _BadTokenError
        key = await self._keys[provider.issuer].find(kid, algorithm)
        if key is None:
            raise _BadTokenError
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=provider.audience,
                issuer=provider.issuer,
                # Times are compared below, with the clock of the gateway.
                options={
                    "require": ["exp", "iat", "iss", "aud"],
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            raise _BadTokenError from error
        return self._right(token, claims, provider)

    def _right(
        self, token: str, claims: Mapping[str, Any], provider: IdentityProviderSettings
    ) -> _Right:
        now = self._clock()
        expires_at = _verify_times(claims, provider, now)
        identified = identified_by(claims, provider, roles=self._roles)
        if identified is None:
            raise _BadTokenError
        return _Right(
            identified=identified,
            revocable=_revocable(token, claims, provider),
            until=min(expires_at + provider.leeway_s, now + _KEPT_S),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ToRevoke:
    """A token as somebody hands it in to be revoked: it was not verified, and need not be.

    `until` is when it expires at the latest, `person` whose it says it is, for the log.
    """

    token: str = field(repr=False)
    person: str | None = field(repr=False)
    until: float


def to_revoke(token: str, providers: Sequence[IdentityProviderSettings], *, now: float) -> ToRevoke:
    """What to revoke so that this token is refused.

    Raises `AccountError` for what none of the providers can have issued.
    """
    try:
        _, claims = _parse(token)
        provider = {one.issuer: one for one in providers}[_text(claims.get("iss"))]
        revocable = _revocable(token, claims, provider)
    except (_BadTokenError, KeyError) as error:
        raise AccountError(
            "expected a token of a configured identity provider, got something else; give the "
            "whole of it, in one line"
        ) from error
    subject = claims.get("sub")
    return ToRevoke(
        token=revocable.token,
        person=None if subject is None else account_of_subject(provider.issuer, subject),
        until=last_expiry(provider, now=now),
    )


def last_expiry(provider: IdentityProviderSettings, *, now: float) -> float:
    """When a token that a provider may have issued until now is accepted at the latest."""
    return now + provider.max_age_s + 2 * provider.leeway_s


def _revocable(
    token: str, claims: Mapping[str, Any], provider: IdentityProviderSettings
) -> Revocable:
    """Raises `_BadTokenError` for a `jti` or subject that names nothing."""
    jti, subject = claims.get("jti"), claims.get("sub")
    if subject is None:
        subject = claims.get("client_id", claims.get("azp"))
    for name in (jti, subject):
        if name is not None and not (isinstance(name, str) and 0 < len(name) <= _MAX_NAME):
            raise _BadTokenError
    issuer = provider.issuer
    return Revocable(
        token=token_without_id(issuer, token) if jti is None else token_with_id(issuer, jti),
        subject=None if subject is None else subject_of(issuer, subject),
        # The provider's clock may be ahead of ours by the leeway.
        issued_at=_time(claims.get("iat")) - provider.leeway_s,
    )


def _parse(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and claims, of which nothing may be believed yet."""
    try:
        parts = jwt.decode_complete(token, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, TypeError, msgspec.MsgspecError, RecursionError) as error:
        raise _BadTokenError from error
    return parts["header"], parts["payload"]


def _checked_header(header: Mapping[str, Any], provider: IdentityProviderSettings) -> str:
    """The algorithm, which must be one of the provider's; whatever else must be understood is not.

    RFC 7515 section 4.1.11, RFC 8725 sections 3.1 and 3.11.
    """
    algorithm, kind = header.get("alg"), header.get("typ", "JWT")
    if algorithm not in provider.algorithms:
        raise _BadTokenError
    if "crit" in header or "b64" in header or "zip" in header:
        raise _BadTokenError
    if not isinstance(kind, str) or kind.lower() not in _TYPES:
        raise _BadTokenError
    return str(algorithm)


def _verify_times(
    claims: Mapping[str, Any], provider: IdentityProviderSettings, now: float
) -> float:
    """Raise unless the token is in its time; return when it ends."""
    expires_at, issued_at = _time(claims["exp"]), _time(claims["iat"])
    if now >= expires_at + provider.leeway_s:
        raise _BadTokenError("expired_token")
    if now - issued_at > provider.max_age_s + provider.leeway_s:
        raise _BadTokenError("expired_token")
    if issued_at > now + provider.leeway_s:
        raise _BadTokenError
    if "nbf" in claims and _time(claims["nbf"]) > now + provider.leeway_s:
        raise _BadTokenError
    return expires_at


def _time(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _BadTokenError
    try:
        found = float(value)
    except OverflowError as error:
        raise _BadTokenError from error
    if not math.isfinite(found):
        raise _BadTokenError
    return found


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
