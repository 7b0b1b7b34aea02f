"""A training over real nodes: it learns, is paid once, and may be stopped at any moment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from federated.conduct import numbers_of
from federated.errors import CheckpointError, CohortError
from federated.learning.round_query import TrainQuery
from federated.learning.strategies import parse_state
from federated.model import PrivacyCost
from federated.node.budget import Budget
from federated.node.receipts import Receipts
from federated.questions import declared_question
from federated.training_files import TrainingFiles
from federated.training_run import Checkpoints, parse_kept
from tests.federated.deployment.federation import accountant
from tests.federated.runs import RUN, World, gone
from tests.federated.trainings import PEOPLE, conduct, judged, train, training_world

ROUNDS = 6


def paid(world: World, name: str) -> list[tuple[PrivacyCost | None, ...]]:
    """What each person of a node paid, round by round."""
    store = world.nodes[name].store
    budget = Budget(store, accountant)
    return [tuple(one.cost for one in budget.spends(person)) for person in store.people()]


def test_a_model_is_trained_and_judged_by_people_who_were_not_in_it(tmp_path: Path) -> None:
    with training_world(tmp_path) as world:
        trained, evaluated = judged(world, tmp_path)
        assert (trained.asked, trained.summed, trained.people) == (ROUNDS, ROUNDS, 5 * PEOPLE)
        # More sleep, less low mood.
        assert trained.weights[0] < -0.5
        auc = next(one for one in evaluated.answer.estimates if one.name == "AUC")
        assert auc.value > 0.75
        assert trained.audit is not None
        assert trained.audit.passed
        assert trained.noise is not None
        assert trained.noise.passed


def test_all_rounds_are_paid_for_once_on_every_node_and_in_the_ledger(tmp_path: Path) -> None:
    with training_world(tmp_path) as world:
        trained = train(world, tmp_path)
        for name in world.nodes:
            for costs in paid(world, name):
                assert len(costs) == ROUNDS
                assert [one for one in costs if one is not None] == [trained.cost]
                assert costs[0] is not None
        (charge,) = world.ledger.charges(world.signed.study.study_hash)
        assert (charge.round, charge.cost) == (f"{RUN}-0", trained.cost)
        assert trained.cost.epsilon <= 12.0


def test_receipts_say_that_later_rounds_cost_nothing_more(tmp_path: Path) -> None:
    with training_world(tmp_path) as world:
        trained = train(world, tmp_path)
        store = world.nodes["node-1"].store
        allowed = [one for one in Receipts(store).of(store.people()[0]) if one.outcome == "allowed"]
        assert len(allowed) == ROUNDS
        words = [one.words() for one in allowed]
        assert f"It cost you ε = {trained.cost.epsilon:.3g}" in words[0]
        assert all("cost you nothing more" in one for one in words[1:])


def test_nobody_is_asked_oftener_than_announced_whatever_the_coordinator_forgets(
    tmp_path: Path,
) -> None:
    with training_world(tmp_path) as world:
        train(world, tmp_path)
        for file in (tmp_path / "trainings").iterdir():
            file.unlink()
        # Whoever forgot that it trained, and whom no ledger keeps from it, asks again.
        with pytest.raises(CohortError, match="nodes are there"):
            train(world, tmp_path, run_id=RUN + 1)
        assert all(len(costs) == ROUNDS for costs in paid(world, "node-1"))
        store = world.nodes["node-1"].store
        last = Receipts(store).of(store.people()[0])[-1]
        assert (last.outcome, last.told.rule) == ("refused", "repeat")


class Stopped(BaseException):
    """The process ends here."""


@dataclass
class Stopping:
    """Keeps what it is given, and stops the process before or after one of its writes."""

    files: Checkpoints
    at: int
    after: bool
    writes: int = 0

    def read(self, query: str) -> bytes | None:
        return self.files.read(query)

    def write(self, query: str, data: bytes) -> None:
        self.writes += 1
        if self.writes == self.at and not self.after:
            raise Stopped
        self.files.write(query, data)
        if self.writes == self.at:
            raise Stopped


def files(world: World, directory: Path) -> TrainingFiles:
    return TrainingFiles(
        directory=directory / "trainings", study_hash=world.signed.study.study_hash
    )


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 2 + 2 * ROUNDS])
def test_a_training_that_is_stopped_goes_on_and_nobody_pays_twice(
    tmp_path: Path,
    at: int,
    after: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    with training_world(tmp_path) as world:
        stopping = Stopping(files=files(world, tmp_path), at=at, after=after)
        with pytest.raises(Stopped):
            train(world, tmp_path, checkpoints=stopping)
        said: list[str] = []
        trained = train(world, tmp_path, run_id=RUN + 1, said=said)
        # The first write comes before all, the second before anything is reserved; then odd ones
        # come before a round is dispatched, even ones after its sum.
        lost = at > 2 and (at % 2 == 1) == after
        assert (trained.asked, trained.summed) == (ROUNDS, ROUNDS - lost)
        for name in world.nodes:
            for costs in paid(world, name):
                assert [one for one in costs if one is not None] == [trained.cost]
                assert len(costs) <= ROUNDS
        (charge,) = world.ledger.charges(world.signed.study.study_hash)
        # Who was stopped before anything was reserved reserves in the run that goes on.
        assert charge.round == (f"{RUN + 1}-0" if at < 3 else f"{RUN}-0")
        assert trained.weights[0] < 0


def test_a_finished_training_is_not_asked_again(tmp_path: Path) -> None:
    with training_world(tmp_path) as world:
        first = train(world, tmp_path)
        asked = len(world.asked)
        again = train(world, tmp_path, run_id=RUN + 1)
        assert len(world.asked) == asked
        assert (again.weights == first.weights).all()
        assert again.audit == first.audit


def test_nodes_may_vanish_and_come_back_between_rounds(tmp_path: Path) -> None:
    with training_world(tmp_path) as world:
        world.faults[("node-5", "mask")] = gone
        said: list[str] = []
        trained = train(world, tmp_path, said=said)
        assert (trained.summed, trained.nodes) == (ROUNDS, 4)
        assert trained.people == 4 * PEOPLE


def test_rounds_that_come_to_nothing_end_the_run_and_not_the_training(tmp_path: Path) -> None:
    with training_world(tmp_path) as world:
        for node in ("node-4", "node-5"):
            world.faults[(node, "mask")] = gone
        with pytest.raises(CohortError, match="run the study again"):
            train(world, tmp_path)
        world.faults.clear()
        trained = train(world, tmp_path, run_id=RUN + 1)
        assert (trained.asked, trained.summed) == (ROUNDS, ROUNDS - 3)


def test_what_was_kept_and_is_damaged_asks_nobody(tmp_path: Path) -> None:
    with training_world(tmp_path) as world:
        train(world, tmp_path)
        (file,) = (tmp_path / "trainings").iterdir()
        asked = len(world.asked)
        file.write_bytes(file.read_bytes()[:-40])
        with pytest.raises(CheckpointError, match="damaged"):
            train(world, tmp_path, run_id=RUN + 1)
        assert len(world.asked) == asked


def test_a_personal_head_is_trained_and_judged_and_never_sent(tmp_path: Path) -> None:
    changes = {"rounds = 6": "rounds = 2\npersonal = { steps = 3, rate = 1.0 }"}
    with training_world(tmp_path, changes) as world:
        trained, evaluated = judged(world, tmp_path)
        # The one weight of the input: the intercept stays on devices.
        assert trained.weights.shape == (1,)
        assert any(one.name == "AUC" for one in evaluated.answer.estimates)


def test_a_clip_that_adapts_comes_with_each_round(tmp_path: Path) -> None:
    changes = {"rounds = 6": "rounds = 3\nclip = 20.0\nadaptive = { quantile = 0.5, rate = 0.5 }"}
    with training_world(tmp_path, changes) as world:
        trained = train(world, tmp_path)
        assert trained.summed == 3
        data = files(world, tmp_path).read("mood")
        assert data is not None
        query = declared_question(world.signed.study.query("mood").ask)
        assert isinstance(query, TrainQuery)
        kept = parse_kept(data, study=world.signed.study, query=query)
        state = parse_state(kept.state, study=bytes.fromhex(world.signed.study.study_hash))
        # Updates are far shorter than it: it shrinks.
        assert state.clip < 20.0


def test_what_else_a_study_asks_waits_for_a_training_that_is_not_over(tmp_path: Path) -> None:
    more = '[[queries]]\nepsilon = 0.5\nask = { kind = "count", name = "all", column = "mood" }\n'
    changes = {"[[queries]]\nepsilon = 3.0": f"{more}\n[[queries]]\nepsilon = 3.0"}
    with training_world(tmp_path, changes) as world:
        for node in ("node-4", "node-5"):
            world.faults[(node, "mask")] = gone
        asking, numbers = conduct(world, tmp_path), numbers_of(world.signed.study)
        with pytest.raises(CohortError, match="run the study again"):
            asking.ask("mood", numbers["mood"])
        world.faults.clear()
        with pytest.raises(CohortError, match="all waits for the training mood"):
            asking.ask("all", numbers["all"])
        assert len(world.ledger.charges(world.signed.study.study_hash)) == 1


def test_the_rule_for_an_early_end_remembers_its_sums_over_a_stop(tmp_path: Path) -> None:
    # At this level any three sums are taken for noise.
    rule = "rounds = 6\nstop = { patience = 3, level = 0.999999999999 }"
    with training_world(tmp_path, {"rounds = 6": rule, "epsilon = 12.0": "epsilon = 0.5"}) as world:
        # After the second sum.
        stopping = Stopping(files=files(world, tmp_path), at=6, after=True)
        with pytest.raises(Stopped):
            train(world, tmp_path, checkpoints=stopping)
        trained = train(world, tmp_path, run_id=RUN + 1)
        assert (trained.asked, trained.summed) == (3, 3)
