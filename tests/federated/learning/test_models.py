"""Gradients are those of the loss; predictions are what the weights say; starts are public."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from federated.errors import ManifestError
from federated.learning import networks
from federated.learning.models import decayed, gradient, initial, parameters, parts, predict
from federated.learning.spec import Examples, TrainSpec
from tests.federated.learning.samples import (
    GRU,
    LINEAR,
    LOGISTIC,
    MLP,
    SPECS,
    made_up,
    weights_for,
)


def loss_of(spec: TrainSpec, weights: NDArray[np.float64], examples: Examples) -> float:
    """The loss, by its definition and from predictions alone."""
    found = predict(spec, weights, examples.x)
    if spec.label.is_class:
        likely = np.where(examples.y == 1, found, 1 - found)
        each = -np.log(likely)
    else:
        each = (found - examples.y) ** 2
    kept = weights[decayed(spec) == 1]
    return float(each.mean() + spec.work.l2 / 2 * (kept @ kept))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_gradients_agree_with_finite_differences(spec: TrainSpec) -> None:
    examples = made_up(spec, 3)
    weights = weights_for(parameters(spec), 4)
    slopes = gradient(spec, weights, examples)
    step = 1e-6
    for place in range(len(weights)):
        moved = np.zeros_like(weights)
        moved[place] = step
        above = loss_of(spec, weights + moved, examples)
        below = loss_of(spec, weights - moved, examples)
        assert slopes[place] == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("spec", [LOGISTIC, LINEAR], ids=lambda spec: spec.name)
def test_torch_says_the_same_gradient_as_numpy(spec: TrainSpec) -> None:
    examples = made_up(spec, 5, count=40)
    weights = weights_for(parameters(spec), 6)
    by_torch = networks.gradient(spec, weights, examples)
    assert np.abs(gradient(spec, weights, examples) - by_torch).max() < 1e-14


def test_the_gru_is_pytorchs() -> None:
    examples = made_up(GRU, 7)
    weights = weights_for(parameters(GRU), 8)
    theirs = torch.nn.GRU(GRU.inputs, GRU.hidden[0], batch_first=True, dtype=torch.float64)
    tensors = {part.name: torch.from_numpy(part.of(weights).copy()) for part in parts(GRU)}
    theirs.load_state_dict(
        {f"{name[4:]}_l0": value for name, value in tensors.items() if name.startswith("gru.")}
    )
    with torch.no_grad():
        state = theirs(torch.from_numpy(examples.x))[0][:, -1]
        expected = state @ tensors["output.weight"].T + tensors["output.bias"]
    found = predict(GRU, weights, examples.x)
    assert np.abs(found - expected[:, 0].numpy()).max() < 1e-14


def test_one_call_batches_many_peoples_gradients() -> None:
    decays = torch.from_numpy(decayed(MLP))
    people = [made_up(MLP, seed) for seed in range(3)]
    weights = weights_for(parameters(MLP), 1)
    each = torch.func.vmap(
        torch.func.grad(lambda w, x, y, s: networks.loss(MLP, decays, w, x, y, s)),
        in_dims=(None, 0, 0, 0),
    )(
        torch.from_numpy(weights),
        torch.from_numpy(np.stack([one.x for one in people])),
        torch.from_numpy(np.stack([one.y for one in people])),
        torch.full((3, 12), 1 / 12, dtype=torch.float64),
    )
    for found, one in zip(each.numpy(), people, strict=True):
        assert np.abs(found - gradient(MLP, weights, one)).max() < 1e-14


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_flat_vector_is_its_parts_and_nothing_else(spec: TrainSpec) -> None:
    count = parameters(spec)
    numbers = np.arange(count, dtype=np.float64)
    places = np.concatenate([part.of(numbers).reshape(-1) for part in parts(spec)])
    assert places.tolist() == list(range(count))
    assert decayed(spec).shape == (count,)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_biases_are_not_decayed(spec: TrainSpec) -> None:
    weights = weights_for(parameters(spec), 2)
    examples = made_up(spec, 1)
    without = replace(spec, work=replace(spec.work, l2=0.0))
    with_decay = replace(spec, work=replace(spec.work, l2=0.5))
    added = gradient(with_decay, weights, examples) - gradient(without, weights, examples)
    for part in parts(spec):
        expected = 0 * part.of(weights) if part.is_bias else 0.5 * part.of(weights)
        assert part.of(added) == pytest.approx(expected, abs=1e-12)


def test_a_start_is_the_seeds_alone() -> None:
    assert initial(MLP, seed=b"a").tolist() == initial(MLP, seed=b"a").tolist()
    assert initial(MLP, seed=b"a").tolist() != initial(MLP, seed=b"b").tolist()
    for part in parts(MLP):
        values = part.of(initial(MLP, seed=b"a"))
        assert (not values.any()) == part.is_bias
        if not part.is_bias:
            assert np.abs(values).max() <= np.sqrt(6 / sum(part.shape))
    assert not initial(LOGISTIC, seed=b"a").any()
    assert not initial(LINEAR, seed=b"a").any()


def test_a_start_is_the_published_one() -> None:
    """Another release of a library must not draw other weights from the same seed."""
    published = [-0.5257438232666404, -0.2852726350763452, -0.009332848870997534]
    assert initial(MLP, seed=b"havengate")[:3].tolist() == published


def test_a_model_too_large_to_be_summed_is_refused() -> None:
    with pytest.raises(ManifestError, match="at most 100000 parameters"):
        parameters(replace(MLP, hidden=(512, 512)))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("value", [1e308, -1e308, np.inf, np.nan])
def test_no_weights_raise_or_warn(spec: TrainSpec, value: float) -> None:
    weights = np.full(parameters(spec), value)
    examples = made_up(spec, 1)
    assert predict(spec, weights, examples.x).shape == examples.y.shape
    assert gradient(spec, weights, examples).shape == weights.shape


def test_a_device_that_trains_logistic_models_never_imports_torch() -> None:
    program = (
        "import sys, numpy as np\n"
        "from tests.federated.learning.samples import LOGISTIC, LINEAR, made_up\n"
        "from federated.learning import examples, models, local, round_query, evaluate, split\n"
        "for spec in (LOGISTIC, LINEAR):\n"
        "    weights = models.initial(spec, seed=b'')\n"
        "    local.update(spec, weights, made_up(spec, 1))\n"
        "    models.predict(spec, weights, made_up(spec, 1).x)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
