"""The life of a training: round after round, so that it may be stopped at any moment and go on.

Lives here: the order, what is kept between rounds, which rounds are lost, when it ends. One round's
sum is `study_run`'s, the step from sum to weights `learning.strategies`, the file `training_files`.

The whole training is one release, spread over rounds: its cost is reserved before the first is
dispatched, on the nodes that take part in that, and only those are asked again. Where people take
turns nodes come and go: then it is reserved on all of the roster that can pay, and all those are
asked each time.

What is kept is written *before* anything is reserved, before a round is dispatched (that it was)
and after its sum came (the new weights). A round that was dispatched and has no sum is lost and
never asked again: its people were asked, and paid with the first. So nobody is asked more often
than announced, or charged twice, whatever stops this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from federated.aggregation.bits import SystemBits
from federated.errors import BudgetExhaustedError, CheckpointError, CohortError, ProtocolError
from federated.learning.canaries import draw_canaries, lane_shifts
from federated.learning.models import initial, parameters
from federated.learning.privacy_audit import (
    Audit,
    AuditResult,
    NoiseCheck,
    parse_audit,
)
from federated.learning.round_query import TrainQuery, TrainRound
from federated.learning.strategies import Correlated, TrainingState, parse_state, start
from federated.ledger import Reservation
from federated.manifest import DeclaredQuery, Study
from federated.model import PrivacyCost
from federated.study_run import RoundSum

#: So many rounds that come to nothing, one after the other, end the run; the training may go on.
_PATIENCE: Final = 3

type Say = Callable[[str], None]


class Kept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is kept between rounds. `asked` counts rounds dispatched, with sum or without.

    `cohort`: the nodes that paid. `reservation`: its round's name in the ledger, empty before the
    first round. `people` and `nodes`: of each round that has a sum. `recent`: the newest sums,
    as many as the declared rule for an early end looks at. `ended`: by that rule.
    """

    study: str
    query: str
    state: bytes
    audit: bytes = b""
    cohort: tuple[str, ...] = ()
    reservation: str = ""
    asked: int = 0
    people: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()
    recent: tuple[bytes, ...] = ()
    ended: bool = False

    def over(self, query: TrainQuery) -> bool:
        """Whether nothing is to be asked any more."""
        return self.ended or self.asked >= query.rounds


class Checkpoints(Protocol):
    """Where it is kept (`training_files.TrainingFiles`), by the training's name."""

    def read(self, query: str) -> bytes | None:
        """What was written last, or None. Raises `CheckpointError` if it cannot be read."""
        ...

    def write(self, query: str, data: bytes) -> None:
        """Keep it, whole or not at all, durably. Raises `CheckpointError`."""
        ...


