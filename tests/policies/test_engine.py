"""Whatever goes wrong while deciding is a denial, and no short cut changes an answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

import cedarpy
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import bundle as bundles
from policies import engine as engines
from policies import facts
from policies.bundle import Bundle, load, parse_bundle
from policies.engine import Engine
from policies.model import (
    ACTIONS,
    CONFIDENTIALITY,
    LABELS,
    PURPOSES,
    ROLES,
    SERVICE_KINDS,
    Allowed,
    Assurance,
    BreakGlass,
    ConsentVerdict,
    Context,
    Denied,
    Destination,
    Principal,
    Remedy,
    Request,
    Resource,
)
from policies.obligations import ALL, Redact, StepUp

NOW = 1_800_000_000.0
SCHEMA = bundles.SCHEMA_FILE.read_text()
BUILT_IN = load()

PERMIT = '@id("t.permit") @title("t") @cites("t") permit(principal, action, resource);'
FORBID = '@id("t.forbid") @title("t") @cites("t") @reason("r") @remedy("consent") forbid'


def bundle_of(*texts: str) -> Bundle:
    return parse_bundle([("test.cedar", "\n".join(texts))], schema=SCHEMA)


def request(**changes: object) -> Request:
    asked = Request(
        principal=Principal(
            kind="user",
            id="t1",
            roles=frozenset({"clinician"}),
            assurance=Assurance(second_factor="totp", second_factor_at=NOW - 60),
            care_team=frozenset({"p1"}),
        ),
        action="read",
        resource=Resource(service="ehr", kind="ehr", type="Observation", patient="p1"),
        context=Context(purpose="TREAT", now=NOW),
    )
    return replace(asked, **changes)  # type: ignore[arg-type]


def broken(bundle: Bundle, *statements: str) -> Bundle:
    """Put policies in place that the schema would never let in: their conditions fail."""
    rules = []
    for place, statement in enumerate(statements):
        policy = msgspec.json.decode(cedarpy.policies_to_json_str(statement))
        model = bundle.rules[place % len(bundle.rules)]
        rules.append(replace(model, policy=policy["staticPolicies"]["policy0"], reads=None))
    return replace(bundle, rules=(*bundle.rules, *rules))


def test_cedar_itself_allows_when_a_forbid_fails() -> None:
    """The reason for the rule below: this is what the library does."""
    policies = (
        "permit(principal,action,resource); forbid(principal,action,resource) when {context.x};"
    )
    asked = {"principal": 'U::"a"', "action": 'A::"b"', "resource": 'R::"c"', "context": {}}
    answer = cedarpy.is_authorized(asked, policies, [])
    assert answer.allowed
    assert answer.diagnostics.errors


def test_denies_when_a_forbid_fails() -> None:
    bundle = broken(bundle_of(PERMIT), "forbid(principal,action,resource) when {context.nothing};")
    decision = Engine(bundle).decide(request())
    assert isinstance(decision, Denied)
    assert decision.failure == "policies.evaluation_failed"


def test_denies_when_a_permit_fails_beside_one_that_allows() -> None:
    bundle = broken(bundle_of(PERMIT), "permit(principal,action,resource) when {context.now.x};")
    assert isinstance(Engine(bundle).decide(request()), Denied)


def test_denies_when_an_answer_overflows() -> None:
    bundle = broken(
        bundle_of(PERMIT),
        "forbid(principal,action,resource) when {context.now + 9223372036854775807 > 0};",
    )
    assert isinstance(Engine(bundle).decide(request()), Denied)


@pytest.mark.parametrize(
    "conditions",
    [
        'when { OVERFLOW && principal.purpose == Purpose::"BTG" }',
        "when { OVERFLOW && resource.relation.author }",
        'when { OVERFLOW && resource in Label::"HIV" }',
        "when { OVERFLOW } when { resource.relation.author }",
        "unless { OVERFLOW || resource.relation.careTeam }",
        "unless { OVERFLOW } unless { resource.relation.careTeam }",
        'when { OVERFLOW || principal.purpose == Purpose::"BTG" }',
    ],
)
def test_a_rule_that_fails_before_its_guard_is_reached_is_not_left_out(conditions: str) -> None:
    """The schema cannot tell that a sum overflows: rules with guards behind one must be asked."""
    overflow = "context.now + 9223372036854775807 > 0"
    forbid = FORBID + "(principal, action, resource is Record) "
    bundle = bundle_of(PERMIT, forbid + conditions.replace("OVERFLOW", overflow) + ";")
    for engine in (Engine(bundle), Engine(bundle, whole=True)):
        decision = engine.decide(request())
        assert isinstance(decision, Denied)
        assert decision.failure == "policies.evaluation_failed"


def test_denies_when_nothing_allows() -> None:
    bundle = bundle_of(PERMIT.replace("action,", 'action == Action::"delete",'))
    assert Engine(bundle).decide(request()) == Denied(
        reason="No rule allows this.", rules=(), remedy=Remedy(kind="administrator")
    )


def test_a_rule_that_only_adds_obligations_never_allows() -> None:
    adding = PERMIT.replace("permit(", '@grants("nothing") @obligation_limit_rows("5") permit(')
    assert isinstance(Engine(bundle_of(adding)).decide(request()), Denied)


def test_obligations_of_all_rules_that_allowed_are_joined() -> None:
    one = PERMIT.replace("permit(", '@obligation_redact("A.x") permit(')
    two = one.replace("t.permit", "t.two").replace("A.x", "B.y, A.x")
    decision = Engine(bundle_of(one, two)).decide(request())
    assert isinstance(decision, Allowed)
    assert decision.obligations == (Redact(fields=frozenset({"A.x", "B.y"})),)
    assert decision.rules == ("t.permit", "t.two")


def test_denies_when_an_obligation_cannot_be_carried_out_here() -> None:
    bundle = bundle_of(PERMIT.replace("permit(", '@obligation_redact("A.x") permit('))
    decision = Engine(bundle).decide(request(), enforceable=ALL - {Redact})
    assert isinstance(decision, Denied)
    assert decision.failure == "policies.unenforceable"


def test_denies_an_obligation_that_nobody_knows() -> None:
    bundle = bundle_of(PERMIT)
    rule = replace(bundle.rules[0], obligations=(object(),))  # type: ignore[arg-type]
    assert isinstance(Engine(replace(bundle, rules=(rule,))).decide(request()), Denied)


def test_denies_when_the_second_factor_is_too_old_for_an_obligation() -> None:
    engine = Engine(bundle_of(PERMIT.replace("permit(", '@obligation_step_up("60") permit(')))
    fresh, old = request(), request(context=Context(purpose="TREAT", now=NOW + 0.5))
    allowed, denied = engine.decide(fresh), engine.decide(old)
    assert isinstance(allowed, Allowed)
    assert allowed.obligations == (StepUp(max_age_s=60),)
    assert isinstance(denied, Denied)
    assert (denied.remedy.kind, denied.rules) == ("step_up", ("t.permit",))


@pytest.mark.parametrize("shown_at", [None, NOW + 1])
def test_a_missing_or_future_second_factor_is_none(shown_at: float | None) -> None:
    engine = Engine(bundle_of(PERMIT.replace("permit(", '@obligation_step_up("60") permit(')))
    who = replace(
        request().principal, assurance=Assurance(second_factor="totp", second_factor_at=shown_at)
    )
    assert isinstance(engine.decide(request(principal=who)), Denied)


def test_denies_an_answer_that_came_too_late() -> None:
    times = iter([0.0, 0.6, 10.0, 10.4])
    engine = Engine(bundle_of(PERMIT), deadline_s=0.5, clock=lambda: next(times))
    late, in_time = engine.decide(request()), engine.decide(request())
    assert isinstance(late, Denied)
    assert late.failure == "policies.late"
    assert isinstance(in_time, Allowed)


@pytest.mark.parametrize(
    "asked",
    [
        request(principal=Principal(kind="user", id="x" * 600)),
        request(principal=Principal(kind="user", id="x", roles=frozenset(map(str, range(100))))),
        request(principal=Principal(kind="user", id="x", roles=frozenset({"r" * 600}))),
        request(principal=Principal(kind="user", id="x", scopes=frozenset(map(str, range(1000))))),
        request(resource=Resource(service="s", kind="ehr", type="T" * 600)),
        request(
            resource=Resource(
                service="s", kind="ehr", type="T", labels=frozenset(map(str, range(100)))
            )
        ),
        request(
            context=Context(
                purpose="TREAT",
                now=NOW,
                break_glass=BreakGlass(
                    reason="x" * 5000, patients=frozenset(), begins_at=NOW, ends_at=NOW
                ),
            )
        ),
    ],
)
def test_denies_a_request_larger_than_any_real_one(asked: Request) -> None:
    decision = Engine(bundle_of(PERMIT)).decide(asked)
    assert isinstance(decision, Denied)
    assert decision.failure == "policies.oversized"


@pytest.mark.parametrize("name", ["\ud800", "a\nb", '"', "\\", "\x00", "é" * 300, ""])
def test_strange_names_never_become_access_they_were_not_given(name: str) -> None:
    """Ids reach Cedar as data: none of them ends a string, a document or a rule."""
    engine = Engine(
        bundle_of(
            PERMIT.replace("(principal,", '(principal == User::"t1",'),
        )
    )
    decision = engine.decide(request(principal=replace(request().principal, id=name)))
    assert isinstance(decision, Denied)


def test_denies_when_the_rules_engine_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Sequence[str]:
        raise RuntimeError("out of order")

    engine = Engine(bundle_of(PERMIT))
    monkeypatch.setattr(engines, "_evaluate", fails)
    decision = engine.decide(request())
    assert isinstance(decision, Denied)
    assert decision.failure == "policies.RuntimeError"


@pytest.mark.parametrize("text", ["", "{}", '{"decision":"Maybe"}', "null"])
def test_denies_when_the_rules_engine_answers_nonsense(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    engine = Engine(bundle_of(PERMIT))
    monkeypatch.setattr(engines, "_evaluate", lambda *_: [text])
    assert isinstance(engine.decide(request()), Denied)


def test_a_denial_names_rule_reason_and_remedy() -> None:
    forbid = FORBID + "(principal, action, resource);"
    decision = Engine(bundle_of(PERMIT, forbid)).decide(request())
    assert isinstance(decision, Denied)
    assert (decision.reason, decision.rules, decision.remedy.kind) == (
        "r",
        ("t.forbid",),
        "consent",
    )
    assert decision.remedy.text


def test_no_denial_names_a_person() -> None:
    asked = request(principal=replace(request().principal, care_team=frozenset()))
    assert "t1" not in repr(Engine(BUILT_IN).decide(asked))
    assert "'t1'" not in repr(asked)
    assert "'p1'" not in repr(asked)


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "MAX_PREPARED", 8)
    monkeypatch.setattr(engines, "MAX_SETS", 3)
    engine = Engine(BUILT_IN)
    for number in range(200):
        who = replace(
            request().principal, id=str(number), roles=frozenset({ROLES[number % len(ROLES)]})
        )
        engine.decide(request(principal=who))
    assert len(engine._prepared) <= 8
    assert len(engine._parts) <= 3


# --- the short cuts change nothing ----------------------------------------------------------------

people = st.sampled_from(["t1", "t2", "p1", "p2"])
patients = st.frozensets(st.sampled_from(["p1", "p2"]))
names = st.one_of(st.none(), people)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    destination = draw(
        st.one_of(
            st.none(),
            st.none(),
            st.builds(
                Destination,
                host=st.just("h.example"),
                listed_for=st.frozensets(st.sampled_from(PURPOSES), max_size=3),
                encrypted=st.booleans(),
            ),
        )
    )
    begins_at = NOW + draw(st.sampled_from([-4000.0, -10.0, 10.0]))
    grant = BreakGlass(
        reason=draw(st.sampled_from(["", "a reason that says something"])),
        patients=draw(patients),
        begins_at=begins_at,
        ends_at=begins_at + draw(st.sampled_from([600.0, 3600.0, 20000.0])),
    )
    return Request(
        principal=Principal(
            kind=draw(st.sampled_from(["user", "user", "service", "anonymous"])),
            id=draw(people),
            roles=draw(st.frozensets(st.sampled_from(ROLES), max_size=3)),
            assurance=Assurance(
                second_factor=draw(st.sampled_from(["none", "totp"])),
                second_factor_at=NOW - draw(st.sampled_from([5.0, 1000.0, 90000.0])),
            ),
            patient=draw(names),
            represents=draw(patients),
            care_team=draw(patients),
            scopes=draw(
                st.sampled_from(
                    [None, None, frozenset(), frozenset({"user/*.rs", "system/Observation.cruds"})]
                )
            ),
            purposes=draw(st.frozensets(st.sampled_from(PURPOSES), max_size=4)),
        ),
        action="connect" if destination else draw(st.sampled_from(ACTIONS)),
        resource=Resource(
            service=draw(st.sampled_from(["s", "s2"])),
            kind="outbound" if destination else draw(st.sampled_from(SERVICE_KINDS)),
            type=draw(
                st.sampled_from(
                    ["Observation", "Patient", "Appointment", "Claim", "Post", "Location"]
                )
            ),
            id=draw(names),
            patient=draw(st.one_of(st.none(), st.sampled_from(["p1", "p2"]))),
            author=draw(names),
            labels=draw(st.frozensets(st.sampled_from(LABELS), max_size=3)),
            confidentiality=draw(st.sampled_from(CONFIDENTIALITY)),
            destination=destination,
        ),
        context=Context(
            purpose=draw(st.sampled_from(PURPOSES)),
            now=NOW,
            break_glass=draw(st.sampled_from([None, grant])),
            consent=ConsentVerdict(
                permits=draw(st.booleans()),
                denies=draw(st.sampled_from([False, False, True])),
                unreadable=draw(st.sampled_from([False, False, True])),
                authorises=draw(st.frozensets(st.sampled_from(LABELS), max_size=2)),
            ),
        ),
    )


#: Rules of forms that the built-in packs do not use, so that the choice of rules meets them, too.
ODD_RULES = """
@id("odd.id") @title("t") @cites("t") permit(principal == User::"t1", action, resource)
when { context has id && context.id == "t1" };
@id("odd.any") @title("t") @cites("t") @reason("r") @remedy("consent")
forbid(principal in Role::"quality", action in [Action::"read", Action::"count"], resource)
when { context == context && principal.purpose != Purpose::"TREAT" };
@id("odd.or") @title("t") @cites("t") permit(principal is Service, action, resource is Record)
when { principal.purpose == Purpose::"TREAT" || resource in Label::"HIV" }
when { resource.relation.author };
@id("odd.if") @title("t") @cites("t") @obligation_mask("A.b")
permit(principal, action, resource is Record in Label::"SUD")
when { if resource.hasPatient then principal.purpose in [Purpose::"TREAT"] else true };
@id("odd.late") @title("t") @cites("t") @reason("r") @remedy("consent")
forbid(principal is User, action, resource is Record)
when { principal.purpose == Purpose::"BTG" && principal.purpose in [Purpose::"TREAT"] };
@id("odd.whole") @title("t") @cites("t") @obligation_limit_rows("7")
permit(principal, action == Action::"history", resource is Record)
when { (if resource.hasPatient then context else context).now > 0 };
@id("odd.two") @title("t") @cites("t") @obligation_limit_rows("8")
permit(principal is User, action in [Action::"read", Action::"history"], resource is Record)
when { resource.relation.careTeam } unless { resource.relation.author || context has breakGlass }
when { principal.purpose == Purpose::"HRESCH" || principal.secondFactor };
@id("odd.unless") @title("t") @cites("t") @reason("r") @remedy("purpose")
forbid(principal, action == Action::"search", resource is Record)
unless { resource.hasPatient } when { context has patient && context.patient == "p2" };
"""
WITH_ODD = parse_bundle(
    [
        *((str(file), file.read_text()) for file in sorted(bundles.BUILT_IN.glob("*.cedar"))),
        ("odd.cedar", ODD_RULES),
    ],
    schema=SCHEMA,
)
FAST = Engine(WITH_ODD)
WHOLE = Engine(WITH_ODD, whole=True)
FORGETFUL = Engine(WITH_ODD, keep_answers=False)


@settings(max_examples=400, deadline=None)
@given(requests())
def test_choosing_rules_beforehand_never_changes_the_answer(asked: Request) -> None:
    expected = WHOLE.decide(asked)
    assert not isinstance(expected, Denied) or expected.failure is None
    assert FAST.decide(asked) == expected
    assert FORGETFUL.decide(asked) == expected


COMPILED = cedarpy.Schema.from_str(SCHEMA)


@settings(max_examples=150, deadline=None)
@given(requests())
def test_every_request_is_what_the_schema_says(asked: Request) -> None:
    """The rules were checked against the schema, so what they meet must be of its types."""
    principal, resource = facts.principal_uid(asked), facts.resource_uid(asked)
    cedar = {
        "principal": {"type": principal[0], "id": principal[1]},
        "action": {"type": "Action", "id": asked.action},
        "resource": {"type": resource[0], "id": resource[1]},
        "context": facts.circumstances(asked),
    }
    answer = cedarpy.is_authorized(
        cedar, "permit(principal, action, resource);", facts.entities(asked), COMPILED
    )
    assert answer.allowed, answer.diagnostics.errors


@settings(max_examples=150, deadline=None)
@given(requests())
def test_equal_keys_mean_equal_entities(asked: Request) -> None:
    other = replace(
        asked, context=replace(asked.context, now=NOW + 1), resource=replace(asked.resource, id="z")
    )
    assert facts.entity_key(asked) == facts.entity_key(other)
    assert facts.entities(asked) == facts.entities(other)


def one_thing_changed(one: Request, other: Request) -> Iterator[Request]:
    """`one` with a single field of its parts as in `other`, for every field."""
    for part in ("principal", "resource", "context"):
        mine, theirs = getattr(one, part), getattr(other, part)
        for leaf in fields(mine):
            changed = replace(mine, **{leaf.name: getattr(theirs, leaf.name)})
            yield replace(one, **{part: changed})
    for leaf in fields(one.context.consent):
        theirs = getattr(other.context.consent, leaf.name)
        consent = replace(one.context.consent, **{leaf.name: theirs})
        yield replace(one, context=replace(one.context, consent=consent))


@settings(max_examples=300, deadline=None)
@given(requests(), requests())
def test_nothing_is_kept_for_a_request_that_differs(one: Request, other: Request) -> None:
    """A key that forgets a fact would answer one person with what another may see."""
    for changed in one_thing_changed(one, other):
        if facts.entities(one) != facts.entities(changed):
            assert facts.entity_key(one) != facts.entity_key(changed)


# --- what nobody may rely on --------------------------------------------------------------------


class PanicError(BaseException):
    """What a panic of the rules engine looks like to Python: no `Exception`."""


def test_denies_when_the_rules_engine_panics(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Sequence[str]:
        raise PanicError

    engine = Engine(bundle_of(PERMIT))
    monkeypatch.setattr(engines, "_evaluate", fails)
    decision = engine.decide(request())
    assert isinstance(decision, Denied)
    assert decision.failure == "policies.PanicError"


@pytest.mark.parametrize(
    "words",
    [
        {"action": "peek"},
        {"resource": {"kind": "EHR"}},
        {"resource": {"labels": frozenset({"sud"})}},
        {"resource": {"labels": frozenset({"PSYTHPN "})}},
        {"resource": {"confidentiality": "r"}},
        {"context": {"purpose": "treat"}},
        {"principal": {"kind": "robot"}},
        {"principal": {"assurance": Assurance(second_factor="sms", second_factor_at=NOW)}},  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_denies_words_that_no_rule_knows(words: dict[str, object]) -> None:
    """A label in another spelling would slip past every rule that forbids it."""
    asked = request()
    for part, changes in words.items():
        changed = replace(getattr(asked, part), **changes) if isinstance(changes, dict) else changes
        asked = replace(asked, **{part: changed})  # type: ignore[arg-type]
    assert isinstance(Engine(bundle_of(PERMIT)).decide(asked), Denied)


@pytest.mark.parametrize(
    "who",
    [
        {"care_team": frozenset()},
        {"roles": frozenset({"administrator"})},
        {"roles": frozenset({"billing"})},
        {"roles": frozenset()},
        {"assurance": Assurance()},
        {"scopes": frozenset()},
        {"kind": "service", "purposes": frozenset()},
        {"kind": "anonymous"},
    ],
    ids=str,
)
@pytest.mark.parametrize("label", LABELS)
def test_who_may_not_see_a_record_anyway_does_not_learn_what_is_in_it(
    who: dict[str, object], label: str
) -> None:
    engine = Engine(BUILT_IN)
    asked = request(principal=replace(request().principal, **who))  # type: ignore[arg-type]
    special = replace(
        asked,
        resource=replace(asked.resource, labels=frozenset({label}), confidentiality="V"),
        context=replace(asked.context, consent=ConsentVerdict(denies=True)),
    )
    plain, told = engine.decide(asked), engine.decide(special)
    assert isinstance(plain, Denied)
    assert isinstance(told, Denied)
    assert (told.reason, told.remedy) == (plain.reason, plain.remedy)
