"""The front of `keys`: seal a field, open it again, load keys ahead, seal for the audit log.

`Keyring` turns a `FieldContext` into the right data key and the associated data, and leaves
cryptography to `keys.aead`, the printable form to `keys.sealed`, and keys to `keys.store`. Erasure,
rotation, blind index and pseudonyms stand beside it in modules of their own.

Associated data, in this order and each with its length: tenant, person tag, service, field, key
version. The person tag is an HMAC of tenant and person under a key that is itself wrapped in the
key table, so that the table is no list of patients.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache, partial
from typing import BinaryIO, NamedTuple

from keys import aead
from keys.chunked import ChunkedReader, ChunkedWriter, header_of
from keys.datakeys import ATTEMPTS, DataKey, KeyGoneError
from keys.errors import (
    KeyExhaustedError,
    KeyTableError,
    MalformedSealedTextError,
    VaultRejectedError,
)
from keys.model import FieldContext, KeyOwner, check_name
from keys.sealed import format_sealed, parse_sealed
from keys.store import KeyStore

#: The service name under which texts for the audit log are sealed.
AUDIT_SERVICE = "audit"
TAG_KEY = KeyOwner("system", "", "person-tag")

_TAG_LABEL = "havengate/person-tag/1"
_SUBJECT_LABEL = "havengate/erasure-subject/1"


class Subject(NamedTuple):
    """A person as the key table knows them, and the first part of their associated data."""

    owner: KeyOwner
    part: bytes


class Located(NamedTuple):
    """A sealed text taken apart, and where it stands: what opening it needs beside the key."""

    key_id: str
    place: bytes
    message: bytes


class Keyring:
    """Seals and opens fields. Thread-safe; meant to live as long as the process.

    Every method may raise `InvalidContextError`, a `VaultError` or `KeyTableError`. None ever
    returns plaintext that was to be sealed, and none opens what did not verify.
    """

    def __init__(self, store: KeyStore, *, subjects: int = 20_000) -> None:
        self._store = store
        # Bounded, and forgotten with the keys: the names of persons are in it.
        self._subject = lru_cache(maxsize=subjects)(self._make_subject)
        self._names: dict[tuple[str, str, str], tuple[int, str]] = {}
        self._most_names = subjects
        self._emptied = 0
        store.call_when_emptied(self._forget)

    @property
    def store(self) -> KeyStore:
        """The keys, for the modules beside this one."""
        return self._store

    # --- Fields -----------------------------------------------------------------------------------

    def seal(self, context: FieldContext, plaintext: bytes) -> str:
        """Seal one field. The text opens only with the same context."""
        subject = self._subject(context.tenant, context.person)
        place = subject.part + _place(context.service, context.field)
        salt = aead.new_salt()
        key, derived = self._derive_to_seal(subject.owner, aead.MESSAGE_LABEL, salt, place)
        return format_sealed(key.key_id, aead.encrypt(derived, salt, plaintext))

    def unseal(self, context: FieldContext, text: str) -> bytes:
        """Open one field.

        Raises `MalformedSealedTextError`, `UnsealError`, `UnknownKeyError`, or `PersonErasedError`
        once the person was erased.
        """
        sealed = parse_sealed(text)
        subject = self._subject(context.tenant, context.person)
        place = subject.part + _place(context.service, context.field)
        salt = aead.salt_of(sealed.message)
        derived = self._derive_to_open(sealed.key_id, aead.MESSAGE_LABEL, salt, place)
        return aead.decrypt(derived, sealed.message)

    def locate(self, context: FieldContext, text: str) -> Located:
        """Do once what opening the same text again and again has in common.

        Raises `MalformedSealedTextError` or `UnsealError`; that it opens is not said.
        """
        sealed = parse_sealed(text)
        aead.salt_of(sealed.message)
        subject = self._subject(context.tenant, context.person)
        place = subject.part + _place(context.service, context.field)
        return Located(sealed.key_id, place, sealed.message)

    def unseal_located(self, located: Sequence[Located]) -> list[bytes]:
        """Open many fields. Raises like `unseal`, for all together."""
        opened = []
        for key_id, place, message in located:
            salt = aead.salt_of(message)
            derived = self._derive_to_open(key_id, aead.MESSAGE_LABEL, salt, place)
            opened.append(aead.decrypt(derived, message))
        return opened

    def prefetch(self, tenant: str, persons: Collection[str], *, create: bool = False) -> None:
        """Load the sealing keys of many persons: one call of the key server for up to 200 of them.

        Persons without a key get one only with `create`: reading must not fill the table.
        """
        for person in persons:
            check_name("person", person)
        owners = [self._subject(tenant, person).owner for person in persons]
        self._prefetch(owners, create=create)

    def prefetch_texts(self, texts: Iterable[str]) -> None:
        """Load the keys that sealed texts name: one call of the key server for up to 200 of them.

        Texts that are malformed, erased or unknown are passed over: opening them says what is
        wrong.
        """
        key_ids = set()
        for text in texts:
            try:
                key_ids.add(parse_sealed(text).key_id)
            except MalformedSealedTextError:
                continue
        self._prefetch(key_ids, create=False)

    def is_loaded(
        self, tenant: str, *, persons: Iterable[str] = (), texts: Iterable[str] = ()
    ) -> bool:
        """True if sealing for these persons and opening these texts will ask no key server.

        False where that is not sure: a malformed text, or a person never met.
        """
        store = self._store
        if not store.is_loaded((TAG_KEY,)):
            return False
        # Only the place of the key's id is looked at: what is no sealed text names no key.
        ids = {text.partition(".")[2].partition(".")[0] for text in texts}
        return store.is_loaded(ids) and store.is_loaded(
            self._subject(tenant, person).owner for person in persons
        )

    # --- Large content ----------------------------------------------------------------------------

    def seal_stream(self, context: FieldContext, sink: BinaryIO) -> ChunkedWriter:
        """Return a writer that seals what it is given into `sink` (see `keys.chunked`).

        Once the person is erased, writing raises `PersonErasedError`.
        """
        subject = self._subject(context.tenant, context.person)
        place = subject.part + _place(context.service, context.field)
        salt = aead.new_salt()
        key, derived = self._derive_to_seal(subject.owner, aead.FILE_LABEL, salt, place)
        alive = partial(self._store.by_id, key.key_id)
        return ChunkedWriter(
            sink, key_id=key.key_id, salt=salt, derived=derived, before_chunk=alive
        )

    def open_stream(self, context: FieldContext, source: BinaryIO) -> ChunkedReader:
        """Return a reader of content that `seal_stream` sealed for the same context.

        Raises like `unseal`; reading raises `UnsealError` at the first chunk that is not authentic,
        and `PersonErasedError` once the person is erased.
        """
        header = header_of(source)
        subject = self._subject(context.tenant, context.person)
        place = subject.part + _place(context.service, context.field)
        derived = self._derive_to_open(header.key_id, aead.FILE_LABEL, header.salt, place)
        alive = partial(self._store.by_id, header.key_id)
        return ChunkedReader(source, header=header, derived=derived, before_chunk=alive)

    # --- For the audit log (audit.ports.PersonSealer) ---------------------------------------------

    def seal_for_person(self, *, tenant: str, person: str, field: str, plaintext: bytes) -> str:
        """Seal what names a person in the audit log."""
        context = FieldContext(tenant=tenant, person=person, service=AUDIT_SERVICE, field=field)
        return self.seal(context, plaintext)

    def name_for_person(self, *, tenant: str, person: str, field: str) -> str:
        """Seal the person's own name; the same text again while no key was forgotten.

        It says no more than each new one would: the id of the person's key stands in all of them.
        """
        # Whoever was erased in another process must not be named by the key that is gone.
        self._store.refresh()
        emptied, key = self._emptied, (tenant, person, field)
        kept = self._names.get(key)
        if kept is not None and kept[0] == emptied:
            return kept[1]
        text = self.seal_for_person(
            tenant=tenant, person=person, field=field, plaintext=person.encode()
        )
        if len(self._names) >= self._most_names:
            self._names.clear()
        self._names[key] = emptied, text
        return text

    def open_for_person(self, *, tenant: str, field: str, text: str) -> bytes:
        """Open a text from `seal_for_person` without knowing whose it is. Raises like `unseal`."""
        return self.open_for_owner(tenant=tenant, service=AUDIT_SERVICE, field=field, text=text)

    def key_ids(self, *, tenant: str, person: str) -> list[str]:
        """Return the ids of all keys this person has, oldest first."""
        return [row.key_id for row in self._store.table.versions(self.owner(tenant, person))]

    # --- For the modules beside this one ----------------------------------------------------------

    def seal_for_owner(self, owner: KeyOwner, *, service: str, field: str, plaintext: bytes) -> str:
        """Seal for a person of whom only the tag is known."""
        place = aead.encode_parts([owner.tenant, owner.name]) + _place(service, field)
        salt = aead.new_salt()
        key, derived = self._derive_to_seal(owner, aead.MESSAGE_LABEL, salt, place)
        return format_sealed(key.key_id, aead.encrypt(derived, salt, plaintext))

    def open_for_owner(self, *, tenant: str, service: str, field: str, text: str) -> bytes:
        """Open a text for whichever person its key belongs to. Raises like `unseal`."""
        sealed = parse_sealed(text)
        owner = self._store.by_id(sealed.key_id).owner
        if owner.kind != "person":
            raise aead.unseal_error()
        part = aead.encode_parts([tenant, owner.name])
        place = part + _place(service, field)
        salt = aead.salt_of(sealed.message)
        derived = self._derive_to_open(sealed.key_id, aead.MESSAGE_LABEL, salt, place)
        return aead.decrypt(derived, sealed.message)

    # --- Persons ----------------------------------------------------------------------------------

    def owner(self, tenant: str, person: str) -> KeyOwner:
        """Return the person as the key table knows them."""
        return self._subject(tenant, person).owner

    def erasure_subject(self, tenant: str, person: str) -> str:
        """Return a tag by which a repeated erasure finds the first: no row of any backup has it."""
        return self._tag(_SUBJECT_LABEL, tenant, person)

    def _forget(self) -> None:
        self._emptied += 1
        self._subject.cache_clear()
        self._names.clear()

    def _make_subject(self, tenant: str, person: str) -> Subject:
        check_name("tenant", tenant)
        check_name("person", person)
        tag = self._tag(_TAG_LABEL, tenant, person)
        return Subject(KeyOwner("person", tenant, tag), aead.encode_parts([tenant, tag]))

    def _tag(self, label: str, tenant: str, person: str) -> str:
        message = aead.encode_parts([label, tenant, person])
        for _ in range(ATTEMPTS):
            try:
                return self._store.for_sealing(TAG_KEY).mac(message).hex()
            except KeyGoneError:
                continue
        raise _restless()

    # --- Keys -------------------------------------------------------------------------------------

    def _derive_to_seal(
        self, owner: KeyOwner, label: bytes, salt: bytes, place: bytes
    ) -> tuple[DataKey, bytes]:
        for _ in range(ATTEMPTS):
            key = self._store.for_sealing(owner)
            try:
                key.budget.take()
                return key, key.derive(label, salt, place + key.version_part)
            except KeyExhaustedError:
                self._store.replenish(key)
            except KeyGoneError:
                continue
        raise _restless()

    def _derive_to_open(self, key_id: str, label: bytes, salt: bytes, place: bytes) -> bytes:
        for _ in range(ATTEMPTS):
            key = self._store.by_id(key_id)
            try:
                return key.derive(label, salt, place + key.version_part)
            except KeyGoneError:
                continue
        raise _restless()

    def _prefetch(self, names: Collection[KeyOwner] | Collection[str], *, create: bool) -> None:
        try:
            self._store.prefetch(list(names), create=create)
        except VaultRejectedError:
            # One wrapped key among many does not open. Whoever needs that one is told; the rest
            # load one by one.
            return


@lru_cache(maxsize=4096)
def _place(service: str, field: str) -> bytes:
    """Encode where a field stands: few different ones, so they are kept."""
    return aead.encode_parts([service, field])


def _restless() -> KeyTableError:
    return KeyTableError(
        f"expected the key to last for one use in {ATTEMPTS} attempts, but it was erased, rotated "
        "or used up each time; see which process does that without pause"
    )
