"""Which key server, and as whom: where settings and environment are turned into clients.

An address in the settings, or else `VAULT_ADDR`, names a server of the operator's own and nothing
is started. Without one the server that Havengate brings is started or joined (`keys.embedded`).
What the clients do is `keys.vault`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import msgspec

from keys.embedded import EmbeddedServer
from keys.errors import KeyConfigurationError, KeysError
from keys.resilience import CircuitState
from keys.settings import KeysSettings, RoleName, RoleSettings, VaultSettings
from keys.vault import VaultClient


class KeyServer(Protocol):
    """A key server that this program may log in to in several roles."""

    def client(self, role: RoleName) -> VaultClient:
        """Return a client that logs in on first use. The caller closes it."""
        ...

    def login(self, name: str, files: RoleSettings) -> VaultClient:
        """As `client`, for a login that a person brings along, such as an officer's."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalServer:
    """A server that somebody else runs."""

    settings: VaultSettings

    def client(self, role: RoleName) -> VaultClient:
        """Return a client that logs in on first use. Raises `KeyConfigurationError`."""
        return VaultClient(settings=self.settings, role=role, credentials=self._credentials(role))

    def login(self, name: str, files: RoleSettings) -> VaultClient:
        """As `client`, for a login that a person brings along, such as an officer's."""
        return VaultClient(settings=self.settings, role=name, credentials=files)

    def _credentials(self, role: RoleName) -> RoleSettings:
        try:
            return self.settings.roles[role]
        except KeyError:
            raise KeyConfigurationError(
                f"The key server at {self.settings.address} is configured, but not how to log in "
                f"to it as {role}: add [keys.vault.roles.{role}] with role_id_file and "
                "secret_id_file."
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    """What an operator wants to know first. `problem` is the code of the error met, or empty."""

    address: str
    role: str
    reachable: bool
    initialized: bool
    sealed: bool
    standby: bool
    version: str
    token_ttl_s: float
    circuit: CircuitState
    problem: str
    message: str


@contextmanager
def open_server(
    settings: KeysSettings, *, environ: Mapping[str, str] = os.environ
) -> Iterator[KeyServer]:
    """Give the key server for the length of a `with` block; an embedded one runs at least so long.

    Raises `KeyConfigurationError`, and `EmbeddedServerError` if the embedded one does not start. A
    server of the operator's own is not asked for anything here.
    """
    vault = with_environment(settings.vault, environ)
    if vault.address:
        yield ExternalServer(settings=vault)
        return
    with EmbeddedServer(settings) as server:
        yield server


@contextmanager
def open_vault(
    settings: KeysSettings, role: RoleName, *, environ: Mapping[str, str] = os.environ
) -> Iterator[VaultClient]:
    """Give one role's client for the length of a `with` block. See `open_server`."""
    with open_server(settings, environ=environ) as server, server.client(role) as client:
        yield client


def with_environment(settings: VaultSettings, environ: Mapping[str, str]) -> VaultSettings:
    """Return the settings, completed from `VAULT_ADDR`, `VAULT_CACERT` and `VAULT_NAMESPACE`.

    What the configuration file says comes first: a shell that was set up for another server must
    not send this one's credentials there.
    """
    return msgspec.structs.replace(
        settings,
        address=settings.address or environ.get("VAULT_ADDR", ""),
        ca_file=settings.ca_file or environ.get("VAULT_CACERT", ""),
        namespace=settings.namespace or environ.get("VAULT_NAMESPACE", ""),
    )


def server_status(client: VaultClient) -> ServerStatus:
    """Ask the server how it is, and whether this role can log in. Raises nothing of `keys`."""
    problem: KeysError | None = None
    health = None
    token_ttl_s = 0.0
    try:
        health = client.health()
        token_ttl_s = client.token_ttl_s()
    except KeysError as error:
        problem = error
    return ServerStatus(
        address=client.address,
        role=client.role,
        reachable=health is not None,
        initialized=health.initialized if health else False,
        sealed=health.sealed if health else False,
        standby=health.standby if health else False,
        version=health.version if health else "",
        token_ttl_s=token_ttl_s,
        circuit=client.circuit,
        problem=problem.code if problem else "",
        message=str(problem) if problem else "",
    )
