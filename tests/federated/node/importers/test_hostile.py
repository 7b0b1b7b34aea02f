"""Whatever stands in a file is read, or refused with `ImportDataError`; nothing else happens."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from federated.errors import ImportDataError
from federated.node.importers.reading import (
    BadRow,
    Moment,
    Options,
    day_number,
    last_moment,
    moment,
    parse_time,
)
from federated.node.importers.run import IMPORTERS
from tests.federated.node.importers.exports import (
    APPLE,
    FITBIT,
    OPEN_MHEALTH,
    observation,
    phq9,
)
from tests.federated.node.importers.test_csv import MAPPING, TABLE

_FHIR = "\n".join(
    json.dumps(one)
    for one in (
        phq9([1] * 9),
        observation("93832-4", valueQuantity={"value": 7, "code": "h"}),
        observation("44249-1", effectivePeriod={"start": "2024-01-01", "end": "2024-01-02"}),
    )
)
SEEDS: Final = {
    "fhir": ("x.json", _FHIR),
    "apple-health": ("export.xml", APPLE),
    "fitbit": ("sleep-2024-01-01.json", json.dumps(FITBIT["sleep-2024-01-01.json"])),
    "open-mhealth": ("x.json", json.dumps(OPEN_MHEALTH)),
    "csv": ("x.csv", TABLE),
}
_ZONE = ZoneInfo("America/New_York")


def read(name: str, folder: Path, content: bytes) -> Iterator[Any]:
    (importer,) = [one for one in IMPORTERS if one.name == name]
    file = folder / SEEDS[name][0]
    file.write_bytes(content)
    (folder / "mapping.toml").write_text(MAPPING)
    options = Options(time_zone=_ZONE, mapping=folder / "mapping.toml")
    return importer.read(file, options, lambda *_: None)


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_the_seed_itself_is_read(tmp_path: Path, name: str) -> None:
    found = list(read(name, tmp_path, SEEDS[name][1].encode()))
    assert found
    assert not [one for one in found if isinstance(one, BadRow)]


@pytest.mark.parametrize("name", sorted(SEEDS))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_changed_bytes_are_read_or_refused(tmp_path: Path, name: str, data: st.DataObject) -> None:
    content = bytearray(SEEDS[name][1].encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.integers(0, 8))
        content[place : place + length] = data.draw(st.binary(max_size=8))
        content = content or bytearray(b"x")
    with contextlib.suppress(ImportDataError):
        list(read(name, tmp_path, bytes(content)))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list):
        items = list(enumerate(value))
    for key, inner in items:
        yield from places_in(inner, (*path, key))


@pytest.mark.parametrize("name", ["fhir", "fitbit", "open-mhealth"])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_json_in_any_place_is_read_or_refused(
    tmp_path: Path, name: str, data: st.DataObject
) -> None:
    """Where a number should stand there may be a list, where a list, nothing, and so on."""
    text = SEEDS[name][1].partition("\n")[0] if name == "fhir" else SEEDS[name][1]
    document = json.loads(text)
    *way, last = data.draw(st.sampled_from(list(places_in(document))))
    inside = document
    for key in way:
        inside = inside[key]
    inside[last] = data.draw(_JSON)
    with contextlib.suppress(ImportDataError):
        list(read(name, tmp_path, json.dumps(document).encode()))


# --- Days ----------------------------------------------------------------------------------------

_TIMES = st.datetimes(min_value=datetime(1950, 1, 2), max_value=datetime(2150, 1, 1))  # noqa: DTZ001
_OFFSETS = st.integers(-14 * 60, 14 * 60).filter(bool)


@given(found=_TIMES, offset=_OFFSETS)
def test_a_day_is_that_of_the_clock_beside_the_person(found: datetime, offset: int) -> None:
    aware = found.replace(tzinfo=timezone(timedelta(minutes=offset)))
    made = moment(aware, None)
    assert made == Moment(day_number(found.date()), int(aware.timestamp()))
    assert moment(parse_time(aware.isoformat()), None) == made


@given(found=_TIMES)
@example(found=datetime(2024, 3, 10, 2, 30))  # noqa: DTZ001 - the hour that is left out
@example(found=datetime(2024, 11, 3, 1, 30))  # noqa: DTZ001 - the hour that comes twice
def test_with_a_time_zone_the_day_is_that_of_the_zone(found: datetime) -> None:
    aware = found.replace(tzinfo=_ZONE)
    in_utc = aware.astimezone(timezone.utc)  # noqa: UP017 - as importers meet it
    there_and_back = in_utc.astimezone(_ZONE)
    assert moment(in_utc, _ZONE).day == day_number(there_and_back.date())
    assert moment(found, _ZONE).day == day_number(found.date())


@pytest.mark.parametrize(
    ("text", "zone"),
    [("0001-01-01T00:00:00+14:00", "UTC"), ("9999-12-31T23:59:59-12:00", "Asia/Tokyo")],
)
def test_a_time_at_the_end_of_all_times_is_refused(text: str, zone: str) -> None:
    with pytest.raises(ImportDataError, match="day"):
        moment(parse_time(text), ZoneInfo(zone))


def test_what_ends_when_time_begins_is_refused() -> None:
    with pytest.raises(ImportDataError, match="day"):
        last_moment(datetime.min)  # noqa: DTZ901 - the person's own clock


@pytest.mark.parametrize("when", ["2024-01-02T03:00:00Z", "2024-01-02T03:00:00+00:00"])
def test_a_time_in_utc_alone_belongs_to_no_day(when: str) -> None:
    with pytest.raises(ImportDataError, match="time zone"):
        moment(parse_time(when), None)
    assert moment(parse_time(when), _ZONE).day == day_number(date(2024, 1, 1))


@pytest.mark.parametrize("year", [1, 1899, 2300, 9999])
def test_a_day_that_nobody_can_have_lived_is_refused(year: int) -> None:
    with pytest.raises(ImportDataError):
        day_number(date(year, 1, 1))
