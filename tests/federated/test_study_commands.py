"""`havengate study` with everything real but who sits at the terminal and the deployment."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from federated.approvals import Standing
from federated.cli import Say, StudyCommands, StudyProgram, build
from federated.code_hash import installed_code_hash
from federated.draft import parse_draft, parse_study
from federated.errors import (
    ApprovalError,
    BudgetExhaustedError,
    LedgerError,
    ManifestError,
)
from federated.ledger import Ledger
from federated.model import Answer
from federated.planning import composed_epsilon, plan_study, study_costs, verify_claims
from federated.release.document import document_hash, make_document, parse_document
from federated.release.files import Reports
from federated.settings import FederatedSettings
from federated.signed_study import SignedStudy, verify_study
from federated.study_log import make_bundle
from policies.model import Principal
from tests.federated.ledgers import Adding, cost, entries_in
from tests.federated.release.documents import Round, estimate
from tests.federated.studies import NOW, ORIGIN, StudyLog
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


class Desk:
    """The commands over a trail; `who` sits at the terminal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = StudyLog(folder)
        self.writer = self.log.writer()
        self.trail = Trail(folder, log=self.writer)
        self.who: Principal = RESEARCHER
        self.fails: BaseException | None = None
        self.answers = True
        self.ledger = Ledger(
            self.trail.database,
            accountant=Adding(),
            cap=2.0,
            recorder=self.trail.recorder,
            tenant="clinic",
            clock=lambda: float(NOW),
            ids=iter(f"reservation-{n}" for n in range(100)).__next__,
        )
        self.reports = Reports(folder / "reports")
        self.app = build(
            StudyCommands(
                settings=lambda: FederatedSettings(minimum_cohort=100),
                roster=lambda: "ab" * 32,
                open_program=self.open,
            )
        )

    def close(self) -> None:
        self.trail.database.close()
        self.writer.close()

    @contextmanager
    def open(self) -> Iterator[StudyProgram]:
        yield StudyProgram(
            approvals=self.trail.approvals,
            ledger=self.ledger,
            reports=self.reports,
            sign_in=lambda: self.who,
            run=self.run_study,
            entries=lambda: entries_in(self.log.directory),
            rosters=lambda: [["site:north"]],
            publish_log=self.publish,
        )

    def publish(self) -> None:
        with self.log.publisher(self.writer) as publisher:
            publisher.publish()

    def run_study(self, signed: SignedStudy, standing: Standing, say: Say) -> Sequence[str]:
        """What the deployment does, but for the questions."""
        verify_study(signed, self.trail.trusted)
        if self.fails is not None:
            raise self.fails
        study = signed.study
        answers = []
        for query in study.queries:
            reservation = self.ledger.reserve(
                study=study.study_hash,
                round_id=f"1-{query.name}-0",
                participants=["site:north", "site:south"],
                cost=cost(query.epsilon),
            )
            say(f"asking {query.name}")
            answer = Round(query=query.name, answer=NUMBERS, cost=study_costs(study)[query.name])
            self.ledger.spend(reservation)
            answers.append(answer)
        (step,) = standing.record.of("publish")
        document = make_document(
            standing,
            signed,
            answers if self.answers else [],
            failures={},
            bundle=make_bundle(self.log.directory, step.log_index),
            origin=ORIGIN,
            epsilon=composed_epsilon(study, list(study_costs(study).values())),
            delta=study.delta,
            run_id=1,
            at=NOW,
        )
        self.reports.keep(study, document)
        return ["answered"]

    def __call__(self, *words: str, who: Principal | None = None) -> Result:
        self.who = who or RESEARCHER
        return CliRunner().invoke(self.app, list(words))

    def json(self, *words: str, who: Principal | None = None) -> Any:
        result = self(*words, "--json", who=who)
        assert result.exception is None, repr(result.exception)
        return json.loads(result.stdout)

    def propose(self) -> None:
        (self.folder / "draft.toml").write_text(DRAFT)
        whole = str(self.folder / "study.toml")
        self.json("plan", str(self.folder / "draft.toml"), "--people", "5068", "--out", whole)
        self.json("propose", whole)

    def approve(self) -> None:
        for who, words in (
            (MEMBER, ["--as", "ethics-board", "--key", str(self.folder / "keys" / "board")]),
            (NORTH, ["--as", "site", "--site", "north", "--key", f"{self.folder}/keys/north"]),
            (SOUTH, ["--as", "site", "--site", "south", "--key", f"{self.folder}/keys/south"]),
        ):
            self.json("approve", "sleep-and-phq9", *words, who=who)


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
    assert desk.json("run", "sleep-and-phq9") == {
        "study": "sleep-and-phq9",
        "answers": ["answered"],
    }
    found = desk.json("report", "sleep-and-phq9")
    document = parse_document(Path(found["answer"]).read_bytes())
    assert document_hash(document) == found["answer_hash"]
    page = Path(found["report"]).read_text()
    assert f"entry {found['log_index']}" in page
    assert "How does PHQ-9 differ with hours slept" in page
    (entry,) = [e for e in entries_in(desk.log.directory) if e.details.get("answer")][1:]
    assert (entry.action, entry.outcome) == ("study.release", "success")
    assert entry.details["answer"] == found["answer_hash"]
    assert desk.json("list")[0]["stage"] == "released"
    ledger = desk.json("ledger", "--participant", "site:north")
    assert ledger["rows"] == 4
    assert ledger["balances"]["site:north"]["epsilon"] == 1.0


