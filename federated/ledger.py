"""The ledger: what each participant's data has cost, over all studies; reserved, spent, never back.

Lives here: reserving (refused as a whole if it would take anybody above the cap), spending,
looking, verifying and mending. The rows themselves stand in `federated.ledger_rows`, who adds costs
up in `federated.accounting`. Before: `federated.study_run`, which dispatches nothing until
`reserve` has returned. Beside: each device's own ledger (`federated.node.budget`); the stricter of
both wins.

Order: the intent is in the audit log, then the row is durable, then the outcome (with the row's
hash) is in the log, then `reserve` returns. A crash in between leaves a reservation that nobody
uses and that counts as spent: what is counted is never below what was spent. A row is never changed
and never removed.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from sqlalchemy import Connection, select

from audit.model import Action, Entry
from audit.recorder import Act, Begun, End, Recorder, Who
from federated.database import StudyDatabase
from federated.errors import (
    AccountingError,
    BudgetExhaustedError,
    FederatedError,
    LedgerError,
)
from federated.ledger_queries import (
    MAX_PARTICIPANTS,
    History,
    Reservation,
    added_to,
    append_row,
    charges_of,
    checked_participants,
    costs_of,
    find_row,
    reservation_of,
)
from federated.ledger_rows import (
    EVERYBODY,
    Charge,
    Recorded,
    Row,
    chain_problems,
    details_of,
    encode_cost,
    forgotten,
    lost_rows,
    parse_cost,
    participants_hash,
    recorded_rows,
)
from federated.model import PrivacyCost
from federated.schema import ledger_charges, ledger_rows

__all__ = ["MAX_PARTICIPANTS", "Balance", "Ledger", "Reservation", "Within"]

_CACHED: Final = 4096
#: SQLite allows 32,766 bound values in a statement; PostgreSQL 65,535.
_CHUNK: Final = 10_000
_ROUND = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,63}").fullmatch
_STUDY = re.compile(r"[0-9a-f]{64}").fullmatch

#: Raises if these costs together, of all rounds of a study, are more than it may have.
type Within = Callable[[Sequence[PrivacyCost]], None]


class Accountant(Protocol):
    """Adds costs up (`federated.accounting.Accountant`)."""

    @property
    def delta(self) -> float:
        """The δ at which it does."""
        ...

    def compose(self, costs: Sequence[PrivacyCost]) -> float:
        """An ε that bounds all of them together; raises where there is none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """What one participant's data has cost. What was reserved counts as spent."""

    epsilon: float
    delta: float
    cap: float
    releases: int

    @property
    def left(self) -> float:
        """What ε is left; costs do not simply add up, so it is a guide and not a promise."""
        return max(0.0, self.cap - self.epsilon)


