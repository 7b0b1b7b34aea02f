from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.commands import Failed, Fetched
from gateway.core.enforcement import RefusedError, Reply
from gateway.core.messages import RequestHead
from gateway.errors import (
    BadRequestError,
    UnavailableError,
    UnsupportedError,
    UpstreamContentError,
    UpstreamError,
)
from gateway.settings import RuleSettings
from policies.consent import parse_consent
from policies.model import BreakGlass
from tests.gateway.content.script import World, answer, patient, route, run, someone

ONE = RuleSettings(path="/moods/{id}", type="Mood", patient="/patient", author="/by")
CHANGE = RuleSettings(
    path="/moods/{id}", type="Mood", patient="/patient", methods=("PUT", "PATCH", "DELETE")
)
LIST = RuleSettings(
    path="/moods", type="Mood", patient="/patient", items="/items", total="/total", keep=("/page",)
)
ADD = RuleSettings(
    path="/moods", type="Mood", patient="/patient", request_patient="/patient", methods=("POST",)
)
OWN = RuleSettings(path="/p/{patient}/moods", type="Mood", methods=("GET", "HEAD", "POST"))
ASKED = RuleSettings(path="/diary", type="Mood", request_patient="?patient")
COURSE = RuleSettings(path="/courses", type="Course", items="/items", action="search")
SITE = route(ONE, CHANGE, LIST, ADD, OWN, ASKED, COURSE)
SEALED = route(
    ONE, CHANGE, LIST, ADD, OWN,
    fields={
        "Mood:/note": {"seal": True, "index": "note"},
        "Mood:/mood": {"seal": True},
        "Mood:/tags/*": {"seal": True},
        "Mood:/device": {"mask": True},
    },
)  # fmt: skip


def mood(whose: Any = "1", **more: Any) -> dict[str, Any]:
    return {"patient": whose, "mood": 5, "note": "slept badly", **more}


def always(fetched: Fetched | Failed) -> World:
    return World(app=lambda _head, _body: fetched)


def body(reply: Reply) -> Any:
    return json.loads(reply.body)


class Store:
    """An app that keeps records by path."""

    def __init__(self, **records: Any) -> None:
        self.records = records

    def __call__(self, head: RequestHead, raw: bytes) -> Fetched:
        name = head.path.removeprefix("/moods/")
        if head.method == "GET":
            found = self.records.get(name)
            return answer({"error": "none"}, 404) if found is None else answer(found)
        if head.method == "DELETE":
            self.records.pop(name, None)
            return answer(None, 204)
        self.records[name] = json.loads(raw)
        return answer(self.records[name])


# --- One record -----------------------------------------------------------------------------------


def test_a_patient_reads_his_own_record_once_the_intent_is_durable() -> None:
    world = always(answer(mood()))
    assert body(run(SITE, world, patient("1"), "GET", "/moods/5")) == mood()
    assert world.log == ["GET /moods/5", "intent allow"]


def test_with_the_patient_in_the_path_the_intent_comes_before_the_app_is_asked() -> None:
    world = always(answer(mood()))
    run(SITE, world, patient("1"), "GET", "/p/1/moods")
    assert world.log == ["intent allow", "GET /p/1/moods"]


def test_anothers_record_is_answered_like_one_that_is_not_there() -> None:
    refusals = []
    for fetched in (answer(mood("2")), answer({"error": "none"}, 404), answer(None, 204)):
        world = always(fetched)
        with pytest.raises(RefusedError) as refused:
            run(SITE, world, patient("1"), "GET", "/moods/5")
        refusals.append(refused.value.hide)
        assert not any(line.startswith("intent allow") for line in world.log)
    assert refusals == [True, True, True]


@pytest.mark.parametrize("whose", [None, "", {}, [], True, 1.5, "a/b", ["1"]])
def test_a_record_that_does_not_say_whose_it_is_stays(whose: Any) -> None:
    with pytest.raises(RefusedError):
        run(SITE, always(answer(mood(whose))), patient("1"), "GET", "/moods/5")


