"""`havengate study` with everything real but who sits at the terminal and the deployment."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from federated.approvals import Standing
from federated.cli import RunResult, Say, StudyCommands, StudyProgram, StudyReading, build
from federated.code_hash import installed_code_hash
from federated.draft import parse_draft, parse_study
from federated.errors import (
    ApprovalError,
    BudgetExhaustedError,
    FederatedError,
    LedgerError,
    ManifestError,
    StudyLogError,
)
from federated.ledger import Ledger
from federated.ledger_rows import parse_cost
from federated.manifest import canonical_json
from federated.model import Answer
from federated.node.enrolment import parse_enrolment
from federated.planning import (
    composed_epsilon,
    plan_study,
    study_costs,
    verify_claims,
    verify_within,
)
from federated.release.check import COORDINATORS_WORD, verify_document
from federated.release.document import (
    document_hash,
    encode_document,
    make_document,
    parse_document,
)
from federated.release.files import Reports
from federated.release.proof import make_release_proof, verify_release
from federated.research import read_release
from federated.settings import FederatedSettings
from federated.signed_study import SignedStudy, verify_study
from federated.study_log import make_bundle
from federated.study_store import Step
from federated.training_progress import KeptTrainings, progress_of
from policies.model import Principal
from tests.federated.ledgers import Adding, cost, entries_in
from tests.federated.release.changes import changed, leaves, others, spelled
from tests.federated.release.documents import Round, estimate, model
from tests.federated.studies import NOW, ORIGIN, StudyLog, study
from tests.federated.trails import MEMBER, NORTH, RESEARCHER, SOUTH, Trail

DRAFT = """
id = "sleep-and-phq9"
title = "Sleep and depression"
question = "How does PHQ-9 differ with hours slept, and how sure are we?"
valid_from = 1799990000
minimum_cohort = 1000
sites = ["north", "south"]

[aggregation]
threshold = 3

[[queries]]
epsilon = 0.5
delta = 5e-7
ask = { kind = "mean", name = "sleep", column = "sleep_hours" }

