"""Sums of clipped gradients: a plain loop's, and of each person by their own rows alone."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from federated.aggregation.encoding import clip
from federated.errors import ManifestError
from federated.learning.clipped import CHUNK, Clipper, Method, padded
from federated.learning.models import gradient, parameters, parts
from federated.learning.spec import Examples, Feature, Label, TrainSpec, Work
from tests.federated.learning.samples import GRU, LOGISTIC, MLP, SPECS, made_up, weights_for

FINENESS = 2.0**24
WAYS = [
    (replace(spec, work=Work()), method)
    for spec in SPECS
    for method in ("ghost", "hooks")
    if (spec.kind, method) != ("gru", "ghost")
]
ways = pytest.mark.parametrize(
    ("spec", "method"), WAYS, ids=[f"{spec.name}-{method}" for spec, method in WAYS]
)
#: Last bits become whatever they like over sixty steps.
CHAOTIC = replace(GRU, hidden=(24,), steps=40, most=4, work=Work())


def crowd(spec: TrainSpec, count: int = 20) -> list[Examples]:
    """People with none to six examples each."""
    return [made_up(spec, seed, count=seed % 7) for seed in range(count)]


def looped(
    spec: TrainSpec, weights: NDArray[np.float64], people: list[Examples], *, norm: float
) -> NDArray[np.float64]:
    each = [clip(gradient(spec, weights, one), norm=norm, order=2) for one in people]
    return np.asarray(np.sum(each, axis=0))


def summed(
    spec: TrainSpec,
    weights: NDArray[np.float64],
    people: list[Examples],
    *,
    norm: float,
    method: Method = "hooks",
    drawn: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    most = 64 if spec.per == "person" else None
    return Clipper(spec, method=method).clipped_sum(
        weights, padded(spec, people, most=most), clip=norm, fineness=FINENESS, drawn=drawn
    )


@ways
@pytest.mark.parametrize("share", [0.2, 1.0, 100.0])
def test_the_clipped_sum_is_that_of_a_plain_loop(
    spec: TrainSpec, method: Method, share: float
) -> None:
    people, weights = crowd(spec, CHUNK + 20), weights_for(parameters(spec), 3)
    norms = [float(np.linalg.norm(gradient(spec, weights, one))) for one in people]
    norm = share * float(np.median(norms))
    if share == 1.0:
        assert min(norms) < norm < max(norms)
    found = summed(spec, weights, people, norm=norm, method=method) * (norm / FINENESS)
    expected = looped(spec, weights, people, norm=norm)
    assert np.linalg.norm(expected) > 0
    # Each person is rounded, by half a step at most.
    assert found == pytest.approx(expected, rel=1e-8, abs=norm / FINENESS * len(people) / 2)


@ways
def test_a_person_of_many_examples_moves_the_sum_as_far_as_one_of_one(
    spec: TrainSpec, method: Method
) -> None:
    weights = weights_for(parameters(spec), 4)
    one = made_up(spec, 1, count=1)
    many = Examples(x=np.repeat(one.x, 30, axis=0), y=np.repeat(one.y, 30))
    for person in (one, many):
        found = summed(spec, weights, [person], norm=1e-3, method=method)
        assert np.linalg.norm(found) == pytest.approx(FINENESS, rel=1e-6)


@ways
def test_calls_leave_nothing_behind(spec: TrainSpec, method: Method) -> None:
    """Gradients of one step that were added to those of the next would be counted twice."""
    clipper, people = Clipper(spec, method=method), padded(spec, crowd(spec), most=64)
    weights, nobody = weights_for(parameters(spec), 5), np.zeros(20, dtype=bool)
    first = clipper.clipped_sum(weights, people, clip=0.1, fineness=FINENESS)
    two = nobody.copy()
    two[[1, 3]] = True
    clipper.clipped_sum(2 * weights, people, clip=0.2, fineness=FINENESS, drawn=two)
    none = clipper.clipped_sum(weights, people, clip=0.1, fineness=FINENESS, drawn=nobody)
    assert not none.any()
    again = clipper.clipped_sum(weights, people, clip=0.1, fineness=FINENESS)
    assert np.array_equal(again, first)


@ways
def test_who_has_no_example_says_zeros(spec: TrainSpec, method: Method) -> None:
    weights = weights_for(parameters(spec), 6)
    nobody = made_up(spec, 1, count=0)
    assert not summed(spec, weights, [nobody, nobody], norm=1.0, method=method).any()


# --- Of their own rows alone ----------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_shapes_are_those_of_the_declaration_whoever_is_there(spec: TrainSpec) -> None:
    """How a library rounds a row depends on the shape that it stands in."""
    shapes = {
        tuple(padded(spec, people).chunk(start).x.shape)
        for people in (
            [made_up(spec, 1, count=0)],
            [made_up(spec, 1, count=1)] * (CHUNK + 5),
        )
        for start in range(0, len(people), CHUNK)
    }
    most = 1 if spec.per == "person" else spec.most
    inner = (spec.steps, spec.inputs) if spec.kind == "gru" else (spec.inputs,)
    assert shapes == {(CHUNK, most, *inner)}


@pytest.mark.parametrize("spec", [*SPECS, CHAOTIC], ids=lambda spec: f"{spec.name}-{spec.steps}")
@pytest.mark.parametrize(("size", "count"), [(1.0, CHUNK + 9), (3.0, 12)])
def test_nobody_changes_anothers_part_by_a_single_bit(
    spec: TrainSpec, size: float, count: int
) -> None:
    """Neither by rows and how many there are, nor by being drawn."""
    weights = np.clip(weights_for(parameters(spec), 1, size), -1000, 1000)
    people = [made_up(spec, seed, count=1) for seed in range(count)]
    nobody = made_up(spec, 1, count=0)
    for place in (5, count - 2):
        others = None
        for rows in (nobody, people[place], made_up(spec, 99, count=4)):
            among = [*people[:place], rows, *people[place + 1 :]]
            alone = [nobody] * len(people)
            alone[place] = rows
            left = summed(spec, weights, among, norm=0.1) - summed(spec, weights, alone, norm=0.1)
            others = left if others is None else others
            assert np.array_equal(left, others)
        assert others is not None
        drawn = np.ones(len(people), dtype=bool)
        drawn[place] = False
        assert np.array_equal(summed(spec, weights, people, norm=0.1, drawn=drawn), others)


@pytest.mark.parametrize("spec", [*SPECS, CHAOTIC], ids=lambda spec: f"{spec.name}-{spec.steps}")
@pytest.mark.parametrize("size", [0.5, 30.0, 1000.0])
def test_no_person_is_longer_than_the_clip(spec: TrainSpec, size: float) -> None:
    weights = np.clip(weights_for(parameters(spec), 1, size), -1024, 1024)
    people = [made_up(spec, seed, count=1 + seed % 4) for seed in range(12)]
    people.append(cancelling(people[0], spec))
    lengths = [float(np.linalg.norm(summed(spec, weights, [one], norm=0.01))) for one in people]
    assert max(lengths) <= FINENESS + np.sqrt(len(weights)) / 2
    assert max(lengths) > 0.9 * FINENESS


def cancelling(one: Examples, spec: TrainSpec) -> Examples:
    """Two examples of one input and opposite labels."""
    y = np.array([1.0, 0.0]) if spec.label.is_class else np.array([1.0, -1.0])
    return Examples(x=np.repeat(one.x[:1], 2, axis=0), y=y)


def test_ghost_clipping_bounds_nobody() -> None:
    """The control: why it is not used where a claim is made. By hooks nobody is longer."""
    features = tuple(Feature(column=f"c{n}", low=-1.0, high=1.0) for n in range(64))
    spec = TrainSpec(
        name="wide", features=features, label=Label(column="y", low=-1.0, high=1.0),
        kind="mlp", hidden=(128, 128, 128), most=2, work=Work(),
    )  # fmt: skip
    # Nothing known but two labels, between which the output nearly lies.
    person = Examples(x=np.zeros((2, 64)), y=np.array([0.7, -0.7]))
    weights, at, worst = np.zeros(parameters(spec)), 0, {"ghost": 0.0, "hooks": 0.0}
    for part in parts(spec):
        size = int(np.prod(part.shape))
        weights[at : at + size] = 256.0 if part.name.endswith("weight") else 0.0
        at += size
    for bias in 10.0 ** np.linspace(-16, -1, 40):
        weights[-1] = bias
        for method in ("ghost", "hooks"):
            found = summed(spec, weights, [person], norm=1.0, method=method)
            worst[method] = max(worst[method], float(np.linalg.norm(found)) / FINENESS)
    assert worst["ghost"] > 10
    assert worst["hooks"] < 1 + 1e-4


def test_a_gradient_that_is_no_number_is_nobodys_but_zeros() -> None:
    """A recurrent network can overflow on its way back, for one person and for nobody else."""
    width, steps = 160, 60
    spec = TrainSpec(
        name="t", features=(Feature(column="c", low=-1, high=1),),
        label=Label(column="y", low=-1, high=1), kind="gru", hidden=(width,), steps=steps, most=2,
    )  # fmt: skip
    weights, named, at = np.zeros(parameters(spec)), {}, 0
    for part in parts(spec):
        size = int(np.prod(part.shape))
        named[part.name] = weights[at : at + size].reshape(part.shape)
        at += size
    named["gru.bias_ih"][:width] = 1000
    named["gru.bias_ih"][width : 2 * width] = -1000
    named["gru.weight_hh"][2 * width :] = 1020
    named["gru.weight_ih"][2 * width :, 0] = 1000
    named["output.weight"][:] = 1000
    still = Examples(x=np.zeros((1, steps, 1)), y=np.array([0.2]))
    other = Examples(x=np.full((1, steps, 1), 0.9), y=np.array([0.2]))
    clipper, data = Clipper(spec), padded(spec, [still, other, other])
    clipper._net.put(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.autograd.backward(clipper._losses(data.chunk(0)).sum())
    raw = [vars(tensor)["grad_sample"][0] for tensor in clipper._net.tensors]
    # So it is: this one's gradient is no number.
    assert not all(torch.isfinite(one).all() for one in raw)
    found = summed(spec, weights, [still, other, other], norm=1.0)
    expected = summed(spec, weights, [made_up_nobody(steps), other, other], norm=1.0)
    assert np.array_equal(found, expected)
    assert found.any()
    assert not summed(spec, weights, [still], norm=1.0).any()


def made_up_nobody(steps: int) -> Examples:
    return Examples(x=np.zeros((0, steps, 1)), y=np.zeros(0))


def test_more_examples_than_were_declared_are_refused() -> None:
    spec = replace(LOGISTIC, most=3)
    with pytest.raises(ValueError, match="at most 3"):
        padded(spec, [made_up(spec, 1, count=4)])


def test_refuses_ghost_clipping_of_a_layer_that_is_used_at_every_step() -> None:
    with pytest.raises(ManifestError, match="hooks"):
        Clipper(GRU, method="ghost")


def test_every_kind_is_tested_both_ways_where_both_exist() -> None:
    assert {(spec.kind, method) for spec, method in WAYS} >= {
        *((spec.kind, "hooks") for spec in (LOGISTIC, MLP, GRU)), ("mlp", "ghost"),
    }  # fmt: skip
