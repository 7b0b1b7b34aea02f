"""What `havengate study` says of studies: in words for a terminal, as plain values for programs.

Whoever approves a study reads here all that he signs. Reads nothing and decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import typer

from federated.release.alarms import alarm_words
from federated.release.figures import figures

if TYPE_CHECKING:
    # Help must not wait for the libraries behind these.
    from federated.coordinator import StudyOutcome
    from federated.manifest import DeclaredQuery, Study
    from federated.planning import StudyPlan
    from federated.release.files import WrittenModel
    from federated.standing import Standing
    from federated.study_store import Step
    from federated.training_progress import TrainingProgress

#: What a kind of question asks for, before the words that it was declared with.
_ASKS: Final = {
    "count": "how many people",
    "histogram": "how many people fall into each interval",
    "mean": "the mean over people",
    "variance": "mean and variance over people",
    "quantiles": "quantiles over people",
    "association": "how two quantities go together",
    "split": "days above and below each person's own average",
    "contrast": "the difference between arms",
    "groups": "the mean in each group",
    "trend": "the mean week by week",
    "train": "a model, learned round by round from people's own days",
    "norms": "how long people's first updates of a model are, to fix a clip by",
    "evaluate": "how good a model is on people who were not trained on",
}
#: What is told of a training's progress.
_PROGRESS: Final = (
    "asked", "summed", "announced", "epsilon", "reserved", "delta", "over", "damaged",
)  # fmt: skip


def stage_of(standing: Standing) -> str:
    """The stage in one word."""
    return "released" if standing.released else standing.stage


def standing_object(standing: Standing) -> dict[str, Any]:
    """All about a study; `signed` is what signatures are of."""
    study = standing.study
    return {
        "id": study.id,
        "hash": study.study_hash,
        "title": study.title,
        "question": study.question,
        "stage": stage_of(standing),
        "missing": list(standing.missing),
        "epsilon": study.epsilon,
        "delta": study.delta,
        "trust_model": study.trust_model,
        "minimum_cohort": study.minimum_cohort,
        "columns": list(study.columns),
        "signed": json.loads(study.canonical_bytes()),
        "steps": [step_object(step) for step in standing.record.steps],
    }


def step_object(step: Step) -> dict[str, Any]:
    """One step of the paper trail."""
    return {
        "step": step.kind,
        "role": step.role,
        "site": step.site,
        "at": step.at_us // 1_000_000,
        "log_index": step.log_index,
    }


def step_line(step: Step) -> str:
    """One step in a line."""
    at = datetime.fromtimestamp(step.at_us / 1_000_000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    who = f"{step.role} {step.site}".strip()
    return f"{at}  {step.kind:8}  {who:24}  log entry {step.log_index}"


def progress_line(one: TrainingProgress) -> str:
    """How far a training has come, in a line."""
    if one.damaged:
        return f"{one.query}: what is kept of this training cannot be read"
    over = ", over" if one.over else ""
    return (
        f"{one.query}: {one.asked} of {one.announced} rounds asked, {one.summed} with a sum{over}; "
        f"ε = {one.epsilon:.2f} so far of {one.reserved:.3g}, at δ = {one.delta:.1g}"
    )


def progress_object(one: TrainingProgress) -> dict[str, Any]:
    """The same as plain values."""
    return {"training": one.query, **{name: getattr(one, name) for name in _PROGRESS}}


def show(standing: Standing, *, as_json: bool) -> None:
    """Say where a study stands."""
    waits = f", waits for {', '.join(standing.missing)}" if standing.missing else ""
    say(
        standing_object(standing),
        f"{standing.study.id}: {stage_of(standing)}{waits}",
        as_json=as_json,
    )


def print_study(standing: Standing) -> None:
    """Print a study, whole: everything that is signed, and where it stands."""
    study = standing.study
    typer.echo(f"{study.title}\n{study.question}\n")
    typer.echo(f"Stage        {stage_of(standing)}")
    if standing.missing:
        typer.echo(f"Waits for    {', '.join(standing.missing)}")
    for line in signed_lines(study):
        typer.echo(line)


def signed_lines(study: Study) -> Iterator[str]:
    """Everything that a signature below the study vouches for, in words, its hash last."""
    rules = study.aggregation
    board = f"{study.ethics_approvals} of the ethics board"
    yield f"Id           {study.id}"
    yield f"Purpose      {study.purpose} (HL7 PurposeOfUse)"
    yield f"Valid        {_time(study.valid_from)} to {_time(study.valid_until)}"
    yield f"Approvals    {', '.join([board, *(f'site {site}' for site in study.sites)])}"
    yield f"Reads        {', '.join(study.columns)}"
    yield f"Costs        ε = {study.epsilon:.3g} at δ = {study.delta:.1g} for each person, in all"
    yield f"Unit         {study.unit}, {study.adjacency} adjacency"
    yield f"Answers      {study.rounds} at most, over all runs{_training_rounds(study)}"
    yield f"Cohort       {study.minimum_cohort} people at least"
    yield f"Trust model  {study.trust_model.replace('_', ' ')}"
    yield (
        f"Nodes        {rules.threshold} agree before a sum is unmasked, "
        f"{rules.minimum_survivors} come to the end, {rules.colluding} may be in league; "
        f"sums modulo 2^{rules.modulus_bits}"
    )
    for key, value in sorted(study.run_config.items()):
        yield f"Run setting  {key} = {json.dumps(value)}"
    yield f"Roster       {study.roster}"
    yield f"Code         {study.code_hash}"
    for number, query in enumerate(study.queries, start=1):
        yield from _query_lines(number, query)
    yield f"Hash         {study.study_hash}"


def _training_rounds(study: Study) -> str:
    """That a training of many rounds is one answer, which is paid once."""
    from federated.learning.round_query import TrainQuery
    from federated.questions import declared_question

    asked = [declared_question(query.ask) for query in study.queries]
    rounds = sorted({query.rounds for query in asked if isinstance(query, TrainQuery)})
    if not rounds:
        return ""
    return f"; a training is one, of {' or '.join(map(str, rounds))} rounds"


def _query_lines(number: int, query: DeclaredQuery) -> Iterator[str]:
    yield f"Question {number}   {query.name}: {ask_in_words(query.ask)}"
    for line in learning_lines(query.ask):
        yield f"             {line}"
    yield f"             reads {', '.join(query.columns)}"
    yield (
        f"             {query.noise.mechanism.replace('_', ' ')} noise of scale "
        f"{query.noise.scale:.6g}: ε = {query.epsilon:.3g} at δ = {query.delta:.1g}"
    )


def ask_in_words(ask: str) -> str:
    """A question as it was declared, every word of it."""
    given: dict[str, Any] = json.loads(ask)
    kind, name = given.pop("kind", ""), given.pop("name", "")
    told = ", ".join(f"{key} = {_value(value)}" for key, value in given.items())
    return f"{_ASKS.get(kind, kind)} ({kind} {name!r}){': ' if told else ''}{told}"


def learning_lines(ask: str) -> Iterator[str]:
    """What a training or an evaluation asks, in plain words; nothing for a statistic."""
    from federated.learning.words import learning_pairs
    from federated.questions import declared_question

    for word, what in learning_pairs(declared_question(ask)):
        yield f"{word:9} {what}"


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_value(one)}" for key, one in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def _time(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def run_lines(outcome: StudyOutcome, document: Mapping[str, Any]) -> Iterator[str]:
    """What became of each question of a run, without numbers; what an audit found first."""
    for words in alarm_words(document):
        yield f"WARNING: {words}"
    for model in outcome.models:
        yield (
            f"{model.query}: trained, {model.people:,} people at {model.nodes} nodes in "
            f"{model.summed} of {model.announced} rounds"
        )
    for answer in outcome.answers:
        yield f"{answer.query}: answered, {answer.people:,} people at {answer.nodes} nodes"
    for name, why in outcome.failures.items():
        yield f"{name}: no answer. {why}"


def answer_lines(document: Mapping[str, Any]) -> Iterator[str]:
    """A released answer in lines; what an audit found against it first."""
    for words in alarm_words(document):
        yield f"WARNING: {words}"
    for one in document["models"]:
        yield from _model_lines(one)
    for one in document["answers"]:
        yield f"{one['query']}, {one['people']:,} people:"
        for estimate in one["estimates"]:
            value, low, high = figures(estimate["value"], estimate["low"], estimate["high"])
            level, unit = f"{100 * estimate['level']:g} %", estimate["unit"]
            yield f"    {estimate['name']}: {value} {unit} ({low} to {high} at {level})"
    for name, why in document["failures"].items():
        yield f"{name}: no answer. {why}"
    privacy = document["privacy"]
    epsilon, delta = privacy["epsilon"], privacy["delta"]
    yield f"The study has cost each person ε = {epsilon:.3g} at δ = {delta:.1g}, in all."


def _model_lines(one: Mapping[str, Any]) -> Iterator[str]:
    cost, audit, noise = one["cost"], one["audit"], one["noise"]
    yield (
        f"{one['query']}, a model of {one['people']:,} people at {one['nodes']} nodes or more, "
        f"from {one['summed']} sums of {one['asked']} rounds:"
    )
    yield f"    ε = {cost['epsilon']:.3g} at δ = {cost['delta']:.1g} for all rounds together"
    if audit is None:
        yield "    its noise was not audited"
        return
    yield (
        f"    audit: ε is at least {audit['lower_bound']:.3g} ({100 * audit['confidence']:g} %), "
        f"{audit['correct']} of {audit['guesses']} canaries guessed right; "
        f"noise {100 * noise['share']:.3g} % of what was planned"
    )


def model_file_lines(files: Iterable[WrittenModel]) -> Iterator[str]:
    """Where each model's files lie, with their digests; or why one is not there."""
    for one in files:
        if one.missing:
            yield f"Model  {one.path.name} was not written: {one.missing}"
        else:
            yield f"Model  {one.path} (SHA-256 {one.digest})"


