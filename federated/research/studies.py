"""A study before it is proposed: what it asks, what it costs, and the file that says so.

Pure. What a question is stands in `federated.questions`, what a study must hold to in
`federated.manifest`; `havengate study plan` takes what `draft_of` writes and fills in noise, roster
and code.
"""

from __future__ import annotations

import datetime as dt
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from federated.analytics import declare as statistics
from federated.analytics.base import BaseQuery
from federated.analytics.plan import QueryPlan
from federated.draft import Draft, parse_draft, toml_value
from federated.errors import ManifestError
from federated.learning import declare as learning
from federated.learning.evaluate import EvaluateQuery
from federated.learning.round_query import TrainQuery
from federated.planning import NO_ROSTER, StudyPlan, plan_study
from federated.questions import question_from, verify_together
from federated.research.show import Table

type Question = BaseQuery | TrainQuery | EvaluateQuery

#: Stands for the code that a study will run, where it is only looked at.
_NO_CODE: Final = "0" * 64
_LEVEL: Final = 0.95


def declared(ask: str | Mapping[str, Any], *, of: TrainQuery | None = None) -> Question:
    """The question of a declaration, as `[queries.ask]` of a study's file has it, or as a mapping.

    An evaluation takes what it leaves out from the training `of`. Raises `ManifestError`, one line
    for the first mistake: an unknown key with the nearest right name, an unknown column, bounds
    that bound nothing.
    """
    given = _read(ask) if isinstance(ask, str) else ask
    if of is not None and given.get("kind") == learning.EVALUATE:
        given = learning.complete([learning.declaration_of(of), {"of": of.name, **given}])[1]
    elif given.get("kind") == learning.TRAIN:
        (given,) = learning.complete([given])
    return question_from(given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question and what its answer may cost each person: ε at δ. Unit: the person, zero-out."""

    question: Question
    epsilon: float
    delta: float = 0.0


def draft_of(
    *asked: Asked,
    study: str,
    title: str,
    question: str,
    valid_from: dt.date,
    minimum_cohort: int,
    threshold: int,
    colluding: int = 1,
    sites: Sequence[str] = (),
) -> str:
    """The text of a study's file, which `havengate study plan FILE` takes. Writes nothing.

    `study` is its id. `threshold`: nodes that must come to the end of a round; `colluding`: nodes
    that may tell their own noise. What is asked is asked in this order; an evaluation needs its
    training beside it, and its declaration leaves out what that says already. Raises
    `ManifestError` for what cannot be asked together.
    """
    questions = [one.question for one in asked]
    verify_together(questions)
    trained = {
        one.name: learning.declaration_of(one) for one in questions if isinstance(one, TrainQuery)
    }
    head = {
        "id": study,
        "title": title,
        "question": question,
        "minimum_cohort": minimum_cohort,
        "sites": list(sites),
    }
    lines = [f"{key} = {toml_value(value)}" for key, value in head.items()]
    lines += [f"valid_from = {valid_from:%Y-%m-%d}", "", "[aggregation]"]
    lines += [f"threshold = {threshold}", f"colluding = {colluding}"]
    for one in asked:
        lines += ["", "[[queries]]", f"epsilon = {float(one.epsilon)!r}"]
        lines += [f"delta = {float(one.delta)!r}", "", "[queries.ask]"]
        lines += _ask_lines(_declaration(one.question, trained))
    text = "\n".join(lines) + "\n"
    parse_draft(text.encode())
    return text


@dataclass(frozen=True, slots=True)
class Plan:
    """What a study will cost and how sure it will be. A notebook shows it as a table.

    `found.study` names no nodes and no code: it is to be looked at, and cannot be proposed.
    """

    found: StudyPlan

    @property
    def table(self) -> Table:
        """A line for each error to expect; costs stand once for each question."""
        found = self.found
        people = found.queries[0].people
        note = (
            f"All together cost each person ε = {found.epsilon:.3g} at δ = {found.delta:.1g} "
            f"(unit: {found.study.unit}, adjacency: {found.study.adjacency}, trust: "
            f"{found.study.trust_model}). Errors are for {people:,} people: how wide intervals "
            "will be, not where they will lie. Nobody was asked anything."
        )
        return Table(
            title=f"{found.study.title}: {found.study.question}",
            columns=("question", "ε", "δ", "noise of a sum", "error of", "±", "± without noise"),
            rows=tuple(row for one in found.queries for row in _plan_rows(one)),
            notes=(note,),
        )

    def __str__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def plan(
    draft: str | Draft, *, people: int, nodes: int | None = None, level: float = _LEVEL
) -> Plan:
    """What a draft will cost and how sure it will be at `people`, with no node enrolled anywhere.

    Reads nobody's data. `nodes`: how many will answer; the fewest that the study allows if not
    given, with which errors are largest. The noise is that which `havengate study plan` will write.
    Raises `ManifestError` or `AccountingError`.
    """
    read = parse_draft(draft.encode()) if isinstance(draft, str) else draft
    return Plan(
        plan_study(
            read, people=people, level=level, roster=NO_ROSTER, code_hash=_NO_CODE, nodes=nodes
        )
    )


def _read(ask: str) -> Mapping[str, Any]:
    try:
        return tomllib.loads(ask)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ManifestError(f"The declaration is not valid TOML: {error}.") from error


def _plan_rows(one: QueryPlan) -> Iterator[tuple[str, ...]]:
    noise = f"{one.noise.mechanism.replace('_', ' ')}, scale {one.noise.scale:,.4g}"
    first = (one.query, f"{one.cost.epsilon:.3g}", f"{one.cost.delta:.1g}", noise)
    if one.refused:
        yield (*first, f"would be refused: {one.refused}", "", "")
    for error in one.expected:
        width = f"{error.half_width:.3g} {error.unit}".strip()
        yield (*first, error.name, width, f"{error.half_width_without_noise:.3g}")
        first = ("", "", "", "")


def _declaration(question: Question, trained: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    if isinstance(question, BaseQuery):
        return statistics.declaration_of(question)
    ask = learning.declaration_of(question)
    # What both have is what `complete` takes from the training; kind and name differ.
    of = trained[question.spec.name] if isinstance(question, EvaluateQuery) else {}
    return {key: value for key, value in ask.items() if of.get(key) != value}


def _ask_lines(ask: Mapping[str, Any]) -> Iterator[str]:
    """One key to a line, and one table of a list."""
    for key, value in ask.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{key} = ["
            yield from (f"    {toml_value(one)}," for one in value)
            yield "]"
        else:
            yield f"{key} = {toml_value(value)}"
