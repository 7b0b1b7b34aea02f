"""Replay lists exactly the past decisions that changed rules would decide anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from policies.bundle import load
from policies.cases import BUILT_IN, load_cases
from policies.engine import Engine
from policies.model import Allowed, Request
from policies.replay import Replay

CASES = load_cases([BUILT_IN])
CURRENT = Engine(load())


@dataclass(frozen=True, slots=True)
class Record:
    index: int
    allowed: bool
    request: Request | None


def records() -> list[Record]:
    return [
        Record(number, isinstance(CURRENT.decide(case.request), Allowed), case.request)
        for number, case in enumerate(CASES)
    ]


def test_unchanged_rules_change_nothing() -> None:
    run = Replay(current=CURRENT, changed=Engine(load()))
    assert list(run.run(records())) == []
    assert run.tally.same == run.tally.seen == len(CASES)


def test_a_rule_taken_away_shows_what_it_decided() -> None:
    run = Replay(current=CURRENT, changed=Engine(load().without("necessary.care-team")))
    found = list(run.run(records()))
    assert {(CASES[one.index].decides, one.kind) for one in found} == {
        ("necessary.care-team", "now_allowed")
    }


def test_a_new_rule_shows_what_it_would_deny_and_what_it_adds(tmp_path: Path) -> None:
    (tmp_path / "own.cedar").write_text(
        '@id("own.forum") @title("t") @cites("c") @reason("r") @remedy("purpose")\n'
        'forbid(principal, action == Action::"delete", resource in ServiceKind::"forum");\n'
        '@id("own.limit") @title("t") @cites("c") @grants("nothing") @obligation_limit_rows("3")\n'
        'permit(principal is User, action == Action::"search", resource is Record);'
    )
    run = Replay(current=CURRENT, changed=Engine(load([tmp_path])))
    found = {CASES[one.index].decides: one.kind for one in run.run(records())}
    assert found["forum.moderator"] == "now_denied"
    assert found["necessary.rows"] == "other_obligations"
    assert "role.clinician.read" not in found


def test_a_record_that_says_too_little_is_counted_and_not_judged() -> None:
    seen = [
        Record(0, allowed=True, request=None),
        Record(1, allowed=False, request=CASES[4].request),
    ]
    run = Replay(current=CURRENT, changed=Engine(load().without("role.clinician.read")))
    assert CASES[4].decides == "role.clinician.read"
    assert list(run.run(seen)) == []
    assert (run.tally.incomplete, run.tally.not_reproduced) == (1, 1)


def test_records_are_taken_one_at_a_time() -> None:
    taken = 0

    def endless() -> Iterator[Record]:
        nonlocal taken
        while True:
            taken += 1
            yield Record(taken, allowed=True, request=CASES[4].request)

    run = Replay(current=CURRENT, changed=Engine(load().without("role.clinician.read")))
    first = next(run.run(endless()))
    assert (first.index, taken) == (1, 1)
