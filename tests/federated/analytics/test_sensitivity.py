"""Nobody moves a sum by more than the query says, whatever their rows hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from federated.analytics.association import masses_of as association_masses
from federated.analytics.base import BaseQuery
from federated.analytics.bernstein import basis
from federated.analytics.layout import FINE, Block, Layout
from federated.model import PersonRows
from tests.federated.analytics.samples import (
    QUERIES,
    EdgeBits,
    SeededBits,
    hostile_rows,
    person,
)


def keeps(query: BaseQuery, vector: NDArray[np.int64]) -> None:
    assert vector.shape == (query.dimension,)
    assert vector.dtype == np.int64
    assert int(np.abs(vector).max(initial=0)) <= query.bound
    whole = [int(value) for value in vector]
    assert sum(abs(value) for value in whole) <= query.sensitivity.l1
    assert sum(value * value for value in whole) <= query.sensitivity.l2**2 * (1 + 1e-12)


@pytest.mark.filterwarnings("error")
@settings(deadline=None, max_examples=40)
@given(rows=hostile_rows(), seed=st.integers(0, 2**32))
def test_a_contribution_keeps_to_sensitivity_and_bound_whatever_the_rows_hold(
    rows: PersonRows, seed: int
) -> None:
    for query in QUERIES:
        keeps(query, query.encode(rows, SeededBits(seed)))
        keeps(query, query.encode(rows, EdgeBits()))


@settings(deadline=None, max_examples=20)
@given(rows=hostile_rows(), seed=st.integers(0, 2**32))
def test_zeroing_a_person_out_moves_the_sum_by_no_more_than_the_sensitivity(
    rows: PersonRows, seed: int
) -> None:
    for query in QUERIES:
        others = sum(
            (query.encode(person(k), SeededBits(k)) for k in range(5)),
            start=np.zeros(query.dimension, dtype=np.int64),
        )
        keeps(query, others + query.encode(rows, SeededBits(seed)) - others)


@settings(deadline=None, max_examples=100)
@given(
    masses=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=7, max_size=7),
    seed=st.integers(0, 2**32),
)
def test_a_block_never_holds_more_than_its_limit(masses: list[float], seed: int) -> None:
    layout = Layout(
        blocks=(Block(size=3, limit=FINE), Block(size=1, limit=3), Block(size=3, limit=1)),
        unit=FINE,
    )
    for bits in (SeededBits(seed), EdgeBits()):
        vector = layout.integers(np.array(masses), bits)
        assert vector.min() >= 0
        assert vector[:3].sum() <= FINE
        assert vector[3] <= 3
        assert vector[4:].sum() <= 1


def test_rounding_is_unbiased() -> None:
    layout = Layout(blocks=(Block(size=3, limit=4),), unit=4)
    masses = np.array([0.3, 0.33, 0.37])
    drawn = np.mean([layout.integers(masses, SeededBits(k)) for k in range(4000)], axis=0)
    # Each coordinate's rounding has a standard error below 0.5 / sqrt(4000).
    assert np.abs(drawn / 4 - masses).max() < 4 * 0.5 / 4 / np.sqrt(4000)


def test_whole_masses_are_never_rounded() -> None:
    layout = Layout(blocks=(Block(size=3, limit=1),), unit=1)
    for k in range(50):
        assert layout.integers(np.array([0.0, 1.0, 0.0]), SeededBits(k)).tolist() == [0, 1, 0]


@settings(deadline=None)
@given(x=st.floats(0, 1), degree=st.sampled_from([2, 4]))
def test_the_basis_adds_up_to_one_person(x: float, degree: int) -> None:
    assert basis(x, degree).sum() == pytest.approx(1, abs=1e-12)


@settings(deadline=None)
@given(xx=st.floats(0, 1e6), yy=st.floats(0, 1e6), cosine=st.floats(-1, 1), weight=st.floats(0, 1))
def test_products_are_clipped_jointly(xx: float, yy: float, cosine: float, weight: float) -> None:
    xy = cosine * np.sqrt(xx * yy)
    arrays = (np.array(part) for part in (xx, yy, xy))
    masses = association_masses(*arrays, weight=np.array(weight))
    assert masses[:3].sum() <= weight + 1e-9
    assert masses.min() >= 0


def test_who_has_nothing_to_say_adds_nothing() -> None:
    nobody = PersonRows(days=np.empty(0, dtype=np.int64), values={})
    unknown = PersonRows(days=np.arange(3), values={"mood": np.full(3, np.nan)})
    for query in QUERIES:
        for rows in (nobody, unknown):
            assert not query.encode(rows, SeededBits(0)).any()


def test_a_query_reads_the_columns_that_it_names_and_no_others() -> None:
    rows = person(1)
    for query in QUERIES:
        only = {name: rows.values[name] for name in query.columns}
        blind = PersonRows(days=rows.days, values=only)
        same = query.encode(rows, SeededBits(2)) == query.encode(blind, SeededBits(2))
        assert same.all()
