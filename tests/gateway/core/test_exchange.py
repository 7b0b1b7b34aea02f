"""The core as a script: every path, and every command failing in every place."""

from __future__ import annotations

import itertools
from dataclasses import replace
from http import HTTPStatus

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core import commands as c
from gateway.core.commands import Failed, Signal
from gateway.core.enforcement import Enforcement, Question, RefusedError, Reply, Steps
from gateway.core.exchange import Site
from gateway.core.handler import Handler, Inspected, Streamed
from gateway.core.messages import Headers, RequestHead, ResponseHead
from gateway.errors import UnsupportedError, UpstreamContentError
from gateway.identity.model import NotIdentified
from gateway.settings import LimitSettings, RouteSettings
from policies.model import Allowed, Denied, Remedy
from tests.gateway.core.world import NOW, SECRET, World, clinician, get, request, site

EHR = RouteSettings(name="records", kind="ehr", upstream="http://127.0.0.1:1", content="fhir")
PAGES = RouteSettings(name="pages", kind="generic", upstream="http://127.0.0.1:1")
CRISIS = RouteSettings(name="line", kind="crisis", upstream="http://127.0.0.1:1")
NOTE = Question(action="read", type="Observation", id="7", patient="3")


class OneRecord:
    """Reads one record of one patient from the app."""

    def __init__(self, question: Question = NOTE, *, public: bool = False) -> None:
        self.question = question
        self.public = public

    def plan(self, head: RequestHead) -> Inspected | Streamed:
        if head.path == "/never":
            raise UnsupportedError("Nobody may do this.")
        return Inspected(public=self.public)

    def exchange(self, enforcement: Enforcement, body: bytes) -> Steps[Reply]:
        question = self.question
        type_level = replace(question, patient=None, id=None)
        enforcement.demand(type_level)
        yield from enforcement.begin([type_level])
        fetched = yield from enforcement.fetch(enforcement.head, body)
        if question.patient is not None:
            yield from enforcement.know([question.patient])
        yield from enforcement.load_keys(persons=["Patient/3"], texts=["hg1.x"])
        decision = enforcement.ask(question)
        if isinstance(decision, Denied):
            raise RefusedError(decision)
        enforcement.release(question, decision)
        return Reply(head=fetched.head, body=fetched.body)


class Pieces:
    """Passes pages on."""

    def __init__(self, *questions: Question, public: bool = False) -> None:
        self.questions = questions or (Question(action="read", type="Page"),)
        self.public = public

    def plan(self, head: RequestHead) -> Inspected | Streamed:
        return Streamed(questions=self.questions, public=self.public)

    def exchange(self, enforcement: Enforcement, body: bytes) -> Steps[Reply]:
        raise AssertionError


def app(head: RequestHead, body: bytes) -> tuple[int, dict[str, str], bytes]:
    return 200, {"content-type": "application/fhir+json", "set-cookie": "a=b"}, SECRET


def treating() -> World:
    return World(care_team=frozenset({"3"}), app=app)


def records(handler: Handler | None = None) -> Site:
    return site(EHR, handler or OneRecord())


def pages(handler: Handler | None = None) -> Site:
    return site(PAGES, handler or Pieces())


# --- One request ------------------------------------------------------------------------------


def test_everything_happens_in_order() -> None:
    world = treating()
    summary = world.run(get("/Observation/7"), records())
    assert world.names() == [
        "Identify", "RecordIntent", "Assert", "Fetch", "LoadFacts", "LoadKeys", "RecordOutcome",
        "Respond",
    ]  # fmt: skip
    assert bytes(world.sent) == SECRET
    assert (summary.status, summary.decision, summary.failure) == (200, "allow", None)


