"""What the directory keeps, as plain values: accounts, sessions, emergency grants.

No behaviour beyond names lives here. Times are Unix seconds; `repr` shows nothing about a person.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from policies.model import ROLES, Assurance, BreakGlass, Principal, SecondFactor

#: Types of references that name a person who works here, in the order in which they are preferred.
_STAFF_TYPES: Final = ("Practitioner", "PractitionerRole", "Person", "RelatedPerson")


def shown_role(roles: frozenset[str], *, patient: bool) -> str | None:
    """The one role that the log shows: the first in the order of `policies.model.ROLES`."""
    known = next((role for role in ROLES if role in roles), None)
    return known or min(roles, default="patient" if patient else None)


def person_name(
    *, patient: str | None, references: frozenset[str], otherwise: str, roles: frozenset[str]
) -> str:
    """The name of a person for log and keys: `Practitioner/7`, `Patient/3`, or `otherwise`.

    Somebody with a role is named by the one reference to him as staff, anybody else as a patient
    first. Two references of one type name nobody for certain.
    """
    staff = [
        next(iter(found))
        for kind in _STAFF_TYPES
        if len(found := {one for one in references if one.startswith(f"{kind}/")}) == 1
    ]
    own = [] if patient is None else [f"Patient/{patient}"]
    names = [*staff, *own] if roles else [*own, *staff]
    return next(iter(names), otherwise)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A person who signs in here. `id` never changes; `login` is in its normal form.

    `patient` is the id of the record about this person, `represents` ids of patients for whom he
    may act, `references` the names by which apps know him as an author (`Practitioner/7`).
    """

    id: str
    login: str = field(repr=False)
    password_hash: str = field(repr=False)
    roles: frozenset[str] = frozenset()
    patient: str | None = field(default=None, repr=False)
    represents: frozenset[str] = field(default=frozenset(), repr=False)
    references: frozenset[str] = field(default=frozenset(), repr=False)
    locked: bool = False
    must_set_second_factor: bool = True
    created_at: float

    @property
    def person(self) -> str:
        """The name under which log and keys know this person."""
        return person_name(
            patient=self.patient,
            references=self.references,
            otherwise=f"account/{self.id}",
            roles=self.roles,
        )

    @property
    def role(self) -> str | None:
        """The role that the log shows."""
        return shown_role(self.roles, patient=self.patient is not None)

    def principal(self, assurance: Assurance) -> Principal:
        """The person as the rules see him."""
        own = frozenset() if self.patient is None else frozenset({f"Patient/{self.patient}"})
        return Principal(
            kind="user",
            id=f"account/{self.id}",
            roles=self.roles,
            assurance=assurance,
            patient=self.patient,
            represents=self.represents,
            references=self.references | own,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A signed-in browser. `id` is no secret; the token is known to the browser alone.

    `began_at` is when the password was shown, and stays when the session is renewed.
    """

    id: str
    account: str
    began_at: float
    used_at: float
    second_factor: SecondFactor
    second_factor_at: float
    ended_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Emergency access to one patient."""

    id: str
    account: str
    patient: str = field(repr=False)
    reason: str = field(repr=False)
    begins_at: float
    ends_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionView:
    """A session with all that a request needs to know about it."""

    session: Session
    account: Account
    grants: tuple[Grant, ...] = ()


def open_break_glass(grants: tuple[Grant, ...], now: float) -> BreakGlass | None:
    """All grants open at `now` as one, or None.

    It begins with the latest and ends with the first to end: no patient of it is ever open longer
    than was granted for him.
    """
    valid = [one for one in grants if one.begins_at <= now < one.ends_at]
    if not valid:
        return None
    return BreakGlass(
        # The shortest counts: a good reason for one patient is none for another.
        reason=min((one.reason for one in valid), key=lambda reason: len(reason.strip())),
        patients=frozenset(one.patient for one in valid),
        begins_at=max(one.begins_at for one in valid),
        ends_at=min(one.ends_at for one in valid),
    )
