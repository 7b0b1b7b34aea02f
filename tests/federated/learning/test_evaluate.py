"""Evaluation: bounded whatever came in, exact without noise, and its intervals hold with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.aggregation.bits import SeededBits
from federated.analytics.plan import choose_noise, plan_query
from federated.errors import CohortError, ManifestError
from federated.learning.baselines import Scored, common, last_value, own_mean, pooled, scored
from federated.learning.evaluate import EvaluateQuery, EvaluateRound, Subgroup
from federated.learning.models import parameters
from federated.learning.ranking import knots
from federated.learning.spec import Feature, Label, TrainSpec
from federated.model import Answer, NoisePlan, PersonRows
from tests.federated.analytics.samples import hostile_rows, person
from tests.federated.analytics.simulated import laplace
from tests.federated.learning.samples import GRU, LINEAR, LOGISTIC, NUMBERS, SPECS, weights_for
from tests.federated.learning.test_round_query import hostile_weights, keeps, weights_of

NONE = NoisePlan(mechanism="discrete_laplace", scale=1e-3)
GROUPS = (
    Subgroup(column="sleep_quality", edges=(1, 4.5, 7)),
    Subgroup(column="arm", edges=(-0.5, 0.5, 1.5)),
)
X = Feature(column="x", low=-3, high=3)
ONE_DAY = TrainSpec(
    name="one_day", features=(X,), label=Label(column="y", low=0, high=1, at_least=0.5)
)
WEIGHTS = np.array([2.0, -1.0])


def bits(seed: int) -> SeededBits:
    return SeededBits(seed.to_bytes(32), b"test")


def drawn(random: np.random.Generator, people: int, days: int = 1) -> list[PersonRows]:
    """People whose days are alike, and whose risk is not quite what the model says."""
    found = []
    for _ in range(people):
        x = np.clip(random.normal(random.normal(0, 0.7), 0.5, days), -3, 3)
        likely = 1 / (1 + np.exp(-(1.2 * x - 0.5)))
        group = np.full(days, float(random.integers(0, 2)))
        y = (random.random(days) < likely).astype(np.float64)
        found.append(PersonRows(days=np.arange(days), values={"x": x, "y": y, "arm": group}))
    return found


def answer(
    query: EvaluateRound, people: list[PersonRows], noise: NoisePlan = NONE, seed: int = 0
) -> Answer:
    random = bits(seed)
    total = np.sum([query.encode(rows, random) for rows in people], axis=0)
    if noise is not NONE:
        total = total + laplace(np.random.default_rng(seed), noise.scale, query.dimension)
    return query.decode(total, noise=noise, people=len(people), level=0.95)


def values(found: Answer) -> dict[str, float]:
    return {one.name: one.value for one in found.estimates}


@pytest.mark.filterwarnings("error")
@settings(deadline=None, max_examples=40)
@given(rows=hostile_rows(), weights=hostile_weights(), seed=st.integers(0, 2**32))
def test_a_contribution_keeps_to_sensitivity_and_bound_whatever_weights_and_rows_hold(
    rows: PersonRows, weights: tuple[int, str, float], seed: int
) -> None:
    for spec in SPECS:
        asked = EvaluateQuery(spec=spec, bins=8, subgroups=GROUPS, examples=5)
        query = asked.at(weights_of(parameters(spec), weights))
        keeps(query, query.encode(rows, bits(seed)))


def test_many_days_cost_no_more_than_one() -> None:
    for spec in (LOGISTIC, LINEAR):
        query = EvaluateQuery(spec=spec, subgroups=GROUPS).at(weights_for(parameters(spec), 1))
        for days in (1, 5, 40):
            masses = query.masses(person(2, days=days))
            start = 0
            for block in query.layout.blocks:
                assert masses[start : start + block.size].sum() <= 1 + 1e-9
                start += block.size


def test_without_noise_the_answer_is_the_exact_figure() -> None:
    people = drawn(np.random.default_rng(1), 3000)
    query = EvaluateQuery(spec=ONE_DAY).at(WEIGHTS)
    found = values(answer(query, people))
    exact = scored(ONE_DAY, WEIGHTS, people)
    assert found["AUC"] == pytest.approx(exact.auc, abs=0.003)
    assert found["predicted minus observed"] == pytest.approx(
        float(np.mean(exact.scores - exact.truth)), abs=1e-3
    )
    assert found["Brier score"] == pytest.approx(
        float(np.mean((exact.scores - exact.truth) ** 2)), abs=1e-3
    )
    assert found["observed rate"] == pytest.approx(float(exact.truth.mean()), abs=1e-3)


@pytest.mark.parametrize(("bins", "lost"), [(16, 0.004), (32, 0.001), (64, 0.0005)])
def test_the_steps_of_the_scores_cost_little_auc(bins: int, lost: float) -> None:
    people = drawn(np.random.default_rng(2), 2000)
    found = values(answer(EvaluateQuery(spec=ONE_DAY, bins=bins).at(WEIGHTS), people))
    assert abs(found["AUC"] - scored(ONE_DAY, WEIGHTS, people).auc) < lost


def test_subgroups_say_what_their_people_alone_would() -> None:
    people = drawn(np.random.default_rng(3), 2000)
    asked = EvaluateQuery(spec=ONE_DAY, subgroups=(GROUPS[1],))
    found = values(answer(asked.at(WEIGHTS), people))
    for arm, name in ((0.0, "arm -0.5 to 0.5"), (1.0, "arm 0.5 to 1.5")):
        some = [rows for rows in people if rows.values["arm"][0] == arm]
        alone = values(answer(EvaluateQuery(spec=ONE_DAY).at(WEIGHTS), some))
        assert found[f"AUC, {name}"] == pytest.approx(alone["AUC"], abs=1e-3)
        assert found[f"predicted minus observed, {name}"] == pytest.approx(
            alone["predicted minus observed"], abs=1e-3
        )


@pytest.mark.parametrize(("days", "epsilon"), [(1, 1.0), (1, 4.0), (10, 2.0)])
def test_intervals_of_a_class_hold_the_truth(days: int, epsilon: float) -> None:
    random = np.random.default_rng(4)
    query = EvaluateQuery(spec=ONE_DAY, bins=32).at(WEIGHTS)
    everybody = drawn(random, 3000, days)
    masses = np.array([query.masses(rows) for rows in everybody])
    truth = _truth(everybody)
    noise = choose_noise(query, epsilon=epsilon, delta=0)
    studies, held = 300, dict.fromkeys(truth, 0)
    for seed in range(studies):
        chosen = random.integers(0, len(masses), 800)
        total = np.rint(masses[chosen].sum(axis=0) * query.layout.unit).astype(np.int64)
        total += laplace(np.random.default_rng(seed), noise.scale, query.dimension)
        for one in query.decode(total, noise=noise, people=800, level=0.95).estimates:
            if one.name in held:
                held[one.name] += one.interval.low <= truth[one.name] <= one.interval.high
    # Four standard deviations of a share of 300 below 0.95.
    assert min(held.values()) >= 0.9 * studies, held


def _truth(everybody: list[PersonRows]) -> dict[str, float]:
    exact = scored(ONE_DAY, WEIGHTS, everybody)
    return {
        "AUC": exact.auc,
        "predicted minus observed": float(np.mean(exact.scores - exact.truth)),
        "Brier score": float(np.mean((exact.scores - exact.truth) ** 2)),
        "observed rate": float(exact.truth.mean()),
    }


def numbers(random: np.random.Generator, people: int) -> list[PersonRows]:
    """Moods that follow sleep and the person's own level."""
    found = []
    for _ in range(people):
        sleep = random.normal(random.normal(4, 0.8), 1, 15)
        mood = random.normal(0, 1) + (sleep - 4) + random.normal(0, 0.7, 15)
        found.append(
            PersonRows(
                days=np.arange(15),
                values={"sleep_quality": np.clip(sleep, 1, 7), "mood": np.clip(mood, -6, 6)},
            )
        )
    return found


