"""Which app calls: by name and key, in HTTP Basic (RFC 7617, RFC 9110 section 11.7).

An app is given its key in its proxy's URL (`http://NAME:KEY@127.0.0.1:8481`). Only the SHA-256 of a
key is kept, in a file of mode 0600. A key has 256 random bits, so a fast digest is enough: there is
nothing to guess.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gateway.errors import GatewayConfigurationError
from gateway.identity.model import Identified, NotIdentified
from gateway.settings import OutboundAppSettings, OutboundSettings
from keys.errors import KeyConfigurationError
from keys.private_files import read_private_text
from policies.model import Principal, Purpose

_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII).fullmatch
# It becomes the name of a service in the log.
_NAME = re.compile(r"[a-z][a-z0-9]{0,23}(?:-[a-z0-9]{1,24}){0,3}", re.ASCII).fullmatch
_KEY_BYTES = 32
_LONGEST_CREDENTIALS = 1_024
_NOBODY = "0" * 64

#: Where, in the section's directory, the authority is that apps must trust.
AUTHORITY_FILE = "ca.pem"
#: What an app without credentials is told (RFC 7617 section 2).
CHALLENGE = 'Basic realm="havengate", charset="UTF-8"'


def is_name(text: str) -> bool:
    """Whether an app may be called that."""
    return _NAME(text) is not None


def new_key() -> str:
    """Return a new key: 256 random bits in letters that a URL takes as they are."""
    return secrets.token_urlsafe(_KEY_BYTES)


def hash_key(key: str) -> str:
    """Return what is kept of a key: its SHA-256 in hexadecimal digits."""
    return hashlib.sha256(key.encode("utf-8")).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _App:
    digest: str = field(repr=False)
    purpose: Purpose


@dataclass(frozen=True, slots=True, kw_only=True)
class Apps:
    """All apps that may call out."""

    by_name: Mapping[str, _App] = field(repr=False)

    def identify(self, credentials: str | None) -> Identified | NotIdentified:
        """Say whose the value of a `Proxy-Authorization` is. Takes as long for every wrong one."""
        if credentials is None:
            return NotIdentified(reason="no_credentials", challenge=CHALLENGE)
        name, key = _parse_basic(credentials)
        app = self.by_name.get(name)
        right = hmac.compare_digest(hash_key(key), app.digest if app else _NOBODY)
        if app is None or not right:
            return NotIdentified(reason="bad_token", challenge=CHALLENGE, credentials_given=True)
        return Identified(
            principal=Principal(
                kind="service",
                id=name,
                roles=frozenset({"app"}),
                purposes=frozenset({app.purpose}),
            ),
            means="proxy",
            person=name,
            purpose=app.purpose,
            role="app",
            client=name,
        )


def load_apps(settings: OutboundSettings) -> Apps:
    """Read the digests of all apps' keys.

    Raises `GatewayConfigurationError` for a file that is missing, open to others or no digest, and
    for names that are taken twice or cannot stand in the log.
    """
    by_name: dict[str, _App] = {}
    for app in settings.apps:
        if not is_name(app.name) or app.name in by_name:
            raise GatewayConfigurationError(
                f"gateway.outbound.apps: {app.name!r} must be a name of lower-case letters, digits "
                "and hyphens that no other app has."
            )
        by_name[app.name] = _App(digest=_read_digest(app), purpose=app.purpose)
    return Apps(by_name=by_name)


def _read_digest(app: OutboundAppSettings) -> str:
    try:
        digest = read_private_text(Path(app.key_hash_file))
    except KeyConfigurationError as error:
        raise GatewayConfigurationError(f"gateway.outbound.apps, {app.name}: {error}") from error
    if not _DIGEST(digest):
        raise GatewayConfigurationError(
            f"gateway.outbound.apps, {app.name}: {app.key_hash_file} must hold the SHA-256 of the "
            "app's key in 64 hexadecimal digits; make a new key and write its digest there."
        )
    return digest


def _parse_basic(credentials: str) -> tuple[str, str]:
    """Return name and key; empty ones, which nobody has, for what is no Basic credentials."""
    scheme, _, encoded = credentials.strip().partition(" ")
    if scheme.lower() != "basic" or len(encoded) > _LONGEST_CREDENTIALS:
        return "", ""
    try:
        text = base64.b64decode(encoded.strip(), validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return "", ""
    name, _, key = text.partition(":")
    return name, key
