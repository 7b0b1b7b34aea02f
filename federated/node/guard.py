"""The guard: decides, before a row is read, whether a study gets an answer from this node.

Lives here: the rules and their order, and `Admission`, the one way to rows. Everything that comes
from the server is taken for hostile; whom to believe was told at enrolment (`node.enrolment`).

The rules, in order: `ledger` (this is the newest copy of the store), `manifest` (well-formed),
`signatures` (coordinator, ethics board, every site, by keys known since enrolment), `study_log`
(published in a log that continues the one seen so far, cosigned by a trusted witness), `code` and
`run_configuration` (equal to what was signed), `roster`, `trust_model`, `expired`, `columns`; then
for each person `paused`, `left`, `withdrawn`, `consent`; then `cohort`; then `cost` (the node's own
price, no dearer than promised); then for each person `repeat`, `rounds`, `study_budget`, `budget`.
The first that fails refuses, and leaves a receipt. What is allowed is reserved first, spent next,
and only then read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from federated.errors import (
    ApprovalError,
    FederatedError,
    LedgerError,
    ManifestError,
    RefusedError,
    StudyLogError,
)
from federated.manifest import ConfigValue, DeclaredQuery, Study
from federated.model import PersonRows, PrivacyCost
from federated.node import enrolment as enrolments
from federated.node.budget import Budget, Contact
from federated.node.consent import Asked, Consents
from federated.node.contact import ContactRequest
from federated.node.enrolment import Enrolment
from federated.node.receipts import Outcome, Receipts, Told
from federated.node.rules import (
    asked_query,
    enrolment_of,
    kind_of,
    parse_contact,
    typed,
    verify_claim,
    verify_cohort,
    verify_roster,
    verify_terms,
)
from federated.node.store import Person, Store
from federated.signed_study import SignedStudy, verify_study
from federated.study_log import parse_bundle, verify_bundle

_SLACK: Final = 1e-9
_MAX_REASON: Final = 500

#: What each rule about one person says on the person's receipt.
REASONS: Final[Mapping[str, str]] = {
    "paused": "You have paused. `havengate device resume` takes part again.",
    "left": "You have left. No study gets an answer from you.",
    "withdrawn": "You withdrew from this study.",
    "consent": (
        "You did not agree to this kind of question about these data for this purpose, or you "
        "took it back."
    ),
    "repeat": "This question was answered in this round already; an answer is given once.",
    "rounds": "The study has asked as often as it said that it would.",
    "study_budget": "The study would spend more on you than it promised.",
    "budget": "It would spend more than your privacy budget.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardPorts:
    """What the guard cannot know by itself.

    `price` is what one answer costs a person, from the query's own sensitivity and the declared
    noise; it raises `FederatedError` where there is no bound. `code_hash` is that of the code
    installed here (`federated.code_hash`).
    """

    price: Callable[[Study, DeclaredQuery], PrivacyCost]
    code_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """That these people are answered for. Only `Guard.rows` makes rows of it, once."""

    study: Study
    query: DeclaredQuery
    cost: PrivacyCost
    people: tuple[Person, ...] = field(repr=False)
    request: ContactRequest = field(repr=False)
    told: Told = field(repr=False)
    reserved: tuple[int, ...] = field(repr=False)
    #: The one right to read; taken by the first reader.
    ticket: list[None] = field(default_factory=lambda: [None], repr=False, compare=False)


class Guard:
    """The guard of one node. Safe for several threads and processes on one store."""

    def __init__(self, store: Store, budget: Budget, ports: GuardPorts) -> None:
        self._store = store
        self._budget = budget
        self._ports = ports
        self._consents = Consents(store)
        self._receipts = Receipts(store)

    def admit(
        self,
        request: bytes | ContactRequest,
        *,
        configuration: Mapping[str, ConfigValue],
        now: int,
    ) -> Admission:
        """Decide about one contact; reserve what it costs those who are let in.

        `configuration` is the whole run configuration that the run was really given. Raises
        `RefusedError` with the rule and a reason in plain words if nobody is let in; each person
        concerned then has a receipt. No row is read here.
        """
        with self._store.database.transaction():
            # Decided and recorded in one transaction, refusals too: raising inside would undo them.
            verdict = self._decide(request, configuration, now)
        if isinstance(verdict, RefusedError):
            raise verdict
        return verdict

    def rows(self, admission: Admission, *, now: int) -> Iterator[tuple[Person, PersonRows]]:
        """The rows of those let in, person by person: only the query's columns.

        Marks what was reserved as spent before the first is read. Whoever paused, left, withdrew or
        took consent back since is left out; what was reserved on them stays spent. Raises
        `RefusedError` if these rows were read before.
        """
        with self._store.database.transaction():
            # Popping is atomic: of two readers one finds nothing.
            if not admission.ticket:
                raise RefusedError("The rows of an answer are read once.", rule="repeat")
            admission.ticket.pop()
            self._budget.spend(admission.reserved)
            people = self._still(admission, now)
        columns = frozenset(admission.query.columns)
        for person in people:
            yield person, self._store.rows(person, columns)

    def failed(self, admission: Admission, reason: str, *, now: int) -> None:
        """Tell those let in that the round came to nothing. What was reserved stays spent."""
        told = msgspec.structs.replace(admission.told, reason=reason)
        self._receipts.give(admission.people, "failed", told, now=now)

    # --- The order of the rules ----------------------------------------------------------------

    def _decide(
        self,
        request: bytes | ContactRequest,
        configuration: Mapping[str, ConfigValue],
        now: int,
    ) -> Admission | RefusedError:
        told = Told()
        try:
            # An older copy believes, and remembers, whom it should not any more.
            self._verify_ledger()
            parsed, signed = parse_contact(request)
            enrolled = enrolment_of(self._store)
            self._verify_published(parsed, signed, enrolled)
            study = signed.study
            told = _told(study)
            self._verify_run(study, configuration)
            verify_roster(parsed, study, enrolled)
            verify_terms(study, enrolled, now)
            query = asked_query(study, parsed)
            told = msgspec.structs.replace(told, query=query.name, columns=query.columns)
        except RefusedError as refusal:
            self._tell_all(refusal, told, now)
            return refusal
        return self._decide_for_people(parsed, study, query, enrolled, told, now)

    def _decide_for_people(
        self,
        request: ContactRequest,
        study: Study,
        query: DeclaredQuery,
        enrolled: Enrolment,
        told: Told,
        now: int,
    ) -> Admission | RefusedError:
        everybody = self._store.people()
        out = self._unwilling(everybody, study, query)
        people, refusal = self._without(everybody, out, told, now)
        if refusal is not None:
            return refusal
        try:
            verify_cohort(request, study, enrolled, len(everybody))
            cost = self._price(study, query)
        except RefusedError as found:
            self._tell(people, found, told, now)
            return found
        contact = Contact(
            study=study.id, study_hash=study.study_hash, query=query.name,
            run=request.run, round_number=request.round_number, cost=cost,
        )  # fmt: skip
        poor = self._budget.judge(
            people, contact, epsilon=study.epsilon, delta=study.delta, answers=study.rounds
        )
        people, refusal = self._without(people, poor, told, now)
        if refusal is not None:
            return refusal
        try:
            verify_claim(request, enrolled, len(people))
        except RefusedError as found:
            self._tell(people, found, told, now)
            return found
        reserved = self._budget.reserve(people, contact, now=now)
        told = msgspec.structs.replace(told, epsilon=cost.epsilon, people=len(people))
        return Admission(
            study=study, query=query, cost=cost, people=people, request=request,
            told=told, reserved=reserved,
        )  # fmt: skip

    # --- Rules about the contact ---------------------------------------------------------------

    def _verify_published(
        self, request: ContactRequest, signed: SignedStudy, enrolled: Enrolment
    ) -> None:
        try:
            verify_study(signed, enrolled.trusted())
        except (ApprovalError, ManifestError) as error:
            raise RefusedError(
                f"The study is not signed by everybody who must agree: {error}", rule="signatures"
            ) from error
        try:
            memory = verify_bundle(
                parse_bundle(request.proof),
                study_hash=signed.study.study_hash,
                remembered=enrolments.remembered(self._store, enrolled.origin),
                log_keys=enrolled.log_verifiers(),
                witness_keys=enrolled.witness_verifiers(),
                witnesses=enrolled.witnesses,
            )
        except StudyLogError as error:
            raise RefusedError(
                f"That the study was published is not proven: {error}", rule="study_log"
            ) from error
        except ValueError as error:
            raise RefusedError(
                "That the study was published is not proven: the proof is malformed.",
                rule="study_log",
            ) from error
        enrolments.remember(self._store, memory)

    def _verify_run(self, study: Study, configuration: Mapping[str, ConfigValue]) -> None:
        if study.code_hash != self._ports.code_hash:
            raise RefusedError(
                "The study was approved for another version of the program than the one that is "
                "installed here.",
                rule="code",
            )
        if typed(configuration) != typed(study.run_configuration()):
            raise RefusedError(
                "The run was started with other settings than those that were approved.",
                rule="run_configuration",
            )

    def _price(self, study: Study, query: DeclaredQuery) -> PrivacyCost:
        try:
            cost = self._ports.price(study, query)
        except FederatedError as error:
            raise RefusedError(
                "What an answer would cost cannot be bounded here.", rule="cost"
            ) from error
        # Said so that a figure that is no number is refused too.
        kept = 0 < cost.epsilon <= query.epsilon * (1 + _SLACK) and 0 <= cost.delta <= query.delta
        if not kept or cost.noise != query.noise:
            raise RefusedError(
                f"An answer would cost ε = {cost.epsilon:.3g}; the study promised "
                f"{query.epsilon:.3g}.",
                rule="cost",
            )
        return cost

    def _verify_ledger(self) -> None:
        try:
            self._budget.ready()
        except LedgerError as error:
            raise RefusedError(str(error), rule="ledger") from error

    # --- Rules about people --------------------------------------------------------------------

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

    def _still(self, admission: Admission, now: int) -> Sequence[Person]:
        admitted = {person.number for person in admission.people}
        current = [person for person in self._store.people() if person.number in admitted]
        gone = self._unwilling(current, admission.study, admission.query)
        self._without(current, gone, admission.told, now)
        people = [person for person in current if person.number not in gone]
        told = [
            (person, msgspec.structs.replace(admission.told, left=self._budget.left(person)))
            for person in people
        ]
        self._receipts.give_each(told, "allowed", now=now)
        return people

    def _without(
        self, people: Sequence[Person], out: Mapping[int, str], told: Told, now: int
    ) -> tuple[tuple[Person, ...], RefusedError | None]:
        """Tell those who are out why; return the others, or the refusal if there is nobody."""
        left = tuple(person for person in people if person.number not in out)
        for rule in dict.fromkeys(out.values()):
            refused = [person for person in people if out.get(person.number) == rule]
            self._tell(refused, RefusedError(REASONS[rule], rule=rule), told, now)
        if left:
            return left, None
        if not out:
            return left, RefusedError("Nobody is in this store.", rule="consent")
        rules = list(out.values())
        common = max(dict.fromkeys(rules), key=rules.count)
        return left, RefusedError(REASONS[common], rule=common)

    # --- Receipts ------------------------------------------------------------------------------

    def _tell(self, people: Sequence[Person], refusal: RefusedError, told: Told, now: int) -> None:
        self._receipts.give(people, "refused", _with(told, refusal), now=now)

    def _tell_all(self, refusal: RefusedError, told: Told, now: int) -> None:
        outcome: Outcome = "refused"
        self._receipts.give_all(outcome, _with(told, refusal), now=now)


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
    # Part of a reason may be what the server sent: nothing in it may steer a terminal, or be long.
    plain = "".join(c if c.isprintable() else "?" for c in refusal.reason[:_MAX_REASON])
    return msgspec.structs.replace(told, rule=refusal.rule, reason=plain)