SAME_DAY = TrainSpec(
    name="same_day",
    features=(Feature(column="sleep_quality", low=1, high=7),),
    label=Label(column="mood", low=-6, high=6),
    kind="linear",
)
SLOPE = np.array([0.5, 0.0])


def test_a_numbers_errors_are_exact_without_noise_and_the_past_stands_beside_them() -> None:
    people = numbers(np.random.default_rng(5), 300)
    query = EvaluateQuery(spec=SAME_DAY, examples=15, largest_error=12).at(SLOPE)
    found = values(answer(query, people))
    model, mean, last = (
        scored(SAME_DAY, SLOPE, people), own_mean(SAME_DAY, people), last_value(SAME_DAY, people),
    )  # fmt: skip
    assert found["MAE"] == pytest.approx(model.mae(SAME_DAY), abs=2e-3)
    with_past, mean, last = common(model, mean, last)
    assert len(with_past.truth) == 14 * 300
    for name, past in (("own mean", mean), ("last value", last)):
        by = past.mae(SAME_DAY) - with_past.mae(SAME_DAY)
        assert found[f"MAE of the {name} minus MAE"] == pytest.approx(by, abs=5e-3)
        assert found[f"MAE of the {name}"] == pytest.approx(past.mae(SAME_DAY), abs=0.02)


def test_intervals_of_a_number_hold_the_truth() -> None:
    random = np.random.default_rng(6)
    query = EvaluateQuery(spec=SAME_DAY, largest_error=4).at(SLOPE)
    everybody = numbers(random, 2000)
    masses = np.array([query.masses(rows) for rows in everybody])
    exact = np.rint(masses.sum(axis=0) * query.layout.unit).astype(np.int64)
    truth = values(query.decode(exact, noise=NONE, people=2000, level=0.95))
    noise = choose_noise(query, epsilon=2.0, delta=0)
    studies, held = 300, dict.fromkeys(truth, 0)
    for seed in range(studies):
        chosen = random.integers(0, len(masses), 500)
        total = np.rint(masses[chosen].sum(axis=0) * query.layout.unit).astype(np.int64)
        total += laplace(np.random.default_rng(seed), noise.scale, query.dimension)
        for one in query.decode(total, noise=noise, people=500, level=0.95).estimates:
            held[one.name] += one.interval.low <= truth[one.name] <= one.interval.high
    assert min(held.values()) >= 0.9 * studies, held


