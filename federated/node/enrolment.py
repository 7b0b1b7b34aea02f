"""What a node was told when it was enrolled: whom it believes. No study ever brings any of it.

Lives here: the form, its strict reading, and where it is kept (in the store). Who hands it over,
and what it is worth, stands in DESIGN.md.
"""

from __future__ import annotations

from typing import Final

import msgspec

from audit.errors import MalformedNoteError
from audit.note import COSIGNATURE, ED25519, VerifierKey
from federated.errors import ManifestError
from federated.node.store import Store
from federated.signed_study import TrustedKeys
from federated.study_log import Remembered

_MEMORY: Final = "checkpoint"
_ENROLMENT: Final = "enrolment"
MAX_BYTES: Final = 65_536
_KEY_BYTES: Final = 32


class Enrolment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file that a node is enrolled with. Keys are raw Ed25519 public keys in hex.

    `log_keys` and `witness_keys` are verifier keys (C2SP signed-note), of which `witnesses` must
    cosign. `node` is the id under which the node stands in rosters. `minimum_cohort` is the node's
    own floor, whatever a study says. `allow_trusted_server` lets studies ask that show the
    coordinator each answer.
    """

    node: str
    coordinator: tuple[str, ...]
    ethics_board: tuple[str, ...]
    sites: dict[str, tuple[str, ...]] = {}
    own_site: str = ""
    origin: str
    log_keys: tuple[str, ...]
    witness_keys: tuple[str, ...]
    witnesses: int = 1
    minimum_cohort: int = 3
    allow_trusted_server: bool = False

    def trusted(self) -> TrustedKeys:
        """The keys whose signatures count."""
        return TrustedKeys(
            coordinator=_raw(self.coordinator),
            ethics_board=_raw(self.ethics_board),
            sites={site: _raw(keys) for site, keys in self.sites.items()},
            own_site=self.own_site,
        )

    def log_verifiers(self) -> tuple[VerifierKey, ...]:
        """The study log's keys."""
        return _verifiers(self.log_keys, ED25519)

    def witness_verifiers(self) -> tuple[VerifierKey, ...]:
        """The witnesses' keys."""
        return _verifiers(self.witness_keys, COSIGNATURE)


def parse_enrolment(data: bytes) -> Enrolment:
    """Read and check the file. Raises `ManifestError`."""
    if len(data) > MAX_BYTES:
        raise ManifestError(f"An enrolment has at most {MAX_BYTES} bytes.")
    try:
        found = msgspec.json.decode(data, type=Enrolment)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"The enrolment is malformed: {error}") from None
    if not found.coordinator or not found.ethics_board:
        raise ManifestError("An enrolment names keys of a coordinator and of an ethics board.")
    if not found.log_verifiers() or not found.witness_verifiers() or found.witnesses < 1:
        raise ManifestError("An enrolment names keys of the study log and of a witness at least.")
    if found.minimum_cohort < 1 or not found.node:
        raise ManifestError("An enrolment names the node, and a minimum cohort of 1 or more.")
    found.trusted()
    return found


def enrol(store: Store, enrolment: Enrolment) -> None:
    """Keep it. A new one replaces the old; what was seen of the same log stays remembered."""
    with store.database.transaction():
        if remembered(store, enrolment.origin).checkpoint.origin != enrolment.origin:
            store.set_meta(_MEMORY, Remembered.nothing(enrolment.origin).encode())
        text = msgspec.json.encode(enrolment).decode()
        if store.meta(_ENROLMENT) != text:
            store.set_meta(_ENROLMENT, text)


def enrolled(store: Store) -> Enrolment:
    """What the node was enrolled with. Raises `ManifestError` if it was not."""
    text = store.meta(_ENROLMENT)
    if text is None:
        raise ManifestError("This node is not enrolled: `havengate device enrol FILE` first.")
    return parse_enrolment(text.encode())


def remembered(store: Store, origin: str) -> Remembered:
    """The newest checkpoint that was proven here. Raises `StudyLogError` if it is damaged."""
    text = store.meta(_MEMORY)
    return Remembered.nothing(origin) if text is None else Remembered.parse(text)


def remember(store: Store, memory: Remembered) -> None:
    """Keep a newer one, durably."""
    text = memory.encode()
    if store.meta(_MEMORY) != text:
        store.set_meta(_MEMORY, text)


def _raw(keys: tuple[str, ...]) -> frozenset[bytes]:
    try:
        raw = frozenset(bytes.fromhex(key) for key in keys)
    except ValueError:
        raw = frozenset({b""})
    if any(len(key) != _KEY_BYTES for key in raw):
        raise ManifestError("A key in an enrolment is 32 bytes in hex.")
    return raw


def _verifiers(texts: tuple[str, ...], algorithm: int) -> tuple[VerifierKey, ...]:
    try:
        keys = tuple(VerifierKey.parse(text) for text in texts)
    except MalformedNoteError as error:
        raise ManifestError(f"A verifier key in the enrolment is malformed: {error}") from None
    if any(key.algorithm != algorithm for key in keys):
        raise ManifestError("A verifier key in the enrolment is of the wrong kind.")
    return keys
