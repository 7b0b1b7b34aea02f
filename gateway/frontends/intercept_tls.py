"""Certificates shown to apps in the place of the hosts they call, issued one by one by Vault.

mitmproxy would make an authority of its own and sign with a private key on disk. Here the authority
is Vault's (`keys.layout.Layout.outbound_pki`), its key never leaves Vault, and only certificates of
single hosts on the list are asked for, with keys that live in memory alone and for a day.
Apps trust the authority's certificate, which `write_authority` puts where they can read it.

Name constraints (RFC 5280 section 4.2.1.10) would have to name the hosts on the list; they cannot
follow the list without every app being given a new authority, so there are none.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from gateway.errors import GatewayConfigurationError
from gateway.outbound.apps import AUTHORITY_FILE
from keys.errors import VaultRejectedError
from keys.layout import OUTBOUND_ROLE
from keys.private_files import write_private
from keys.settings import PkiSettings
from keys.vault import VaultClient

#: Of hosts. The list bounds what is asked for, but for names below a wildcard.
MAX_KEPT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A certificate for one host. Times are Unix seconds."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    renew_at: float


class Leaves:
    """Certificates by host, kept until near their end. Thread-safe; calls of Vault block.

    `may_stand_for` is asked before Vault is: a certificate for a host that no app may call would be
    one with which nothing good can be done.
    """

    def __init__(
        self,
        client: VaultClient,
        *,
        settings: PkiSettings,
        may_stand_for: Callable[[str], bool],
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._settings = settings
        self._may_stand_for = may_stand_for
        self._clock = clock
        self._kept: OrderedDict[str, Leaf] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, host: str) -> Leaf | None:
        """Return what is kept for `host` and still good. Never asks Vault."""
        with self._lock:
            leaf = self._kept.get(host)
            if leaf is None or self._clock() >= leaf.renew_at:
                return None
            self._kept.move_to_end(host)
            return leaf

    def ensure(self, host: str) -> Leaf:
        """Return a certificate for `host`, from Vault if none is kept.

        Raises `GatewayConfigurationError` for a host that is not on the list, a `VaultError` if
        Vault does not give a certificate that fits.
        """
        if not self._may_stand_for(host):
            raise GatewayConfigurationError("Only hosts on the list have a certificate here.")
        leaf = self.get(host)
        if leaf is None:
            leaf = self._issue(host)
            with self._lock:
                self._kept[host] = leaf
                while len(self._kept) > MAX_KEPT:
                    self._kept.popitem(last=False)
        return leaf

    def authority(self) -> x509.Certificate:
        """Return the authority's certificate. Raises a `VaultError`."""
        answer = self._client.call("GET", f"{self._client.layout.outbound_pki}/cert/ca")
        return _parse((answer.get("data") or {}).get("certificate"))

    def write_authority(self, directory: Path) -> Path:
        """Write the authority's certificate (PEM) for apps to trust, and return where it is.

        It is no secret: apps run as other users and must read it. Only its owner may change it.
        """
        directory.mkdir(parents=True, exist_ok=True)
        # Whatever the process's mask says of files that nobody else may read.
        directory.chmod(0o755)
        path = directory / AUTHORITY_FILE
        content = self.authority().public_bytes(Encoding.PEM)
        if not path.exists() or path.read_bytes() != content:
            write_private(path, content)
        path.chmod(0o644)
        return path

    def _issue(self, host: str) -> Leaf:
        key = ec.generate_private_key(ec.SECP256R1())
        name = _general_name(host)
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([]))
            .add_extension(x509.SubjectAlternativeName([name]), critical=True)
            .sign(key, hashes.SHA256())
        )
        answer = self._client.call(
            "POST",
            f"{self._client.layout.outbound_pki}/sign/{OUTBOUND_ROLE}",
            {
                "csr": request.public_bytes(Encoding.PEM).decode("ascii"),
                "ttl": f"{self._settings.lifetime_hours}h",
                "format": "pem",
            },
        )
        data = answer.get("data") or {}
        certificate = _parse(data.get("certificate"))
        self._verify(certificate, _parse(data.get("issuing_ca")), key, name)
        begins = certificate.not_valid_before_utc.timestamp()
        ends = certificate.not_valid_after_utc.timestamp()
        renew_at = ends - (ends - begins) * self._settings.renew_fraction
        return Leaf(certificate=certificate, key=key, renew_at=renew_at)

    def _verify(
        self,
        certificate: x509.Certificate,
        authority: x509.Certificate,
        key: ec.EllipticCurvePrivateKey,
        name: x509.GeneralName,
    ) -> None:
        try:
            certificate.verify_directly_issued_by(authority)
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except (InvalidSignature, ValueError, TypeError, x509.ExtensionNotFound) as error:
            raise VaultRejectedError(
                "The key server returned a certificate that its own authority did not sign, or "
                "without a name."
            ) from error
        if certificate.public_key() != key.public_key() or list(names.value) != [name]:
            raise VaultRejectedError(
                "The key server returned a certificate for another key or for other names than "
                "asked."
            )
        if certificate.not_valid_after_utc.timestamp() <= self._clock():
            raise VaultRejectedError(
                "The key server returned a certificate that has expired already: compare the "
                "clocks."
            )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _parse(text: object) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(str(text).encode("ascii"))
    except ValueError as error:
        raise VaultRejectedError(
            "The key server returned something else than a certificate."
        ) from error
