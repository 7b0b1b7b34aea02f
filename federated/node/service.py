"""What answers on a node: the guard first, then one round of secure aggregation after the other.

Lives here: which stage is answered from what, and that a person's rows reach nothing but the
query's integers. The guard is `node.guard`, the protocol `aggregation.client`, the network
`node.agent` (or, at a clinic with Flower's own SuperNode, `node.socket`). No thread of its own: one
call at a time.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

import numpy as np
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from federated.aggregation.client import Client, SecureClient
from federated.aggregation.messages import Begin
from federated.aggregation.messages import parse as parse_stage
from federated.aggregation.plan import RoundPlan
from federated.aggregation.trusted import TrustedClient
from federated.errors import FederatedError, ProtocolError
from federated.manifest import ConfigValue, DeclaredQuery, Study
from federated.model import NO_ROWS, Carried, Contribution, PersonRows, Query, RandomBits, Whole
from federated.node import enrolment
from federated.node.contact import ContactRequest
from federated.node.guard import Admission, Guard
from federated.node.past import Brought, Past, expire
from federated.node.store import Person, Store
from federated.rounds import (
    GREET,
    Ask,
    Greeting,
    Roster,
    encode,
    first_rounds,
    parse,
    round_plan,
    sign_reply,
)

_LOG = structlog.get_logger("federated.node")
#: A round whose next request does not come for so long is over here: its secrets are dropped.
_PATIENCE_S: Final = 900.0
#: And so is one that began so long ago, however often it is asked: five stages of ten minutes.
_LONGEST_ROUND_S: Final = 3000.0
#: How often it is looked whether something is kept of studies whose time is over.
_EXPIRY_S: Final = 3600.0
#: How long what was brought to a training is kept if nobody asks for it.
_KEPT_S: Final = 30 * 86_400
#: Of so many people it is written at once.
_KEPT_AT_ONCE: Final = 256
_TURN_LABEL: Final = b"havengate/turn-name/v1"


class Facts(Protocol):
    """What the network says a run is (`node.agent.RunFacts`)."""

    @property
    def run_id(self) -> int:
        """Flower's id of the run."""
        ...

    @property
    def configuration(self) -> Mapping[str, ConfigValue]:
        """The run configuration, whole."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePorts:
    """What a node's service stands on.

    `query` makes a query of a declaration (`DeclaredQuery.ask`); `now` is Unix time in seconds;
    `ticks` a monotonic clock in seconds.
    """

    store: Store = field(repr=False)
    guard: Guard
    identity: Ed25519PrivateKey = field(repr=False)
    query: Callable[[str], Query]
    random: RandomBits = field(repr=False)
    now: Callable[[], float]
    ticks: Callable[[], float]


@dataclass(slots=True, kw_only=True)
class _Round:
    run_id: int
    admission: Admission
    client: Client
    began: float
    at: float


class NodeService:
    """Answers stages. Keeps the secrets of one round at most."""

    def __init__(self, ports: NodePorts) -> None:
        self._ports = ports
        self._round: _Round | None = None
        self._expiring = -math.inf

    def respond(self, facts: Facts, stage: str, payload: bytes) -> bytes:
        """Answer one stage, signed. Raises `FederatedError`, and nobody hears why but the person.

        `RefusedError` is the guard's; everything else ends the round here, and is a
        `ProtocolError`, a bug of this node too: its people have a receipt either way.
        """
        try:
            # Where messages keep coming, nobody else looks for what is over.
            self.tidy()
            answer = self._greet(facts, payload) if stage == GREET else self._answer(facts, payload)
        except FederatedError:
            raise
        except Exception as error:  # noqa: BLE001 - a bug must not say more than a refusal
            # Only the kind: a message may hold what was being worked on.
            _LOG.error("federated.node.bug", stage=stage[:32], error=type(error).__name__)
            raise ProtocolError("This node cannot answer: the round is over here.") from None
        return sign_reply(
            self._ports.identity, answer, run_id=facts.run_id, stage=stage, request=payload
        )

    def tidy(self) -> None:
        """Give up a round that is over by its time; tell its people so."""
        current, ticks = self._round, self._ports.ticks()
        if ticks >= self._expiring:
            self._expiring = ticks + _EXPIRY_S
            self._expire()
        if current is None:
            return
        if ticks - current.at > _PATIENCE_S or ticks - current.began > _LONGEST_ROUND_S:
            self._give_up("It was not finished in time.")

    def _expire(self) -> None:
        try:
            expire(self._ports.store, int(self._ports.now()))
        except FederatedError as error:
            # It is looked again; a store that cannot be written refuses what matters by itself.
            _LOG.warning("federated.node.not_expired", **error.diagnostics())

    def _greet(self, facts: Facts, payload: bytes) -> bytes:
        """Say for how many people this node would answer what the greeting asks about."""
        ports = self._ports
        foreseen = ports.guard.foresee(
            payload, configuration=facts.configuration, now=int(ports.now())
        )
        question = foreseen.question
        _verify_run_id(question.run, facts)
        ports.query(foreseen.query.ask).verify_here()
        memory = enrolment.remembered(ports.store, enrolment.enrolled(ports.store).origin)
        return encode(
            Greeting(
                study=foreseen.study_hash,
                query=question.query,
                run=question.run,
                round_number=question.round_number,
                people=foreseen.people,
                log_size=memory.size,
            )
        )

    def _answer(self, facts: Facts, payload: bytes) -> bytes:
        ask = parse(Ask, payload)
        if ask.contact:
            # What is refused, or came twice, must not cost those of a round that is under way.
            begun = self._begin(facts, ask)
            self._give_up("Another round began before this one was over.")
            self._round = begun
        current = self._current(facts)
        answered = False
        try:
            answer = current.client.answer(ask.request)
            answered = True
        finally:
            if not answered:
                self._give_up("What the coordinator sent, or this node, was not in order.")
        if current.client.finished:
            self._round = None
        return answer

    def _current(self, facts: Facts) -> _Round:
        self.tidy()
        current = self._round
        if current is None or current.run_id != facts.run_id:
            raise ProtocolError("There is no such round here.")
        current.at = self._ports.ticks()
        return current

    def _give_up(self, reason: str) -> None:
        current, self._round = self._round, None
        if current is None:
            return
        try:
            self._ports.guard.failed(current.admission, reason, now=int(self._ports.now()))
        except FederatedError as error:
            # The receipt goes on saying that it was reserved and never finished.
            _LOG.warning("federated.node.not_told", **error.diagnostics())

    def _begin(self, facts: Facts, ask: Ask) -> _Round:
        """Let the guard decide. What could fail without it is tried before anything is reserved."""
        ports = self._ports
        summand = _Summand(ports=ports)
        clients: list[Client] = []

        def prepare(request: ContactRequest, study: Study, declared: DeclaredQuery) -> None:
            _verify_run_id(request.run, facts)
            query = ports.query(declared.ask)
            query.verify_here()
            index = self._index(study, declared, request, query)
            summand.asked, summand.study = query.begin(request.given, index=index), study.id
            plan = round_plan(
                study,
                declared,
                query,
                round_id=round_name(request),
                taking_part=roster_of(request),
                given=request.given,
            )
            # Whoever sends another plan than it told this node of gets no round, and costs nobody.
            parse_stage(Begin, ask.request, plan)
            clients.append(self._client(plan, summand, query.gap))

        admission = ports.guard.admit(
            ask.contact, configuration=facts.configuration, now=int(ports.now()), prepare=prepare
        )
        summand.admission = admission
        began = ports.ticks()
        return _Round(
            run_id=facts.run_id, admission=admission, client=clients[0], began=began, at=began
        )

    def _index(
        self, study: Study, declared: DeclaredQuery, request: ContactRequest, query: Query
    ) -> int:
        """Which of a question's rounds it is. Raises `ProtocolError` for one that it has not."""
        if query.rounds == 1:
            return 0
        first = first_rounds(study, lambda one: self._ports.query(one.ask).rounds)
        index = request.round_number - first[declared.name]
        if not 0 <= index < query.rounds:
            raise ProtocolError("The question has no round of that number.")
        return index

    def _client(self, plan: RoundPlan, summand: _Summand, gap: int) -> Client:
        ports = self._ports
        enrolled = enrolment.enrolled(ports.store)
        node = enrolled.node
        if plan.trust_model == "trusted_server":
            return TrustedClient(plan=plan, node=node, contribution=summand)
        return SecureClient(
            plan=plan,
            node=node,
            identity=ports.identity,
            contribution=summand,
            random=ports.random,
            minimum_people=enrolled.minimum_cohort * gap,
        )


