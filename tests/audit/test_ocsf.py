"""OCSF: every class has what its schema requires, and time is in milliseconds."""

from __future__ import annotations

import json
from typing import Any

import pytest

from audit.export.ocsf import API_ACTIVITY, AUTHENTICATION, ENTITY_MANAGEMENT, OCSF
from audit.model import ACTIONS, Actor, Entry
from audit.search import ERASED, Exchange, Names
from tests.audit.records import SEALED, START_US, make_entry

#: Required by schema.ocsf.io 1.3.0: of the base event, then of each class.
BASE = {
    "activity_id", "category_uid", "class_uid", "metadata", "severity_id", "time", "type_uid",
}  # fmt: skip
OF_CLASS = {
    API_ACTIVITY: {"actor", "api", "src_endpoint"},
    AUTHENTICATION: {"user", "service"},
    ENTITY_MANAGEMENT: {"entity"},
}


def event(entry: Entry, names: Names | None = None) -> dict[str, Any]:
    (line,) = OCSF().rows(Exchange.of([(9, entry)]), names, "clinic.example/log")
    assert line.endswith(b"\n")
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_every_action_has_what_its_class_requires(action: str) -> None:
    found = event(make_entry("outcome", action=action, client=SEALED, duration_us=1500))
    required = BASE | OF_CLASS[found["class_uid"]]
    assert required <= found.keys()
    assert found["category_uid"] == found["class_uid"] // 1000
    assert found["type_uid"] == found["class_uid"] * 100 + found["activity_id"]
    assert found["time"] == START_US // 1000
    assert found["duration"] == 1
    assert found["metadata"]["version"] == "1.3.0"
    assert found["metadata"]["product"]["vendor_name"]
    assert found["actor"]["user"]["uid"] == SEALED
    # An endpoint has at least one of these, and a sealed address is no IP address.
    assert found["src_endpoint"].keys() & {"ip", "uid", "name", "hostname"}
    assert "ip" not in found["src_endpoint"]


@pytest.mark.parametrize(
    ("entry", "status", "severity"),
    [
        (make_entry("outcome"), 1, 1),
        (make_entry("outcome", outcome="denied", decision="deny"), 2, 3),
        (make_entry("outcome", outcome="failed"), 2, 3),
        (make_entry("outcome", break_glass="danger"), 1, 4),
        (make_entry("intent"), 0, 3),
        (make_entry("message", decision="deny", sequence=1), 2, 3),
    ],
)
def test_status_and_severity_say_what_happened(entry: Entry, status: int, severity: int) -> None:
    found = event(entry)
    assert (found["status_id"], found["severity_id"]) == (status, severity)


def test_crud_and_sign_in_have_their_activities() -> None:
    wanted = {
        "create": 600301, "read": 600302, "search": 600302, "update": 600303, "patch": 600303,
        "delete": 600304, "execute": 600399, "login": 300201, "logout": 300202,
        "keys.epoch.roll": 300401, "keys.person.erase": 300404, "log.prune": 300404,
    }  # fmt: skip
    for action, type_uid in wanted.items():
        assert event(make_entry("outcome", action=action))["type_uid"] == type_uid


def test_opened_names_take_the_place_of_sealed_ones() -> None:
    entry = make_entry("outcome", client=SEALED)
    names = Names(actor="Practitioner/ada", client="192.0.2.7", patients=("Patient/bob",))
    found = event(entry, names)
    assert found["actor"]["user"]["uid"] == "Practitioner/ada"
    assert found["src_endpoint"] == {"ip": "192.0.2.7"}
    assert found["unmapped"]["patients"] == ["Patient/bob"]
    erased = event(entry, Names(actor=ERASED, client=ERASED, patients=(ERASED,)))
    assert erased["src_endpoint"] == {"uid": ERASED}
    assert SEALED not in json.dumps(erased)


def test_others_than_persons_are_named() -> None:
    actor = Actor(kind="service", name="ehr-sync")
    found = event(make_entry("outcome", actor=actor, client="192.0.2.1"))
    assert found["actor"]["user"]["uid"] == "ehr-sync"
    assert found["src_endpoint"] == {"ip": "192.0.2.1"}
    assert event(make_entry("outcome", actor=Actor(kind="anonymous")))["src_endpoint"]
