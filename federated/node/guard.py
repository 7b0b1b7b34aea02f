"""The guard: decides, before a row is read, whether a study gets an answer from this node.

Lives here: the rules and their order, and `Admission`, the one way to rows. Everything that comes
from the server is taken for hostile; whom to believe was told at enrolment (`node.enrolment`).

The rules, in order: `ledger` (this is the newest copy of the store), `manifest` (well-formed),
`signatures` (coordinator, ethics board, every site, by keys known since enrolment), `study_log`
(published in a log that continues the one seen so far, cosigned by a trusted witness), `code` and
`run_configuration` (equal to what was signed), `trust_model`, `expired`, `columns`, `roster`; then
for each person `paused`, `left`, `withdrawn`, `consent`; then `cost` (the node's own price, no
dearer than promised); then for each person `repeat`, `rounds`, `study_budget`, `budget`; then, over
those who are left, `cohort` and `plan`. The first that fails refuses, and leaves a receipt. What is
allowed is reserved first, spent next, and only then read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from federated.errors import LedgerError, RefusedError
from federated.manifest import ConfigValue, DeclaredQuery, Study
from federated.model import PersonRows, PrivacyCost
from federated.node import enrolment as enrolments
from federated.node.budget import Budget, Contact
from federated.node.consent import Asked, Consents
from federated.node.contact import ContactRequest, Question
from federated.node.enrolment import Enrolment
from federated.node.receipts import Receipts, Told
from federated.node.rules import (
    asked_query,
    bounded_price,
    enrolment_of,
    kind_of,
    known_rounds,
    parse_contact,
    parse_greeted,
    verify_approved,
    verify_cohort,
    verify_log,
    verify_roster,
    verify_run,
    verify_signatures,
    verify_terms,
    verify_time,
)
from federated.node.store import Person, Store

#: What each rule about one person says on the person's receipt.
REASONS: Final[Mapping[str, str]] = {
    "paused": "You have paused. `havengate device resume` takes part again.",
    "left": "You have left. No study gets an answer from you.",
    "withdrawn": "You withdrew from this study.",
    "consent": (
        "You did not agree to this kind of question about these data for this purpose, or you "
        "took it back."
    ),
    "repeat": "This round was asked here already; a round is answered once.",
    "rounds": "The study has asked as often as it said that it would.",
    "study_budget": "The study would spend more on you than it promised.",
    "budget": "It would spend more than your privacy budget.",
}

#: Raises if no round can be made of the request: nothing is to be reserved for it then.
type Prepare = Callable[[ContactRequest, Study, DeclaredQuery], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardPorts:
    """What the guard cannot know by itself.

    `price` is what one answer costs a person, all its `rounds`, from the query's own sensitivity
    and the declared noise; it raises where there is no bound. `code_hash` is that of the code
    installed here (`federated.code_hash`).
    """

    price: Callable[[Study, DeclaredQuery], PrivacyCost]
    rounds: Callable[[DeclaredQuery], int]
    code_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """That these people are answered for. Only `Guard.rows` makes rows of it, once.

    `receipts`: person → receipt, by number; each says `reserved` until `rows` or `failed`.
    """

    study: Study
    query: DeclaredQuery
    cost: PrivacyCost
    people: tuple[Person, ...] = field(repr=False)
    request: ContactRequest = field(repr=False)
    told: Told = field(repr=False)
    reserved: tuple[int, ...] = field(repr=False)
    receipts: Mapping[int, int] = field(repr=False)
    #: Who paid in an earlier round of the same answer, by number.
    before: frozenset[int] = field(default=frozenset(), repr=False)
    #: How often each one's past had been let go of when reading began (`Store.forgets`).
    forgets: list[Mapping[int, int]] = field(default_factory=list, repr=False, compare=False)
    #: The one right to read; taken by the first reader.
    ticket: list[None] = field(default_factory=lambda: [None], repr=False, compare=False)

    def told_to(self, person: int) -> Told:
        """What that person's receipt says; an answer costs nothing more than once."""
        paid = person in self.before
        return msgspec.structs.replace(self.told, epsilon=0.0) if paid else self.told


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """What a greeting is answered with: how many people would be let in now, at least one."""

    question: Question = field(repr=False)
    query: DeclaredQuery = field(repr=False)
    study_hash: str
    people: int