class Ledger:
    """The ledger in one database. Threads and processes may share it.

    `cap` is the ε (at the accountant's δ) that nobody is ever charged beyond; `lower` holds smaller
    ones of single participants. The accountant must hold for costs that were chosen knowing earlier
    answers (`Accountant(adaptive=True)`), since studies are. `ids` makes unique names.
    """

    def __init__(
        self,
        database: StudyDatabase,
        *,
        accountant: Accountant,
        cap: float,
        recorder: Recorder,
        tenant: str,
        clock: Callable[[], float],
        ids: Callable[[], str],
        lower: Mapping[str, float] | None = None,
    ) -> None:
        if not cap > 0 or any(not one >= 0 for one in (lower or {}).values()):
            raise LedgerError("A budget must be a number above 0.")
        self._database = database
        self._accountant = accountant
        self._cap = cap
        self._lower = dict(lower or {})
        self._recorder = recorder
        self._tenant = tenant
        self._clock = clock
        self._ids = ids
        self._composed: OrderedDict[History, float] = OrderedDict()
        self._lock = threading.Lock()

    def reserve(
        self,
        *,
        study: str,
        round_id: str,
        participants: Collection[str],
        cost: PrivacyCost,
        within: Within | None = None,
    ) -> Reservation:
        """Charge every participant with one round's cost, or nobody.

        `study` is the study's hash; `within` is asked about all that the study will have cost with
        this round, while no other round can be reserved. Raises `BudgetExhaustedError` if anybody
        would go above the cap; what `within` raises; `LedgerError` if the round was reserved before
        (its answer may be out: ask under another round's name), if the ledger does not answer, or
        if the log does not: then nothing may be dispatched, and what was written counts as spent.
        """
        whom = checked_participants(participants)
        if not _STUDY(study) or not _ROUND(round_id):
            raise LedgerError("A round is named by 1 to 64 of A-Z a-z 0-9 . _ : + -.")
        row = self._draft("reserve", study, round_id, encode_cost(cost), whom)
        begun = self._intent("study.reserve", row)
        try:
            # Adding up takes long: what is found here is cached when the others are kept waiting.
            with self._database.reading() as connection:
                self._verify_affordable(connection, whom, row.cost)
            with self._database.writing() as connection:
                self._verify_new(connection, row)
                if within is not None:
                    within([*(one.cost for one in charges_of(connection, study)), cost])
                self._verify_affordable(connection, whom, row.cost)
                row = append_row(connection, row, whom)
        except FederatedError as error:
            denied = isinstance(error, BudgetExhaustedError)
            self._ended(begun, "denied" if denied else "failed", error.code)
            raise
        self._written(begun, row)
        return reservation_of(row)

    def affordable(self, participants: Sequence[str], cost: PrivacyCost) -> frozenset[str]:
        """Who of them could be charged with it now: a look, which `reserve` does not rely on."""
        whom, able = checked_participants(participants), set[str]()
        with self._database.reading() as connection:
            for history, names in self._histories(connection, whom).items():
                with contextlib.suppress(AccountingError):
                    epsilon = self._compose(added_to(history, encode_cost(cost)))
                    able.update(name for name in names if epsilon <= self._cap_of(name))
        return frozenset(able)

    def spend(self, reservation: Reservation) -> None:
        """Say that the round of this reservation released its answer. Once is enough.

        Raises `LedgerError` if there is no such reservation.
        """
        with self._database.reading() as connection:
            reserved = find_row(connection, reservation.id, ("reserve", "mend"))
            spent = find_row(connection, reservation.id, ("spend",))
        if reserved is None:
            raise LedgerError("Expected to spend what was reserved; the ledger has no such row.")
        if spent is not None:
            return
        cost = encode_cost(reservation.cost)
        row = self._draft(
            "spend", reserved.study, reserved.round, cost, (), reservation=reservation.id
        )
        begun = self._intent("study.spend", row)
        with self._database.writing() as connection:
            if find_row(connection, reservation.id, ("spend",)) is None:
                row = append_row(connection, row, ())
        if row.hash:
            self._written(begun, row)
        else:
            self._ended(begun, "failed", "federated.ledger")

    def reservation(self, *, study: str, round_id: str) -> Reservation | None:
        """What was reserved for a round, if it was: after a crash, what may still be dispatched."""
        statement = select(ledger_rows).where(
            ledger_rows.c.study == study,
            ledger_rows.c.round == round_id,
            ledger_rows.c.participants > 0,
        )
        with self._database.reading() as connection:
            found = connection.execute(statement).mappings().first()
        return None if found is None else reservation_of(Row(**found))

    def charges(self, study: str) -> Sequence[Charge]:
        """All that a study (by its hash) has ever cost anybody, in order, over all its runs."""
        with self._database.reading() as connection:
            return charges_of(connection, study)

    def is_spent(self, reservation: Reservation) -> bool:
        """Whether the round's answer was released."""
        with self._database.reading() as connection:
            return find_row(connection, reservation.id, ("spend",)) is not None

    def balance(self, participant: str) -> Balance:
        """What a participant's data has cost until now."""
        (name,) = checked_participants([participant])
        with self._database.reading() as connection:
            ((history, _),) = self._histories(connection, [name]).items()
        return Balance(
            epsilon=self._compose(history),
            delta=self._accountant.delta,
            cap=self._cap_of(name),
            releases=sum(count for _, count in history),
        )

    def verify(self, entries: Iterable[Entry] = ()) -> int:
        """Prove that no row was changed, removed or reordered; return how many rows there are.

        With the `entries` of the audit log, also that none of the newest is missing. Raises
        `LedgerError`, which says the first thing that is wrong and how many there are.
        """
        # First the log: a row that comes meanwhile is then there, and not taken for lost.
        recorded = recorded_rows(entries)
        rows, charged = self._read()
        problems = chain_problems(rows, charged)
        unknown = forgotten(rows, recorded)
        if unknown is not None:
            raise LedgerError(
                f"The ledger is not as it was written: {unknown}. Nothing may be dispatched, and "
                "nothing can mend it but a newer backup."
            )
        problems += [
            f"the log recorded a {one.kind} in row {one.sequence} that is not there: an older "
            "backup was restored, or rows were cut off"
            for one in lost_rows(rows, recorded)
        ]
        if problems:
            raise LedgerError(
                f"The ledger is not as it was written: {problems[0]} ({len(problems)} problem(s)). "
                "Nothing may be dispatched; `havengate study ledger --mend` adds what the log has."
            )
        return len(rows)

    def mend(
        self, entries: Iterable[Entry], *, rosters: Iterable[Collection[str]] = ()
    ) -> Sequence[Row]:
        """Add what the audit log recorded and the ledger lost; return the rows added.

        Only ever upward: nothing that is there is taken away. The log says whom a row charged by a
        hash only; where it is that of one of `rosters`, those are charged, else everybody is.
        Raises `LedgerError` if what is there is not intact: restore a backup that is, then mend.
        """
        recorded = recorded_rows(entries)
        known = {participants_hash(one): tuple(sorted(one)) for one in rosters}
        added: list[Row] = []
        while True:
            rows, charged = self._read()
            problems = chain_problems(rows, charged)
            if problems:
                raise LedgerError(
                    f"The ledger cannot be mended, for {problems[0]}: restore a whole backup first."
                )
            lost, unknown = lost_rows(rows, recorded), forgotten(rows, recorded)
            if unknown is not None:
                raise LedgerError(
                    f"The ledger cannot be mended, for {unknown}: restore a newer one."
                )
            if not lost:
                return added
            added.append(self._mend(lost[0], known))

    def _mend(self, lost: Recorded, known: Mapping[str, tuple[str, ...]]) -> Row:
        whom = known.get(lost.participants_hash, (EVERYBODY,))
        if lost.participants == 0:
            whom = ()
        row = self._draft(
            "mend",
            lost.study,
            lost.round,
            lost.cost,
            whom,
            reservation=lost.reservation,
            lost=lost.name,
        )
        begun = self._intent("study.mend", row)
        with self._database.writing() as connection:
            row = append_row(connection, row, whom)
        self._written(begun, row)
        return row

    def _draft(
        self,
        kind: Any,
        study: str,
        round_id: str,
        cost: str,
        whom: Collection[str],
        *,
        reservation: str = "",
        lost: str = "",
    ) -> Row:
        return Row(
            sequence=0,
            kind=kind,
            reservation=reservation or self._ids(),
            study=study,
            round=round_id,
            cost=cost,
            participants=len(whom),
            participants_hash=participants_hash(whom),
            lost=lost,
            at_us=int(self._clock() * 1_000_000),
            previous="",
        )

    def _intent(self, action: Action, row: Row) -> Begun:
        return self._recorder.intent(
            Act(
                tenant=self._tenant,
                who=Who(kind="system", name="coordinator"),
                action=action,
                counts={"participants": row.participants},
                details=details_of(row),
            )
        )

    def _written(self, begun: Begun, row: Row) -> None:
        self._recorder.outcome(
            begun,
            End(outcome="success", counts={"sequence": row.sequence}, details={"row": row.hash}),
        )

    def _ended(self, begun: Begun, outcome: Any, reason: str) -> None:
        self._recorder.outcome(begun, End(outcome=outcome, reason=reason))

    def _verify_new(self, connection: Connection, row: Row) -> None:
        statement = select(ledger_rows.c.sequence).where(
            ledger_rows.c.study == row.study,
            ledger_rows.c.round == row.round,
            ledger_rows.c.kind != "spend",
        )
        if connection.execute(statement).first() is not None:
            raise LedgerError(
                f"Expected a new round, got {row.round}, which was reserved before and counts as "
                "spent. Ask again under another name; it costs again."
            )

    def _verify_affordable(self, connection: Connection, whom: Sequence[str], cost: str) -> None:
        for history, names in self._histories(connection, whom).items():
            try:
                epsilon = self._compose(added_to(history, cost))
            except AccountingError as error:
                # What cannot be bounded counts as more than any budget.
                raise BudgetExhaustedError(
                    f"This round would take {len(names)} of {len(whom)} participants beyond what "
                    f"can be bounded at δ = {self._accountant.delta:.1g}: {error}"
                ) from error
            # Not `>`: a figure that is no number is more than any cap.
            over = [name for name in names if not epsilon <= self._cap_of(name)]
            if over:
                raise BudgetExhaustedError(
                    f"This round would take {len(over)} or more of {len(whom)} participants to "
                    f"ε = {epsilon:.3g} at δ = {self._accountant.delta:.1g}, above their budget of "
                    f"{min(self._cap_of(name) for name in over):.3g}. Nothing was reserved: ask "
                    "less, or ask others."
                )

    def _histories(self, connection: Connection, whom: Sequence[str]) -> dict[History, list[str]]:
        """Who has which costs: most have the same, and are added up once."""
        shared = costs_of(connection, [EVERYBODY]).get(EVERYBODY, Counter())
        found: dict[str, Counter[str]] = {}
        for start in range(0, len(whom), _CHUNK):
            found |= costs_of(connection, whom[start : start + _CHUNK])
        groups: dict[History, list[str]] = {}
        for name in whom:
            history = found.get(name, Counter()) + shared
            groups.setdefault(frozenset(history.items()), []).append(name)
        return groups

    def _compose(self, history: History) -> float:
        with self._lock:
            known = self._composed.get(history)
        if known is not None:
            return known
        costs = [parse_cost(cost) for cost, count in sorted(history) for _ in range(count)]
        epsilon = self._accountant.compose(costs) if costs else 0.0
        with self._lock:
            self._composed[history] = epsilon
            while len(self._composed) > _CACHED:
                self._composed.popitem(last=False)
        return epsilon

    def _cap_of(self, participant: str) -> float:
        return min(self._cap, self._lower.get(participant, self._cap))

    def _read(self) -> tuple[list[Row], dict[int, list[str]]]:
        charged: dict[int, list[str]] = {}
        with self._database.reading() as connection:
            found = connection.execute(select(ledger_rows).order_by(ledger_rows.c.sequence))
            rows = [Row(**values) for values in found.mappings()]
            for participant, sequence in connection.execute(select(ledger_charges)):
                charged.setdefault(sequence, []).append(participant)
        return rows, charged
