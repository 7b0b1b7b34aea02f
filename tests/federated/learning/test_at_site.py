"""Training at sites as a question: what it costs, what a site brings, what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from federated.accounting import Accountant, compose, compose_by_rdp, cost_of
from federated.aggregation.bits import SeededBits
from federated.errors import AccountingError, ManifestError
from federated.learning import at_site
from federated.learning.at_site import AtSite
from federated.learning.clipping import AdaptiveClip
from federated.learning.declare import declaration_of, learning_from
from federated.learning.evaluate import EvaluateQuery
from federated.learning.models import parameters
from federated.learning.plan import plan_training
from federated.learning.round_query import SiteRound, TrainQuery
from federated.learning.sampled import sampled_epsilon
from federated.learning.site import train_people
from federated.learning.spec import Feature, Label, TrainSpec, Work
from federated.learning.strategies import LostInNoise
from federated.learning.turns import Turns
from federated.learning.words import training_lines
from federated.model import NoisePlan, PersonRows, Sensitivity, Whole

SPEC = TrainSpec(
    name="mood",
    features=(Feature(column="sleep_hours", low=4.0, high=10.0),),
    label=Label(column="mood", low=-6.0, high=6.0, below=0.0),
    work=Work(rate=2.0, l2=0.001),
    rounds=3,
    clip=0.5,
    held_out=0.2,
)
AT_SITE = AtSite(rate=0.25, steps=20, least=40)
QUERY = TrainQuery(spec=SPEC, at_site=AT_SITE)
DECLARED: Mapping[str, Any] = {
    "kind": "train",
    "name": "mood",
    "features": [{"column": "sleep_hours"}],
    "label": {"column": "mood", "below": 0.0},
    "at_site": {"rate": 0.25, "steps": 20},
}


def people(count: int, seed: int = 1) -> list[PersonRows]:
    drawn = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        sleep = drawn.uniform(4.0, 10.0, 10)
        mood = np.clip(sleep - 7.0 + drawn.normal(0, 0.8, 10), -6.0, 6.0)
        found.append(PersonRows(days=np.arange(10), values={"sleep_hours": sleep, "mood": mood}))
    return found


def brought(
    rows: list[PersonRows], *, weights: Any = None, noise: NoisePlan | None = None
) -> np.ndarray[Any, np.dtype[np.int64]]:
    at = QUERY.begin(QUERY.give(np.zeros(2) if weights is None else weights, clip=1.0))
    assert isinstance(at, SiteRound)
    plan = noise or plan_training(QUERY, epsilon=4.0, delta=1e-5, people=200).noise
    return at.whole(rows, people=len(rows), noise=plan, random=SeededBits(b"s" * 32, b"x"))


# --- What it costs --------------------------------------------------------------------------------


def test_the_price_is_that_of_all_steps_of_all_rounds_sampled() -> None:
    plan = plan_training(QUERY, epsilon=2.0, delta=1e-5, people=200)
    assert 1.99 < plan.cost.epsilon <= 2.0
    multiplier = plan.noise.scale / AT_SITE.step_sensitivity(SPEC).l2
    assert plan.cost.epsilon == pytest.approx(
        sampled_epsilon(multiplier=multiplier, rate=0.25, steps=60, delta=1e-5)
    )
    assert plan.cost == QUERY.price(plan.noise, delta=1e-5, closeness=0.0)
    # Without sampling the same noise costs more, and that is what others would compose.
    whole = cost_of(plan.noise, plan.cost.sensitivity, delta=1e-5)
    assert whole.epsilon > 1.5 * plan.cost.epsilon
    assert QUERY.sensitivity.l2 == pytest.approx(plan.cost.sensitivity.l2)


def test_what_a_site_does_is_what_was_paid_for() -> None:
    plan = plan_training(QUERY, epsilon=2.0, delta=1e-5, people=200)
    training = AT_SITE.training(SPEC, people=100, noise=plan.noise)
    assert (training.rate, training.steps, training.clip) == (0.25, 20, 0.5)
    assert training.noise.scale >= plan.noise.scale
    assert training.noise.scale == pytest.approx(plan.noise.scale)
    # Those who are expected in a step, of those who are not held out.
    assert training.divisor == pytest.approx(0.25 * 100 * 0.8)
    assert 3 * training.steps == 60


@pytest.mark.parametrize("rounds", [1, 3, 7])
def test_more_rounds_are_dearer_and_progress_says_so(rounds: int) -> None:
    query = TrainQuery(spec=replace(SPEC, rounds=rounds), at_site=AT_SITE)
    noise = AT_SITE.noise_for(SPEC, 2.0)
    so_far = [query.epsilon_after(done, noise, delta=1e-5) for done in range(rounds + 1)]
    assert so_far == sorted(so_far)
    assert so_far[0] == 0.0
    assert so_far[-1] == query.price(noise, delta=1e-5, closeness=0.0).epsilon


def test_noise_of_another_kind_has_no_price() -> None:
    laplace = NoisePlan(mechanism="discrete_laplace", scale=1e9)
    with pytest.raises(AccountingError):
        QUERY.price(laplace, delta=1e-5, closeness=0.0)
    with pytest.raises(AccountingError):
        QUERY.price(AT_SITE.noise_for(SPEC, 2.0), delta=0.0, closeness=0.0)


def test_composing_never_says_less_than_the_truth_nor_more_than_adding_up() -> None:
    sampled = plan_training(QUERY, epsilon=2.0, delta=1e-6, people=200).cost
    plain = cost_of(
        NoisePlan(mechanism="discrete_gaussian", scale=10.0),
        Sensitivity(l1=3.0, l2=2.0),
        delta=1e-6,
    )
    assert compose([sampled], delta=1e-6) == sampled.epsilon
    assert compose([sampled, plain], delta=2e-6) <= sampled.epsilon + plain.epsilon
    # At a smaller δ than they were priced at, only what noise and sensitivity say is left.
    assert compose([sampled], delta=5e-7) > 1.5 * sampled.epsilon
    assert Accountant(delta=2e-6, adaptive=True).compose([sampled, plain]) == pytest.approx(
        sampled.epsilon + plain.epsilon
    )
    # For releases that are no more than noise and sensitivity nothing is new.
    many = [plain] * 20
    assert compose(many, delta=1e-4) <= compose_by_rdp(many, delta=1e-4)
    assert compose(many, delta=1e-4) < math.fsum(one.epsilon for one in many)


# --- What a site brings ---------------------------------------------------------------------------


def test_it_is_a_whole_and_no_person_brings_anything_alone() -> None:
    at = QUERY.at(np.zeros(2))
    assert isinstance(at, Whole)
    assert not isinstance(TrainQuery(spec=SPEC).at(np.zeros(2)), Whole)
    assert QUERY.noised_by_node
    assert not TrainQuery(spec=SPEC).noised_by_node
    assert not at.encode(people(1)[0], SeededBits(b"s" * 32, b"x")).any()


def test_a_site_brings_its_change_of_the_weights_for_each_of_its_people() -> None:
    rows = people(100)
    noise = plan_training(QUERY, epsilon=8.0, delta=1e-5, people=200).noise
    weights = np.array([-0.1, 0.2])
    found = brought(rows, weights=weights, noise=noise)
    alone = train_people(
        AT_SITE.training(SPEC, people=100, noise=noise), rows,
        random=SeededBits(b"s" * 32, b"x"), start=weights,
    )  # fmt: skip
    assert found / 100 / SPEC.scale == pytest.approx(alone.weights - weights, abs=1 / SPEC.scale)
    # More sleep, less low mood.
    assert found[0] < 0
    assert np.abs(found).max() <= 100 * QUERY.bound


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300, 1025.0])
def test_weights_that_are_none_make_zeros(bad: float) -> None:
    assert not brought(people(60), weights=np.array([0.0, bad])).any()


def test_a_training_that_runs_away_makes_zeros_and_no_error() -> None:
    """Whether an answer comes must not depend on rows."""
    wild = TrainQuery(spec=replace(SPEC, work=Work(rate=1000.0)), at_site=AT_SITE)
    at = wild.begin(wild.give(np.zeros(2), clip=1.0))
    assert isinstance(at, SiteRound)
    noise = AT_SITE.noise_for(SPEC, 50.0)
    found = at.whole(people(5), people=5, noise=noise, random=SeededBits(b"s" * 32, b"x"))
    assert not found.any()


def test_its_noise_is_there_where_nobody_has_rows() -> None:
    nobody = [PersonRows(days=np.empty(0, np.int64), values={})] * 80
    found = [
        AT_SITE.change(
            SPEC, np.zeros(2), nobody, people=80, noise=AT_SITE.noise_for(SPEC, 4.0),
            random=SeededBits(bytes([seed]) * 32, b"x"),
        )
        / 80
        / SPEC.scale
        for seed in range(150)
    ]  # fmt: skip
    # Twenty steps of a walk: each of rate · multiplier · clip / divisor, nearly without decay.
    step = 2.0 * 4.0 * 0.5 / (0.25 * 80 * 0.8)
    assert np.std(found) == pytest.approx(step * math.sqrt(20), rel=0.15)


# --- What is declared -----------------------------------------------------------------------------


def test_it_survives_a_declaration_and_is_said_in_words() -> None:
    declared = declaration_of(QUERY)
    assert declared["at_site"] == {"rate": 0.25, "steps": 20, "least": 40}
    assert learning_from(declared) == QUERY
    words = dict(training_lines(QUERY))
    assert "on device" not in words
    for number in ("20 steps", "0.25", "40 people", "2", "0.001"):
        assert number in words["at sites"]


@pytest.mark.parametrize(
    "at_site",
    [
        {"rate": 0.0, "steps": 5}, {"rate": 1.5, "steps": 5}, {"rate": float("nan"), "steps": 5},
        {"rate": 0.5, "steps": 0}, {"rate": 0.5, "steps": 10_001}, {"rate": 0.5},
        {"rate": 0.5, "steps": 5, "least": 0}, {"rate": 0.5, "steps": 5, "noise": 1.0}, [],
    ],
)  # fmt: skip
def test_what_no_site_can_do_is_refused(at_site: object) -> None:
    with pytest.raises(ManifestError):
        learning_from({**DECLARED, "at_site": at_site})


@pytest.mark.parametrize(
    "other",
    [
        {"adaptive": AdaptiveClip(quantile=0.5)},
        {"stop": LostInNoise()},
        {"turns": Turns(gap=2, factors=(2, 1))},
        {"canaries": 100},
        {"spec": replace(SPEC, work=Work(epochs=2))},
    ],
)
def test_what_needs_noise_in_the_sum_does_not_go_with_it(other: dict[str, Any]) -> None:
    with pytest.raises(ManifestError, match="at sites"):
        TrainQuery(**{"spec": SPEC, "at_site": AT_SITE, **other})


@pytest.mark.parametrize("missing", ["torch", "opacus"])
def test_a_node_without_opacus_takes_no_part(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """It would bring zeros, and its people would have paid for nothing."""
    QUERY.verify_here()
    network = TrainQuery(spec=replace(SPEC, kind="mlp", hidden=(4,)))
    judging = EvaluateQuery(spec=network.spec)
    monkeypatch.setattr(at_site, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ManifestError, match=missing):
        QUERY.verify_here()
    for one in (network, judging):
        if missing == "torch":
            with pytest.raises(ManifestError, match="torch"):
                one.verify_here()
        else:
            one.verify_here()
    # Others need neither, and the coordinator reads sums without.
    TrainQuery(spec=SPEC).verify_here()
    assert QUERY.at(np.zeros(2)).dimension == parameters(SPEC)


# --- Beside other questions -----------------------------------------------------------------------


def test_a_gaussian_question_beside_it_composes_where_noise_alone_has_no_bound() -> None:
    """Unsampled, the training's ε is so large that the other's closeness would take all of δ."""
    training = plan_training(QUERY, epsilon=4.0, delta=1e-5, people=200).cost
    unsampled = cost_of(training.noise, training.sensitivity, delta=1e-5).epsilon
    noise = NoisePlan(mechanism="discrete_gaussian", scale=20.0)
    closeness = 2e-5 * math.exp(-unsampled)
    plain = cost_of(noise, Sensitivity(l1=3.0, l2=2.0), delta=1e-5, closeness=closeness)
    with pytest.raises(AccountingError):
        compose([replace(training, epsilon=math.inf), plain], delta=2e-5)
    assert compose([training, plain], delta=2e-5) == pytest.approx(training.epsilon + plain.epsilon)
    with pytest.raises(AccountingError):
        compose([training, plain], delta=1.5e-5)
    # What is no cost is not added, nor does one's δ pay for another's.
    for wrong in (
        replace(training, epsilon=-1.0), replace(training, epsilon=math.nan),
        replace(training, delta=-1e-5), replace(training, delta=1.0),
    ):  # fmt: skip
        with pytest.raises(AccountingError):
            compose([wrong, plain], delta=2e-5)
        with pytest.raises(AccountingError):
            Accountant(delta=2e-5, adaptive=True).compose([wrong, plain])
    # What says less of itself than its own noise does is not believed.
    with pytest.raises(AccountingError):
        compose([training, replace(plain, epsilon=plain.epsilon / 2)], delta=2e-5)


def test_its_price_is_of_the_sensitivity_that_it_declares() -> None:
    """To the last bit: else a study would be taken for one that asked again."""
    for rounds in (1, 3, 7, 10):
        for steps in (1, 20, 33):
            query = TrainQuery(
                spec=replace(SPEC, rounds=rounds), at_site=replace(AT_SITE, steps=steps)
            )
            noise = AT_SITE.noise_for(SPEC, 2.0)
            priced = query.price(noise, delta=1e-5, closeness=0.0).sensitivity
            assert priced == query.sensitivity
