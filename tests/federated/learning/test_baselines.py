"""Baselines: what each may look at, and what it costs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from federated.accounting import cost_of
from federated.aggregation.bits import SeededBits
from federated.learning.baselines import (
    Scored,
    centralised,
    centralised_private,
    each_alone,
    noise_for,
    pooled,
    scored,
)
from federated.learning.models import gradient, parameters
from federated.learning.round_query import TrainQuery
from federated.learning.spec import Feature, Label, TrainSpec, Work
from federated.model import PersonRows, PrivacyCost

SPEC = TrainSpec(
    name="made_up",
    features=(Feature(column="x", low=-3, high=3), Feature(column="z", low=-3, high=3)),
    label=Label(column="y", low=0, high=1, at_least=0.5),
    work=Work(rate=4.0),
    rounds=10,
)


def people(count: int, seed: int, *, flipped: bool = False) -> list[PersonRows]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        x, z = random.normal(0, 1, (2, 10))
        odds = -2 * x if flipped else 2 * x
        y = (random.random(10) < 1 / (1 + np.exp(-odds))).astype(np.float64)
        found.append(PersonRows(days=np.arange(10), values={"x": x, "z": z, "y": y}))
    return found


def test_descent_over_everybody_ends_where_the_gradient_is_zero() -> None:
    train = people(50, 1)
    weights = centralised(SPEC, train, steps=500, rate=4.0)
    assert np.abs(gradient(SPEC, weights, pooled(SPEC, train))).max() < 1e-6
    assert scored(SPEC, weights, people(50, 2)).auc > 0.8


def test_a_curators_rounds_together_cost_what_was_allowed() -> None:
    from federated.accounting import compose

    noise = noise_for(SPEC, epsilon=2.0, delta=1e-5)
    sensitivity = TrainQuery(spec=SPEC).rounding.sensitivity
    one: PrivacyCost = cost_of(noise, sensitivity, delta=1e-5)
    assert compose([one] * SPEC.rounds, delta=1e-5) == pytest.approx(2.0, rel=1e-6)
    assert compose([one] * (SPEC.rounds + 1), delta=1e-5) > 2.0


def test_a_private_curator_is_near_the_other_with_many_people_and_far_with_little_budget() -> None:
    train, held_out = people(400, 3), people(100, 4)
    best = scored(SPEC, centralised(SPEC, train, steps=200, rate=4.0), held_out).auc
    random = SeededBits(bytes(32), b"test")
    spec = replace(SPEC, rounds=5)
    private = centralised_private(spec, train, epsilon=4.0, delta=1e-5, random=random)
    assert scored(spec, private, held_out).auc > best - 0.03
    lost = centralised_private(spec, train, epsilon=0.005, delta=1e-5, random=random)
    assert np.linalg.norm(lost) > 5 * np.linalg.norm(private)


def test_a_site_alone_knows_only_its_own() -> None:
    sites = [
        (people(40, 5), people(40, 6)),
        (people(40, 7, flipped=True), people(40, 8, flipped=True)),
    ]
    alone = each_alone(SPEC, sites, steps=100, rate=4.0)
    assert all(one.auc > 0.8 for one in alone)
    together = centralised(SPEC, [*sites[0][0], *sites[1][0]], steps=100, rate=4.0)
    assert scored(SPEC, together, sites[0][1]).auc < 0.7


def test_one_class_has_no_auc() -> None:
    assert math.isnan(Scored(scores=np.array([0.1, 0.2]), truth=np.ones(2)).auc)


def test_nobody_makes_no_examples() -> None:
    assert pooled(SPEC, []).x.shape == (0, 2)
    assert not centralised(SPEC, [], steps=3, rate=1.0).any()
    assert parameters(SPEC) == 3
