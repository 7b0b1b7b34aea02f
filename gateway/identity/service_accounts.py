"""Programs that come in with a key: `Authorization: Bearer hgs_<name>_<secret>`.

A file of mode 0600 holds the SHA-256 (hex) of the whole key, which has 256 random bits. Files are
looked at again when they change, so that a new or emptied file counts at the next request.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gateway.errors import AccountError, GatewayConfigurationError, UnavailableError
from gateway.identity.model import Identified
from gateway.identity.records import shown_role
from gateway.settings import ServiceAccountSettings
from keys.errors import KeyConfigurationError
from keys.private_files import read_private_text
from policies.model import Principal

PREFIX: Final = "hgs_"
MAX_KEY_CHARACTERS: Final = 256
# The log takes names of this form (`audit.model`), and they stand in keys between underscores.
_NAME = re.compile(r"[a-z0-9]{1,24}(-[a-z0-9]{1,24}){0,5}").fullmatch
_HASH = re.compile(r"[0-9a-f]{64}").fullmatch
_NOBODY: Final = "0" * 64


def make_key(name: str) -> tuple[str, str]:
    """A new key, and its hash for the file. Raises `AccountError` for a name that cannot be one."""
    if not _NAME(name):
        raise AccountError(
            "expected a service's name of lower-case letters, digits and single hyphens, at most "
            "24 characters between hyphens, got something else; choose another"
        )
    key = f"{PREFIX}{name}_{secrets.token_urlsafe(32)}"
    return key, hash_of(key)


def hash_of(key: str) -> str:
    """What the file holds."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class ServiceAccounts:
    """All programs of the configuration."""

    def __init__(self, settings: Sequence[ServiceAccountSettings]) -> None:
        self._accounts = {one.name: one for one in settings}
        self._hashes: dict[str, tuple[tuple[int, ...], str]] = {}
        if len(self._accounts) != len(settings):
            raise GatewayConfigurationError(
                "expected each service account's name once, got one twice"
            )
        for name, account in self._accounts.items():
            if not _NAME(name) or not account.purposes:
                raise GatewayConfigurationError(
                    f"expected gateway.identity.service_accounts to have plain names and at least "
                    f"one purpose, got {name!r}; correct the configuration file"
                )
            self._hash(name)

    def identify(self, key: str) -> Identified | None:
        """Who shows this key, or None. Raises `UnavailableError` if its file cannot be read."""
        if len(key) > MAX_KEY_CHARACTERS:
            return None
        name = key.removeprefix(PREFIX).partition("_")[0]
        account = self._accounts.get(name)
        expected = _NOBODY if account is None else self._read(name)
        if not hmac.compare_digest(hash_of(key), expected) or account is None:
            return None
        return _identified(account)

    def _read(self, name: str) -> str:
        try:
            return self._hash(name)
        except GatewayConfigurationError as error:
            raise UnavailableError(str(error), "gateway.service_key") from error

    def _hash(self, name: str) -> str:
        path = Path(self._accounts[name].key_hash_file)
        try:
            status = path.stat()
            # The time of the last change of mode or content, and which file it is.
            stamp = (status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size)
            kept = self._hashes.get(name)
            if kept is not None and kept[0] == stamp:
                return kept[1]
            found = read_private_text(path).lower()
        except (OSError, KeyConfigurationError) as error:
            raise GatewayConfigurationError(
                f"expected the hash of service {name}'s key in a file of mode 0600, got "
                f"{type(error).__name__}; run `havengate users add --service {name}` and write "
                "what it prints"
            ) from error
        if not _HASH(found):
            raise GatewayConfigurationError(
                f"expected the SHA-256 of service {name}'s key (64 hex digits) in its file, got "
                "something else; the key itself must not stand there"
            )
        self._hashes[name] = (stamp, found)
        return found


def _identified(account: ServiceAccountSettings) -> Identified:
    roles = frozenset(account.roles)
    return Identified(
        principal=Principal(
            kind="service",
            id=account.name,
            roles=roles,
            # None would mean that nothing limits a program.
            scopes=frozenset(account.scopes),
            purposes=frozenset(account.purposes),
        ),
        means="service",
        person=account.name,
        purpose=account.purposes[0],
        role=shown_role(roles, patient=False),
        client=account.name,
    )
