"""Training at sites over real nodes: each by DP-SGD, averaged, paid for, and judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from federated.errors import CohortError, ManifestError
from federated.learning.at_site import AtSite
from federated.learning.round_query import TrainQuery
from federated.model import NoisePlan, Query
from federated.node.receipts import Receipts
from federated.questions import declared_question
from tests.federated.runs import RUN, gone
from tests.federated.test_training_run import Stopped, Stopping, paid
from tests.federated.test_training_run import files as _files
from tests.federated.trainings import PEOPLE, judged, query_of, train, training_world

ROUNDS = 3
AT_SITES = {
    "rounds = 6": f"rounds = {ROUNDS}\nat_site = {{ rate = 0.5, steps = 20, least = 20 }}",
    "canaries = 200\n": "",
    "work = { epochs = 4, rate = 2.0 }": "work = { rate = 2.0 }",
}


def test_a_model_is_trained_at_sites_paid_once_and_judged(tmp_path: Path) -> None:
    with training_world(tmp_path, AT_SITES) as world:
        trained, evaluated = judged(world, tmp_path)
        assert (trained.asked, trained.summed, trained.people) == (ROUNDS, ROUNDS, 5 * PEOPLE)
        assert trained.weights[0] < -0.5
        auc = next(one for one in evaluated.answer.estimates if one.name == "AUC")
        assert auc.value > 0.75
        assert trained.audit is None
        assert 11.9 < trained.cost.epsilon <= 12.0
        (charge, _) = world.ledger.charges(world.signed.study.study_hash)
        assert charge.cost == trained.cost
        for name in world.nodes:
            for costs in paid(world, name):
                assert costs[:ROUNDS] == (trained.cost, None, None)
        store = world.nodes["node-1"].store
        told = [one for one in Receipts(store).of(store.people()[0]) if one.outcome == "allowed"]
        assert f"It cost you ε = {trained.cost.epsilon:.3g}" in told[0].words()


def test_sums_are_of_what_sites_bring_and_of_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No noise comes on top, and the mean is over people, those held out not among them."""
    made: list[tuple[int, int]] = []

    def change(
        self: AtSite, spec: object, weights: np.ndarray, rows: list[object], *,
        people: int, noise: NoisePlan, random: object,
    ) -> np.ndarray:  # fmt: skip
        del self, spec, noise, random
        made.append((people, sum(bool(len(one.days)) for one in rows)))  # type: ignore[attr-defined]
        return np.array([1000, -2000], dtype=np.int64)[: len(weights)] * people

    monkeypatch.setattr(AtSite, "change", change)
    with training_world(tmp_path, AT_SITES) as world:
        trained = train(world, tmp_path)
        scale = query_of(world.signed.study).spec.scale
        assert trained.weights == pytest.approx(np.array([1000, -2000]) * ROUNDS / scale)
        assert all(people == PEOPLE for people, _ in made)
        # 30 % are held out, by chance.
        assert 0.5 < np.mean([own for _, own in made]) / PEOPLE < 0.9


def test_a_node_of_few_people_takes_no_part(tmp_path: Path) -> None:
    changes = {**AT_SITES, "rounds = 6": AT_SITES["rounds = 6"].replace("20 }", "31 }")}
    with training_world(tmp_path, changes) as world:
        with pytest.raises(CohortError, match="nodes are there"):
            train(world, tmp_path)
        assert world.ledger.charges(world.signed.study.study_hash) == []
        assert all(costs == () for costs in paid(world, "node-1"))


@pytest.mark.parametrize(("at", "lost"), [(4, 0), (5, 1)])
def test_it_goes_on_where_it_was_and_loses_a_node(tmp_path: Path, at: int, lost: int) -> None:
    with training_world(tmp_path, AT_SITES) as world:
        stopping = Stopping(files=_files(world, tmp_path), at=at, after=True)
        with pytest.raises(Stopped):
            train(world, tmp_path, checkpoints=stopping)
        world.faults[("node-5", "mask")] = gone
        trained = train(world, tmp_path, run_id=RUN + 1)
        assert (trained.asked, trained.summed, trained.nodes) == (ROUNDS, ROUNDS - lost, 4)
        assert np.isfinite(trained.weights).all()
        for name in world.nodes:
            for costs in paid(world, name):
                assert [one for one in costs if one is not None] == [trained.cost]


@dataclass
class Lacking:
    """A question on a machine without Opacus."""

    query: TrainQuery

    def __getattr__(self, name: str) -> object:
        return getattr(self.query, name)

    def verify_here(self) -> None:
        raise ManifestError("not installed here")


def test_a_node_that_cannot_is_not_counted_and_nobody_pays_for_it(tmp_path: Path) -> None:
    with training_world(tmp_path, AT_SITES) as world:
        service = world.nodes["node-5"].service

        def query(ask: str) -> Query:
            found = declared_question(ask)
            return Lacking(found) if isinstance(found, TrainQuery) else found  # type: ignore[return-value]

        service._ports = replace(service._ports, query=query)
        trained = train(world, tmp_path)
        assert (trained.summed, trained.nodes, trained.people) == (ROUNDS, 4, 4 * PEOPLE)
        assert all(costs == () for costs in paid(world, "node-5"))
        assert world.ledger.balance("device:node-5").releases == 0
