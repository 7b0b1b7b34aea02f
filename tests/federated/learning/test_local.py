"""A round's work: descent, and zeros where it leads nowhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from federated.learning.local import update
from federated.learning.models import gradient, parameters
from federated.learning.spec import Examples, TrainSpec, Work
from tests.federated.learning.samples import LINEAR, LOGISTIC, SPECS, made_up, weights_for


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_an_epoch_is_one_step_along_the_gradient_of_all_examples(spec: TrainSpec) -> None:
    spec = replace(spec, work=Work(epochs=2, rate=0.25, l2=0.1))
    examples = made_up(spec, 1)
    weights = weights_for(parameters(spec), 2)
    first = weights - 0.25 * gradient(spec, weights, examples)
    second = first - 0.25 * gradient(spec, first, examples)
    before = weights.copy()
    assert update(spec, weights, examples) == pytest.approx(second - weights, abs=1e-15)
    assert np.array_equal(weights, before)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_what_leads_nowhere_is_zeros(spec: TrainSpec) -> None:
    examples = made_up(spec, 1)
    good = weights_for(parameters(spec), 2)
    spoiled = good.copy()
    spoiled[0] = np.nan
    endless = good.copy()
    endless[-1] = np.inf
    nobody = Examples(x=examples.x[:0], y=examples.y[:0])
    unknown = Examples(x=np.full_like(examples.x, np.nan), y=examples.y)
    for weights, given in (
        (spoiled, examples), (endless, examples), (good[:-1], examples), (good[None], examples),
        (np.append(good, 0), examples), (good, nobody), (good, unknown),
    ):  # fmt: skip
        found = update(spec, weights, given)
        assert found.shape == good.shape
        assert not found.any()
    assert update(spec, good, examples).any()


def test_an_overflow_is_zeros() -> None:
    spec = replace(LINEAR, work=Work(epochs=100, rate=1000.0))
    assert not update(spec, weights_for(3, 1), made_up(spec, 1)).any()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_huge_weights_raise_nothing(spec: TrainSpec) -> None:
    for size in (1e150, 1e300, 1e308):
        found = update(spec, weights_for(parameters(spec), 3, size), made_up(spec, 1))
        assert np.isfinite(found).all()


def test_descent_lowers_the_loss() -> None:
    spec = replace(LOGISTIC, work=Work(epochs=50, rate=0.5))
    examples = made_up(spec, 4, count=30)
    weights = np.zeros(parameters(spec))
    after = weights + update(spec, weights, examples)
    assert np.linalg.norm(gradient(spec, after, examples)) < 0.5 * np.linalg.norm(
        gradient(spec, weights, examples)
    )
