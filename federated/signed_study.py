"""The signatures below a study: who vouches for it, in which role, and how that is verified.

Lives here: signing, the form in which a signed study travels, verification against the keys that a
device was enrolled with. What a study says stands in `federated.manifest`; who may sign, and when,
in `federated.approvals`.

What is signed is the role, the site and the study's hash, below a line that no other signature of
Havengate begins with: a signature given as one thing is never read as another. A device runs
`parse_signed_study` and `verify_study` on whatever the server sends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from federated.errors import ApprovalError, ManifestError
from federated.manifest import MAX_MANIFEST_BYTES, MAX_SITES, Study, parse_manifest

type Role = Literal["coordinator", "ethics-board", "site"]

DOMAIN: Final = b"havengate/study/v1\n"
#: Larger signed studies are refused unread.
MAX_SIGNED_BYTES: Final = 3 * MAX_MANIFEST_BYTES
MAX_SIGNATURES: Final = 2 * MAX_SITES
_KEY_BYTES: Final = 32
_SITE = re.compile(r"[a-z][a-z0-9_-]{0,63}").fullmatch
_HEX_KEY = re.compile(r"[0-9a-f]{64}").fullmatch
_HEX_SIGNATURE = re.compile(r"[0-9a-f]{128}").fullmatch


class Signer(Protocol):
    """Signs with one Ed25519 key: a transit key of the key server, or a 0600 file."""

    def public_keys(self) -> Mapping[int, bytes]:
        """Raw 32-byte public keys by version; the greatest number is the one that signs."""
        ...

    def sign(self, message: bytes) -> tuple[int, bytes]:
        """Return the version used and the 64-byte signature of `message`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySignature:
    """One signature. `site` is empty unless the role is that of a site. Proves nothing yet."""

    role: Role
    site: str = ""
    public_key: bytes
    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedStudy:
    """A study and the signatures that came with it. Parsed, not verified."""

    study: Study
    signatures: tuple[StudySignature, ...] = ()

    def encode(self) -> bytes:
        """The form in which it travels; `parse_signed_study` reads it."""
        wire = _Wire(
            manifest=self.study.canonical_bytes().decode(),
            signatures=[
                _WireSignature(
                    role=one.role,
                    site=one.site,
                    public_key=one.public_key.hex(),
                    signature=one.signature.hex(),
                )
                for one in self.signatures
            ],
        )
        return msgspec.json.encode(wire)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedKeys:
    """The keys that a device, or the coordinator, was enrolled with: raw Ed25519 public keys.

    Nobody's keys come with a study. `own_site`, if given, must be among the study's sites: what
    runs on a site's people needs that site's word.
    """

    coordinator: frozenset[bytes]
    ethics_board: frozenset[bytes]
    sites: Mapping[str, frozenset[bytes]] = field(default_factory=dict)
    own_site: str = ""


