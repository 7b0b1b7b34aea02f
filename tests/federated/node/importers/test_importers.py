from __future__ import annotations

import json
import re
import tracemalloc
import zipfile
from datetime import date
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from federated.errors import ImportDataError
from federated.learning.evaluate import Subgroup
from federated.node.importers import apple
from federated.node.importers.reading import Options
from federated.node.importers.run import ImportReport, import_path, importer_for
from federated.node.store import Store
from tests.federated.node.importers.exports import (
    APPLE,
    APPLE_DTD,
    FITBIT,
    OPEN_MHEALTH,
    PHQ9_CODES,
    apple_record,
    observation,
    phq9,
    write_fitbit,
)

NEW_YORK = ZoneInfo("America/New_York")
DAY = date(2024, 1, 2).toordinal() - date(1970, 1, 1).toordinal()


def run(store: Store, path: Path, **options: Any) -> ImportReport:
    skip_bad = options.pop("skip_bad", False)
    return import_path(
        store, path, Options(**options), now=1, progress=lambda *_: None, skip_bad=skip_bad
    )


def values(store: Store, person: str, *columns: str) -> dict[str, float]:
    """The values of 2 January 2024."""
    rows = store.rows(store.person(person), frozenset(columns))
    (place,) = np.flatnonzero(rows.days == DAY)
    return {name: float(rows.values[name][place]) for name in columns}


def assert_imports_once(store: Store, path: Path, **options: Any) -> None:
    """Imported again, not a byte of the store changes."""
    before = store.database.path.read_bytes()
    again = run(store, path, **options)
    assert (again.new_people, again.changed) == (0, 0)
    assert store.database.path.read_bytes() == before


def assert_kept_nothing(store: Store) -> None:
    assert store.people() == ()
    assert store.imports() == ()


# --- Apple Health --------------------------------------------------------------------------------


def write_apple(folder: Path, text: str) -> Path:
    path = folder / "export.xml"
    path.write_text(text)
    return path


def test_apple_health_is_read(tmp_path: Path, store: Store) -> None:
    path = write_apple(tmp_path, APPLE)
    report = run(store, path)
    assert (report.format, report.people, report.bad) == ("apple-health", 1, 0)
    found = values(
        store, "me", "steps", "heart_rate", "sleep_hours", "time_in_bed_hours", "distance_km"
    )
    assert found == pytest.approx(
        {
            # The watch's 350, not 650 with the phone's.
            "steps": 350, "heart_rate": 70, "sleep_hours": 7, "time_in_bed_hours": 8,
            "distance_km": 1.609344,
        }
    )  # fmt: skip
    sources = {holding.source for holding in store.holdings(store.person("me"))}
    assert sources == {"apple-health: Watch", "apple-health: Phone"}
    assert_imports_once(store, path)


def described(record: str, model: str) -> str:
    """A record with the description of a device that HealthKit writes."""
    words = (
        f"&lt;&lt;HKDevice: 0x2834a8f00&gt;, name:Anna's Watch, manufacturer:Apple Inc., "
        f"model:{model}, hardware:Any1,1, software:7.3.1&gt;"
    )
    return record.replace("<Record ", f'<Record device="{words}" ')


def test_apple_health_says_what_kind_of_device_measured_on_a_day(
    tmp_path: Path, store: Store
) -> None:
    def steps(day: int, hour: int, model: str) -> str:
        at = f"2024-01-{day:02} {hour:02}:00:00 -0500"
        return described(
            apple_record("HKQuantityTypeIdentifierStepCount", "5", "count", at, at, "x"), model
        )

    night = apple_record(
        "HKCategoryTypeIdentifierSleepAnalysis", "HKCategoryValueSleepAnalysisAsleepCore", "",
        "2024-01-07 23:00:00 -0500", "2024-01-08 06:00:00 -0500", "x",
    )  # fmt: skip
    entered = apple_record(
        "HKQuantityTypeIdentifierStepCount", "5", "count", "2024-01-09 08:00:00 -0500",
        "2024-01-09 08:00:00 -0500", "My Watch, model:Watch,",
    )  # fmt: skip
    records = [
        steps(3, 8, "iPhone"),
        *(steps(4, hour, model) for hour, model in ((8, "Watch"), (9, "iPhone"))),
        *(steps(5, hour, model) for hour, model in ((8, "iPhone"), (9, "Watch"))),
        # Others' models, and what was entered by hand, are no class of ours.
        steps(6, 8, "Forerunner"), steps(6, 9, "Watchman"), entered,
        described(night, "Watch"),
    ]  # fmt: skip
    path = write_apple(tmp_path, f"{APPLE_DTD}<HealthData>\n{''.join(records)}</HealthData>\n")
    run(store, path)
    me = store.person("me")
    held = next(one for one in store.holdings(me) if one.column == "device_class")
    assert (held.days, held.source) == (4, "apple-health")
    rows = store.rows(me, frozenset({"device_class", "steps"}))
    found = dict(zip(rows.days - DAY + 2, rows.values["device_class"], strict=True))
    # It holds until another day says otherwise.
    assert found == {3: 0, 4: 1, 5: 1, 6: 1, 9: 1}
    group = Subgroup(column="device_class", edges=(-0.5, 0.5, 1.5))
    assert group.group_of(rows) == 1
    assert_imports_once(store, path)


