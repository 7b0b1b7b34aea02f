"""Plots of answers as SVG text that stands inside a page: no file, no font, no address outside.

Every estimate is a point with its interval; estimates of one unit share an axis. Drawn with
matplotlib's object interface, without its global state.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

_WIDTH_IN: Final = 7.2
_ROW_IN: Final = 0.34
_MARGIN_IN: Final = 0.9
#: More rows than this are drawn as a curve with a band.
_MOST_ROWS: Final = 30
_BAND_IN: Final = 2.4
_SQUARE_IN: Final = 3.8
_LONGEST_NAME: Final = 48
_INK, _ACCENT, _FAINT = "#1f2a37", "#1d5f8a", "#d5dde6"
#: `Any`: the stubs name every one of the library's settings.
_STYLE: Final[Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "havengate",
    # A dollar sign in a name is no formula.
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_PROLOGUE = re.compile(r"\A.*?(?=<svg)", re.DOTALL)
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)


def plot_estimates(estimates: Sequence[Mapping[str, Any]], *, label: str) -> str:
    """Draw one answer's estimates. `label` says in words what is seen, for those who cannot."""
    units = list(dict.fromkeys(one["unit"] for one in estimates))
    groups = [[one for one in estimates if one["unit"] == unit] for unit in units]
    heights = [_MARGIN_IN + _height_in(len(group)) for group in groups]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, sum(heights)), layout="constrained")
        axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)
        for axis, unit, group in zip(axes[:, 0], units, groups, strict=True):
            if len(group) <= _MOST_ROWS:
                _draw_rows(axis, unit, group)
            else:
                _draw_band(axis, unit, group)
        return _as_text(figure, label)


def plot_reliability(
    points: Sequence[tuple[float, float, Mapping[str, Any]]], *, label: str
) -> str:
    """Draw how often it happened by score: (from, to, estimate) each, beside the line of equality.

    A score's range is drawn as it is, the interval of what was observed as a line through it.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_SQUARE_IN, _SQUARE_IN), layout="constrained")
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], color=_FAINT, linewidth=1.4, linestyle="--")
        middle = [(low + high) / 2 for low, high, _ in points]
        values = [one["value"] for *_, one in points]
        axis.errorbar(
            middle,
            values,
            xerr=[(high - low) / 2 for low, high, _ in points],
            yerr=[
                [max(0.0, one["value"] - one["low"]) for *_, one in points],
                [max(0.0, one["high"] - one["value"]) for *_, one in points],
            ],
            fmt="o",
            color=_ACCENT,
            elinewidth=1.4,
            markersize=5,
        )
        axis.set_xlim(-0.02, 1.02)
        axis.set_ylim(-0.02, 1.02)
        _finish(axis, "score")
        axis.grid(axis="y", color=_FAINT, linewidth=0.8)
        axis.set_ylabel("observed rate")
        return _as_text(figure, label)


def _as_text(figure: Figure, label: str) -> str:
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None}, transparent=True)
    text = _METADATA.sub("", _PROLOGUE.sub("", svg.getvalue(), count=1))
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _height_in(count: int) -> float:
    return _ROW_IN * count if count <= _MOST_ROWS else _BAND_IN


def _draw_rows(axis: Any, unit: str, group: Sequence[Mapping[str, Any]]) -> None:
    rows = list(range(len(group)))[::-1]
    values = [one["value"] for one in group]
    below = [max(0.0, one["value"] - one["low"]) for one in group]
    above = [max(0.0, one["high"] - one["value"]) for one in group]
    axis.errorbar(
        values,
        rows,
        xerr=[below, above],
        fmt="o",
        color=_ACCENT,
        ecolor=_ACCENT,
        elinewidth=1.6,
        capsize=4,
        markersize=5,
    )
    axis.set_yticks(rows, [_short(one["name"]) for one in group])
    axis.set_ylim(-0.6, len(group) - 0.4)
    _finish(axis, unit)


def _draw_band(axis: Any, unit: str, group: Sequence[Mapping[str, Any]]) -> None:
    places = list(range(len(group)))
    axis.fill_between(
        places,
        [one["low"] for one in group],
        [one["high"] for one in group],
        color=_ACCENT,
        alpha=0.2,
        linewidth=0,
    )
    axis.plot(places, [one["value"] for one in group], color=_ACCENT, linewidth=1.4)
    step = max(1, len(group) // 8)
    axis.set_xticks(places[::step], [_short(one["name"]) for one in group[::step]], rotation=30)
    _finish(axis, "")
    axis.set_ylabel(unit)


def _finish(axis: Any, unit: str) -> None:
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.grid(axis="x", color=_FAINT, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    if unit:
        axis.set_xlabel(unit)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
