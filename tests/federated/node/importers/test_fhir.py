"""FHIR: who is meant, when it was, what counts, and which version of it."""

from __future__ import annotations

import itertools
import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from federated.errors import ImportDataError
from federated.node.daily import PersonTable
from federated.node.importers.fhir import FHIR
from federated.node.importers.reading import BadRow, Options, Server
from federated.node.importers.run import import_path
from federated.node.store import Store
from tests.federated.node.importers.exports import observation
from tests.federated.node.importers.test_importers import run, values, write_ndjson

HOURS = {"value": 7.5, "code": "h"}
DAY = date(2024, 1, 2).toordinal() - date(1970, 1, 1).toordinal()


def steps(identity: str, value: float, **more: Any) -> dict[str, Any]:
    quantity = {"value": value, "code": "{steps}"}
    return observation("41950-7", id=identity, valueQuantity=quantity, **more)


def night(value: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    made = observation("93832-4", valueQuantity=value or HOURS, **more)
    return {key: one for key, one in made.items() if one is not None}


def names(store: Store) -> list[str]:
    return [person.name for person in store.people()]


# --- Who ---


@pytest.mark.parametrize(
    "reference",
    [
        "Patient/7",
        "Patient/7/_history/2",
        "http://clinic.example/fhir/Patient/7",
        "https://clinic.example/fhir/Patient/7/_history/12",
    ],
)
def test_one_patient_is_one_person_however_the_reference_is_spelt(
    tmp_path: Path, store: Store, reference: str
) -> None:
    run(store, write_ndjson(tmp_path, night(id="a"), night(id="b", subject={"reference": reference},
        effectiveDateTime="2024-01-03T09:30:00-05:00")))  # fmt: skip
    assert names(store) == ["Patient/7"]


def test_a_bundles_own_names_lead_to_its_patient(tmp_path: Path, store: Store) -> None:
    entries = [
        {"fullUrl": "urn:uuid:3f1e", "resource": {"resourceType": "Patient", "id": "7"}},
        {"fullUrl": "urn:uuid:aaaa", "resource": night(subject={"reference": "urn:uuid:3f1e"})},
        {"fullUrl": "urn:uuid:bbbb", "resource": steps("s", 4000)},
    ]
    path = tmp_path / "bundle.json"
    path.write_text(json.dumps({"resourceType": "Bundle", "type": "collection", "entry": entries}))
    run(store, path)
    assert names(store) == ["Patient/7"]
    assert values(store, "Patient/7", "steps", "sleep_hours") == {"steps": 4000, "sleep_hours": 7.5}


@pytest.mark.parametrize(
    "subject",
    [
        None,
        {},
        {"reference": ""},
        {"reference": "Group/7"},
        {"reference": "Practitioner/7"},
        {"reference": "Patient?identifier=7"},
        {"reference": "urn:uuid:3f1e"},
        {"reference": "#patient"},
        {"reference": "Patient/"},
        {"reference": "Patient/a b"},
        {"display": "Somebody", "identifier": {"value": "7"}},
    ],
)
def test_refuses_with_its_line_what_is_not_about_a_patient(
    tmp_path: Path, store: Store, subject: dict[str, Any] | None
) -> None:
    path = write_ndjson(tmp_path, night(id="a"), night(id="b", subject=subject))
    with pytest.raises(ImportDataError, match=r"line 2: .*patient"):
        run(store, path)
    assert names(store) == []


def test_what_names_nobody_is_the_named_persons(tmp_path: Path, store: Store) -> None:
    run(store, write_ndjson(tmp_path, night(subject=None)), person="me")
    assert names(store) == ["me"]


def test_refuses_when_two_servers_could_mean_two_people_by_one_name(
    tmp_path: Path, store: Store
) -> None:
    path = write_ndjson(
        tmp_path,
        night(id="a", subject={"reference": "http://one.example/fhir/Patient/7"}),
        night(id="b", subject={"reference": "http://other.example/fhir/Patient/7"}),
    )
    with pytest.raises(ImportDataError, match=r"line 2: .*servers"):
        run(store, path)


def test_refuses_a_second_servers_people_in_a_store_of_the_first(
    tmp_path: Path, store: Store
) -> None:
    def of(server: str, identity: str) -> Path:
        subject = {"reference": f"http://{server}.example/fhir/Patient/7"}
        return write_ndjson(tmp_path, night(id=identity, subject=subject))

    run(store, of("one", "a"))
    before = store.rows(store.person("Patient/7"), frozenset({"sleep_hours"}))
    with pytest.raises(ImportDataError, match="another server"):
        run(store, of("other", "b"))
    after = store.rows(store.person("Patient/7"), frozenset({"sleep_hours"}))
    assert (after.days.tolist(), len(store.people())) == (before.days.tolist(), 1)
    run(store, of("one", "c"))


def test_what_is_wrong_in_a_bundle_is_told_without_the_patients_id(
    tmp_path: Path, store: Store
) -> None:
    path = tmp_path / "bundle.json"
    patient = {"resourceType": "Patient", "id": "dorothea"}
    entries = [
        {"fullUrl": "urn:uuid:1", "resource": patient},
        {"fullUrl": "urn:uuid:2", "resource": {"resourceType": 5}},
    ]
    path.write_text(json.dumps({"resourceType": "Bundle", "entry": entries}))
    with pytest.raises(ImportDataError, match=r"bundle\.json is not") as caught:
        run(store, path)
    assert "dorothea" not in str(caught.value)


# --- When ---


@pytest.mark.parametrize(
    ("end", "day"),
    [
        ("2024-01-03T00:00:00-05:00", DAY),
        ("2024-01-03T00:00:01-05:00", DAY + 1),
        ("2024-01-02T07:00:00-05:00", DAY),
        # A day without a time is meant whole.
        ("2024-01-02", DAY),
    ],
)
def test_a_period_that_ends_at_midnight_belongs_to_the_day_before(
    tmp_path: Path, store: Store, end: str, day: int
) -> None:
    period = {"start": "2024-01-02T00:00:00-05:00", "end": end}
    run(store, write_ndjson(tmp_path, night(effectiveDateTime=None, effectivePeriod=period)))
    rows = store.rows(store.person("Patient/7"), frozenset({"sleep_hours"}))
    assert rows.days.tolist() == [day]


# --- What counts ---


@pytest.mark.parametrize("comparator", ["<", "<=", ">=", ">", "ad"])
def test_refuses_a_value_that_is_only_a_bound(
    tmp_path: Path, store: Store, comparator: str
) -> None:
    path = write_ndjson(tmp_path, night(id="a"), night({**HOURS, "comparator": comparator}, id="b"))
    with pytest.raises(ImportDataError, match=r"line 2: .*comparator"):
        run(store, path)
    report = run(store, path, skip_bad=True)
    assert (report.readings, report.bad) == (1, 1)


def test_a_resource_without_an_id_counts_once(tmp_path: Path, store: Store) -> None:
    once = {key: value for key, value in steps("", 4000).items() if key != "id"}
    path = write_ndjson(tmp_path, once, once)
    run(store, path)
    assert values(store, "Patient/7", "steps") == {"steps": 4000}
    assert run(store, path).changed == 0


# --- Which version ---

OLD = steps("s", 4000, meta={"versionId": "1", "lastUpdated": "2024-01-02T20:00:00Z"})
NEW = steps("s", 3000, meta={"versionId": "2", "lastUpdated": "2024-01-03T08:00:00+01:00"})
NEW["status"] = "corrected"
OTHER = steps("other", 500)
GONE = steps("s", 3000, meta={"versionId": "3", "lastUpdated": "2024-01-04T08:00:00Z"})
GONE["status"] = "entered-in-error"


@pytest.mark.parametrize("order", list(itertools.permutations((OLD, NEW, OTHER))))
@pytest.mark.parametrize("apart", [True, False])
def test_a_corrected_version_replaces_the_older_in_any_order(
    tmp_path: Path,
    store: Store,
    order: tuple[dict[str, Any], ...],
    apart: bool,  # noqa: FBT001
) -> None:
    for batch in [(one,) for one in order] if apart else [order]:
        run(store, write_ndjson(tmp_path, *batch))
    assert values(store, "Patient/7", "steps") == {"steps": 3500}


@pytest.mark.parametrize("order", list(itertools.permutations((OLD, NEW, OTHER, GONE))))
def test_what_was_entered_in_error_is_taken_back_in_any_order(
    tmp_path: Path, store: Store, order: tuple[dict[str, Any], ...]
) -> None:
    for one in order:
        run(store, write_ndjson(tmp_path, one))
    assert values(store, "Patient/7", "steps") == {"steps": 500}


def test_without_dates_a_corrected_resource_is_newer_than_a_final_one(
    tmp_path: Path, store: Store
) -> None:
    final, corrected = steps("s", 4000), steps("s", 3000, status="corrected")
    run(store, write_ndjson(tmp_path, corrected, final))
    assert values(store, "Patient/7", "steps") == {"steps": 3000}
    run(store, write_ndjson(tmp_path, final))
    assert values(store, "Patient/7", "steps") == {"steps": 3000}


def test_a_correction_may_move_a_reading_to_another_day(tmp_path: Path, store: Store) -> None:
    moved = {**NEW, "effectiveDateTime": "2024-01-01T09:30:00-05:00"}
    run(store, write_ndjson(tmp_path, OLD, night()))
    run(store, write_ndjson(tmp_path, moved))
    rows = store.rows(store.person("Patient/7"), frozenset({"steps"}))
    assert dict(zip(rows.days.tolist(), rows.values["steps"].tolist(), strict=True)) == {
        DAY - 1: 3000
    }


_RESOURCES = st.lists(
    st.builds(
        lambda name, version, value, day, gone: steps(
            name,
            value,
            status="entered-in-error" if gone else "final",
            meta={"versionId": str(version), "lastUpdated": f"2024-02-{version + 1:02}T00:00:00Z"},
            effectiveDateTime=f"2024-01-{day + 1:02}T09:30:00-05:00",
        ),
        st.sampled_from("abc"), st.integers(0, 5), st.integers(0, 9), st.integers(0, 3),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
)  # fmt: skip


def table_of(folder: Path, resources: list[dict[str, Any]]) -> PersonTable:
    table = PersonTable()
    read = FHIR().read(write_ndjson(folder, *resources), Options(), lambda *_: None)
    for one in read:
        assert not isinstance(one, BadRow | Server)
        table.take(one)
    return table


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(resources=_RESOURCES, data=st.data())
def test_any_order_and_any_repetition_of_files_gives_one_table(
    tmp_path: Path, resources: list[dict[str, Any]], data: st.DataObject
) -> None:
    expected = table_of(tmp_path, resources)
    parts = st.lists(st.sampled_from(resources), min_size=1, max_size=4)
    files = data.draw(st.lists(parts, max_size=3)) + [[one] for one in resources]
    merged = PersonTable()
    for file in data.draw(st.permutations(files)):
        merged.merge(PersonTable.decode(table_of(tmp_path, file).encode()))
        merged = PersonTable.decode(merged.encode())
    assert merged.encode() == expected.encode()
    assert not merged.merge(expected)


def test_import_path_is_used_as_the_command_uses_it(tmp_path: Path, store: Store) -> None:
    report = import_path(
        store, write_ndjson(tmp_path, OLD, OLD, NEW), Options(), now=1, progress=lambda *_: None
    )
    assert (report.people, report.bad) == (1, 0)


def test_a_newer_version_that_says_nothing_takes_the_older_back(
    tmp_path: Path, store: Store
) -> None:
    empty = {key: value for key, value in NEW.items() if key != "valueQuantity"}
    for batch in ([OLD, OTHER], [empty], [OLD]):
        run(store, write_ndjson(tmp_path, *batch))
    assert values(store, "Patient/7", "steps") == {"steps": 500}


@pytest.mark.parametrize("version", ["9" * 5000, "\u0661", "x", "-1"])
def test_whatever_stands_as_version_is_read(tmp_path: Path, store: Store, version: str) -> None:
    meta = {"versionId": version, "lastUpdated": "9999-12-31T23:59:59.999Z"}
    run(store, write_ndjson(tmp_path, steps("s", 4000, meta=meta)))
    assert values(store, "Patient/7", "steps") == {"steps": 4000}


def test_versions_without_times_go_by_their_numbers(tmp_path: Path, store: Store) -> None:
    versions = [steps("s", k, meta={"versionId": str(k)}) for k in (9, 1000, 300)]
    run(store, write_ndjson(tmp_path, *versions))
    assert values(store, "Patient/7", "steps") == {"steps": 1000}