@dataclass(slots=True, kw_only=True)
class _Summand:
    """The sum over those let in, read when the round asks for it."""

    ports: NodePorts
    asked: Contribution | None = None
    study: str = ""
    admission: Admission | None = None

    def __call__(self) -> NDArray[np.int64]:
        """Each person counts at most as far as the query says, whatever their rows hold.

        Whether an answer comes must not depend on rows: an answer that does not come is seen
        without any noise. So a person whose vector cannot be made counts as zeros.
        """
        asked, admission = self.asked, self.admission
        if asked is None or admission is None:
            raise ProtocolError("The round has not begun.")
        total = np.zeros(asked.dimension, np.int64)
        people = self.ports.guard.rows(admission, now=int(self.ports.now()))
        if isinstance(asked, Whole):
            return self._whole(asked, admission, people, total)
        if isinstance(asked, Carried):
            return self._carried(asked, admission, people, total)
        for person, rows in people:
            total += self._asked(asked, person, rows)
        return total

    def _asked(self, asked: Contribution, person: Person, rows: PersonRows) -> NDArray[np.int64]:
        """What the person adds; zeros, after the same work, for who is not asked.

        Else how long it takes would tell who is held out.
        """
        vector = self._bounded(asked, lambda: asked.encode(rows, self.ports.random))
        mine = asked.asks(study=self.study, tag=self.ports.store.tag(person))
        return vector if mine else np.zeros_like(vector)

    def _whole(
        self,
        asked: Whole,
        admission: Admission,
        people: Iterable[tuple[Person, PersonRows]],
        total: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """What the node makes of all its people at once; who is not asked is not among them."""
        tag, counted = self.ports.store.tag, len(admission.people)
        rows = [
            own if asked.asks(study=self.study, tag=tag(person)) else NO_ROWS
            for person, own in people
        ]
        found = self._bounded(
            asked,
            lambda: asked.whole(
                rows, people=counted, noise=admission.query.noise, random=self.ports.random
            ),
            times=counted,
        )
        return total + found

    def _carried(
        self,
        asked: Carried,
        admission: Admission,
        people: Iterable[tuple[Person, PersonRows]],
        total: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """The same where something of earlier rounds is sent too, and something kept for later."""
        study = admission.study
        past = Past(store=self.ports.store, study=study.study_hash, query=admission.query.name)
        later: dict[Person, Brought] = {}
        for person, rows in people:
            known = past.of(person, dimension=asked.dimension)
            brought = dict(known)
            tag = turn_tag(self.ports.identity, person.name)
            if asked.has_turn(study=self.study, tag=tag):
                brought[asked.index] = self._asked(asked, person, rows)
            total += self._bounded(asked, partial(asked.combined, brought))
            needed = asked.needed(brought)
            if needed.keys() != known.keys():
                later[person] = needed
            if len(later) >= _KEPT_AT_ONCE:
                self._keep(past, admission, later)
                later = {}
        self._keep(past, admission, later)
        return total

    def _keep(self, past: Past, admission: Admission, later: Mapping[Person, Brought]) -> None:
        guard, until = self.ports.guard, int(self.ports.now()) + _KEPT_S
        try:
            with self.ports.store.database.transaction():
                # Who took something back since has let go of all that was kept, and keeps nothing
                # new, however soon they agreed again.
                still = guard.willing(admission)
                past.keep(
                    {who: one for who, one in later.items() if who.number in still},
                    until=min(until, admission.study.valid_until),
                )
        except FederatedError as error:
            # Later sums are less accurate for it; this one is as good as ever.
            _LOG.warning("federated.node.past_not_kept", **error.diagnostics())

    def _bounded(
        self, asked: Contribution, make: Callable[[], NDArray[np.int64]], *, times: int = 1
    ) -> NDArray[np.int64]:
        try:
            vector = make()
            if vector.shape == (asked.dimension,) and vector.dtype == np.int64:
                return vector.clip(-asked.bound * times, asked.bound * times)
            error = "shape"
        except Exception as caught:  # noqa: BLE001 - whatever rows make of it
            error = type(caught).__name__
        _LOG.error("federated.node.left_out", error=error)
        return np.zeros(asked.dimension, np.int64)


def turn_tag(identity: Ed25519PrivateKey, person: str) -> str:
    """What turns go by (`learning.turns`): a person's name under a secret of the node's own key.

    As long as the key is in a roster a person has the same, in whatever store.
    """
    secret = hmac.digest(identity.private_bytes_raw(), _TURN_LABEL, "sha256")
    return hmac.digest(secret, person.encode(), "sha256").hex()


def _verify_run_id(run: str, facts: Facts) -> None:
    if run != str(facts.run_id):
        raise ProtocolError("The request is of another run than the one it came with.")


def round_name(request: ContactRequest) -> str:
    """The round's id, by which its messages and its reservation are told apart."""
    return f"{request.run}-{request.round_number}"


def roster_of(request: ContactRequest) -> Roster:
    """Those of the request's roster who take part."""
    return Roster(
        keys={node: request.roster[node] for node in request.taking_part},
        people=request.taking_part,
    )