def test_the_log_says_who_saw_what_of_whom_under_which_rules() -> None:
    world = treating()
    world.run(get("/Observation/7"), records())
    act, end = world.intents()[0].act, world.outcomes()[0].end
    assert (act.action, act.service, act.purpose, act.decision) == (
        "read",
        "records",
        "TREAT",
        "allow",
    )
    assert (act.who.kind, act.who.person, act.who.address) == (
        "person",
        "Practitioner/1",
        "192.0.2.7",
    )
    assert act.who.assurance is not None
    assert (act.who.assurance.level, act.who.assurance.age_s) == ("totp", 60)
    assert "role.clinician.read" in act.rules
    assert (end.outcome, end.status, end.patients) == ("success", 200, ("Patient/3",))
    assert end.resources == ("Observation", "Observation/7")
    assert end.bytes_out == len(SECRET)


def test_the_app_gets_the_statement_and_not_the_credentials() -> None:
    world = treating()
    head = get("/Observation/7", cookie="__Host-havengate=1", havengate_identity="forged")
    world.run(head, records())
    fetch = next(one for one in world.asked if isinstance(one, c.Fetch))
    assert fetch.head.headers.all("havengate-identity") == ["signed.statement.here"]
    assert fetch.head.headers.get("cookie") is None


def test_what_was_looked_into_is_kept_by_no_cache() -> None:
    world = treating()
    world.run(get("/Observation/7"), records())
    assert world.heads[0].headers.get("cache-control") == "no-store"


# --- Denials ----------------------------------------------------------------------------------


def test_a_record_of_somebody_elses_patient_stays_closed_and_the_log_says_so() -> None:
    world = World(app=app)
    summary = world.run(get("/Observation/7"), records())
    assert SECRET not in world.sent
    assert world.status == 403
    assert b"care team" in world.sent
    end = world.outcomes()[0].end
    assert (end.outcome, end.decision) == ("denied", "deny")
    assert "necessary.care-team" in end.rules
    assert summary.decision == "deny"


def test_names_of_rules_never_reach_the_client() -> None:
    for accept in ("application/fhir+json", "text/html", "*/*"):
        world = World(app=app)
        world.run(get("/Observation/7", accept=accept), records())
        assert b"necessary." not in world.sent


def test_denies_who_asks_about_a_patient_nobody_looked_up() -> None:
    class Careless(OneRecord):
        def exchange(self, enforcement: Enforcement, body: bytes) -> Steps[Reply]:
            enforcement.demand(self.question)
            yield from enforcement.begin()
            return Reply(head=ResponseHead(status=200), body=SECRET)

    world = treating()
    world.run(get("/Observation/7"), records(Careless()))
    assert world.status == 403
    assert SECRET not in world.sent


def test_denies_even_the_patient_himself_whose_consents_were_not_looked_up() -> None:
    class Careless(OneRecord):
        def exchange(self, enforcement: Enforcement, body: bytes) -> Steps[Reply]:
            enforcement.demand(self.question)
            yield from enforcement.begin()
            return Reply(head=ResponseHead(status=200), body=SECRET)

    himself = replace(clinician(patient="3", roles=frozenset()), purpose="PATRQT")
    world = World(who=himself, app=app)
    world.run(get("/Observation/7"), records(Careless()))
    assert world.status == 403


def test_facts_that_cannot_be_had_are_not_taken_for_none() -> None:
    treats = clinician(care_team=frozenset({"3"}))
    world = World(who=treats, app=app)
    world.run(get("/Observation/7"), records())
    assert world.status == 200
    place = world.names().index("LoadFacts")
    for failure in (Failed(code="test.down"), c.Facts(), c.Facts(consents={"4": ()})):
        world = World(who=treats, app=app, fail_at=place, failure=failure)
        world.run(get("/Observation/7"), records())
        assert world.status == 503
        assert SECRET not in world.sent


def test_facts_about_patients_nobody_asked_for_count_for_nothing() -> None:
    world = World(app=app)
    world.run(get("/Observation/7"), records())
    place = world.names().index("LoadFacts")

    class Two(OneRecord):
        def exchange(self, enforcement: Enforcement, body: bytes) -> Steps[Reply]:
            enforcement.demand(replace(self.question, patient=None))
            yield from enforcement.begin()
            yield from enforcement.fetch(enforcement.head, body)
            yield from enforcement.know(["4"])
            yield from enforcement.know(["3"])
            enforcement.demand(self.question)
            return Reply(head=ResponseHead(status=200), body=SECRET)

    more = c.Facts(care_team=frozenset({"3", "4"}), consents={"4": ()})
    world = World(app=app, fail_at=place, failure=more)
    world.run(get("/Observation/7"), records(Two()))
    assert world.status == 403


