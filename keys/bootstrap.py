"""Set a key server up: mounts, keys, certificate authority, policies and roles, where missing.

Run with a token that may administer the server: by `keys.embedded` on its first start, by an
operator for a server of his own. Running it again changes nothing; what differs from what is
stated here is put right if that is safe (policies, limits of roles) and refused if it is not (an
exportable key). What stands where is `keys.layout`; what each role may do is
`vault_policies/*.hcl`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Literal, get_args

import msgspec

from keys.errors import ApprovalError, KeyConfigurationError, VaultRejectedError
from keys.layout import (
    AUDIT_SIGNING_KEY,
    COORDINATOR_NAME,
    COORDINATOR_ROLE,
    FIRST_HALF_KEY,
    HMAC_KEY,
    IDENTITY_SIGNING_KEY,
    KEK,
    NODE_ROLE,
    OUTBOUND_ROLE,
    SECOND_HALF_KEY,
    SERVER_ROLE,
)
from keys.private_files import make_private_directory, read_private_text, write_private
from keys.settings import KeysSettings, PkiSettings, RoleName, RoleSettings
from keys.vault import VaultClient

Half = Literal["first", "second"]

ROLES: tuple[RoleName, ...] = get_args(RoleName)

_TOKEN_TTL_S = 20 * 60
_TOKEN_MAX_TTL_S = 24 * 3600
_OFFICER_TOKEN_TTL_S = 10 * 60
_CA_LIFETIME_S = 10 * 365 * 24 * 3600

_DERIVED = {"type": "aes256-gcm96", "derived": True}
_TRANSIT_KEYS: Mapping[str, Mapping[str, Any]] = {
    KEK: _DERIVED,
    FIRST_HALF_KEY: _DERIVED,
    SECOND_HALF_KEY: _DERIVED,
    AUDIT_SIGNING_KEY: {"type": "ed25519"},
    IDENTITY_SIGNING_KEY: {"type": "ed25519"},
    HMAC_KEY: {"type": "hmac", "key_size": 32},
}
_POLICIES = (*ROLES, "reidentify-first", "reidentify-second", "self")
_OFFICER_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrapReport:
    """What was changed, in order; empty if everything stood already."""

    changed: tuple[str, ...]


def bootstrap(
    client: VaultClient, settings: KeysSettings, credentials_directory: Path
) -> BootstrapReport:
    """Set the server up and leave each role's AppRole files in `credentials_directory`.

    Credentials that still work are kept. Raises a `VaultError`, or `KeyConfigurationError` if
    something of the same name stands there already and is not what it must be.
    """
    setup = _Setup(client)
    setup.mounts()
    setup.transit_keys()
    setup.certificate_authorities(settings.pki)
    setup.policies()
    make_private_directory(credentials_directory)
    for role in ROLES:
        setup.app_role(role, [role], token_ttl_s=_TOKEN_TTL_S, token_max_ttl_s=_TOKEN_MAX_TTL_S)
        setup.credentials(role, credentials_directory)
    return BootstrapReport(changed=tuple(setup.changed))


def create_officer(
    client: VaultClient, name: str, half: Half, credentials_directory: Path
) -> RoleSettings:
    """Make the login of one person who may open one half of pseudonyms, and return where it lies.

    `name` is the person's login name. Raises `ApprovalError` if that person holds the other half
    already: two halves in one hand would make the second person needless.
    """
    if not _OFFICER_NAME.fullmatch(name):
        raise KeyConfigurationError(
            "An officer's name must be 1 to 63 lower-case letters, digits and hyphens."
        )
    setup = _Setup(client)
    role = f"officer-{name}"
    held = setup.read(f"{client.layout.approle}/role/{role}")
    wanted = client.layout.policy(f"reidentify-{half}")
    if held is not None and wanted not in held["token_policies"]:
        raise ApprovalError(
            f"Officer {name} holds the other half already. Re-identification needs two different "
            "persons: name somebody else."
        )
    setup.app_role(
        role,
        [f"reidentify-{half}"],
        token_ttl_s=_OFFICER_TOKEN_TTL_S,
        token_max_ttl_s=_OFFICER_TOKEN_TTL_S,
    )
    make_private_directory(credentials_directory)
    return setup.credentials(role, credentials_directory)


def credential_files(directory: Path, role: str) -> RoleSettings:
    """Return where the credentials of `role` lie below `directory`, whether they exist or not."""
    return RoleSettings(
        role_id_file=str(directory / f"{role}.role-id"),
        secret_id_file=str(directory / f"{role}.secret-id"),
    )


def fingerprint(settings: KeysSettings) -> str:
    """Return a digest of everything that `bootstrap` would set: when it differs, run it again."""
    rendered = [_render_policy(name, settings.vault.prefix) for name in _POLICIES]
    keys = {name: dict(options) for name, options in _TRANSIT_KEYS.items()}
    certificates = [_certificate_role(role, settings.pki) for role in (SERVER_ROLE, NODE_ROLE)]
    certificates += [_coordinator_role(settings.pki), _outbound_role(settings.pki)]
    login = _app_role([], token_ttl_s=_TOKEN_TTL_S, token_max_ttl_s=_TOKEN_MAX_TTL_S)
    stated = [rendered, keys, certificates, login, settings.vault.prefix]
    return hashlib.sha256(msgspec.json.encode(stated, order="sorted")).hexdigest()


class _Setup:
    """One run: reads what is there, writes what differs, and remembers what it wrote."""

    def __init__(self, client: VaultClient) -> None:
        self._client = client
        self._layout = client.layout
        self.changed: list[str] = []

    def read(self, path: str, method: str = "GET") -> dict[str, Any] | None:
        """Return the data at `path`, or None if nothing is there."""
        try:
            data: dict[str, Any] | None = self._client.call(method, path).get("data")
        except VaultRejectedError as error:
            if error.status in {400, 404}:
                return None
            raise
        return data

    def _write(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        self.changed.append(path)
        return self._client.call("POST", path, body)

    def mounts(self) -> None:
        """Mount the engines and the login method."""
        day_s = 24 * 3600
        authority = {
            "type": "pki",
            "config": {"max_lease_ttl": f"{_CA_LIFETIME_S}s", "default_lease_ttl": f"{day_s}s"},
        }
        engines: dict[str, dict[str, Any]] = {
            self._layout.transit: {"type": "transit"},
            self._layout.kv: {"type": "kv", "options": {"version": "2"}},
            self._layout.pki: authority,
            self._layout.outbound_pki: authority,
        }
        mounted = self.read("sys/mounts") or {}
        for path, body in engines.items():
            self._mount(f"sys/mounts/{path}", mounted.get(f"{path}/"), body)
        logins = self.read("sys/auth") or {}
        self._mount(
            f"sys/{self._layout.approle}",
            logins.get(f"{self._layout.prefix}/"),
            {"type": "approle"},
        )

    def _mount(self, path: str, found: Mapping[str, Any] | None, body: Mapping[str, Any]) -> None:
        if found is None:
            self._write(path, body)
            return
        version = (found.get("options") or {}).get("version")
        wanted_version = body.get("options", {}).get("version")
        if found["type"] != body["type"] or (wanted_version and version != wanted_version):
            raise KeyConfigurationError(
                f"The key server has something else at {path}: expected {body['type']} "
                f"{wanted_version or ''}, found {found['type']} {version or ''}. Choose another "
                "keys.vault.prefix."
            )

    def transit_keys(self) -> None:
        """Create the transit keys; refuse one that could leave the server or is of another kind."""
        for name, options in _TRANSIT_KEYS.items():
            path = f"{self._layout.transit}/keys/{name}"
            found = self.read(path)
            if found is None:
                self._write(path, {**options, "exportable": False, "allow_plaintext_backup": False})
                found = self.read(path) or {}
            wanted = {
                "type": options["type"],
                "derived": options.get("derived", False),
                "exportable": False,
                "allow_plaintext_backup": False,
            }
            _verify(path, wanted, found)

    def certificate_authorities(self, pki: PkiSettings) -> None:
        """Make roots whose keys never leave the server, and the roles that certificates follow."""
        name = f"Havengate {self._layout.prefix}"
        self._root(self._layout.pki, f"{name} root")
        for role in (SERVER_ROLE, NODE_ROLE):
            self._put_if_different(f"{self._layout.pki}/roles/{role}", _certificate_role(role, pki))
        self._put_if_different(
            f"{self._layout.pki}/roles/{COORDINATOR_ROLE}", _coordinator_role(pki)
        )
        self._root(self._layout.outbound_pki, f"{name} way out", max_path_length=0)
        self._put_if_different(
            f"{self._layout.outbound_pki}/roles/{OUTBOUND_ROLE}", _outbound_role(pki)
        )

    def _root(self, mount: str, common_name: str, **limits: int) -> None:
        if self.read(f"{mount}/issuers", "LIST") is not None:
            return
        self._write(
            f"{mount}/root/generate/internal",
            {
                "common_name": common_name,
                "issuer_name": "root",
                "key_type": "ec",
                "key_bits": 256,
                "ttl": f"{_CA_LIFETIME_S}s",
                **limits,
            },
        )

    def policies(self) -> None:
        """Write the policies whose text differs."""
        for name in _POLICIES:
            path = f"sys/policies/acl/{self._layout.policy(name)}"
            text = _render_policy(name, self._layout.prefix)
            self._put_if_different(path, {"policy": text})

    def app_role(
        self, role: str, policies: list[str], *, token_ttl_s: int, token_max_ttl_s: int
    ) -> None:
        """Create or correct an AppRole."""
        self._put_if_different(
            f"{self._layout.approle}/role/{role}",
            _app_role(
                [self._layout.policy(policy) for policy in (*policies, "self")],
                token_ttl_s=token_ttl_s,
                token_max_ttl_s=token_max_ttl_s,
            ),
        )

    def credentials(self, role: str, directory: Path) -> RoleSettings:
        """Leave working credentials of `role` in `directory`; those that work are kept."""
        role_path = f"{self._layout.approle}/role/{role}"
        found = credential_files(directory, role)
        role_id = (self.read(f"{role_path}/role-id") or {})["role_id"]
        if not self._works(role_path, found, role_id):
            answer = self._write(f"{role_path}/secret-id", {})
            write_private(Path(found.role_id_file), role_id.encode("ascii"))
            secret: str = answer["data"]["secret_id"]
            write_private(Path(found.secret_id_file), secret.encode("ascii"))
        return found

    def _works(self, role_path: str, found: RoleSettings, role_id: str) -> bool:
        paths = (Path(found.role_id_file), Path(found.secret_id_file))
        if not all(path.exists() for path in paths) or read_private_text(paths[0]) != role_id:
            return False
        secret = {"secret_id": read_private_text(paths[1])}
        try:
            found_there = self._client.call("POST", f"{role_path}/secret-id/lookup", secret)
        except VaultRejectedError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return False
            raise
        return bool(found_there.get("data"))

    def _put_if_different(self, path: str, wanted: Mapping[str, Any]) -> None:
        found = self.read(path)
        if found is None or any(found.get(name) != value for name, value in wanted.items()):
            self._write(path, wanted)


def _certificate_role(role: str, pki: PkiSettings) -> dict[str, Any]:
    """Return which certificates may be had: short-lived ones for names within our own domains.

    Raises `KeyConfigurationError` for a domain in which the coordinator's name lies: a node could
    have a certificate in it.
    """
    for domain in pki.allowed_domains:
        if f".{COORDINATOR_NAME}".endswith(f".{domain.strip('.').lower()}"):
            raise KeyConfigurationError(
                f"keys.pki.allowed_domains must not hold {domain!r}: {COORDINATOR_NAME} lies in "
                "it, a name that the coordinator of studies alone may carry. Name domains below it."
            )
    lifetime_s = pki.lifetime_hours * 3600
    return {
        "allowed_domains": list(pki.allowed_domains),
        "allow_bare_domains": True,
        "allow_subdomains": True,
        "allow_any_name": False,
        # Allowed by default, whatever the domains.
        "allow_localhost": False,
        "allow_wildcard_certificates": False,
        "allow_ip_sans": True,
        # A node that could serve could pass for the coordinator to all other nodes.
        "server_flag": role == SERVER_ROLE,
        "client_flag": role == NODE_ROLE,
        "code_signing_flag": False,
        "email_protection_flag": False,
        "key_type": "ec",
        "key_bits": 256,
        "require_cn": False,
        "ttl": lifetime_s,
        "max_ttl": lifetime_s,
        "no_store": True,
    }


def _coordinator_role(pki: PkiSettings) -> dict[str, Any]:
    """Return what opens the SuperLink's HTTP port: one name, for clients only."""
    return _certificate_role(NODE_ROLE, pki) | {
        "allowed_domains": [COORDINATOR_NAME],
        "allow_subdomains": False,
        "allow_ip_sans": False,
    }


