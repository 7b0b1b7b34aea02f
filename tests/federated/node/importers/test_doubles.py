"""What comes twice counts once: in a file, over files, in any order."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from federated.errors import ImportDataError
from federated.node.importers.reading import Seen
from federated.node.store import Store
from tests.federated.node.importers.exports import (
    APPLE_DTD,
    FITBIT,
    apple_record,
    open_mhealth_point,
    write_fitbit,
)
from tests.federated.node.importers.test_importers import (
    DAY,
    NEW_YORK,
    assert_imports_once,
    run,
    values,
    write_apple,
)

# --- Apple Health ---

HOUR = ("2024-01-02 08:00:00 -0500", "2024-01-02 09:00:00 -0500")


def steps(value: int, source: str = "Watch", at: tuple[str, str] = HOUR) -> str:
    return apple_record("HKQuantityTypeIdentifierStepCount", str(value), "count", *at, source)


def asleep(start: str, end: str, source: str = "Watch", kind: str = "AsleepCore") -> str:
    value = f"HKCategoryValueSleepAnalysis{kind}"
    times = (f"2024-01-{start}:00 -0500", f"2024-01-{end}:00 -0500")
    return apple_record("HKCategoryTypeIdentifierSleepAnalysis", value, "", *times, source)


def apple(folder: Path, *records: str, exported: str = "2024-02-01 08:00:00 -0500") -> Path:
    date = f'<ExportDate value="{exported}"/>\n'
    return write_apple(folder, f"{APPLE_DTD}<HealthData>\n{date}{''.join(records)}</HealthData>\n")


def test_apples_doubled_records_count_once(tmp_path: Path, store: Store) -> None:
    path = apple(tmp_path, steps(100), steps(100), steps(40, at=(HOUR[1], HOUR[1])), steps(100))
    report = run(store, path)
    assert report.readings == 2
    assert values(store, "me", "steps") == {"steps": 140}
    assert_imports_once(store, path)


def test_overlapping_sleep_of_one_source_is_a_union(tmp_path: Path, store: Store) -> None:
    records = [
        asleep("01 23:00", "02 03:00"),
        asleep("01 23:00", "02 03:00"),
        asleep("02 02:00", "02 06:00", kind="AsleepREM"),
        asleep("02 04:00", "02 05:00", kind="AsleepDeep"),
        asleep("01 22:30", "02 06:30", kind="InBed"),
        asleep("01 23:30", "02 02:30", kind="InBed"),
    ]
    for seed in range(4):
        random.Random(seed).shuffle(records)
        run(store, apple(tmp_path, *records))
        found = values(store, "me", "sleep_hours", "time_in_bed_hours")
        assert found == {"sleep_hours": 7, "time_in_bed_hours": 8}


def test_a_phone_and_a_watch_are_never_added_up(tmp_path: Path, store: Store) -> None:
    run(
        store,
        apple(
            tmp_path,
            asleep("01 23:00", "02 05:00"),
            asleep("02 01:00", "02 06:30", source="Phone", kind="AsleepUnspecified"),
        ),
    )
    assert values(store, "me", "sleep_hours") == {"sleep_hours": 6}


def test_a_night_belongs_whole_to_the_day_on_which_it_ends(tmp_path: Path, store: Store) -> None:
    # The first stage ends before midnight; the last night of all at midnight itself.
    run(
        store,
        apple(
            tmp_path,
            asleep("01 22:00", "01 23:30"),
            asleep("02 00:30", "02 06:00", kind="AsleepDeep"),
            asleep("02 14:00", "02 15:00"),
            asleep("02 20:00", "03 00:00"),
        ),
    )
    rows = store.rows(store.person("me"), frozenset({"sleep_hours"}))
    assert rows.days.tolist() == [DAY]
    assert rows.values["sleep_hours"].tolist() == [1.5 + 5.5 + 1 + 4]


def test_a_long_waking_within_a_night_does_not_divide_it(tmp_path: Path, store: Store) -> None:
    run(
        store,
        apple(
            tmp_path,
            asleep("01 21:00", "01 23:00"),
            asleep("01 23:00", "02 02:00", kind="Awake"),
            asleep("02 02:00", "02 06:00"),
        ),
    )
    rows = store.rows(store.person("me"), frozenset({"sleep_hours"}))
    assert (rows.days.tolist(), rows.values["sleep_hours"].tolist()) == ([DAY], [6])


def test_days_of_short_sleeps_one_after_another_are_not_one_night(
    tmp_path: Path, store: Store
) -> None:
    sleeps = [
        asleep(f"{day:02} {hour:02}:00", f"{day:02} {hour + 2:02}:00")
        for day in (1, 2, 3)
        for hour in range(0, 22, 3)
    ]
    report = run(store, apple(tmp_path, *sleeps))
    assert report.bad == 0
    rows = store.rows(store.person("me"), frozenset({"sleep_hours"}))
    assert sum(rows.values["sleep_hours"]) == 3 * 16


@pytest.mark.parametrize(("start", "end"), [("02 06:00", "02 05:00"), ("01 01:00", "02 06:00")])
def test_an_interval_that_no_sleep_can_be_is_a_bad_row_with_its_line(
    tmp_path: Path, store: Store, start: str, end: str
) -> None:
    path = apple(tmp_path, steps(100), asleep(start, end))
    line = path.read_text().splitlines().index(asleep(start, end).strip()) + 1
    with pytest.raises(ImportDataError, match=f"line {line}: .*interval"):
        run(store, path)


@pytest.mark.parametrize("turned", [False, True])
def test_an_older_export_never_replaces_a_newer_one(
    tmp_path: Path,
    store: Store,
    turned: bool,  # noqa: FBT001
) -> None:
    # The older one has more records; the newer one is what the person corrected.
    older = (
        (steps(100), steps(40, at=(HOUR[1], HOUR[1]))),
        "2024-01-02 20:00:00 -0500",
    )
    newer = ((steps(90),), "2024-01-03 08:00:00 -0500")
    for records, exported in (newer, older) if turned else (older, newer):
        run(store, apple(tmp_path, *records, exported=exported))
    assert values(store, "me", "steps") == {"steps": 90}


def test_sleep_without_end_does_not_fill_the_memory(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("federated.node.importers.nights.MOST_INTERVALS", 2, raising=False)
    path = apple(tmp_path, *[asleep(f"0{day} 01:00", f"0{day} 05:00") for day in (2, 3, 4)])
    with pytest.raises(ImportDataError, match="more than 2 intervals"):
        run(store, path)


# --- Fitbit ---


def fitbit(folder: Path, **files: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_fitbit_night_in_two_files_counts_once(tmp_path: Path, store: Store) -> None:
    folder = write_fitbit(tmp_path / "export")
    first = next(folder.rglob("sleep-*.json"))
    first.with_name("sleep-2024-01-02.json").write_text(first.read_text())
    run(store, folder, time_zone=NEW_YORK)
    assert values(store, "me", "sleep_hours")["sleep_hours"] == pytest.approx(7.5)
    assert_imports_once(store, folder, time_zone=NEW_YORK)


@pytest.mark.parametrize("turned", [False, True])
def test_fitbit_files_that_are_read_one_by_one_add_up_as_together(
    tmp_path: Path,
    store: Store,
    turned: bool,  # noqa: FBT001
) -> None:
    names = ["moderately_active_minutes-2024-01-02", "very_active_minutes-2024-01-02"]
    night = FITBIT["sleep-2024-01-01.json"]
    files = [{name: FITBIT[f"{name}.json"]} for name in names]
    files += [{"sleep-2024-01-01": [night[0]]}, {"sleep-2024-01-01": [night[1]]}]
    for place, file in enumerate(files[::-1] if turned else files):
        run(store, fitbit(tmp_path / str(place), **file), time_zone=NEW_YORK)
    found = values(store, "me", "active_minutes", "sleep_hours")
    assert found == pytest.approx({"active_minutes": 35, "sleep_hours": 7.5})


def test_a_minute_in_two_fitbit_files_counts_once(tmp_path: Path, store: Store) -> None:
    folder = write_fitbit(tmp_path / "export")
    first = next(folder.rglob("steps-*.json"))
    first.with_name("steps-2024-01-31.json").write_text(first.read_text())
    run(store, folder, time_zone=NEW_YORK)
    assert values(store, "me", "steps") == {"steps": 1200}


# --- Open mHealth ---


def total(value: int, made: str, identity: str) -> dict[str, Any]:
    frame = {
        "time_interval": {
            "start_date_time": "2024-01-02T00:00:00-05:00", "duration": {"value": 1, "unit": "d"},
        }
    }  # fmt: skip
    body = {"step_count": {"value": value, "unit": "steps"}, "effective_time_frame": frame}
    point = open_mhealth_point("step-count", body)
    point["header"] |= {"id": identity, "creation_date_time": f"2024-01-02T{made}:00-05:00"}
    return point


def points(folder: Path, *made: dict[str, Any]) -> Path:
    path = folder / "points.json"
    path.write_text(json.dumps(made))
    return path


def test_one_point_that_comes_twice_counts_once(tmp_path: Path, store: Store) -> None:
    path = points(tmp_path, total(900, "20:00", "a"), total(900, "20:00", "a"))
    run(store, path)
    assert values(store, "me", "steps") == {"steps": 900}
    assert_imports_once(store, path)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_an_older_total_never_replaces_a_newer_one(
    tmp_path: Path,
    store: Store,
    apart: bool,  # noqa: FBT001
    turned: bool,  # noqa: FBT001
) -> None:
    both = [total(900, "12:00", "a"), total(800, "23:00", "b")]
    both = both[::-1] if turned else both
    for batch in [[one] for one in both] if apart else [both]:
        run(store, points(tmp_path, *batch))
    assert values(store, "me", "steps") == {"steps": 800}


def test_two_schemas_for_one_night_are_not_added_up(tmp_path: Path, store: Store) -> None:
    frame = {
        "time_interval": {
            "start_date_time": "2024-01-01T23:00:00-05:00",
            "end_date_time": "2024-01-02T06:00:00-05:00",
        }
    }
    made = [
        open_mhealth_point(
            schema, {field: {"value": 400, "unit": "min"}, "effective_time_frame": frame}
        )
        for schema, field in [
            ("sleep-duration", "sleep_duration"),
            ("total-sleep-time", "total_sleep_time"),
            ("sleep-episode", "total_sleep_time"),
        ]
    ]
    run(store, points(tmp_path, *made))
    assert values(store, "me", "sleep_hours") == {"sleep_hours": pytest.approx(400 / 60)}


def test_two_sources_of_open_mhealth_are_never_added_up(tmp_path: Path, store: Store) -> None:
    made = []
    for name, value in [("Phone", 900), ("Watch", 1000)]:
        point = total(value, "20:00", name)
        point["header"]["acquisition_provenance"] = {"source_name": name}
        made.append(point)
    run(store, points(tmp_path, *made))
    assert values(store, "me", "steps") == {"steps": 1000}
    held = store.holdings(store.person("me"))
    assert [one.source for one in held] == ["open-mhealth: Phone", "open-mhealth: Watch"]


# --- Remembering ---


def test_what_was_seen_is_known_again_and_nothing_else() -> None:
    seen = Seen()
    assert all(seen.first("record", number) for number in range(5000))
    assert not any(seen.first("record", number) for number in range(5000))
    assert seen.first("record", "1")
    # What stands beside each other is not what stands together.
    assert seen.first("ab", "c")
    assert seen.first("a", "bc")
