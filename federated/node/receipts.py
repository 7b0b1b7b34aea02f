"""Receipts: what a person is told about every contact, in plain words.

Each contact that a study makes with a node, allowed, refused or failed, leaves one for each person
it was about: who asked, what for, which columns, what it cost, what is left, or why not. They lie
in the store beside the rows they speak of. What is reserved on somebody has its receipt in the same
transaction, which says later what came of it; after a crash it says that nothing did.

Refusals that come again and again are counted, not repeated, and kept in a bounded number for each
rule: a server can neither fill the disk by asking, nor crowd out what other rules refused. The same
holds of questions for how many people would answer. Whatever
cost somebody something is kept for good.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

import msgspec

from federated.node.columns import COLUMNS
from federated.node.store import Person, Store

#: `counted`: a study asked how many people would be let in, and was told.
type Outcome = Literal["counted", "reserved", "allowed", "refused", "failed"]

#: Refusals by one rule kept for each person (and for the node as a whole); older ones make room.
#: So many of what only counted people, too.
MAX_REFUSALS: Final = 100
#: What costs nothing, and so may come as often as a server likes.
_FREE: Final = frozenset({"refused", "counted"})
#: The same of these within this time is counted instead of kept again.
_SAME_S: Final = 86_400


class Told(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a receipt says. Texts of a study are in it only once its signatures were verified."""

    study: str = ""
    study_hash: str = ""
    title: str = ""
    question: str = ""
    purpose: str = ""
    query: str = ""
    columns: tuple[str, ...] = ()
    trust_model: str = ""
    people: int = 0
    epsilon: float = 0.0
    left: float = 0.0
    rule: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """One receipt. `times` counts equal refusals of a day; `at` is the last. Unix seconds."""

    number: int
    at: int
    outcome: Outcome
    told: Told
    times: int = 1

    def words(self) -> str:
        """The receipt as sentences for the person."""
        return "\n".join(_sentences(self))

    def plain(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "number": self.number,
            "at": _time(self.at),
            "outcome": self.outcome,
            "times": self.times,
            **msgspec.to_builtins(self.told),
            "words": self.words(),
        }


class _Kept(msgspec.Struct, frozen=True):
    told: Told
    times: int = 1


class Receipts:
    """The receipts in a store."""

    def __init__(self, store: Store) -> None:
        self._database = store.database

    def give(self, people: Iterable[Person], outcome: Outcome, told: Told, *, now: int) -> None:
        """One for each of these people, all with the same words."""
        with self._database.transaction():
            for person in people:
                self._keep(person.number, outcome, told, now=now)

    def reserve(self, people: Iterable[Person], told: Told, *, now: int) -> dict[int, int]:
        """One for each of these people: that it was reserved. Returns person → receipt, by number.

        For the transaction that reserves.
        """
        content = msgspec.json.encode(_Kept(told)).decode()
        with self._database.transaction():
            return {
                person.number: self._database.insert(
                    "INSERT INTO receipts (person, at, outcome, study, content) "
                    "VALUES (?, ?, 'reserved', ?, ?)",
                    [person.number, now, told.study, content],
                )
                for person in people
            }

    def settle(self, each: Iterable[tuple[int, Told]], outcome: Outcome, *, now: int) -> None:
        """Say on reserved receipts, by number, what came of it. The first word stays."""
        with self._database.transaction():
            for number, told in each:
                self._database.run(
                    "UPDATE receipts SET at = ?, outcome = ?, content = ? "
                    "WHERE id = ? AND outcome = 'reserved'",
                    [now, outcome, msgspec.json.encode(_Kept(told)).decode(), number],
                )

    def fail(self, numbers: Iterable[int], told: Told, *, now: int) -> None:
        """Say that the round of these receipts came to nothing.

        On the receipt itself where rows were not read; in one more where it says `allowed`.
        """
        content = msgspec.json.encode(_Kept(told)).decode()
        with self._database.transaction():
            for number in numbers:
                self._database.run(
                    "INSERT INTO receipts (person, at, outcome, study, content) "
                    "SELECT person, ?, 'failed', study, ? FROM receipts "
                    "WHERE id = ? AND outcome = 'allowed'",
                    [now, content, number],
                )
                self.settle([(number, told)], "failed", now=now)

    def give_all(self, outcome: Outcome, told: Told, *, now: int) -> None:
        """One that is for everybody in the store: what was not about anybody alone."""
        with self._database.transaction():
            self._keep(0, outcome, told, now=now)

    def of(self, person: Person) -> tuple[Receipt, ...]:
        """A person's receipts, those for everybody since they came among them, oldest first."""
        found = self._database.all(
            "SELECT id, at, outcome, content FROM receipts "
            "WHERE person = ? OR (person = 0 AND at >= ?) ORDER BY at, id",
            [person.number, self._came(person)],
        )
        return tuple(_read(*row) for row in found)

    def _came(self, person: Person) -> int:
        found = self._database.one("SELECT joined FROM people WHERE id = ?", [person.number])
        return int(found[0]) if found else 0

    def _keep(self, number: int, outcome: Outcome, told: Told, *, now: int) -> None:
        if outcome in _FREE and self._count_again(number, outcome, told, now=now):
            return
        content = msgspec.json.encode(_Kept(told)).decode()
        self._database.run(
            "INSERT INTO receipts (person, at, outcome, study, content) VALUES (?, ?, ?, ?, ?)",
            [number, now, outcome, told.study, content],
        )
        if outcome in _FREE:
            # What had been reserved before it was refused is not forgotten: it cost something.
            self._database.run(
                "DELETE FROM receipts WHERE id IN (SELECT id FROM receipts WHERE person = ? "
                "AND outcome = ? AND json_extract(content, '$.told.rule') IS ? "
                "AND json_extract(content, '$.told.epsilon') IS NULL "
                "ORDER BY id DESC LIMIT -1 OFFSET ?)",
                [number, outcome, told.rule or None, MAX_REFUSALS],
            )

    def _count_again(self, number: int, outcome: Outcome, told: Told, *, now: int) -> bool:
        last = self._database.all(
            "SELECT id, content FROM receipts WHERE person = ? AND outcome = ? "
            "AND study = ? AND at > ? ORDER BY id DESC LIMIT 20",
            [number, outcome, told.study, now - _SAME_S],
        )
        for identity, content in last:
            kept = msgspec.json.decode(content, type=_Kept)
            if kept.told == told:
                again = msgspec.json.encode(_Kept(told, kept.times + 1)).decode()
                self._database.run(
                    "UPDATE receipts SET at = ?, content = ? WHERE id = ?", [now, again, identity]
                )
                return True
        return False


