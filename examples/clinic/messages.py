"""What goes in and out of the clinic's FHIR server, and what it says that it can do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from examples.clinic.search import PARAMETERS

TYPES = frozenset(
    {
        "AllergyIntolerance", "Appointment", "AuditEvent", "CarePlan", "CareTeam",
        "Communication", "Condition", "Consent", "Coverage", "Device",
        "DiagnosticReport", "DocumentReference", "Encounter", "Goal", "Group",
        "Immunization", "Location", "MedicationRequest", "Observation", "Organization",
        "Patient", "Practitioner", "PractitionerRole", "Procedure", "Provenance",
        "Questionnaire", "QuestionnaireResponse", "RelatedPerson", "ServiceRequest", "Task",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request below the base. Names of headers are lower case; `base` has no slash at its end."""

    method: str
    path: str
    query: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    base: str = ""
    #: The id that a transaction has already given to what is created.
    new_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer; a body is JSON."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class FHIRError(Exception):
    """Something to tell the client; `code` is of the value set issue-type."""

    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(text)
        self.status, self.code = status, code

    def reply(self) -> Reply:
        """The OperationOutcome."""
        issue = {"severity": "error", "code": self.code, "diagnostics": str(self)}
        outcome = {"resourceType": "OperationOutcome", "issue": [issue]}
        return Reply(status=self.status, body=orjson.dumps(outcome))


def metadata() -> dict[str, Any]:
    """The CapabilityStatement."""
    interactions = "read vread update patch delete history-instance history-type create search-type"
    search = [{"name": name, "type": kind} for name, (kind, _) in PARAMETERS.items()]
    resource = {
        "interaction": [{"code": code} for code in interactions.split()],
        "versioning": "versioned",
        "updateCreate": True,
        "conditionalCreate": True,
        "searchParam": search,
    }
    return {
        "resourceType": "CapabilityStatement",
        "status": "active",
        "date": "2026-11-23",
        "kind": "instance",
        "implementation": {"description": "The example clinic"},
        "fhirVersion": "4.0.1",
        "format": ["json"],
        "patchFormat": ["application/json-patch+json"],
        "rest": [
            {
                "mode": "server",
                "interaction": [{"code": "transaction"}, {"code": "batch"}],
                "resource": [{"type": kind, **resource} for kind in sorted(TYPES)],
            }
        ],
    }