class Summing(Protocol):
    """What a training needs of `study_run.StudyRun`."""

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
        """As `StudyRun.sum`."""
        ...

    def able(self, name: str) -> tuple[str, ...]:
        """As `StudyRun.able`."""
        ...

    def spend(self, reservation: Reservation) -> None:
        """As `StudyRun.spend`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPorts:
    """What a training stands on. `reservation`: what is reserved under a round's name.

    `still` raises if the study may not go on; it is looked at before each round.
    """

    run: Summing
    checkpoints: Checkpoints
    reservation: Callable[[str], Reservation | None]
    say: Say = lambda _: None
    still: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedOutcome:
    """A finished training. `asked` rounds were dispatched, `summed` of them have a sum.

    `people` and `nodes`: the fewest of any round. `cost`: of all rounds, paid with the first.
    `audit` and `noise`: what canaries found, if the training has any.
    """

    query: str
    round_id: str
    weights: NDArray[np.float64] = field(repr=False)
    asked: int
    summed: int
    announced: int
    people: int
    nodes: int
    cost: PrivacyCost
    audit: AuditResult | None
    noise: NoiseCheck | None


def encode_kept(kept: Kept) -> bytes:
    """The bytes of what is kept."""
    return msgspec.msgpack.encode(kept)


def reserved_name(data: bytes | None) -> str:
    """The round's name under which a training reserved, or was about to; empty if it was not.

    Raises `CheckpointError` for bytes that are damaged.
    """
    return "" if data is None else _decoded(data).reservation


def _decoded(data: bytes) -> Kept:
    try:
        return msgspec.msgpack.decode(data, type=Kept)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            "What was kept of a training is damaged: nobody can say which rounds were asked, so it "
            "cannot go on."
        ) from error


def parse_kept(data: bytes, *, study: Study, query: TrainQuery) -> Kept:
    """Read it. Raises `CheckpointError` for what is cut, or another study's or training's."""
    kept = _decoded(data)
    if (kept.study, kept.query) != (study.study_hash, query.name):
        raise CheckpointError(f"What was kept is not of the training {query.name}.")
    return kept


@dataclass(slots=True, kw_only=True)
class _Now:
    """What a training knows while it goes on."""

    kept: Kept
    state: TrainingState
    audit: Audit | None
    reservation: Reservation | None = None


class Training:
    """One training of a study. `train` begins it or goes on with it."""

    def __init__(
        self, study: Study, declared: DeclaredQuery, query: TrainQuery, ports: TrainingPorts
    ) -> None:
        self._study = study
        self._declared = declared
        self._query = query
        self._ports = ports
        self._id = bytes.fromhex(study.study_hash)

    def train(self, first_number: int) -> TrainedOutcome:
        """Ask all rounds that were not asked yet; return the model.

        Rounds are numbered from `first_number`. Raises `CohortError` where too many rounds come to
        nothing: what is done is kept, and another run goes on from there. Raises besides what
        `StudyRun.sum` and `still` raise, and `CheckpointError`.
        """
        now = self._begun()
        if now.kept.asked and not now.kept.over(self._query):
            self._say(now, "going on")
        fruitless = 0
        while not now.kept.over(self._query):
            self._ports.still()
            before = now.kept.asked
            try:
                self._round(now, first_number + before)
                fruitless = 0
            except (CohortError, ProtocolError) as error:
                fruitless += 1
                lost = "lost" if now.kept.asked > before else "not asked"
                self._ports.say(f"{self._query.name}: round {before + 1} {lost}: {error}")
                if fruitless >= _PATIENCE:
                    raise CohortError(
                        f"{fruitless} rounds of {self._query.name} came to nothing, the last "
                        f"since: {error} {now.kept.asked} of {self._query.rounds} rounds were "
                        "asked; run the study again to go on from there."
                    ) from error
        return self._outcome(now)

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is to be asked any more. Raises `CheckpointError`."""
        data = self._ports.checkpoints.read(self._query.name)
        if data is None:
            return False
        return parse_kept(data, study=self._study, query=self._query).over(self._query)

    # --- Before the first round, or where it stopped ---------------------------------------------

    def _begun(self) -> _Now:
        query, data = self._query, self._ports.checkpoints.read(self._query.name)
        if data is None:
            audit = None
            if query.canaries:
                audit = Audit(canaries=draw_canaries(query.canaries, SystemBits()))
            state = start(initial(query.spec, seed=self._id), clip=query.spec.clip)
            kept = Kept(study=self._study.study_hash, query=query.name, state=b"")
            now = _Now(kept=kept, state=state, audit=audit)
            # What cannot be kept must not be paid for.
            self._keep(now)
            return now
        kept = parse_kept(data, study=self._study, query=query)
        reservation = self._ports.reservation(kept.reservation) if kept.reservation else None
        if kept.asked and reservation is None:
            raise CheckpointError(
                f"The ledger knows nothing of the training {query.name} that was begun: mend the "
                "ledger first."
            )
        if reservation is None:
            # What was about to be reserved never was: whoever is there now takes part.
            kept = msgspec.structs.replace(kept, cohort=(), reservation="")
        return _Now(
            kept=kept,
            state=parse_state(kept.state, study=self._id),
            audit=parse_audit(kept.audit, study=self._id) if query.canaries else None,
            reservation=reservation,
        )

    # --- One round -------------------------------------------------------------------------------

    def _round(self, now: _Now, number: int) -> None:
        query, server = self._query, self._query.server
        if isinstance(server, Correlated):
            # Rounds that were dispatched and have no sum keep their place among the others.
            while now.state.done < now.kept.asked:
                now.state = server.lost(now.state)
        payers = now.kept.cohort or None
        if query.turns is not None and now.reservation is None:
            payers = self._ports.run.able(query.name)
            if not payers:
                raise BudgetExhaustedError(
                    f"No node of the roster has budget left for {query.name}, so nobody was asked: "
                    "propose a study that asks less, or asks others."
                )
        asked = query.at(now.state.weights, clip=now.state.clip, index=now.kept.asked)

        def reserving(name: str, nodes: Sequence[str]) -> None:
            """Whatever stops this process now, the next run knows what to look for."""
            self._keep(now, cohort=tuple(nodes), reservation=name)

        def dispatching(reservation: Reservation) -> None:
            """From here on the round is asked, whatever becomes of it."""
            now.reservation = reservation
            self._keep(now, asked=now.kept.asked + 1)

        found = self._ports.run.sum(
            query.name,
            number,
            given=query.give(now.state.weights, clip=now.state.clip),
            among=payers,
            charging=None if query.turns is None else payers,
            reserved=now.reservation,
            reserving=reserving,
            dispatching=dispatching,
        )
        self._step(now, asked, found)

    def _step(self, now: _Now, asked: TrainRound, found: RoundSum) -> None:
        query, total = self._query, found.result.total
        heard = asked.decode(total, noise=found.noise, people=found.people)
        size = parameters(query.spec)
        # A site has divided by those who are not held out already.
        brought = 1.0 if query.noised_by_node else 1 - query.spec.held_out
        try:
            state = query.server.step(
                now.state,
                total[:size],
                people=found.people,
                # Who is held out, or has no turn, counts among the people and brings nothing new.
                unit=asked.unit * query.participation.gap / brought,
            )
        except ValueError as error:
            raise CheckpointError(
                f"The weights of {query.name} ran away in round {now.kept.asked}: choose a smaller "
                "rate or clip."
            ) from error
        if query.adaptive is not None and heard.unclipped is not None:
            # Whoever brings nothing counts as half within the clip.
            unclipped = 0.5 + (heard.unclipped - 0.5) / (1 - query.spec.held_out)
            state = replace(state, clip=query.adaptive.following(state.clip, unclipped))
        now.state = state
        if now.audit is not None:
            shifts = lane_shifts(
                query.one_round, participation=query.participation, factors=query.factors
            )
            now.audit = now.audit.after(heard.lanes, shift=shifts[now.kept.asked - 1])
        recent = self._recent(now.kept, total[:size])
        self._keep(
            now,
            people=(*now.kept.people, found.people),
            nodes=(*now.kept.nodes, len(found.result.survivors)),
            recent=tuple(one.astype("<i8").tobytes() for one in recent),
            ended=query.stop is not None and query.stop.stops(recent, deviation=found.noise.scale),
        )
        self._say(now, f"{len(found.result.survivors)} nodes, {found.people:,} people")

    def _recent(self, kept: Kept, total: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The newest sums, the last one among them: those that the rule for an early end reads."""
        if self._query.stop is None:
            return []
        before = [np.frombuffer(one, dtype="<i8").astype(np.int64) for one in kept.recent]
        return [*before, total][-self._query.stop.patience :]

    def _keep(self, now: _Now, **changes: object) -> None:
        """Write down what is known now, changed so: durably, before anything follows from it."""
        study = self._id
        now.kept = msgspec.structs.replace(
            now.kept,
            state=now.state.to_bytes(study=study),
            audit=b"" if now.audit is None else now.audit.to_bytes(study=study),
            **changes,
        )
        self._ports.checkpoints.write(self._query.name, encode_kept(now.kept))

    def _say(self, now: _Now, what: str) -> None:
        query, done = self._query, now.kept.asked
        spent = query.epsilon_after(done, self._declared.noise, delta=self._declared.delta)
        self._ports.say(
            f"{query.name}: round {done} of {query.rounds}, {what}; ε = {spent:.2f} so far of "
            f"{self._declared.epsilon:.3g}, at δ = {self._declared.delta:.1g}"
        )

    # --- The end ---------------------------------------------------------------------------------

    def _outcome(self, now: _Now) -> TrainedOutcome:
        query, kept, reservation = self._query, now.kept, now.reservation
        if reservation is None or not kept.people:
            raise CohortError(
                f"No round of {query.name} has a sum: there is no model. What it cost stays spent."
            )
        self._ports.run.spend(reservation)
        audit = noise = None
        if now.audit is not None:
            audit = now.audit.result(epsilon=reservation.cost.epsilon, delta=reservation.cost.delta)
            noise = now.audit.noise(self._declared.noise)
        return TrainedOutcome(
            query=query.name,
            round_id=reservation.round,
            weights=now.state.released,
            asked=kept.asked,
            summed=len(kept.people),
            announced=query.rounds,
            people=min(kept.people),
            nodes=min(kept.nodes),
            cost=reservation.cost,
            audit=audit,
            noise=noise,
        )
