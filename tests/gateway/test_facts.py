from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs

import pytest
from structlog.testing import capture_logs

from gateway.consents import UNDERSTOOD_S
from gateway.core.commands import Facts, Failed, Fetched
from gateway.core.messages import RequestHead, ResponseHead
from gateway.facts import BATCH, KEPT_S, FactsSource
from gateway.identity.model import Identified
from gateway.routes import Route, compile_routes
from gateway.settings import RouteSettings, RuleSettings
from policies.model import Principal

RULE = RuleSettings(path="/moods/{patient}", type="Mood")
FHIR, MOODS, NONE = compile_routes([
    RouteSettings(name="fhir", kind="ehr", upstream="http://127.0.0.1:1/r4", path="/fhir",
                  strip_path=True, content="fhir"),
    RouteSettings(name="moods", kind="mood", upstream="http://127.0.0.1:2", path="/m",
                  content="json", rules=(RULE,), patient_facts="fhir"),
    RouteSettings(name="none", kind="mood", upstream="http://127.0.0.1:2", path="/n",
                  content="json", rules=(RULE,), patient_facts="none"),
])  # fmt: skip
WHO = Identified(
    principal=Principal(kind="user", id="p7", references=frozenset({"Practitioner/7"})),
    means="session",
    person="Practitioner/7",
    purpose="TREAT",
)


def team(patient: str, member: str = "Practitioner/7", **changes: Any) -> dict[str, Any]:
    return {
        "resourceType": "CareTeam",
        "status": "active",
        "subject": {"reference": f"Patient/{patient}"},
        "participant": [{"member": {"reference": member}}],
        **changes,
    }


def consent(patient: str, **changes: Any) -> dict[str, Any]:
    return {
        "resourceType": "Consent",
        "id": f"c{patient}",
        "status": "active",
        "scope": {"coding": [{"code": "patient-privacy"}]},
        "patient": {"reference": f"Patient/{patient}"},
        "provision": {"type": "deny"},
        **changes,
    }


