"""Training by turns over real nodes: people come and go, and bring no more than was paid for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from federated.aggregation.bits import SeededBits
from federated.aggregation.messages import Begin
from federated.aggregation.messages import encode as encode_stage
from federated.aggregation.server import RoundResult
from federated.deployment.places import ensure_node_keys
from federated.errors import CohortError, ProtocolError, RefusedError
from federated.learning.canaries import lane_shifts
from federated.learning.models import initial
from federated.learning.privacy_audit import parse_audit
from federated.learning.round_query import CarriedRound, TrainQuery
from federated.learning.strategies import FedAvg, parse_state, start
from federated.learning.turns import Turns
from federated.ledger import Reservation
from federated.manifest import Study
from federated.model import NoisePlan, PersonRows, PrivacyCost
from federated.node.agent import RunFacts
from federated.node.consent import Consents, Scope
from federated.node.contact import ContactRequest
from federated.node.enrolment import remembered
from federated.node.keeper import FileKeeper
from federated.node.past import Past
from federated.node.receipts import Receipts
from federated.node.service import roster_of, round_name, turn_tag
from federated.node.store import Person, Store
from federated.questions import declared_question
from federated.rounds import Ask, answer_price, encode, round_plan
from federated.study_run import RoundSum
from federated.training_files import TrainingFiles
from federated.training_run import Training, TrainingPorts, parse_kept
from tests.federated.node.tables import fill
from tests.federated.runs import RUN, World, gone
from tests.federated.studies import ORIGIN
from tests.federated.test_training_run import Stopped, Stopping, paid
from tests.federated.trainings import (
    PEOPLE,
    judged,
    people_of,
    query_of,
    train,
    training_world,
)

ROUNDS, GAP, BANDS = 8, 2, 4
BY_TURNS = {"rounds = 6": f"rounds = {ROUNDS}\nturns = {{ gap = {GAP}, bands = {BANDS} }}"}


def kept_by(store: Store, study: Study) -> dict[str, set[int]]:
    """Of whom something is kept: of which rounds."""
    past = Past(store=store, study=study.study_hash, query="mood")
    dimension = query_of(study).dimension
    found = {one.name: set(past.of(one, dimension=dimension)) for one in store.people()}
    return {name: rounds for name, rounds in found.items() if rounds}


def during(world: World, round_number: int, act: Callable[[], object]) -> None:
    """Have something done once, when a round is about to unmask."""
    left = [act]

    def acting(reply: bytes, request: bytes) -> bytes:
        del request
        if world.asked.count("consistency") == round_number + 1 and left:
            left.pop()()
        return reply

    world.faults["node-1", "consistency"] = acting


# --- It learns ------------------------------------------------------------------------------------


def test_a_model_is_trained_by_turns_and_what_was_kept_is_gone_at_the_end(tmp_path: Path) -> None:
    with training_world(tmp_path, BY_TURNS) as world:
        study, store = world.signed.study, world.nodes["node-1"].store
        seen: list[dict[str, set[int]]] = []
        during(world, 4, lambda: seen.append(kept_by(store, study)))
        trained, evaluated = judged(world, tmp_path)
        assert (trained.asked, trained.summed) == (ROUNDS, ROUNDS)
        assert trained.weights[0] < -0.5
        auc = next(one for one in evaluated.answer.estimates if one.name == "AUC")
        assert auc.value > 0.75
        assert trained.audit is not None
        assert trained.audit.passed
        assert trained.noise is not None
        assert trained.noise.passed
        # In the fifth round: of whose turn it is that and one before, of others one.
        (kept,) = seen
        turns, key = query_of(study).turns, world.nodes["node-1"].keys.identity
        assert turns is not None
        due = {
            one.name
            for one in store.people()
            if turns.has_turn(study=study.id, tag=turn_tag(key, one.name), index=4)
        }
        assert kept == {one.name: {4, 2} if one.name in due else {3} for one in store.people()}
        assert all(not kept_by(node.store, study) for node in world.nodes.values())


def test_its_noise_is_that_of_the_rows_stacked(tmp_path: Path) -> None:
    with training_world(tmp_path, BY_TURNS) as world:
        query = query_of(world.signed.study)
        trained = train(world, tmp_path)
        assert trained.cost.sensitivity == query.sensitivity
        assert trained.cost.epsilon <= 12.0
        assert query.sensitivity.l2 > query.one_round.l2 * query.factors.coefficients[0]


# --- People come and go ---------------------------------------------------------------------------


def test_nodes_that_come_later_take_part_and_everybody_pays_once(tmp_path: Path) -> None:
    with training_world(tmp_path, BY_TURNS) as world:
        world.faults["node-5", "greet"] = gone
        during(world, 2, lambda: world.faults.pop(("node-5", "greet")))
        trained = train(world, tmp_path)
        assert (trained.summed, trained.nodes) == (ROUNDS, 4)
        (charge,) = world.ledger.charges(world.signed.study.study_hash)
        assert charge.cost == trained.cost
        # Whoever never came has paid too: anybody may come at any time.
        for name in world.nodes:
            assert world.ledger.balance(f"device:{name}").releases == 1
        for name, rounds in (("node-1", ROUNDS), ("node-5", ROUNDS - 3)):
            for costs in paid(world, name):
                assert len(costs) == rounds
                assert [one for one in costs if one is not None] == [trained.cost]


def test_a_training_that_began_with_others_goes_on_with_who_is_there(tmp_path: Path) -> None:
    with training_world(tmp_path, BY_TURNS) as world:
        world.faults["node-5", "greet"] = gone
        stopping = Stopping(files=_files(world, tmp_path), at=6, after=True)
        with pytest.raises(Stopped):
            train(world, tmp_path, checkpoints=stopping)
        world.faults = {("node-1", "greet"): gone}
        trained = train(world, tmp_path, run_id=RUN + 1)
        assert (trained.asked, trained.nodes) == (ROUNDS, 4)
        assert len(world.ledger.charges(world.signed.study.study_hash)) == 1


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [2, 5, 6, 7])
def test_a_training_by_turns_that_is_stopped_goes_on_in_its_place(
    tmp_path: Path,
    at: int,
    after: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    with training_world(tmp_path, BY_TURNS) as world:
        stopping = Stopping(files=_files(world, tmp_path), at=at, after=after)
        with pytest.raises(Stopped):
            train(world, tmp_path, checkpoints=stopping)
        trained = train(world, tmp_path, run_id=RUN + 1)
        lost = at > 2 and (at % 2 == 1) == after
        assert (trained.asked, trained.summed) == (ROUNDS, ROUNDS - lost)
        study = world.signed.study
        query = query_of(study)
        data = _files(world, tmp_path).read("mood")
        assert data is not None
        kept, named = parse_kept(data, study=study, query=query), bytes.fromhex(study.study_hash)
        # A lost round has its place among the others, and no canary in it.
        assert parse_state(kept.state, study=named).done == ROUNDS
        shifts = list(
            lane_shifts(query.one_round, participation=query.participation, factors=query.factors)
        )
        if lost:
            del shifts[(at - 3) // 2]
        assert list(parse_audit(kept.audit, study=named).shifts) == shifts
        assert len(set(shifts)) > 1
        for name in world.nodes:
            for costs in paid(world, name):
                assert [one for one in costs if one is not None] == [trained.cost]
        assert trained.audit is not None
        assert trained.audit.passed


def _files(world: World, directory: Path) -> TrainingFiles:
    return TrainingFiles(
        directory=directory / "trainings", study_hash=world.signed.study.study_hash
    )


def test_a_node_without_budget_is_not_asked_and_keeps_nobody_from_it(tmp_path: Path) -> None:
    with training_world(tmp_path, BY_TURNS) as world:
        cost = world_cost(world.signed.study, query_of(world.signed.study))
        world.ledger.reserve(
            study="ab" * 32, round_id="x", participants=["device:node-5"],
            cost=replace(cost, epsilon=99.0),
        )  # fmt: skip
        trained = train(world, tmp_path)
        assert (trained.summed, trained.nodes) == (ROUNDS, 4)
        assert world.ledger.balance("device:node-5").releases == 1
        assert all(costs == () for costs in paid(world, "node-5"))


def test_too_few_people_for_each_round_to_have_enough_whose_turn_it_is(tmp_path: Path) -> None:
    """150 take part, and in a round of four 38 bring something: fewer than the smallest cohort."""
    changes = {"rounds = 6": "rounds = 8\nturns = { gap = 4, bands = 4 }"}
    with training_world(tmp_path, changes) as world:
        with pytest.raises(CohortError, match="at least 240 must"):
            train(world, tmp_path)
        assert world.ledger.charges(world.signed.study.study_hash) == []
        with pytest.raises(ProtocolError, match="240 are asked for"):
            contact(world, 0)


def test_a_turn_outlives_the_store(tmp_path: Path) -> None:
    """A node that starts anew in the middle brings no more than it would have brought."""
    key = ensure_node_keys(tmp_path / "node").identity
    turns = Turns(gap=8, factors=(2, 1))
    places = set()
    for number in range(4):
        directory = tmp_path / f"store-{number}"
        directory.mkdir(mode=0o700)
        store = Store.create(directory / "s", FileKeeper(directory / "k"))
        fill(store, {"me": {"mood": [1.0]}})
        me = store.person("me")
        tag = turn_tag(key, me.name)
        places.add(tuple(turns.has_turn(study="s", tag=tag, index=n) for n in range(8)))
        store.close()
    assert len(places) == 1
    other = ensure_node_keys(tmp_path / "other").identity
    assert turn_tag(other, "me") != turn_tag(key, "me") != turn_tag(key, "you")


# --- What a person takes back ---------------------------------------------------------------------


def test_who_takes_consent_back_sends_nothing_of_earlier_rounds_any_more(tmp_path: Path) -> None:
    with training_world(tmp_path, BY_TURNS) as world:
        store, study = world.nodes["node-1"].store, world.signed.study
        me = store.people()[0]
        during(world, 3, lambda: Consents(store).revoke(me, now=1))
        trained = train(world, tmp_path)
        assert trained.summed == ROUNDS
        assert me.name not in kept_by(store, study)
        assert len(paid(world, "node-1")[0]) == 4
        assert len(paid(world, "node-1")[1]) == ROUNDS


def test_consent_that_is_taken_back_while_rows_are_read_leaves_nothing_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was computed of this person a moment ago must not be written after it was let go of."""
    with training_world(tmp_path, BY_TURNS) as world:
        store, study = world.nodes["node-1"].store, world.signed.study
        first, last = store.people()[0], store.people()[-1]
        rows = Store.rows

        def revoking(self: Store, person: Person, columns: frozenset[str]) -> PersonRows:
            if self is store and person == last:
                for one in (first, last):
                    Consents(store).revoke(one, now=1)
            return rows(self, person, columns)

        monkeypatch.setattr(Store, "rows", revoking)
        stopping = Stopping(files=_files(world, tmp_path), at=6, after=True)
        with pytest.raises(Stopped):
            train(world, tmp_path, checkpoints=stopping)
        # After two rounds everybody had a turn.
        assert kept_by(store, study).keys() == {
            one.name for one in store.people() if one not in (first, last)
        }


