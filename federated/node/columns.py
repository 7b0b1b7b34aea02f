"""The typed daily table: every column there is, its unit, range, meaning and codes.

Lives here: the list, the units that may be converted into a column's own, the check of one value.
Strict on purpose: a column that is not listed does not exist, and a unit that is not listed is
refused, since a number with a guessed unit is worse than no number. LOINC codes from loinc.org,
units in UCUM's spelling. Columns that come from one survey's question name it: SLQ, PAQ, DMD and
IND are variables of NHANES 2017-2018 (wwwn.cdc.gov/nchs/nhanes), whose PAQ is WHO's GPAQ. Pure.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from federated.errors import ImportDataError

#: How the readings of one day become the day's value.
type Fold = Literal["mean", "sum", "last"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column. `low` and `high` bound what a value may be; outside of them it is a bad reading.

    `lasting` is true for what holds until it changes (sex, study arm): the table says it on every
    day. `event` is true if each reading is kept with its time beside the day's value. `codes` are
    LOINC codes whose observations fill the column.
    """

    name: str
    unit: str
    low: float
    high: float
    meaning: str
    codes: tuple[str, ...] = ()
    fold: Fold = "mean"
    lasting: bool = False
    event: bool = False
    whole: bool = False


#: unit → (canonical unit, factor). A value times the factor is in the canonical unit.
_FACTORS: Final[Mapping[str, Mapping[str, float]]] = {
    "h": {
        "h": 1.0, "hr": 1.0, "min": 1 / 60, "s": 1 / 3600, "sec": 1 / 3600, "ms": 1 / 3_600_000,
        "d": 24.0,
    },
    "min": {"min": 1.0, "h": 60.0, "hr": 60.0, "s": 1 / 60, "sec": 1 / 60, "ms": 1 / 60_000},
    "ms": {"ms": 1.0, "s": 1000.0},
    "km": {"km": 1.0, "m": 0.001, "cm": 1e-5, "mi": 1.609344, "[mi_i]": 1.609344},
    "kg": {"kg": 1.0, "g": 0.001, "lb": 0.45359237, "[lb_av]": 0.45359237},
    "cm": {"cm": 1.0, "m": 100.0, "[in_i]": 2.54, "in": 2.54},
    "/min": {
        "/min": 1.0, "{beats}/min": 1.0, "beats/min": 1.0, "{Beats}/min": 1.0, "bpm": 1.0,
        "count/min": 1.0, "{count}/min": 1.0, "/s": 60.0, "count/s": 60.0,
    },
    "%": {"%": 1.0, "1": 100.0},
    "{steps}": {"{steps}": 1.0, "steps": 1.0, "count": 1.0, "{count}": 1.0, "1": 1.0, "/d": 1.0,
                "{steps}/d": 1.0, "steps/day": 1.0},
    "{score}": {"{score}": 1.0, "score": 1.0, "1": 1.0, "{Score}": 1.0},
    "{count}": {"{count}": 1.0, "count": 1.0, "1": 1.0},
    "{code}": {"{code}": 1.0, "1": 1.0},
    "1": {"1": 1.0, "{ratio}": 1.0},
    "a": {"a": 1.0, "year": 1.0, "years": 1.0, "mo": 1 / 12},
    "kg/m2": {"kg/m2": 1.0},
}  # fmt: skip

_PHQ9 = (
    ("little interest or pleasure in doing things", "44250-9"),
    ("feeling down, depressed or hopeless", "44255-8"),
    ("trouble sleeping, or sleeping too much", "44259-0"),
    ("feeling tired or having little energy", "44254-1"),
    ("poor appetite or overeating", "44251-7"),
    ("feeling bad about oneself", "44258-2"),
    ("trouble concentrating", "44252-5"),
    ("moving or speaking slowly, or being restless", "44253-3"),
    ("thoughts of being better off dead or of hurting oneself", "44260-8"),
)
_GAD7 = (
    ("feeling nervous, anxious or on edge", "69725-0"),
    ("not being able to stop or control worrying", "68509-9"),
    ("worrying too much about different things", "69733-4"),
    ("trouble relaxing", "69734-2"),
    ("being so restless that it is hard to sit still", "69735-9"),
    ("becoming easily annoyed or irritable", "69689-8"),
    ("feeling afraid as if something awful might happen", "69736-7"),
)
#: LOINC codes of the panels; their answers are the items, their score the total.
PHQ9_PANEL: Final = "44249-1"
GAD7_PANEL: Final = "69737-5"


def _score(name: str, low: float, high: float, meaning: str) -> Column:
    return Column(name=name, unit="{score}", low=low, high=high, meaning=meaning)