def test_a_released_answer_is_checked_by_whoever_has_the_public_keys(desk: Desk) -> None:
    desk.propose()
    desk.approve()
    desk.json("run", "sleep-and-phq9")
    found = desk.json("report", "sleep-and-phq9")
    keys = {
        "node": "all",
        "coordinator": [key.hex() for key in desk.trail.trusted.coordinator],
        "ethics_board": [key.hex() for key in desk.trail.trusted.ethics_board],
        "sites": {site: [key.hex() for key in of] for site, of in desk.trail.trusted.sites.items()},
        "origin": ORIGIN,
        "log_keys": [key.text for key in desk.log.keys],
        "witness_keys": [key.text for key in desk.log.witness_keys],
    }
    enrolment = desk.folder / "federation.json"
    enrolment.write_text(json.dumps(keys))
    words = ("verify", found["answer"], "--enrolment", str(enrolment))
    assert desk.json(*words)["answer"] == found["answer_hash"]
    assert found["answer_hash"] in desk(*words).stdout
    keys["sites"].pop("north")  # type: ignore[attr-defined]
    enrolment.write_text(json.dumps(keys))
    assert isinstance(desk(*words).exception, ApprovalError)


def test_the_same_in_words(desk: Desk) -> None:
    desk.propose()
    assert "waits for approvals" in str(desk("run", "sleep-and-phq9").exception)
    assert "Waits for    1 of the ethics board, site north" in desk("show", "sleep-and-phq9").stdout
    desk.approve()
    assert "To give it out: havengate study report" in desk("run", "sleep-and-phq9").stdout
    text = desk("report", "sleep-and-phq9").stdout
    assert "mean: 7.1 h (6.9 to 7.3 at 95 %)" in text
    assert "This cost each person ε = 1" in text
    assert "released" in desk("list").stdout
    assert "4 rows, as they were written" in desk("ledger").stdout
    steps = desk("watch", "sleep-and-phq9").stdout.splitlines()
    kinds = [line.split()[3] for line in steps]
    assert kinds == ["propose", "approve", "approve", "approve", "publish", "run", "release"]


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
        (lambda text: text.replace('"column" = "mood"', '"column" = "moood"'), "mood"),
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
    desk("run", "sleep-and-phq9")
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
    kept = desk.folder / "reports" / "sleep-and-phq9" / "answer-kept.json"
    document = json.loads(kept.read_text())
    document["study"]["hash"] = "0" * 64
    kept.write_text(json.dumps(document))
    result = desk("report", "sleep-and-phq9")
    assert isinstance(result.exception, ManifestError)
    assert "another study's" in str(result.exception)


def test_a_key_is_made_once(desk: Desk) -> None:
    made = desk.json("key", str(desk.folder / "mine" / "key"))
    assert len(made["public_key"]) == 64
    assert isinstance(desk("key", made["file"]).exception, ApprovalError)