def test_a_device_without_a_description_is_of_no_class(tmp_path: Path, store: Store) -> None:
    run(store, write_apple(tmp_path, APPLE))
    assert all(one.column != "device_class" for one in store.holdings(store.person("me")))


def test_apple_health_is_read_out_of_its_archive(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "export.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("apple_health_export/export_cda.xml", "<x/>")
        archive.writestr("apple_health_export/export.xml", APPLE)
    assert run(store, path).readings == 8


def test_a_later_export_fills_up_the_day_that_an_earlier_one_began(
    tmp_path: Path, store: Store
) -> None:
    whole = write_apple(tmp_path, APPLE)
    (tmp_path / "early").mkdir()
    early_text = APPLE.replace(APPLE[APPLE.index("<Record") :], "")
    first = next(line for line in APPLE.splitlines(keepends=True) if line.startswith("<Record"))
    early = write_apple(tmp_path / "early", early_text + first + "</HealthData>")
    run(store, early)
    assert values(store, "me", "steps") == {"steps": 100}
    run(store, whole)
    assert values(store, "me", "steps") == {"steps": 350}
    # The other way round, the older export takes nothing away.
    run(store, early)
    assert values(store, "me", "steps") == {"steps": 350}


@pytest.mark.parametrize(
    "declaration",
    [
        '<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">',
        '<!ENTITY file SYSTEM "file:///etc/hostname">',
        '<!ENTITY % outside SYSTEM "http://127.0.0.1/x.dtd"> %outside;',
    ],
)
def test_xml_entities_are_refused(tmp_path: Path, store: Store, declaration: str) -> None:
    text = APPLE.replace("<!ELEMENT HealthData", declaration + "\n<!ELEMENT HealthData")
    with pytest.raises(ImportDataError, match="entity"):
        run(store, write_apple(tmp_path, text))
    assert_kept_nothing(store)


def test_an_external_dtd_is_never_fetched(tmp_path: Path, store: Store) -> None:
    text = APPLE.replace("<!DOCTYPE HealthData [", '<!DOCTYPE HealthData SYSTEM "file:///etc/x" [')
    run(store, write_apple(tmp_path, text))
    reference = text.replace('value="100"', 'value="&x;"')
    with pytest.raises(ImportDataError):
        run(store, write_apple(tmp_path, reference))


def test_a_cut_export_keeps_nothing(tmp_path: Path, store: Store) -> None:
    with pytest.raises(ImportDataError, match=r"line \d+: this is not well-formed"):
        run(store, write_apple(tmp_path, APPLE[:-40]))
    assert_kept_nothing(store)


def test_nesting_without_end_is_refused(tmp_path: Path, store: Store) -> None:
    with pytest.raises(ImportDataError, match="not an export"):
        run(store, write_apple(tmp_path, APPLE_DTD + "<HealthData>" + "<a>" * 10_000))


def peak_of_reading(folder: Path, records: int) -> int:
    times = [
        f"2024-01-02 {k // 3600:02}:{k // 60 % 60:02}:{k % 60:02} -0500" for k in range(records)
    ]
    made = [
        apple_record("HKQuantityTypeIdentifierHeartRate", "61", "count/min", at, at, "Watch")
        for at in times
    ]
    path = write_apple(folder, f"{APPLE_DTD}<HealthData>\n{''.join(made)}</HealthData>\n")
    del made, times
    told: list[int] = []
    readings = importer_for(path).read(path, Options(), lambda done, _: told.append(done))
    tracemalloc.start()
    count = sum(1 for _ in readings)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == records
    assert told == sorted(told)
    assert told[-1] == path.stat().st_size
    return peak


def test_memory_grows_by_no_more_than_what_knows_a_record_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apple, "BLOCK_BYTES", 16_384)
    grown = peak_of_reading(tmp_path, 8_000) - peak_of_reading(tmp_path, 1_000)
    # Bytes; a record has over two hundred in the file, and several times as many once parsed.
    assert grown < 48 * 7_000


