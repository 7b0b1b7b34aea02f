"""Short-lived certificates from the key server's authority, for servers and Flower nodes.

The private key is made here and stays here; only a signing request (RFC 2986) is sent. Key,
certificate and authority of one issue lie together in a directory named after the serial number,
and a link `current` is moved to it in one step, so that no crash can pair one issue's key with
another's certificate. Before: `keys.bootstrap` made the authority. After: whoever speaks TLS reads
the files.
"""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Literal

import structlog
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from keys.errors import CertificateError, KeysError, VaultRejectedError
from keys.private_files import make_private_directory, sync_directory, write_private
from keys.settings import PkiSettings
from keys.vault import VaultClient

_LOG = structlog.get_logger("keys.certificates")
#: Besides the current issue, so many older ones stay for programs that still have them open.
_KEPT_ISSUES = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedCertificate:
    """One issue. The files are PEM, mode 0600, and never change. Times are Unix seconds."""

    certificate_file: Path
    key_file: Path
    ca_file: Path
    not_before: float
    not_after: float
    names: frozenset[str]


class CertificateManager:
    """Keeps one certificate good. Thread-safe; call `renew_if_due` every few minutes.

    `kind` is `server`, or `node` or `coordinator` for a certificate that authenticates a client
    only. `names` are DNS names or IP addresses, all within `keys.pki.allowed_domains`; the
    coordinator's is `layout.COORDINATOR_NAME`. `clock` is Unix time in
    seconds.
    """

    def __init__(
        self,
        client: VaultClient,
        *,
        kind: Literal["server", "node", "coordinator"],
        names: Sequence[str | IPv4Address | IPv6Address],
        directory: Path,
        settings: PkiSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not names:
            raise CertificateError("A certificate needs at least one DNS name or IP address.")
        self._client = client
        self._kind = kind
        self._names = [_general_name(name) for name in names]
        self._directory = directory
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._current: IssuedCertificate | None = None

    def current(self) -> IssuedCertificate:
        """Return what to serve with now.

        Raises `CertificateError` if there is none or it has expired: then do not serve.
        """
        with self._lock:
            current = self._current or self._load()
            self._current = current
        if current is None:
            raise CertificateError(
                f"No certificate was issued into {self._directory} yet; it comes with the first "
                "renewal that reaches the key server."
            )
        if self._clock() >= current.not_after:
            raise CertificateError(
                f"The certificate in {self._directory} has expired and could not be renewed; see "
                "`havengate keys status` for what is wrong with the key server."
            )
        return current

    def renew_if_due(self) -> bool:
        """Renew if less than `renew_fraction` of the lifetime is left; return whether it changed.

        If renewing fails, the certificate in hand stays in use and the failure is logged, until it
        expires: from then on `CertificateError` is raised, with the failure as its cause.
        """
        with self._lock:
            known = self._current
            if self._is_due(known):
                # Another process that keeps the same directory may have renewed it meanwhile.
                self._current = self._load() or known
            if not self._is_due(self._current):
                return known is not None and known != self._current
            try:
                self._current = self._issue()
            except (KeysError, OSError) as error:
                current = self._current
                if current is None or self._clock() >= current.not_after:
                    raise CertificateError(
                        f"No valid certificate is in {self._directory} and none could be had "
                        f"({error.code if isinstance(error, KeysError) else 'the disk failed'}). "
                        "Nothing may be served until the key server answers."
                    ) from error
                left_s = round(current.not_after - self._clock())
                _LOG.warning("keys.certificate.renewal_failed", left_s=left_s, error=str(error))
                return False
            return True

    def _is_due(self, current: IssuedCertificate | None) -> bool:
        if current is None or current.names != frozenset(_text(name) for name in self._names):
            return True
        lifetime_s = current.not_after - current.not_before
        left_s = current.not_after - self._clock()
        return left_s < lifetime_s * self._settings.renew_fraction

    def _issue(self) -> IssuedCertificate:
        key = ec.generate_private_key(ec.SECP256R1())
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([]))
            .add_extension(x509.SubjectAlternativeName(self._names), critical=False)
            .sign(key, hashes.SHA256())
        )
        answer = self._client.call(
            "POST",
            f"{self._client.layout.pki}/sign/{self._kind}",
            {
                "csr": request.public_bytes(Encoding.PEM).decode("ascii"),
                "ttl": f"{self._settings.lifetime_hours}h",
                "format": "pem",
            },
        )
        data = answer.get("data") or {}
        certificate, authority = _parse_issue(data.get("certificate"), data.get("issuing_ca"))
        self._verify_issue(certificate, authority, key.public_key())
        return self._store(key, certificate, authority)

    def _verify_issue(
        self,
        certificate: x509.Certificate,
        authority: x509.Certificate,
        public_key: ec.EllipticCurvePublicKey,
    ) -> None:
        try:
            certificate.verify_directly_issued_by(authority)
        except (InvalidSignature, ValueError, TypeError) as error:
            raise VaultRejectedError(
                "The key server returned a certificate that its own authority did not sign."
            ) from error
        wanted = frozenset(_text(name) for name in self._names)
        if certificate.public_key() != public_key or _names_of(certificate) != wanted:
            raise VaultRejectedError(
                "The key server returned a certificate for another key or for other names than "
                "asked."
            )
        if certificate.not_valid_after_utc.timestamp() <= self._clock():
            raise VaultRejectedError(
                "The key server returned a certificate that has expired already: compare the "
                "clocks."
            )

    def _store(
        self,
        key: ec.EllipticCurvePrivateKey,
        certificate: x509.Certificate,
        authority: x509.Certificate,
    ) -> IssuedCertificate:
        make_private_directory(self._directory)
        issue = self._directory / f"{certificate.serial_number:040x}"
        make_private_directory(issue)
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_private(issue / "key.pem", private)
        write_private(issue / "ca.pem", authority.public_bytes(Encoding.PEM))
        write_private(issue / "certificate.pem", certificate.public_bytes(Encoding.PEM))
        link = self._directory / f".current.{secrets.token_hex(8)}"
        link.symlink_to(issue.name)
        link.replace(self._directory / "current")
        sync_directory(self._directory)
        self._remove_old_issues(issue)
        return _describe(issue, certificate)

    def _remove_old_issues(self, current: Path) -> None:
        older = sorted(
            (path for path in self._directory.iterdir() if path.is_dir() and not path.is_symlink()),
            key=lambda path: path.stat().st_mtime_ns,
            reverse=True,
        )
        others = [path for path in older if path.name != current.name]
        for path in others[_KEPT_ISSUES:]:
            shutil.rmtree(path)

    def _load(self) -> IssuedCertificate | None:
        """Return the issue on disk, or None if there is none that is whole."""
        link = self._directory / "current"
        try:
            issue = self._directory / link.readlink()
            certificate = x509.load_pem_x509_certificate((issue / "certificate.pem").read_bytes())
            loaded = _describe(issue, certificate)
        except (OSError, ValueError):
            return None
        whole = loaded.key_file.exists() and loaded.ca_file.exists()
        return loaded if whole else None


def _describe(issue: Path, certificate: x509.Certificate) -> IssuedCertificate:
    return IssuedCertificate(
        certificate_file=issue / "certificate.pem",
        key_file=issue / "key.pem",
        ca_file=issue / "ca.pem",
        not_before=certificate.not_valid_before_utc.timestamp(),
        not_after=certificate.not_valid_after_utc.timestamp(),
        names=_names_of(certificate),
    )


def _parse_issue(
    certificate: object, authority: object
) -> tuple[x509.Certificate, x509.Certificate]:
    try:
        return (
            x509.load_pem_x509_certificate(str(certificate).encode("ascii")),
            x509.load_pem_x509_certificate(str(authority).encode("ascii")),
        )
    except ValueError as error:
        raise VaultRejectedError(
            "The key server returned something else than a certificate."
        ) from error


def _names_of(certificate: x509.Certificate) -> frozenset[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return frozenset()
    return frozenset(_text(name) for name in names)


def _text(name: x509.GeneralName) -> str:
    return str(name.value)


def _general_name(name: str | IPv4Address | IPv6Address) -> x509.GeneralName:
    return x509.DNSName(name) if isinstance(name, str) else x509.IPAddress(name)