[[queries]]
epsilon = 0.5
ask = { kind = "mean", name = "mood", column = "mood" }
"""


NUMBERS = Answer(query="x", estimates=[estimate("mean", 7.1, 0.2, "h")])


class NothingKept:
    """No training was begun."""

    def read(self, query: str) -> None:
        del query


class Desk:
    """The commands over a trail; `who` sits at the terminal."""

    def __init__(self, folder: Path, *, cap: float = 2.0) -> None:
        self.folder = folder
        self.log = StudyLog(folder)
        self.writer = self.log.writer()
        self.trail = Trail(folder, log=self.writer)
        self.who: Principal = RESEARCHER
        self.fails: BaseException | None = None
        self.unanswered: dict[str, str] = {}
        self.runs = 0
        self.answers = True
        self.with_model: dict[str, Any] = {}
        self.ledger = Ledger(
            self.trail.database,
            accountant=Adding(),
            cap=cap,
            recorder=self.trail.recorder,
            tenant="clinic",
            clock=lambda: float(NOW),
            ids=iter(f"reservation-{n}" for n in range(100)).__next__,
        )
        self.reports = Reports(folder / "reports")
        self.trainings: KeptTrainings = NothingKept()
        self.app = build(
            StudyCommands(
                settings=lambda: FederatedSettings(minimum_cohort=100),
                roster=lambda: "ab" * 32,
                open_program=self.open,
                open_reading=self.look,
            )
        )

    def sign_in(self) -> Principal:
        return self.who

    @property
    def kept(self) -> Path:
        return self.folder / "reports" / "sleep-and-phq9" / "answer-kept.json"

    def close(self) -> None:
        self.trail.database.close()
        self.writer.close()

    @contextmanager
    def open(self) -> Iterator[StudyProgram]:
        yield StudyProgram(
            approvals=self.trail.approvals,
            ledger=self.ledger,
            reports=self.reports,
            sign_in=self.sign_in,
            run=self.run_study,
            entries=lambda: entries_in(self.log.directory),
            rosters=lambda: [["site:north"]],
            publish_log=self.publish,
            prove=self.prove,
        )

    @contextmanager
    def look(self) -> Iterator[StudyReading]:
        yield StudyReading(
            approvals=self.trail.reading,
            trainings=lambda of: progress_of(of, self.trainings),
        )

    def publish(self) -> None:
        with self.log.publisher(self.writer) as publisher:
            publisher.publish()

    def prove(self, index: int) -> bytes:
        self.publish()
        return make_release_proof(self.log.directory, index)

    def run_study(self, signed: SignedStudy, standing: Standing, say: Say) -> RunResult:
        """What the deployment does, but for the questions."""
        verify_study(signed, self.trail.trusted)
        if self.fails is not None:
            raise self.fails
        study = signed.study
        answers, models = [], []
        self.runs += 1
        for number, query in enumerate(study.queries):
            if query.name in self.unanswered:
                continue
            reservation = self.ledger.reserve(
                study=study.study_hash,
                round_id=f"{self.runs}-{number}",
                participants=["site:north", "site:south"],
                cost=study_costs(study)[query.name],
                within=partial(verify_within, study),
            )
            say(f"asking {query.name}")
            if json.loads(query.ask)["kind"] == "train":
                models.append(model(study, round_id=reservation.round, **self.with_model))
                self.ledger.spend(reservation)
                continue
            answer = Round(
                query=query.name,
                round_id=reservation.round,
                answer=NUMBERS,
                cost=study_costs(study)[query.name],
            )
            self.ledger.spend(reservation)
            answers.append(answer)
        (step,) = standing.record.of("publish")
        document = make_document(
            standing,
            signed,
            answers,
            models=models,
            failures=dict(self.unanswered),
            bundle=make_bundle(self.log.directory, step.log_index),
            origin=ORIGIN,
            charged=self.ledger.charges(study.study_hash),
            run_id=self.runs,
            at=NOW,
        )
        return RunResult(
            lines=["answered"],
            answer_hash=self.reports.keep(study, document) if self.answers else "",
            failures=dict(self.unanswered),
        )

    def __call__(self, *words: str, who: Principal | None = None) -> Result:
        self.who = who or RESEARCHER
        return CliRunner().invoke(self.app, list(words))

    def json(self, *words: str, who: Principal | None = None) -> Any:
        result = self(*words, "--json", who=who)
        assert result.exception is None, repr(result.exception)
        return json.loads(result.stdout)

    def propose(self, draft: str = DRAFT) -> None:
        (self.folder / "draft.toml").write_text(draft)
        whole = str(self.folder / "study.toml")
        self.json("plan", str(self.folder / "draft.toml"), "--people", "5068", "--out", whole)
        self.json("propose", whole)

    def approve(self, name: str = "sleep-and-phq9") -> None:
        for who, words in (
            (MEMBER, ["--as", "ethics-board", "--key", str(self.folder / "keys" / "board")]),
            (NORTH, ["--as", "site", "--site", "north", "--key", f"{self.folder}/keys/north"]),
            (SOUTH, ["--as", "site", "--site", "south", "--key", f"{self.folder}/keys/south"]),
        ):
            self.json("approve", name, *words, who=who)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.close()


def test_a_study_goes_from_draft_to_report(desk: Desk) -> None:
    desk.propose()
    assert desk.json("list")[0]["stage"] == "proposed"
    desk.approve()
    assert desk.json("show", "sleep-and-phq9")["stage"] == "published"
    ran = desk.json("run", "sleep-and-phq9")
    assert (ran["answers"], ran["failures"]) == (["answered"], {})
    found = desk.json("report", "sleep-and-phq9")
    assert found["answer_hash"] == ran["answer_hash"]
    document = parse_document(Path(found["answer"]).read_bytes())
    assert document_hash(document) == found["answer_hash"]
    page = Path(found["report"]).read_text()
    assert f"entry {found['log_index']}" in page
    assert "How does PHQ-9 differ with hours slept" in page
    said = [e for e in entries_in(desk.log.directory) if e.details.get("answer")]
    assert [(e.action, e.outcome) for e in said if e.outcome] == [
        ("study.run", "success"),
        ("study.release", "success"),
    ]
    assert {e.details["answer"] for e in said} == {found["answer_hash"]}
    assert desk.json("list")[0]["stage"] == "released"
    ledger = desk.json("ledger", "--participant", "site:north")
    assert ledger["rows"] == 4
    assert ledger["balances"]["site:north"]["epsilon"] == pytest.approx(1.0, rel=1e-3)


def test_a_released_answer_is_checked_by_whoever_has_the_public_keys(desk: Desk) -> None:
    desk.propose()
    desk.approve()
    desk.json("run", "sleep-and-phq9")
    found = desk.json("report", "sleep-and-phq9")
    keys = enrolled(desk)
    enrolment = desk.folder / "federation.json"
    enrolment.write_text(json.dumps(keys))
    words = ("verify", found["answer"], "--enrolment", str(enrolment))
    checked = desk.json(*words)
    assert (checked["answer"], checked["released"]) == (found["answer_hash"], True)
    assert found["answer_hash"] in desk(*words).stdout
    Path(found["proof"]).unlink()
    assert desk.json(*words)["word"] == list(COORDINATORS_WORD)
    assert "answers[].estimates[].value" in desk(*words).stdout
    enrolment.write_text(json.dumps({**keys, "witnesses": 2}))
    assert isinstance(desk(*words).exception, StudyLogError)
    keys["sites"].pop("north")
    enrolment.write_text(json.dumps(keys))
    assert isinstance(desk(*words).exception, ApprovalError)


def enrolled(desk: Desk) -> dict[str, Any]:
    """What somebody far away believes."""
    trusted = desk.trail.trusted
    return {
        "node": "all",
        "coordinator": [key.hex() for key in trusted.coordinator],
        "ethics_board": [key.hex() for key in trusted.ethics_board],
        "sites": {site: [key.hex() for key in of] for site, of in trusted.sites.items()},
        "origin": ORIGIN,
        "log_keys": [key.text for key in desk.log.keys],
        "witness_keys": [key.text for key in desk.log.witness_keys],
    }


def test_a_notebook_reads_a_release_as_far_as_it_is_proven(desk: Desk, tmp_path: Path) -> None:
    desk.propose()
    desk.approve()
    desk.json("run", "sleep-and-phq9")
    found = desk.json("report", "sleep-and-phq9")
    enrolment = tmp_path / "enrolment.json"
    enrolment.write_text(json.dumps(enrolled(desk)), encoding="utf-8")
    answer, proof = Path(found["answer"]), Path(found["proof"])
    assert proof == answer.with_name("answer.proof")
    release = read_release(answer, enrolment=enrolment)
    assert release.proven == "released"
    assert "this very answer was released" in str(release)
    # An estimate that was changed afterwards follows from nothing that was signed.
    document = parse_document(answer.read_bytes())
    document["answers"][0]["estimates"][0]["value"] += 0.125
    changed_answer = tmp_path / "answer.json"
    changed_answer.write_bytes(canonical_json(document))
    assert read_release(changed_answer, enrolment=enrolment).proven == "signed"
    with pytest.raises(StudyLogError, match="another answer was released"):
        read_release(changed_answer, enrolment=enrolment, proof=proof)


# Every leaf of a released document


def test_every_single_change_of_a_release_is_found(desk: Desk) -> None:
    desk.propose()
    desk.approve()
    desk.unanswered = {"mood": "Too few took part."}
    desk("run", "sleep-and-phq9")
    found = desk.json("report", "sleep-and-phq9")
    believed = parse_enrolment(json.dumps(enrolled(desk)).encode())
    document = parse_document(Path(found["answer"]).read_bytes())
    keys: dict[str, Any] = {
        "origin": ORIGIN,
        "log_keys": believed.log_verifiers(),
        "witness_keys": believed.witness_verifiers(),
    }
    proof = Path(found["proof"]).read_bytes()
    study = verify_document(document, believed.trusted(), **keys)
    verify_release(proof, study_hash=study.study_hash, answer_hash=document_hash(document), **keys)
    unproven: set[str] = set()
    tried = 0
    for path in leaves(document):
        value = document
        for key in path:
            value = value[key]
        for other in others(value):
            if json.dumps(other) == json.dumps(value):
                continue
            tried += 1
            one = changed(document, path, other)
            try:
                verify_document(one, believed.trusted(), **keys)
            except FederatedError:
                continue
            unproven.add(spelled(path))
            with pytest.raises(StudyLogError, match="another answer was released"):
                verify_release(
                    proof, study_hash=study.study_hash, answer_hash=document_hash(one), **keys
                )
    assert tried > 400
    assert unproven <= set(COORDINATORS_WORD), sorted(unproven - set(COORDINATORS_WORD))


def test_a_release_proof_is_of_this_study_and_this_answer_alone(desk: Desk) -> None:
    desk.propose()
    desk.approve()
    desk.json("run", "sleep-and-phq9")
    found = desk.json("report", "sleep-and-phq9")
    believed = parse_enrolment(json.dumps(enrolled(desk)).encode())
    document = parse_document(Path(found["answer"]).read_bytes())
    right: dict[str, Any] = {
        "study_hash": document["study"]["hash"],
        "answer_hash": found["answer_hash"],
        "origin": ORIGIN,
        "log_keys": believed.log_verifiers(),
        "witness_keys": believed.witness_verifiers(),
    }
    proof = Path(found["proof"]).read_bytes()
    verify_release(proof, **right)
    for wrong in (
        {"study_hash": "0" * 64},
        {"answer_hash": "0" * 64},
        {"origin": "log.example/other"},
        {"log_keys": ()},
        {"witness_keys": ()},
        {"witnesses": 2},
    ):
        with pytest.raises(StudyLogError):
            verify_release(proof, **{**right, **wrong})
    # The publication's own proof is in the same log, and proves no release.
    published = base64.b64decode(document["evidence"]["log_proof"])
    with pytest.raises(StudyLogError):
        verify_release(published, **right)


# What an approver is shown


def test_an_approver_reads_all_that_he_signs(desk: Desk) -> None:
    desk.propose()
    board = ["--as", "ethics-board", "--key", str(desk.folder / "keys" / "board")]
    text = desk("approve", "sleep-and-phq9", *board, who=MEMBER).stdout
    study = desk.trail.approvals.standing("sleep-and-phq9").study
    for words in (
        study.title, study.question, study.id, study.study_hash, study.roster, study.code_hash,
        "HRESCH", "2027-01-1", "1 of the ethics board, site north, site south",
        "mood, sleep_hours",
        "Answers      2 at most", "1000 people at least", "secure aggregation", "zero-out",
        "3 agree before a sum is unmasked", "modulo 2^64",
        "sleep: the mean over people (mean 'sleep'): column = sleep_hours",
        "discrete laplace noise of scale",
        "ε = 0.5 at δ = 5e-07", "ε = 0.5 at δ = 0\n",
    ):  # fmt: skip
        assert words in text, words
    shown = desk.json("show", "sleep-and-phq9")["signed"]
    assert canonical_json(shown) == study.canonical_bytes()


def test_approves_the_very_study_that_was_printed(desk: Desk) -> None:
    desk.propose()
    board = ["--as", "ethics-board", "--key", str(desk.folder / "keys" / "board")]
    wrong = desk("approve", "sleep-and-phq9", *board, "--hash", "0" * 64, who=MEMBER)
    assert isinstance(wrong.exception, ApprovalError)
    assert "another study now" in str(wrong.exception)

    def swap() -> Principal:
        with desk.trail.database.writing() as connection:
            manifest = study({"sleep-and-mood": "sleep-and-phq9"})
            connection.exec_driver_sql("DELETE FROM study_steps")
            connection.exec_driver_sql("DELETE FROM studies")
        desk.trail.approvals._store.add(manifest, Step(kind="propose", at_us=1, log_index=0))
        return MEMBER

    desk.sign_in = swap  # type: ignore[method-assign]
    result = desk("approve", "sleep-and-phq9", *board, who=MEMBER)
    assert isinstance(result.exception, ApprovalError)
    assert "another study now" in str(result.exception)
    assert desk.trail.approvals.standing("sleep-and-phq9").record.of("approve") == []


# Stopping, and runs that do not come to their end


def test_a_withdrawn_study_neither_runs_nor_is_released(desk: Desk) -> None:
    desk.propose()
    desk.approve()
    desk.json("run", "sleep-and-phq9")
    words = ("withdraw", "sleep-and-phq9", "--as", "ethics-board")
    assert isinstance(desk(*words).exception, ApprovalError)
    assert desk.json(*words, who=MEMBER)["stage"] == "withdrawn"
    for verb in ("run", "report"):
        result = desk(verb, "sleep-and-phq9")
        assert isinstance(result.exception, ApprovalError)
        assert "withdrawn" in str(result.exception)
    assert not (desk.folder / "reports" / "sleep-and-phq9" / "answer.json").exists()
    assert desk("watch", "sleep-and-phq9").stdout.splitlines()[-1].split()[3] == "withdraw"


def test_a_run_publishes_what_a_crash_left_approved(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.propose()
    with monkeypatch.context() as crash:
        crash.setattr(desk.trail.approvals, "publish", desk.trail.approvals.standing)
        desk.approve()
    assert desk.json("list")[0]["stage"] == "approved"
    # Whose word could publish it has spoken, and nobody speaks twice.
    south = ["--as", "site", "--site", "south", "--key", f"{desk.folder}/keys/south"]
    assert isinstance(desk("approve", "sleep-and-phq9", *south, who=SOUTH).exception, ApprovalError)
    assert desk.json("run", "sleep-and-phq9")["answers"] == ["answered"]
    assert desk.json("list")[0]["stage"] == "published"


def test_a_run_that_left_a_question_says_so_and_keeps_the_rest(desk: Desk) -> None:
    desk.propose()
    desk.approve()
    desk.unanswered = {"mood": "Too few took part."}
    result = desk("run", "sleep-and-phq9")
    assert result.exit_code == 1
    assert "What was answered is kept" in result.stdout
    found = desk.json("report", "sleep-and-phq9")
    assert [one["query"] for one in found["answers"]] == ["sleep"]
    document = parse_document(Path(found["answer"]).read_bytes())
    assert document["failures"] == {"mood": "Too few took part."}
    # Only what was reserved is charged.
    assert [one["round"] for one in document["privacy"]["charged"]] == ["1-0"]
    assert 0.4 < document["privacy"]["epsilon"] <= 0.5


def test_a_second_run_counts_all_that_the_study_ever_cost(desk: Desk) -> None:
    (desk.folder / "draft.toml").write_text(DRAFT.replace("sites =", "rounds = 4\nsites ="))
    whole = str(desk.folder / "study.toml")
    desk.json("plan", str(desk.folder / "draft.toml"), "--people", "5068", "--out", whole)
    desk.json("propose", whole)
    desk.approve()
    desk.unanswered = {"mood": "Too few took part."}
    desk("run", "sleep-and-phq9")
    first = parse_document((desk.kept).read_bytes())
    desk.unanswered = {"sleep": "It was not asked."}
    desk("run", "sleep-and-phq9")
    second = parse_document((desk.kept).read_bytes())
    assert [one["round"] for one in second["privacy"]["charged"]] == ["1-0", "2-1"]
    assert second["privacy"]["epsilon"] > first["privacy"]["epsilon"]
    # Neither run's answer is lost.
    assert (desk.kept.parent / "answer-kept-1.json").read_bytes() == encode_document(first)
    desk.unanswered = {}
    assert isinstance(desk("run", "sleep-and-phq9").exception, BudgetExhaustedError)
    assert parse_document((desk.kept).read_bytes()) == second


def propose_for_four_rounds(desk: Desk) -> None:
    (desk.folder / "draft.toml").write_text(DRAFT.replace("sites =", "rounds = 4\nsites ="))
    whole = str(desk.folder / "study.toml")
    desk.json("plan", str(desk.folder / "draft.toml"), "--people", "5068", "--out", whole)
    desk.json("propose", whole)
    desk.approve()


def test_that_no_round_is_left_out_is_listed_as_the_coordinators_word(desk: Desk) -> None:
    propose_for_four_rounds(desk)
    desk.unanswered = {"mood": "Too few took part."}
    desk("run", "sleep-and-phq9")
    desk.unanswered = {"sleep": "It was not asked."}
    desk("run", "sleep-and-phq9")
    document = parse_document(desk.kept.read_bytes())
    believed = parse_enrolment(json.dumps(enrolled(desk)).encode())
    shown = {**document["privacy"], "charged": document["privacy"]["charged"][1:]}
    (charge,) = shown["charged"]
    shown["epsilon"] = composed_epsilon(
        desk.trail.approvals.standing("sleep-and-phq9").study,
        [parse_cost(canonical_json(charge["cost"]).decode())],
    )
    assert shown["epsilon"] < document["privacy"]["epsilon"]
    # No signature says how often a study was run: nobody far away can see it.
    verify_document(
        {**document, "privacy": shown},
        believed.trusted(),
        origin=ORIGIN,
        log_keys=believed.log_verifiers(),
        witness_keys=believed.witness_verifiers(),
    )
    assert {"privacy.charged[]", "privacy.epsilon"} <= set(COORDINATORS_WORD)
    (desk.folder / "federation.json").write_text(json.dumps(enrolled(desk)))
    (desk.folder / "answer.json").write_bytes(encode_document(document))
    words = (
        "verify",
        f"{desk.folder}/answer.json",
        "--enrolment",
        f"{desk.folder}/federation.json",
    )
    assert "of the rounds that it lists" in desk(*words).stdout


@pytest.mark.parametrize("again", [False, True])
def test_a_release_says_what_a_later_run_cost_that_came_to_nothing(
    desk: Desk,
    again: bool,  # noqa: FBT001 - whether it was released before
) -> None:
    propose_for_four_rounds(desk)
    desk.unanswered = {"mood": "Too few took part."}
    desk("run", "sleep-and-phq9")
    first = parse_document(desk.kept.read_bytes())
    if again:
        assert desk.json("report", "sleep-and-phq9")["answer_hash"] == document_hash(first)
    one = desk.trail.approvals.standing("sleep-and-phq9").study
    # A run that was killed after it had reserved.
    desk.ledger.reserve(
        study=one.study_hash,
        round_id="2-1",
        participants=["site:north"],
        cost=study_costs(one)["mood"],
    )
    desk.fails = KeyboardInterrupt()
    desk("run", "sleep-and-phq9")
    desk.fails = None
    found = desk.json("report", "sleep-and-phq9")
    released = parse_document(Path(found["answer"]).read_bytes())
    privacy = released["privacy"]
    assert [charge["round"] for charge in privacy["charged"]] == ["1-0", "2-1"]
    assert privacy["epsilon"] > first["privacy"]["epsilon"]
    assert released == {**first, "privacy": privacy}
    assert desk.kept.read_bytes() == encode_document(first)
    believed = parse_enrolment(json.dumps(enrolled(desk)).encode())
    keys: dict[str, Any] = {
        "origin": ORIGIN,
        "log_keys": believed.log_verifiers(),
        "witness_keys": believed.witness_verifiers(),
    }
    verify_document(released, believed.trusted(), **keys)
    verify_release(
        Path(found["proof"]).read_bytes(),
        study_hash=one.study_hash,
        answer_hash=document_hash(released),
        **keys,
    )
    entry = entries_in(desk.log.directory)[found["log_index"]]
    assert entry.details["answer"] == document_hash(released)
    # With which answer a run ended that stands in this release.
    assert entry.details["kept"] == document_hash(first)


def test_a_ledger_that_lost_rows_makes_no_release_cheaper(desk: Desk) -> None:
    propose_for_four_rounds(desk)
    desk.unanswered = {"mood": "Too few took part."}
    desk("run", "sleep-and-phq9")
    one = desk.trail.approvals.standing("sleep-and-phq9").study
    desk.ledger.reserve(
        study=one.study_hash,
        round_id="2-1",
        participants=["site:north"],
        cost=study_costs(one)["mood"],
    )
    # As a backup had it that was made in between.
    with desk.trail.database.writing() as connection:
        connection.exec_driver_sql("DELETE FROM ledger_charges WHERE sequence > 2")
        connection.exec_driver_sql("DELETE FROM ledger_rows WHERE sequence > 2")
    assert isinstance(desk("report", "sleep-and-phq9").exception, LedgerError)
    assert not (desk.kept.parent / "answer.json").exists()
    assert desk.json("ledger", "--mend")["mended"] == 1
    found = desk.json("report", "sleep-and-phq9")
    document = parse_document(Path(found["answer"]).read_bytes())
    assert [charge["round"] for charge in document["privacy"]["charged"]] == ["1-0", "2-1"]


def test_no_release_stands_beside_the_proof_of_an_earlier_one(desk: Desk) -> None:
    propose_for_four_rounds(desk)
    desk.unanswered = {"mood": "Too few took part."}
    desk("run", "sleep-and-phq9")
    first = Path(desk.json("report", "sleep-and-phq9")["proof"])
    desk.unanswered = {"sleep": "It was not asked."}
    desk("run", "sleep-and-phq9")
    desk.prove = lambda index: b""  # type: ignore[method-assign] # noqa: ARG005 - its form
    found = desk.json("report", "sleep-and-phq9")
    assert found["proof"] == ""
    assert not first.exists()
    (desk.folder / "federation.json").write_text(json.dumps(enrolled(desk)))
    words = ("verify", found["answer"], "--enrolment", str(desk.folder / "federation.json"))
    assert desk.json(*words)["released"] is False


# What was kept between run and release


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_kept_answer_that_others_can_reach_is_not_released(desk: Desk, mode: int) -> None:
    desk.propose()
    desk.approve()
    desk.json("run", "sleep-and-phq9")
    desk.kept.chmod(mode)
    result = desk("report", "sleep-and-phq9")
    assert isinstance(result.exception, ManifestError)
    assert "not to be believed" in str(result.exception)


def test_a_kept_answer_that_was_changed_is_not_released(desk: Desk) -> None:
    desk.propose()
    desk.approve()
    desk.json("run", "sleep-and-phq9")
    document = json.loads(desk.kept.read_bytes())
    document["answers"][0]["estimates"][0]["value"] += 1
    desk.kept.write_bytes(encode_document(document))
    result = desk("report", "sleep-and-phq9")
    assert isinstance(result.exception, ApprovalError)
    assert "gave this answer" in str(result.exception)
    assert not (desk.kept.parent / "answer.json").exists()


def test_the_same_in_words(desk: Desk) -> None:
    desk.propose()
    assert "waits for approvals" in str(desk("run", "sleep-and-phq9").exception)
    assert "Waits for    1 of the ethics board, site north" in desk("show", "sleep-and-phq9").stdout
    desk.approve()
    assert "To give it out: havengate study report" in desk("run", "sleep-and-phq9").stdout
    text = desk("report", "sleep-and-phq9").stdout
    assert "mean: 7.10 h (6.90 to 7.30 at 95 %)" in text
    assert "The study has cost each person ε = " in text
    assert "released" in desk("list").stdout
    assert "4 rows, as they were written" in desk("ledger").stdout
    steps = desk("watch", "sleep-and-phq9").stdout.splitlines()
    kinds = [line.split()[3] for line in steps]
    assert kinds == [
        "propose", "approve", "approve", "approve", "publish", "run", "answer", "release",
    ]  # fmt: skip


def test_the_plan_says_cost_and_error_before_anything_is_asked(desk: Desk) -> None:
    (desk.folder / "draft.toml").write_text(DRAFT)
    found = desk.json("plan", str(desk.folder / "draft.toml"), "--people", "5068")
    assert found["epsilon"] == pytest.approx(1.0, rel=0.05)
    sleep, mood = found["queries"]
    assert sleep["epsilon"] <= 0.5 * (1 + 1e-9)
    assert mood["mechanism"] == "discrete_laplace"
    assert 0 < sleep["expected"][0]["half_width_without_noise"] < sleep["expected"][0]["half_width"]
    few = desk.json("plan", str(desk.folder / "draft.toml"), "--people", "100")
    assert few["queries"][0]["expected"][0]["half_width"] > sleep["expected"][0]["half_width"]
    assert (
        "Nothing was asked yet"
        in desk("plan", str(desk.folder / "draft.toml"), "--people", "5068").stdout
    )
    assert not entries_in(desk.log.directory)


def test_the_planned_study_is_whole_and_true(desk: Desk) -> None:
    desk.propose()
    study = parse_study((desk.folder / "study.toml").read_bytes())
    assert study.code_hash == installed_code_hash()
    assert study.columns == ("mood", "sleep_hours")
    verify_claims(study)
    assert desk.trail.approvals.standing(study.id).study == study


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace("scale = ", "scale = 0.5 # "), "costs ε ="),
        (lambda text: text.replace('columns = ["mood"]', 'columns = ["steps"]'), "other columns"),
        (lambda text: text.replace('column = "mood"', 'column = "moood"'), "mood"),
        (lambda text: text.replace("minimum_cohort = 1000", "minimum_cohort = 99"), "at least"),
        (lambda text: text + "\nx = 1\n", "Unknown key"),
    ],
)
def test_refuses_a_study_that_promises_what_it_does_not_keep(
    desk: Desk, change: Callable[[str], str], says: str
) -> None:
    (desk.folder / "draft.toml").write_text(DRAFT)
    whole = desk.folder / "study.toml"
    desk.json("plan", str(desk.folder / "draft.toml"), "--people", "5068", "--out", str(whole))
    changed = change(whole.read_text())
    assert changed != whole.read_text()
    whole.write_text(changed)
    result = desk("propose", str(whole))
    assert isinstance(result.exception, ManifestError)
    assert says in str(result.exception)
    assert desk.json("list") == []


def test_a_total_that_is_too_small_is_refused(desk: Desk) -> None:
    (desk.folder / "draft.toml").write_text(DRAFT.replace("sites =", "epsilon = 0.6\nsites ="))
    plan = plan_study(
        parse_draft((desk.folder / "draft.toml").read_bytes()),
        people=5068,
        level=0.95,
        roster="ab" * 32,
        code_hash="cd" * 32,
    )
    with pytest.raises(ManifestError, match="All answers together cost"):
        verify_claims(plan.study)


def test_one_word_against_ends_it(desk: Desk) -> None:
    desk.propose()
    found = desk.json("refuse", "sleep-and-phq9", "--as", "ethics-board", who=MEMBER)
    assert found["stage"] == "refused"
    assert isinstance(desk("run", "sleep-and-phq9").exception, ApprovalError)


def test_a_run_that_fails_is_recorded_and_has_no_answer(desk: Desk) -> None:
    desk.propose()
    desk.approve()
    desk.fails = BudgetExhaustedError("no")
    assert isinstance(desk("run", "sleep-and-phq9").exception, BudgetExhaustedError)
    last = entries_in(desk.log.directory)[-1]
    assert (last.action, last.outcome, last.reason) == (
        "study.run",
        "failed",
        "federated.budget_exhausted",
    )
    assert isinstance(desk("report", "sleep-and-phq9").exception, ManifestError)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), RuntimeError("mood 3")])
def test_a_run_that_anything_ends_is_recorded_as_failed(desk: Desk, error: BaseException) -> None:
    desk.propose()
    desk.approve()
    desk.fails = error
    desk("run", "sleep-and-phq9")
    last = entries_in(desk.log.directory)[-1]
    assert (last.action, last.stage, last.outcome) == ("study.run", "outcome", "failed")
    assert last.reason == "federated.run_ended"
    assert "mood" not in str(last)


def test_a_run_that_answered_no_question_is_not_called_a_success(desk: Desk) -> None:
    desk.propose()
    desk.approve()
    desk.answers = False
    assert "Nothing was answered." in desk("run", "sleep-and-phq9").stdout
    last = entries_in(desk.log.directory)[-1]
    assert (last.action, last.outcome, last.reason) == ("study.run", "failed", "federated.cohort")


def test_nothing_runs_on_a_ledger_that_lost_rows(desk: Desk) -> None:
    desk.propose()
    desk.approve()
    desk.ledger.reserve(study="0" * 64, round_id="r", participants=["site:north"], cost=cost(0.5))
    with desk.trail.database.writing() as connection:
        connection.exec_driver_sql("DELETE FROM ledger_charges")
        connection.exec_driver_sql("DELETE FROM ledger_rows")
    assert isinstance(desk("run", "sleep-and-phq9").exception, LedgerError)
    assert desk.json("ledger", "--mend", "--participant", "site:north")["mended"] == 1
    assert (
        desk.json("ledger", "--participant", "site:north")["balances"]["site:north"]["epsilon"]
        == 0.5
    )
    desk.json("run", "sleep-and-phq9")


def test_an_answer_is_given_out_only_after_the_log_took_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.propose()
    desk.approve()
    desk.json("run", "sleep-and-phq9")

    def away(*_: object, **__: object) -> int:
        raise ApprovalError("away")

    monkeypatch.setattr(desk.trail.approvals, "release", away)
    assert isinstance(desk("report", "sleep-and-phq9").exception, ApprovalError)
    folder = desk.folder / "reports" / "sleep-and-phq9"
    assert [file.name for file in folder.iterdir()] == ["answer-kept.json"]
    assert (folder / "answer-kept.json").stat().st_mode & 0o777 == 0o600


def test_the_kept_answer_must_be_this_studys(desk: Desk) -> None:
    desk.propose()
    desk.approve()
    desk.json("run", "sleep-and-phq9")
    document = json.loads(desk.kept.read_text())
    document["study"]["hash"] = "0" * 64
    desk.kept.write_bytes(encode_document(document))
    result = desk("report", "sleep-and-phq9")
    assert isinstance(result.exception, ManifestError)
    assert "another study's" in str(result.exception)


def test_a_key_is_made_once(desk: Desk) -> None:
    made = desk.json("key", str(desk.folder / "mine" / "key"))
    assert len(made["public_key"]) == 64
    assert isinstance(desk("key", made["file"]).exception, ApprovalError)
