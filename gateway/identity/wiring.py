"""Everything of identity, put together once per process: settings and outside parts in.

The program root calls `Identity.open` in a thread, because it reads the database, the key files and
three secrets on the key server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from gateway.identity.assertion import Assertions
from gateway.identity.bearer import BearerTokens
from gateway.identity.directory import Directory
from gateway.identity.forms import Forms
from gateway.identity.identify import Identifier
from gateway.identity.own_account import OwnAccount
from gateway.identity.pages import OwnPages
from gateway.identity.passwords import Passwords
from gateway.identity.reasons import PersonSealer, Reasons
from gateway.identity.recording import ActRecorder, IdentityLog
from gateway.identity.rendering import Renderer
from gateway.identity.service_accounts import ServiceAccounts
from gateway.identity.shared_secret import SharedSecret
from gateway.identity.sign_in import SignIn
from gateway.identity.totp import SecondFactors, SecretStore
from gateway.settings import IdentitySettings
from keys.ports import Clock, Signer
from policies.model import ROLES

#: Secrets on the key server, below the store's root.
PAIRWISE_SECRET = "identity/pairwise"  # noqa: S105 - the path of a secret
FORMS_SECRET = "identity/forms"  # noqa: S105 - the path of a secret
REASONS_SECRET = "identity/reasons"  # noqa: S105 - the path of a secret


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What the gateway uses: who asks, what the app is told, and the own pages."""

    directory: Directory
    identifier: Identifier
    assertions: Assertions
    pages: OwnPages
    passwords: Passwords

    @classmethod
    def open(
        cls,
        settings: IdentitySettings,
        *,
        store: SecretStore,
        sealer: PersonSealer,
        signer: Signer,
        recorder: ActRecorder,
        tenant: str,
        public_url: str,
        clock: Clock,
        roles: Sequence[str] = ROLES,
        crisis_url: str = "",
        passwords: Passwords | None = None,
    ) -> Self:
        """Open all of it. `roles` are those that rules know, the clinic's own included.

        `store` is `KVStore(client, "gateway")`, `signer` a `VaultSigner` of the identity key.
        Raises `GatewayConfigurationError`, `DirectoryError` or a `KeysError`.
        """
        directory = Directory.open(settings.database_url, settings=settings.sessions, clock=clock)
        try:
            identifier = Identifier(
                directory=directory,
                tokens=BearerTokens(
                    settings.providers, revocations=directory.revocations, clock=clock, roles=roles
                ),
                services=ServiceAccounts(settings.service_accounts),
                clock=clock,
                purposes=settings.purposes,
            )
            pairwise = SharedSecret.open(store, PAIRWISE_SECRET, directory.database)
            forms = SharedSecret.open(store, FORMS_SECRET, directory.database)
            before = SharedSecret.open(store, REASONS_SECRET, directory.database)
            directory.grants.keep_reasons_under(Reasons(sealer, before=before))
        except BaseException:
            directory.close()
            raise
        hasher = passwords or Passwords()
        log = IdentityLog(recorder=recorder, tenant=tenant, clock=clock)
        assertions = Assertions(signer, issuer=public_url, pairwise=pairwise, clock=clock)
        pages = OwnPages(
            identifier=identifier,
            assertions=assertions,
            sign_in=SignIn(
                directory=directory,
                passwords=hasher,
                second_factors=SecondFactors(store, directory.accounts, clock=clock),
                log=log,
            ),
            own_account=OwnAccount(directory=directory, passwords=hasher, log=log),
            forms=Forms(forms, clock=clock),
            renderer=Renderer(crisis_url=crisis_url),
        )
        return cls(
            directory=directory,
            identifier=identifier,
            assertions=assertions,
            pages=pages,
            passwords=hasher,
        )

    def close(self) -> None:
        """Close the database and end the threads."""
        self.passwords.close()
        self.directory.close()