def _revoked_and_given_again(store: Store, me: Person) -> None:
    scopes = [one.scope for one in Consents(store).of(me)]
    Consents(store).revoke(me, now=1)
    for scope in scopes:
        Consents(store).give([me], scope, now=2)


@pytest.mark.parametrize(
    "act",
    [
        lambda store, me: Consents(store).revoke(me, 2, now=1),
        _revoked_and_given_again,
        lambda store, me: store.withdraw(me, "another-study", now=1),
        lambda store, me: [store.set_state(me, one, now=1) for one in ("left", "taking_part")],
        lambda store, me: [store.set_state(me, one, now=1) for one in ("paused", "taking_part")],
    ],
    ids=["another consent", "given again", "another study", "left and back", "paused and back"],
)
@pytest.mark.parametrize("stopped_at", [4, 6])
def test_what_is_let_go_of_during_a_round_is_not_written_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[Store, Person], object],
    stopped_at: int,
) -> None:
    """Whoever would be let in again by the end of the round has still let go of what was kept."""
    with training_world(tmp_path, BY_TURNS) as world:
        store, study = world.nodes["node-1"].store, world.signed.study
        first, last = store.people()[0], store.people()[-1]
        Consents(store).give(
            [first],
            Scope(
                kinds=frozenset({"mean"}),
                columns=frozenset({"mood"}),
                purposes=frozenset({"HRESCH"}),
            ),
            now=1,
        )
        rows, reads = Store.rows, [0]

        def acting(self: Store, person: Person, columns: frozenset[str]) -> PersonRows:
            found = rows(self, person, columns)
            if self is store and person == last:
                reads[0] += 1
                # In the last round before the process is stopped.
                if reads[0] == stopped_at // 2 - 1:
                    act(store, first)
            return found

        monkeypatch.setattr(Store, "rows", acting)
        stopping = Stopping(files=_files(world, tmp_path), at=stopped_at, after=True)
        with pytest.raises(Stopped):
            train(world, tmp_path, checkpoints=stopping)
        assert reads[0] == stopped_at // 2 - 1
        assert len(kept_by(store, study)) > 0
        assert first.name not in kept_by(store, study)
        monkeypatch.undo()
        # And takes part again from their next turn on.
        trained = train(world, tmp_path, run_id=RUN + 1)
        assert trained.summed == ROUNDS