@dataclass(slots=True, kw_only=True)
class _Contact:
    """One contact: what it came with, and what a receipt may say of it so far."""

    configuration: Mapping[str, ConfigValue]
    now: int
    #: A request follows a greeting, and tells people then, unless the greeting is where it ends.
    greeting: bool = False
    told: Told = field(default_factory=Told)


class Guard:
    """The guard of one node. Safe for several threads and processes on one store."""

    def __init__(self, store: Store, budget: Budget, ports: GuardPorts) -> None:
        self._store = store
        self._budget = budget
        self._ports = ports
        self._consents = Consents(store)
        self._receipts = Receipts(store)

    def foresee(
        self,
        question: bytes | Question,
        *,
        configuration: Mapping[str, ConfigValue],
        now: int,
    ) -> Foreseen:
        """How many people `admit` would let in now. Nothing is reserved, remembered or read.

        By the same rules, but for those about what a greeting does not hold: `study_log`,
        `cohort`, `plan`. Raises `RefusedError` where they refuse, or where nobody would be let in.
        Receipts tell everybody that people were counted; where it raises, each why, since no
        request follows then.
        """
        contact = _Contact(configuration=configuration, now=now, greeting=True)
        with self._store.database.transaction():
            verdict = self._foresee(question, contact)
        if isinstance(verdict, RefusedError):
            raise verdict
        return verdict

    def admit(
        self,
        request: bytes | ContactRequest,
        *,
        configuration: Mapping[str, ConfigValue],
        now: int,
        prepare: Prepare = lambda *_: None,
    ) -> Admission:
        """Decide about one contact; reserve what it costs those who are let in.

        `configuration` is the whole run configuration that the run was really given. `prepare` is
        called last, before anything is reserved. Raises `RefusedError` with the rule and a reason
        in plain words if nobody is let in; each person concerned then has a receipt. No row is read
        here.
        """
        contact = _Contact(configuration=configuration, now=now)
        with self._store.database.transaction():
            # Decided and recorded in one transaction, refusals too: raising inside would undo them.
            verdict = self._decide(request, contact, prepare)
        if isinstance(verdict, RefusedError):
            raise verdict
        return verdict

    def rows(self, admission: Admission, *, now: int) -> Iterator[tuple[Person, PersonRows]]:
        """The rows of those let in, person by person: only the query's columns.

        Marks what was reserved as spent before the first is read. Whoever paused, left, withdrew or
        took consent back since is left out; what was reserved on them stays spent. Raises
        `RefusedError` if these rows were read before, or if the study's time is over by now.
        """
        with self._store.database.transaction():
            # Popping is atomic: of two readers one finds nothing.
            if not admission.ticket:
                raise RefusedError("The rows of an answer are read once.", rule="repeat")
            admission.ticket.pop()
            people = self._still(admission, now)
            admission.forgets.append(self._store.forgets())
        if isinstance(people, RefusedError):
            raise people
        columns = frozenset(admission.query.columns)
        for person in people:
            yield person, self._store.rows(person, columns)

    def willing(self, admission: Admission) -> frozenset[int]:
        """Who has taken nothing back since their rows were read, not even for a while. By number.

        Consent and state are looked at anew, and so is whether the past was let go of meanwhile.
        """
        people = [one for one in self._store.people() if one.number in admission.receipts]
        gone = self._unwilling(people, admission.study, admission.query)
        then, now = admission.forgets[-1] if admission.forgets else {}, self._store.forgets()
        return frozenset(
            one.number
            for one in people
            if one.number not in gone and then.get(one.number) == now.get(one.number)
        )

    def failed(self, admission: Admission, reason: str, *, now: int) -> None:
        """Tell those let in that the round came to nothing. What was reserved stays spent."""
        for person, receipt in admission.receipts.items():
            told = msgspec.structs.replace(admission.told_to(person), reason=reason)
            self._receipts.fail([receipt], told, now=now)

    # --- The order of the rules ----------------------------------------------------------------

    def _foresee(self, question: bytes | Question, contact: _Contact) -> Foreseen | RefusedError:
        try:
            self._verify_ledger()
            parsed, signed = parse_greeted(question)
            enrolled = enrolment_of(self._store)
            verify_signatures(signed, enrolled)
            query = self._verify_asked(signed.study, parsed, enrolled, contact)
        except RefusedError as refusal:
            return self._tell_all(refusal, contact)
        found = self._payers(signed.study, query, parsed, contact)
        if isinstance(found, RefusedError):
            return found
        self._receipts.give_all("counted", contact.told, now=contact.now)
        return Foreseen(
            question=parsed, query=query, study_hash=signed.study.study_hash, people=len(found[0])
        )

    def _decide(
        self, request: bytes | ContactRequest, contact: _Contact, prepare: Prepare
    ) -> Admission | RefusedError:
        try:
            # An older copy believes, and remembers, whom it should not any more.
            self._verify_ledger()
            parsed, signed = parse_contact(request)
            enrolled, study = enrolment_of(self._store), signed.study
            verify_signatures(signed, enrolled)
            self._verify_log(parsed, study, enrolled)
            query = self._verify_asked(study, parsed.question, enrolled, contact)
            verify_roster(parsed, enrolled)
        except RefusedError as refusal:
            return self._tell_all(refusal, contact)
        found = self._payers(study, query, parsed.question, contact)
        if isinstance(found, RefusedError):
            return found
        people, paid = found
        try:
            verify_cohort(parsed, study, enrolled, len(people))
            _prepared(prepare, parsed, study, query)
        except RefusedError as refusal:
            return self._tell(people, refusal, contact)
        before = self._budget.paid(people, paid)
        reserved = self._budget.reserve(people, paid, now=contact.now)
        told = msgspec.structs.replace(contact.told, epsilon=paid.cost.epsilon, people=len(people))
        receipts = self._reserved(people, before, told, contact)
        return Admission(
            study=study, query=query, cost=paid.cost, people=people, request=parsed,
            told=told, reserved=reserved, receipts=receipts, before=before,
        )  # fmt: skip

    def _verify_asked(
        self, study: Study, question: Question, enrolled: Enrolment, contact: _Contact
    ) -> DeclaredQuery:
        """The rules about a study whose signatures are verified, and about its question."""
        contact.told = _told(study)
        verify_run(study, contact.configuration, self._ports.code_hash)
        verify_terms(study, enrolled, contact.now)
        query = asked_query(study, question.query)
        contact.told = msgspec.structs.replace(
            contact.told, query=query.name, columns=query.columns
        )
        verify_approved(question, study, enrolled)
        return query

    def _verify_log(self, request: ContactRequest, study: Study, enrolled: Enrolment) -> None:
        seen = enrolments.remembered(self._store, enrolled.origin)
        enrolments.remember(self._store, verify_log(request.proof, study, enrolled, seen))

    # --- Rules about people --------------------------------------------------------------------

    def _payers(
        self, study: Study, query: DeclaredQuery, question: Question, contact: _Contact
    ) -> tuple[tuple[Person, ...], Contact] | RefusedError:
        """Those who agreed and can pay, at least one, and what each pays for."""
        everybody = self._store.people()
        out = self._unwilling(everybody, study, query)
        nobody = len(out) == len(everybody)
        people, refusal = self._without(
            everybody, out, contact, tell=nobody or not contact.greeting
        )
        if refusal is not None:
            return refusal
        try:
            cost = bounded_price(self._ports.price, study, query)
            rounds = known_rounds(self._ports.rounds, query)
        except RefusedError as found:
            return self._tell(people, found, contact)
        paid = Contact(
            study=study.id, study_hash=study.study_hash, query=query.name,
            run=question.run, round_number=question.round_number, cost=cost, rounds=rounds,
        )  # fmt: skip
        poor = self._budget.judge(
            people, paid, epsilon=study.epsilon, delta=study.delta,
            questions=len(study.queries), answers=study.rounds,
        )  # fmt: skip
        # Where others take part the request itself follows a greeting, and tells them then.
        nobody = len(poor) == len(people)
        people, refusal = self._without(people, poor, contact, tell=nobody or not contact.greeting)
        return (people, paid) if refusal is None else refusal

    def _verify_ledger(self) -> None:
        try:
            self._budget.ready()
        except LedgerError as error:
            raise RefusedError(str(error), rule="ledger") from error

    def _unwilling(
        self, people: Sequence[Person], study: Study, query: DeclaredQuery
    ) -> Mapping[int, str]:
        withdrawn = self._store.withdrawn(study.id)
        covered = self._consents.covering(
            Asked(
                study=study.study_hash,
                kind=kind_of(query),
                columns=frozenset(query.columns),
                purpose=study.purpose,
            )
        )
        out: dict[int, str] = {}
        for person in people:
            if person.state != "taking_part":
                out[person.number] = person.state
            elif person.number in withdrawn:
                out[person.number] = "withdrawn"
            elif person.number not in covered:
                out[person.number] = "consent"
        return out

    def _still(self, admission: Admission, now: int) -> Sequence[Person] | RefusedError:
        """Mark as spent; return those who may still be read, and tell everybody."""
        receipts = admission.receipts
        try:
            verify_time(admission.study, now)
        except RefusedError as refusal:
            settled = [
                (receipt, _with(admission.told_to(person), refusal))
                for person, receipt in receipts.items()
            ]
            self._receipts.settle(settled, "refused", now=now)
            return refusal
        self._budget.spend(admission.reserved)
        current = [person for person in self._store.people() if person.number in receipts]
        gone = self._unwilling(current, admission.study, admission.query)
        for number, rule in gone.items():
            told = _with(admission.told_to(number), RefusedError(REASONS[rule], rule=rule))
            self._receipts.settle([(receipts[number], told)], "refused", now=now)
        people = [person for person in current if person.number not in gone]
        left = self._budget.left_each(people)
        allowed = [
            (
                receipts[person.number],
                msgspec.structs.replace(admission.told_to(person.number), left=left[person.number]),
            )
            for person in people
        ]
        self._receipts.settle(allowed, "allowed", now=now)
        return people

    def _without(
        self, people: Sequence[Person], out: Mapping[int, str], contact: _Contact, *, tell: bool
    ) -> tuple[tuple[Person, ...], RefusedError | None]:
        """Those who are not out, and the refusal if there is nobody; tells those who are, why."""
        left = tuple(person for person in people if person.number not in out)
        for rule in dict.fromkeys(out.values()) if tell else ():
            refused = [person for person in people if out.get(person.number) == rule]
            self._tell(refused, RefusedError(REASONS[rule], rule=rule), contact)
        if left:
            return left, None
        if not out:
            return left, RefusedError("Nobody is in this store.", rule="consent")
        rules = list(out.values())
        common = max(dict.fromkeys(rules), key=rules.count)
        return left, RefusedError(REASONS[common], rule=common)

    # --- Receipts ------------------------------------------------------------------------------

    def _reserved(
        self, people: Sequence[Person], before: frozenset[int], told: Told, contact: _Contact
    ) -> Mapping[int, int]:
        """Whoever paid in an earlier round of the same answer pays nothing more, and hears so."""
        receipts: dict[int, int] = {}
        for paid, epsilon in ((False, told.epsilon), (True, 0.0)):
            group = [person for person in people if (person.number in before) is paid]
            if group:
                told = msgspec.structs.replace(told, epsilon=epsilon)
                receipts |= self._receipts.reserve(group, told, now=contact.now)
        return receipts

    def _tell(
        self, people: Sequence[Person], refusal: RefusedError, contact: _Contact
    ) -> RefusedError:
        told = _with(contact.told, refusal)
        self._receipts.give(people, "refused", told, now=contact.now)
        return refusal

    def _tell_all(self, refusal: RefusedError, contact: _Contact) -> RefusedError:
        self._receipts.give_all("refused", _with(contact.told, refusal), now=contact.now)
        return refusal


def _prepared(
    prepare: Prepare, request: ContactRequest, study: Study, query: DeclaredQuery
) -> None:
    try:
        prepare(request, study, query)
    except Exception as error:
        # Of whatever kind: what cannot begin must not cost anything.
        raise RefusedError(
            "No round can be made of it with this node: it was planned otherwise than approved.",
            rule="plan",
        ) from error


def _told(study: Study) -> Told:
    return Told(
        study=study.id,
        study_hash=study.study_hash,
        title=study.title,
        question=study.question,
        purpose=study.purpose,
        trust_model=study.trust_model,
    )


def _with(told: Told, refusal: RefusedError) -> Told:
    return msgspec.structs.replace(told, rule=refusal.rule, reason=refusal.reason)
