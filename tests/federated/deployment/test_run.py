"""A study's run over real processes: it answers, whatever one node or the SuperLink does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from federated.coordinator import StudyOutcome
from federated.deployment.processes import ChildProcess
from federated.errors import DeploymentError
from federated.signed_study import SignedStudy
from federated.study_run import Deadlines
from tests.federated.deployment.federation import Running, entries_of
from tests.openbao import wait_until

FAULTY = "node-1"


def verify_ledger(federation: Running, signed: SignedStudy, outcome: StudyOutcome) -> None:
    """Whatever happened: reserved once, spent if and only if there is an answer."""
    study = signed.study.study_hash
    reserved = federation.ledger.reservation(study=study, round_id=f"{outcome.run_id}-0")
    assert reserved is not None
    assert federation.ledger.is_spent(reserved) == bool(outcome.answers)
    federation.ledger.verify(entries_of(federation.log))


def run_with(federation: Running, fault: str) -> tuple[SignedStudy, StudyOutcome]:
    federation.wait_whole()
    (federation.places.node(FAULTY) / "fault").write_text(fault)
    signed = federation.approved()
    deadlines = Deadlines(greet_s=30.0, stage_s=60.0, stragglers_s=4.0)
    outcome = federation.run(signed, deadlines)
    verify_ledger(federation, signed, outcome)
    return signed, outcome


def test_a_study_is_answered_by_all_nodes(federation: Running) -> None:
    federation.wait_whole()
    signed = federation.approved()
    outcome = federation.run(signed)
    assert not outcome.failures
    (round_,) = outcome.answers
    assert (round_.nodes, round_.people, round_.dropped) == (5, 25, {})
    verify_ledger(federation, signed, outcome)
    assert any("hours" in receipt for receipt in federation.receipts("node-2"))


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "consistency", "unmask"])
def test_the_round_ends_with_those_who_survive_when_a_node_dies(
    federation: Running, stage: str
) -> None:
    _, outcome = run_with(federation, f"die {stage}")
    assert not outcome.failures
    (round_,) = outcome.answers
    # Who died after sending its vector is in the sum.
    assert round_.nodes == (5 if stage in {"consistency", "unmask"} else 4)


@pytest.mark.parametrize("fault", ["silent share", "shape mask", "twice mask"])
def test_the_round_ends_with_the_others_when_a_node_answers_wrongly(
    federation: Running, fault: str
) -> None:
    _, outcome = run_with(federation, fault)
    assert not outcome.failures
    (round_,) = outcome.answers
    assert round_.nodes == (5 if fault.startswith("twice") else 4)


def test_nothing_is_answered_below_the_minimum_and_it_stays_spent(federation: Running) -> None:
    federation.wait_whole()
    stopped = [federation.federation.node_pid(name) for name in ("node-4", "node-5")]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        signed = federation.approved()
        outcome = federation.run(signed, Deadlines(greet_s=6.0, stage_s=6.0, stragglers_s=1.0))
        assert "nodes are there" in outcome.failures["hours"]
        reserved = federation.ledger.reservation(
            study=signed.study.study_hash, round_id=f"{outcome.run_id}-0"
        )
        assert reserved is None
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def test_a_killed_superlink_never_leads_to_spending_twice(federation: Running) -> None:
    federation.wait_whole()
    superlink = federation.federation.superlink
    exits = superlink.exits

    def kill_at(line: str) -> None:
        if line.startswith("mask"):
            assert superlink.pid is not None
            os.kill(superlink.pid, signal.SIGKILL)

    signed = federation.approved()
    outcome = federation.coordinator(Deadlines(greet_s=30.0, stage_s=90.0, stragglers_s=20.0)).run(
        signed, say=kill_at
    )
    assert superlink.exits == exits + 1
    verify_ledger(federation, signed, outcome)
    rounds = [e for e in entries_of(federation.log) if e.action == "study.reserve"]
    ours = [e for e in rounds if e.details.get("study") == signed.study.study_hash]
    assert len([e for e in ours if e.stage == "outcome" and e.outcome == "success"]) == 1
    wait_until(lambda: answer_whole(federation), timeout_s=300)


def answer_whole(federation: Running) -> bool:
    """Whether a new run is answered by all five nodes.

    After its restart the SuperLink takes nodes for online that were so before and still pause. What
    asks them then may find too few, and costs nobody anything.
    """
    if online(federation) < 5:
        return False
    again = federation.approved()
    outcome = federation.run(again, Deadlines(greet_s=30.0, stage_s=60.0, stragglers_s=20.0))
    if not outcome.answers:
        return False
    verify_ledger(federation, again, outcome)
    return outcome.answers[0].nodes == 5


@contextmanager
def held_down(child: ChildProcess) -> Iterator[None]:
    """Kill a process, and again whenever it is started, with kill -9."""
    over = threading.Event()

    def kill() -> None:
        while not over.is_set():
            pid = child.pid
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            over.wait(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("stage", ["advertise", "mask", "unmask"])
def test_a_run_whose_superlink_stays_away_ends_and_stays_spent_and_the_next_one_works(
    federation: Running, stage: str
) -> None:
    federation.wait_whole()
    signed = federation.approved()
    short = Deadlines(greet_s=30.0, stage_s=5.0, stragglers_s=1.0)
    with ExitStack() as until_here:

        def kill_at(line: str) -> None:
            if line.startswith(stage):
                until_here.enter_context(held_down(federation.federation.superlink))

        outcome = federation.coordinator(short).run(signed, say=kill_at)
    assert not outcome.answers
    assert "The SuperLink did not answer" in outcome.failures["hours"]
    assert "stays spent" in outcome.failures["hours"]
    verify_ledger(federation, signed, outcome)
    # Nodes come back by themselves.
    wait_until(lambda: answer_whole(federation), timeout_s=300)


def online(federation: Running) -> int:
    """How many nodes the SuperLink knows as online; none while it is not there itself."""
    try:
        return len(federation.online())
    except DeploymentError:
        return 0
