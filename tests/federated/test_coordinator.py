"""Nothing is asked before its publication is what nodes will believe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from audit.errors import LogUnavailableError
from federated.coordinator import Coordinator, WithinStudy, _Waiting, ask_all
from federated.errors import (
    AccountingError,
    ApprovalError,
    BudgetExhaustedError,
    CohortError,
    DeploymentError,
    LedgerError,
    ProtocolError,
    StudyLogError,
)
from federated.node.enrolment import Enrolment
from federated.planning import composed_epsilon, study_costs, verify_within
from federated.study_log import verify_published
from federated.study_run import Deadlines, RoundOutcome
from tests.federated.ledgers import MemoryLog, close_all, make_ledger
from tests.federated.release.documents import CHANGES
from tests.federated.studies import ORIGIN, StudyLog, study


def coordinator(log: StudyLog, wait: Any) -> Coordinator:
    believed = Enrolment(
        node="all",
        coordinator=("00" * 32,),
        ethics_board=("00" * 32,),
        origin=ORIGIN,
        log_keys=tuple(key.text for key in log.keys),
        witness_keys=tuple(key.text for key in log.witness_keys),
    )
    nothing = cast("Any", None)
    return Coordinator(
        access=nothing,
        roster=nothing,
        believed=believed,
        ledger=nothing,
        log=log.directory,
        trainings=log.directory / "trainings",
        query=nothing,
        deadlines=Deadlines(),
        wait=wait,
    )


def test_waits_for_the_witness_before_anybody_is_asked(tmp_path: Path) -> None:
    log = StudyLog(tmp_path)
    witnesses, log.witnesses = log.witnesses, ()
    index = log.append_published(study())
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        log.witnesses = witnesses
        with log.writer() as writer, log.publisher(writer) as publisher:
            publisher.publish()

    bundle = coordinator(log, wait)._published(index, study().study_hash, _Waiting(wait))
    assert len(waited) == 1
    verify_published(
        bundle,
        study_hash=study().study_hash,
        log_keys=log.keys,
        witness_keys=log.witness_keys,
    )


def test_asks_nobody_where_no_witness_ever_answers(tmp_path: Path) -> None:
    log = StudyLog(tmp_path, witnessed=False)
    index = log.append_published(study())
    waited: list[float] = []
    with pytest.raises(StudyLogError, match="cosigned"):
        coordinator(log, waited.append)._published(
            index, study().study_hash, _Waiting(waited.append)
        )
    assert 25 < sum(waited) < 35


# What was answered is kept


@dataclass
class Scripted:
    """A run whose rounds end as the test says."""

    ends: Mapping[str, BaseException | None]
    asked: list[str] = field(default_factory=list)

    def ask(self, name: str, round_number: int) -> RoundOutcome:
        self.asked.append(f"{round_number}:{name}")
        error = self.ends[name]
        if error is not None:
            raise error
        return cast("RoundOutcome", name)


NAMES = {"one": 0, "two": 1, "three": 2}


@pytest.mark.parametrize(
    ("error", "goes_on"),
    [
        (CohortError("too few"), True),
        (ProtocolError("broken"), True),
        (BudgetExhaustedError("no more"), True),
        (LedgerError("away"), False),
        (LogUnavailableError("The log is away."), False),
        (DeploymentError("gone"), False),
        (AccountingError("unbounded"), False),
        (KeyboardInterrupt(), False),
        (RuntimeError("mood 3"), False),
    ],
)
def test_an_answer_outlives_a_failure_that_comes_after_it(
    error: BaseException,
    goes_on: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    run = Scripted({"one": None, "two": error, "three": None})
    said: list[str] = []
    answers, failures = ask_all(run, NAMES, say=said.append)
    assert [str(one) for one in answers] == (["one", "three"] if goes_on else ["one"])
    told = str(error)
    if isinstance(error, KeyboardInterrupt | RuntimeError):
        told = f"The run was ended ({type(error).__name__})."
    assert failures["two"] == told
    assert set(failures) == ({"two"} if goes_on else {"two", "three"})
    assert run.asked == (["0:one", "1:two", "2:three"] if goes_on else ["0:one", "1:two"])
    assert said == [f"two: {told}"]


@pytest.mark.parametrize(
    "error", [BudgetExhaustedError("no"), LedgerError("away"), KeyboardInterrupt()]
)
def test_a_run_that_answered_nothing_raises_why(error: BaseException) -> None:
    run = Scripted(
        {"one": error, "two": CohortError("too few"), "three": BudgetExhaustedError("x")}
    )
    with pytest.raises(type(error)) as caught:
        ask_all(run, NAMES)
    assert caught.value is error


def test_a_run_in_which_every_round_came_to_nothing_says_so() -> None:
    run = Scripted(dict.fromkeys(NAMES, CohortError("too few")))
    assert ask_all(run, NAMES) == ((), dict.fromkeys(NAMES, "too few"))


def test_a_study_that_is_stopped_between_two_questions_asks_no_more() -> None:
    run, looks = Scripted(dict.fromkeys(NAMES)), iter([None, ApprovalError("It was withdrawn.")])

    def still() -> None:
        error = next(looks)
        if error is not None:
            raise error

    answers, failures = ask_all(run, NAMES, still=still)
    assert ([str(one) for one in answers], run.asked) == (["one"], ["0:one"])
    assert failures["two"] == "It was withdrawn."
    assert "not asked" in failures["three"]


# What was approved bounds all runs together


def test_refuses_a_run_that_the_study_has_no_room_for(tmp_path: Path) -> None:
    ledger = make_ledger(f"sqlite:///{tmp_path}/l.sqlite3", MemoryLog(), cap=10.0)
    one = study(CHANGES)
    costs = study_costs(one)
    within = WithinStudy(study=one, ledger=ledger)
    within.verify_room(list(costs.values()))
    for number, price in enumerate(costs.values()):
        within.spend(
            within.reserve(
                study=one.study_hash, round_id=f"1-{number}", participants=["a"], cost=price
            )
        )
    with pytest.raises(BudgetExhaustedError, match=r"approved for 2 round\(s\)"):
        within.verify_room(list(costs.values()))
    with pytest.raises(BudgetExhaustedError, match="approved for 2"):
        within.reserve(
            study=one.study_hash, round_id="2-0", participants=["b"], cost=costs["sleep"]
        )
    assert ledger.balance("b").releases == 0
    close_all()


def test_rounds_that_were_approved_are_still_bounded_by_what_they_may_cost() -> None:
    one = study({**CHANGES, "minimum_cohort": "rounds = 9\nminimum_cohort"})
    sleep, mood = study_costs(one).values()
    verify_within(one, [sleep, mood])
    # Asked again, what was learned before may have chosen the question: costs add up.
    assert composed_epsilon(one, [sleep, mood]) < sleep.epsilon + mood.epsilon
    with pytest.raises(BudgetExhaustedError):
        verify_within(one, [sleep, mood, sleep])


def test_asked_again_costs_add_up() -> None:
    one = study(CHANGES)
    sleep, mood = study_costs(one).values()
    light = [replace(price, epsilon=0.01, delta=1e-9) for price in (sleep, mood, sleep)]
    assert composed_epsilon(one, light) == pytest.approx(0.03)


def test_one_question_asked_twice_adds_up_though_another_was_never_asked() -> None:
    plain = study(CHANGES)
    first, second = plain.queries
    louder = replace(second, noise=replace(second.noise, scale=2 * second.noise.scale))
    one = replace(plain, queries=(first, louder))
    sleep, mood = study_costs(one).values()
    assert composed_epsilon(one, [sleep, mood]) < sleep.epsilon + mood.epsilon
    for price in (sleep, mood):
        twice = composed_epsilon(one, [price, price])
        assert twice == pytest.approx(2 * composed_epsilon(one, [price]), rel=0.2)
        assert twice >= 2 * price.epsilon * (1 - 1e-6)


def test_a_node_that_claims_more_than_there_is_costs_no_time(tmp_path: Path) -> None:
    log = StudyLog(tmp_path)
    index = log.append_published(study())
    waited: list[float] = []
    root, waiting = coordinator(log, waited.append), _Waiting(waited.append)
    for claimed in (1000, 2**62):
        with pytest.raises(StudyLogError, match="gets no proof"):
            root._published(index, study().study_hash, waiting, claimed)
    assert not waited


def test_all_proofs_of_a_run_wait_no_longer_than_one(tmp_path: Path) -> None:
    log = StudyLog(tmp_path, witnessed=False)
    index = log.append_published(study(), others=5)
    waited: list[float] = []
    root, waiting = coordinator(log, waited.append), _Waiting(waited.append)
    for size in range(1, 6):
        with pytest.raises(StudyLogError, match="cosigned"):
            root._published(index, study().study_hash, waiting, size)
    assert sum(waited) < 35
