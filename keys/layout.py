"""Where Havengate's things stand on a key server: every name carries the configured prefix.

`keys.bootstrap` creates what is named here, the policies in `vault_policies/` allow it path by
path, and the adapters call it. Nobody else spells a path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from keys.errors import KeyConfigurationError

#: Transit keys. The first is the key-encryption key, the next two sign, the last three serve
#: pseudonyms.
KEK = "kek"
AUDIT_SIGNING_KEY = "audit-log"
IDENTITY_SIGNING_KEY = "identity"
HMAC_KEY = "hmac"
FIRST_HALF_KEY = "reid-first"
SECOND_HALF_KEY = "reid-second"

#: PKI roles.
SERVER_ROLE = "server"
NODE_ROLE = "node"
COORDINATOR_ROLE = "coordinator"
#: The one name in certificates of `COORDINATOR_ROLE`; no other role's may carry it.
COORDINATOR_NAME = "coordinator.havengate-control.internal"
#: Of the authority that only apps behind the gateway trust.
OUTBOUND_ROLE = "outbound"

_PREFIX = re.compile(r"[a-z0-9][a-z0-9-]{0,47}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Paths below `/v1/`, without slashes at the ends."""

    prefix: str

    def __post_init__(self) -> None:
        if not _PREFIX.fullmatch(self.prefix):
            raise KeyConfigurationError(
                "keys.vault.prefix must be 1 to 48 lower-case letters, digits and hyphens; it "
                "becomes part of every path on the key server."
            )

    @property
    def transit(self) -> str:
        """The mount of the transit engine."""
        return f"{self.prefix}/transit"

    @property
    def kv(self) -> str:
        """The mount of the key-value engine, version 2."""
        return f"{self.prefix}/kv"

    @property
    def pki(self) -> str:
        """The mount of the certificate authority."""
        return f"{self.prefix}/pki"

    @property
    def outbound_pki(self) -> str:
        """The mount of the authority for the way out, apart from the other one.

        It vouches for any host, so nobody but the apps that call through the gateway trusts it.
        """
        return f"{self.prefix}/outbound-pki"

    @property
    def approle(self) -> str:
        """The mount of the AppRole login method."""
        return f"auth/{self.prefix}"

    def policy(self, name: str) -> str:
        """Return the name of a policy."""
        return f"{self.prefix}-{name}"