# --- Fitbit --------------------------------------------------------------------------------------


def test_fitbit_is_read_and_a_day_is_the_persons_own(tmp_path: Path, store: Store) -> None:
    folder = write_fitbit(tmp_path / "export")
    report = run(store, folder, time_zone=NEW_YORK)
    assert (report.format, report.bad) == ("fitbit", 0)
    found = values(
        store, "me", "sleep_hours", "time_in_bed_hours", "sleep_efficiency", "steps", "heart_rate",
        "resting_heart_rate", "active_minutes", "device_class",
    )  # fmt: skip
    assert found == pytest.approx(
        {
            "sleep_hours": 7.5, "time_in_bed_hours": 8.5, "sleep_efficiency": 93, "steps": 1200,
            "heart_rate": 65, "resting_heart_rate": 58.5, "active_minutes": 35, "device_class": 1,
        }
    )  # fmt: skip
    rows = store.rows(store.person("me"), frozenset({"steps"}))
    assert dict(zip(rows.days.tolist(), rows.values["steps"].tolist(), strict=True))[DAY - 1] == 40
    assert_imports_once(store, folder, time_zone=NEW_YORK)


def test_times_in_utc_are_refused_without_a_time_zone(tmp_path: Path, store: Store) -> None:
    with pytest.raises(ImportDataError, match="--time-zone"):
        run(store, write_fitbit(tmp_path / "export"))
    assert_kept_nothing(store)


def test_fitbit_is_read_out_of_its_archive(tmp_path: Path, store: Store) -> None:
    folder = write_fitbit(tmp_path / "export")
    path = tmp_path / "takeout.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.json")):
            archive.write(file, file.relative_to(folder))
    assert run(store, path, time_zone=NEW_YORK).readings == 14


def test_steps_alone_may_be_a_phones(tmp_path: Path, store: Store) -> None:
    folder = write_fitbit(tmp_path / "export")
    for file in folder.rglob("heart_rate-*.json"):
        # Without confidence the tracker was not worn.
        file.write_text(re.sub('"confidence": [0-9]', '"confidence": 0', file.read_text()))
    run(store, folder, time_zone=NEW_YORK)
    columns = {one.column for one in store.holdings(store.person("me"))}
    assert "steps" in columns
    assert "device_class" not in columns


def test_entries_of_another_kind_are_bad_rows(tmp_path: Path, store: Store) -> None:
    folder = write_fitbit(tmp_path / "export")
    file = next(folder.rglob("steps-*.json"))
    file.write_text(json.dumps([{"dateTime": 5}, {"value": "1"}, {"dateTime": "x", "value": "1"}]))
    report = run(store, folder, time_zone=NEW_YORK, skip_bad=True)
    assert [(row.file, row.line) for row in report.bad_rows] == [(file.name, n) for n in (1, 2, 3)]
    file.write_text('{"not": "a list"}')
    with pytest.raises(ImportDataError, match="not as its format says"):
        run(store, folder, time_zone=NEW_YORK)


def test_the_made_up_export_covers_every_kind_of_file_but_two() -> None:
    assert len({name.split("-")[0] for name in FITBIT}) == 6


# --- Open mHealth --------------------------------------------------------------------------------


