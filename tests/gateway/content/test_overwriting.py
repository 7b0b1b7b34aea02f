"""An id in a body is no way around the record that it names."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl

import pytest

from gateway.content.overwriting import objects_within
from gateway.content.pointers import parse_pointer
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


#: Only the path says whose a record is, and nothing is pointed at.
PLAIN = route(
    RuleSettings(path="/p/{patient}/moods/{id}", type="Mood"),
    RuleSettings(path="/p/{patient}/moods", type="Mood", methods=("POST",)),
    RuleSettings(path="/p/{patient}/moods/{id}", type="Mood", methods=("PUT", "PATCH", "DELETE")),
)


class Lenient:
    """An app that reads forms, JSON by any name, and records within anything."""

    def __init__(self) -> None:
        self.records: dict[str, Any] = {"5": {"whose": "2"}, "9": {"whose": "1"}}

    def __call__(self, head: RequestHead, body: bytes) -> Fetched:
        _, _, whose, _, *rest = head.path.split("/")
        name = rest[0] if rest else ""
        if head.method == "GET":
            found = self.records.get(name, {})
            return answer(found) if found.get("whose") == whose else answer(status=404)
        try:
            content = json.loads(body)
        except ValueError:
            content = dict(parse_qsl(body.decode()))
        self.records[_id_anywhere(content) or name or "new"] = {"whose": whose}
        return answer({}, status=201)


def _id_anywhere(content: Any) -> str | None:
    if isinstance(content, dict) and "id" in content:
        return str(content["id"])
    inside = content.values() if isinstance(content, dict) else content
    found = [_id_anywhere(one) for one in inside] if not isinstance(inside, str | int) else []
    return next((one for one in found if one is not None), None)


FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    ("method", "target"),
    [("POST", "/p/1/moods"), ("PUT", "/p/1/moods/9"), ("DELETE", "/p/1/moods/9")],
)
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"id=5&mood=1", FORM),
        (b"id=5", ""),
        (b'{"id":"5"}', "text/json"),
        (b'{"id":"5"}', "text/plain"),
        (b'{"id":"5"}', "image/png"),
        (b'{"id":"5"}', "application/jsonp"),
        ([[{"id": "5"}]], "application/json"),
        ([{"mood": 1}, [{"id": "5"}]], "application/json"),
        ({"data": {"id": "5"}}, "application/json"),
        ({"data": [{"id": "5"}]}, "application/json"),
        ({"a": [[{"b": {"c": {"id": 5}}}]]}, "application/json"),
    ],
)
def test_no_body_that_some_app_understands_overwrites_what_is_somebody_elses(
    method: str, target: str, content: Any, kind: str
) -> None:
    app = Lenient()
    world = World(app=app)
    with pytest.raises(UnsupportedError):
        run(PLAIN, world, patient("1"), method, target, content, content_type=kind)
    assert app.records == Lenient().records
    assert all(head.method == "GET" for head, _ in world.sent)


@pytest.mark.parametrize(
    ("method", "target"),
    [("POST", "/p/1/moods"), ("PUT", "/p/1/moods/9"), ("DELETE", "/p/1/moods/9")],
)
@pytest.mark.parametrize("query", ["id=5", "a=1&ID=5", "uuid=5", "id=9&id=5", "%69d=5"])
def test_a_query_names_no_record_of_somebody_else(method: str, target: str, query: str) -> None:
    world = World(app=Lenient())
    with pytest.raises(UnsupportedError):
        run(PLAIN, world, patient("1"), method, f"{target}?{query}", {"mood": 1})
    assert all(head.method == "GET" for head, _ in world.sent)


def test_a_query_may_name_the_record_of_its_path() -> None:
    world = World(app=Lenient())
    run(PLAIN, world, patient("1"), "PUT", "/p/1/moods/9?id=9&notify=1", {"mood": 1})
    assert world.log[-1] == "PUT /p/1/moods/9?id=9&notify=1"


@pytest.mark.parametrize("content", ["5", 5, None, True, [5], ["5"], [None], [[]], [{}, []]])
def test_what_is_no_object_is_no_record(content: Any) -> None:
    world = World(app=Lenient())
    raw = json.dumps(content).encode()
    with pytest.raises(UnsupportedError):
        run(PLAIN, world, patient("1"), "POST", "/p/1/moods", raw)
    assert world.sent == []


def test_an_own_record_in_a_wrapper_is_changed_at_its_own_address() -> None:
    app = Lenient()
    run(PLAIN, World(app=app), patient("1"), "PATCH", "/p/1/moods/9", {"data": {"id": 9}})
    run(PLAIN, World(app=app), patient("1"), "POST", "/p/1/moods", {"data": {"mood": 1}})
    run(PLAIN, World(app=app), patient("1"), "DELETE", "/p/1/moods/9")
    assert app.records.keys() == {"5", "9", "new"}


@pytest.mark.parametrize("odd", ["ID", "Id", "id ", "_ID"])
def test_an_id_in_a_wrapper_has_no_second_spelling(odd: str) -> None:
    world = World(app=Lenient())
    with pytest.raises(UnsupportedError):
        run(PLAIN, world, patient("1"), "POST", "/p/1/moods", {"data": {odd: "5"}})
    assert world.sent == []


def test_two_ids_in_one_record_are_refused() -> None:
    world = World(app=Upserting("id", **{"5": mood("1")}))
    with pytest.raises(UnsupportedError, match="Leave the id out"):
        run(USUAL, world, patient("1"), "POST", "/moods", mood("1", id="5", data={"id": "6"}))
    assert world.sent == []


def test_the_id_of_something_else_is_written_where_the_rule_says_where_ids_stand() -> None:
    app = Upserting(**{"5": mood("2")})
    run(SITE, World(app=app), patient("1"), "POST", "/moods", mood("1", place={"nr": "5"}, nr="7"))
    run(SITE, World(app=app), patient("1"), "PUT", "/moods/7", mood("1", place={"id": "5"}))
    assert app.records["7"] == mood("1", place={"id": "5"})
    assert app.records["5"] == mood("2")


def test_the_id_of_the_patient_is_no_id_of_the_record() -> None:
    place = "/patient/id"
    add = RuleSettings(
        path="/moods", type="Mood", methods=("POST",), patient=place, request_patient=place
    )
    site = route(add)
    world = World(app=lambda *_: answer({"patient": {"id": "1"}}, status=201))
    run(site, world, patient("1"), "POST", "/moods", {"patient": {"id": "1"}, "mood": 1})
    assert world.log[-1] == "POST /moods"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
@pytest.mark.parametrize(
    "inner",
    [{"patient": "2"}, {"Patient": "2"}, {"patient": None}, [{"a": {"patient": "2"}}]],
)
def test_a_wrapper_names_no_other_patient(method: str, inner: Any) -> None:
    app = Upserting(**{"5": mood("1")})
    target = "/moods" if method == "POST" else "/moods/5"
    for who in (patient("1"), someone("clinician")):
        world = World(app=app, team=frozenset({"1", "2"}))
        with pytest.raises(BadRequestError):
            run(SITE, world, who, method, target, mood("1", entry=inner))
        assert world.sent == []
    assert app.records == {"5": mood("1")}


@pytest.mark.parametrize("data", [[{"patient": "2"}], [[{"patient": "2"}]], "patient=2"])
def test_where_the_patient_should_stand_nothing_stands_in_another_shape(data: Any) -> None:
    add = RuleSettings(
        path="/p/{patient}/moods", type="Mood", methods=("POST",), request_patient="/data/patient"
    )
    world = World(app=lambda *_: answer({}, status=201))
    with pytest.raises(UnsupportedError, match="objects and lists"):
        run(route(add), world, patient("1"), "POST", "/p/1/moods", {"data": data})
    assert world.sent == []
    run(route(add), world, patient("1"), "POST", "/p/1/moods", {"data": {"patient": "1"}})
    assert len(world.sent) == 1


def test_a_body_is_looked_through_only_so_deep() -> None:
    content: Any = {"id": "5"}
    for _ in range(200):
        content = {"a": content}
    world = World(app=Lenient())
    with pytest.raises(BadRequestError) as refused:
        run(PLAIN, world, patient("1"), "POST", "/p/1/moods", content)
    assert refused.value.status == 413
    assert world.sent == []


#: The rules of the shipped diary.
DIARY = (
    RuleSettings(path="/{patient}", type="MoodEntry", items="/entries", total="/total", id="/id",
                 patient="/patient"),
    RuleSettings(path="/{patient}", methods=("POST",), type="MoodEntry", id="/id",
                 patient="/patient"),
    RuleSettings(path="/{patient}/{id}", type="MoodEntry", patient="/patient"),
)  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        [[{"mood": 1, "note": "SECRET"}]],
        "SECRET",
        ["SECRET"],
        {"entry": {"mood": 1, "note": "SECRET"}},
        {"entry": {"Note": "SECRET"}},
        {"entry": {"note_index": "hgi1.x"}},
        {"note": "mine", "entry": {"note": "SECRET"}},
        {"entries": [{"note": "SECRET"}]},
        {"a": {"b": [{"c": {"note": {"text": "SECRET"}}}]}},
        {"entry": {"id": "5", "mood": 1}},
        {"id": "7", "entry": {"id": "5", "mood": 1}},
        {"entry": {"patient": "2", "mood": 1}},
    ],
)
def test_nothing_within_a_record_gets_by_where_a_field_is_sealed(content: Any) -> None:
    def app(head: RequestHead, body: bytes) -> Fetched:
        there = {"/1/7": answer({"patient": "1"}), "/1/5": answer({"patient": "2"})}
        return there.get(head.path, answer(status=404))

    world = World(app=app)
    site = route(*DIARY, fields={"MoodEntry:/note": {"seal": True, "index": "note"}})
    with pytest.raises((BadRequestError, RefusedError)):
        run(site, world, patient("1"), "POST", "/1", content)
    assert all(head.method == "GET" for head, _ in world.sent)


def test_what_stands_within_something_sealed_is_sealed_with_it() -> None:
    world = World(app=lambda *_: answer({"patient": "1"}, status=201))
    site = route(*DIARY, fields={"MoodEntry:/note": {"seal": True}})
    note = {"note": "SECRET", "id": "5", "patient": "2"}
    run(site, world, patient("1"), "POST", "/1", {"mood": 1, "note": note})
    [(_, sent)] = world.sent
    assert b"SECRET" not in sent
    assert json.loads(sent).keys() == {"mood", "note"}


@pytest.mark.parametrize(
    "content",
    [
        {"parts": "SECRET"},
        {"parts": ["SECRET"]},
        {"parts": {"x": {"note": "SECRET"}}},
        {"parts": {"0": {"note": "SECRET"}}},
        {"parts": {"*": {"note": "SECRET"}}},
        {"parts": [[{"note": "SECRET"}]]},
        {"parts": [{"note": "mine"}, {"more": {"parts": [{"note": "SECRET"}]}}]},
    ],
)
def test_what_is_on_the_way_to_a_sealed_field_is_what_the_rule_says(content: Any) -> None:
    world = World(app=lambda *_: answer({"patient": "1"}, status=201))
    site = route(*DIARY, fields={"MoodEntry:/parts/*/note": {"seal": True}})
    with pytest.raises(BadRequestError):
        run(site, world, patient("1"), "POST", "/1", content)
    assert world.sent == []
    fine: list[Any] = [[], {}, None, [{"note": "SECRET"}]]
    for parts in fine:
        run(site, world, patient("1"), "POST", "/1", {"parts": parts})
    assert all(b"SECRET" not in sent for _, sent in world.sent)


def test_only_what_is_sealed_is_not_looked_into() -> None:
    world = World(app=lambda *_: answer({"patient": "1"}, status=201))
    fields = {f"MoodEntry:{one}": {"seal": True} for one in ("/note", "/parts/0")}
    site = route(*DIARY, fields=fields)
    run(site, world, patient("1"), "POST", "/1", {"parts": [{"note": "SECRET"}]})
    assert b"SECRET" not in world.sent[0][1]
    with pytest.raises(BadRequestError):
        run(site, world, patient("1"), "POST", "/1", {"parts": ["mine", {"note": "SECRET"}]})
    assert len(world.sent) == 1


def test_a_star_stands_for_items_of_a_list_and_no_members() -> None:
    sealed = [parse_pointer("/tags/*")]
    assert not list(objects_within({"tags": [{"a": {"note": 1}}]}, sealed))
    for members in ({"x": {"note": 1}}, {"0": {"note": 1}}, {"*": {"note": 1}}):
        ways = [inner.way for inner in objects_within({"tags": members}, sealed)]
        assert ways == [("tags",), ("tags", *members)]


def test_a_field_that_is_sealed_in_two_places_may_stand_in_both() -> None:
    world = World(app=lambda *_: answer({"patient": "1"}, status=201))
    fields = {f"MoodEntry:{one}": {"seal": True} for one in ("/note", "/parts/*/note")}
    content = {"note": "SECRET", "parts": [{"note": "SECRET"}]}
    run(route(*DIARY, fields=fields), world, patient("1"), "POST", "/1", content)
    [(_, sent)] = world.sent
    assert b"SECRET" not in sent


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