def test_what_is_kept_goes_when_the_studys_time_is_over(tmp_path: Path) -> None:
    with training_world(tmp_path, BY_TURNS) as world:
        stopping = Stopping(files=_files(world, tmp_path), at=6, after=True)
        with pytest.raises(Stopped):
            train(world, tmp_path, checkpoints=stopping)
        node, study = world.nodes["node-1"], world.signed.study
        assert kept_by(node.store, study)
        ports = node.service._ports
        later = study.valid_until + 1
        object.__setattr__(ports, "now", lambda: float(later))
        node.service._expiring = 0.0
        node.service.tidy()
        assert not kept_by(node.store, study)


# --- A hostile coordinator ------------------------------------------------------------------------


def contact(world: World, number: int, *, run: int = RUN, name: str = "mood") -> bytes:
    """A round's first message, as a coordinator would send it with whatever number."""
    study = world.signed.study
    declared = study.query(name)
    query = declared_question(declared.ask)
    given = query.give(np.zeros(2), clip=1.0) if isinstance(query, TrainQuery) else b""
    ports = world.ports()
    request = ContactRequest(
        study=world.signed.encode(),
        proof=ports.prove(remembered(world.nodes["node-1"].store, ORIGIN).size),
        query=name,
        run=str(run),
        round_number=number,
        roster=ports.roster,
        taking_part=dict.fromkeys(world.nodes, PEOPLE),
        given=given,
    )
    plan = round_plan(
        study, declared, query, round_id=round_name(request), taking_part=roster_of(request),
        given=given,
    )  # fmt: skip
    return encode(Ask(contact=request.encode(), request=encode_stage(Begin(plan.digest))))