def _outbound_role(pki: PkiSettings) -> dict[str, Any]:
    """Return what stands in for hosts outside: any name, for servers only, for a short time.

    The list of hosts changes with the gateway's configuration, so the gateway keeps to it itself;
    whoever trusts this authority is an app whose calls the gateway reads anyway.
    """
    return _certificate_role(SERVER_ROLE, pki) | {
        "allowed_domains": [],
        "allow_any_name": True,
        "enforce_hostnames": True,
        "allow_bare_domains": False,
        "allow_subdomains": False,
    }


def _app_role(policies: list[str], *, token_ttl_s: int, token_max_ttl_s: int) -> dict[str, Any]:
    """Return an AppRole that carries the named policies and no default ones."""
    return {
        "token_policies": sorted(policies),
        "token_no_default_policy": True,
        "token_ttl": token_ttl_s,
        "token_max_ttl": token_max_ttl_s,
        "bind_secret_id": True,
    }


def _render_policy(name: str, prefix: str) -> str:
    source = files("keys").joinpath("vault_policies", f"{name}.hcl").read_text(encoding="utf-8")
    return Template(source).substitute(prefix=prefix)


def _verify(path: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise KeyConfigurationError(
                f"The key {path} exists with {name} = {found.get(name)!r}, expected {value!r}. It "
                "was not made by Havengate and cannot be trusted; choose another keys.vault.prefix."
            )