class _WireSignature(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: Role
    site: str
    public_key: str
    signature: str


class _Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    manifest: str
    signatures: list[_WireSignature]


def signing_message(study_hash: str, *, role: Role, site: str = "") -> bytes:
    """The bytes that a signature covers."""
    return DOMAIN + f"{role}\n{site}\n{study_hash}\n".encode()


def sign_study(study: Study, signer: Signer, *, role: Role, site: str = "") -> StudySignature:
    """Have a study signed. Raises what the signer raises; `ApprovalError` if it does not fit."""
    _verify_place(role, site)
    message = signing_message(study.study_hash, role=role, site=site)
    version, raw = signer.sign(message)
    key = signer.public_keys().get(version, b"")
    signature = StudySignature(role=role, site=site, public_key=key, signature=raw)
    verify_signature(study, signature)
    return signature


def verify_signature(study: Study, signature: StudySignature) -> None:
    """Prove that the key it names signed this study in this role. Raises `ApprovalError`.

    Whether that key may be trusted is not asked here.
    """
    message = signing_message(study.study_hash, role=signature.role, site=signature.site)
    try:
        Ed25519PublicKey.from_public_bytes(signature.public_key).verify(
            signature.signature, message
        )
    except (InvalidSignature, ValueError) as error:
        raise ApprovalError(
            f"A signature as {_place(signature)} does not fit the study {study.id}: it was given "
            "for another study, in another role, or changed."
        ) from error


def parse_signed_study(data: bytes) -> SignedStudy:
    """Read what `SignedStudy.encode` makes. Raises `ManifestError`; verifies no signature."""
    if len(data) > MAX_SIGNED_BYTES:
        raise ManifestError(f"A signed study has at most {MAX_SIGNED_BYTES} bytes.")
    try:
        wire = msgspec.json.decode(data, type=_Wire)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ManifestError("The signed study is malformed: ask for it again.") from error
    if len(wire.signatures) > MAX_SIGNATURES:
        raise ManifestError(f"A study carries at most {MAX_SIGNATURES} signatures.")
    return SignedStudy(
        study=parse_manifest(wire.manifest.encode()),
        signatures=tuple(_parse_signature(one) for one in wire.signatures),
    )


def _parse_signature(wire: _WireSignature) -> StudySignature:
    if not _HEX_KEY(wire.public_key) or not _HEX_SIGNATURE(wire.signature):
        raise ManifestError("A signature of the study is not 64 bytes in hex by a key of 32.")
    _verify_place(wire.role, wire.site)
    return StudySignature(
        role=wire.role,
        site=wire.site,
        public_key=bytes.fromhex(wire.public_key),
        signature=bytes.fromhex(wire.signature),
    )


def verify_study(signed: SignedStudy, trusted: TrustedKeys) -> None:
    """Prove that everybody whose word this study needs gave it. Raises `ApprovalError`.

    Needed: the coordinator, `ethics_approvals` different members of the ethics board, and each site
    that the study names, all by keys of `trusted`, no key in two roles. A signature that does not
    fit is refused even where it is not needed; one by an unknown key counts for nothing.
    """
    for signature in signed.signatures:
        verify_signature(signed.study, signature)
    study = signed.study
    if trusted.own_site and trusted.own_site not in study.sites:
        raise ApprovalError(
            f"The study {study.id} does not ask the site {trusted.own_site}, so it may not run "
            "there."
        )
    used = _Used()
    used.take(signed.signatures, "coordinator", "", trusted.coordinator, needed=1)
    used.take(
        signed.signatures, "ethics-board", "", trusted.ethics_board, needed=study.ethics_approvals
    )
    for site in study.sites:
        keys = trusted.sites.get(site, frozenset())
        used.take(signed.signatures, "site", site, keys, needed=1)


class _Used:
    """Keys that have vouched already: nobody speaks in two roles."""

    def __init__(self) -> None:
        self._keys: set[bytes] = set()

    def take(
        self,
        signatures: Sequence[StudySignature],
        role: Role,
        site: str,
        keys: frozenset[bytes],
        *,
        needed: int,
    ) -> None:
        given = {
            one.public_key
            for one in signatures
            if one.role == role and one.site == site and one.public_key in keys
        }
        fresh = given - self._keys
        if len(fresh) < needed:
            who = _place_of(role, site)
            twice = " One key signed in two roles." if given != fresh else ""
            raise ApprovalError(
                f"The study needs {needed} known signature(s) as {who} and has {len(fresh)}."
                f"{twice} Ask for the missing approval."
            )
        self._keys |= fresh


def _verify_place(role: Role, site: str) -> None:
    if bool(site) != (role == "site") or (site and not _SITE(site)):
        raise ManifestError("A signature names its site if, and only if, it is a site's.")


def _place_of(role: Role, site: str) -> str:
    return f"site {site}" if role == "site" else role


def _place(signature: StudySignature) -> str:
    return _place_of(signature.role, signature.site)
