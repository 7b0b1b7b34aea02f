"""Tables of made-up people for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from federated.node.columns import COLUMNS
from federated.node.daily import PersonTable, Reading
from federated.node.store import ImportRecord, Store

RECORD = ImportRecord(
    at=1_700_000_000, format="test", content="0" * 64, people=1, readings=1, bad=0
)


def table(values: Mapping[str, Sequence[float]], *, first_day: int = 19_000) -> PersonTable:
    made = PersonTable()
    for name, series in values.items():
        for offset, value in enumerate(series):
            day = first_day + offset
            made.add(
                Reading(
                    person="-",
                    column=COLUMNS[name],
                    day=day,
                    at=day * 86_400,
                    value=value,
                    source="test",
                    found_unit=COLUMNS[name].unit,
                )
            )
    return made


def fill(store: Store, people: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    store.merge({name: table(values) for name, values in people.items()}, record=RECORD)
