"""Pseudonyms: one name per person and purpose, and the way back that takes two officers.

A pseudonym is `hgp1.<22 base64url characters>`: HMAC-SHA256, cut to 128 bits, of the purpose under
a random key of that one person. So it is stable within a purpose, says nothing across purposes, and
once the person is erased nobody can compute it again, not even from the person's name.

The way back is the person's name, encrypted for the first officer's half, that for the second's,
and that sealed under the person's data key. One officer requests, another approves, and then the
first learns the name, once and within a time limit. Every attempt, refused ones too, is recorded
first.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from sqlalchemy import insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from keys import aead
from keys.database import KeyDatabase
from keys.datakeys import ATTEMPTS, KeyGoneError
from keys.errors import ApprovalError, KeyTableError, VaultDeniedError, VaultRejectedError
from keys.keyring import Keyring
from keys.model import FieldContext, KeyOwner, check_name
from keys.ports import KeyEvent, KeyEventRecorder
from keys.schema import data_keys, pseudonyms, reidentifications
from keys.sealed import encode_base64url, parse_sealed

PREFIX = "hgp1."
PSEUDONYM_BYTES = 16
REQUEST_LIFE_S = 900.0

_LABEL = "havengate/hgp1"
_SERVICE = "keys"
_REASON = re.compile(r"[a-z0-9][a-z0-9-]{0,63}", re.ASCII)

Half = Literal["first", "second"]
Action = Literal["keys.pseudonym.request", "keys.pseudonym.approve", "keys.pseudonym.reveal"]


class ReidentificationHalves(Protocol):
    """What the gateway may do with both halves: encrypt, never decrypt."""

    def encrypt(self, half: Half, *, context: bytes, plaintext: bytes) -> str:
        """Encrypt for one half, bound to `context`. Raises a `VaultError`."""
        ...


class Officer(Protocol):
    """One officer, logged in at the key server as nobody else."""

    def name(self) -> str:
        """Return who the key server says this is. Raises a `VaultError`."""
        ...

    def decrypt(self, half: Half, *, context: bytes, ciphertext: str) -> bytes:
        """Open one half. Raises `VaultDeniedError` if this officer may not."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """A row of `reidentifications`."""

    request_id: str
    tenant: str
    pseudonym: str
    requested_by: str
    approved_by: str | None
    half_opened: str | None
    expires_at: float
    revealed_at: float | None


class Pseudonymiser:
    """Makes pseudonyms and, with two officers, undoes them. Thread-safe."""

    def __init__(
        self,
        keyring: Keyring,
        *,
        database: KeyDatabase,
        halves: ReidentificationHalves,
        recorder: KeyEventRecorder,
    ) -> None:
        self._keyring = keyring
        self._store = keyring.store
        self._database = database
        self._halves = halves
        self._recorder = recorder

    def pseudonym(self, *, tenant: str, purpose: str, person: str) -> str:
        """Return the person's name within one purpose, and keep the way back.

        Raises `InvalidContextError`, `VaultError` or `KeyTableError`.
        """
        check_name("purpose", purpose)
        for _ in range(ATTEMPTS):
            owner = self._keyring.owner(tenant, person)
            key_id, pseudonym = self._compute(owner, purpose)
            known = select(pseudonyms.c.pseudonym).where(
                pseudonyms.c.tenant == tenant, pseudonyms.c.pseudonym == pseudonym
            )
            with self._database.reading() as connection:
                if connection.execute(known).first() is not None:
                    return pseudonym
            if self._keep_way_back(person, owner, pseudonym, key_id):
                return pseudonym
            # Another process has erased this person, and we did not know it yet.
            self._store.empty()
        raise _restless()

    def request(self, officer: Officer, *, tenant: str, pseudonym: str, reason: str) -> str:
        """Ask to learn who is behind a pseudonym; return the id of the request.

        `reason` is a code such as `patient-safety`: it is logged. Raises `ApprovalError`.
        """
        name = officer.name()
        if not _REASON.fullmatch(reason):
            raise ApprovalError(
                "expected a reason of lower-case letters, digits and hyphens, got something else; "
                "name the reason by its code"
            )
        request_id = secrets.token_hex(16)
        with self._recorded("keys.pseudonym.request", request_id, tenant, name) as detail:
            detail["reason"] = reason
            self._mapping(tenant, pseudonym)
            row = _Request(
                request_id=request_id,
                tenant=tenant,
                pseudonym=pseudonym,
                requested_by=name,
                approved_by=None,
                half_opened=None,
                expires_at=self._store.clock() + REQUEST_LIFE_S,
                revealed_at=None,
            )
            values = {column: getattr(row, column) for column in reidentifications.c.keys()}  # noqa: SIM118 (not a dict)
            # A half opened for a request that was then not used must not lie about for ever.
            expired = update(reidentifications).where(
                reidentifications.c.expires_at <= self._store.clock(),
                reidentifications.c.half_opened.is_not(None),
            )
            with self._database.writing() as connection:
                connection.execute(expired.values(half_opened=None))
                connection.execute(insert(reidentifications), values)
        return request_id

    def approve(self, officer: Officer, *, tenant: str, request_id: str) -> None:
        """Open the second half for the officer who requested. Raises `ApprovalError`.

        The approving officer must be another person, and one whom the key server lets open that
        half.
        """
        name = officer.name()
        with self._recorded("keys.pseudonym.approve", request_id, tenant, name):
            request = self._pending(tenant, request_id)
            if name == request.requested_by:
                raise ApprovalError(
                    "expected approval by a second officer, got the one who requested; ask another"
                )
            if request.approved_by is not None:
                raise ApprovalError(
                    "expected a request not yet approved; ask its officer to reveal"
                )
            owner, sealed = self._mapping(tenant, request.pseudonym)
            outer = self._keyring.open_for_owner(
                tenant=tenant,
                service=_SERVICE,
                field=_mapping_field(request.pseudonym),
                text=sealed,
            )
            inner = _decrypt(officer, "second", request, outer.decode())
            half = self._keyring.seal_for_owner(
                owner, service=_SERVICE, field=_half_field(request_id), plaintext=inner
            )
            statement = update(reidentifications).where(
                reidentifications.c.request_id == request_id,
                reidentifications.c.approved_by.is_(None),
                reidentifications.c.expires_at > self._store.clock(),
            )
            with self._database.writing() as connection:
                done = connection.execute(statement.values(approved_by=name, half_opened=half))
            if done.rowcount != 1:
                raise ApprovalError(
                    "expected a request that still waits, but it was approved, grew old or its "
                    "person was erased meanwhile; make a new request if it is still needed"
                )

    def reveal(self, officer: Officer, *, tenant: str, request_id: str) -> str:
        """Return the person behind the pseudonym, once, to the officer who requested.

        Raises `ApprovalError`. The request is used up before the name is opened: if anything fails
        after that, a new request is needed.
        """
        name = officer.name()
        with self._recorded("keys.pseudonym.reveal", request_id, tenant, name):
            request = self._pending(tenant, request_id)
            if name != request.requested_by:
                raise ApprovalError(
                    "expected the officer who requested, got another; only that one may reveal"
                )
            if request.half_opened is None:
                raise ApprovalError("expected an approved request; ask a second officer to approve")
            self._use_up(request_id)
            inner = self._keyring.open_for_owner(
                tenant=tenant,
                service=_SERVICE,
                field=_half_field(request_id),
                text=request.half_opened,
            )
            # Leaves only once the outcome is recorded, as the block ends.
            return _decrypt(officer, "first", request, inner.decode()).decode()

    # --- Making -----------------------------------------------------------------------------------

    def _compute(self, owner: KeyOwner, purpose: str) -> tuple[str, str]:
        """Return the id of the key that makes the pseudonym, and the pseudonym."""
        message = aead.encode_parts([_LABEL, purpose])
        for _ in range(ATTEMPTS):
            key = self._store.for_sealing(KeyOwner("pseudonym", owner.tenant, owner.name))
            try:
                tag = key.mac(message)
            except KeyGoneError:
                continue
            return key.key_id, PREFIX + encode_base64url(tag[:PSEUDONYM_BYTES])
        raise _restless()

    def _keep_way_back(self, person: str, owner: KeyOwner, pseudonym: str, key_id: str) -> bool:
        """Store the way back. False if a key that it rests on was erased meanwhile."""
        tenant = owner.tenant
        context = _half_context(tenant, pseudonym)
        inner = self._halves.encrypt("first", context=context, plaintext=person.encode())
        outer = self._halves.encrypt("second", context=context, plaintext=inner.encode())
        field = FieldContext(
            tenant=tenant, person=person, service=_SERVICE, field=_mapping_field(pseudonym)
        )
        sealed = self._keyring.seal(field, outer.encode())
        row = {
            "tenant": tenant,
            "pseudonym": pseudonym,
            "owner_name": owner.name,
            "sealed": sealed,
        }
        used = {key_id, parse_sealed(sealed).key_id}
        live = select(data_keys.c.key_id).where(
            data_keys.c.key_id.in_(used), data_keys.c.erased_at.is_(None)
        )
        dialect = sqlite if self._database.is_sqlite else postgresql
        with self._database.writing() as connection:
            # An erasure waits for this lock and then deletes the row, or was first and is seen.
            if len(connection.execute(live.with_for_update(read=True)).all()) != len(used):
                return False
            connection.execute(dialect.insert(pseudonyms).on_conflict_do_nothing(), row)
            return True

    # --- The way back -----------------------------------------------------------------------------

    def _mapping(self, tenant: str, pseudonym: str) -> tuple[KeyOwner, str]:
        statement = select(pseudonyms.c.owner_name, pseudonyms.c.sealed).where(
            pseudonyms.c.tenant == tenant, pseudonyms.c.pseudonym == pseudonym
        )
        with self._database.reading() as connection:
            row = connection.execute(statement).first()
        if row is None:
            raise ApprovalError(
                "expected a pseudonym of this tenant, got one that it never had or whose person "
                "was erased; nobody can say who that is"
            )
        return KeyOwner("person", tenant, row.owner_name), row.sealed

    def _pending(self, tenant: str, request_id: str) -> _Request:
        statement = select(reidentifications).where(
            reidentifications.c.request_id == request_id, reidentifications.c.tenant == tenant
        )
        with self._database.reading() as connection:
            row = connection.execute(statement).mappings().one_or_none()
        if row is None:
            raise ApprovalError("expected a request of this tenant, got none; make a request first")
        request = _Request(**row)
        if request.revealed_at is not None:
            raise ApprovalError(
                "expected a request not yet used, got a used one; make a new request"
            )
        if self._store.clock() >= request.expires_at:
            raise ApprovalError(
                "expected a request within its time, got an old one; make a new request"
            )
        return request

    def _use_up(self, request_id: str) -> None:
        now = self._store.clock()
        unused = update(reidentifications).where(
            reidentifications.c.request_id == request_id,
            reidentifications.c.revealed_at.is_(None),
            reidentifications.c.expires_at > now,
        )
        with self._database.writing() as connection:
            used = connection.execute(unused.values(revealed_at=now, half_opened=None)).rowcount
        if used != 1:
            raise ApprovalError(
                "expected a request not yet used, got a used one; make a new request"
            )

    @contextmanager
    def _recorded(
        self, action: Action, request_id: str, tenant: str, actor: str
    ) -> Iterator[dict[str, str | int]]:
        """Record the attempt, run the block, record how it went; only then may anything leave."""
        event_id = secrets.token_hex(16)
        detail: dict[str, str | int] = {"reidentification": request_id}

        def record(stage: Literal["intent", "outcome"], *, succeeded: bool | None) -> None:
            self._recorder.record(
                KeyEvent(
                    action=action,
                    stage=stage,
                    request_id=event_id,
                    tenant=tenant,
                    actor=actor,
                    succeeded=succeeded,
                    detail=dict(detail),
                )
            )

        record("intent", succeeded=None)
        try:
            yield detail
        except Exception as error:
            detail["error"] = getattr(error, "code", type(error).__name__)
            record("outcome", succeeded=False)
            raise
        record("outcome", succeeded=True)


def _decrypt(officer: Officer, half: Half, request: _Request, ciphertext: str) -> bytes:
    context = _half_context(request.tenant, request.pseudonym)
    try:
        return officer.decrypt(half, context=context, ciphertext=ciphertext)
    except (VaultDeniedError, VaultRejectedError) as error:
        raise ApprovalError(
            f"expected an officer whom the key server lets open the {half} half, got one whom it "
            "refuses; ask an officer of that half"
        ) from error


def _restless() -> KeyTableError:
    return KeyTableError(
        f"expected the pseudonym key to last for one use in {ATTEMPTS} attempts, but it was "
        "erased or rotated each time; see which process does that without pause"
    )


def _half_context(tenant: str, pseudonym: str) -> bytes:
    return aead.encode_parts(["havengate/reidentification/1", tenant, pseudonym])


def _mapping_field(pseudonym: str) -> str:
    return f"pseudonym/{pseudonym}"


def _half_field(request_id: str) -> str:
    return f"reidentification/{request_id}"