def _items(prefix: str, items: Iterable[tuple[str, str]]) -> tuple[Column, ...]:
    return tuple(
        Column(
            name=f"{prefix}_item_{number}",
            unit="{score}",
            low=0,
            high=3,
            meaning=f"{prefix.upper()[:3]}-{prefix[3:]} item {number}: {meaning}",
            codes=(code,),
            fold="last",
            event=True,
            whole=True,
        )
        for number, (meaning, code) in enumerate(items, start=1)
    )


def _total(name: str, high: float, meaning: str, *codes: str) -> Column:
    return Column(
        name=name, unit="{score}", low=0, high=high, meaning=meaning, codes=codes,
        fold="last", event=True, whole=True,
    )  # fmt: skip


def _answer(name: str, high: float, meaning: str) -> Column:
    """One question's ordered answers, 0 and up; what was refused or not known is no value."""
    return Column(
        name=name, unit="{code}", low=0, high=high, whole=True, fold="last", lasting=True,
        meaning=meaning,
    )  # fmt: skip


def _hours(name: str, meaning: str, *codes: str, fold: Fold = "sum") -> Column:
    return Column(name=name, unit="h", low=0, high=24, meaning=meaning, codes=codes, fold=fold)


_ALL: Final[tuple[Column, ...]] = (
    _score("mood", -6, 6, "positive minus negative affect, each from 1 (not at all) to 7 (very)"),
    _score("positive_affect", 1, 7, "mean of positive feelings, 1 (not at all) to 7 (very)"),
    _score("negative_affect", 1, 7, "mean of negative feelings, 1 (not at all) to 7 (very)"),
    _score("worry", 1, 7, "how much the day's worries bothered, 1 (not at all) to 7 (very)"),
    _score("stress", 1, 7, "how stressful the day was, 1 (not at all) to 7 (very)"),
    _score("energy", 1, 7, "how lively the person felt, 1 (not at all) to 7 (very)"),
    Column(name="stressors", unit="{count}", low=0, high=50, whole=True, fold="last",
           meaning="how many kinds of stressful events the day had"),
    _score("sleep_quality", 1, 7, "how the last night was slept, 1 (very badly) to 7 (very well)"),
    _hours("sleep_hours", "time asleep in the night (and naps) that ended on the day",
           "93832-4", "65968-0"),
    _hours("time_in_bed_hours", "time in bed in the night that ended on the day", "93831-6"),
    Column(name="sleep_efficiency", unit="%", low=0, high=100,
           meaning="time asleep as a share of the time in bed"),
    _answer("trouble_sleeping", 1,
            "1 if the person ever told a doctor that they have trouble sleeping (SLQ050)"),
    _answer("daytime_sleepiness", 4,
            "how often overly sleepy by day in the past month: 0 never, 1 once, 2 2 to 4 times, "
            "3 5 to 15 times, 4 16 to 30 times (SLQ120)"),
    _answer("snoring", 3,
            "how often the person snored in the past year: 0 never, 1 1 to 2 nights a week, "
            "2 3 to 4, 3 5 or more (SLQ030)"),
    Column(name="steps", unit="{steps}", low=0, high=200_000, fold="sum",
           meaning="steps in the day", codes=("41950-7", "55423-8")),
    Column(name="distance_km", unit="km", low=0, high=300, fold="sum",
           meaning="distance walked and run in the day", codes=("55430-3",)),
    Column(name="active_minutes", unit="min", low=0, high=1440, fold="sum",
           meaning="minutes of moderate or vigorous activity in the day", codes=("55411-3",)),
    Column(name="sedentary_minutes", unit="min", low=0, high=1440, fold="sum",
           meaning="minutes sitting or lying awake in the day"),
    Column(name="activity_met_minutes", unit="min", low=0, high=20_000, fold="sum",
           meaning="minutes of exercise in the day, weighted by metabolic equivalents"),
    _answer("vigorous_work", 1,
            "1 if work has 10 minutes or more of vigorous activity in a typical week (PAQ605)"),
    _answer("moderate_work", 1,
            "1 if work has 10 minutes or more of moderate activity in a typical week (PAQ620)"),
    _answer("walk_or_bicycle", 1,
            "1 if the person walks or cycles 10 minutes or more to get to places in a typical "
            "week (PAQ635)"),
    _answer("vigorous_recreation", 1,
            "1 if leisure has 10 minutes or more of vigorous sports in a typical week (PAQ650)"),
    _answer("moderate_recreation", 1,
            "1 if leisure has 10 minutes or more of moderate sports in a typical week (PAQ665)"),
    _hours("walking_hours", "hours of walking in the day"),
    _hours("sports_hours", "hours of sports in the day"),
    _hours("outside_hours", "hours spent outside in the day"),
    _hours("screen_hours", "hours with screens in the day"),
    Column(name="heart_rate", unit="/min", low=20, high=250,
           meaning="mean heart rate of the day", codes=("8867-4",)),
    Column(name="resting_heart_rate", unit="/min", low=20, high=200,
           meaning="heart rate at rest", codes=("40443-4",)),
    Column(name="heart_rate_variability", unit="ms", low=0, high=500,
           meaning="standard deviation of the intervals between heart beats", codes=("80404-7",)),
    _total("phq9_total", 27, "PHQ-9 total score: depression, last two weeks", "44261-6"),
    _total("phq2_total", 6, "PHQ-2 total score: depression, last two weeks", "55758-7"),
    _total("gad7_total", 21, "GAD-7 total score: anxiety, last two weeks", "70274-6"),
    *_items("phq9", _PHQ9),
    *_items("gad7", _GAD7),
    Column(name="bdi_category", unit="{code}", low=0, high=3, whole=True, fold="last", event=True,
           lasting=True, meaning="Beck Depression Inventory: 0 none, 1 mild, 2 moderate, 3 severe"),
    Column(name="pain", unit="{score}", low=0, high=10, codes=("72514-3",), fold="mean",
           event=True, meaning="pain, 0 (none) to 10 (worst)"),
    Column(name="body_weight_kg", unit="kg", low=1, high=500, codes=("29463-7",), fold="last",
           event=True, meaning="body weight"),
    Column(name="body_mass_index", unit="kg/m2", low=5, high=150, codes=("39156-5",), fold="last",
           event=True, meaning="body mass index"),
    Column(name="arm", unit="{code}", low=0, high=9, whole=True, fold="last", event=True,
           lasting=True, meaning="arm of a trial: 0 control, 1 and up the interventions"),
    Column(name="device_class", unit="{code}", low=0, high=1, whole=True, fold="last", lasting=True,
           meaning="what measured on the day: 0 a phone alone, 1 a watch or band that is worn"),
    Column(name="age_years", unit="a", low=0, high=120, codes=("30525-0",), fold="last",
           lasting=True, meaning="age in years when recorded"),
    Column(name="age_band", unit="{code}", low=0, high=12, whole=True, fold="last", lasting=True,
           meaning="age in bands of ten years: 0 is 0 to 9, 1 is 10 to 19, and so on"),
    Column(name="sex", unit="{code}", low=0, high=2, whole=True, fold="last", lasting=True,
           meaning="0 female, 1 male, 2 other, as recorded"),
    Column(name="income_ratio", unit="1", low=0, high=5, fold="last", lasting=True,
           meaning="family income over the poverty line, 5 for 5 or more (INDFMPIR)"),
    _answer("education", 4,
            "highest level of school: 0 below 9th grade, 1 9th to 11th, 2 high school, 3 some "
            "college, 4 college degree (DMDEDUC2)"),
    _answer("partner", 1, "1 if married or living with a partner (DMDMARTL)"),
)  # fmt: skip

