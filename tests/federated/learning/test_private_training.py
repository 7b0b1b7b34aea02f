"""Whole trainings on made-up people: what person-level privacy costs in accuracy.

12 features and an intercept, 30 to 400 days a person of which 64 count, people who differ. The
noise is the real sampler's at the scale that the real accounting asks for. Figures stand in the
package's DESIGN.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from federated.aggregation.bits import SeededBits
from federated.aggregation.noise import sample
from federated.learning.clipping import AdaptiveClip, CountedUpdate, weight_for
from federated.learning.factorisation import (
    IDENTITY,
    Factors,
    Participation,
    combine,
    full_cohort,
    optimised,
)
from federated.learning.strategies import Correlated, FedAvg, TrainingState, parse_state, start
from federated.learning.training_cost import training_cost, training_noise
from federated.model import NoisePlan

type People = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]

WIDTH, DAYS, UNIT, CLIP = 13, 64, 4096.0, 1.0
COUNTED = CountedUpdate(dimension=WIDTH, unit=UNIT, weight=weight_for(WIDTH, unit=UNIT))
RULE = Participation(rounds=64, most=4, gap=16)


def made_up(seed: int, people: int, truth: NDArray[np.float64]) -> People:
    """Examples, labels and which of them are there, padded to `DAYS`."""
    random = np.random.default_rng(seed)
    x, y, there = (
        np.zeros((people, DAYS, WIDTH)),
        np.zeros((people, DAYS)),
        np.zeros((people, DAYS)),
    )
    for one in range(people):
        days = min(DAYS, int(random.integers(30, 401)))
        features = 0.6 * random.normal(size=12) + 0.8 * random.normal(size=(days, 12))
        features = np.clip(features / 3, -1, 1)
        logits = 1.5 * features @ truth - 0.5 + 0.7 * random.normal()
        y[one, :days] = random.random(days) < 1 / (1 + np.exp(-logits))
        x[one, :days, :12], x[one, :days, 12], there[one, :days] = features, 1.0, 1.0
    return x, y, there


def updates(people: People, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Five local steps of each person, unclipped."""
    x, y, there = people
    own = np.tile(weights, (len(x), 1))
    for _ in range(5):
        off = (1 / (1 + np.exp(-np.einsum("ntd,nd->nt", x, own))) - y) * there
        own -= 2.0 * np.einsum("nt,ntd->nd", off, x) / there.sum(axis=1)[:, None]
    return own - weights


