"""Emergency grants (break-glass): who may open whose record, why, and until when.

A reason tells of a patient's state: in the database it is sealed under the patient's own key
(`gateway.identity.reasons`).
"""

from __future__ import annotations

import re
import uuid
from typing import Any, Final

from sqlalchemy import Row, func, insert, select, update

from gateway.errors import AccountError, UnavailableError
from gateway.identity.database import DirectoryDatabase
from gateway.identity.reasons import Reasons
from gateway.identity.records import Grant
from gateway.identity.schema import grants
from keys.ports import Clock

MIN_REASON_CHARACTERS: Final = 10
MAX_REASON_CHARACTERS: Final = 500
MAX_DURATION_S: Final = 4 * 3_600
#: More records than this at once is no emergency of one person.
MAX_OPEN: Final = 5
#: Whom the rules let open a record in an emergency (`break-glass.open`), whatever else they allow.
ROLES_THAT_MAY: Final = frozenset({"clinician", "nurse", "crisis-worker"})
_PATIENT = re.compile(r"[A-Za-z0-9.-]{1,64}").fullmatch


class Grants:
    """Opens, lists and ends grants. Thread-safe. Whether a role may have one, rules decide."""

    def __init__(self, database: DirectoryDatabase, *, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._reasons: Reasons | None = None

    def keep_reasons_under(self, reasons: Reasons) -> None:
        """Seal and open reasons with this. Without it no grant is opened, and no reason shown."""
        self._reasons = reasons

    def open(
        self, account: str, *, patient: str, reason: str, duration_s: int, name: str | None = None
    ) -> Grant:
        """Open a record until `duration_s` from now. `name` is the id under which the log knows it.

        Raises `AccountError` for a reason, patient or duration that is not acceptable, or if too
        many are open; a `KeysError` if the reason cannot be sealed.
        """
        check_grant(patient=patient, reason=reason, duration_s=duration_s)
        reasons = self._reasons
        if reasons is None:
            raise UnavailableError(
                "expected what seals reasons, got none; open the directory by Identity",
                "gateway.shared_secret",
            )
        now = self._clock()
        grant = Grant(
            id=name or uuid.uuid4().hex,
            account=account,
            patient=patient,
            reason=reason.strip(),
            begins_at=now,
            ends_at=now + duration_s,
        )
        # It may ask the key server: nobody is kept waiting for the directory meanwhile.
        sealed = reasons.seal(grant.reason, grant=grant.id, account=account, patient=patient)
        with self._database.writing() as connection:
            self._database.lock(connection)
            count = connection.execute(
                select(func.count())
                .select_from(grants)
                .where(grants.c.account == account, grants.c.ends_at > now)
            ).scalar_one()
            if count >= MAX_OPEN:
                raise AccountError(
                    f"expected at most {MAX_OPEN} open records, got one more; end one first"
                )
            connection.execute(
                insert(grants).values(
                    id=grant.id,
                    account=account,
                    patient=patient,
                    reason=sealed,
                    begins_at=grant.begins_at,
                    ends_at=grant.ends_at,
                )
            )
        return grant

    def of(self, account: str) -> list[Grant]:
        """The open grants of an account, the latest first."""
        with self._database.reading() as connection:
            rows = connection.execute(
                select(grants)
                .where(grants.c.account == account, grants.c.ends_at > self._clock())
                .order_by(grants.c.begins_at.desc())
            ).all()
        return [self.of_row(row) for row in rows]

    def since(self, begins_at: float) -> list[Grant]:
        """All grants since then, open or not, the latest first: what is to be reviewed."""
        with self._database.reading() as connection:
            rows = connection.execute(
                select(grants)
                .where(grants.c.begins_at >= begins_at)
                .order_by(grants.c.begins_at.desc())
            ).all()
        return [self.of_row(row) for row in rows]

    def end(self, account: str, grant: str) -> None:
        """End a grant of this account now; those of others are not touched."""
        now = self._clock()
        with self._database.writing() as connection:
            connection.execute(
                update(grants)
                .where(grants.c.id == grant, grants.c.account == account, grants.c.ends_at > now)
                .values(ends_at=now)
            )

    def of_row(self, row: Row[Any]) -> Grant:
        """The grant that a row of the table holds; without a reason if it cannot be read."""
        reason = ""
        if self._reasons is not None:
            reason = self._reasons.unseal(
                row.reason, grant=row.id, account=row.account, patient=row.patient
            )
        return Grant(
            id=row.id,
            account=row.account,
            patient=row.patient,
            reason=reason,
            begins_at=row.begins_at,
            ends_at=row.ends_at,
        )


def check_grant(*, patient: str, reason: str, duration_s: int) -> None:
    """Raise `AccountError` unless a grant may be asked for in these words."""
    if not _PATIENT(patient):
        raise AccountError("expected the id of one patient, such as 3; correct it")
    if not MIN_REASON_CHARACTERS <= len(reason.strip()) <= MAX_REASON_CHARACTERS:
        raise AccountError(
            f"expected a reason of {MIN_REASON_CHARACTERS} to {MAX_REASON_CHARACTERS} characters, "
            f"got {len(reason.strip())}; say why it cannot wait"
        )
    if not 0 < duration_s <= MAX_DURATION_S:
        raise AccountError("expected at most four hours; ask for less")
