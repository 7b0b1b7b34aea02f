"""The certificate with which the embedded server speaks TLS on loopback.

Other users of the machine could otherwise read tokens off the loopback device's captures or, worse,
listen on the port while the server is down. The CA's own key exists only in memory while it signs
one certificate: nobody can make a second one. Certificates for everything else come from
`keys.certificates`.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from keys.private_files import make_private_directory, write_private

_LIFETIME = dt.timedelta(days=5 * 365)
_RENEW_BEFORE = dt.timedelta(days=365)
_CLOCK_SKEW = dt.timedelta(minutes=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopbackTLS:
    """Paths of the PEM files."""

    ca_file: Path
    certificate_file: Path
    key_file: Path


def ensure_loopback_tls(directory: Path, now: dt.datetime) -> LoopbackTLS:
    """Return the certificate in `directory`, made anew if missing or within its last year."""
    paths = LoopbackTLS(
        ca_file=directory / "ca.pem",
        certificate_file=directory / "server.pem",
        key_file=directory / "server.key",
    )
    make_private_directory(directory)
    if not _is_good(paths, now):
        _make(paths, now)
    return paths


def _is_good(paths: LoopbackTLS, now: dt.datetime) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(paths.certificate_file.read_bytes())
        authority = x509.load_pem_x509_certificate(paths.ca_file.read_bytes())
        certificate.verify_directly_issued_by(authority)
        key = load_pem_private_key(paths.key_file.read_bytes(), None)
    except (OSError, ValueError, TypeError, InvalidSignature):
        # Whatever is wrong with the files, the remedy is to make new ones.
        return False
    # A crash between two writes may have left a key of another certificate, and a clock that was
    # wrong then a certificate that is not valid yet.
    fits = key.public_key() == certificate.public_key()
    begun = certificate.not_valid_before_utc <= now
    return fits and begun and now < certificate.not_valid_after_utc - _RENEW_BEFORE


def _make(paths: LoopbackTLS, now: dt.datetime) -> None:
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name = _name("Havengate loopback authority")
    authority = (
        _builder(ca_name, ca_name, ca_key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(for_authority=True), critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    names = [x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))]
    certificate = (
        _builder(_name("Havengate embedded key server"), ca_name, key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(for_authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_private(paths.key_file, private)
    write_private(paths.certificate_file, certificate.public_bytes(Encoding.PEM))
    write_private(paths.ca_file, authority.public_bytes(Encoding.PEM))


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now: dt.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + _LIFETIME)
    )


def _key_usage(*, for_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not for_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=for_authority,
        crl_sign=for_authority,
        encipher_only=False,
        decipher_only=False,
    )