def test_an_answer_without_an_intent_is_not_released() -> None:
    class Forgetful(OneRecord):
        def exchange(self, enforcement: Enforcement, body: bytes) -> Steps[Reply]:
            yield from enforcement.know([])
            return Reply(head=ResponseHead(status=200), body=SECRET)

    world = treating()
    summary = world.run(get("/Observation/7"), records(Forgetful()))
    assert world.status == 500
    assert SECRET not in world.sent
    assert summary.mistake == "RuntimeError"


def test_nothing_is_changed_before_the_intent() -> None:
    class Hasty(OneRecord):
        def exchange(self, enforcement: Enforcement, body: bytes) -> Steps[Reply]:
            fetched = yield from enforcement.fetch(enforcement.head, body)
            return Reply(head=fetched.head, body=fetched.body)

    world = treating()
    world.run(request("DELETE", "/Observation/7"), records(Hasty()))
    assert "Fetch" not in world.names()
    assert world.status == 500


def test_a_handler_that_breaks_releases_nothing_and_closes_the_log() -> None:
    class Broken(OneRecord):
        def exchange(self, enforcement: Enforcement, body: bytes) -> Steps[Reply]:
            yield from enforcement.begin()
            yield from enforcement.fetch(enforcement.head, body)
            raise ZeroDivisionError(SECRET)

    world = treating()
    summary = world.run(get("/Observation/7"), records(Broken()))
    assert world.status == 500
    assert SECRET not in world.sent
    assert world.outcomes()[0].end.outcome == "failed"
    assert summary.mistake == "ZeroDivisionError"


def test_content_that_cannot_be_protected_is_told_without_it() -> None:
    class Unprotectable(OneRecord):
        def exchange(self, enforcement: Enforcement, body: bytes) -> Steps[Reply]:
            yield from enforcement.begin()
            raise UpstreamContentError(SECRET.decode())

    world = treating()
    world.run(get("/Observation/7"), records(Unprotectable()))
    assert world.status == 502
    assert SECRET not in world.sent


# --- Who has not signed in --------------------------------------------------------------------


def test_nobody_is_let_in_and_the_log_says_that_he_tried() -> None:
    world = World(who=NotIdentified(reason="no_credentials"), app=app)
    world.run(get("/Observation/7"), records())
    assert world.status == 401
    assert world.heads[0].headers.get("www-authenticate") == 'Bearer realm="havengate"'
    act = world.intents()[0].act
    assert (act.who.kind, act.decision, act.reason) == ("anonymous", "deny", "no_credentials")
    assert "Fetch" not in world.names()


def test_a_browser_is_led_to_the_sign_in_page_and_back() -> None:
    world = World(who=NotIdentified(reason="no_credentials"), app=app)
    world.run(get("/Observation/7?a=b&c=//evil", accept="text/html"), records())
    assert world.status == 303
    location = world.heads[0].headers.get("location")
    assert location == "/.havengate/sign-in?next=%2FObservation%2F7%3Fa%3Db%26c%3D%2F%2Fevil"


def test_credentials_that_were_refused_are_not_taken_for_none() -> None:
    world = World(who=NotIdentified(reason="bad_token", credentials_given=True))
    world.run(get("/"), site(CRISIS, Pieces(public=True)))
    assert world.status == 401
    assert "OpenUpstream" not in world.names()


def test_what_is_not_public_needs_a_sign_in_whatever_the_rules_say() -> None:
    world = World(who=NotIdentified(reason="no_credentials"), answer=[SECRET])
    world.run(get("/"), site(CRISIS, Pieces(public=False)))
    assert world.status == 401
    assert "OpenUpstream" not in world.names()