def test_a_record_of_several_patients_needs_a_yes_for_each() -> None:
    rule = RuleSettings(path="/talk/{id}", type="Talk", patient="/with/*/patient")
    both = {"with": [{"patient": "1"}, {"patient": "2"}]}
    for team, seen in (({"1", "2"}, True), ({"1"}, False)):
        world = always(answer(both))
        world.team = frozenset(team)
        if seen:
            assert body(run(route(rule), world, someone("clinician"), "GET", "/talk/1")) == both
        else:
            with pytest.raises(RefusedError):
                run(route(rule), world, someone("clinician"), "GET", "/talk/1")
    for half in ({"patient": None}, {"patient": "a/b"}):
        world = always(answer({"with": [{"patient": "1"}, half]}))
        world.team = frozenset({"1"})
        with pytest.raises(RefusedError):
            run(route(rule), world, someone("clinician"), "GET", "/talk/1")


def test_the_records_own_labels_decide() -> None:
    coded = mood(code=[{"system": "http://hl7.org/fhir/sid/icd-10-cm", "code": "F10.20"}])
    rule = RuleSettings(path="/p/{patient}/moods", type="Mood")
    by_pointer = RuleSettings(
        path="/p/{patient}/moods", type="Mood", codes=("/dx=http://hl7.org/fhir/sid/icd-10-cm",)
    )
    for one, content in ((rule, coded), (by_pointer, mood(dx="F10.20"))):
        world = always(answer(content))
        world.team = frozenset({"1"})
        with pytest.raises(RefusedError) as refused:
            run(route(one), world, someone("clinician"), "GET", "/p/1/moods")
        # He may see other records of this patient, so he may know that one is closed.
        assert not refused.value.hide
        world = always(answer(mood()))
        world.team = frozenset({"1"})
        assert run(route(one), world, someone("clinician"), "GET", "/p/1/moods").head.status == 200


def test_a_refusal_of_the_patient_closes_his_record() -> None:
    refusal = parse_consent({
        "resourceType": "Consent", "id": "c", "status": "active",
        "scope": {"coding": [{"code": "patient-privacy"}]},
        "patient": {"reference": "Patient/1"}, "provision": {"type": "deny"},
    })  # fmt: skip
    for target in ("/moods/5", "/p/1/moods"):
        world = always(answer(mood()))
        world.team, world.consents = frozenset({"1"}), {"1": (refusal,)}
        with pytest.raises(RefusedError):
            run(SITE, world, someone("clinician"), "GET", target)


def test_without_a_durable_intent_nothing_is_given() -> None:
    for target in ("/moods/5", "/p/1/moods", "/moods"):
        world = always(answer({**mood(), "items": [mood()]}))
        world.intent = Failed(code="audit.unavailable")
        with pytest.raises(UnavailableError):
            run(SITE, world, patient("1"), "GET", target)


def test_path_and_query_must_not_name_different_patients() -> None:
    rule = RuleSettings(path="/p/{patient}/moods", type="Mood", request_patient="?patient")
    with pytest.raises(BadRequestError):
        run(route(rule), always(answer(mood())), patient("1"), "GET", "/p/1/moods?patient=2")


@pytest.mark.parametrize(
    "query",
    ["patient=1&patient=2", "patient=1&Patient=2", "patient=1&patient[]=2", "patient[]=1",
     "PATIENT=1", "patient=1;patient=2", "patient=", "patient=1&%70atient=2"],
)  # fmt: skip
def test_a_patient_in_the_query_stands_there_once_and_plainly(query: str) -> None:
    world = always(answer(mood()))
    with pytest.raises(BadRequestError):
        run(SITE, world, patient("1"), "GET", f"/diary?{query}")
    assert world.log == []


def test_the_patient_in_the_query_is_who_is_asked_for() -> None:
    assert run(SITE, always(answer(mood())), patient("1"), "GET", "/diary?patient=1").body
    for target in ("/diary?patient=2", "/diary"):
        with pytest.raises(RefusedError):
            run(SITE, always(answer(mood())), patient("1"), "GET", target)


# --- What the app answers besides -----------------------------------------------------------------


def test_what_is_no_json_passes_only_where_nothing_must_be_done_to_it() -> None:
    page = answer(b"<p>mine</p>", content_type="text/html")
    assert run(SITE, always(page), patient("1"), "GET", "/p/1/moods").body == b"<p>mine</p>"
    for site, target in ((SITE, "/moods/5"), (SITE, "/moods"), (SEALED, "/p/1/moods")):
        with pytest.raises((UpstreamContentError, RefusedError)):
            run(site, always(page), patient("1"), "GET", target)


