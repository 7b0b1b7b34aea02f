"""What handlers of content work with: questions to the rules, facts, keys, the app, and the log.

One `Enforcement` lives as long as one exchange. Handlers (`gateway.fhir.handler`,
`gateway.content.handler`) know what a request means; this knows what must happen in which order,
and keeps what the log will say. All methods that need the world are generators of commands, to be
used with `yield from`; the others are pure.

Order that a handler keeps: `know` the patients, `ask`, `begin`, then `fetch`, then for each record
of the answer `know`, `ask`, `release` or `withhold`. Before `begin` only reading is possible.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from gateway.core.commands import (
    Answer,
    Assert,
    Command,
    Facts,
    Failed,
    Fetch,
    Fetched,
    LoadFacts,
    LoadKeys,
    MakeReady,
    Recorded,
    RecordIntent,
    Signal,
)
from gateway.core.entries import Trail
from gateway.core.messages import RequestHead, ResponseHead
from gateway.core.questions import Question
from gateway.errors import NotAtHandError, UnavailableError, UpstreamError, UpstreamTimeoutError
from gateway.identity.model import Identified
from gateway.routes import Route, upstream_path
from gateway.settings import LimitSettings
from policies import consent, model
from policies.labels import Labeller, Labels
from policies.model import Allowed, ConsentVerdict, Decision, Denied, Purpose
from policies.obligations import ALL, Obligation, Pseudonymise, Review, StepUp
from policies.store import InForce

__all__ = ["Enforcement", "Question", "RefusedError", "Reply", "Sealer", "Steps"]

type Steps[T] = Generator[Command, Answer, T]

#: The name of the header in which the app receives the statement about who asks.
IDENTITY_HEADER = "havengate-identity"

_NOT_KNOWN = Denied(
    reason="It is not known how you stand to this patient.",
    rules=(),
    remedy=model.Remedy(kind="operator"),
    failure="gateway.relation_unknown",
)


class RefusedError(Exception):
    """The rules say no to the exchange as a whole: the handler stops, the core answers.

    `hide`: the client must not learn whether the record exists (answered as 404).
    """

    def __init__(self, denied: Denied, *, hide: bool = False) -> None:
        super().__init__(denied.reason)
        self.denied = denied
        self.hide = hide


class Sealer(Protocol):
    """Seals and opens, without I/O once keys are loaded. Raises a `KeysError`."""

    @property
    def generation(self) -> int:
        """Another number whenever keys were forgotten: then forget what was made with them."""
        ...

    def seal(self, *, person: str, service: str, field: str, plaintext: bytes) -> str:
        """Seal one element for a person (`Patient/7`)."""
        ...

    def unseal(self, *, person: str, service: str, field: str, text: str) -> bytes:
        """Open one. Raises `PersonErasedError`, or `UnsealError` if it is not authentic."""
        ...

    def opener(
        self, *, person: str, service: str, sealed: Sequence[tuple[str, str]]
    ) -> Callable[[], list[bytes]]:
        """What opens these elements (`field`, `text`) anew at each call, as `unseal` does.

        Good until `generation` changes; raises as `unseal`, for all of them together.
        """
        ...

    def token_for_write(self, *, service: str, field: str, value: bytes) -> str:
        """The blind-index token to store. May raise `NotAtHandError`."""
        ...

    def tokens_for_search(self, *, service: str, field: str, value: bytes) -> list[str]:
        """The tokens to search for. May raise `NotAtHandError`."""
        ...

    def pseudonym(self, *, purpose: Purpose, kind: str, value: str) -> str:
        """A stable stand-in for an identifier, other for each purpose and installation.

        May raise `NotAtHandError`.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a handler gives back: an answer ready to be released once the outcome is durable."""

    head: ResponseHead
    body: bytes = field(default=b"", repr=False)


class Enforcement:
    """See the module. Attributes are read-only for handlers.

    `now` is Unix time in seconds and stays the same throughout the exchange.
    """

    def __init__(
        self,
        *,
        head: RequestHead,
        route: Route,
        identified: Identified,
        in_force: InForce,
        sealer: Sealer,
        limits: LimitSettings,
        trail: Trail,
        now: float,
        opaque: bool = False,
    ) -> None:
        self.head = head
        self.route = route
        self.identified = identified
        self.limits = limits
        self.labeller: Labeller = in_force.labeller
        self.sealer = sealer
        self.now = now
        self.trail = trail
        self._opaque = opaque
        self._engine = in_force.engine
        self._enforceable = OPAQUE if opaque else ALL
        # What is not looked into carries at least the labels of everything in such a service.
        self._least = (
            in_force.labeller.label_codes((), kind=route.settings.kind) if opaque else Labels()
        )
        self._principal = identified.principal
        self._consents: dict[str, tuple[consent.Consent, ...]] = {}
        # Records of one kind, patient and author are one question, unless a rule or a consent
        # looks at the single record.
        self._answers: dict[tuple[object, ...], Decision] = {}
        self._reads_ids = in_force.engine.reads_ids
        self._assertion: str | None = None

    def anew(self, identified: Identified, *, in_force: InForce, now: float) -> Enforcement:
        """The same exchange for questions of later: nothing is known yet, nothing was asked."""
        return Enforcement(
            head=self.head,
            route=self.route,
            identified=identified,
            in_force=in_force,
            sealer=self.sealer,
            limits=self.limits,
            trail=self.trail,
            now=now,
            opaque=self._opaque,
        )

    # --- Facts and questions ----------------------------------------------------------------------

    def know(self, patients: Collection[str]) -> Steps[None]:
        """Learn relations and consents of patients not known yet.

        Raises `UnavailableError` when they cannot be learnt.
        """
        unknown = frozenset(patients).difference(self._consents)
        if not unknown:
            return
        answer = yield LoadFacts(route=self.route, identified=self.identified, patients=unknown)
        if not isinstance(answer, Facts) or not unknown <= answer.consents.keys():
            raise unavailable(answer)
        team = self._principal.care_team | (answer.care_team & unknown)
        self._principal = replace(self._principal, care_team=team)
        # Relations are part of every question.
        self._answers.clear()
        self._consents |= {patient: answer.consents[patient] for patient in unknown}

    def consented(self, patient: str | None) -> bool:
        """Whether there is any consent of a patient to look at, as far as is known."""
        return bool(self._consents.get(patient or ""))

    def ask(self, question: Question) -> Decision:
        """Ask the rules. Never raises; what cannot be decided is denied.

        Patients must be known before (`know`), or the answer is a denial. Whoever has an open
        break-glass for the patient is asked for again under that purpose if he is denied otherwise.
        """
        if question.patient is not None and question.patient not in self._consents:
            return _NOT_KNOWN
        if self._reads_ids or self.consented(question.patient):
            return self._asked(question)
        key = (
            question.action,
            question.type,
            question.patient,
            question.authors,
            question.labels,
        )
        known = self._answers.get(key)
        if known is None:
            known = self._answers[key] = self._asked(question)
        return known

    def _asked(self, question: Question) -> Decision:
        decision = self._decide(question, self.identified.purpose)
        grant = self.identified.break_glass
        if (
            isinstance(decision, Allowed)
            or decision.failure is not None
            or grant is None
            or question.patient not in grant.patients
        ):
            return decision
        again = self._decide(question, "BTG")
        return again if isinstance(again, Allowed) else decision

    def demand(self, question: Question, *, hide: bool = False) -> Allowed:
        """Ask, and raise `RefusedError` unless allowed. What is allowed is noted for the log."""
        decision = self.ask(question)
        self.trail.asked(question, decision)
        if isinstance(decision, Denied):
            raise RefusedError(decision, hide=hide)
        self._note_break_glass(decision)
        return decision

    def _decide(self, question: Question, purpose: Purpose) -> Decision:
        authors = question.authors & self._principal.references
        labels = question.labels | self._least
        request = model.Request(
            principal=self._principal,
            action=question.action,
            resource=model.Resource(
                service=self.route.name,
                kind=self.route.settings.kind,
                type=question.type,
                id=question.id,
                patient=question.patient,
                author=next(iter(authors), None) or next(iter(question.authors), None),
                labels=labels.codes,
                confidentiality=labels.confidentiality,
            ),
            context=model.Context(
                purpose=purpose,
                now=self.now,
                client=self.identified.client,
                break_glass=self.identified.break_glass,
            ),
        )
        consents = self._consents.get(question.patient or "", ())
        if consents:
            verdict = consent.judge(consents, request, codes=question.codes)
            if verdict != _NO_VERDICT:
                request = replace(request, context=replace(request.context, consent=verdict))
        return self._engine.decide(request, enforceable=self._enforceable)

    def _note_break_glass(self, allowed: Allowed) -> None:
        if self.identified.break_glass is not None and "break-glass.open" in allowed.rules:
            self.trail.broke_glass()

    # --- The log ----------------------------------------------------------------------------------

    def begin(
        self, questions: Iterable[Question] = (), *, counts: dict[str, int] | None = None
    ) -> Steps[None]:
        """Make the intent durable: once, before anything that changes something.

        `questions` are those that were allowed. Raises `UnavailableError` if the log cannot be
        written.
        """
        if self.trail.begun is not None:
            raise RuntimeError("An exchange begins once.")
        for question in questions:
            self.trail.touched(question)
        answer = yield RecordIntent(act=self.trail.act("allow", counts=counts))
        if not isinstance(answer, Recorded):
            raise unavailable(answer)
        self.trail.begun = answer.begun

    def release(self, question: Question, allowed: Allowed) -> tuple[Obligation, ...]:
        """Note that a record will be released; return the obligations to carry out on it."""
        self.trail.released(question, allowed)
        self._note_break_glass(allowed)
        return allowed.obligations

    def withhold(self, question: Question, denied: Denied) -> None:
        """Note that a record was left out."""
        self.trail.withheld(question, denied)

    def count(self, name: str, number: int = 1) -> None:
        """Add to a number that the log will show (`returned`, `total`, …)."""
        self.trail.count(name, number)

    # --- Keys and the app -------------------------------------------------------------------------

    def load_keys(self, *, persons: Iterable[str] = (), texts: Iterable[str] = ()) -> Steps[None]:
        """Bring keys into memory. Raises `UnavailableError` when they cannot be."""
        wanted, sealed = frozenset(persons), tuple(texts)
        if not wanted and not sealed:
            return
        answer = yield LoadKeys(persons=wanted, texts=sealed)
        if answer is not Signal.DONE:
            raise unavailable(answer)

    def at_hand[T](self, step: Callable[[], T]) -> Steps[T]:
        """The value of a pure step with `sealer`: what it lacks is loaded, and it begins anew.

        `step` may run many times, so it notes nothing. Raises `UnavailableError`.
        """
        for _ in range(_MOST_LOADS):
            try:
                return step()
            except NotAtHandError as error:
                name = error.name
            answer = yield MakeReady(name=name)
            if answer is not Signal.DONE:
                raise unavailable(answer)
        raise NotAtHandError

    def name_ahead(
        self, obligations: Iterable[Obligation], show: Callable[[], object]
    ) -> Steps[None]:
        """Bring pseudonyms into memory that `show` will need to carry obligations out."""
        if any(isinstance(one, Pseudonymise) for one in obligations):
            yield from self.at_hand(show)

    def fetch(self, head: RequestHead, body: bytes = b"") -> Steps[Fetched]:
        """Ask the app, the statement of identity added. Raises an `UpstreamError`.

        `head.path` is as the client would write it, below the route's base. Before `begin` only
        GET is sent.
        """
        if self.trail.begun is None and head.method != "GET":
            raise RuntimeError("Nothing is changed before the intent is durable.")
        addressed = yield from self.address(head)
        limit = self.limits.inspected_answer_bytes
        answer = yield Fetch(route=self.route, head=addressed, body=body, limit=limit)
        if not isinstance(answer, Fetched):
            raise upstream_failure(answer)
        return answer

    def address(self, head: RequestHead) -> Steps[RequestHead]:
        """The request as the app gets it: its own path, and the statement about who asks."""
        if self._assertion is None:
            answer = yield Assert(route=self.route, identified=self.identified)
            if not isinstance(answer, bytes):
                raise unavailable(answer)
            self._assertion = answer.decode("ascii")
        return replace(
            head,
            path=upstream_path(self.route, self.route.base + head.path),
            headers=head.headers.with_(IDENTITY_HEADER, self._assertion),
        )


#: One record names fewer persons and values than this, or it is not released.
_MOST_LOADS: Final = 1_000

#: What can be done about content that nobody looks into.
OPAQUE: Final = frozenset[type]((StepUp, Review))

_NO_VERDICT = ConsentVerdict()


def unavailable(answer: object) -> UnavailableError:
    """What to raise when something of the gateway's own did not answer as it should."""
    if isinstance(answer, Failed):
        return UnavailableError(answer.message or "Something that is needed is down.", answer.code)
    return UnavailableError("Something that is needed gave no usable answer.", "gateway.internal")


def upstream_failure(answer: object) -> UpstreamError:
    """What to raise when the app did not answer as it should."""
    if not isinstance(answer, Failed):
        return UpstreamError("The app behind gave no usable answer.")
    kind = UpstreamTimeoutError if answer.timed_out else UpstreamError
    error = kind(answer.message or "The app behind did not answer.")
    error.code = answer.code
    return error