def test_what_is_public_still_needs_a_rule() -> None:
    nobody = NotIdentified(reason="no_credentials")
    world = World(who=nobody, app=app)
    world.run(get("/Observation/7"), records(OneRecord(public=True)))
    assert world.status == 401
    world = World(who=nobody, answer=[b"call us"])
    world.run(get("/"), site(CRISIS, Pieces(public=True)))
    assert (world.status, bytes(world.sent)) == (200, b"call us")
    assert world.intents()[0].act.who.kind == "anonymous"


def test_an_old_second_factor_is_asked_for_again() -> None:
    question = Question(action="delete", type="Observation", authors=frozenset({"Practitioner/1"}))
    old = clinician(assurance=clinician().principal.assurance)
    assurance = replace(old.principal.assurance, second_factor_at=NOW - 3600)
    world = World(who=clinician(assurance=assurance), app=app)
    world.run(request("DELETE", "/Observation/7"), records(OneRecord(question)))
    assert world.status == 401
    challenge = world.heads[0].headers.get("www-authenticate") or ""
    assert "insufficient_user_authentication" in challenge
    world = World(who=clinician(assurance=assurance), app=app)
    head = replace(get("/x", accept="text/html"))
    world.run(head, records(OneRecord(question)))
    assert (world.heads[0].headers.get("location") or "").startswith("/.havengate/step-up?next=")


# --- What is refused before anything ------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (get("/Observation/7", upgrade="websocket", connection="upgrade"), 501),
        (get("/Observation/7", service_worker="script"), 403),
        (get("/Observation/7", sec_fetch_dest="serviceworker"), 403),
        (get("/.havengate/sign-in", service_worker="script"), 403),
        (request("BREW", "/Observation/7"), 405),
        (request("TRACE", "/Observation/7"), 405),
        (get("/never"), 422),
        (get("/Observation/7", content_length="3"), 400),
    ],
)
def test_refuses(head: RequestHead, status: int) -> None:
    world = treating()
    world.run(head, records())
    assert world.status == status
    assert not {"Fetch", "OpenUpstream", "AnswerOwn"} & set(world.names())
    assert SECRET not in world.sent


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (get("/never"), "gateway.unsupported"),
        (get("/Observation/7", content_length="3"), "gateway.bad_request"),
    ],
)
def test_what_somebody_known_asked_for_and_nobody_may_have_is_in_the_log(
    head: RequestHead, reason: str
) -> None:
    world = treating()
    summary = world.run(head, records())
    act, end = world.intents()[0].act, world.outcomes()[0].end
    assert (act.decision, act.reason, act.who.person) == ("deny", reason, "Practitioner/1")
    assert (end.outcome, end.status, end.reason) == ("denied", world.status, reason)
    assert world.names()[-1] == "Respond"
    assert (summary.failure, summary.decision) == (reason, "deny")
    # Strangers write nothing by being misunderstood.
    stranger = World(who=NotIdentified(reason="no_credentials"))
    stranger.run(head, records(OneRecord(public=True)))
    assert [one.act.reason for one in stranger.intents()] in ([], ["no_credentials"])


def test_what_cannot_be_logged_is_not_even_told_to_be_unsupported() -> None:
    class Mute(World):
        def _play(self, command: c.Command) -> c.Answer:
            if isinstance(command, c.RecordIntent):
                return Failed(code="audit.down")
            return super()._play(command)

    world = Mute(app=app)
    world.run(get("/never"), records())
    assert world.status == 503


def test_no_script_of_an_app_comes_to_stand_in_front_of_a_host() -> None:
    world = World(answer=[b"self.onfetch = steal"])
    world.run(get("/sw.js", service_worker="script"), pages())
    assert world.status == 403
    assert world.names() == ["Respond"]
    assert b"steal" not in world.sent


def test_a_path_of_no_app_is_not_there() -> None:
    world = treating()
    elsewhere = RouteSettings(name="r", kind="ehr", upstream="http://127.0.0.1:1", path="/fhir")
    world.run(get("/other"), site(elsewhere, OneRecord()))
    assert (world.status, world.names()) == (404, ["Respond"])


