"""The certificates of SuperLink and coordinator, from the key server's authority.

The SuperLink has a `server` certificate, the coordinator one of its own role, which authenticates a
client, cannot serve, and is in a name that no other role of the key server can have. A node needs
none: Flower's Fleet API knows it by its registered key; it only needs the authority, to know the
SuperLink.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from federated.deployment.places import Places
from keys.certificates import CertificateManager
from keys.layout import COORDINATOR_NAME
from keys.settings import PkiSettings
from keys.vault import VaultClient


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """Both certificates, kept good by calling `renew_if_due` of each every few minutes."""

    superlink: CertificateManager
    coordinator: CertificateManager

    @classmethod
    def open(
        cls,
        places: Places,
        *,
        server: VaultClient,
        client: VaultClient,
        settings: PkiSettings,
        names: tuple[str | IPv4Address | IPv6Address, ...] = (
            "localhost",
            IPv4Address("127.0.0.1"),
        ),
    ) -> Certificates:
        """Issue what is missing or due.

        `server` is a client of the key server in a role that may sign server certificates
        (`gateway`), `client` in the coordinator's (`coordinator`). Raises
        `CertificateError` if none can be had.
        """
        kept = cls(
            superlink=CertificateManager(
                server,
                kind="server",
                names=names,
                directory=places.tls("superlink"),
                settings=settings,
            ),
            coordinator=CertificateManager(
                client,
                kind="coordinator",
                names=(COORDINATOR_NAME,),
                directory=places.tls("coordinator"),
                settings=settings,
            ),
        )
        kept.superlink.renew_if_due()
        kept.coordinator.renew_if_due()
        return kept
