"""Accounts of persons who sign in here. What a password must be is `passwords`' business.

Names are compared in one normal form (NFKC, casefold), so that two accounts never look the same.
"""

from __future__ import annotations

import json
import re
import unicodedata
import uuid
from typing import Any, Final

from sqlalchemy import Connection, Row, delete, insert, select, update

from gateway.errors import AccountError
from gateway.identity.database import DirectoryDatabase
from gateway.identity.records import Account
from gateway.identity.schema import accounts, devices, grants, sessions
from keys.ports import Clock

MAX_LOGIN_CHARACTERS: Final = 128
_FHIR_ID = re.compile(r"[A-Za-z0-9.-]{1,64}").fullmatch
_REFERENCE = re.compile(r"[A-Z][A-Za-z]{1,47}/[A-Za-z0-9.-]{1,64}").fullmatch
_ROLE = re.compile(r"[a-z][a-z0-9]{0,23}(-[a-z0-9]{1,24}){0,5}").fullmatch


def normal_login(name: str) -> str:
    """The form in which log-in names are kept and compared."""
    # Each of the three steps can undo another: what stays the same is the normal form.
    while True:
        folded = unicodedata.normalize("NFKC", name).casefold()
        normal = unicodedata.normalize("NFKC", folded).strip()
        if normal == name:
            return normal
        name = normal