COLUMNS: Final[Mapping[str, Column]] = {column.name: column for column in _ALL}
#: LOINC code → column.
BY_LOINC: Final[Mapping[str, Column]] = {code: column for column in _ALL for code in column.codes}


def column(name: str) -> Column:
    """The column of that name. Raises `ImportDataError` with the nearest right one."""
    found = COLUMNS.get(name)
    if found is None:
        near = difflib.get_close_matches(name, COLUMNS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ImportDataError(
            f"There is no column {name[:64]!r} in the daily table.{hint} "
            "`havengate device columns` lists them."
        )
    return found


def known_units(column: Column) -> frozenset[str]:
    """The units that are converted into the column's own."""
    return frozenset(_FACTORS[column.unit])


def convert(column: Column, value: float, unit: str) -> float:
    """`value`, given in `unit`, in the column's own unit.

    Raises `ImportDataError`, which names the column and the unit and never the value, if the unit
    is not known for the column or the value is not finite, not whole where it must be, or out of
    the column's range.
    """
    factor = _FACTORS[column.unit].get(unit)
    if factor is None:
        known = ", ".join(sorted(_FACTORS[column.unit]))
        raise ImportDataError(
            f"{column.name} is in {column.unit}; the unit {unit[:24]!r} is not one that is "
            f"converted into it ({known})."
        )
    return check(column, value * factor)


def check(column: Column, value: float) -> float:
    """`value`, if it may stand in the column. Raises `ImportDataError` without saying it."""
    if not math.isfinite(value):
        raise ImportDataError(f"{column.name} must be a finite number.")
    if not column.low <= value <= column.high:
        raise ImportDataError(
            f"{column.name} must lie from {column.low:g} to {column.high:g} {column.unit}."
        )
    if column.whole and value != round(value):
        raise ImportDataError(f"{column.name} must be a whole number.")
    return value