@pytest.mark.parametrize(
    "raw", [b"{", b'{"patient":"1","patient":"2"}', b'{"a":NaN}', b"\xff", b"[" * 100_000]
)
def test_json_that_can_be_read_in_two_ways_stays(raw: bytes) -> None:
    with pytest.raises(UpstreamContentError):
        run(SITE, always(answer(raw)), patient("1"), "GET", "/p/1/moods")


def test_errors_of_the_app_bring_its_words_only_to_who_may_read_them() -> None:
    error = answer({"quote": "slept badly"}, 422)
    known = run(SITE, always(error), patient("1"), "GET", "/p/1/moods")
    assert (known.head.status, body(known)) == (422, {"quote": "slept badly"})
    sealed = run(SEALED, always(error), patient("1"), "GET", "/p/1/moods")
    assert sealed.head.status == 422
    assert b"slept" not in sealed.body
    with pytest.raises(UpstreamError):
        run(SITE, always(answer({"trace": "slept badly"}, 500)), patient("1"), "GET", "/p/1/moods")


def test_conditions_and_ranges_never_reach_the_app_when_reading() -> None:
    world = always(answer(mood(), etag='"7"', last_modified="x"))
    reply = run(
        SITE, world, patient("1"), "GET", "/moods/5",
        if_none_match='"7"', range="bytes=0-1", if_modified_since="y", if_match="z",
    )  # fmt: skip
    names = {name for name, _ in world.sent[0][0].headers}
    assert names == {"havengate-identity"}
    assert (reply.head.status, reply.body) == (304, b"")
    with pytest.raises(RefusedError):
        run(SITE, world, patient("2"), "GET", "/moods/5", if_none_match='"7"')


def test_the_head_of_an_answer_tells_nothing_about_other_records() -> None:
    fetched = answer(
        {"items": [mood()]}, x_total_count="9", link="</moods?page=9>; rel=last", etag="1",
        set_cookie="a=b", server="x",
    )  # fmt: skip
    reply = run(SITE, always(fetched), patient("1"), "GET", "/moods")
    assert {name for name, _ in reply.head.headers} == {"content-type", "set-cookie"}
    own = answer({"items": [mood()]}, set_cookie="__Host-havengate=stolen")
    reply = run(SITE, always(own), patient("1"), "GET", "/moods")
    assert {name for name, _ in reply.head.headers} == {"content-type"}


def test_head_is_decided_like_get_and_has_no_body() -> None:
    world = always(answer(mood()))
    reply = run(SITE, world, patient("1"), "HEAD", "/p/1/moods")
    assert (reply.head.status, reply.body) == (200, b"")
    assert [head.method for head, _ in world.sent] == ["GET"]


# --- Lists ----------------------------------------------------------------------------------------

RECORDS = st.lists(
    st.builds(mood, st.sampled_from(["1", "2", 1, "Patient/1", None]), id=st.integers(0, 9)),
    max_size=6,
)


def listed(records: list[dict[str, Any]], who: str, **beside: Any) -> Any:
    whole = {"items": records, "total": len(records), "page": 1, **beside}
    try:
        return body(run(SITE, always(answer(whole)), patient(who), "GET", "/moods"))
    except RefusedError as refused:
        return refused.denied