class Accounts:
    """Adds, finds and changes accounts. Thread-safe."""

    def __init__(self, database: DirectoryDatabase, *, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def add(
        self,
        *,
        login: str,
        password_hash: str,
        roles: frozenset[str] = frozenset(),
        patient: str | None = None,
        represents: frozenset[str] = frozenset(),
        references: frozenset[str] = frozenset(),
    ) -> Account:
        """Make an account that must set its second factor at the first sign-in.

        Raises `AccountError` for a name that is taken, or details that are not acceptable.
        """
        name = checked_login(login)
        _check_details(roles, patient, represents, references)
        account = Account(
            id=uuid.uuid4().hex,
            login=name,
            password_hash=password_hash,
            roles=roles,
            patient=patient,
            represents=represents,
            references=references,
            created_at=self._clock(),
        )
        with self._database.writing() as connection:
            self._database.lock(connection)
            taken = connection.execute(select(accounts.c.id).where(accounts.c.login == name))
            if taken.first() is not None:
                raise AccountError(
                    "expected a new name, got one that has an account; choose another, or run "
                    "`havengate users reset` for the one there is"
                )
            connection.execute(insert(accounts).values(**_values(account)))
        return account

    def find(self, login: str) -> Account | None:
        """The account of that name, or None."""
        with self._database.reading() as connection:
            query = select(accounts).where(accounts.c.login == normal_login(login))
            row = connection.execute(query).first()
        return None if row is None else account_of(row)

    def get(self, account: str) -> Account | None:
        """The account of that id, or None."""
        with self._database.reading() as connection:
            row = connection.execute(select(accounts).where(accounts.c.id == account)).first()
        return None if row is None else account_of(row)

    def named(self, login: str) -> Account:
        """The account of that name. Raises `AccountError` if there is none."""
        account = self.find(login)
        if account is None:
            raise AccountError(
                "expected the name of an account, got one that has none; `havengate users list` "
                "shows those there are"
            )
        return account

    def all(self) -> list[Account]:
        """All accounts, by name."""
        with self._database.reading() as connection:
            rows = connection.execute(select(accounts).order_by(accounts.c.login)).all()
        return [account_of(row) for row in rows]

    def reset(self, account: str, password_hash: str) -> None:
        """Replace the password and demand a new second factor.

        In the same step all sessions end, and all open emergency grants.
        """
        values = {"password_hash": password_hash, "must_set_second_factor": 1}
        with self._database.writing() as connection:
            self._change(connection, account, values)
            self._end_all(connection, account)

    def rehash(self, account: str, *, old: str, new: str) -> None:
        """Store the same password hashed with today's parameters, unless it changed meanwhile."""
        with self._database.writing() as connection:
            connection.execute(
                update(accounts)
                .where(accounts.c.id == account, accounts.c.password_hash == old)
                .values(password_hash=new)
            )

    def lock(self, account: str) -> None:
        """Let the account sign in no more, and end all its sessions and grants in the same step."""
        with self._database.writing() as connection:
            self._change(connection, account, {"locked": 1})
            self._end_all(connection, account)

    def unlock(self, account: str) -> None:
        """Let the account sign in again."""
        with self._database.writing() as connection:
            self._change(connection, account, {"locked": 0})

    def second_factor_set(self, account: str) -> None:
        """Note that the second factor is confirmed."""
        with self._database.writing() as connection:
            self._change(connection, account, {"must_set_second_factor": 0})

    def accept_counter(self, account: str, counter: int) -> bool:
        """Use up a TOTP time step. False if it, or a later one, was used before.

        One statement compares and sets: of two processes with the same code one gets False.
        """
        with self._database.writing() as connection:
            done = connection.execute(
                update(accounts)
                .where(accounts.c.id == account, accounts.c.totp_counter < counter)
                .values(totp_counter=counter)
            )
            return done.rowcount == 1

    @staticmethod
    def _change(connection: Connection, account: str, values: dict[str, Any]) -> None:
        done = connection.execute(update(accounts).where(accounts.c.id == account).values(**values))
        if done.rowcount != 1:
            raise AccountError("expected an account, got the id of none; it may have been removed")

    def _end_all(self, connection: Connection, account: str) -> None:
        now = self._clock()
        connection.execute(
            update(sessions)
            .where(sessions.c.account == account, sessions.c.ended_at.is_(None))
            .values(ended_at=now)
        )
        connection.execute(
            update(grants)
            .where(grants.c.account == account, grants.c.ends_at > now)
            .values(ends_at=now)
        )
        connection.execute(delete(devices).where(devices.c.account == account))


def checked_login(login: str) -> str:
    """The normal form of a name. Raises `AccountError` if it cannot be one."""
    name = normal_login(login)
    if not 1 <= len(name) <= MAX_LOGIN_CHARACTERS or not name.isprintable():
        raise AccountError(
            f"expected a name of 1 to {MAX_LOGIN_CHARACTERS} printable characters, got "
            f"{len(name)}; choose another"
        )
    return name


def account_of(row: Row[Any]) -> Account:
    """The account that a row of the table holds."""
    return Account(
        id=row.id,
        login=row.login,
        password_hash=row.password_hash,
        roles=frozenset(json.loads(row.roles)),
        patient=row.patient,
        represents=frozenset(json.loads(row.represents)),
        references=frozenset(json.loads(row.refs)),
        locked=bool(row.locked),
        must_set_second_factor=bool(row.must_set_second_factor),
        created_at=row.created_at,
    )


def _values(account: Account) -> dict[str, Any]:
    return {
        "id": account.id,
        "login": account.login,
        "password_hash": account.password_hash,
        "roles": json.dumps(sorted(account.roles)),
        "patient": account.patient,
        "represents": json.dumps(sorted(account.represents)),
        "refs": json.dumps(sorted(account.references)),
        "locked": int(account.locked),
        "must_set_second_factor": int(account.must_set_second_factor),
        "totp_counter": 0,
        "created_at": account.created_at,
    }


def _check_details(
    roles: frozenset[str],
    patient: str | None,
    represents: frozenset[str],
    references: frozenset[str],
) -> None:
    patients = represents | (frozenset() if patient is None else {patient})
    if not all(_ROLE(role) for role in roles):
        raise AccountError("expected roles such as `clinician`, got another form; correct it")
    if not all(_FHIR_ID(one) for one in patients):
        raise AccountError(
            "expected patients by their id alone (`3`, not `Patient/3`), got another form"
        )
    if not all(_REFERENCE(one) for one in references):
        raise AccountError("expected references such as `Practitioner/7`, got another form")
    if any(one.startswith("Patient/") for one in references):
        raise AccountError("expected a patient's own record as `patient`, not as a reference")
