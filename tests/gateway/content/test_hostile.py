"""What two readers could take for two requests, and writes of those who do not see everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.content import bodies
from gateway.content.handler import ContentHandler
from gateway.core.enforcement import RefusedError
from gateway.errors import (
    BadRequestError,
    GatewayConfigurationError,
    UnsupportedError,
)
from gateway.settings import RuleSettings
from policies.settings import PoliciesSettings
from policies.store import InForce, load_in_force
from tests.gateway.content import script
from tests.gateway.content.script import World, answer, patient, route, run, someone
from tests.gateway.content.test_handler import SEALED, SITE, Store, mood

WRITTEN = RuleSettings(
    path="/diary", type="Mood", request_patient="?patient_id", methods=("GET", "POST")
)
FORMS = RuleSettings(path="/p/{patient}/moods", type="Mood", methods=("POST",))


# --- Two readers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Patient", "PATIENT", "patient ", "pAtient"])
@pytest.mark.parametrize(
    ("method", "target", "content"),
    [
        ("POST", "/moods", {"patient": "1", "mood": 5}),
        ("PATCH", "/moods/5", {"mood": 5}),
        ("PUT", "/moods/5", {"patient": "1"}),
    ],
)
def test_a_member_that_some_app_would_take_for_the_patient_is_refused(
    method: str, target: str, content: dict[str, Any], name: str
) -> None:
    world = World(app=Store(**{"5": mood("1")}))
    with pytest.raises(BadRequestError, match="spelling"):
        run(SITE, world, patient("1"), method, target, {**content, name: "2"})
    assert world.sent == []


def test_a_protected_member_in_another_spelling_never_reaches_the_app_in_the_clear() -> None:
    for planted in ({"Note": "secret"}, {"NOTE_INDEX": "hgi1.x"}, {"TAGS": ["secret"]}):
        world = World(app=Store())
        with pytest.raises(BadRequestError, match="spelling"):
            run(SEALED, world, patient("1"), "POST", "/moods", {"patient": "1", **planted})
        assert world.sent == []


def test_a_list_of_changes_is_no_patch_whatever_it_is_called() -> None:
    store = Store(**{"5": mood("1")})
    world = World(app=store)
    change = [{"op": "replace", "path": "/patient", "value": "2"}]
    with pytest.raises(UnsupportedError):
        run(SITE, world, patient("1"), "PATCH", "/moods/5", change)
    assert world.sent == []


@pytest.mark.parametrize(
    "query",
    ["patient_id=1&patient.id=2", "patient_id=1&patient%20id=2", "patient_id=1&patient+id=2",
     "patient_id=1&patient%5Bid=2", "patient_id=1&patientId=2", "patient.id=2",
     "patient_id=1&%EF%BD%90atient_id=2", "patient_id=1&patient_id%00=2"],
)  # fmt: skip
def test_the_patient_in_the_query_has_no_second_spelling(query: str) -> None:
    world = World(app=lambda *_: answer(mood("1")))
    with pytest.raises(BadRequestError):
        run(route(WRITTEN), world, patient("1"), "GET", f"/diary?{query}")
    assert world.sent == []


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        ({"patient_id": "2"}, {}),
        (b"patient_id=2", {"content_type": "application/x-www-form-urlencoded"}),
        (b"--x\r\n", {"content_type": "multipart/form-data; boundary=x"}),
    ],
)
def test_a_body_cannot_say_otherwise_than_the_query_whose_it_is(
    content: Any, headers: dict[str, str]
) -> None:
    world = World(app=lambda *_: answer(None, 201))
    who = patient("1")
    with pytest.raises((RefusedError, BadRequestError)):
        run(route(WRITTEN), world, who, "POST", "/diary?patient_id=1", content, **headers)
    assert world.sent == []
    run(route(WRITTEN), world, who, "POST", "/diary?patient_id=1", {"mood": 1})
    assert len(world.sent) == 1


@pytest.mark.parametrize("query", ["patient=2", "PATIENT=1", "patient%5B%5D=1"])
def test_a_query_cannot_say_otherwise_than_the_body_whose_it_is(query: str) -> None:
    for method, target in (("POST", "/moods"), ("PUT", "/moods/5"), ("DELETE", "/moods/5")):
        world = World(app=Store(**{"5": mood("1")}))
        with pytest.raises((RefusedError, BadRequestError)):
            run(SITE, world, patient("1"), method, f"{target}?{query}", mood("1"))
        assert all(head.method == "GET" for head, _ in world.sent)


@pytest.mark.parametrize(
    "form",
    [b"a=1&_method=DELETE", b"%5Fmethod=DELETE",
     b'--x\r\ncontent-disposition: form-data; name="_method"\r\n\r\nDELETE\r\n--x--'],
)  # fmt: skip
def test_a_form_names_no_other_method(form: bytes) -> None:
    world = World(app=lambda *_: answer(None, 204))
    kind = "multipart/form-data; boundary=x" if form.startswith(b"--") else (
        "application/x-www-form-urlencoded"
    )  # fmt: skip
    with pytest.raises(BadRequestError, match="method itself"):
        run(route(FORMS), world, patient("1"), "POST", "/p/1/moods", form, content_type=kind)
    with pytest.raises(BadRequestError, match="method itself"):
        run(route(FORMS), world, patient("1"), "POST", "/p/1/moods", {"_method": "DELETE"})
    assert world.sent == []


@pytest.mark.parametrize("number", [b"1e400", b"-1e999", b"NaN", b"Infinity"])
def test_a_number_that_nobody_can_write_down_is_refused(number: bytes) -> None:
    with pytest.raises(ValueError, match=r"JSON|out of range"):
        bodies.parse_json(b'{"a":' + number + b"}")


def test_a_long_query_is_no_mistake_of_ours() -> None:
    world = World(app=lambda *_: answer({"items": []}))
    world.app = lambda *_: answer({"items": [mood("1")]})
    run(SEALED, world, patient("1"), "GET", "/moods?" + "&".join(["a=1"] * 500))
    with pytest.raises(BadRequestError):
        run(SEALED, world, patient("1"), "GET", "/moods?" + "&".join(["a=1"] * 1_001))


# --- Rules that an operator could mean otherwise --------------------------------------------------


@pytest.mark.parametrize(
    ("method", "action"),
    [("PUT", "read"), ("PATCH", "search"), ("DELETE", "read"), ("DELETE", "create"),
     ("DELETE", "update"), ("PUT", "count")],
)  # fmt: skip
def test_who_may_only_read_changes_nothing_by_a_rule_that_calls_it_reading(
    method: str, action: Any
) -> None:
    rule = RuleSettings(
        path="/m/{id}", type="Mood", patient="/p", methods=("GET", method), action=action
    )
    with pytest.raises(GatewayConfigurationError, match="a rule of its own"):
        ContentHandler(route(rule))


def test_who_wrote_a_record_is_told_by_the_record_and_not_by_the_path() -> None:
    rule = RuleSettings(path="/by/{author}/{id}", type="Note", patient="/patient", author="/by")
    note = mood("1", by="Practitioner/8", meta={"security": [{"code": "PSYTHPN"}]})
    who = someone("clinician", references=frozenset({"me"}))
    world = World(app=lambda *_: answer(note), team=frozenset({"1"}))
    with pytest.raises(RefusedError):
        run(route(rule, kind="ehr"), world, who, "GET", "/by/me/5")
    world.app = lambda *_: answer(note | {"by": "me"})
    assert run(route(rule, kind="ehr"), world, who, "GET", "/by/me/5").head.status == 200


# --- Who does not see all of it -------------------------------------------------------------------

PARTLY = """
@id("own.read")
@title("Reading hides the note")
@cites("a test")
@obligation_redact("Chart.note")
permit (principal is User in Role::"clinician", action == Action::"read",
  resource is Record in ServiceKind::"mood");
