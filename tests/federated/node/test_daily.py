from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.errors import StoreError
from federated.node.columns import COLUMNS
from federated.node.daily import PersonTable, Reading

type Found = tuple[str, str, int, float]


def folded(found: Sequence[Found]) -> PersonTable:
    table = PersonTable()
    for place, (column, source, day, value) in enumerate(found):
        table.add(
            Reading(
                person="p", column=COLUMNS[column], day=day, at=day * 86_400 + place, value=value,
                source=source, found_unit=COLUMNS[column].unit,
            )
        )  # fmt: skip
    return table


def test_of_two_sources_that_counted_the_same_day_the_one_that_counted_more_stands() -> None:
    for more, less in (("a", "b"), ("b", "a")):
        table = folded([("steps", more, 1, 300), ("steps", more, 1, 200), ("steps", less, 1, 450)])
        assert table.rows({"steps"}).values["steps"].tolist() == [500]


def test_of_two_sources_that_averaged_the_same_day_the_one_with_more_readings_stands() -> None:
    for more, less in (("a", "b"), ("b", "a")):
        table = folded(
            [("heart_rate", more, 1, 60), ("heart_rate", more, 1, 70), ("heart_rate", less, 1, 99)]
        )
        assert table.rows({"heart_rate"}).values["heart_rate"].tolist() == [65]


def test_of_a_questionnaire_the_last_of_the_day_stands() -> None:
    table = folded([("phq9_total", "a", 1, 9), ("phq9_total", "a", 1, 4)])
    assert table.rows({"phq9_total"}).values["phq9_total"].tolist() == [4]
    assert len(table.events) == 2


def test_what_is_lasting_holds_from_the_day_it_was_recorded_and_before_the_first() -> None:
    moods = [("mood", "a", day, 1.0) for day in range(1, 6)]
    table = folded([*moods, ("arm", "a", 2, 0.0), ("arm", "a", 4, 1.0)])
    assert table.rows({"mood", "arm"}).values["arm"].tolist() == [0, 0, 0, 1, 1]


_FOUND = st.lists(
    st.tuples(
        st.sampled_from(["mood", "steps", "phq9_total", "sex"]),
        st.sampled_from(["a", "b"]),
        st.integers(-5, 5),
        st.integers(0, 1).map(float),
    ),
    max_size=30,
)


def same(one: PersonTable, other: PersonTable) -> bool:
    return one.cells == other.cells and one.events == other.events


@settings(deadline=None)
@given(found=_FOUND)
def test_a_table_survives_its_bytes(found: list[Found]) -> None:
    table = folded(found)
    assert same(PersonTable.decode(table.encode()), table)


@settings(deadline=None)
@given(found=_FOUND, cut=st.integers(0, 30))
def test_a_part_of_an_export_before_or_after_the_whole_changes_nothing(
    found: list[Found], cut: int
) -> None:
    whole, part = folded(found), folded(found[:cut])
    for first, second in ((whole, part), (part, whole), (whole, whole)):
        merged = PersonTable()
        merged.merge(first)
        merged.merge(second)
        assert same(merged, whole)
        assert not merged.merge(second)


@settings(deadline=None)
@given(found=_FOUND)
def test_rows_are_ascending_unique_days_of_one_length(found: list[Found]) -> None:
    table = folded(found)
    rows = table.rows(COLUMNS)
    assert (np.diff(rows.days) > 0).all()
    assert all(len(values) == len(rows.days) for values in rows.values.values())


@pytest.mark.parametrize("raw", [b"", b"\x00", b"\x93\x01\x90", b"\x93\x01\x91\x97\xa1a\xa1b\xa1c"])
def test_damaged_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(StoreError, match="damaged"):
        PersonTable.decode(raw)


def identified(record: int, value: float, *, column: str = "sleep_hours", day: int = 1) -> Reading:
    return Reading(
        person="p", column=COLUMNS[column], day=day, at=day * 86_400 + record, value=value,
        source="a", found_unit="h", record=record,
    )  # fmt: skip


def test_a_day_that_several_imports_together_make_impossible_is_left_out() -> None:
    merged = PersonTable()
    for record in (1, 2):
        table = PersonTable()
        table.add(identified(record, 13.0))
        table.add(identified(record + 2, 7.0, day=record + 4))
        assert not list(table.impossible())
        merged.merge(PersonTable.decode(table.encode()))
    # 13 hours and 13 hours of one day; the other days stand.
    assert merged.rows({"sleep_hours"}).days.tolist() == [5, 6]
    assert PersonTable.decode(merged.encode()).rows({"sleep_hours"}).days.tolist() == [5, 6]
    assert list(merged.impossible()) == [("sleep_hours", 1)]


def test_events_of_records_are_kept_once_each() -> None:
    table = PersonTable()
    for record in (1, 1, 2):
        table.add(identified(record, 9.0, column="phq9_total"))
    again = PersonTable.decode(table.encode())
    assert [event.value for event in again.events.values()] == [9.0, 9.0]
    assert not table.merge(again)


@settings(deadline=None)
@given(found=_FOUND)
def test_a_table_that_was_written_before_records_were_kept_is_read(found: list[Found]) -> None:
    table = folded(found)
    version, series, events, *_ = msgspec.msgpack.decode(table.encode())
    older = msgspec.msgpack.encode([version, [one[:7] for one in series], events])
    assert same(PersonTable.decode(older), table)


def test_what_is_said_of_a_record_that_is_not_there_is_damage() -> None:
    table = PersonTable()
    table.add(identified(1, 7.0))
    wire = msgspec.msgpack.decode(table.encode())
    wire[4] = [b"", b"", b""]
    with pytest.raises(StoreError, match="damaged"):
        PersonTable.decode(msgspec.msgpack.encode(wire))


@settings(deadline=None)
@given(exports=st.lists(_FOUND, max_size=4), data=st.data())
def test_any_order_and_any_repetition_of_exports_gives_one_table(
    exports: list[list[Found]], data: st.DataObject
) -> None:
    made = [folded(found) for found in exports]
    expected = PersonTable()
    for table in made:
        expected.merge(table)
    again = data.draw(st.lists(st.sampled_from(made), max_size=3)) if made else []
    merged = PersonTable()
    for table in data.draw(st.permutations([*made, *again])):
        merged.merge(table)
    assert same(merged, expected)
    assert not expected.merge(merged)


def test_each_event_counts_like_a_day_of_its_own() -> None:
    """An export that says something every second must not grow without bound within one day."""
    table, grown = PersonTable(), 0
    for second in (*range(50), *range(50)):
        grown += table.add(
            Reading(
                person="p", column=COLUMNS["body_weight_kg"], day=1, at=second, value=70.0,
                source="a", found_unit="kg",
            )
        )  # fmt: skip
    assert grown == len(table.events) == 50
