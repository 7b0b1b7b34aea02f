"""How long updates are: one place a person whatever rows say, and the quantiles within noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.aggregation.bits import SystemBits
from federated.errors import CohortError, ManifestError
from federated.learning.declare import declaration_of, learning_from
from federated.learning.examples import examples_of
from federated.learning.local import update
from federated.learning.models import initial
from federated.learning.norms import UpdateNorms
from federated.learning.spec import PersonalHead, TrainSpec, Work
from federated.learning.words import learning_pairs
from federated.model import NoisePlan, PersonRows
from tests.federated.analytics.samples import person
from tests.federated.learning.samples import LINEAR, LOGISTIC, SPECS

LITTLE = NoisePlan(mechanism="discrete_laplace", scale=0.01)


def norms(spec: TrainSpec, **changes: object) -> UpdateNorms:
    return UpdateNorms(**{"name": "norms", "spec": spec, "low": 0.01, "high": 10.0, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), rate=st.sampled_from([1e-6, 1.0, 1000.0]))
def test_a_person_is_in_one_place_at_most(spec: TrainSpec, seed: int, rate: float) -> None:
    query = norms(replace(spec, work=Work(rate=rate)))
    rows = person(seed)
    for special in (np.nan, np.inf, -1e300):
        spoilt = {name: values.copy() for name, values in rows.values.items()}
        for values in spoilt.values():
            values[seed % len(values)] = special
        for one in (rows, PersonRows(days=rows.days, values=spoilt)):
            vector = query.encode(one, SystemBits())
            assert np.abs(vector).sum() <= query.sensitivity.l1
            assert np.sqrt((vector**2).sum()) <= query.sensitivity.l2
            assert np.abs(vector).max() <= query.bound


def test_quantiles_are_those_of_the_lengths() -> None:
    spec = replace(LOGISTIC, work=Work(epochs=3, rate=2.0))
    people = [person(seed) for seed in range(300)]
    start = initial(spec, seed=b"norms")
    found = [update(spec, start, examples_of(spec, rows)) for rows in people]
    lengths = [float(np.linalg.norm(one)) for one in found if one.any()]
    query = norms(spec, low=0.01, high=10.0, bins=60, at=(0.5, 0.9))
    total = np.sum([query.encode(rows, SystemBits()) for rows in people], axis=0)
    answer = query.decode(total, noise=LITTLE, people=300, level=0.95)
    step = (10.0 / 0.01) ** (1 / 60)
    for one, share in zip(answer.estimates, (0.5, 0.9), strict=True):
        true = float(np.quantile(lengths, share))
        assert true / step**1.5 <= one.value <= true * step**1.5
        assert one.interval.low <= one.value <= one.interval.high


def test_says_nothing_where_counts_do_not_stand_out_of_their_noise() -> None:
    query = norms(LINEAR)
    with pytest.raises(CohortError):
        query.decode(
            np.zeros(query.dimension, dtype=np.int64),
            noise=NoisePlan(mechanism="discrete_laplace", scale=5.0),
            people=100,
            level=0.95,
        )


def test_is_declared_and_read_in_words() -> None:
    query = norms(replace(LOGISTIC, personal=PersonalHead(), name="norms"), bins=12, at=(0.8,))
    declared = declaration_of(query)
    assert declaration_of(learning_from(declared)) == declared
    told = dict(learning_pairs(query))
    assert "0.01 to 10" in told["counts"]
    for wrong in ({"clip": 1.0}, {"rounds": 3}, {"at": [1.5]}, {"low": -1.0}, {"hihg": 3.0}):
        with pytest.raises(ManifestError):
            learning_from({**declared, **wrong})
