"""Small exports as the programs write them, made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

APPLE_DTD = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE HealthData [
<!ELEMENT HealthData (ExportDate,Me,(Record|Workout)*)>
<!ATTLIST HealthData locale CDATA #REQUIRED>
<!ELEMENT Record ((MetadataEntry|HeartRateVariabilityMetadataList)*)>
]>
"""


def apple_record(kind: str, value: str, unit: str, start: str, end: str, source: str) -> str:
    unit_part = f' unit="{unit}"' if unit else ""
    return (
        f'<Record type="{kind}" sourceName="{source}"{unit_part} creationDate="{end}" '
        f'startDate="{start}" endDate="{end}" value="{value}"/>\n'
    )


APPLE = (
    APPLE_DTD
    + '<HealthData locale="en_US">\n <ExportDate value="2024-02-01 08:00:00 -0500"/>\n'
    + "".join(
        apple_record(
            f"HKQuantityTypeIdentifier{kind}", value, unit,
            f"2024-01-02 {start}:00 -0500", f"2024-01-02 {end}:00 -0500", source,
        )
        for kind, value, unit, start, end, source in [
            ("StepCount", "100", "count", "08:00", "08:10", "Watch"),
            ("StepCount", "250", "count", "23:50", "23:59", "Watch"),
            ("StepCount", "300", "count", "08:00", "09:00", "Phone"),
            ("HeartRate", "60", "count/min", "08:00", "08:00", "Watch"),
            ("HeartRate", "80", "count/min", "09:00", "09:00", "Watch"),
            ("DistanceWalkingRunning", "1", "mi", "08:00", "09:00", "Phone"),
            ("DietaryCaffeine", "1", "mg", "08:00", "08:00", "Phone"),
        ]
    )
    + "".join(
        apple_record(
            "HKCategoryTypeIdentifierSleepAnalysis", f"HKCategoryValueSleepAnalysis{value}", "",
            start, end, "Watch",
        )
        for value, start, end in [
            ("InBed", "2024-01-01 22:30:00 -0500", "2024-01-02 06:30:00 -0500"),
            ("AsleepCore", "2024-01-01 23:00:00 -0500", "2024-01-02 03:00:00 -0500"),
            ("AsleepREM", "2024-01-02 03:00:00 -0500", "2024-01-02 06:00:00 -0500"),
            ("Awake", "2024-01-02 06:00:00 -0500", "2024-01-02 06:30:00 -0500"),
        ]
    )
    + "</HealthData>\n"
)  # fmt: skip

FITBIT: dict[str, Any] = {
    "sleep-2024-01-01.json": [
        {
            "logId": 1, "dateOfSleep": "2024-01-02", "startTime": "2024-01-01T23:10:30.000",
            "endTime": "2024-01-02T07:10:30.000", "duration": 28_800_000, "minutesAsleep": 420,
            "minutesAwake": 60, "timeInBed": 480, "efficiency": 93, "mainSleep": True,
        },
        {
            "logId": 2, "dateOfSleep": "2024-01-02", "startTime": "2024-01-02T14:00:00.000",
            "endTime": "2024-01-02T14:30:00.000", "duration": 1_800_000, "minutesAsleep": 30,
            "minutesAwake": 0, "timeInBed": 30, "efficiency": 99, "mainSleep": False,
        },
    ],
    # 04:30 in UTC is still the day before in New York.
    "steps-2024-01-01.json": [
        {"dateTime": "01/02/24 04:30:00", "value": "40"},
        {"dateTime": "01/02/24 15:00:00", "value": "500"},
        {"dateTime": "01/02/24 16:00:00", "value": "700"},
    ],
    "heart_rate-2024-01-02.json": [
        {"dateTime": "01/02/24 15:00:00", "value": {"bpm": 60, "confidence": 3}},
        {"dateTime": "01/02/24 15:00:05", "value": {"bpm": 70, "confidence": 2}},
        {"dateTime": "01/02/24 15:00:10", "value": {"bpm": 70, "confidence": 0}},
    ],
    "resting_heart_rate-2024-01-02.json": [
        {
            "dateTime": "01/02/24 00:00:00",
            "value": {"date": "01/02/24", "value": 58.5, "error": 6.0},
        },
        {"dateTime": "01/03/24 00:00:00", "value": {"date": None, "value": 0.0, "error": 0.0}},
    ],
    "moderately_active_minutes-2024-01-02.json": [{"dateTime": "01/02/24 00:00:00", "value": "20"}],
    "very_active_minutes-2024-01-02.json": [{"dateTime": "01/02/24 00:00:00", "value": "15"}],
}  # fmt: skip