def whole(vectors: NDArray[np.float64], clip_norm: float) -> NDArray[np.int64]:
    """Clipped to the norm, in integers."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    within = vectors * np.minimum(1, clip_norm / np.maximum(lengths, 1e-12))
    return np.rint(within * UNIT / clip_norm).astype(np.int64)


def auc(people: People, weights: NDArray[np.float64]) -> float:
    x, y, there = people
    scores, labels = (x @ weights)[there > 0], y[there > 0] > 0
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores)] = np.arange(1, len(scores) + 1)
    high = int(labels.sum())
    return float((ranks[labels].sum() - high * (high + 1) / 2) / (high * (len(labels) - high)))


def studies(people: int, count: int) -> Iterator[tuple[int, People, People]]:
    """Seed, people to train on, and other people to judge by."""
    for seed in range(0, 10 * count, 10):
        truth = np.random.default_rng(seed).normal(size=12)
        yield seed, made_up(seed + 1, people, truth), made_up(seed + 2, 600, truth)


def bits(seed: int) -> SeededBits:
    return SeededBits(hashlib.sha256(b"training %d" % seed).digest(), b"test")


def everybody_trains(people: People, noise: NoisePlan | None, seed: int) -> TrainingState:
    strategy, source = FedAvg(average_from=5), bits(seed)
    state = start(np.zeros(WIDTH), clip=CLIP)
    for _ in range(10):
        total = whole(updates(people, state.weights), CLIP if noise else 100.0).sum(axis=0)
        if noise:
            total = total + sample(WIDTH, plan=noise, random=source)
        unit = (CLIP if noise else 100.0) / UNIT
        state = strategy.step(state, total, people=len(people[0]), unit=unit)
    return state


@pytest.mark.parametrize("size", [300, 1000])
def test_a_full_cohort_loses_less_than_a_hundredth_of_auc_at_epsilon_2(size: int) -> None:
    lost = []
    for seed, people, others in studies(size, 2):
        update = COUNTED.rounding.sensitivity
        noise = training_noise(
            update, participation=full_cohort(10), epsilon=2.0, delta=1 / (10 * size)
        )
        plain = auc(others, everybody_trains(people, None, seed).released)
        assert plain > 0.7
        lost.append(plain - auc(others, everybody_trains(people, noise, seed).released))
    assert np.mean(lost) < 0.005
    assert max(lost) < 0.01


def test_a_clip_that_starts_far_too_small_costs_no_more() -> None:
    """Update and count in one vector of one noise, encoded as a device does."""
    ((seed, people, others),) = studies(300, 1)
    noise = training_noise(
        COUNTED.sensitivity, participation=full_cohort(20), epsilon=2.0, delta=1 / 3000
    )
    strategy, rule, source = FedAvg(average_from=12), AdaptiveClip(rate=0.5), bits(seed)
    state = start(np.zeros(WIDTH), clip=0.05)
    clips = []
    for _ in range(20):
        total = sample(WIDTH + 1, plan=noise, random=source)
        for one in updates(people, state.weights):
            total = total + COUNTED.encode(one, clip_norm=state.clip, random=source)
        found = COUNTED.decode(total, clip_norm=state.clip, people=300)
        state = strategy.step(state, found.update, people=300)
        state = start_again(state, rule.following(state.clip, found.unclipped))
        clips.append(state.clip)
    lengths = np.linalg.norm(updates(people, state.weights), axis=1)
    assert np.mean(clips[-6:]) == pytest.approx(float(np.median(lengths)), rel=0.15)
    plain = auc(others, everybody_trains(people, None, seed).released)
    assert plain - auc(others, state.released) < 0.01


def start_again(state: TrainingState, clip_norm: float) -> TrainingState:
    """Through bytes, as a coordinator that stops after every round."""
    study = bytes(32)
    return parse_state(replace(state, clip=clip_norm).to_bytes(study=study), study=study)


def some_train(
    people: People, factors: Factors, noise: NoisePlan | None, seed: int, *, missing: float = 0.0
) -> TrainingState:
    """A sixteenth of the people has an update in a round, of whom a fifth does not come.

    Sites send what is due of earlier updates; `missing` of it never arrives.
    """
    strategy = Correlated(inner=FedAvg(rate=0.5, average_from=32), factors=factors)
    state, source, random = start(np.zeros(WIDTH), clip=CLIP), bits(seed), np.random.default_rng(3)
    past: list[NDArray[np.int64]] = []
    size = len(people[0])
    for now in range(RULE.rounds):
        here = np.arange(now % RULE.gap, size, RULE.gap)
        here = here[random.random(len(here)) < 0.8]
        x, y, there = people
        made = np.zeros((size, WIDTH), dtype=np.int64)
        made[here] = whole(updates((x[here], y[here], there[here]), state.weights), CLIP)
        past = [made, *past][: factors.bands]
        sent = random.random(size) >= missing
        sent[here] = True
        total = combine([(one * sent[:, None]).sum(axis=0) for one in past], factors)
        if noise:
            total = total + sample(WIDTH, plan=noise, random=source)
        state = strategy.step(state, total, people=len(here), unit=CLIP / UNIT)
    return state


def test_correlated_noise_beats_independent_noise_for_people_who_come_and_go() -> None:
    update, delta = COUNTED.rounding.sensitivity, 1 / 3000
    best = optimised(16, RULE)
    lost: dict[str, list[float]] = {"alone": [], "correlated": [], "missing": []}
    for seed, people, others in studies(300, 2):
        plain = auc(others, some_train(people, IDENTITY, None, seed).weights)
        for name, factors, missing in (
            ("alone", IDENTITY, 0.0),
            ("correlated", best, 0.0),
            ("missing", best, 0.3),
        ):
            noise = training_noise(
                update, participation=RULE, factors=factors, epsilon=2.0, delta=delta
            )
            cost = training_cost(noise, update, participation=RULE, factors=factors, delta=delta)
            assert cost.epsilon == pytest.approx(2.0, abs=1e-6)
            state = some_train(people, factors, noise, seed, missing=missing)
            lost[name].append(plain - auc(others, state.weights))
    assert np.mean(lost["correlated"]) < 0.7 * np.mean(lost["alone"])
    assert np.mean(lost["missing"]) < 0.8 * np.mean(lost["alone"])
