"""The life of one run: reserve, dispatch, stages, sum, decode, spend, answer.

Lives here: the order, the deadlines, and what becomes of nodes that do not do what they should.
What nodes and SuperLink are is behind `Exchange`; who may run is settled before (`approvals`, the
gate of the SuperLink, and again by every device).

The order is the guarantee: the whole cohort's cost is in the ledger, durable and in the audit log,
before the first node is asked for anything but its name. Whatever happens after that (a crash
here, a SuperLink that dies, too few survivors) leaves it there. An answer is given out only after
the ledger says `spent`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import structlog

from federated.aggregation.plan import RoundPlan
from federated.aggregation.server import RoundResult, SecureServer, Server
from federated.aggregation.trusted import TrustedServer
from federated.analytics.base import BaseQuery
from federated.analytics.intervals import carried
from federated.errors import CohortError, FederatedError, ProtocolError
from federated.ledger import Reservation
from federated.model import Answer, NoisePlan, PrivacyCost, Query, RandomBits
from federated.node.contact import MAX_PEOPLE, ContactRequest, Question, verify_request
from federated.node.service import roster_of, round_name
from federated.rounds import (
    GREET,
    Ask,
    Greeting,
    answer_price,
    encode,
    open_reply,
    parse,
    round_plan,
)
from federated.signed_study import SignedStudy

_LOG = structlog.get_logger("federated.run")

type Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait, in seconds.

    `timeout_s` at most; once `enough` nodes have answered, only `stragglers_s` more for the others.
    """

    timeout_s: float
    enough: int
    stragglers_s: float


class Exchange(Protocol):
    """Asks nodes, by their names in the roster, and waits."""

    def ask(
        self, stage: str, payloads: Mapping[str, bytes], patience: Patience
    ) -> Mapping[str, bytes]:
        """Return what came back in time, as it came. Never raises for what a node does."""
        ...


class RoundLedger(Protocol):
    """What a run needs of `federated.ledger.Ledger`."""

    def reserve(
        self, *, study: str, round_id: str, participants: Sequence[str], cost: PrivacyCost
    ) -> Reservation:
        """Charge all, durably, or raise and charge nobody."""
        ...

    def spend(self, reservation: Reservation) -> None:
        """Say that the answer is given out."""
        ...

    def affordable(self, participants: Sequence[str], cost: PrivacyCost) -> frozenset[str]:
        """Who of them could be charged with it now."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long each stage may take, in seconds.

    `greet_s` is for who is there at all. Whoever has not answered `stragglers_s` after enough have
    is not waited for any longer: one phone that fell asleep must not hold up the rest.
    """

    greet_s: float = 10.0
    stage_s: float = 60.0
    stragglers_s: float = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPorts:
    """What a run stands on.

    `roster`: node name → raw Ed25519 public key, whole, as approved. `participants` names whom a
    node's answer charges in the ledger (a device is one; a site's people are one class); `sites`
    are those of nodes that speak for one, as the roster's hash covers them.
    `most_people` bounds for how many people a node may say that it speaks: 1 for a device.
    `prove` makes the proof that the study was published, for a node that has seen so many entries.
    """

    exchange: Exchange
    ledger: RoundLedger
    roster: Mapping[str, bytes] = field(repr=False)
    query: Callable[[str], Query]
    prove: Callable[[int], bytes]
    random: RandomBits = field(repr=False)
    participants: Callable[[str], Sequence[str]]
    most_people: Callable[[str], int]
    sites: Mapping[str, str] = field(default_factory=dict)
    say: Say = lambda _: None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSum:
    """A round's noisy sum and what was reserved for it. `noise` is what the sum really carries.

    `people` and `dropped` as in `RoundOutcome`.
    """

    reservation: Reservation
    result: RoundResult = field(repr=False)
    noise: NoisePlan
    people: int
    dropped: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundOutcome:
    """What one question's round gave. `dropped`: node → stage and why, in a few words.

    `people` is how many the nodes whose answers are in the sum spoke for; each refuses if it is
    counted with more or fewer than its guard lets in.
    """

    query: str
    round_id: str
    answer: Answer
    result: RoundResult = field(repr=False)
    cost: PrivacyCost
    people: int
    nodes: int
    dropped: Mapping[str, str]