def say(world: World, payload: bytes, *, run: int = RUN) -> bytes:
    facts = RunFacts(run_id=run, configuration=world.configuration)
    return world.nodes["node-1"].service.respond(facts, "advertise", payload)


@pytest.mark.parametrize("number", [ROUNDS, ROUNDS + 1, 2**31 - 1])
def test_a_round_that_the_question_has_not_costs_nobody_and_reads_nothing(
    tmp_path: Path, number: int
) -> None:
    with training_world(tmp_path, BY_TURNS) as world:
        with pytest.raises(RefusedError) as caught:
            say(world, contact(world, number))
        assert caught.value.rule == "plan"
        assert paid(world, "node-1")[0] == ()


def test_a_turn_cannot_be_had_twice_by_whatever_run(tmp_path: Path) -> None:
    """Two new updates of one person in one round's place would be dearer than what was paid."""
    with training_world(tmp_path, BY_TURNS) as world:
        say(world, contact(world, 3))
        for run in (RUN, RUN + 1):
            with pytest.raises(RefusedError) as caught:
                say(world, contact(world, 3, run=run), run=run)
            assert caught.value.rule == "repeat"
        store = world.nodes["node-1"].store
        last = Receipts(store).of(store.people()[0])[-1]
        assert last.told.rule == "repeat"
        # The next is another.
        say(world, contact(world, 4, run=RUN + 2), run=RUN + 2)


