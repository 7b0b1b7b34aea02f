"""Opacus' sums of clipped gradients are those of a plain loop over people."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from federated.aggregation.encoding import clip
from federated.errors import ManifestError
from federated.learning.clipped import Clipper, Method, padded, quicker
from federated.learning.models import gradient, parameters
from federated.learning.spec import Examples, TrainSpec, Work
from tests.federated.learning.samples import GRU, LINEAR, LOGISTIC, MLP, SPECS, made_up, weights_for

WAYS = [
    (replace(spec, work=Work()), method)
    for spec in SPECS
    for method in ("ghost", "hooks")
    if (spec.kind, method) != ("gru", "ghost")
]
ways = pytest.mark.parametrize(
    ("spec", "method"), WAYS, ids=[f"{spec.name}-{method}" for spec, method in WAYS]
)


def crowd(spec: TrainSpec, count: int = 20) -> list[Examples]:
    """People with none to six examples each."""
    return [made_up(spec, seed, count=seed % 7) for seed in range(count)]


def looped(
    spec: TrainSpec, weights: NDArray[np.float64], people: list[Examples], *, norm: float
) -> NDArray[np.float64]:
    each = [clip(gradient(spec, weights, one), norm=norm, order=2) for one in people]
    return np.asarray(np.sum(each, axis=0))


@ways
@pytest.mark.parametrize("share", [0.2, 1.0, 100.0])
def test_the_clipped_sum_is_that_of_a_plain_loop(
    spec: TrainSpec, method: Method, share: float
) -> None:
    people, weights = crowd(spec), weights_for(parameters(spec), 3)
    norms = [float(np.linalg.norm(gradient(spec, weights, one))) for one in people]
    norm = share * float(np.median(norms))
    if share == 1.0:
        assert min(norms) < norm < max(norms)
    found = Clipper(spec, method=method).clipped_sum(weights, padded(spec, people), clip=norm)
    expected = looped(spec, weights, people, norm=norm)
    assert np.linalg.norm(expected) > 0
    assert found == pytest.approx(expected, rel=1e-10, abs=1e-12)


@ways
def test_a_person_of_many_examples_moves_the_sum_as_far_as_one_of_one(
    spec: TrainSpec, method: Method
) -> None:
    clipper, weights = Clipper(spec, method=method), weights_for(parameters(spec), 4)
    one = made_up(spec, 1, count=1)
    many = Examples(x=np.repeat(one.x, 30, axis=0), y=np.repeat(one.y, 30))
    for person in (one, many):
        found = clipper.clipped_sum(weights, padded(spec, [person]), clip=1e-3)
        assert np.linalg.norm(found) == pytest.approx(1e-3, rel=1e-9)


@ways
def test_calls_leave_nothing_behind(spec: TrainSpec, method: Method) -> None:
    """Gradients of one step that were added to those of the next would be counted twice."""
    clipper, people = Clipper(spec, method=method), padded(spec, crowd(spec))
    weights = weights_for(parameters(spec), 5)
    first = clipper.clipped_sum(weights, people, clip=0.1)
    clipper.clipped_sum(2 * weights, people.among(np.array([1, 3])), clip=0.2)
    assert not clipper.clipped_sum(weights, people.among(np.array([], int)), clip=0.1).any()
    assert np.array_equal(clipper.clipped_sum(weights, people, clip=0.1), first)


@ways
def test_who_has_no_example_says_zeros(spec: TrainSpec, method: Method) -> None:
    weights = weights_for(parameters(spec), 6)
    nobody = made_up(spec, 1, count=0)
    clipper = Clipper(spec, method=method)
    assert not clipper.clipped_sum(weights, padded(spec, [nobody, nobody]), clip=1.0).any()


def test_refuses_ghost_clipping_of_a_layer_that_is_used_at_every_step() -> None:
    with pytest.raises(ManifestError, match="hooks"):
        Clipper(GRU, method="ghost")


def test_the_quicker_way_is_by_the_work_that_a_layer_takes() -> None:
    wide = replace(MLP, hidden=(64, 64))
    assert quicker(wide, 1) == "ghost"
    assert quicker(wide, 64) == "hooks"
    assert {quicker(spec, 1) for spec in (LOGISTIC, LINEAR, GRU)} == {"hooks"}
