"""What is in the clinic: synthetic patients of `carebundle` (Apache-2.0), who are nobody.

Their bodies come from that package. Added here is what a mental-health clinic has beside: teams,
diagnoses of the mind, a questionnaire's score, a diary, and one each of what must be kept closest:
a psychotherapy note, a diagnosis of substance use, a consent. The same call gives the same people.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carebundle import PROFILES, generate_bundle, to_json

from examples.clinic.store import Resource, Store

_HL7 = "http://terminology.hl7.org/CodeSystem/"
_ICD = "http://hl7.org/fhir/sid/icd-10-cm"
_DIAGNOSES = (
    ("F32.1", "Major depressive disorder, single episode, moderate"),
    ("F41.1", "Generalized anxiety disorder"),
    ("F43.10", "Post-traumatic stress disorder, unspecified"),
)
_STAFF = {1: ("Mara", "Adler"), 2: ("Jonas", "Brandt"), 3: ("Inés", "Cruz"), 4: ("Noor", "Dorn")}
_DIARY = ((4, "Slept badly, cancelled lunch."), (5, "A walk helped."), (7, "Saw my sister."))
TEAMS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Where things are, as references. `teams`: who treats whom; `Practitioner/4` treats nobody."""

    patients: tuple[str, ...]
    practitioners: tuple[str, ...]
    teams: dict[str, tuple[str, ...]] = field(default_factory=dict)
    psychotherapy_note: str = "DocumentReference/note-1"
    note_author: str = "Practitioner/1"
    note_patient: str = "Patient/1"
    substance_use: str = "Condition/2-substance-use"
    substance_use_patient: str = "Patient/2"
    consent: str = "Consent/2"
    refusal: str = "Consent/5"
    refusing_patient: str = "Patient/5"


def load(database: Path, people: int = 24) -> Loaded:
    """Fill a database with `people` patients (5 or more) and say where things are."""
    with closing(Store(database)) as store, store.transaction():
        for resource in _resources(people):
            store.write(resource["resourceType"], resource["id"], resource)
        store.database.executemany(
            "INSERT OR REPLACE INTO mood VALUES (?, ?, ?, ?, ?)",
            [
                (str(person), str(day), f"2026-11-{20 + day:02}T18:00:00Z", mood, note)
                for person in range(1, people + 1)
                for day, (mood, note) in enumerate(_DIARY, start=1)
            ],
        )
    teams = {
        f"Practitioner/{number}": tuple(
            f"Patient/{person}" for person in range(1, people + 1) if number in _team(person)
        )
        for number in range(1, TEAMS + 2)
    }
    return Loaded(
        patients=tuple(f"Patient/{person}" for person in range(1, people + 1)),
        practitioners=tuple(teams),
        teams=teams,
    )


def _team(person: int) -> tuple[int, ...]:
    """Each patient has one of the first three practitioners, every sixth patient two of them."""
    first = (person - 1) % TEAMS + 1
    return (first, first % TEAMS + 1) if person % 6 == 0 else (first,)


def _resources(people: int) -> Iterator[Resource]:
    profiles = list(PROFILES)
    for person in range(1, people + 1):
        bundle = generate_bundle(
            profile=profiles[person % len(profiles)],
            seed=person,
            sex="FM"[person % 2],
            age_range=(19, 80),
            panels=(),
        )
        entries = json.loads(to_json(bundle))["entry"]
        yield from _renamed(entries, person)
        yield from _added(person)
    yield from _closest()


def _renamed(entries: list[dict[str, Any]], person: int) -> Iterator[Resource]:
    """Short ids instead of the bundle's names; practitioners are the clinic's own four."""
    places: dict[str, str] = {}
    for number, entry in enumerate(entries):
        kind = entry["resource"]["resourceType"]
        known = {"Patient": f"{person}", "Practitioner": f"{_team(person)[0]}"}
        places[entry["fullUrl"]] = f"{kind}/{known.get(kind, f'{person}-{number}')}"
    for entry in entries:
        kind, _, place = places[entry["fullUrl"]].partition("/")
        if kind == "Practitioner":
            for number in _STAFF if person == 1 else ():
                given, family = _STAFF[number]
                name = {"use": "official", "given": [given], "family": family}
                kept = {
                    k: v for k, v in entry["resource"].items() if k not in {"text", "identifier"}
                }
                yield {**kept, "id": str(number), "name": [name]}
        else:
            yield {**_referring(entry["resource"], places), "id": place}


