"""What answers on a node: the guard first, then one round of secure aggregation after the other.

Lives here: which stage is answered from what, and that a person's rows reach nothing but the
query's integers. The guard is `node.guard`, the protocol `aggregation.client`, the network
`node.agent` (or, at a clinic with Flower's own SuperNode, `node.socket`). No thread of its own: one
call at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from federated.aggregation.client import Client, SecureClient
from federated.aggregation.trusted import TrustedClient
from federated.errors import FederatedError, ProtocolError
from federated.manifest import ConfigValue, Study
from federated.model import PersonRows, Query, RandomBits
from federated.node import enrolment
from federated.node.contact import ContactRequest, parse_request
from federated.node.guard import Admission, Guard
from federated.node.store import Store
from federated.rounds import (
    GREET,
    Ask,
    Greeting,
    Roster,
    encode,
    parse,
    round_plan,
    sign_reply,
)

#: A round whose next request does not come for so long is over here: its secrets are dropped.
_PATIENCE_S = 900.0


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
    at: float


class NodeService:
    """Answers stages. Keeps the secrets of one round at most."""

    def __init__(self, ports: NodePorts) -> None:
        self._ports = ports
        self._round: _Round | None = None

    def respond(self, facts: Facts, stage: str, payload: bytes) -> bytes:
        """Answer one stage, signed. Raises `FederatedError`, and nobody hears why but the person.

        `RefusedError` is the guard's; everything else ends the round here.
        """
        answer = self._greet() if stage == GREET else self._answer(facts, payload)
        return sign_reply(
            self._ports.identity, answer, run_id=facts.run_id, stage=stage, request=payload
        )

    def tidy(self) -> None:
        """Give up a round whose next request has not come for long; tell its people so."""
        current = self._round
        if current is not None and self._ports.ticks() - current.at > _PATIENCE_S:
            self._give_up("The round came to nothing: it was not finished in time.")

    def _greet(self) -> bytes:
        store = self._ports.store
        people = [person for person in store.people() if person.state == "taking_part"]
        memory = enrolment.remembered(store, enrolment.enrolled(store).origin)
        return encode(Greeting(people=len(people), log_size=memory.size))

    def _answer(self, facts: Facts, payload: bytes) -> bytes:
        ask = parse(Ask, payload)
        if ask.contact:
            self._give_up("Another round began before this one was over.")
            self._round = self._begin(facts, ask.contact)
        current = self._current(facts)
        try:
            answer = current.client.answer(ask.request)
        except FederatedError:
            self._give_up("The round came to nothing: what the coordinator sent was not in order.")
            raise
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
        if current is not None:
            self._ports.guard.failed(current.admission, reason, now=int(self._ports.now()))

    def _begin(self, facts: Facts, contact: bytes) -> _Round:
        ports = self._ports
        admission = ports.guard.admit(
            contact, configuration=facts.configuration, now=int(ports.now())
        )
        request = parse_request(contact)
        try:
            client = self._client(facts, admission, request)
        except FederatedError:
            ports.guard.failed(
                admission, "The round was planned otherwise than approved.", now=int(ports.now())
            )
            raise
        return _Round(run_id=facts.run_id, admission=admission, client=client, at=ports.ticks())

    def _client(self, facts: Facts, admission: Admission, request: ContactRequest) -> Client:
        study, ports = admission.study, self._ports
        if request.run != str(facts.run_id):
            raise ProtocolError("The request is of another run than the one it came with.")
        query = ports.query(admission.query.ask)
        plan = round_plan(
            study,
            admission.query,
            query,
            round_id=round_name(request),
            taking_part=roster_of(request),
        )
        node = enrolment.enrolled(ports.store).node

        def contribution() -> NDArray[np.int64]:
            return self._sum(admission, query)

        if _trusts_server(study):
            return TrustedClient(plan=plan, node=node, contribution=contribution)
        return SecureClient(
            plan=plan,
            node=node,
            identity=ports.identity,
            contribution=contribution,
            random=ports.random,
        )

    def _sum(self, admission: Admission, query: Query) -> NDArray[np.int64]:
        """The sum over this node's people: each bounded by the query itself, whatever rows hold."""
        total = np.zeros(query.dimension, np.int64)
        rows: PersonRows
        for _, rows in self._ports.guard.rows(admission, now=int(self._ports.now())):
            total += query.encode(rows, self._ports.random)
        return total


def _trusts_server(study: Study) -> bool:
    return study.trust_model == "trusted_server"


def round_name(request: ContactRequest) -> str:
    """The round's id, by which its messages and its reservation are told apart."""
    return f"{request.run}-{request.round_number}"


def roster_of(request: ContactRequest) -> Roster:
    """Those of the request's roster who take part."""
    return Roster(
        keys={node: request.roster[node] for node in request.taking_part},
        people=sum(request.taking_part.values()),
    )
