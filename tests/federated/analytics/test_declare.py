"""A query is a few lines of TOML, read strictly."""

from __future__ import annotations

import json

import pytest

from federated.analytics.base import BaseQuery
from federated.analytics.conditional import OwnAverageSplit
from federated.analytics.declare import KINDS, declaration_of, parse_query, query_from
from federated.analytics.means import Mean
from federated.analytics.quantity import Quantity
from federated.errors import ManifestError
from tests.federated.analytics.samples import QUERIES

DECLARED = {
    "count": 'column = "phq9_total"\nat_least = 10',
    "histogram": 'column = "phq9_total"\nedges = [0, 5, 10, 15, 20, 27]',
    "mean": 'column = "sleep_hours"\nlow = 0\nhigh = 12.0',
    "variance": 'column = "mood"',
    "quantiles": 'column = "mood"\nat = [0.5]\nbranching = 2\ndepth = 6',
    "association": 'x = { column = "sleep_quality" }\ny = { column = "mood" }\ndays = 21',
    "split": 'outcome = "mood"\nless_than = 1.5\nby = "sleep_quality"',
    "contrast": 'outcome = { column = "phq9_total", summary = "change" }\narm = "arm"',
    "groups": (
        'outcome = { column = "phq9_total" }\nby = { column = "sleep_hours" }\n'
        "edges = [0, 6, 7, 8, 9, 24]\nreference = 2"
    ),
    "trend": 'column = "mood"\nweeks = 8\nstart = "2026-01-05"',
}


def toml(kind: str, lines: str) -> bytes:
    return f'kind = "{kind}"\nname = "asked"\n{lines}\n'.encode()


def test_every_kind_has_an_example() -> None:
    assert set(DECLARED) == set(KINDS)


@pytest.mark.parametrize("kind", DECLARED)
def test_reads_each_kind_and_writes_it_back(kind: str) -> None:
    query = parse_query(toml(kind, DECLARED[kind]))
    assert type(query) is KINDS[kind]
    declared = declaration_of(query)
    assert query_from(json.loads(json.dumps(declared, allow_nan=False))) == query


@pytest.mark.parametrize("query", QUERIES, ids=lambda q: q.name)
def test_a_query_made_in_python_can_be_declared(query: BaseQuery) -> None:
    assert query_from(declaration_of(query)) == query


def test_bounds_and_unit_are_the_columns_own_if_left_out() -> None:
    query = parse_query(toml("mean", 'column = "sleep_hours"'))
    assert query == Mean(name="asked", of=Quantity(column="sleep_hours", low=0, high=24, unit="h"))
    changed = parse_query(toml("mean", 'column = "phq9_total"\nsummary = "change"'))
    assert isinstance(changed, Mean)
    assert (changed.of.low, changed.of.high) == (-27, 27)


def test_a_limit_of_nought_is_a_limit() -> None:
    query = parse_query(toml("split", DECLARED["split"].replace("1.5", "0")))
    assert isinstance(query, OwnAverageSplit)
    assert query.less_than == 0


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        (b'kind = "meen"\nname = "a"', "Did you mean mean"),
        (toml("mean", 'colum = "mood"'), "Did you mean column"),
        (toml("mean", 'column = "mod"'), "Did you mean mood"),
        (toml("mean", 'column = "mood"\nlow = "0"'), "Expected `float`"),
        (toml("mean", 'column = "mood"\nlow = nan'), "must be below"),
        (toml("mean", 'column = "mood"\nhigh = inf'), "must be below"),
        (toml("mean", 'column = "mood"\nsummary = "median"'), "Invalid enum value"),
        (toml("mean", 'column = "mood"\nminimum_cohort = 5'), "at least 20"),
        (toml("mean", "column = 3"), "needs a `column`"),
        (toml("mean", ""), "needs `column`"),
        (toml("mean", "of = 3"), "Expected `object`"),
        (toml("histogram", 'column = "mood"'), "needs `edges`"),
        (toml("histogram", 'column = "mood"\nedges = [1, 0]'), "ascending"),
        (toml("contrast", 'outcome = { column = "mood", sumary = "last" }'), "mean summary"),
        (toml("contrast", 'outcome = { column = "mood" }\narm = "army"'), "no column"),
        (toml("split", 'outcome = "mood"\nless_than = 1\nby = "mood"'), "different columns"),
        (toml("trend", 'column = "mood"\nweeks = 3\nstart = "Monday"'), "YYYY-MM-DD"),
        (toml("trend", 'column = "mood"\nweeks = 300'), "2 to 52"),
        (toml("quantiles", 'column = "mood"\ndepth = 40'), "1024"),
        (toml("quantiles", 'column = "mood"\nat = [1.0]'), "above 0 and below 1"),
        (toml("groups", DECLARED["groups"].replace("= 2", "= 7")), "`reference`"),
        (b'kind = "mean"\nname = "Big Name"\ncolumn = "mood"', "`name`"),
        (b'kind = "mean"\ncolumn = "mood"', "needs `name`"),
        (b"kind = ", "not TOML"),
        (b"\xff", "not TOML"),
        (b"# " + b"x" * 9000, "8192"),
    ],
)
def test_refuses_what_is_not_a_query_and_says_what_would_be(declared: bytes, says: str) -> None:
    with pytest.raises(ManifestError, match=says):
        parse_query(declared)
