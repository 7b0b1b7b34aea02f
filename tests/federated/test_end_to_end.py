"""One study, end to end, over real processes: key server, SuperLink, five nodes, TLS."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from federated.approvals import Approvals
from federated.database import StudyDatabase
from federated.errors import ApprovalError, BudgetExhaustedError, FederatedError
from federated.node.cli import device_app
from federated.node.consent import Consents
from federated.release.check import verify_document
from federated.release.document import document_hash, make_document
from federated.study_run import Deadlines
from federated.study_store import StudyStore
from policies.model import Assurance, Principal
from tests.federated.deployment.federation import (
    Running,
    agree,
    entries_of,
    ledger_over,
    recorder_over,
)
from tests.federated.studies import ORIGIN
from tests.federated.trails import ENGINE

CSV = "day,slept\n" + "".join(f"2026-03-{day:02},{6 + day % 3}\n" for day in range(1, 29))
MAPPING = """
source = "diary"
[day]
column = "day"
[columns.sleep_hours]
take = ["slept"]
unit = "h"
"""


def person(name: str, role: str) -> Principal:
    return Principal(
        kind="user",
        id=name,
        roles=frozenset({role}),
        assurance=Assurance(second_factor="totp", second_factor_at=time.time()),
    )


def device(federation: Running, name: str, *arguments: str) -> dict[str, object]:
    """Run `havengate device` on a node's store."""
    directory = federation.places.node(name)
    place = ["--store", f"{directory / 'device.store'}", "--key-file"]
    command = [*place, f"{directory / 'device.keys'}", *arguments, "--json"]
    done = CliRunner().invoke(device_app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, object] = json.loads(done.stdout)
    return found


def approvals_of(federation: Running, database: StudyDatabase) -> Approvals:
    return Approvals(
        StudyStore(database),
        recorder=recorder_over(federation.log),
        decide=ENGINE.decide,
        coordinator=federation.parties.coordinator,
        trusted=federation.parties.trusted,
        officers={"north": frozenset({"nora"}), "south": frozenset({"sven"})},
        tenant="clinic",
        clock=time.time,
    )


def test_a_study_from_the_import_to_the_release(federation: Running, tmp_path: Path) -> None:
    federation.wait_whole()
    (tmp_path / "diary.csv").write_text(CSV)
    (tmp_path / "diary.toml").write_text(MAPPING)
    imported = device(
        federation, "node-2", "import", f"{tmp_path / 'diary.csv'}",
        "--mapping", f"{tmp_path / 'diary.toml'}", "--person", "me",
    )  # fmt: skip
    assert imported["readings"] == 28

    study, parties = federation.study(), federation.parties
    database = StudyDatabase(f"sqlite:///{tmp_path / 'studies.sqlite3'}")
    try:
        approvals = approvals_of(federation, database)
        ruth = person("ruth", "researcher")
        approvals.propose(study, ruth)
        with pytest.raises(ApprovalError):
            approvals.start_run(study.id, ruth)
        approvals.approve(
            study.id, person("emil", "ethics-board"), capacity="ethics-board", signer=parties.board
        )
        for site, officer in (("north", "nora"), ("south", "sven")):
            approvals.approve(
                study.id, person(officer, "site-officer"), capacity="site", site=site,
                signer=parties.sites[site],
            )  # fmt: skip
        with federation.log.writer() as writer, federation.log.publisher(writer) as publisher:
            publisher.publish()

        run = approvals.start_run(study.id, ruth)
        outcome = federation.run(approvals.signed(study.id))
        assert not outcome.failures
        assert {one.people for one in outcome.answers} == {25}

        document = make_document(
            approvals.standing(study.id),
            approvals.signed(study.id),
            outcome.answers,
            failures=outcome.failures,
            bundle=outcome.bundle,
            origin=ORIGIN,
            charged=federation.ledger.charges(study.study_hash),
            run_id=outcome.run_id,
            at=time.time(),
        )
        approvals.end_run(run, answer_hash=document_hash(document))
        approvals.release(study.id, ruth, answer_hash=document_hash(document))
        assert approvals.standing(study.id).released
        checked = verify_document(
            document,
            parties.trusted,
            origin=ORIGIN,
            log_keys=federation.log.keys,
            witness_keys=federation.log.witness_keys,
        )
        assert checked == study
        # One round was approved, and it was: nobody is asked again.
        online = len(federation.receipts("node-3"))
        with pytest.raises(BudgetExhaustedError, match="approved for 1 round"):
            federation.run(approvals.signed(study.id))
        assert len(federation.receipts("node-3")) == online
    finally:
        database.close()

    verify_log(federation, study.study_hash)
    receipts = federation.receipts("node-2")
    assert any(study.id in receipt or study.title in receipt for receipt in receipts)


def verify_log(federation: Running, study_hash: str) -> None:
    """Every step is in the log, in order, and the ledger is what the log says."""
    entries = [
        entry
        for entry in entries_of(federation.log)
        if entry.stage == "outcome" and entry.details.get("study") == study_hash
    ]
    steps = [entry.action for entry in entries if entry.outcome == "success"]
    wanted = [
        "study.propose", "study.approve", "study.approve", "study.approve", "study.publish",
        "study.reserve", "study.spend", "study.run", "study.release",
    ]  # fmt: skip
    assert [step for step in steps if step in wanted] == wanted
    federation.ledger.verify(entries_of(federation.log))


def test_a_cohort_below_the_minimum_gets_no_answer_and_costs_nothing(federation: Running) -> None:
    federation.wait_whole()
    signed = federation.approved({"minimum_cohort = 6": "minimum_cohort = 26"})
    outcome = federation.run(signed)
    assert "at least 26" in outcome.failures["hours"]
    study = signed.study.study_hash
    assert federation.ledger.reservation(study=study, round_id=f"{outcome.run_id}-0") is None


def test_an_exhausted_budget_is_refused_before_anybody_is_asked(
    federation: Running, tmp_path: Path
) -> None:
    federation.wait_whole()
    signed = federation.approved()
    database = StudyDatabase(f"sqlite:///{tmp_path / 'ledger.sqlite3'}")
    try:
        small = ledger_over(database, federation.log, cap=0.5)
        before = len(federation.receipts("node-3"))
        with pytest.raises(BudgetExhaustedError):
            federation.coordinator(ledger=small).run(signed)
        (counted,) = federation.receipts("node-3")[before:]
        assert "Nothing of yours was read or spent" in counted
    finally:
        database.close()


def test_consent_that_was_taken_back_keeps_people_out(federation: Running) -> None:
    federation.wait_whole()
    before = len(federation.receipts("node-3"))
    store = federation.open_store("node-3")
    try:
        for one in store.people():
            Consents(store).revoke(one, now=int(time.time()))
        outcome = federation.run(
            federation.approved(), Deadlines(greet_s=30.0, stage_s=60.0, stragglers_s=4.0)
        )
        (round_,) = outcome.answers
        assert (round_.nodes, round_.people) == (4, 20)
        assert round_.dropped == {"node-3": "greet: no answer"}
    finally:
        agree(store)
        store.close()
    told = federation.receipts("node-3")
    assert len(told) > before
    assert any("You did not agree" in one for one in told)


def test_a_study_that_was_not_published_does_not_run(federation: Running) -> None:
    signed = federation.parties.sign(federation.study())
    with pytest.raises(FederatedError, match="not published"):
        federation.run(signed)


def test_a_study_for_other_nodes_does_not_run(federation: Running) -> None:
    signed = federation.approved({federation.roster.hash: "ab" * 32})
    with pytest.raises(ApprovalError, match="other nodes"):
        federation.run(signed)