def _referring(node: Any, places: dict[str, str]) -> Any:
    if isinstance(node, dict):
        return {key: _referring(value, places) for key, value in node.items()}
    if isinstance(node, list):
        return [_referring(item, places) for item in node]
    return places.get(node, node) if isinstance(node, str) else node


def _added(person: int) -> Iterator[Resource]:
    patient = {"reference": f"Patient/{person}"}
    code, words = _DIAGNOSES[person % len(_DIAGNOSES)]
    yield _condition(f"{person}-mind", person, code, words)
    yield {
        "resourceType": "Observation",
        "id": f"{person}-phq9",
        "status": "final",
        "category": [_concept("observation-category", "survey")],
        "code": {
            "coding": [{"system": "http://loinc.org", "code": "44261-6", "display": "PHQ-9 total"}],
            "text": "Depression questionnaire (PHQ-9), total",
        },
        "subject": patient,
        "effectiveDateTime": "2026-11-02T09:30:00Z",
        "performer": [{"reference": f"Practitioner/{_team(person)[0]}"}],
        "valueQuantity": {"value": 4 + person % 20, "unit": "points"},
    }
    yield {
        "resourceType": "CareTeam",
        "id": str(person),
        "status": "active",
        "subject": patient,
        "period": {"start": "2026-01-01"},
        "participant": [
            {"member": {"reference": f"Practitioner/{number}"}} for number in _team(person)
        ],
    }


def _closest() -> Iterator[Resource]:
    """What few may see, and a team that is over: of Practitioner/4, for Patient/1."""
    yield {
        "resourceType": "DocumentReference",
        "id": "note-1",
        "meta": {"security": [{"system": _HL7 + "v3-ActCode", "code": "PSYTHPN"}]},
        "status": "current",
        "type": {"text": "Psychotherapy note"},
        "subject": {"reference": "Patient/1"},
        "date": "2026-11-16T15:00:00Z",
        "author": [{"reference": "Practitioner/1"}],
        "description": "Session 7: spoke of the brother's death for the first time.",
        "content": [{"attachment": {"contentType": "text/plain", "data": "U2Vzc2lvbiA3Lg=="}}],
    }
    yield _condition("2-substance-use", 2, "F10.20", "Alcohol dependence, uncomplicated")
    sud = {"system": _HL7 + "v3-ActCode", "code": "42CFRPart2"}
    treatment = {"system": _HL7 + "v3-ActReason", "code": "TREAT"}
    yield _consent(2, {"type": "permit", "securityLabel": [sud], "purpose": [treatment]})
    actor = {
        "role": _concept("v3-ParticipationType", "PRCP"),
        "reference": {"reference": "Practitioner/2"},
    }
    yield _consent(5, {"type": "deny", "actor": [actor]})
    yield {
        "resourceType": "CareTeam",
        "id": "1-former",
        "status": "inactive",
        "subject": {"reference": "Patient/1"},
        "period": {"start": "2025-01-01", "end": "2025-06-30"},
        "participant": [{"member": {"reference": "Practitioner/4"}}],
    }


def _condition(name: str, person: int, code: str, words: str) -> Resource:
    return {
        "resourceType": "Condition",
        "id": name,
        "clinicalStatus": _concept("condition-clinical", "active"),
        "category": [_concept("condition-category", "problem-list-item")],
        "code": {"coding": [{"system": _ICD, "code": code, "display": words}], "text": words},
        "subject": {"reference": f"Patient/{person}"},
        "recordedDate": "2026-10-05",
    }


def _consent(person: int, provision: dict[str, Any]) -> Resource:
    return {
        "resourceType": "Consent",
        "id": str(person),
        "status": "active",
        "scope": _concept("consentscope", "patient-privacy"),
        "category": [{"coding": [{"system": "http://loinc.org", "code": "59284-0"}]}],
        "patient": {"reference": f"Patient/{person}"},
        "dateTime": "2026-09-01",
        "policyRule": _concept("v3-ActCode", "OPTIN"),
        "provision": provision,
    }


def _concept(system: str, code: str) -> Resource:
    return {"coding": [{"system": _HL7 + system, "code": code}]}
