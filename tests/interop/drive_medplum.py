"""What a FHIR client does with a server, written without knowing whether a gateway is between."""

from __future__ import annotations

import json
import ssl
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fhir.resources.R4B import get_fhir_model_class

from tests.interop.processes import Answered, get

#: What `drive` sees at a server that does what FHIR R4 says.
EXPECTED = (
    ("create", 201, "Patient"),
    ("read", 200, "Patient"),
    ("search by family", 200, "1 Patient"),
    ("search by POST", 200, "1 Patient"),
    ("create", 201, "Observation"),
    ("search with include", 200, "1 Observation, 1 Patient"),
    ("update", 200, "Patient"),
    ("read again", 200, "gender other"),
    ("update of an older version", 412, "OperationOutcome"),
    ("patch", 200, "Patient"),
    ("history", 200, "3 Patient"),
    ("transaction", 200, "201, 201"),
    ("search by chain", 200, "1 Observation"),
    ("delete", 200, "done"),
    ("read what was deleted", 404, "gone"),
)

Seen = tuple[str, int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Client:
    base: str
    headers: Mapping[str, str] = field(repr=False)
    trust: ssl.SSLContext | None

    def __call__(
        self, method: str, path: str, body: Any = None, kind: str = "application/fhir+json",
        **headers: str,
    ) -> tuple[Answered, Any]:  # fmt: skip
        """Send one request; whatever comes back has to be valid FHIR."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {"accept": "application/fhir+json", **self.headers, **headers}
        sent |= {"content-type": kind} if data is not None else {}
        url = f"{self.base}/{path}" if path else self.base
        answered = get(url, method=method, body=data, headers=sent, trust=self.trust)
        found = json.loads(answered.body) if answered.body else {}
        if found:
            get_fhir_model_class(found["resourceType"]).model_validate(found)
        return answered, found


def drive(
    base_url: str, headers: Mapping[str, str] = {}, trust: ssl.SSLContext | None = None
) -> list[Seen]:
    """Create, read, search, change and delete below `base_url`; return what was seen, in order.

    Every call works with new people, so that it can be repeated at the same server.
    """
    call = _Client(base=base_url, headers=headers, trust=trust)
    seen: list[Seen] = []

    def note(step: str, answered: Answered, what: str) -> None:
        seen.append((step, answered.status, what))

    family, number = f"Roth-{uuid.uuid4().hex}", uuid.uuid4().hex
    answered, patient = call("POST", "Patient", _patient(family, number))
    note("create", answered, patient["resourceType"])
    place = f"Patient/{patient['id']}"
    answered, read = call("GET", place)
    note("read", answered, read["resourceType"] if read["name"] == patient["name"] else "changed")
    answered, found = call("GET", f"Patient?family={family}")
    note("search by family", answered, _kinds(found))
    form = f"identifier=urn:example|{number}".encode()
    answered, found = call("POST", "Patient/_search", form, "application/x-www-form-urlencoded")
    note("search by POST", answered, _kinds(found))
    answered, observation = call("POST", "Observation", _observation(place))
    note("create", answered, observation["resourceType"])
    answered, found = call("GET", f"Observation?subject={place}&_include=Observation:subject")
    note("search with include", answered, _kinds(found))
    _change(call, note, place, read)
    _together(call, note)
    # Servers may choose: 200 or 204, and 404 or 410 (FHIR R4, sections 3.1.0.7 and 3.1.0.1).
    answered, _ = call("DELETE", f"Observation/{observation['id']}")
    seen.append(("delete", 200, "done") if answered.status in {200, 204} else ("delete", 0, ""))
    answered, _ = call("GET", f"Observation/{observation['id']}")
    gone = answered.status in {404, 410}
    seen.append(("read what was deleted", 404, "gone" if gone else "there"))
    return seen


def _change(call: _Client, note: Any, place: str, read: dict[str, Any]) -> None:
    version = f'W/"{read["meta"]["versionId"]}"'
    answered, found = call("PUT", place, {**read, "gender": "other"}, **{"if-match": version})
    note("update", answered, found["resourceType"])
    answered, found = call("GET", place)
    note("read again", answered, f"gender {found.get('gender')}")
    answered, found = call("PUT", place, {**read, "gender": "male"}, **{"if-match": version})
    note("update of an older version", answered, found["resourceType"])
    patch = [{"op": "replace", "path": "/gender", "value": "female"}]
    answered, found = call("PATCH", place, patch, "application/json-patch+json")
    note("patch", answered, found["resourceType"])
    answered, found = call("GET", f"{place}/_history")
    note("history", answered, _kinds(found))


def _together(call: _Client, note: Any) -> None:
    name, family = f"urn:uuid:{uuid.uuid4()}", f"Klein-{uuid.uuid4().hex}"
    bundle = {
        "resourceType": "Bundle",
        "type": "transaction",
        "entry": [
            {
                "fullUrl": name,
                "resource": _patient(family, uuid.uuid4().hex),
                "request": {"method": "POST", "url": "Patient"},
            },
            {
                "fullUrl": f"urn:uuid:{uuid.uuid4()}",
                "resource": _observation(name),
                "request": {"method": "POST", "url": "Observation"},
            },
        ],
    }
    answered, found = call("POST", "", bundle)
    note("transaction", answered, ", ".join(e["response"]["status"][:3] for e in found["entry"]))
    answered, found = call("GET", f"Observation?subject:Patient.family={family}")
    note("search by chain", answered, _kinds(found))


def _patient(family: str, number: str) -> dict[str, Any]:
    return {
        "resourceType": "Patient",
        "identifier": [{"system": "urn:example", "value": number}],
        "name": [{"family": family, "given": ["Ada"]}],
        "birthDate": "1980-02-29",
    }


def _observation(subject: str) -> dict[str, Any]:
    return {
        "resourceType": "Observation",
        "status": "final",
        "code": {"coding": [{"system": "http://loinc.org", "code": "8867-4"}]},
        "subject": {"reference": subject},
        "effectiveDateTime": "2026-11-02T09:30:00Z",
        "valueQuantity": {"value": 61, "unit": "beats/minute"},
    }


def _kinds(bundle: dict[str, Any]) -> str:
    kinds = [entry["resource"]["resourceType"] for entry in bundle.get("entry", [])]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