def write_fitbit(folder: Path) -> Path:
    inside = folder / "Takeout" / "Fitbit" / "Global Export Data"
    inside.mkdir(parents=True)
    for name, content in FITBIT.items():
        (inside / name).write_text(json.dumps(content))
    (inside / "badge.json").write_text("[]")
    return folder


def open_mhealth_point(schema: str, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "header": {
            "id": "4efb0d16", "creation_date_time": "2024-01-02T08:00:00-05:00",
            "schema_id": {"namespace": "omh", "name": schema, "version": "2.0"},
            "acquisition_provenance": {"source_name": "RunKeeper"},
        },
        "body": body,
    }  # fmt: skip


OPEN_MHEALTH = [
    open_mhealth_point(
        "step-count",
        {
            "step_count": {"value": 6000, "unit": "steps"},
            "effective_time_frame": {
                "time_interval": {
                    "start_date_time": "2024-01-02T00:00:00-05:00",
                    "duration": {"value": 1, "unit": "d"},
                }
            },
        },
    ),
    open_mhealth_point(
        "sleep-duration",
        {
            "sleep_duration": {"value": 415, "unit": "min"},
            "effective_time_frame": {
                "time_interval": {
                    "start_date_time": "2024-01-01T23:00:00-05:00",
                    "end_date_time": "2024-01-02T06:00:00-05:00",
                }
            },
        },
    ),
    open_mhealth_point(
        "heart-rate",
        {
            "heart_rate": {"value": 50, "unit": "beats/min"},
            "effective_time_frame": {"date_time": "2024-01-02T07:25:00-05:00"},
            "temporal_relationship_to_physical_activity": "at rest",
        },
    ),
    open_mhealth_point("blood-glucose", {"blood_glucose": {"value": 5, "unit": "mmol/L"}}),
]

PHQ9_CODES = [
    "44250-9", "44255-8", "44259-0", "44254-1", "44251-7", "44258-2", "44252-5", "44253-3",
    "44260-8",
]  # fmt: skip
_ANSWER_CODES = ["LA6568-5", "LA6569-3", "LA6570-1", "LA6571-9"]


def observation(code: str, **more: Any) -> dict[str, Any]:
    return {
        "resourceType": "Observation",
        "status": "final",
        "code": {"coding": [{"system": "http://loinc.org", "code": code}]},
        "subject": {"reference": "Patient/7"},
        "effectiveDateTime": "2024-01-02T09:30:00-05:00",
        **more,
    }


def phq9(answers: list[int], total: int | None = None) -> dict[str, Any]:
    items: list[dict[str, Any]] = [
        {
            "linkId": f"/{code}",
            "answer": [
                {"valueCoding": {"system": "http://loinc.org", "code": _ANSWER_CODES[answer]}}
            ],
        }
        for code, answer in zip(PHQ9_CODES, answers, strict=True)
    ]
    if total is not None:
        items.append({"linkId": "/44261-6", "answer": [{"valueDecimal": total}]})
    return {
        "resourceType": "QuestionnaireResponse",
        "status": "completed",
        "questionnaire": "http://loinc.org/q/44249-1",
        "subject": {"reference": "Patient/7"},
        "authored": "2024-01-02T10:00:00-05:00",
        "item": [{"linkId": "/44249-1", "item": items}],
    }