class StudyRun:
    """One run of a study: asks its questions, one round each. Used once."""

    def __init__(
        self,
        signed: SignedStudy,
        ports: RunPorts,
        *,
        run_id: int,
        deadlines: Deadlines | None = None,
        level: float = 0.95,
    ) -> None:
        self._study = signed.study
        self._signed = signed.encode()
        self._ports = ports
        self._run_id = run_id
        self._deadlines = deadlines or Deadlines()
        self._level = level

    def ask(self, name: str, round_number: int, *, given: bytes = b"") -> RoundOutcome:
        """Ask a question that one round answers; return the answer. `given`: what it starts from.

        Raises `CohortError` when too few take part or survive, `BudgetExhaustedError` before
        anybody is asked, `LedgerError`. What was reserved stays spent.
        """
        found = self.sum(name, round_number, given=given)
        asked = self._ports.query(self._study.query(name).ask).begin(given)
        if not isinstance(asked, BaseQuery):
            raise ProtocolError(f"{name} is answered by no single round.")
        answer = asked.decode(
            found.result.total, noise=found.noise, people=found.people, level=self._level
        )
        self.spend(found.reservation)
        self._ports.say(f"{name}: answered by {len(found.result.survivors)} nodes")
        return RoundOutcome(
            query=name,
            round_id=found.reservation.round,
            answer=answer,
            result=found.result,
            cost=found.reservation.cost,
            people=found.people,
            nodes=len(found.result.survivors),
            dropped=found.dropped,
        )

    def able(self, name: str) -> tuple[str, ...]:
        """The nodes of the roster on which the whole of a question's cost can be reserved now."""
        ports, declared = self._ports, self._study.query(name)
        charged = {node: frozenset(ports.participants(node)) for node in ports.roster}
        cost = answer_price(declared, ports.query(declared.ask))
        can = ports.ledger.affordable(sorted(frozenset().union(*charged.values())), cost)
        return tuple(node for node, names in charged.items() if names <= can)

    def spend(self, reservation: Reservation) -> None:
        """Say that what was reserved is given out. Before that nothing is."""
        self._ports.ledger.spend(reservation)

    def sum(
        self,
        name: str,
        round_number: int,
        *,
        given: bytes = b"",
        among: Iterable[str] | None = None,
        charging: Iterable[str] | None = None,
        reserved: Reservation | None = None,
        reserving: Callable[[str, Sequence[str]], None] = lambda *_: None,
        dispatching: Callable[[Reservation], None] = lambda _: None,
    ) -> RoundSum:
        """One round of a question: its noisy sum, which nobody may see before it is spent.

        Reserves the whole question's cost on who takes part (on `charging` instead, where others
        come later), unless that is `reserved` already, as for every round of a training but its
        first: then only nodes `among` those who paid are asked. `reserving` is told under which
        name cost is about to be reserved, and on which nodes, `dispatching` what is reserved,
        before the first node is asked: what they raise charges or asks nobody. Raises as `ask`.
        """
        declared = self._study.query(name)
        query = self._ports.query(declared.ask)
        roster = self._ports.roster
        whom = {node: roster[node] for node in (roster if among is None else among)}
        greetings, away = self._greet(name, round_number, whom)
        self._verify_cohort(sum(one.people for one in greetings.values()), query)
        request = self._request(name, round_number, greetings, given)
        plan = round_plan(
            self._study,
            declared,
            query,
            round_id=round_name(request),
            taking_part=roster_of(request),
            given=given,
        )
        cost = answer_price(declared, query)
        # What every node would refuse must not be paid for.
        verify_request(request)
        reservation = reserved
        if reservation is None:
            payers = tuple(request.taking_part if charging is None else charging)
            reserving(plan.round_id, payers)
            reservation = self._reserve(plan, cost, payers)
        dispatching(reservation)
        result, dropped = self._stages(plan, request, greetings)
        people = sum(request.taking_part[node] for node in result.survivors)
        self._verify_cohort(people, query)
        return RoundSum(
            reservation=reservation,
            result=result,
            # What sites add is in what they bring; nothing says how much of it a sum carries.
            noise=declared.noise
            if query.noised_by_node
            else carried(declared.noise, result.noise_weight),
            people=people,
            dropped={**away, **dropped},
        )

    # --- Who is there ----------------------------------------------------------------------------

    def _greet(
        self, name: str, round_number: int, whom: Mapping[str, bytes]
    ) -> tuple[dict[str, Greeting], Mapping[str, str]]:
        """Who would take part in this round, and who would not: node → why, in a few words."""
        ports = self._ports
        question = Question(
            study=self._signed,
            query=name,
            run=str(self._run_id),
            round_number=round_number,
            roster=ports.roster,
            sites=ports.sites,
        )
        request = question.encode()
        self._ports.say(f"greeting {len(whom)} nodes")
        asks = dict.fromkeys(whom, request)
        answers = ports.exchange.ask(GREET, asks, self._patience(self._deadlines.greet_s))
        greetings, away = {}, dict.fromkeys(whom, f"{GREET}: no answer")
        for node, payload in self._opened(GREET, asks, answers).items():
            try:
                greetings[node] = self._greeting(node, payload, question)
                del away[node]
            except ProtocolError as error:
                away[node] = f"{GREET}: {error}"
                _LOG.warning("federated.run.greeting_refused", node=node, **error.diagnostics())
        small = ports.query(self._study.query(name).ask).least_at_node
        for node in [one for one, said in greetings.items() if said.people < small]:
            away[node] = f"{GREET}: speaks for fewer than {small} people"
            del greetings[node]
        least = self._study.aggregation.minimum_survivors
        if len(greetings) < least:
            raise CohortError(
                f"{len(greetings)} of {len(whom)} nodes are there and would answer, "
                f"{least} are needed: nothing was reserved."
            )
        return greetings, away

    def _greeting(self, node: str, payload: bytes, question: Question) -> Greeting:
        """Read one. Raises `ProtocolError` if it is of another round, or claims too much."""
        greeting = parse(Greeting, payload)
        meant = (greeting.study, greeting.query, greeting.run, greeting.round_number)
        if meant != (
            self._study.study_hash, question.query, question.run, question.round_number
        ):  # fmt: skip
            raise ProtocolError("The greeting is for another round than was asked about.")
        most = min(self._ports.most_people(node), MAX_PEOPLE)
        if not 1 <= greeting.people <= most:
            raise ProtocolError(
                f"The node speaks for {greeting.people} people; its enrolment says 1 to {most}."
            )
        if greeting.log_size < 0:
            raise ProtocolError("The node has seen less than nothing of the log.")
        return greeting

    def _patience(self, timeout_s: float) -> Patience:
        return Patience(
            timeout_s=timeout_s,
            enough=self._study.aggregation.minimum_survivors,
            stragglers_s=self._deadlines.stragglers_s,
        )

    def _verify_cohort(self, people: int, query: Query) -> None:
        # A query may ask for more people than the study: with fewer it would say nothing.
        least = max(self._study.minimum_cohort, int(getattr(query, "minimum_cohort", 0)))
        # Of those who take turns one in `gap` brings something new.
        least *= query.gap
        if people < least:
            turns = f" (one in {query.gap} brings something in a round)" if query.gap > 1 else ""
            raise CohortError(
                f"{people} people take part; at least {least} must{turns}, so that nobody stands "
                "out. Nothing is released."
            )

    def _request(
        self, name: str, round_number: int, greetings: Mapping[str, Greeting], given: bytes
    ) -> ContactRequest:
        return ContactRequest(
            study=self._signed,
            proof=b"",
            query=name,
            run=str(self._run_id),
            round_number=round_number,
            roster=self._ports.roster,
            taking_part={node: greeting.people for node, greeting in greetings.items()},
            sites=self._ports.sites,
            given=given,
        )

    # --- Reserve, then ask -----------------------------------------------------------------------

    def _reserve(self, plan: RoundPlan, cost: PrivacyCost, payers: Iterable[str]) -> Reservation:
        whom = [name for node in payers for name in self._ports.participants(node)]
        return self._ports.ledger.reserve(
            study=self._study.study_hash, round_id=plan.round_id, participants=whom, cost=cost
        )

    def _stages(
        self, plan: RoundPlan, request: ContactRequest, greetings: Mapping[str, Greeting]
    ) -> tuple[RoundResult, Mapping[str, str]]:
        server: Server = (
            TrustedServer(plan, random=self._ports.random)
            if plan.trust_model == "trusted_server"
            else SecureServer(plan)
        )
        proofs: dict[int, bytes] = {}
        first = True
        while requests := server.requests():
            asks = {}
            for node, inner in requests.items():
                contact = self._contact(request, greetings[node].log_size, proofs) if first else b""
                asks[node] = encode(Ask(contact=contact, request=inner))
            stage = str(server.stage)
            self._ports.say(f"{stage}: {len(asks)} nodes")
            answers = self._ports.exchange.ask(stage, asks, self._patience(self._deadlines.stage_s))
            server.collect(self._opened(stage, asks, answers))
            first = False
        return server.result(), server.dropped

    def _contact(self, request: ContactRequest, log_size: int, proofs: dict[int, bytes]) -> bytes:
        """The request with the proof that leads on from what this node has seen."""
        if log_size not in proofs:
            try:
                proofs[log_size] = self._ports.prove(log_size)
            except FederatedError as error:
                # A node that claims to have seen more than there is gets what it will refuse.
                _LOG.warning("federated.run.no_proof", **error.diagnostics())
                proofs[log_size] = b"{}"
        return replace(request, proof=proofs[log_size]).encode()

    def _opened(
        self, stage: str, asks: Mapping[str, bytes], answers: Mapping[str, bytes]
    ) -> dict[str, bytes]:
        """Of what came, what the nodes themselves said to what they were asked."""
        opened = {}
        for node in asks.keys() & answers.keys():
            try:
                opened[node] = open_reply(
                    self._ports.roster[node],
                    answers[node],
                    run_id=self._run_id,
                    stage=stage,
                    request=asks[node],
                )
            except ProtocolError as error:
                _LOG.warning("federated.run.reply_refused", node=node, **error.diagnostics())
        return opened


#: Names of the stages, in order: for progress and for tests that break each.
STAGES: Final = (GREET, "advertise", "share", "mask", "consistency", "unmask")
