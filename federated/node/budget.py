"""A person's own budget: what was reserved and spent on them, on this node, across all studies.

Lives here: the node's ledger and its caps. How costs compose is the accountant's business
(`federated.accounting`), through the port `Accountant`; when to reserve is `node.guard`'s.

*Reserved* is durable before a query is answered, *spent* before its rows are read; both count alike
and neither is ever given back, so a crash can only over-count. Rows of the ledger are linked by
hashes, and nothing is reserved or spent in an older copy of the store (`node.generation`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Protocol

import msgspec

from federated.errors import AccountingError, LedgerError
from federated.model import NoisePlan, PrivacyCost, Sensitivity
from federated.node.store import Person, Store

_FIRST_LINK: Final = sha256(b"havengate/device/ledger/v1").hexdigest()
_SLACK: Final = 1e-9
_CACHED: Final = 4096


class Accountant(Protocol):
    """Composes costs at a δ of its own."""

    def compose(self, costs: Sequence[PrivacyCost]) -> float:
        """An ε that all of them together cost at most. Raises `AccountingError`: unbounded."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """What may ever be spent on one person on this node: `epsilon` at `delta`."""

    epsilon: float = 4.0
    delta: float = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """What is paid for. `run` and `round_number` tell the rounds of one query apart.

    `cost` is that of an answer, which takes `rounds` rounds: it is paid in the first.
    """

    study: str
    study_hash: str
    query: str
    run: str
    round_number: int
    cost: PrivacyCost
    rounds: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """One row of the ledger. `state` is reserved or spent; both count.

    `cost` is None where an earlier row paid for all rounds of the same answer.
    """

    number: int
    study: str
    query: str
    run: str
    round_number: int
    cost: PrivacyCost | None
    at: int
    state: str


class _Cost(msgspec.Struct, frozen=True, array_like=True):
    epsilon: float
    delta: float
    closeness: float
    mechanism: str
    scale: float
    l1: float
    l2: float


def encode_cost(cost: PrivacyCost) -> str:
    """A cost as text; equal costs give equal texts."""
    noise, sensitivity = cost.noise, cost.sensitivity
    wire = _Cost(
        cost.epsilon, cost.delta, cost.closeness, noise.mechanism, noise.scale,
        sensitivity.l1, sensitivity.l2,
    )  # fmt: skip
    return msgspec.json.encode(wire).decode()


def decode_cost(text: str) -> PrivacyCost:
    """Read what `encode_cost` made. Raises `LedgerError`."""
    try:
        wire = msgspec.json.decode(text, type=_Cost)
    except msgspec.DecodeError:
        raise LedgerError("The node's ledger holds a cost that cannot be read.") from None
    return PrivacyCost(
        epsilon=wire.epsilon,
        delta=wire.delta,
        closeness=wire.closeness,
        noise=NoisePlan(mechanism=wire.mechanism, scale=wire.scale),  # type: ignore[arg-type]
        sensitivity=Sensitivity(l1=wire.l1, l2=wire.l2),
    )


class Budget:
    """The ledger of a store. `accountant_at(delta, adaptive)` gives an accountant.

    Across studies what the next one costs may depend on earlier answers, so the cap is held to with
    an accountant that stays right then (`adaptive`); within a study all is fixed beforehand, as
    long as nothing is asked again.
    """

    def __init__(self, store: Store, accountant_at: Callable[[float, bool], Accountant]) -> None:
        self._store = store
        self._database = store.database
        self._accountant_at = accountant_at
        self._composed: dict[tuple[float, bool, tuple[str, ...]], float] = {}

    def cap(self) -> Cap:
        """The cap that holds for everybody in the store."""
        text = self._store.meta("cap")
        return Cap() if text is None else msgspec.json.decode(text, type=Cap)

    def set_cap(self, cap: Cap) -> None:
        """Change it, for all contacts from now on."""
        if not (0 < cap.epsilon < float("inf") and 0 <= cap.delta < 1):
            raise LedgerError("A cap has an ε above 0, finite, and a δ from 0 to below 1.")
        self._store.set_meta("cap", msgspec.json.encode(cap).decode())

    def verify(self) -> None:
        """Check the links, and that this is not an older copy. Raises `LedgerError`."""
        with self._database.transaction():
            self._verify_newest()
            link = _FIRST_LINK
            for number, *parts, found in self._database.all(
                "SELECT number, who, study, query, run, round, cost, at, link FROM spends "
                "ORDER BY number"
            ):
                link = _link(link, number, parts)
                if link != found:
                    raise LedgerError(f"Row {number} of the node's ledger was changed.")

    def ready(self) -> None:
        """Check that this is not an older copy of the store. Raises `LedgerError`."""
        with self._database.transaction():
            self._verify_newest()

    def spends(self, person: Person) -> tuple[Spend, ...]:
        """What was reserved and spent on a person, oldest first."""
        found = self._database.all(
            "SELECT number, study, query, run, round, cost, at, state FROM spends "
            "WHERE who = ? ORDER BY number",
            [self._store.tag(person)],
        )
        return tuple(
            Spend(
                number=number, study=study.partition(" ")[0], query=query, run=run,
                round_number=round_number, cost=decode_cost(cost) if cost else None, at=at,
                state=state,
            )
            for number, study, query, run, round_number, cost, at, state in found
        )  # fmt: skip

    def spent(self, person: Person, study: str | None = None) -> float:
        """ε that was spent on a person, in all or in one study (its id), at the cap's δ.

        Infinite if no ε can be said at that δ, as after the cap was lowered.
        """
        spends = [one for one in self.spends(person) if study is None or one.study == study]
        costs = [encode_cost(one.cost) for one in spends if one.cost is not None]
        try:
            return self._compose(costs, self.cap().delta, adaptive=True)
        except AccountingError:
            return math.inf

    def left(self, person: Person) -> float:
        """ε that is left for a person."""
        return self.left_each([person])[person.number]

    def left_each(self, people: Sequence[Person]) -> Mapping[int, float]:
        """The same for each of many people, by number, in one look; 0 where it is not bounded."""
        history, cap = self._history(), self.cap()
        found = {}
        for person in people:
            costs = [row[2] for row in history.get(self._store.tag(person), ()) if row[2]]
            try:
                spent = self._compose(costs, cap.delta, adaptive=True)
            except AccountingError:
                spent = math.inf
            found[person.number] = max(0.0, cap.epsilon - spent)
        return found

    def judge(
        self, people: Sequence[Person], contact: Contact, *, epsilon: float, delta: float,
        questions: int, answers: int,
    ) -> Mapping[int, str]:  # fmt: skip
        """Who may not pay, by number, and why: `repeat`, `rounds`, `study_budget` or `budget`.

        A round of a study that was seen here at all is a `repeat` for everybody, for those too who
        came since: with another set of people its two answers would differ by them alone. Of an
        answer of several rounds each number is asked once in whatever run: the number says which of
        its rounds it is, and a person brings to each what its price allows for once.
        `epsilon` at `delta` is what the study promised each person for all of it, `questions` how
        many it has, `answers` how often it may ask. Whoever is asked one question again, or oftener
        than there are questions, is asked knowing earlier answers: then costs are added up, as
        across studies. A cost that cannot be composed counts as unbounded.

        An answer of several rounds is paid for in a person's first, whole; after that many rounds
        they are asked no more, in whatever runs they were: its price is of so many.
        """
        if self._seen(contact):
            return {person.number: "repeat" for person in people}
        history = self._history()
        cap = self.cap()
        new = encode_cost(contact.cost)
        study = _study_key(contact)
        verdicts = {}
        for person in people:
            rows = history.get(self._store.tag(person), ())
            taken = sum(row[:2] == (study, contact.query) for row in rows)
            if contact.rounds > 1 and taken:
                if taken >= contact.rounds:
                    verdicts[person.number] = "rounds"
                continue
            paid = [row for row in rows if row[0] == study and row[2]]
            own, names = [row[2] for row in paid], [contact.query, *(row[1] for row in paid)]
            promised = Cap(epsilon=epsilon, delta=delta)
            again = len(own) >= questions or len(set(names)) < len(names)
            if len(own) >= answers:
                verdicts[person.number] = "rounds"
            elif not self._fits([*own, new], promised, adaptive=again):
                verdicts[person.number] = "study_budget"
            elif not self._fits([*(row[2] for row in rows if row[2]), new], cap, adaptive=True):
                verdicts[person.number] = "budget"
        return verdicts

    def paid(self, people: Sequence[Person], contact: Contact) -> frozenset[int]:
        """Who of them paid for this answer in an earlier round of it, by number."""
        if contact.rounds == 1:
            return frozenset()
        found = self._database.all(
            "SELECT DISTINCT who FROM spends WHERE study = ? AND query = ?",
            [_study_key(contact), contact.query],
        )
        known = {who for (who,) in found}
        return frozenset(one.number for one in people if self._store.tag(one) in known)

    def reserve(self, people: Sequence[Person], contact: Contact, *, now: int) -> tuple[int, ...]:
        """Reserve for each; durable when the outermost transaction ends. Returns the rows' numbers.

        The round is written down for everybody, the cost for those who have not `paid` it yet.
        Raises `LedgerError` if this is an older copy, or if the round was seen here before; then
        nobody may be answered for.
        """
        with self._database.transaction():
            number, link = self._verify_newest()
            if self._seen(contact):
                raise LedgerError("This round was reserved here before: it is answered once.")
            rows, before = [], self.paid(people, contact)
            for person in people:
                number += 1
                cost = "" if person.number in before else encode_cost(contact.cost)
                parts = [
                    self._store.tag(person), _study_key(contact), contact.query, contact.run,
                    contact.round_number, cost, now,
                ]  # fmt: skip
                link = _link(link, number, parts)
                rows.append([number, *parts, "reserved", link])
            self._database.run_many(
                "INSERT INTO spends VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows
            )
            self._store.generations.advance()
        return tuple(range(number - len(rows) + 1, number + 1))

    def spend(self, numbers: Sequence[int]) -> None:
        """Mark what was reserved as spent: from here on rows may be read. Never undone.

        Raises `LedgerError`, and marks nothing, if this is an older copy or one of these is not
        reserved: not there any more, or spent before.
        """
        with self._database.transaction():
            self._store.generations.advance()
            marked = self._database.run_many(
                "UPDATE spends SET state = 'spent' WHERE number = ? AND state = 'reserved'",
                [[one] for one in numbers],
            )
            if marked != len(numbers):
                raise LedgerError(
                    f"Of {len(numbers)} costs that were reserved the node's ledger has "
                    f"{max(0, marked)} that are not spent yet: nothing is read."
                )

    def _seen(self, contact: Contact) -> bool:
        """Whether anything was ever reserved here for this round of the study, on whomever."""
        found = self._database.one(
            "SELECT 1 FROM spends "
            "WHERE study = ? AND round = ? AND (run = ? OR (? AND query = ?)) LIMIT 1",
            [
                _study_key(contact), contact.round_number, contact.run, contact.rounds > 1,
                contact.query,
            ],
        )  # fmt: skip
        return found is not None

    def _history(self) -> dict[str, tuple[tuple[str, str, str], ...]]:
        """Of each tag: study, query and cost of every row; no cost where another row paid."""
        found: dict[str, list[tuple[str, str, str]]] = {}
        for who, *row in self._database.all("SELECT who, study, query, cost FROM spends"):
            found.setdefault(who, []).append((row[0], row[1], row[2]))
        return {who: tuple(rows) for who, rows in found.items()}

    def _fits(self, costs: Sequence[str], cap: Cap, *, adaptive: bool = False) -> bool:
        try:
            total = self._compose(costs, cap.delta, adaptive=adaptive)
        except AccountingError:
            return False
        return total <= cap.epsilon * (1 + _SLACK)

    def _compose(self, costs: Sequence[str], delta: float, *, adaptive: bool) -> float:
        key = (delta, adaptive, tuple(sorted(costs)))
        if key not in self._composed:
            if len(self._composed) >= _CACHED:
                self._composed.clear()
            decoded = [decode_cost(cost) for cost in key[2]]
            accountant = self._accountant_at(delta, adaptive)
            self._composed[key] = accountant.compose(decoded) if decoded else 0.0
        return self._composed[key]

    def _verify_newest(self) -> tuple[int, str]:
        """Raise `LedgerError` if this is an older copy; return the last row's number and link."""
        self._store.generations.verify()
        number, link = self._store.generations.ledger_head()
        return number, link if number else _FIRST_LINK


def _study_key(contact: Contact) -> str:
    return f"{contact.study} {contact.study_hash}"


def _link(before: str, number: int, parts: Sequence[object]) -> str:
    return sha256(before.encode() + msgspec.json.encode([number, *parts])).hexdigest()
