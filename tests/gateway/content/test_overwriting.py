"""An id in a body is no way around the record that it names."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from gateway.core.commands import Fetched
from gateway.core.enforcement import RefusedError
from gateway.core.messages import RequestHead
from gateway.errors import BadRequestError, UnsupportedError
from gateway.settings import RuleSettings
from policies.consent import parse_consent
from tests.gateway.content.script import World, answer, patient, route, run, someone

ONE = RuleSettings(path="/moods/{id}", type="Mood", patient="/patient", id="/nr")
ADD = RuleSettings(
    path="/moods", type="Mood", patient="/patient", request_patient="/patient", id="/nr",
    methods=("POST",),
)  # fmt: skip
CHANGE = RuleSettings(
    path="/moods/{id}", type="Mood", patient="/patient", id="/nr", methods=("PUT", "PATCH")
)
SITE = route(ONE, ADD, CHANGE)
#: The same without a word on where the id stands.
USUAL = route(*(RuleSettings(**_ | {"id": ""}) for _ in (
    {"path": "/moods/{id}", "type": "Mood", "patient": "/patient"},
    {"path": "/moods", "type": "Mood", "patient": "/patient", "request_patient": "/patient",
     "methods": ("POST",)},
    {"path": "/moods/{id}", "type": "Mood", "patient": "/patient", "methods": ("PUT", "PATCH")},
)))  # fmt: skip


class Upserting:
    """An app that takes a POST with the id of a record for a change of it, and so for a PUT."""

    def __init__(self, key: str = "nr", /, **records: Any) -> None:
        self.key = key
        self.records = records

    def __call__(self, head: RequestHead, body: bytes) -> Fetched:
        if head.method == "GET":
            name = head.path.rpartition("/")[2]
            found = self.records.get(name)
            return answer(status=404) if found is None else answer(found)
        content = json.loads(body)
        name = str(content.get(self.key) or head.path.rpartition("/")[2])
        self.records[name] = content
        return answer(content, status=201)


def mood(whose: str = "1", **more: Any) -> dict[str, Any]:
    return {"patient": whose, "mood": 5, **more}


@pytest.mark.parametrize("number", ["5", 5])
def test_a_post_does_not_overwrite_a_record_of_somebody_else(number: str | int) -> None:
    app = Upserting(**{"5": mood("2")})
    world = World(app=app)
    with pytest.raises(RefusedError) as refused:
        run(SITE, world, patient("1"), "POST", "/moods", mood("1", nr=number))
    assert refused.value.hide
    assert app.records == {"5": mood("2")}
    assert world.log == ["GET /moods/5"]


def test_a_post_with_a_new_id_makes_a_record_and_one_with_an_own_id_changes_it() -> None:
    app = Upserting(**{"5": mood("1")})
    run(SITE, World(app=app), patient("1"), "POST", "/moods", mood("1", nr="6"))
    run(SITE, World(app=app), patient("1"), "POST", "/moods", mood("1", nr="5", mood=1))
    assert app.records == {"5": mood("1", nr="5", mood=1), "6": mood("1", nr="6")}


def test_who_may_make_records_but_not_change_them_does_not_change_one_by_a_post() -> None:
    wearable = route(ONE, ADD, kind="wearable")
    app = Upserting(**{"5": mood("1")})
    who = someone()
    principal = replace(
        who.principal,
        kind="service",
        roles=frozenset({"app"}),
        purposes=frozenset({"TREAT"}),
        scopes=frozenset({"system/Mood.crs"}),
    )
    program = replace(who, means="service", principal=principal)
    run(wearable, World(app=app), program, "POST", "/moods", mood("1", nr="6"))
    assert app.records["6"] == mood("1", nr="6")
    with pytest.raises(RefusedError):
        run(wearable, World(app=app), program, "POST", "/moods", mood("1", nr="5", mood=3))
    assert app.records["5"] == mood("1")


def test_what_a_record_would_become_is_asked_about_as_a_change_too() -> None:
    refusal = parse_consent({
        "resourceType": "Consent", "id": "9", "status": "active",
        "scope": {"coding": [{"code": "patient-privacy"}]},
        "patient": {"reference": "Patient/2"}, "provision": {"type": "deny"},
    })  # fmt: skip
    ehr = route(ONE, ADD, kind="ehr")
    clinician = someone("clinician")
    app = Upserting(**{"5": mood("1")})
    world = World(app=app, team=frozenset({"1", "2"}), consents={"2": (refusal,)})
    run(ehr, world, clinician, "POST", "/moods", mood("2", nr="6"))
    world = replace(world, trail=None)
    with pytest.raises(RefusedError):
        run(ehr, world, clinician, "POST", "/moods", mood("2", nr="5"))
    assert app.records["5"] == mood("1")


@pytest.mark.parametrize("key", ["id", "_id", "uuid", "guid", "pk"])
def test_what_apps_usually_call_an_id_counts_where_no_rule_says_it(key: str) -> None:
    app = Upserting(key, **{"5": mood("2")})
    with pytest.raises(RefusedError):
        run(USUAL, World(app=app), patient("1"), "POST", "/moods", mood("1", **{key: "5"}))
    for odd in (key.upper(), f"{key} "):
        with pytest.raises(UnsupportedError):
            run(USUAL, World(app=app), patient("1"), "POST", "/moods", mood("1", **{odd: "5"}))
    assert app.records == {"5": mood("2")}
    run(USUAL, World(app=app), patient("1"), "POST", "/moods", mood("1", **{key: None}))


@pytest.mark.parametrize("value", [{"a": 1}, ["5"], True, 1.5, "", "x" * 300])
def test_an_id_that_is_none_is_refused(value: Any) -> None:
    world = World(app=Upserting(**{"5": mood("2")}))
    with pytest.raises(BadRequestError):
        run(SITE, world, patient("1"), "POST", "/moods", mood("1", nr=value))
    assert world.sent == []


def test_an_id_is_refused_where_the_record_cannot_be_looked_at() -> None:
    app = Upserting(**{"5": mood("2")})
    for site in (
        route(ADD),
        route(
            ADD,
            RuleSettings(path="/moods", type="Mood", id="/nr", patient="/patient", items="/items"),
        ),
    ):
        world = World(app=app)
        with pytest.raises(UnsupportedError, match="Leave the id out"):
            run(site, world, patient("1"), "POST", "/moods", mood("1", nr="5"))
        assert world.sent == []


def test_what_is_not_among_ones_own_may_still_be_somebody_elses() -> None:
    scoped = route(
        RuleSettings(path="/p/{patient}/moods/{id}", type="Mood", patient="/patient", id="/nr"),
        RuleSettings(path="/p/{patient}/moods", type="Mood", patient="/patient", id="/nr",
                     methods=("POST",)),
    )  # fmt: skip
    app = Upserting(**{"5": mood("1")})
    run(scoped, World(app=app), patient("1"), "POST", "/p/1/moods", mood("1", nr="5", mood=2))
    assert app.records["5"]["mood"] == 2
    world = World(app=Upserting())
    with pytest.raises(UnsupportedError, match="Leave the id out"):
        run(scoped, world, patient("1"), "POST", "/p/1/moods", mood("1", nr="6"))
    assert world.log == ["GET /p/1/moods/6"]
    run(scoped, World(app=app), patient("1"), "POST", "/p/1/moods", mood("1"))


def test_records_with_ids_come_one_by_one() -> None:
    world = World(app=Upserting())
    with pytest.raises(UnsupportedError, match="one by one"):
        run(SITE, world, patient("1"), "POST", "/moods", [mood(nr="5"), mood(nr="6")])
    assert world.sent == []


@pytest.mark.parametrize("id_", ["../moods/5", "5/../6", "a/b", "5?x=1", "%2e%2e", ".", ".."])
def test_an_id_leads_to_no_other_path(id_: str) -> None:
    world = World(app=Upserting(**{"5": mood("1")}))
    try:
        run(SITE, world, patient("1"), "POST", "/moods", mood("1", nr=id_))
    except (UnsupportedError, BadRequestError):
        assert world.sent == []
    else:
        assert world.log[0].startswith("GET /moods/")
        assert world.log[0].count("/") == 2
        assert "?" not in world.log[0]


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_a_change_names_no_other_record_than_its_path(method: str) -> None:
    app = Upserting(**{"5": mood("1"), "6": mood("2")})
    with pytest.raises(UnsupportedError, match="Leave the id out"):
        run(SITE, World(app=app), patient("1"), method, "/moods/5", mood("1", nr="6"))
    assert app.records["6"] == mood("2")
    run(SITE, World(app=app), patient("1"), method, "/moods/5", mood("1", nr="5", mood=4))
    assert app.records["5"]["mood"] == 4


def test_what_one_does_not_see_is_not_overwritten_by_a_post() -> None:
    rules = [
        RuleSettings(path="/v/{id}", type="Claim", patient="/patient", id="/nr"),
        RuleSettings(path="/v", type="Claim", patient="/patient", id="/nr",
                     request_patient="/patient", methods=("POST",)),
    ]  # fmt: skip
    billing = someone("billing", purpose="HPAYMT")
    record = {"patient": "1", "nr": "5", "supportingInfo": "Condition/3"}
    app = Upserting(**{"5": record})
    site = route(*rules, kind="ehr")
    run(site, World(app=app), billing, "POST", "/v", {"patient": "1", "nr": "6"})
    with pytest.raises(UnsupportedError, match="do not see all"):
        run(site, World(app=app), billing, "POST", "/v", {"patient": "1", "nr": "5"})
    assert app.records["5"] == record
