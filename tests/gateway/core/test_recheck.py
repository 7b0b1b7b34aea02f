"""What is on its way ends soon after it may no longer pass, and the log says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from gateway.core import commands as c
from gateway.core.commands import Facts, Failed
from gateway.core.enforcement import Enforcement, Question, Reply, Steps
from gateway.core.exchange import Site
from gateway.core.handler import Inspected, Streamed
from gateway.core.messages import RequestHead
from gateway.core.recheck import RECHECK_S
from gateway.facts import KEPT_S
from gateway.identity.model import Identified, NotIdentified
from gateway.settings import RouteSettings
from policies.consent import parse_consent
from policies.model import BreakGlass
from policies.settings import PoliciesSettings
from policies.store import InForce, load_in_force
from tests.gateway.core.world import NOW, World, clinician, get, request, site

FILES = RouteSettings(name="files", kind="ehr", upstream="http://127.0.0.1:1")
#: Seconds of the clock from one look to the next.
STEP_S = 0.5
PIECES = [b"%04d" % number for number in range(40)]
#: No more than this passes after it may not: what comes before the next look.
MOST = int(RECHECK_S / STEP_S) + 1


class Pieces:
    """Passes what belongs to Patient/3."""

    def __init__(self, *questions: Question, public: bool = False) -> None:
        self.questions = questions or (Question(action="read", type="Observation", patient="3"),)
        self.public = public

    def plan(self, head: RequestHead) -> Inspected | Streamed:
        return Streamed(questions=self.questions, public=self.public)

    def exchange(self, enforcement: Enforcement, body: bytes) -> Steps[Reply]:
        raise AssertionError


@dataclass
class Changing(World):
    """Is as `World` until so many pieces have passed; then `later` answers first."""

    after: int = 8
    later: Callable[[c.Command], c.Answer | None] = lambda _: None
    passed_when_asked: list[int] = field(default_factory=list)

    def _passed(self) -> int:
        return len(self.sent or self.uploaded) // 4

    def _play(self, command: c.Command) -> c.Answer:
        if isinstance(command, c.Identify | c.LoadFacts):
            self.passed_when_asked.append(self._passed())
            if self._passed() >= self.after:
                answer = self.later(command)
                if answer is not None:
                    return answer
        return super()._play(command)


def ticking(where: Site) -> Site:
    times = count()
    return replace(where, clock=lambda: NOW + next(times) * STEP_S)


def treating(**changes: Any) -> Changing:
    world = Changing(care_team=frozenset({"3"}), body=PIECES, answer=PIECES)
    return replace(world, **changes)


def no_relation(command: c.Command) -> c.Answer | None:
    if isinstance(command, c.LoadFacts):
        return Facts(consents=dict.fromkeys(command.patients, ()))
    return None


def withdrawn(command: c.Command) -> c.Answer | None:
    if isinstance(command, c.LoadFacts):
        refusal = parse_consent({
            "resourceType": "Consent", "id": "9", "status": "active",
            "scope": {"coding": [{
                "system": "http://terminology.hl7.org/CodeSystem/consentscope",
                "code": "patient-privacy",
            }]},
            "patient": {"reference": "Patient/3"},
            "provision": {"type": "deny"},
        })  # fmt: skip
        return Facts(care_team=frozenset({"3"}), consents={"3": (refusal,)})
    return None


def signed_out(command: c.Command) -> c.Answer | None:
    if isinstance(command, c.Identify):
        return NotIdentified(reason="revoked", credentials_given=True)
    return None


def somebody_else(command: c.Command) -> c.Answer | None:
    return clinician(id="another") if isinstance(command, c.Identify) else None


def directory_is_down(command: c.Command) -> c.Answer | None:
    return Failed(code="gateway.directory") if isinstance(command, c.Identify) else None


def facts_are_down(command: c.Command) -> c.Answer | None:
    return Failed(code="gateway.facts") if isinstance(command, c.LoadFacts) else None


CHANGES = [
    (no_relation, "gateway.no_longer_allowed"),
    (withdrawn, "gateway.no_longer_allowed"),
    (signed_out, "gateway.session_ended"),
    (somebody_else, "gateway.session_ended"),
    (directory_is_down, "gateway.directory"),
    (facts_are_down, "gateway.facts"),
]


def test_nothing_that_was_asked_longer_ago_counts() -> None:
    assert KEPT_S <= RECHECK_S <= 5


def test_what_nobody_takes_back_passes_whole_and_is_asked_about_again_and_again() -> None:
    world = treating()
    summary = world.run(get("/x"), ticking(site(FILES, Pieces())))
    assert (summary.failure, bytes(world.sent)) == (None, b"".join(PIECES))
    assert len(world.intents()) == len(world.outcomes()) == 1
    gaps = zip(world.passed_when_asked, world.passed_when_asked[1:], strict=False)
    assert all(later - earlier <= MOST for earlier, later in gaps)
    assert len(world.passed_when_asked) > 2 * len(PIECES) / (MOST + 1)


@pytest.mark.parametrize(("later", "code"), CHANGES)
def test_an_answer_ends_soon_after_it_may_not_be_seen(
    later: Callable[[c.Command], c.Answer | None], code: str
) -> None:
    world = treating(later=later)
    summary = world.run(get("/x"), ticking(site(FILES, Pieces())))
    assert summary.failure == code
    assert world.after <= len(world.sent) // 4 <= world.after + MOST
    assert world.asked[-2:] == [c.EndResponse(broken=True), c.CloseUpstream()]
    first, cut = world.intents()
    assert (first.act.decision, cut.act.decision) == ("allow", "deny")
    assert (cut.act.reason, cut.act.patients) == (code, ("Patient/3",))
    assert cut.act.details["stream"] == "0" * 32
    assert [one.end.outcome for one in world.outcomes()] == ["success", "aborted"]


@pytest.mark.parametrize(("later", "code"), CHANGES)
def test_an_upload_ends_soon_after_it_may_not_be_made(
    later: Callable[[c.Command], c.Answer | None], code: str
) -> None:
    question = Question(action="update", type="Observation", patient="3")
    world = treating(later=later)
    head = request("PUT", "/x", content_length=str(4 * len(PIECES)))
    summary = world.run(head, ticking(site(FILES, Pieces(question))))
    assert summary.failure == code
    assert world.after <= len(world.uploaded) // 4 <= world.after + MOST
    # The app is left without the end of it, and nothing of its answer is waited for.
    assert c.SendUpstream(data=None) not in world.asked
    assert "CloseUpstream" in world.names()
    assert "ReceiveHead" not in world.names()
    assert world.outcomes()[0].end.outcome in {"denied", "failed"}
    assert world.status in {403, 503}


def test_the_log_names_the_rule_that_ended_it() -> None:
    world = treating(later=withdrawn)
    world.run(get("/x"), ticking(site(FILES, Pieces())))
    assert any(rule.startswith("consent.") for rule in world.outcomes()[1].end.rules)
    assert b"consent." not in world.sent


def test_it_ends_also_when_the_log_cannot_say_why() -> None:
    class Mute(Changing):
        def _play(self, command: c.Command) -> c.Answer:
            if isinstance(command, c.RecordIntent) and self.names().count("RecordIntent") > 1:
                return Failed(code="audit.down")
            return super()._play(command)

    world = Mute(care_team=frozenset({"3"}), answer=PIECES, later=no_relation)
    world.run(get("/x"), ticking(site(FILES, Pieces())))
    assert len(world.sent) // 4 <= world.after + MOST
    assert c.EndResponse(broken=True) in world.asked


def test_an_answer_that_came_late_is_asked_about_before_its_head_leaves() -> None:
    world = treating(later=no_relation, after=0)
    times = iter([NOW, *(NOW + 30 + number for number in range(100))])
    where = replace(site(FILES, Pieces()), clock=lambda: next(times))

    def first_time(command: c.Command) -> c.Answer | None:
        known = world.names().count("LoadFacts") > 1
        return no_relation(command) if known else None

    world.later = first_time
    world.run(get("/x"), where)
    assert world.status == 403
    assert not world.names().count("StartResponse")
    assert [one.end.outcome for one in world.outcomes()] == ["denied"]


def test_what_was_changed_stands_in_the_log_as_changed_whatever_was_withdrawn_meanwhile() -> None:
    question = Question(action="create", type="Observation", patient="3")
    world = treating(later=no_relation, after=0)
    world.body = [b"1234"]
    # The body passes at once; the app thinks for half a minute.
    moments = iter([NOW] * 2 + [NOW + 30 + number for number in range(100)])
    where = replace(site(FILES, Pieces(question)), clock=lambda: next(moments))
    world.later = lambda command: (
        no_relation(command) if world.names().count("LoadFacts") > 1 else None
    )
    world.run(request("POST", "/x", content_length="4"), where)
    assert [one.end.outcome for one in world.outcomes()] == ["success", "aborted"]
    assert not world.sent


def rules(tmp_path: Path, *texts: str) -> InForce:
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.cedar").write_text(text)
    return load_in_force(PoliciesSettings(directory=str(tmp_path)))


CLOSED = """
@id("own.closed")
@title("Closed")
@cites("45 CFR 164.312(a)(1)")
@reason("Closed.")
@remedy("administrator")
forbid (principal, action, resource is Record);
"""
EMERGENCY = """
@id("own.emergency")
@title("Files in an emergency")
@cites("45 CFR 164.312(a)(2)(ii)")
permit (principal is User, action == Action::"read", resource is Record)
when {
  context has breakGlass && context.breakGlass.covers && context.breakGlass.secondsLeft > 0
};
"""


def test_a_rule_that_came_into_force_meanwhile_ends_what_is_open(tmp_path: Path) -> None:
    world = treating()
    before, after = load_in_force(PoliciesSettings()), rules(tmp_path, CLOSED)
    where = replace(
        ticking(site(FILES, Pieces())), in_force=lambda: after if len(world.sent) >= 32 else before
    )
    summary = world.run(get("/x"), where)
    assert summary.failure == "gateway.no_longer_allowed"
    assert 32 <= len(world.sent) <= 32 + 4 * MOST
    assert "own.closed" in world.outcomes()[1].end.rules


@pytest.mark.parametrize("how", ["closed", "over"])
def test_an_emergency_that_is_ended_ends_what_it_opened(tmp_path: Path, how: str) -> None:
    lasts_s = 3600 if how == "closed" else 12
    grant = BreakGlass(
        reason="unconscious in the hall",
        patients=frozenset({"3"}),
        begins_at=NOW - 60,
        ends_at=NOW + lasts_s,
    )
    opened: Identified = replace(clinician(), break_glass=grant)

    def later(command: c.Command) -> c.Answer | None:
        return clinician() if how == "closed" and isinstance(command, c.Identify) else None

    world = Changing(who=opened, answer=PIECES * 3, later=later)
    in_force = rules(tmp_path, EMERGENCY)
    diary = RouteSettings(name="diary", kind="mood", upstream="http://127.0.0.1:1")
    where = replace(ticking(site(diary, Pieces())), in_force=lambda: in_force)
    summary = world.run(get("/x"), where)
    assert summary.failure == "gateway.no_longer_allowed"
    assert 0 < len(world.sent) < len(b"".join(PIECES * 3))


def test_a_second_factor_that_grows_older_does_not_cut_off_what_it_opened() -> None:
    mood = RouteSettings(name="diary", kind="mood", upstream="http://127.0.0.1:1")
    himself = replace(clinician(patient="3", roles=frozenset()), purpose="PATRQT")
    shown = replace(himself.principal.assurance, second_factor_at=NOW - 50)
    himself = replace(himself, principal=replace(himself.principal, assurance=shown))
    world = World(who=himself, answer=PIECES)
    times = count()
    where = replace(
        site(mood, Pieces(Question(action="read", type="Page", patient="3"))),
        clock=lambda: NOW + next(times) * 3_000,
    )
    summary = world.run(get("/a"), where)
    assert (summary.failure, bytes(world.sent)) == (None, b"".join(PIECES))


def test_a_clock_that_is_set_back_puts_no_look_off() -> None:
    world = treating(later=no_relation, after=2)
    times = iter([NOW, NOW, *(NOW - 1_000 + number * STEP_S for number in range(200))])
    where = replace(site(FILES, Pieces()), clock=lambda: next(times))
    summary = world.run(get("/x"), where)
    assert summary.failure == "gateway.no_longer_allowed"


def test_what_is_open_to_everybody_asks_the_rules_again_but_nobody_to_sign_in(
    tmp_path: Path,
) -> None:
    line = RouteSettings(name="line", kind="crisis", upstream="http://127.0.0.1:1")
    nobody = NotIdentified(reason="no_credentials")
    world = World(who=nobody, answer=PIECES)
    public = Pieces(Question(action="read", type="Page"), public=True)
    summary = world.run(get("/"), ticking(site(line, public)))
    assert (summary.failure, bytes(world.sent)) == (None, b"".join(PIECES))
    assert world.names().count("Identify") == 1
    world = World(who=nobody, answer=PIECES)
    after = rules(tmp_path, CLOSED)
    before = load_in_force(PoliciesSettings())
    where = replace(
        ticking(site(line, public)), in_force=lambda: after if len(world.sent) >= 32 else before
    )
    summary = world.run(get("/"), where)
    assert summary.failure == "gateway.no_longer_allowed"