@given(RECORDS, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_leaving_out_what_is_denied_equals_never_having_had_it(
    records: list[dict[str, Any]], random: Any
) -> None:
    own = [one for one in records if one["patient"] in {"1", 1, "Patient/1"}]
    assert listed(records, "1", stats={"of": random.random()}) == listed(own, "1")
    if own:
        assert listed(records, "1") == {"items": own, "total": len(own), "page": 1}


def test_a_list_at_the_root_is_decided_one_by_one() -> None:
    rule = RuleSettings(path="/moods", type="Mood", patient="/patient", action="search")
    reply = run(route(rule), always(answer([mood("1"), mood("2")])), patient("1"), "GET", "/moods")
    assert body(reply) == [mood("1")]


@pytest.mark.parametrize("total", [7, "2", None, True, 2.0, -1])
def test_a_total_that_counts_more_than_what_came_is_left_out(total: Any) -> None:
    whole = {"items": [mood("1"), mood("2")], "total": total, "page": 1}
    reply = run(SITE, always(answer(whole)), patient("1"), "GET", "/moods")
    assert body(reply) == {"items": [mood("1")], "page": 1}


@pytest.mark.parametrize("whole", [{}, {"items": {}}, {"items": None}, "x"])
def test_an_answer_without_the_list_stays(whole: Any) -> None:
    world = always(answer(whole))
    with pytest.raises(UpstreamContentError):
        run(SITE, world, patient("1"), "GET", "/moods")


def test_a_list_longer_than_can_be_looked_through_stays() -> None:
    world = always(answer({"items": [mood("1")] * 1_001}))
    with pytest.raises(UpstreamContentError):
        run(SITE, world, patient("1"), "GET", "/moods")


def test_rows_are_limited_as_the_rules_say_and_the_total_does_not_tell() -> None:
    rule = RuleSettings(
        path="/calls", type="Call", patient="/patient", items="/items", total="/total"
    )
    whole = {"items": [mood("1", id=place) for place in range(30)], "total": 30}
    reply = run(
        route(rule, kind="crisis"), always(answer(whole)), someone("crisis-worker"), "GET", "/calls"
    )
    assert [one["id"] for one in body(reply)["items"]] == list(range(10))
    assert "total" not in body(reply)


def test_psychotherapy_notes_are_in_no_total() -> None:
    note = mood("1", by="Practitioner/7", meta={"security": [{"code": "PSYTHPN"}]})
    whole = {"items": [note, mood("1")], "total": 2}
    world = always(answer(whole))
    world.team = frozenset({"1"})
    who = someone("clinician", references=frozenset({"Practitioner/7"}))
    rule = RuleSettings(
        path="/moods", type="Mood", patient="/patient", author="/by", items="/items", total="/total"
    )
    seen = body(run(route(rule), world, who, "GET", "/moods"))
    assert len(seen["items"]) == 2
    assert seen["total"] == 1


def test_pseudonyms_stand_for_names_of_others() -> None:
    rule = RuleSettings(path="/posts", type="Post", items="/items", author="/author")
    posts = {"items": [{"author": "ann", "email": ["a@x"]}, {"author": "me", "email": None}]}
    who = someone(references=frozenset({"me"}))
    reply = run(route(rule, kind="forum"), always(answer(posts)), who, "GET", "/posts")
    first, own = body(reply)["items"]
    assert first == {
        "author": "pseudonym-TREAT-Post.author-3",
        "email": ["pseudonym-TREAT-Post.email-3"],
    }
    assert own == {"author": "me", "email": None}


# --- Writing --------------------------------------------------------------------------------------


def test_a_patient_writes_for_himself_and_for_nobody_else() -> None:
    world = World(app=Store())
    run(SITE, world, patient("1"), "POST", "/moods", mood("1"))
    assert world.log == ["intent allow", "POST /moods"]
    for whose in ("2", ["1"], None, "", {"reference": "Patient/1"}):
        world = World(app=Store())
        with pytest.raises((RefusedError, BadRequestError)):
            run(SITE, world, patient("1"), "POST", "/moods", mood(whose))
        assert world.sent == []


@pytest.mark.parametrize("content", [{"mood": 5}, [], [mood("1"), {"mood": 5}], "x"])
def test_nothing_is_written_without_knowing_whose_it_is(content: Any) -> None:
    world = World(app=Store())
    with pytest.raises(UnsupportedError):
        run(SITE, world, patient("1"), "POST", "/moods", content)
    assert world.sent == []


def test_more_records_than_can_be_looked_through_are_not_written() -> None:
    world = World(app=Store())
    with pytest.raises(BadRequestError) as refused:
        run(SITE, world, patient("1"), "POST", "/moods", [mood("1")] * 1_001)
    assert refused.value.status == 413
    assert world.log == []


def test_one_denied_record_of_many_stops_the_write() -> None:
    world = World(app=Store())
    with pytest.raises((RefusedError, UnsupportedError)):
        run(SITE, world, patient("1"), "POST", "/moods", [mood("1"), mood("2")])
    assert world.sent == []


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_whose_record_it_is_now_decides_over_what_the_request_says(method: str) -> None:
    store = Store(**{"5": mood("2")})
    world = World(app=store)
    with pytest.raises(RefusedError) as refused:
        run(SITE, world, patient("1"), method, "/moods/5", mood("1"))
    assert refused.value.hide
    assert store.records == {"5": mood("2")}
    assert world.log == ["GET /moods/5"]


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_a_record_cannot_be_given_to_another(method: str) -> None:
    store = Store(**{"5": mood("1")})
    with pytest.raises(RefusedError):
        run(SITE, World(app=store), patient("1"), method, "/moods/5", mood("2"))
    assert store.records == {"5": mood("1")}


def test_own_records_are_changed_and_deleted() -> None:
    store = Store(**{"5": mood("1"), "6": mood("1")})
    run(SITE, World(app=store), patient("1"), "PUT", "/moods/5", mood("1", mood=1))
    run(SITE, World(app=store), patient("1"), "DELETE", "/moods/6")
    run(SITE, World(app=store), patient("1"), "PUT", "/moods/7", mood("1"))
    assert store.records == {"5": mood("1", mood=1), "7": mood("1")}
    with pytest.raises(UnsupportedError):
        run(SITE, World(app=store), patient("1"), "DELETE", "/moods/8")


def test_what_stands_twice_in_a_body_is_refused() -> None:
    world = World(app=Store())
    with pytest.raises(BadRequestError):
        run(SITE, world, patient("1"), "POST", "/moods", b'{"patient":"2","patient":"1"}')
    assert world.sent == []


@pytest.mark.parametrize(
    "headers",
    [
        {"content_type": "text/plain"},
        {"content_type": "application/x-www-form-urlencoded"},
        {"content_type": "application/json-patch+json"},
        {"content_encoding": "gzip"},
    ],
)
def test_a_body_that_must_be_looked_into_is_json(headers: dict[str, str]) -> None:
    world = World(app=Store())
    with pytest.raises(UnsupportedError) as refused:
        run(SITE, world, patient("1"), "POST", "/moods", mood("1"), **headers)
    assert refused.value.status == 415
    assert world.sent == []


def test_who_may_only_write_gets_nothing_back_but_that_it_was_done() -> None:
    who = someone()
    service = replace(
        who, means="service",
        principal=replace(who.principal, kind="service", roles=frozenset({"device-ingest"}),
                          purposes=frozenset({"TREAT"})),
    )  # fmt: skip
    world = always(answer({**mood("1"), "history": "slept badly"}, 201, location="/moods/9"))
    reply = run(route(ADD, kind="wearable"), world, service, "POST", "/moods", mood("1"))
    assert (reply.head.status, reply.body) == (201, b"")
    assert reply.head.headers.get("location") == "/moods/9"


# --- Protected fields -----------------------------------------------------------------------------

SEALABLE = st.fixed_dictionaries(
    {},
    optional={
        "note": st.text(max_size=20) | st.none(),
        "mood": st.integers() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False)
        | st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=3), st.none()),
        "tags": st.lists(st.text(max_size=5), max_size=3),
        "open": st.text(max_size=5),
    },
)  # fmt: skip


