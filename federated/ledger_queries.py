"""What the ledger asks its tables, and how a row gets in. Who may, and when: `federated.ledger`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, func, insert, select

from federated.errors import LedgerError
from federated.ledger_rows import GENESIS, Charge, Row, parse_cost
from federated.model import PrivacyCost
from federated.schema import ledger_charges, ledger_rows

MAX_PARTICIPANTS: Final = 1_000_000
_PARTICIPANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}").fullmatch

#: A multiset of costs: canonical JSON of each, and how often.
type History = frozenset[tuple[str, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A reservation that is durable and recorded: one round may be dispatched with it."""

    id: str
    study: str
    round: str
    cost: PrivacyCost
    participants: int


def checked_participants(participants: Collection[str]) -> tuple[str, ...]:
    """Whom a round charges, sorted, each once. Raises `LedgerError`."""
    if isinstance(participants, str) or not 0 < len(participants) <= MAX_PARTICIPANTS:
        raise LedgerError(f"A round has 1 to {MAX_PARTICIPANTS} participants.")
    if not all(_PARTICIPANT(name) for name in participants):
        raise LedgerError("A participant is named by 1 to 128 of A-Z a-z 0-9 . _ : -.")
    return tuple(sorted(set(participants)))


def added_to(history: History, cost: str) -> History:
    """A history with one more cost."""
    counted = Counter(dict(history))
    counted[cost] += 1
    return frozenset(counted.items())


def costs_of(connection: Connection, names: Sequence[str]) -> dict[str, Counter[str]]:
    """What each of these participants was charged with, and how often."""
    statement = (
        select(ledger_charges.c.participant, ledger_rows.c.cost, func.count())
        .join(ledger_rows, ledger_rows.c.sequence == ledger_charges.c.sequence)
        .where(ledger_charges.c.participant.in_(names))
        .group_by(ledger_charges.c.participant, ledger_rows.c.cost)
    )
    found: dict[str, Counter[str]] = {}
    for name, cost, count in connection.execute(statement):
        found.setdefault(name, Counter())[cost] = count
    return found


def append_row(connection: Connection, row: Row, whom: Collection[str]) -> Row:
    """Write a row behind the newest one; the caller's transaction is the only writer."""
    newest = connection.execute(
        select(ledger_rows.c.sequence, ledger_rows.c.hash)
        .order_by(ledger_rows.c.sequence.desc())
        .limit(1)
    ).first()
    sequence, previous = (0, GENESIS) if newest is None else newest
    values = {name: getattr(row, name) for name in Row.__slots__}
    values |= {"sequence": sequence + 1, "previous": previous}
    sealed = Row(**values).sealed()
    connection.execute(insert(ledger_rows), {name: getattr(sealed, name) for name in Row.__slots__})
    if whom:
        connection.execute(
            insert(ledger_charges),
            [{"participant": name, "sequence": sealed.sequence} for name in whom],
        )
    return sealed


def charges_of(connection: Connection, study: str) -> list[Charge]:
    """All that a study was charged with, in order."""
    statement = (
        select(ledger_rows.c.round, ledger_rows.c.cost)
        .where(
            ledger_rows.c.study == study,
            ledger_rows.c.kind != "spend",
            ledger_rows.c.participants > 0,
        )
        .order_by(ledger_rows.c.sequence)
    )
    return [
        Charge(round=round_id, cost=parse_cost(cost))
        for round_id, cost in connection.execute(statement)
    ]


def find_row(connection: Connection, reservation: str, kinds: Sequence[str]) -> Row | None:
    """A row of a reservation, of these kinds."""
    statement = (
        select(ledger_rows)
        .where(ledger_rows.c.reservation == reservation, ledger_rows.c.kind.in_(kinds))
        .limit(1)
    )
    found = connection.execute(statement).mappings().first()
    return None if found is None else Row(**found)


def reservation_of(row: Row) -> Reservation:
    """A row that reserves, as a reservation."""
    return Reservation(
        id=row.reservation,
        study=row.study,
        round=row.round,
        cost=parse_cost(row.cost),
        participants=row.participants,
    )
