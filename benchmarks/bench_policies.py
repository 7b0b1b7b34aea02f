"""How long a decision takes, with the full built-in packs.

`policies.decision_us` is a decision that Cedar evaluates: no earlier answer is used. Requests
differ in record and time, as those of a morning do, and come from a few clinicians, so that the
parsed form of persons and kinds of records is kept (`policies.first_decision_us` is without that).
`policies.kept_decision_us` is the same with answers to equal questions kept, as the gateway runs.
Labelling is of a searchset of eight Observations.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import cedarpy

from benchmarks.harness import Result, alternate
from policies import facts
from policies.bundle import load
from policies.engine import Engine
from policies.labels import Labeller
from policies.model import Assurance, Context, Principal, Request, Resource
from policies.tables import load_tables

NOW = 1_800_000_000.0
ROUND = 600
PEER_ROUND = 40
PEER = "cedarpy, policies and entities parsed per decision"


def run() -> dict[str, Result]:
    """Measure; the peer decides the same requests with cedarpy alone, from text."""
    bundle = load()
    asked = _requests()
    text = "\n".join(rule.text for rule in bundle.rules)
    evaluated, kept = Engine(bundle, keep_answers=False), Engine(bundle)

    def peer(request: Request) -> None:
        cedarpy.is_authorized(_cedar(request), text, facts.entities(request))

    def first(request: Request) -> None:
        evaluated._prepared.clear()  # noqa: SLF001 - what a kind of request costs the first time
        evaluated.decide(request)

    for request in asked:
        evaluated.decide(request)
    ours, theirs = alternate(
        lambda: _each_us(evaluated.decide, asked, ROUND),
        lambda: _each_us(peer, asked, PEER_ROUND),
        rounds=7,
    )
    labeller = Labeller(load_tables())
    content = _searchset()
    return {
        "policies.decision_us": Result.of(ours, unit="µs", peer=PEER, peer_rounds=theirs),
        "policies.kept_decision_us": Result.of(_rounds(kept.decide, asked), unit="µs"),
        "policies.first_decision_us": Result.of(_rounds(first, asked), unit="µs"),
        "policies.label_searchset_us": Result.of(
            _rounds(lambda _: labeller.label(content, kind="ehr"), asked), unit="µs"
        ),
    }


def _rounds(call: Callable[[Request], object], asked: list[Request]) -> list[float]:
    return [_each_us(call, asked, ROUND) for _ in range(7)]


def _each_us(call: Callable[[Request], object], asked: list[Request], times: int) -> float:
    started = time.perf_counter()
    for number in range(times):
        call(asked[number % len(asked)])
    return (time.perf_counter() - started) / times * 1e6


def _requests() -> list[Request]:
    """A morning: four clinicians, records with and without labels, one in ten denied."""
    return [
        Request(
            principal=Principal(
                kind="user",
                id=f"therapist-{number % 4}",
                roles=frozenset({"clinician", "staff"}),
                assurance=Assurance(second_factor="totp", second_factor_at=NOW - 60),
                care_team=frozenset(f"p{patient}" for patient in range(9)),
            ),
            action="search" if number % 8 == 0 else "read",
            resource=Resource(
                service="ehr",
                kind="ehr",
                type=("Observation", "Condition", "Encounter")[number % 3],
                id=str(number),
                patient=f"p{number % 10}",
                labels=frozenset({"PSY"}) if number % 2 else frozenset(),
                confidentiality="R" if number % 2 else "N",
            ),
            context=Context(purpose="TREAT", now=NOW + number),
        )
        for number in range(240)
    ]


def _cedar(request: Request) -> dict[str, Any]:
    principal, resource = facts.principal_uid(request), facts.resource_uid(request)
    return {
        "principal": {"type": principal[0], "id": principal[1]},
        "action": {"type": "Action", "id": request.action},
        "resource": {"type": resource[0], "id": resource[1]},
        "context": facts.circumstances(request),
    }


def _searchset() -> dict[str, Any]:
    def observation(number: int) -> dict[str, Any]:
        return {
            "resourceType": "Observation",
            "id": str(number),
            "status": "final",
            "code": {"coding": [{"system": "http://loinc.org", "code": "44261-6"}]},
            "subject": {"reference": "Patient/1"},
            "effectiveDateTime": "2026-06-15T12:00:00Z",
            "valueQuantity": {"value": number, "system": "http://unitsofmeasure.org", "code": "1"},
        }

    entries = [{"resource": observation(number)} for number in range(8)]
    return {"resourceType": "Bundle", "type": "searchset", "total": 8, "entry": entries}