@given(SEALABLE)
@settings(max_examples=40, deadline=None)
def test_what_is_sealed_is_kept_as_text_and_comes_back_as_it_was(record: dict[str, Any]) -> None:
    store = Store()
    world = World(app=store)
    content = {"patient": "1", **record}
    try:
        run(SEALED, world, patient("1"), "PUT", "/moods/5", content)
    except UnsupportedError:
        assert "***" in record.get("tags", [])
        return
    kept = store.records["5"]
    for name in ("note", "mood"):
        assert content.get(name) is None or kept[name].startswith("hg1.")
    assert all(one.startswith("hg1.") for one in kept.get("tags", []))
    assert kept.get("open") == content.get("open")
    assert (kept.get("note_index") is not None) == (content.get("note") is not None)
    assert body(run(SEALED, world, patient("1"), "GET", "/moods/5")) == content


@pytest.mark.parametrize(
    "planted",
    [{"note": "hg1.AAAAAAAAAAAA.AAAA"}, {"tags": ["hg1.x"]}, {"note_index": "hgi1.1.x"},
     {"device": "***"}],
)  # fmt: skip
def test_nobody_plants_ciphertext_tokens_or_masks(planted: dict[str, Any]) -> None:
    world = World(app=Store())
    with pytest.raises(UnsupportedError):
        run(SEALED, world, patient("1"), "POST", "/moods", {"patient": "1", **planted})
    assert world.sent == []


def test_a_sealed_value_of_another_patient_or_place_does_not_open() -> None:
    store = Store()
    run(SEALED, World(app=store), patient("2"), "PUT", "/moods/5", mood("2"))
    stolen = store.records["5"]
    for moved in (stolen | {"patient": "1"}, {"patient": "1", "note": stolen["mood"]}):
        with pytest.raises(UpstreamContentError):
            run(SEALED, always(answer(moved)), patient("1"), "GET", "/moods/5")