def test_a_subgroup_that_is_lost_in_the_noise_says_nothing() -> None:
    people = drawn(np.random.default_rng(7), 400)
    rare = Subgroup(column="arm", edges=(-0.5, 1.5, 9))
    query = EvaluateQuery(spec=ONE_DAY, subgroups=(rare,)).at(WEIGHTS)
    found = {one.name: one for one in answer(query, people).estimates}
    lost = found["AUC, arm 1.5 to 9"]
    assert (lost.interval.low, lost.interval.high) == (0, 1)


def test_too_few_of_a_class_is_refused() -> None:
    people = drawn(np.random.default_rng(8), 60)
    query = EvaluateQuery(spec=ONE_DAY).at(WEIGHTS)
    noise = choose_noise(query, epsilon=0.5, delta=0)
    with pytest.raises(CohortError, match="too few"):
        answer(query, people, noise)
    with pytest.raises(CohortError, match="at least 20"):
        answer(query, people[:19])


def test_scores_that_are_no_numbers_say_nothing() -> None:
    rows = person(1)
    for spec in (LOGISTIC, GRU, NUMBERS):
        query = EvaluateQuery(spec=spec).at(np.full(parameters(spec), np.nan))
        assert not query.masses(rows).any()
        short = EvaluateQuery(spec=spec).at(np.zeros(parameters(spec) - 1))
        assert not short.masses(rows).any()


def test_what_will_be_known_is_planned_before_anybody_is_asked() -> None:
    for spec in (LOGISTIC, SAME_DAY):
        query = EvaluateQuery(spec=spec, bins=16, subgroups=(GROUPS[0],)).at(
            np.zeros(parameters(spec))
        )
        plan = plan_query(query, epsilon=2, delta=1e-5, people=1000)
        assert plan.refused is None
        assert all(one.half_width > 0 for one in plan.expected)


@pytest.mark.parametrize(
    "asked",
    [
        EvaluateQuery(spec=LOGISTIC, bins=1),
        EvaluateQuery(spec=LOGISTIC, bins=1000),
        EvaluateQuery(spec=LOGISTIC, examples=0),
        EvaluateQuery(spec=LOGISTIC, subgroups=GROUPS * 4),
        EvaluateQuery(spec=LOGISTIC, subgroups=(Subgroup(column="arm", edges=()),)),
        EvaluateQuery(spec=LOGISTIC, subgroups=(Subgroup(column="arm", edges=(1, 0)),)),
        EvaluateQuery(spec=LINEAR, largest_error=13.0),
        EvaluateQuery(spec=replace(LOGISTIC, name="No name")),
    ],
)
def test_what_cannot_be_asked_is_refused(asked: EvaluateQuery) -> None:
    with pytest.raises(ManifestError):
        asked.at(np.zeros(4))


def test_columns_are_the_models_and_the_subgroups() -> None:
    query = EvaluateQuery(spec=LOGISTIC, subgroups=GROUPS).at(np.zeros(6))
    assert query.columns == {"sleep_quality", "mood", "arm"}


def test_knots_are_denser_at_both_ends() -> None:
    at = knots(16)
    assert at[0] == 0
    assert at[-1] == 1
    assert np.diff(at).min() == np.diff(at)[[0, -1]].min()


def test_baselines_judge_all_on_the_same_examples() -> None:
    people = numbers(np.random.default_rng(9), 4)
    assert np.isnan(own_mean(SAME_DAY, people).scores).sum() == 4
    assert len(pooled(SAME_DAY, people).y) == 60
    ties = Scored(scores=np.array([0.5, 0.5, 0.1]), truth=np.array([1.0, 0.0, 0.0]))
    assert ties.auc == pytest.approx(0.75)


@pytest.mark.parametrize("bins", [2, 3, 4, 5])
def test_the_coarsest_scales_are_answered(bins: int) -> None:
    people = drawn(np.random.default_rng(3), 400)
    found = answer(EvaluateQuery(spec=ONE_DAY, bins=bins).at(WEIGHTS), people)
    rates = [one for one in found.estimates if one.name.startswith("observed rate at")]
    assert len(rates) == min(bins + 1, 6)
    assert len({one.name for one in rates}) == len(rates)


@pytest.mark.parametrize(("held_out", "said"), [(0.2, "about 20 %"), (0.125, "about 12.5 %")])
def test_an_answer_says_that_not_all_of_the_people_it_counts_were_asked(
    held_out: float, said: str
) -> None:
    """Who is held out is nobody's to count, so everybody is; few may be behind the numbers."""
    for spec in (LOGISTIC, NUMBERS):
        query = EvaluateQuery(spec=replace(spec, held_out=held_out)).unweighted
        assert any(said in one and "held out" in one for one in query.cautions())