def test_own_pages_answer_on_their_own() -> None:
    world = treating()
    world.run(get("/.havengate/sign-in"), records())
    assert world.names()[0] == "AnswerOwn"


def test_a_body_that_is_too_large_is_refused_before_the_app_is_asked() -> None:
    world = replace(treating(), body=[b"x" * 100])
    limited = replace(records(), limits=LimitSettings(inspected_request_bytes=99))
    world.run(request("POST", "/Observation", content_length="100"), limited)
    assert world.status == 413
    assert "Fetch" not in world.names()


# --- Every failure in every place -----------------------------------------------------------------


def journeys() -> list[tuple[str, World, RequestHead, Site]]:
    post = request("POST", "/x", content_length="6")
    writer = Pieces(Question(action="create", type="Page"))
    member = Pieces(Question(action="read", type="Page", patient="3"))
    staff = clinician(roles=frozenset({"staff"}))
    return [
        ("inspected", treating(), get("/Observation/7"), records()),
        ("streamed", World(answer=[SECRET, SECRET]), get("/a.png"), pages()),
        ("upload", World(body=[b"abc", b"def"], answer=[SECRET]), post, pages(writer)),
        ("patient", World(who=staff, answer=[SECRET]), get("/p"), pages(member)),
        ("own", treating(), get("/.havengate/sign-in"), records()),
    ]


def places() -> list[tuple[str, int]]:
    found = []
    for name, world, head, where in journeys():
        world.run(head, where)
        assert world.status == 200 or name == "own"
        found += [(name, place) for place in range(len(world.asked))]
    return found


@pytest.mark.parametrize(("name", "place"), places())
@pytest.mark.parametrize(
    "failure",
    [
        Failed(code="test.down"),
        Failed(code="test.slow", who="upstream", timed_out=True),
        Failed(code="test.caller", who="caller", message="too slow"),
        Signal.GONE,
        Signal.DONE,
        Signal.END,
        b"bytes out of place",
    ],
    ids=["operator", "upstream", "caller", "gone", "done", "end", "bytes"],
)
def test_whatever_is_answered_in_whatever_place_nothing_leaks_and_no_intent_stays_open(
    name: str, place: int, failure: object
) -> None:
    _, world, head, where = next(one for one in journeys() if one[0] == name)
    world = replace(world, fail_at=place, failure=failure)  # type: ignore[arg-type]
    world.run(head, where)
    released = [
        at
        for at, one in enumerate(world.asked)
        if isinstance(one, c.Release | c.StartResponse)
        or (isinstance(one, c.Respond) and SECRET in one.body)
    ]
    recorded = [at for at, one in enumerate(world.asked) if isinstance(one, c.RecordOutcome)]
    kept = failure is Signal.DONE
    # An outcome counts only if it was answered with DONE, so one that failed releases nothing.
    durable = [at for at in recorded if at != place or kept]
    assert all(durable and durable[0] < at for at in released)
    intents = [
        at for at, one in enumerate(world.asked) if isinstance(one, c.RecordIntent) and at != place
    ]
    assert not intents or recorded
    assert len(recorded) <= 1
    opened = [at for at, one in enumerate(world.asked) if isinstance(one, c.OpenUpstream)]
    if opened and not (opened[0] == place and not kept):
        assert "CloseUpstream" in world.names()


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("gateway.too_large", 413),
        ("gateway.length_required", 411),
        ("gateway.too_slow", 408),
    ],
)
def test_a_body_that_is_not_taken_is_refused_by_the_status_that_says_why(
    code: str, status: int
) -> None:
    post = request("POST", "/x", content_length="6")
    refused = Failed(code=code, who="caller", message="So it cannot be taken.")
    world = replace(treating(), fail_at=1, failure=refused)
    world.run(post, records())
    assert world.status == status


def test_a_client_that_goes_away_while_it_sends_leaves_no_open_intent() -> None:
    for place in range(20):
        post = request("POST", "/x", content_length="6")
        writer = Pieces(Question(action="create", type="Page"))
        world = World(body=[b"abc", b"def"], answer=[SECRET], gone_at=place)
        world.run(post, pages(writer))
        assert len(world.outcomes()) == len(world.intents())