def _read(number: int, at: int, outcome: Outcome, content: str) -> Receipt:
    kept = msgspec.json.decode(content, type=_Kept)
    return Receipt(number=number, at=at, outcome=outcome, told=kept.told, times=kept.times)


def _time(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _sentences(receipt: Receipt) -> Iterable[str]:
    told = receipt.told
    who = f"The study “{told.title}” ({told.study})" if told.title else "Somebody"
    yield f"{_time(receipt.at)}: {who} asked for an answer."
    if told.question:
        yield f"It wants to know: {told.question}"
    if told.columns:
        meanings = "; ".join(
            f"{name} ({COLUMNS[name].meaning})" if name in COLUMNS else name
            for name in told.columns
        )
        yield f"For “{told.query}” it asked to use: {meanings}."
    if told.purpose:
        yield f"Purpose of use: {told.purpose}."
    yield from _came_of_it(receipt.outcome, told)
    if receipt.times > 1:
        yield f"This happened {receipt.times} times within a day."


def _came_of_it(outcome: Outcome, told: Told) -> Iterable[str]:
    match outcome:
        case "counted":
            yield (
                "It was told for how many people here an answer would be given. Nothing of yours "
                "was read or spent. If the round came about, another receipt says so."
            )
        case "allowed":
            yield from _allowed(told)
        case "reserved":
            paid = (
                f"ε = {told.epsilon:.3g} of your privacy budget was reserved for it"
                if told.epsilon
                else "An earlier round had paid for all of this answer's rounds"
            )
            yield (
                f"{paid}, and the round was never finished here, or is not yet. What is reserved "
                "counts as spent."
            )
        case "refused":
            yield f"It was refused, and nothing of yours was read: {told.reason}"
            if told.epsilon:
                yield f"ε = {told.epsilon:.3g} had been reserved before, and stays spent."
        case "failed":
            yield f"The round came to nothing: {told.reason}"
            yield "What it cost stays spent: nobody can prove that nothing was learned from it."


def _allowed(told: Told) -> Iterable[str]:
    if told.trust_model == "secure_aggregation":
        yield (
            "Your data were read for one part of a sum. What leaves here is masked: nobody, the "
            "coordinator included, sees it alone, and noise hides whether you took part with "
            "anything at all."
        )
    else:
        yield (
            "Your data were read for an answer. It goes to the coordinator, who can see it before "
            "noise is added: this study asks you to trust it."
        )
    cost = (
        f"It cost you ε = {told.epsilon:.3g} of your privacy budget"
        if told.epsilon
        else "It cost you nothing more: an earlier round paid for all rounds of this answer"
    )
    yield f"{cost}; {told.left:.3g} are left. What is spent is never given back."
