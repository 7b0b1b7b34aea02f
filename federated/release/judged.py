"""How well a model does, as a page shows it: the estimates of one evaluation, drawn and in a table.

What is drawn is told by the names that `learning.evaluate` gives its estimates; one that is not
known here still stands in the table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, Final

from federated.learning.words import meaning_of
from federated.release.figures import figures
from federated.release.markup import answer_notes, estimates_plot, estimates_table, level_of
from federated.release.plots import plot_reliability

_RELIABILITY = re.compile(r"observed rate at scores ([0-9.]+) to ([0-9.]+)").fullmatch
#: In the order in which they are said, with what each means.
_HEADLINES: Final = {
    "AUC": "of two people (or days), one with and one without what is predicted, it gives the "
    "higher score to the right one so often; 0.5 is chance",
    "predicted minus observed": "0 would be right on average",
    "Brier score": "mean squared distance of the score from what happened; smaller is better",
    "observed rate": "how often what is predicted happened",
    "MAE": "mean distance of the prediction from what was recorded; smaller is better",
    "MAE of the own mean": "the same if each person's own mean of the past is the guess",
    "MAE of the last value": "the same if each person's last value is the guess",
}
_PAST: Final = ("MAE", "MAE of the own mean", "MAE of the last value")
#: An interval as wide as all that can be says that there are too few people.
_WHOLE: Final = 0.999
#: By group: the measure, and the width of the interval that says nothing.
_BY_GROUP: Final = {"AUC": 1.0, "predicted minus observed": 2.0, "MAE": math.inf}

type _Estimates = Sequence[Mapping[str, Any]]


def judged(answer: Mapping[str, Any]) -> str:
    """One evaluation's part of a card."""
    estimates: _Estimates = answer["estimates"]
    every = f"<details><summary>All estimates of {escape(answer['query'])}</summary>"
    return "".join(
        (
            _headlines(estimates),
            *_reliability(answer["query"], estimates),
            *_past(answer["query"], estimates),
            *_groups(answer, estimates),
            f"{every}{estimates_table(estimates)}</details>",
            answer_notes(answer),
        )
    )


def _headlines(estimates: _Estimates) -> str:
    found = {one["name"]: one for one in estimates}
    rows = "".join(
        _headline(found[name], meaning) for name, meaning in _HEADLINES.items() if name in found
    )
    return (
        '<table><thead><tr><th>on people held out</th><th class="number">value</th>'
        f'<th class="number">{level_of(estimates)} interval</th><th>which means</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _headline(one: Mapping[str, Any], meaning: str) -> str:
    value, low, high = figures(one["value"], one["low"], one["high"])
    return (
        f'<tr><td>{escape(one["name"])}</td><td class="number">{value}</td>'
        f'<td class="number">{low} to {high}</td>'
        f'<td class="small">{escape(meaning)}</td></tr>'
    )


def _reliability(name: str, estimates: _Estimates) -> Iterator[str]:
    points = []
    for one in estimates:
        ends = _RELIABILITY(one["name"])
        if ends is not None:
            points.append((float(ends[1]), float(ends[2]), one))
    known = [one for one in points if one[2]["high"] - one[2]["low"] < _WHOLE]
    if not known:
        return
    words = f"{name}: how often what is predicted happened, by score, with intervals"
    yield f"<p>Does a score of 0.3 mean that it happens in 30 of 100? On the line it does.</p>{
        plot_reliability(known, label=escape(words, quote=True))
    }"
    left = len(points) - len(known)
    if left:
        yield f'<p class="small">Ranges of scores with too few people to say anything: {left}.</p>'


def _past(name: str, estimates: _Estimates) -> Iterator[str]:
    drawn = [one for one in estimates if one["name"] in _PAST]
    if len(drawn) > 1:
        yield estimates_plot(name, drawn)


def _groups(answer: Mapping[str, Any], estimates: _Estimates) -> Iterator[str]:
    """Each measure that is known by group, the whole first, on an axis of its own."""
    drawn: list[dict[str, Any]] = []
    lost: list[str] = []
    for measure, most in _BY_GROUP.items():
        start = f"{measure}, "
        groups = [one for one in estimates if one["name"].startswith(start)]
        known = [one for one in groups if one["high"] - one["low"] < _WHOLE * most]
        lost += [one["name"] for one in groups if one not in known]
        if known:
            axis = f"{measure} {known[0]['unit']}".strip()
            whole = [one for one in estimates if one["name"] == measure]
            drawn += [{**one, "name": "all", "unit": axis} for one in whole]
            drawn += [
                {**one, "name": one["name"].removeprefix(start), "unit": axis} for one in known
            ]
    if not drawn and not lost:
        return
    columns = [str(one["column"]) for one in answer["ask"].get("subgroups", ())]
    meanings = "; ".join(f"{column}: {meaning_of(column)}" for column in columns)
    yield "<p>Is it as good for everybody? By group:</p>"
    yield estimates_plot(answer["query"], drawn)
    if lost:
        yield f'<p class="small">Too few people to say anything: {escape("; ".join(lost))}.</p>'
    yield f'<p class="small">{escape(meanings)}.</p>'