def model_file_object(one: WrittenModel) -> dict[str, str]:
    """The same as plain values."""
    path = "" if one.missing else str(one.path)
    return {"query": one.query, "file": path, "sha256": one.digest, "missing": one.missing}


def plan_object(found: StudyPlan) -> dict[str, Any]:
    """A plan as plain values."""
    return {
        "id": found.study.id,
        "hash": found.study.study_hash,
        "epsilon": found.epsilon,
        "delta": found.delta,
        "queries": [
            {
                "query": one.query,
                "columns": sorted(one.columns),
                "epsilon": one.cost.epsilon,
                "delta": one.cost.delta,
                "mechanism": one.noise.mechanism,
                "scale": one.noise.scale,
                "people": one.people,
                "refused": one.refused,
                "expected": [
                    {
                        "name": error.name,
                        "unit": error.unit,
                        "half_width": error.half_width,
                        "half_width_without_noise": error.half_width_without_noise,
                    }
                    for error in one.expected
                ],
            }
            for one in found.queries
        ],
    }


def print_plan(found: StudyPlan) -> None:
    """A plan in words."""
    typer.echo(f"{found.study.title}\n{found.study.question}\n")
    for one in found.queries:
        typer.echo(
            f"{one.query}: ε = {one.cost.epsilon:.3g} at δ = {one.cost.delta:.1g}, "
            f"{one.noise.mechanism.replace('_', ' ')}; reads {', '.join(sorted(one.columns))}"
        )
        for line in learning_lines(found.study.query(one.query).ask):
            typer.echo(f"    {line}")
        if one.refused:
            typer.echo(f"    would be refused: {one.refused}")
        for error in one.expected:
            typer.echo(
                f"    {error.name}: ± {error.half_width:.3g} {error.unit} "
                f"(± {error.half_width_without_noise:.3g} without noise) at {100 * one.level:g} %"
            )
    typer.echo(
        f"\nAll together cost each person ε = {found.epsilon:.3g} at δ = {found.delta:.1g}. "
        f"With {found.queries[0].people:,} people. Nothing was asked yet."
    )


def say(found: object, text: str, *, as_json: bool) -> None:
    """Print one or the other."""
    if as_json:
        print_json(found)
    else:
        typer.echo(text)


def print_json(found: object) -> None:
    """Print one JSON object."""
    typer.echo(json.dumps(found, ensure_ascii=False))
