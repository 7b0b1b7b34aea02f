"""What a person agreed to: a study, or kinds of questions over columns for purposes. Default: none.

A consent to one study names its hash, so that it holds for what the person was shown and for
nothing that was changed since. A standing one names kinds of questions, columns and purposes, and
covers what lies within all three; there is no word for "everything". Each has its time, and can be
revoked at once: what is revoked counts no more for whatever is read after, a round that is under
way included (`node.guard` looks again right before the rows).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from federated.errors import StoreError
from federated.node.columns import COLUMNS
from federated.node.store import Person, Store

_KIND = re.compile(r"[a-z][a-z0-9_-]{0,63}").fullmatch
_PURPOSE = re.compile(r"[A-Z][A-Z0-9]{1,23}").fullmatch
_STUDY = re.compile(r"[0-9a-f]{64}").fullmatch
_MOST: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What a consent covers. `study` is a study's hash, or empty for a standing one.

    A study's consent covers its kinds of questions whatever they are: they are in the hash.
    """

    study: str = ""
    kinds: frozenset[str] = frozenset()
    columns: frozenset[str] = frozenset()
    purposes: frozenset[str] = frozenset()

    def covers(self, asked: Asked) -> bool:
        """Whether all that is asked lies within."""
        if not asked.columns <= self.columns or asked.purpose not in self.purposes:
            return False
        return self.study == asked.study if self.study else asked.kind in self.kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a query of a study asks."""

    study: str
    kind: str
    columns: frozenset[str]
    purpose: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Consent:
    """One consent as given. `revoked_at` is nothing while it holds. Times are Unix seconds."""

    number: int
    scope: Scope
    given_at: int
    revoked_at: int | None


class Consents:
    """The consents in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._database = store.database

    def give(self, people: Iterable[Person], scope: Scope, *, now: int) -> None:
        """Record a consent of each. Raises `StoreError` if it says nothing that could be covered.

        For many people at once where a site records signed forms.
        """
        _verify_scope(scope)
        words = [_join(scope.kinds), _join(scope.columns), _join(scope.purposes)]
        with self._database.transaction():
            self._store.generations.advance()
            self._database.run_many(
                "INSERT INTO consents (person, study, kinds, columns, purposes, given_at) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                [[person.number, scope.study, *words, now] for person in people],
            )

    def revoke(self, person: Person, number: int | None = None, *, now: int) -> int:
        """Revoke one consent of a person, or all; return how many that were.

        What the person brought to trainings that go on is let go of, whichever it was.
        """
        which = "" if number is None else " AND id = ?"
        values = [now, person.number, *([] if number is None else [number])]
        with self._database.transaction():
            self._store.generations.advance()
            self._store.forget_past(person)
            return self._database.run(
                "UPDATE consents SET revoked_at = ? "  # noqa: S608 - the text is one of two
                "WHERE person = ? AND revoked_at IS NULL" + which,
                values,
            )

    def of(self, person: Person) -> tuple[Consent, ...]:
        """All that a person ever gave, oldest first."""
        found = self._database.all(
            "SELECT id, study, kinds, columns, purposes, given_at, revoked_at "
            "FROM consents WHERE person = ? ORDER BY id",
            [person.number],
        )
        return tuple(
            Consent(number=number, scope=_scope(*words), given_at=given_at, revoked_at=revoked_at)
            for number, *words, given_at, revoked_at in found
        )

    def covering(self, asked: Asked) -> frozenset[int]:
        """Numbers of the people one of whose consents, not revoked, covers what is asked."""
        found = self._database.all(
            "SELECT DISTINCT person, study, kinds, columns, purposes FROM consents "
            "WHERE revoked_at IS NULL AND study IN ('', ?)",
            [asked.study],
        )
        known: dict[tuple[str, ...], bool] = {}
        covered = set()
        for person, *words in found:
            key = tuple(words)
            if key not in known:
                known[key] = _scope(*key).covers(asked)
            if known[key]:
                covered.add(person)
        return frozenset(covered)


def _verify_scope(scope: Scope) -> None:
    unknown = scope.columns - COLUMNS.keys()
    if unknown:
        raise StoreError(
            f"There is no column {min(unknown)[:64]!r}: `havengate device columns` lists them."
        )
    if not scope.columns or not scope.purposes or not (scope.study or scope.kinds):
        raise StoreError(
            "A consent names columns, purposes, and either a study or kinds of questions: what is "
            "not named is not agreed to."
        )
    if scope.study and (not _STUDY(scope.study) or scope.kinds):
        raise StoreError("A consent to a study names its hash of 64 hex digits, and no kinds.")
    if not all(map(_KIND, scope.kinds)) or not all(map(_PURPOSE, scope.purposes)):
        raise StoreError(
            "Kinds of questions read as within_person, purposes as HRESCH (HL7 PurposeOfUse)."
        )
    if max(len(scope.kinds), len(scope.columns), len(scope.purposes)) > _MOST:
        raise StoreError(f"A consent names at most {_MOST} of each.")


def _join(words: Iterable[str]) -> str:
    return " ".join(sorted(words))


def _scope(*words: str) -> Scope:
    study, kinds, columns, purposes = words
    split: Sequence[frozenset[str]] = [frozenset(w.split()) for w in (kinds, columns, purposes)]
    return Scope(study=study, kinds=split[0], columns=split[1], purposes=split[2])
