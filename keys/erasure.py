"""Erasing a person: the keys are destroyed now, and a receipt proves it and dates the last copy.

Order: a probe sealed → intent recorded → wrapped keys destroyed and pseudonyms deleted in one
transaction → caches emptied, SQLite's remains overwritten → the probe must not open → outcome
recorded → receipt. A crash after the transaction is finished by the next call for the same person.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from itertools import batched
from typing import Literal

from sqlalchemy import Connection, delete, insert, select, update

from keys.database import KeyDatabase
from keys.epochs import EpochKeeper
from keys.errors import KeysError, KeyTableError, PersonErasedError
from keys.keyring import Keyring
from keys.model import ErasureReceipt, FieldContext, KeyOwner
from keys.ports import KeyEvent, KeyEventRecorder
from keys.schema import data_keys, key_erasures, pseudonyms, reidentifications
from keys.table import destroy_keys

#: Their ids fit into one entry of the log, whatever else it says.
_KEYS_PER_ENTRY = 1000
_PROBE = b"a text that must not open once this person is erased"
_PROBE_SERVICE = "keys"
_PROBE_FIELD = "erasure-probe"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Erasure:
    """A row of `key_erasures`."""

    request_id: str
    tenant: str
    subject: str
    key_ids: str
    pseudonyms_deleted: int
    destroyed_at: float
    backups_dead_by: str
    probe: str | None
    proof: str | None
    log_index: int | None


class Eraser:
    """Erases persons. Repeating an erasure is safe and says that nothing was left to destroy."""

    def __init__(
        self,
        keyring: Keyring,
        *,
        database: KeyDatabase,
        epochs: EpochKeeper,
        recorder: KeyEventRecorder,
    ) -> None:
        self._keyring = keyring
        self._database = database
        self._epochs = epochs
        self._recorder = recorder

    def erase(self, *, tenant: str, person: str, actor: str) -> ErasureReceipt:
        """Destroy all keys of a person and return the receipt.

        Raises what the recorder raises before anything is destroyed; `KeyTableError` or
        `VaultError`, after which the call is to be repeated; `KeysError` if the probe still opens,
        which must never happen.
        """
        context = FieldContext(
            tenant=tenant, person=person, service=_PROBE_SERVICE, field=_PROBE_FIELD
        )
        subject = self._keyring.erasure_subject(tenant, person)
        key_ids = self._live_keys(tenant, person)
        last = self._last(tenant, subject)
        if last is not None and last.log_index is None:
            return self._finish(last, context, actor)
        if last is not None and not key_ids:
            return _receipt(last, already_erased=True)
        return self._finish(self._destroy(context, subject, key_ids, actor), context, actor)

    def _live_keys(self, tenant: str, person: str) -> list[str]:
        owner = self._keyring.owner(tenant, person)
        table = self._keyring.store.table
        return [
            row.key_id
            for one in (owner, KeyOwner("pseudonym", owner.tenant, owner.name))
            for row in table.versions(one)
        ]

    def held(self, *, tenant: str, person: str) -> int | None:
        """Return how many keys a person has; None for somebody never sealed for nor erased."""
        keys = len(self._keyring.key_ids(tenant=tenant, person=person))
        if keys or self._last(tenant, self._keyring.erasure_subject(tenant, person)) is not None:
            return keys
        return None

    def revived(self, erased: Iterable[str]) -> list[str]:
        """Return which of the keys that the log says were erased are alive, sorted.

        There are such only after the key table was restored from a backup.
        """
        table = self._keyring.store.table
        found: list[str] = []
        for some in batched(erased, _KEYS_PER_ENTRY):
            rows = table.by_ids(some).values()
            found += [row.key_id for row in rows if row.erased_at is None]
        return sorted(found)

    def erase_again(self, *, key_ids: list[str], actor: str) -> list[str]:
        """Destroy once more what the log says was erased: the key table was restored from a backup.

        Returns the ids of those that the backup had brought back.
        """
        destroyed: list[str] = []
        for some in batched(key_ids, _KEYS_PER_ENTRY):
            request_id = secrets.token_hex(16)
            self._record("intent", request_id, "", actor, list(some))
            now = self._keyring.store.clock()
            with self._database.writing() as connection:
                which = data_keys.c.key_id.in_(some)
                owners = select(data_keys.c.tenant, data_keys.c.owner_name).where(
                    which, data_keys.c.owner_name.is_not(None)
                )
                found = connection.execute(owners.distinct()).all()
                done = destroy_keys(connection, which, now=now)
                for tenant, name in found:
                    _delete_pseudonyms(connection, tenant, name)
            self._keyring.store.empty()
            self._database.scrub()
            self._record("outcome", request_id, "", actor, done, succeeded=True)
            destroyed += done
        return destroyed

    # --- Steps ------------------------------------------------------------------------------------

    def _destroy(
        self, context: FieldContext, subject: str, key_ids: list[str], actor: str
    ) -> _Erasure:
        request_id = secrets.token_hex(16)
        dead_by = _first_day_after(self._epochs.all_dead_by())
        probe = self._keyring.seal(context, _PROBE) if key_ids else None
        detail: dict[str, str | int] = {"backups_dead_by": dead_by.isoformat()}
        self._record("intent", request_id, context.tenant, actor, key_ids, detail)
        owner = self._keyring.owner(context.tenant, context.person)
        now = self._keyring.store.clock()
        with self._database.writing() as connection:
            # Keys first: whoever is storing a pseudonym made with one is done by then, or sees it
            # dead.
            destroyed = destroy_keys(
                connection,
                data_keys.c.kind.in_(["person", "pseudonym"])
                & (data_keys.c.tenant == owner.tenant)
                & (data_keys.c.owner_name == owner.name),
                now=now,
            )
            deleted = _delete_pseudonyms(connection, owner.tenant, owner.name)
            erasure = _Erasure(
                request_id=request_id,
                tenant=context.tenant,
                subject=subject,
                key_ids=" ".join(destroyed),
                pseudonyms_deleted=deleted,
                destroyed_at=now,
                backups_dead_by=dead_by.isoformat(),
                probe=probe,
                proof=None,
                log_index=None,
            )
            values = {name: getattr(erasure, name) for name in key_erasures.c.keys()}  # noqa: SIM118 (not a dict)
            connection.execute(insert(key_erasures), values)
        return erasure

    def _finish(self, erasure: _Erasure, context: FieldContext, actor: str) -> ErasureReceipt:
        self._keyring.store.empty()
        self._database.scrub()
        erasure = self._with_true_date(erasure)
        detail: dict[str, str | int] = {
            "pseudonyms_deleted": erasure.pseudonyms_deleted,
            "backups_dead_by": erasure.backups_dead_by,
        }
        key_ids = erasure.key_ids.split()
        where = (erasure.request_id, context.tenant, actor, key_ids)
        proof = self._prove(erasure, context)
        if erasure.probe is not None and proof is None:
            self._record("outcome", *where, detail, succeeded=False)
            raise KeysError(
                f"expected erased keys to open nothing, but the probe of {erasure.request_id} "
                "opened; stop all gateways, keep the key table, and report this as a fault of "
                "Havengate"
            )
        if proof is not None:
            detail["proof"] = proof
        index = self._record("outcome", *where, detail, succeeded=True)
        done = replace(erasure, proof=proof, log_index=index)
        statement = update(key_erasures).where(key_erasures.c.request_id == erasure.request_id)
        with self._database.writing() as connection:
            connection.execute(
                statement.values(proof=proof, log_index=index, backups_dead_by=done.backups_dead_by)
            )
        return _receipt(done, already_erased=False)

    def _with_true_date(self, erasure: _Erasure) -> _Erasure:
        """Count from the epoch that is current once the keys are destroyed.

        A rotation may have moved them to a newer epoch after the first date was computed; none can
        any more. ISO dates compare as they follow each other.
        """
        dead_by = _first_day_after(self._epochs.all_dead_by()).isoformat()
        return replace(erasure, backups_dead_by=max(erasure.backups_dead_by, dead_by))

    def _prove(self, erasure: _Erasure, context: FieldContext) -> str | None:
        """Try to open the probe on the normal path; return the code with which that failed."""
        if erasure.probe is None:
            return None
        try:
            self._keyring.unseal(context, erasure.probe)
        except PersonErasedError as error:
            return error.code
        return None

    def _last(self, tenant: str, subject: str) -> _Erasure | None:
        """Return an erasure of this person that was not finished, or else the newest."""
        statement = (
            select(key_erasures)
            .where(key_erasures.c.tenant == tenant, key_erasures.c.subject == subject)
            .order_by(key_erasures.c.log_index.is_(None).desc(), key_erasures.c.destroyed_at.desc())
            .limit(1)
        )
        with self._database.reading() as connection:
            row = connection.execute(statement).mappings().one_or_none()
        return None if row is None else _Erasure(**row)

    def _record(
        self,
        stage: Literal["intent", "outcome"],
        request_id: str,
        tenant: str,
        actor: str,
        key_ids: list[str],
        detail: Mapping[str, str | int] | None = None,
        *,
        succeeded: bool | None = None,
    ) -> int:
        event = KeyEvent(
            action="keys.person.erase",
            stage=stage,
            request_id=request_id,
            tenant=tenant,
            actor=actor,
            succeeded=succeeded,
            key_ids=tuple(key_ids),
            detail=detail or {},
        )
        return self._recorder.record(event)


def _delete_pseudonyms(connection: Connection, tenant: str, owner_name: str) -> int:
    """Delete a person's ways back and what officers have opened of them; return how many ways."""
    of_owner = pseudonyms.c.tenant == tenant, pseudonyms.c.owner_name == owner_name
    named = select(pseudonyms.c.pseudonym).where(*of_owner)
    connection.execute(
        delete(reidentifications).where(
            reidentifications.c.tenant == tenant, reidentifications.c.pseudonym.in_(named)
        )
    )
    return connection.execute(delete(pseudonyms).where(*of_owner)).rowcount


def _receipt(erasure: _Erasure, *, already_erased: bool) -> ErasureReceipt:
    if erasure.log_index is None:
        raise KeyTableError("expected a finished erasure; repeat the erasure to finish it")
    return ErasureReceipt(
        request_id=erasure.request_id,
        tenant=erasure.tenant,
        key_ids=tuple(erasure.key_ids.split()),
        pseudonyms_deleted=erasure.pseudonyms_deleted,
        destroyed_at=erasure.destroyed_at,
        backups_dead_by=date.fromisoformat(erasure.backups_dead_by),
        proof=erasure.proof,
        log_index=erasure.log_index,
        already_erased=already_erased,
    )


def _first_day_after(unix_s: float) -> date:
    """Return the first whole day (UTC) that lies after a moment."""
    return datetime.fromtimestamp(unix_s, UTC).date() + timedelta(days=1)