@pytest.mark.parametrize("one_a_line", [True, False])
def test_open_mhealth_is_read(tmp_path: Path, store: Store, one_a_line: bool) -> None:  # noqa: FBT001
    path = tmp_path / "points.json"
    lines = "\n".join(json.dumps(point) for point in OPEN_MHEALTH)
    path.write_text(lines if one_a_line else json.dumps(OPEN_MHEALTH, indent=1))
    report = run(store, path)
    assert (report.format, report.bad) == ("open-mhealth", 0)
    found = values(store, "me", "steps", "sleep_hours", "resting_heart_rate")
    assert found == pytest.approx(
        {"steps": 6000, "sleep_hours": 415 / 60, "resting_heart_rate": 50}
    )
    assert_imports_once(store, path)


def test_open_mhealth_refuses_units_it_does_not_know(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "points.json"
    path.write_text(json.dumps(OPEN_MHEALTH).replace('"beats/min"', '"beats/fortnight"'))
    with pytest.raises(ImportDataError, match="fortnight"):
        run(store, path)
    assert_kept_nothing(store)


# --- FHIR ----------------------------------------------------------------------------------------


def write_ndjson(folder: Path, *resources: dict[str, Any]) -> Path:
    path = folder / "resources.ndjson"
    path.write_text("".join(json.dumps(one) + "\n" for one in resources))
    return path


def test_the_synthea_bundles_import(store: Store, shared_data: Path) -> None:
    bundles = sorted((shared_data / "fhir_synthea_r4").glob("*.json"))
    assert len(bundles) == 5
    for path in bundles:
        report = run(store, path, time_zone=NEW_YORK)
        assert (report.format, report.people, report.bad) == ("fhir", 1, 0)
        (person,) = [p for p in store.people() if p.number == len(store.people())]
        resources = [e["resource"] for e in json.loads(path.read_bytes())["entry"]]
        # The Patient's own id, not the Bundle's urn:uuid.
        (patient,) = [one["id"] for one in resources if one["resourceType"] == "Patient"]
        assert person.name == f"Patient/{patient}"
        expected = [
            one["valueQuantity"]["value"]
            for one in resources
            if one["resourceType"] == "Observation"
            and one["code"]["coding"][0]["code"] == "29463-7"
        ]
        rows = store.rows(person, frozenset({"body_weight_kg"}))
        assert sorted(rows.values["body_weight_kg"]) == pytest.approx(sorted(expected))
        assert_imports_once(store, path, time_zone=NEW_YORK)


def test_phq9_is_read_from_a_questionnaire_response(tmp_path: Path, store: Store) -> None:
    path = write_ndjson(tmp_path, phq9([1, 2, 3, 0, 1, 2, 3, 0, 1]))
    run(store, path)
    found = values(store, "Patient/7", "phq9_total", "phq9_item_3", "phq9_item_9")
    assert found == {"phq9_total": 13, "phq9_item_3": 3, "phq9_item_9": 1}
    assert {event.column for event in store.events(store.person("Patient/7"))} >= {"phq9_total"}
    assert_imports_once(store, path)


def test_a_total_that_is_not_the_sum_of_its_items_is_bad(tmp_path: Path, store: Store) -> None:
    path = write_ndjson(tmp_path, phq9([1] * 9, total=9), phq9([1] * 9, total=10))
    with pytest.raises(ImportDataError, match="line 2: The total of phq9"):
        run(store, path)
    assert_kept_nothing(store)


def test_observations_are_read_by_their_codes_and_units(tmp_path: Path, store: Store) -> None:
    panel = [
        {
            "code": {"coding": [{"system": "http://loinc.org", "code": code}]},
            "valueCodeableConcept": {
                "coding": [{"system": "http://loinc.org", "code": "LA6570-1"}]
            },
        }
        for code in PHQ9_CODES
    ]
    path = write_ndjson(
        tmp_path,
        observation("93832-4", valueQuantity={"value": 7.5, "code": "h"}),
        observation("41950-7", valueQuantity={"value": 4000, "unit": "steps/day"}),
        observation("8867-4", valueQuantity={"value": 71, "code": "/min"}),
        observation("70274-6", valueInteger=11),
        observation("44249-1", component=panel),
        observation("8302-2", valueQuantity={"value": 180, "code": "cm"}),
        {"resourceType": "Patient", "id": "7"},
    )
    report = run(store, path)
    assert report.bad == 0
    found = values(
        store, "Patient/7", "sleep_hours", "steps", "heart_rate", "gad7_total", "phq9_total"
    )
    assert found == {
        "sleep_hours": 7.5, "steps": 4000, "heart_rate": 71, "gad7_total": 11, "phq9_total": 18,
    }  # fmt: skip


@pytest.mark.parametrize("status", ["entered-in-error", "preliminary", "cancelled", "unknown"])
def test_what_is_not_final_is_passed_over(tmp_path: Path, store: Store, status: str) -> None:
    value = {"value": 7.5, "code": "h"}
    path = write_ndjson(tmp_path, observation("93832-4", status=status, valueQuantity=value))
    assert run(store, path).readings == 0
    assert_kept_nothing(store)


def test_one_resource_that_comes_twice_counts_once(tmp_path: Path, store: Store) -> None:
    steps = observation("41950-7", id="o1", valueQuantity={"value": 4000, "code": "{steps}"})
    run(store, write_ndjson(tmp_path, steps, steps))
    assert values(store, "Patient/7", "steps") == {"steps": 4000}


def test_bad_lines_are_named_and_never_quoted(tmp_path: Path, store: Store) -> None:
    good = observation("93832-4", valueQuantity={"value": 7.5, "code": "h"})
    path = write_ndjson(
        tmp_path,
        good,
        observation("93832-4", valueQuantity={"value": 77.77, "code": "h"}),
        observation("93832-4", valueQuantity={"value": "8.88", "code": "h"}),
        observation("93832-4", effectiveDateTime="2024", valueQuantity={"value": 1, "code": "h"}),
        observation("93832-4", valueQuantity={"value": 1, "code": "furlong"}),
    )
    path.write_text(path.read_text() + '{"resourceType": "Observation", "9.99\n[1]\n')
    with pytest.raises(ImportDataError) as caught:
        run(store, path)
    message = str(caught.value)
    assert "6 values are bad" in message
    for line in range(2, 8):
        assert f"line {line}:" in message
    for secret in ("77.77", "8.88", "9.99", "Patient/7"):
        assert secret not in message
    assert_kept_nothing(store)
    report = run(store, path, skip_bad=True)
    assert (report.readings, report.bad) == (1, 6)


def test_a_file_for_one_person_may_not_speak_of_two(tmp_path: Path, store: Store) -> None:
    value = {"value": 7.5, "code": "h"}
    path = write_ndjson(
        tmp_path,
        observation("93832-4", valueQuantity=value),
        observation("93832-4", valueQuantity=value, subject={"reference": "Patient/8"}),
    )
    with pytest.raises(ImportDataError, match="several people"):
        run(store, path, person="me")
    run(store, path)
    assert [person.name for person in store.people()] == ["Patient/7", "Patient/8"]


def test_deeply_nested_json_is_refused(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "deep.json"
    path.write_text('{"resourceType": "QuestionnaireResponse", "item": ' + '[{"item":' * 50_000)
    with pytest.raises(ImportDataError):
        run(store, path)


# --- Anything ------------------------------------------------------------------------------------


def test_a_format_that_nobody_knows_is_refused(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary")
    with pytest.raises(ImportDataError, match="--mapping"):
        run(store, path)
    with pytest.raises(ImportDataError, match="nothing at"):
        run(store, tmp_path / "missing")


def test_a_day_of_26_hours_is_bad(tmp_path: Path, store: Store) -> None:
    value = {"value": 13, "code": "h"}
    nights = [observation("93832-4", id=name, valueQuantity=value) for name in ("a", "b")]
    path = write_ndjson(tmp_path, *nights)
    with pytest.raises(ImportDataError, match="whole day"):
        run(store, path)
    assert_kept_nothing(store)


def test_an_import_of_more_events_than_can_be_kept_keeps_nothing(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("federated.node.importers.run.MAX_CELLS", 40)
    lines = "".join(f"2024-01-02T10:{n // 60:02}:{n % 60:02},70\n" for n in range(200))
    (tmp_path / "weights.csv").write_text("at,kg\n" + lines)
    (tmp_path / "m.toml").write_text(
        'source = "t"\n[day]\ncolumn = "at"\n[columns.body_weight_kg]\ntake = ["kg"]\nunit = "kg"\n'
    )
    with pytest.raises(ImportDataError, match="more than 40"):
        import_path(
            store, tmp_path / "weights.csv", Options(mapping=tmp_path / "m.toml"), now=1,
            progress=lambda _done, _total: None,
        )  # fmt: skip
    assert store.people() == ()
