"""Many devices at once give what each gives alone, and the sum that their integers have."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from federated.aggregation.bits import SeededBits
from federated.aggregation.encoding import clip
from federated.errors import ManifestError
from federated.learning.local import update
from federated.learning.models import parameters
from federated.learning.round_query import TrainQuery
from federated.learning.spec import Examples, PersonalHead, TrainSpec, Work
from federated.simulation.devices import Devices, devices_of, pack
from federated.simulation.vectorised import Vectorised, clip_all
from tests.federated.analytics.samples import person
from tests.federated.learning.samples import LINEAR, LOGISTIC, MLP, SPECS, made_up, weights_for

#: Float64 sums in another order; float32 has 2^-24 of each number.
CLOSE, COARSE = 1e-11, 2e-4
SPOILT = (np.nan, np.inf, -np.inf)


def alone(
    spec: TrainSpec, weights: NDArray[np.float64], people: list[Examples]
) -> NDArray[np.float64]:
    return np.array([update(spec, weights, one) for one in people]).reshape(-1, parameters(spec))


def everybody(devices: Devices) -> NDArray[np.int64]:
    return np.arange(len(devices))


@st.composite
def groups(draw: st.DrawFn, spec: TrainSpec) -> list[Examples]:
    """People with few, many and no examples, and some with what is no number."""
    people = []
    for _ in range(draw(st.integers(0, 8))):
        count, seed = draw(st.sampled_from([0, 1, 2, 5, 17])), draw(st.integers(0, 2**16))
        one = made_up(spec, seed, count)
        if count and draw(st.booleans()) and draw(st.booleans()):
            spoilt = one.x.copy() if draw(st.booleans()) else one.y.copy()
            spoilt.flat[seed % spoilt.size] = draw(st.sampled_from(SPOILT))
            one = Examples(x=spoilt, y=one.y) if spoilt.ndim > 1 else Examples(x=one.x, y=spoilt)
        people.append(one)
    return people


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_each_update_is_the_one_that_the_device_makes_alone(
    spec: TrainSpec, data: st.DataObject
) -> None:
    epochs, decay = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([0.0, 0.02]))
    spec = replace(spec, work=Work(epochs=epochs, rate=0.3, l2=decay))
    people = data.draw(groups(spec))
    weights = weights_for(parameters(spec), data.draw(st.integers(0, 99)), data.draw(
        st.sampled_from([0.0, 0.5, 20.0])))  # fmt: skip
    memory = data.draw(st.sampled_from([1 << 19, 1 << 22]))
    devices = pack(spec, people)
    found = Vectorised(memory_bytes=memory, workers=2).updates(
        spec, weights, devices, everybody(devices)
    )
    expected = alone(spec, weights, people)
    size = max(1.0, float(np.abs(expected).max(initial=0.0)))
    assert found == pytest.approx(expected, rel=0, abs=CLOSE * size)
    assert np.array_equal(found.any(axis=1), expected.any(axis=1))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_weights_that_lead_nowhere_are_zeros_for_everybody(spec: TrainSpec) -> None:
    devices = pack(spec, [made_up(spec, seed, 3) for seed in range(4)])
    good = weights_for(parameters(spec), 2)
    for spoilt in SPOILT:
        bad = good.copy()
        bad[-1] = spoilt
        assert not Vectorised().updates(spec, bad, devices, everybody(devices)).any()
    for bad in (good[:-1], good[None], np.append(good, 0.0)):
        assert not Vectorised().updates(spec, bad, devices, everybody(devices)).any()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("size", [1e150, 1e300, 1e308])
def test_huge_weights_give_what_they_give_alone(spec: TrainSpec, size: float) -> None:
    people = [made_up(spec, seed, 1 + seed % 4) for seed in range(12)]
    weights = weights_for(parameters(spec), 3, size)
    devices = pack(spec, people)
    found = Vectorised().updates(spec, weights, devices, everybody(devices))
    expected = alone(spec, weights, people)
    assert np.isfinite(found).all()
    assert np.array_equal(found.any(axis=1), expected.any(axis=1))
    assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()


def test_one_persons_overflow_is_theirs_alone() -> None:
    spec = replace(LINEAR, work=Work(epochs=2, rate=1000.0))
    quiet = Examples(x=np.zeros((4, 2)), y=np.zeros(4))
    loud = Examples(x=np.full((2, 2), 1.0), y=np.array([0.5, 0.5]))
    weights = np.array([1e303, 1e303, 0.0])
    devices = pack(spec, [quiet, loud, made_up(spec, 1, 4)])
    found = Vectorised(workers=1).updates(spec, weights, devices, everybody(devices))
    expected = alone(spec, weights, [quiet, loud, made_up(spec, 1, 4)])
    assert np.array_equal(found.any(axis=1), expected.any(axis=1))
    assert not found[1].any()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_single_precision_agrees_to_its_own_tolerance(spec: TrainSpec) -> None:
    people = [made_up(spec, seed, 1 + seed % 7) for seed in range(30)]
    weights = weights_for(parameters(spec), 5)
    devices = pack(spec, people, precision="float32")
    found = Vectorised().updates(spec, weights, devices, everybody(devices))
    assert found.dtype == np.float64
    assert found == pytest.approx(alone(spec, weights, people), rel=0, abs=COARSE)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    norm=st.sampled_from([1e-300, 0.01, 1.0, 1e300]),
    special=st.lists(st.sampled_from([*SPOILT, 0.0, 5e-324, 1e308, -1e308, 1e-200]), max_size=12),
)
def test_all_rows_are_clipped_as_one_is(seed: int, norm: float, special: list[float]) -> None:
    random = np.random.default_rng(seed)
    rows = random.normal(size=(6, 5)) * 10.0 ** random.integers(-3, 4, (6, 1))
    places = random.permutation(rows.size)[: len(special)]
    rows.flat[places] = special
    found, longer = clip_all(rows, norm=norm)
    expected = np.array([clip(row, norm=norm, order=2) for row in rows])
    assert found == pytest.approx(expected, rel=1e-12, abs=0)
    finite = np.where(np.isfinite(rows), rows, 0.0)
    assert longer == int((found != finite).any(axis=1).sum())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_sum_is_that_of_the_clipped_updates_in_integers(spec: TrainSpec) -> None:
    spec = replace(spec, clip=0.2)
    people = [made_up(spec, seed, seed % 5) for seed in range(40)]
    weights = weights_for(parameters(spec), 7)
    devices = pack(spec, people)
    found = Vectorised(memory_bytes=1 << 18).round_sum(spec, weights, devices, everybody(devices))
    each = alone(spec, weights, people)
    lengths = np.linalg.norm(each, axis=1)
    clipped = np.array([clip(one, norm=0.2, order=2) for one in each])
    assert found.total == pytest.approx(clipped.sum(axis=0) * spec.scale, abs=1e-8)
    assert (found.people, found.silent) == (40, 8)
    assert found.clipped == int((lengths > 0.2).sum()) > 0


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_exact_sum_is_that_of_the_vectors_which_devices_send(spec: TrainSpec) -> None:
    """Through rows, examples, update, clip and rounding, with the same random bits."""
    spec = replace(spec, clip=0.3)
    rows = [person(seed, days=seed % 9) for seed in range(20)]
    weights = weights_for(parameters(spec), 7)
    query = TrainQuery(spec=spec).at(weights)
    sent = np.zeros(query.dimension, dtype=np.int64)
    device_bits = SeededBits(hashlib.sha256(b"rounding").digest(), b"test")
    for one in rows:
        sent += query.encode(one, device_bits)
    devices = devices_of(spec, rows)
    bits = SeededBits(hashlib.sha256(b"rounding").digest(), b"test")
    found = Vectorised(memory_bytes=1 << 18).exact_sum(
        spec, weights, devices, everybody(devices), bits
    )
    assert found.total.dtype == np.int64
    assert found.total.any()
    assert np.array_equal(found.total, sent)
    assert bits.position == device_bits.position


def test_rounding_moves_the_sum_by_no_more_than_chance() -> None:
    spec = replace(MLP, clip=0.3)
    devices = pack(spec, [made_up(spec, seed, 4) for seed in range(200)])
    weights = weights_for(parameters(spec), 7)
    whole = Vectorised().exact_sum(
        spec, weights, devices, everybody(devices), SeededBits(bytes(32), b"test")
    )
    smooth = Vectorised().round_sum(spec, weights, devices, everybody(devices))
    # 200 roundings of variance 1/4 at most in each coordinate, six deviations.
    assert np.abs(whole.total - smooth.total).max() < 6 * np.sqrt(200 / 4)


def test_somebody_who_is_asked_twice_counts_twice() -> None:
    devices = pack(LOGISTIC, [made_up(LOGISTIC, seed, 3) for seed in range(3)])
    weights = weights_for(parameters(LOGISTIC), 1)
    once = Vectorised().round_sum(LOGISTIC, weights, devices, np.array([0, 1, 2]))
    more = Vectorised().round_sum(LOGISTIC, weights, devices, np.array([0, 0, 1, 1, 2, 2]))
    assert more.total == pytest.approx(2 * once.total)
    assert more.people == 6


def test_sums_do_not_depend_on_workers() -> None:
    people = [made_up(MLP, seed, seed % 30) for seed in range(300)]
    devices, weights = pack(MLP, people), weights_for(parameters(MLP), 1)
    sums = [
        Vectorised(memory_bytes=bytes_, workers=workers)
        .round_sum(MLP, weights, devices, everybody(devices))
        .total
        for bytes_, workers in ((1 << 19, 1), (3 << 19, 3), (3 << 19, 3))
    ]
    assert np.array_equal(sums[0], sums[1])
    assert np.array_equal(sums[1], sums[2])


def test_refuses_when_one_device_does_not_fit_the_memory() -> None:
    devices = pack(MLP, [made_up(MLP, 1, 100)])
    with pytest.raises(ValueError, match="allow more memory"):
        Vectorised(memory_bytes=1000).round_sum(
            MLP, weights_for(parameters(MLP), 1), devices, everybody(devices)
        )


def test_nobody_adds_up_to_zeros() -> None:
    devices = pack(MLP, [])
    found = Vectorised().round_sum(
        MLP, weights_for(parameters(MLP), 1), devices, everybody(devices)
    )
    assert not found.total.any()
    assert (found.people, found.silent) == (0, 0)


def test_refuses_examples_of_another_shape() -> None:
    with pytest.raises(ValueError, match="expected examples of"):
        pack(MLP, [made_up(LINEAR, 1, 3)])


def test_refuses_arrays_that_do_not_fit_or_are_no_numbers() -> None:
    x, y, starts = np.zeros((3, 2)), np.zeros(3), np.array([0, 1, 3])
    Devices(x=x, y=y, starts=starts)
    for bad in ([0, 1, 2], [1, 2, 3], [0, 3, 1, 3], [[0, 3]], []):
        with pytest.raises(ValueError, match="expected starts"):
            Devices(x=x, y=y, starts=np.array(bad, dtype=np.int64))
    with pytest.raises(ValueError, match="finite"):
        Devices(x=np.full((3, 2), np.nan), y=y, starts=starts)
    with pytest.raises(ValueError, match="float64 or float32"):
        Devices(x=x.astype(int), y=y, starts=starts)


def test_default_models_are_simulated_without_torch() -> None:
    code = (
        "import sys, numpy as np\n"
        "from federated.simulation import vectorised, training, analytics\n"
        "from federated.simulation.devices import pack\n"
        "from tests.federated.learning.samples import LOGISTIC, made_up\n"
        "d = pack(LOGISTIC, [made_up(LOGISTIC, 1)])\n"
        "vectorised.Vectorised().round_sum(LOGISTIC, np.zeros(6), d, np.array([0]))\n"
        "assert 'torch' not in sys.modules and 'flwr' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_refuses_a_model_whose_head_is_personal() -> None:
    spec = replace(MLP, personal=PersonalHead())
    devices = pack(spec, [made_up(spec, 1, 5)])
    with pytest.raises(ManifestError, match="personal heads"):
        Vectorised().updates(spec, np.zeros(parameters(spec)), devices, everybody(devices))