# --- Pieces ---------------------------------------------------------------------------------------


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    bounds = sorted({0, len(data), *(one % (len(data) + 1) for one in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(bounds)]


@settings(deadline=None)
@given(
    up=st.binary(min_size=1, max_size=200),
    down=st.binary(max_size=200),
    cuts=st.lists(st.integers(0, 1000), max_size=12),
)
def test_pieces_of_any_size_come_to_the_same(up: bytes, down: bytes, cuts: list[int]) -> None:
    def run(body: list[bytes], answer: list[bytes]) -> tuple[object, ...]:
        world = World(body=body, answer=answer)
        post = request("POST", "/x", content_length=str(len(up)))
        summary = world.run(post, pages(Pieces(Question(action="create", type="Page"))))
        end = world.outcomes()[0].end
        return bytes(world.uploaded), bytes(world.sent), summary, end

    assert run([up], [down]) == run(cut(up, cuts), cut(down, cuts))


def test_a_stream_that_is_too_long_is_cut_and_looks_cut() -> None:
    limited = replace(pages(), limits=LimitSettings(streamed_bytes=10))
    world = World(answer=[b"12345678", b"9012345"])
    summary = world.run(get("/a"), limited)
    assert bytes(world.sent) == b"12345678"
    assert world.asked[-2] == c.EndResponse(broken=True)
    assert summary.failure == "gateway.answer_too_large"


def test_an_upload_that_is_too_long_is_refused_and_logged() -> None:
    limited = replace(
        pages(Pieces(Question(action="create", type="Page"))),
        limits=LimitSettings(streamed_bytes=10),
    )
    world = World(body=[b"12345678", b"9012345"])
    world.run(request("POST", "/a", content_length="15"), limited)
    assert world.status == 413
    assert world.outcomes()[0].end.outcome == "failed"
    assert bytes(world.uploaded) == b"12345678"


def test_what_must_be_changed_in_content_that_nobody_looks_into_is_denied() -> None:
    desk = clinician(roles=frozenset({"front-desk"}))
    ehr = replace_content(EHR)
    finder = Pieces(Question(action="read", type="Patient"))
    world = World(who=desk, answer=[SECRET])
    world.run(get("/a"), site(ehr, finder))
    assert world.status == 403
    assert "OpenUpstream" not in world.names()


def replace_content(route: RouteSettings) -> RouteSettings:
    return RouteSettings(name=route.name, kind=route.kind, upstream=route.upstream)


# --- Headers of the app ---------------------------------------------------------------------------


def test_the_app_cannot_set_the_gateways_own_cookie() -> None:
    fields = (
        ("set-cookie", "app=1"),
        ("set-cookie", "__Host-havengate=stolen"),
        ("set-cookie", " __host-HAVENGATE-csrf=stolen"),
        ("set-cookie", "=__Host-havengate=stolen"),
        ("set-cookie", " = __Host-havengate=stolen"),
        ("content-type", "text/plain"),
    )
    world = World(answer_head=ResponseHead(status=200, headers=Headers(fields)))
    world.run(get("/a"), pages())
    assert world.heads[0].headers.all("set-cookie") == ["app=1"]


@pytest.mark.parametrize(
    ("questions", "public", "said", "kept"),
    [
        ("Page", False, "public, max-age=600", "private, no-cache"),
        ("Page", False, "", "private, no-cache"),
        ("Page", False, "no-store", "no-store"),
        ("Page", True, "public, max-age=600", "public, max-age=600"),
        ("patient", False, "public, max-age=600", "no-store"),
        ("patient", True, "public, max-age=600", "no-store"),
    ],
)
def test_what_one_person_was_shown_no_cache_shows_to_the_next(
    questions: str,
    public: bool,  # noqa: FBT001 - a column of the table
    said: str,
    kept: str,
) -> None:
    patient = "3" if questions == "patient" else None
    fields = (("cache-control", said), ("expires", "Thu, 01 Jan 2037 00:00:00 GMT"))
    world = World(
        who=clinician(roles=frozenset({"staff"})),
        answer=[SECRET],
        answer_head=ResponseHead(status=200, headers=Headers(fields)),
    )
    handler = Pieces(Question(action="read", type="Page", patient=patient), public=public)
    world.run(get("/a"), pages(handler))
    assert world.heads[0].headers.get("cache-control") == kept
    assert (world.heads[0].headers.get("expires") is None) is not (kept == said != "no-store")


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("http://127.0.0.1:1/inbox", "/inbox"),
        ("http://127.0.0.1:1", "/"),
        ("/inbox", "/inbox"),
        ("https://elsewhere.example/x", "https://elsewhere.example/x"),
        ("http://127.0.0.1:11/x", "http://127.0.0.1:11/x"),
    ],
)
def test_redirects_to_the_app_lead_back_through_the_gateway(location: str, expected: str) -> None:
    head = ResponseHead(status=302, headers=Headers((("location", location),)))
    world = World(answer_head=head)
    world.run(get("/a"), pages())
    assert world.heads[0].headers.get("location") == expected