# --- The course of a training, without noise ------------------------------------------------------


@dataclass
class NoNoise:
    """Rounds of virtual people, summed in the clear; some of them are lost."""

    query: TrainQuery
    held: Reservation
    lost: frozenset[int] = frozenset()
    brought: dict[int, dict[str, NDArray[np.int64]]] = field(default_factory=dict)
    charged: list[Sequence[str]] = field(default_factory=list)

    def turn(self, number: int, name: str) -> bool:
        at = self.query.at(np.zeros(2), index=number)
        assert isinstance(at, CarriedRound)
        return at.has_turn(study="low-mood", tag=name)

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
        del name
        if reserved is None:
            assert charging is not None
            reserving("r-0", tuple(charging))
            self.charged.append(tuple(charging))
        del among
        dispatching(self.held)
        at = self.query.begin(given, index=round_number)
        assert isinstance(at, CarriedRound)
        total = np.zeros(self.query.dimension, dtype=np.int64)
        self.brought[round_number] = {}
        for place, (who, rows) in enumerate(VIRTUAL.items()):
            if self.turn(round_number, who):
                bits = SeededBits(bytes([place]) * 32, b"%d" % round_number)
                self.brought[round_number][who] = at.encode(rows, bits)
            total += at.combined(
                {n: one[who] for n, one in self.brought.items() if who in one and n <= round_number}
            )
        if round_number in self.lost:
            raise CohortError("lost")
        result = RoundResult(
            total=total,
            survivors=("a",),
            noise=None,
            noise_weight=1.0,
            log_ratio=0.0,
            trust_model="trusted_server",
        )
        return RoundSum(
            reservation=self.held,
            result=result,
            noise=NoisePlan(mechanism="discrete_gaussian", scale=1.0),
            people=len(VIRTUAL),
            dropped={},
        )

    def able(self, name: str) -> tuple[str, ...]:
        del name
        return ("a", "b")

    def spend(self, reservation: Reservation) -> None:
        del reservation


def _virtual() -> dict[str, PersonRows]:
    found = {}
    for name, columns in people_of("node-1").items():
        values = {key: np.array(one) for key, one in columns.items()}
        found[name] = PersonRows(days=np.arange(10), values=values)
    return found


VIRTUAL = _virtual()


@dataclass
class Memory:
    """Checkpoints that are kept in memory."""

    data: bytes | None = None

    def read(self, query: str) -> bytes | None:
        del query
        return self.data

    def write(self, query: str, data: bytes) -> None:
        del query
        self.data = data


@pytest.mark.parametrize("lost", [frozenset[int](), frozenset({3})])
def test_without_noise_it_is_plain_averaging_over_those_whose_turn_it_is(
    tmp_path: Path, lost: frozenset[int]
) -> None:
    with training_world(tmp_path, BY_TURNS) as world:
        study = world.signed.study
        declared, query = study.query("mood"), query_of(study)
        held = Reservation(
            id="1", study="s", round="r-0", cost=world_cost(study, query), participants=5
        )
        run, kept = NoNoise(query=query, held=held, lost=lost), Memory()
        ports = TrainingPorts(run=run, checkpoints=kept, reservation=lambda _: held)
        trained = Training(study, declared, query, ports).train(0)
        assert run.charged == [("a", "b")]
        assert (trained.asked, trained.summed) == (ROUNDS, ROUNDS - len(lost))
        expected = start(initial(query.spec, seed=bytes.fromhex(study.study_hash)), clip=1.0)
        for number in range(ROUNDS):
            new = np.sum([*run.brought[number].values()], axis=0)[:2]
            if number in lost:
                continue
            expected = FedAvg().step(
                expected, new, people=len(VIRTUAL), unit=GAP / query.spec.scale / 0.7
            )
        if lost:
            # Later rows bring back a part of what was lost.
            assert not np.allclose(trained.weights, expected.weights, rtol=1e-3)
        else:
            assert trained.weights == pytest.approx(expected.weights, rel=1e-12)


def world_cost(study: Study, query: TrainQuery) -> PrivacyCost:
    return answer_price(study.query(query.name), query)
