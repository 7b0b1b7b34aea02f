"""`havengate study` with a model: what is read before signing, shown, and given out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from federated.coordinator import StudyOutcome
from federated.learning.round_query import TrainQuery
from federated.learning.spec import PersonalHead
from federated.learning.words import exact, learning_pairs, training_lines
from federated.planning import study_costs
from federated.questions import declared_question
from federated.release.document import parse_document
from federated.study_log import StudyBundle
from federated.telling import answer_lines, run_lines, signed_lines
from federated.training_files import TrainingFiles
from federated.training_progress import progress_of
from federated.training_run import Kept, encode_kept
from tests.federated.learning.samples import LOGISTIC
from tests.federated.release.documents import (
    TRAINING,
    audited,
    make_trained,
    model,
    training_study,
)
from tests.federated.studies import study
from tests.federated.test_study_commands import Desk, enrolled
from tests.federated.trainings import train, training_world

RICH = {
    'name = "mood"\n': 'name = "mood"\nmodel = "mlp"\nhidden = [7, 5]\nmost = 31\n'
    "adaptive = { quantile = 0.6, rate = 0.3, low = 0.01, high = 9.5 }\n"
    "stop = { patience = 4, level = 0.9 }\nclip = 1.75\nscale = 2048.0\n",
    "work = { epochs = 4, rate = 2.0 }": "work = { epochs = 4, rate = 2.25, l2 = 0.015 }",
    'strategy = { kind = "fedavgm", rate = 0.5 }': 'strategy = { kind = "fedavgm", rate = 0.55, '
    "momentum = 0.85, nesterov = true, average_from = 3 }",
    "bins = 4": "bins = 12\nexamples = 13",
}
BUNDLE = StudyBundle(proof=b"", from_size=0, consistency=())


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path, cap=8.0)
    yield made
    made.close()


# What an approver reads


def test_an_approver_reads_every_word_of_a_training_and_its_evaluation() -> None:
    text = "\n".join(signed_lines(training_study(RICH)))
    for words in (
        "mood: a model, learned round by round from people's own days (train 'mood')",
        "predicts  whether mood is below 0 (positive minus negative affect",
        "from      sleep_hours (time asleep in the night",
        "bounds 4 to 10), and whether it is known",
        "steps 1 day before, less the person's own mean of earlier days",
        "bounds 0 to 20000",
        "one for each day",
        "neural network (MLP, tanh) of 7, 5 units",
        "6 at most; a person pays once for all of them",
        "4 steps of gradient descent a round, rate 2.25, weight decay 0.015",
        "the newest 31 examples of a person",
        "a length of 1.75 at most in the first round",
        "what 60 % of people stay within",
        "at rate 0.3, from 0.01 to 9.5",
        "integers 2048 times as large",
        "0.55 times people's mean change, with momentum 0.85 (Nesterov)",
        "the mean of the weights from round 3 on",
        "earlier, if 4 sums one after the other cannot be told from noise (level 0.9)",
        "30 % of people, drawn by their own node",
        "200 canaries: made-up people",
        "judges    the model that the training mood of this study gives",
        "only people who were never trained on",
        "a person counts fully from 13 examples on",
        "told apart at 12 steps",
        "of sex (0 female, 1 male, 2 other, as recorded), edges -0.5, 0.5, 1.5",
        "Answers      3 at most, over all runs; a training is one, of 6 rounds",
    ):
        assert words in text, words
    assert "Rounds       " not in text


def test_no_value_that_was_signed_is_left_out_of_the_words() -> None:
    for query in training_study(RICH).queries[1:]:
        asked = declared_question(query.ask)
        said = "\n".join(what for _, what in learning_pairs(asked))
        values = list(numbers(json.loads(query.ask)))
        assert len(values) > 8
        for value in values:
            shown = exact(value)
            assert shown in said or exact(100 * value) in said, value


def numbers(value: object) -> Iterator[float]:
    if isinstance(value, dict):
        for one in value.values():
            yield from numbers(one)
    elif isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def test_a_statistic_has_no_words_of_learning() -> None:
    text = "\n".join(signed_lines(study()))
    assert "Answers      2 at most, over all runs\n" in text
    for query in study().queries:
        assert list(learning_pairs(declared_question(query.ask))) == []


def test_a_plan_says_what_a_training_asks(desk: Desk) -> None:
    (desk.folder / "draft.toml").write_text(TRAINING)
    text = desk("plan", str(desk.folder / "draft.toml"), "--people", "1000").stdout
    for words in ("predicts  whether mood is below 0", "held out  30 %", "audit     200 canaries"):
        assert words in text, words


# What is given out


def approved(desk: Desk) -> None:
    desk.propose(TRAINING)
    desk.approve("low-mood")


def test_a_model_goes_from_draft_to_files_that_anybody_can_check(desk: Desk) -> None:
    approved(desk)
    desk.json("run", "low-mood")
    found = desk.json("report", "low-mood")
    assert found["alarms"] == []
    assert [one["query"] for one in found["models"]] == ["mood"]
    assert [Path(one["file"]).suffix for one in found["model_files"]] == [".safetensors", ".onnx"]
    for one in found["model_files"]:
        assert sha256(Path(one["file"]).read_bytes()).hexdigest() == one["sha256"]
    (desk.folder / "federation.json").write_text(json.dumps(enrolled(desk)))
    words = ("verify", found["answer"], "--enrolment", str(desk.folder / "federation.json"))
    assert desk.json(*words)["released"]
    assert "WARNING" not in desk(*words).stdout


def test_the_terminal_says_of_a_model_what_it_cost_and_where_it_lies(desk: Desk) -> None:
    approved(desk)
    desk.json("run", "low-mood")
    text = desk("report", "low-mood").stdout
    files = desk.json("report", "low-mood")["model_files"]
    for words in (
        "mood, a model of 940 people at 4 nodes or more, from 5 sums of 6 rounds:",
        "ε = 2 at δ = 1e-06 for all rounds together",
        "audit: ε is at least",
        "canaries guessed right; noise 101 % of what was planned",
        *(f"Model  {one['file']} (SHA-256 {one['sha256']})" for one in files),
    ):
        assert words in text, words
    assert "WARNING" not in text


def test_a_refuted_claim_is_released_and_is_the_first_that_is_said(desk: Desk) -> None:
    approved(desk)
    desk.with_model = {"audit": audited(study_costs(training_study())["mood"], right=1.0)}
    desk.json("run", "low-mood")
    result = desk("report", "low-mood")
    assert result.exit_code == 0
    assert result.stdout.startswith("WARNING: The audit refutes the privacy that is claimed")
    found = desk.json("report", "low-mood")
    assert found["alarms"] == [{"query": "mood", "finding": "claim_refuted"}]
    assert parse_document(Path(found["answer"]).read_bytes())["alarms"] == found["alarms"]
    (desk.folder / "federation.json").write_text(json.dumps(enrolled(desk)))
    words = ("verify", found["answer"], "--enrolment", str(desk.folder / "federation.json"))
    assert desk(*words).stdout.startswith("WARNING: The audit refutes")


def test_a_run_says_what_an_audit_found_before_anything_is_released(tmp_path: Path) -> None:
    of = training_study()
    trained = model(of, audit=audited(study_costs(of)["mood"], right=1.0))
    document, _ = make_trained(tmp_path, of, with_model={"audit": trained.audit})
    outcome = StudyOutcome(
        run_id=7, answers=[], models=[trained], failures={"sleep": "Too few."}, bundle=BUNDLE
    )
    first, second, third = run_lines(outcome, document)
    assert first.startswith("WARNING: The audit refutes")
    assert second == "mood: trained, 940 people at 4 nodes in 5 of 6 rounds"
    assert third == "sleep: no answer. Too few."


def test_a_model_that_was_not_audited_says_so(tmp_path: Path) -> None:
    of = training_study({"canaries = 200\n": "canaries = 0\n"})
    document, _ = make_trained(tmp_path, of, with_model={"audit": None, "noise": None})
    assert "    its noise was not audited" in list(answer_lines(document))


# Watching


def test_progress_is_that_of_a_real_training(tmp_path: Path) -> None:
    with training_world(tmp_path) as world:
        of = world.signed.study
        files = TrainingFiles(directory=tmp_path / "trainings", study_hash=of.study_hash)
        assert list(progress_of(of, files)) == []
        trained = train(world, tmp_path)
        (progress,) = progress_of(of, files)
        assert (progress.asked, progress.summed, progress.announced) == (6, 6, 6)
        assert progress.over
        assert progress.epsilon == pytest.approx(trained.cost.epsilon, rel=1e-3)
        assert progress.reserved == 12.0


def kept(desk: Desk, asked: int, sums: int, *, study_hash: str = "") -> None:
    """What a training keeps after so many rounds."""
    of = desk.trail.approvals.standing("low-mood").study
    files = TrainingFiles(directory=desk.folder / "trainings", study_hash=of.study_hash)
    secret = Kept(
        study=study_hash or of.study_hash,
        query="mood",
        state=b"the weights",
        audit=b"the coins",
        asked=asked,
        people=(900,) * sums,
    )
    files.write("mood", encode_kept(secret))
    desk.trainings = files


def test_watching_shows_how_far_a_training_has_come_and_never_its_weights(desk: Desk) -> None:
    approved(desk)
    watch = ("watch", "low-mood", "--timeout-s", "0")
    assert "rounds asked" not in desk(*watch).stdout
    seen = []
    for asked, sums in ((1, 0), (3, 2), (6, 5)):
        kept(desk, asked, sums)
        text = desk(*watch).stdout
        assert f"mood: {asked} of 6 rounds asked, {sums} with a sum" in text
        assert ("with a sum, over;" in text) == (asked == 6)
        assert "so far of 2, at δ = 1e-06" in text
        found = json.loads(desk(*watch, "--json").stdout.splitlines()[-1])
        assert (found["training"], found["asked"], found["summed"]) == ("mood", asked, sums)
        assert "weights" not in text
        assert "coins" not in text
        seen.append(found["epsilon"])
    assert 0 < seen[0] < seen[1] < seen[2] <= 2.0 * (1 + 1e-6)


def test_watching_goes_on_where_what_is_kept_is_damaged_or_another_studys(desk: Desk) -> None:
    approved(desk)
    kept(desk, 1, 1, study_hash="0" * 64)
    line = "mood: what is kept of this training cannot be read"
    assert line in desk("watch", "low-mood", "--timeout-s", "0").stdout
    (file,) = (desk.folder / "trainings").iterdir()
    file.write_bytes(b"cut")
    assert line in desk("watch", "low-mood", "--timeout-s", "0").stdout


def test_a_personal_head_is_read_before_it_is_signed() -> None:
    spec = replace(LOGISTIC, personal=PersonalHead(steps=3, rate=0.5, older=0.25))
    told = dict(training_lines(TrainQuery(spec=spec)))
    for word in ("personal", "25 %", "3 steps", "rate 0.5", "never sent"):
        assert word in told["model"]