def test_break_glass_opens_what_the_care_team_rule_closes_and_the_log_says_so() -> None:
    from policies.model import BreakGlass

    grant = BreakGlass(
        reason="found unconscious at the station",
        patients=frozenset({"3"}),
        begins_at=NOW - 60,
        ends_at=NOW + 3600,
    )
    who = replace(clinician(), break_glass=grant)
    world = World(who=who, app=app)
    world.run(get("/Observation/7"), records())
    assert bytes(world.sent) == SECRET
    end = world.outcomes()[0].end
    assert end.break_glass == "granted"
    assert "review" in end.obligations
    other = Question(action="read", type="Observation", id="8", patient="4")
    world = World(who=who, app=app)
    world.run(get("/Observation/8"), records(OneRecord(other)))
    assert world.status == 403


def test_a_denial_without_remedy_of_its_own_is_told_as_nothing_there_when_hidden() -> None:
    class Hidden(OneRecord):
        def exchange(self, enforcement: Enforcement, body: bytes) -> Steps[Reply]:
            yield from enforcement.begin()
            remedy = Remedy(kind="records_office")
            raise RefusedError(Denied(reason="secret", rules=("r",), remedy=remedy), hide=True)

    world = treating()
    world.run(get("/Observation/7"), records(Hidden()))
    missing = treating()
    elsewhere = RouteSettings(name="r", kind="ehr", upstream="http://127.0.0.1:1", path="/fhir")
    missing.run(get("/other"), site(elsewhere, OneRecord()))
    assert world.status == missing.status == 404
    assert b"secret" not in world.sent
    assert not isinstance(world.outcomes()[0].end.outcome, Allowed)


def test_what_is_not_looked_into_is_at_least_as_sensitive_as_its_service() -> None:
    mood = RouteSettings(name="diary", kind="mood", upstream="http://127.0.0.1:1")
    page = Pieces(Question(action="read", type="Page", patient="3"))
    yesterday = replace(clinician().principal.assurance, second_factor_at=NOW - 50_000)
    himself = replace(
        clinician(patient="3", roles=frozenset(), assurance=yesterday), purpose="PATRQT"
    )
    world = World(who=himself, answer=[SECRET])
    world.run(get("/a"), site(mood, page))
    assert world.status == 401
    fresh = replace(clinician(patient="3", roles=frozenset()), purpose="PATRQT")
    world = World(who=fresh, answer=[SECRET])
    world.run(get("/a"), site(mood, page))
    assert world.status == 200


def test_a_status_with_a_name_is_a_plain_number_in_the_log() -> None:
    class Refusing(OneRecord):
        def exchange(self, enforcement: Enforcement, body: bytes) -> Steps[Reply]:
            yield from enforcement.begin()
            raise UnsupportedError("Nothing here.", status=HTTPStatus.NOT_FOUND)

    world = treating()
    world.run(get("/Observation/7"), records(Refusing()))
    assert type(world.outcomes()[0].end.status) is int
