"""Subgroups of people held out: what one private answer at ε = 1 can say of them, and what not."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from federated.learning.evaluate import EvaluateRound
from federated.model import Estimate
from tests.federated.learning import fairness
from tests.federated.learning.fairness import BINS, exact, groups, judged, question

DRAWS = 20
CALIBRATION = "predicted minus observed"


@cache
def asked(bins: int) -> tuple[EvaluateRound, NDArray[np.int64]]:
    query = question(judged().weights, bins=bins)
    return query, fairness.summed(query, judged().held_out)


@cache
def released(epsilon: float, *, bins: int = BINS) -> tuple[dict[str, Estimate], ...]:
    """The answer under several draws of noise."""
    query, total = asked(bins)
    people = len(judged().held_out)
    return tuple(
        {
            one.name: one
            for one in fairness.answer(query, total, people, epsilon=epsilon, seed=seed).estimates
        }
        for seed in range(DRAWS)
    )


@cache
def truth() -> dict[str, float]:
    return exact(judged().weights, judged().held_out)


def told(found: Estimate) -> bool:
    return (found.interval.low, found.interval.high) not in {(0.0, 1.0), (-1.0, 1.0)}


def half(found: Estimate) -> float:
    return (found.interval.high - found.interval.low) / 2


def test_every_group_is_of_people_whom_no_round_asked() -> None:
    learned_from = {id(one) for one in judged().learned_from}
    assert learned_from.isdisjoint(id(one) for one in judged().held_out)
    sizes = {name: len(people) for name, people in groups(judged().held_out).items()}
    whole = sizes.pop("")
    assert whole > 1900
    assert min(sizes.values()) > 600
    by_sex, by_age = (
        sum(size for name, size in sizes.items() if name.startswith(column))
        for column in ("sex", "age_years")
    )
    assert by_sex == by_age == whole


def test_an_answer_carries_the_noise_that_its_intervals_allow_for() -> None:
    query, total = asked(BINS)
    drawn = []
    for seed in range(DRAWS):
        released_sum, left = fairness.noisy(query, total, epsilon=1.0, seed=seed)
        assert left.mechanism == "discrete_laplace"
        assert left.scale >= query.sensitivity.l1
        drawn.append((released_sum - total) / left.scale)
    assert np.mean(np.concatenate(drawn) ** 2) == pytest.approx(2.0, rel=0.25)


def test_at_epsilon_1_each_groups_calibration_is_told_to_a_twentieth() -> None:
    for found in released(1.0):
        for name, one in found.items():
            if name.startswith(CALIBRATION):
                assert told(one)
                assert half(one) <= 0.06
            if name == CALIBRATION:
                assert half(one) <= 0.025


def test_at_epsilon_1_an_auc_is_either_told_with_its_interval_or_not_at_all() -> None:
    """Who has some 60 ill people in a group is told nothing often, and never a number alone."""
    for found in released(1.0):
        assert told(found["AUC"])
        for name in found:
            if name.startswith("AUC,"):
                one = found[name]
                assert half(one) >= 0.05
                assert told(one) or one.value == 0.5


def test_at_epsilon_4_every_groups_auc_is_told() -> None:
    for found in released(4.0, bins=12):
        for name, one in found.items():
            if name.startswith("AUC"):
                assert told(one)
                assert half(one) <= 0.1


@pytest.mark.parametrize(("epsilon", "bins"), [(1.0, BINS), (4.0, 12)])
def test_intervals_by_group_hold_what_the_rows_themselves_say(epsilon: float, bins: int) -> None:
    """Sampling error is in them, too, so that they hold the same people's figure more often."""
    for name, value in truth().items():
        within = [
            one[name].interval.low <= value <= one[name].interval.high
            for one in released(epsilon, bins=bins)
        ]
        assert np.mean(within) >= 0.9, name


def test_no_group_is_told_much_worse_than_another() -> None:
    """Read off the rows, which only public data allow."""
    found = truth()
    aucs = [value for name, value in found.items() if name.startswith("AUC,")]
    assert min(aucs) > 0.72
    assert max(aucs) - min(aucs) < 0.1
    assert max(abs(value) for name, value in found.items() if name.startswith(CALIBRATION)) < 0.05
