"""Pieces of the report's page that several of its sections are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final

from federated.release.figures import figures, number
from federated.release.plots import plot_estimates

MECHANISMS: Final = {
    "discrete_laplace": "Discrete Laplace noise",
    "discrete_gaussian": "Discrete Gaussian noise",
}
#: A longer table is folded away.
_MOST_ROWS: Final = 20


def estimates_table(estimates: Sequence[Mapping[str, Any]]) -> str:
    """Every estimate with its interval."""
    rows = "".join(_row(estimate) for estimate in estimates)
    level = level_of(estimates)
    table = (
        '<table><thead><tr><th>estimate</th><th class="number">value</th>'
        f'<th class="number">{level} interval</th><th>unit</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )
    if len(estimates) > _MOST_ROWS:
        return f"<details><summary>All {len(estimates)} estimates</summary>{table}</details>"
    return table


def estimates_plot(name: str, estimates: Sequence[Mapping[str, Any]]) -> str:
    """Every estimate as a point with its interval; nothing where there is none."""
    if not estimates:
        return ""
    words = f"{name}: each estimate with its {level_of(estimates)} interval"
    return plot_estimates(estimates, label=escape(words, quote=True))


def level_of(estimates: Sequence[Mapping[str, Any]]) -> str:
    """The level that all intervals of an answer have."""
    return f"{100 * estimates[0]['level']:g} %" if estimates else ""


def answer_notes(one: Mapping[str, Any]) -> str:
    """What an answer cannot say, of whom it is, and what its noise is."""
    cautions = "".join(f"<li>{escape(text)}</li>" for text in one["cautions"])
    box = f'<ul class="caution">{cautions}</ul>' if cautions else ""
    return (
        f'{box}<p class="small">{one["people"]:,} people at {one["nodes"]} nodes'
        f"{_dropped(one['dropped'])}. {noise_words(one['cost'])} The interval holds the noise and "
        "the sampling error.</p>"
    )


def noise_words(cost: Mapping[str, Any]) -> str:
    """The noise in a sum, beside what one person can move it by."""
    mechanism = MECHANISMS.get(cost["mechanism"], cost["mechanism"])
    return (
        f"{escape(mechanism)} of scale {number(cost['scale'])} on integers that one person moves "
        f"by at most {number(cost['l1'])} (L1) or {number(cost['l2'])} (L2)."
    )


def pairs_table(pairs: Iterable[tuple[str, str]], *, kind: str = "pairs") -> str:
    """Words and what there is to say of them. The second of each pair is markup already."""
    rows = "".join(f"<tr><th>{escape(word)}</th><td>{what}</td></tr>" for word, what in pairs)
    return f'<table class="{kind}"><tbody>{rows}</tbody></table>'


def small(value: float) -> str:
    """A small probability."""
    return "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-").replace("-", "\N{MINUS SIGN}")


def _row(estimate: Mapping[str, Any]) -> str:
    value, low, high = figures(estimate["value"], estimate["low"], estimate["high"])
    return (
        f"<tr><td>{escape(estimate['name'])}</td>"
        f'<td class="number">{value}</td><td class="number">{low} to {high}</td>'
        f"<td>{escape(estimate['unit'])}</td></tr>"
    )


def _dropped(count: int) -> str:
    return "" if not count else f"; {count} more began and did not come to the end"