def test_a_damaged_record_of_another_spoils_no_list() -> None:
    bad = mood("2", note="hg1.broken")
    own = {"patient": "1", "open": "x"}
    reply = run(SEALED, always(answer({"items": [own, bad]})), patient("1"), "GET", "/moods")
    assert body(reply) == {"items": [own]}
    with pytest.raises(UpstreamContentError):
        run(SEALED, always(answer({"items": [own, bad]})), patient("2"), "GET", "/moods")


def test_what_an_erased_person_had_is_gone_and_older_plain_text_stays() -> None:
    store = Store()
    world = World(app=store)
    run(SEALED, world, patient("1"), "PUT", "/moods/5", mood("1"))
    world.seals.erased.add("Patient/1")
    seen = body(run(SEALED, world, patient("1"), "GET", "/moods/5"))
    assert seen == {"patient": "1", "mood": None, "note": None}
    plain = run(SEALED, always(answer(mood("1"))), patient("1"), "GET", "/moods/5")
    assert body(plain) == mood("1")


def test_masked_values_show_only_that_they_are_there() -> None:
    seen = run(SEALED, always(answer(mood("1", device="x7"))), patient("1"), "GET", "/moods/5")
    assert body(seen)["device"] == "***"


def test_a_search_for_a_sealed_value_asks_for_its_tokens() -> None:
    world = always(answer({"items": [mood("1")]}))
    run(SEALED, world, patient("1"), "GET", "/moods?note=%20Slept%20BADLY&a=%C3%A4")
    value = b"slept badly".hex()
    assert world.sent[0][0].query == (
        f"note_index=hgi1.2.app.Mood%3A%2Fnote.{value}"
        f"&note_index=hgi1.1.app.Mood%3A%2Fnote.{value}&a=%C3%A4"
    )
    with pytest.raises(BadRequestError):
        run(SEALED, world, patient("1"), "GET", "/moods?note_index=hgi1.2.x")


def test_labels_are_found_in_what_was_sealed() -> None:
    rule = RuleSettings(
        path="/p/{patient}/moods", type="Mood", codes=("/dx=http://hl7.org/fhir/sid/icd-10-cm",)
    )
    site = route(rule, fields={"Mood:/dx": {"seal": True}})
    world = World(app=Store())
    sealed = world.seals.seal(
        person="Patient/1", service="app", field="Mood:/dx", plaintext=b"sF10.20"
    )
    world = always(answer({"dx": sealed}))
    world.team = frozenset({"1"})
    with pytest.raises(RefusedError):
        run(site, world, someone("clinician"), "GET", "/p/1/moods")
    assert run(site, world, patient("1"), "GET", "/p/1/moods").head.status == 200


def test_breaking_the_glass_opens_the_one_record() -> None:
    who = replace(
        someone("clinician"),
        break_glass=BreakGlass(
            reason="unconscious in the emergency room", patients=frozenset({"1"}),
            begins_at=1.8e9 - 60, ends_at=1.8e9 + 600,
        ),
    )  # fmt: skip
    rule = RuleSettings(path="/notes/{id}", type="Note", patient="/patient")
    site = route(rule, kind="ehr")
    assert run(site, always(answer(mood("1"))), who, "GET", "/notes/1").head.status == 200
    with pytest.raises(RefusedError):
        run(site, always(answer(mood("2"))), who, "GET", "/notes/1")


def test_the_notice_goes_with_what_may_not_be_passed_on() -> None:
    permit = parse_consent({
        "resourceType": "Consent", "id": "c", "status": "active",
        "scope": {"coding": [{"code": "patient-privacy"}]},
        "patient": {"reference": "Patient/1"},
        "provision": {"type": "permit", "securityLabel": [{"code": "42CFRPart2"}]},
    })  # fmt: skip
    rule = RuleSettings(
        path="/p/{patient}/moods", type="Mood", codes=("/dx=http://hl7.org/fhir/sid/icd-10-cm",)
    )
    world = always(answer(mood(dx="F10.20")))
    world.team, world.consents = frozenset({"1"}), {"1": (permit,)}
    reply = run(route(rule), world, someone("clinician"), "GET", "/p/1/moods")
    assert "42 CFR" in (reply.head.headers.get("redisclosure-notice") or "")