@id("own.change")
@title("Changing says nothing about the note")
@cites("a test")
permit (principal is User in Role::"clinician",
  action in [Action::"create", Action::"update", Action::"patch", Action::"delete"],
  resource is Record in ServiceKind::"mood");
"""


@pytest.fixture
def partly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InForce:
    (tmp_path / "own.cedar").write_text(PARTLY)
    rules = load_in_force(PoliciesSettings(directory=str(tmp_path)))
    monkeypatch.setattr(script, "in_force", lambda: rules)
    return rules


CHART = RuleSettings(
    path="/moods/{id}", type="Chart", patient="/patient", methods=("PUT", "PATCH", "DELETE")
)
SHEET = RuleSettings(path="/p/{patient}/sheet", type="Chart", methods=("PUT", "PATCH"))


@pytest.mark.usefixtures("partly")
@pytest.mark.parametrize("method", ["PUT", "PATCH"])
@pytest.mark.parametrize(("rule", "target"), [(CHART, "/moods/5"), (SHEET, "/p/1/sheet")])
def test_who_does_not_see_all_of_a_record_does_not_write_over_it(
    method: str, rule: RuleSettings, target: str
) -> None:
    store = Store(**{"5": mood("1")})
    world = World(app=store, team=frozenset({"1"}))
    with pytest.raises(UnsupportedError, match="do not see all"):
        run(route(rule), world, someone("clinician"), method, target, {"patient": "1"})
    assert all(head.method == "GET" for head, _ in world.sent)
    assert store.records == {"5": mood("1")}


@pytest.mark.usefixtures("partly")
def test_what_is_not_there_yet_can_be_put_by_who_does_not_see_all_of_such() -> None:
    store = Store()
    world = World(app=store, team=frozenset({"1"}))
    run(route(CHART), world, someone("clinician"), "PUT", "/moods/5", mood("1"))
    assert store.records == {"5": mood("1")}


def test_what_is_masked_for_everybody_is_not_lost_by_replacing_the_record() -> None:
    store = Store(**{"5": mood("1", device="x7")})
    with pytest.raises(UnsupportedError, match="PATCH"):
        run(SEALED, World(app=store), patient("1"), "PUT", "/moods/5", mood("1"))
    assert store.records["5"]["device"] == "x7"
    run(SEALED, World(app=store), patient("1"), "PATCH", "/moods/5", {"mood": 2})


def test_a_value_that_is_taken_away_is_no_longer_found() -> None:
    store = Store(**{"5": mood("1")})
    run(SEALED, World(app=store), patient("1"), "PATCH", "/moods/5", {"note": None})
    assert store.records["5"] == {"note": None, "note_index": None}


# --- Pseudonyms -----------------------------------------------------------------------------------


def test_the_pseudonym_of_a_patient_goes_with_his_own_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.cedar").write_text(
        PARTLY.replace("_redact", "_pseudonymise").replace("Chart.note", "Chart.patient, Chart.by")
    )
    rules = load_in_force(PoliciesSettings(directory=str(tmp_path)))
    monkeypatch.setattr(script, "in_force", lambda: rules)
    rule = RuleSettings(path="/moods/{id}", type="Chart", patient="/patient")
    for whose in ("1", "Patient/1"):
        world = World(app=lambda *_: answer(mood(whose, by="ann")), team=frozenset({"1"}))  # noqa: B023
        seen = json.loads(run(route(rule), world, someone("clinician"), "GET", "/moods/5").body)
        assert seen["patient"] == "pseudonym-TREAT-Patient-1"
        assert seen["by"] == "pseudonym-TREAT-Chart.by-3"