@dataclass
class App:
    """A FHIR app that knows a few resources and can be told to misbehave."""

    resources: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)
    asked: list[RequestHead] = field(default_factory=list)
    page: int = 1_000
    gate: asyncio.Event | None = None
    literal: bool = False
    #: Of a list it looks at so many.
    looks_at: int = 1_000
    #: Whether it says of whom it looked for something.
    says_whom: bool = False
    ignores_patient: bool = False

    async def __call__(
        self, route: Route, head: RequestHead, body: bytes, limit: int
    ) -> Fetched | Failed:
        assert route.name == "fhir"
        self.asked.append(head)
        mine = [one for one in self.resources if one["resourceType"] == head.path.split("/")[-1]]
        if self.gate is not None:
            await self.gate.wait()
        kind = head.path.split("/")[-1]
        answer = self.answers.get(kind, self._filtered(head, mine))
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, Failed):
            return answer
        if isinstance(answer, int):
            return Fetched(head=ResponseHead(status=answer), body=b"{}")
        if isinstance(answer, bytes):
            return Fetched(head=ResponseHead(status=200), body=answer)
        bundle = answer if isinstance(answer, dict) else self._bundle(head, answer)
        return Fetched(head=ResponseHead(status=200), body=json.dumps(bundle).encode())

    def _filtered(self, head: RequestHead, mine: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of the patients who are asked for; `literal` takes a list for one odd id."""
        asked = parse_qs(head.query).get("patient")
        if asked is None:
            return mine
        wanted = asked if self.literal else asked[0].split(",")[: self.looks_at]
        return [
            one
            for one in mine
            if (name := _whose(one)) is None or name in wanted or self.ignores_patient
        ]

    def _bundle(self, head: RequestHead, found: list[dict[str, Any]]) -> dict[str, Any]:
        start = int(parse_qs(head.query).get("at", ["0"])[0])
        bundle: dict[str, Any] = {
            "resourceType": "Bundle",
            "type": "searchset",
            "total": len(found),
            "entry": [{"resource": one} for one in found[start : start + self.page]],
        }
        if start + self.page < len(found):
            url = f"http://elsewhere{head.path}?at={start + self.page}"
            bundle["link"] = [{"relation": "next", "url": url}]
        wanted = parse_qs(head.query).get("patient", [""])[0].split(",")[: self.looks_at]
        if self.says_whom:
            url = f"http://elsewhere{head.path}?patient={'%2C'.join(wanted)}"
            bundle["link"] = [*bundle.get("link", []), {"relation": "self", "url": url}]
        return bundle


def _whose(resource: dict[str, Any]) -> str | None:
    reference = resource.get("subject") or resource.get("patient")
    name = reference.get("reference") if isinstance(reference, dict) else None
    return name.rpartition("/")[2] if isinstance(name, str) else None


class Clock:
    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


def source(app: App, clock: Clock | None = None) -> FactsSource:
    return FactsSource([FHIR, MOODS, NONE], app, clock=clock or Clock(), now=lambda: 1.8e9)


async def load(app: App, *patients: str, route: Route = FHIR) -> Facts:
    answer = await source(app).load(route, WHO, frozenset(patients))
    assert isinstance(answer, Facts)
    assert answer.consents.keys() == set(patients)
    return answer


DOCTOR = {
    "resourceType": "Patient",
    "id": "1",
    "generalPractitioner": [{"reference": "http://127.0.0.1:1/r4/Practitioner/7/_history/3"}],
}
VISIT = {
    "resourceType": "Encounter",
    "status": "in-progress",
    "subject": {"reference": "Patient/1"},
    "participant": [{"individual": {"reference": "Practitioner/7"}}],
}


@pytest.mark.parametrize("resource", [team("1"), DOCTOR, VISIT])
async def test_teams_doctors_and_visits_make_a_relation(resource: dict[str, Any]) -> None:
    assert (await load(App([resource]), "1", "2")).care_team == {"1"}


@pytest.mark.parametrize(
    "resource",
    [
        team("1", "Practitioner/8"),
        team("1", "http://other.example/Practitioner/7"),
        team("1", status="inactive"),
        team("1", period={"end": "2020-01-01"}),
        team("1", period={"start": "2999"}),
        team("1", period="ever"),
        team("1", participant=[{"member": {"reference": "Practitioner/7"},
                                "period": {"end": "2026"}}]),
        team("1", participant={"member": {"reference": "Practitioner/7"}}),
        team("1", subject={"reference": "Group/1"}),
        team("1", subject={"reference": "http://other.example/Patient/1"}),
        team("1", subject=None),
        VISIT | {"status": "finished"},
    ],
)  # fmt: skip
async def test_what_is_over_elsewhere_or_of_another_is_no_relation(
    resource: dict[str, Any],
) -> None:
    assert (await load(App([resource]), "1")).care_team == frozenset()


async def test_consents_of_each_patient_are_his_own() -> None:
    facts = await load(App([consent("1"), consent("9")]), "1", "2")
    assert [one.id for one in facts.consents["1"]] == ["c1"]
    assert facts.consents["2"] == ()


async def test_a_consent_of_nobody_known_counts_for_everybody() -> None:
    facts = await load(App([consent("1") | {"patient": {"display": "?"}}]), "1", "2")
    assert all(not one.readable for found in facts.consents.values() for one in found)
    assert all(facts.consents.values())


UNREADABLE = [
    b"", b"{", b"<html>", b"[]", b'{"resourceType":"OperationOutcome"}', 404, 400, 302,
    {"resourceType": "Bundle", "type": "searchset", "total": 1},
    {"resourceType": "Bundle", "type": "batch-response", "entry": []},
    {"resourceType": "Bundle", "type": "searchset", "entry": {}},
    {"resourceType": "Bundle", "type": "searchset", "entry": [{}]},
    {"resourceType": "Bundle", "type": "searchset", "entry": [{"resource": DOCTOR | {
        "resourceType": "Observation"}}]},
    {"resourceType": "Bundle", "type": "searchset", "entry": [{"resource": {
        "resourceType": "OperationOutcome", "issue": [{"severity": "warning"}]}}]},
    {"resourceType": "Bundle", "type": "searchset", "link": [{"relation": "next"}]},
    {"resourceType": "Bundle", "type": "searchset", "link": [
        {"relation": "next", "url": "http://x/r4/../admin"}]},
    {"resourceType": "Bundle", "type": "searchset", "link": [
        {"relation": "next", "url": "http://x/admin?a=1"}]},
    {"resourceType": "Bundle", "type": "searchset", "link": [
        {"relation": "next", "url": "?for=ever"}]},
]  # fmt: skip


@pytest.mark.parametrize("answer", UNREADABLE)
async def test_an_answer_that_cannot_be_relied_upon_is_an_unreadable_consent(answer: Any) -> None:
    facts = await load(App(answers={"Consent": answer}), "1", "2")
    for found in facts.consents.values():
        assert [(one.readable, one.in_force) for one in found] == [(False, True)]


@pytest.mark.parametrize("answer", UNREADABLE)
async def test_an_answer_that_cannot_be_relied_upon_is_no_relation(answer: Any) -> None:
    facts = await load(App([consent("1")], answers={"CareTeam": answer}), "1")
    assert facts.care_team == frozenset()
    assert len(facts.consents["1"]) == 1


@pytest.mark.parametrize("kind", ["CareTeam", "Patient", "Encounter", "Consent"])
@pytest.mark.parametrize(
    "answer", [Failed(code="gateway.upstream_down", who="upstream"), 500, 503, 401, OSError("no")]
)
async def test_what_cannot_be_had_is_a_failure_and_never_no_consents(
    kind: str, answer: Any
) -> None:
    app = App([team("1")], answers={kind: answer})
    facts = source(app)
    assert isinstance(await facts.load(FHIR, WHO, frozenset({"1"})), Failed)
    del app.answers[kind]
    assert isinstance(await facts.load(FHIR, WHO, frozenset({"1"})), Facts)


async def test_all_pages_are_read_from_the_app_itself() -> None:
    app = App([consent("1", id=f"c{place}") for place in range(5)], page=2)
    facts = await load(app, "1")
    assert [one.id for one in facts.consents["1"]] == ["c0", "c1", "c2", "c3", "c4"]
    assert {head.authority for head in app.asked} == {"127.0.0.1:1"}
    assert {head.path for head in app.asked if "at=" in head.query} == {"/r4/Consent"}


def lists(app: App, kind: str) -> list[list[str]]:
    """For whom the app was asked, question by question."""
    return [
        parse_qs(head.query)["patient"][0].split(",")
        for head in app.asked
        if head.path.endswith(kind)
    ]


async def test_relations_of_many_patients_are_asked_for_together_and_of_at_most_fifty() -> None:
    app = App()
    patients = [f"p{place}" for place in range(BATCH + 1)]
    await load(app, *patients)
    listed = lists(app, "CareTeam")
    assert sorted(len(one) for one in listed) == [1, BATCH]
    assert {one for each in listed for one in each} == set(patients)
    assert sorted(lists(app, "Consent")) == sorted([one] for one in patients)


@pytest.mark.parametrize("literal", [True, False])
async def test_an_app_that_misunderstands_a_list_never_makes_a_refusal_unheard(
    *, literal: bool
) -> None:
    app = App([consent("1"), consent("2"), consent("4")], literal=literal)
    clock = Clock()
    facts = source(app, clock)
    for _ in range(4):
        answer = await facts.load(FHIR, WHO, frozenset({"1", "2", "3"}))
        assert isinstance(answer, Facts)
        found = {name: [one.id for one in given] for name, given in answer.consents.items()}
        assert found == {"1": ["c1"], "2": ["c2"], "3": []}
        clock.at += KEPT_S
    together = [one for one in lists(app, "Consent") if len(one) > 1]
    # Who has shown that he understands a list of two is asked in lists of two from then on.
    expected = [["1", "2"]] * (1 if literal else 4)
    assert together == expected


@pytest.mark.parametrize("says_whom", [True, False])
async def test_an_app_that_looks_at_ten_of_a_list_never_makes_a_refusal_unheard(
    *, says_whom: bool
) -> None:
    many = [f"p{place:02}" for place in range(BATCH)]
    app = App([consent(one) for one in ["1", "2", *many]], looks_at=10, says_whom=says_whom)
    clock = Clock()
    facts = source(app, clock)
    for asked in (["1", "2"], many, many[:10], many, many):
        answer = await facts.load(FHIR, WHO, frozenset(asked))
        assert isinstance(answer, Facts)
        found = {name: [one.id for one in given] for name, given in answer.consents.items()}
        assert found == {name: [f"c{name}"] for name in asked}
        clock.at += KEPT_S
    before = len(lists(app, "Consent"))
    await facts.load(FHIR, WHO, frozenset(many))
    # The lists in which it found everything are used; longer ones are not tried for ever.
    assert len(lists(app, "Consent")) - before < len(many) / 2


async def test_a_refusal_is_heard_of_an_app_that_stops_to_look_at_all_of_a_list() -> None:
    patients = ["1", "2", "3", "4"]
    app, clock = App([consent(one) for one in patients], says_whom=True), Clock()
    facts = source(app, clock)
    for looks_at in (4, 4, 2, 1, 1):
        app.looks_at = looks_at
        answer = await facts.load(FHIR, WHO, frozenset(patients))
        assert isinstance(answer, Facts)
        assert all(one.id for found in answer.consents.values() for one in found)
        assert all(answer.consents.values())
        clock.at += KEPT_S


async def test_a_consent_of_nobody_known_shows_no_understanding_of_lists() -> None:
    nobodys = consent("1", id="n") | {"patient": {"display": "?"}}
    app, clock = App([nobodys, consent("1")], literal=True), Clock()
    facts = source(app, clock)
    for _ in range(2):
        await facts.load(FHIR, WHO, frozenset({"1", "2"}))
        clock.at += KEPT_S
    assert all(len(one) == 1 for one in lists(app, "Consent"))


async def test_of_a_list_that_an_app_does_not_understand_the_operator_is_told_nothing() -> None:
    app = App([consent("1"), consent("2"), consent("3")], looks_at=1, says_whom=True)
    # The search for relations is not tried otherwise, so it is another matter.
    app.answers = {"CareTeam": [], "Encounter": [], "Patient": []}
    with capture_logs() as logs:
        await load(app, "1", "2", "3")
    assert [one for one in logs if one.get("type") == "Consent"] == []


async def test_an_app_is_not_taken_to_understand_a_list_for_ever() -> None:
    app, clock = App([consent("1"), consent("2")]), Clock()
    facts = source(app, clock)
    for _ in range(2):
        await facts.load(FHIR, WHO, frozenset({"1", "2"}))
        clock.at += KEPT_S
    app.literal = True
    clock.at += UNDERSTOOD_S
    answer = await facts.load(FHIR, WHO, frozenset({"1", "2"}))
    assert isinstance(answer, Facts)
    assert all(answer.consents.values())


async def test_an_app_that_finds_nothing_for_anybody_has_shown_nothing() -> None:
    app, clock = App([consent("1")], literal=True), Clock()
    facts = source(app, clock)
    for _ in range(3):
        await facts.load(FHIR, WHO, frozenset({"1", "2"}))
        clock.at += KEPT_S
    assert all(len(one) == 1 for one in lists(app, "Consent"))


@pytest.mark.parametrize("asked", [("1",), ("1", "2")])
async def test_an_app_that_does_not_look_at_the_patient_is_not_relied_upon(
    asked: tuple[str, ...],
) -> None:
    app = App([consent("1"), consent("9")], ignores_patient=True)
    facts = await load(app, *asked)
    for patient in asked:
        assert [one.readable for one in facts.consents[patient]] == [False]


@pytest.mark.parametrize(
    ("url", "readable"),
    [
        ("http://x/r4/Consent?patient=1&_count=200", True),
        ("http://x/r4/Consent?patient:Patient=1", True),
        ("http://x/r4/Consent", True),
        ("http://x/r4/Consent?_count=200", False),
        ("http://x/r4/Consent?patients=1", False),
        ("http://x/r4/Consent?patient=http://x/r4/Patient/1", True),
        ("http://x/r4/Consent?patient=9,Patient%2F1", True),
        ("http://x/r4/Consent?patient=9&patient=1", True),
        ("http://x/r4/Consent?patient=", False),
        ("http://x/r4/Consent?patient=2", False),
        ("http://x/r4/Consent?patient=11", False),
        ("http://[", False),
    ],
)
async def test_an_app_that_says_that_it_dropped_the_patient_is_not_relied_upon(
    url: str, *, readable: bool
) -> None:
    bundle = {
        "resourceType": "Bundle",
        "type": "searchset",
        "total": 0,
        "link": [{"relation": "self", "url": url}],
    }
    facts = await load(App(answers={"Consent": bundle}), "1")
    assert [one.readable for one in facts.consents["1"]] == ([] if readable else [False])


@pytest.mark.parametrize("strange", ["1&status=x", "1,2", "../Patient/2", "a b", "", "é", "x" * 65])
async def test_an_id_that_is_none_reaches_no_url_and_is_denied(strange: str) -> None:
    app = App([team(strange)])
    facts = await load(app, strange)
    assert app.asked == []
    assert facts.care_team == frozenset()
    assert [one.readable for one in facts.consents[strange]] == [False]


async def test_a_withdrawn_consent_bites_within_two_seconds() -> None:
    app, clock = App(), Clock()
    facts = source(app, clock)
    await facts.load(FHIR, WHO, frozenset({"1"}))
    app.resources.append(consent("1"))
    clock.at += 1.9
    early = await facts.load(FHIR, WHO, frozenset({"1"}))
    assert isinstance(early, Facts)
    assert early.consents["1"] == ()
    assert len(app.asked) == 4
    clock.at += 0.1
    late = await facts.load(FHIR, WHO, frozenset({"1"}))
    assert isinstance(late, Facts)
    assert len(late.consents["1"]) == 1


async def test_what_is_forgotten_is_asked_again_at_once_also_for_other_routes() -> None:
    app = App()
    facts = source(app)
    await facts.load(MOODS, WHO, frozenset({"1"}))
    app.resources.append(consent("1"))
    facts.forget(FHIR, ["1"])
    again = await facts.load(MOODS, WHO, frozenset({"1"}))
    assert isinstance(again, Facts)
    assert len(again.consents["1"]) == 1


async def test_a_question_that_is_under_way_when_things_change_is_not_kept() -> None:
    app = App(gate=asyncio.Event())
    facts = source(app)
    first = asyncio.create_task(facts.load(FHIR, WHO, frozenset({"1"})))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    app.resources.append(consent("1"))
    facts.forget(FHIR)
    assert app.gate is not None
    second = asyncio.create_task(facts.load(FHIR, WHO, frozenset({"1"})))
    await asyncio.sleep(0)
    app.gate.set()
    await first
    for answer in (await second, await facts.load(FHIR, WHO, frozenset({"1"}))):
        assert isinstance(answer, Facts)
        assert len(answer.consents["1"]) == 1


async def test_many_who_ask_at_once_ask_the_app_once_and_one_who_leaves_takes_nothing() -> None:
    app = App([team("1")], gate=asyncio.Event())
    facts = source(app)
    tasks = [asyncio.create_task(facts.load(FHIR, WHO, frozenset({"1"}))) for _ in range(20)]
    for _ in range(3):
        await asyncio.sleep(0)
    tasks[0].cancel()
    assert app.gate is not None
    app.gate.set()
    answers = await asyncio.gather(*tasks[1:])
    assert len(app.asked) == 4
    assert all(isinstance(one, Facts) and one.care_team == {"1"} for one in answers)


async def test_a_route_without_facts_has_no_relations_and_asks_nobody() -> None:
    app = App([team("1"), consent("1")])
    facts = await load(app, "1", route=NONE)
    assert facts == Facts(consents={"1": ()})
    assert app.asked == []


async def test_a_source_that_speaks_no_fhir_is_a_failure() -> None:
    [alone] = compile_routes([NONE.settings])
    lost = Route(
        settings=MOODS.settings, name="moods", base="/m", upstream_scheme="http",
        upstream_authority="x", upstream_base="",
    )  # fmt: skip
    answer = await FactsSource([alone], App()).load(lost, WHO, frozenset({"1"}))
    assert isinstance(answer, Failed)


# --- What is forged, odd, slow or missing ---------------------------------------------------------

NOW = datetime.fromtimestamp(1.8e9, UTC)


def moment(hours: float) -> str:
    return (NOW + timedelta(hours=hours)).isoformat()


@pytest.mark.parametrize(
    "period",
    [{"end": moment(-0.1)}, {"start": moment(0.1)}, {"start": " 2999"}, {"start": "0"},
     {"start": ""}, {"end": ""}, {"end": "never"}, {"end": "9"}, {"end": None}, {"start": 2020},
     {"end": "2999-13"}, {"end": "2999-02-31"}, {"start": "20200101T00"}, {"end": "2027-W52"}],
)  # fmt: skip
async def test_a_relation_ends_to_the_moment_and_no_odd_period_makes_one(
    period: dict[str, Any],
) -> None:
    member = {"member": {"reference": "Practitioner/7"}, "period": period}
    for one in (team("1", period=period), team("1", participant=[member])):
        assert (await load(App([one]), "1")).care_team == frozenset()


@pytest.mark.parametrize(
    "period",
    [{"end": moment(0.1)}, {"start": moment(-0.1)}, {"start": "2027", "end": "2027"},
     {"end": "2027-01"}, {"start": "2027-01-15", "end": "2027-01-15"}, {"end": "9999-12-31"}, {}],
)  # fmt: skip
async def test_a_relation_lasts_as_long_as_its_period(period: dict[str, Any]) -> None:
    assert (await load(App([team("1", period=period)]), "1")).care_team == {"1"}


@pytest.mark.parametrize(
    "changes",
    [{"modifierExtension": [{"url": "urn:not"}]}, {"implicitRules": "urn:other"},
     {"participant": [{"member": {"reference": "Practitioner/7"},
                       "modifierExtension": [{"url": "urn:not"}]}]}],
)  # fmt: skip
async def test_what_says_that_it_means_something_else_is_no_relation(
    changes: dict[str, Any],
) -> None:
    assert (await load(App([team("1", **changes)]), "1")).care_team == frozenset()


@pytest.mark.parametrize("server", ["http://other.example/", "http://127.0.0.1:1/r4x/", "//x/"])
async def test_a_permission_about_another_servers_patient_permits_nothing(server: str) -> None:
    forged = consent("1") | {
        "patient": {"reference": f"{server}Patient/1"},
        "provision": {"type": "permit"},
    }
    [found] = (await load(App([forged]), "1")).consents["1"]
    assert not found.readable
    assert found.in_force
    own = consent("1") | {"patient": {"reference": "http://127.0.0.1:1/r4/Patient/1"}}
    [found] = (await load(App([own]), "1")).consents["1"]
    assert found.readable


async def test_nobody_waits_for_an_answer_that_is_older_than_two_seconds() -> None:
    app, clock = App(gate=asyncio.Event()), Clock()
    facts = source(app, clock)
    first = asyncio.create_task(facts.load(FHIR, WHO, frozenset({"1"})))
    for _ in range(3):
        await asyncio.sleep(0)
    app.resources.append(consent("1"))
    clock.at += 3
    second = asyncio.create_task(facts.load(FHIR, WHO, frozenset({"1"})))
    for _ in range(3):
        await asyncio.sleep(0)
    assert app.gate is not None
    app.gate.set()
    await first
    for answer in (await second, await facts.load(FHIR, WHO, frozenset({"1"}))):
        assert isinstance(answer, Facts)
        assert len(answer.consents["1"]) == 1


@pytest.mark.parametrize("spelled", ["1.json", "01", "1a", "A1"])
async def test_another_spelling_of_a_patient_does_not_get_past_his_refusal(spelled: str) -> None:
    app = App([DOCTOR, consent("1"), team(spelled)])
    facts = await load(app, spelled, route=MOODS)
    assert facts.care_team == frozenset()
    assert [one.readable for one in facts.consents[spelled]] == [False]
    assert [one.readable for one in (await load(app, "1", route=MOODS)).consents["1"]] == [True]


async def test_a_patient_who_is_only_being_created_is_closed_to_nobody() -> None:
    assert (await load(App(), "new", route=FHIR)).consents == {"new": ()}


async def test_the_operator_is_told_once_why_an_app_without_consents_is_closed() -> None:
    app, clock = App([team("1")], answers={"Consent": 404}), Clock()
    facts = source(app, clock)
    with capture_logs() as told:
        for _ in range(3):
            clock.at += 10
            answer = await facts.load(FHIR, WHO, frozenset({"1"}))
            assert isinstance(answer, Facts)
            assert [one.readable for one in answer.consents["1"]] == [False]
    assert [one["event"] for one in told] == ["gateway.facts_unreadable"]
    assert "patient_consents" in told[0]["remedy"]
    assert told[0]["answered"] == "status 404"
    assert "Practitioner" not in str(told)


async def test_only_the_operator_says_that_an_app_has_no_consents() -> None:
    [without] = compile_routes([
        RouteSettings(name="fhir", kind="ehr", upstream="http://127.0.0.1:1/r4", path="/fhir",
                      strip_path=True, content="fhir", patient_consents="none"),
    ])  # fmt: skip
    app = App([team("1")], answers={"Consent": 404})
    answer = await FactsSource([without], app, clock=Clock(), now=lambda: 1.8e9).load(
        without, WHO, frozenset({"1"})
    )
    assert answer == Facts(care_team=frozenset({"1"}), consents={"1": ()})
    assert not any("Consent" in head.path for head in app.asked)


@pytest.mark.parametrize(
    "link", ["/r4/..", "/r4/%2e%2e/admin", "/r4/a/../../admin", "/r4//x", "/r4/%2Fx", "/r4/a%00"]
)
async def test_the_next_page_is_never_outside_of_the_apps_own_place(link: str) -> None:
    page = {"resourceType": "Bundle", "type": "searchset",
            "link": [{"relation": "next", "url": f"http://x{link}"}]}  # fmt: skip
    app = App(answers={"Consent": page})
    assert [one.readable for one in (await load(app, "1")).consents["1"]] == [False]
    assert {head.path for head in app.asked if "Consent" in head.path} == {"/r4/Consent"}
    assert len(app.asked) == 4
