"""Nothing is asked before its publication is what nodes will believe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from federated.coordinator import Coordinator, _Waiting
from federated.errors import StudyLogError
from federated.node.enrolment import Enrolment
from federated.study_log import verify_published
from federated.study_run import Deadlines
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
