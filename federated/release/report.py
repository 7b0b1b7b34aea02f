"""The report for people: one HTML page made from the release's document, that needs nothing else.

It holds no script and loads nothing: styles and plots stand in it, and a content security policy
says so to the browser. Everything that comes from a study is escaped.
"""

from __future__ import annotations

import base64
import datetime as dt
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any, Final

from federated.release.figures import figures, number
from federated.release.plots import plot_estimates

_MECHANISMS: Final = {
    "discrete_laplace": "Discrete Laplace noise",
    "discrete_gaussian": "Discrete Gaussian noise",
}
_TRUST: Final = {
    "secure_aggregation": "Secure aggregation: nobody, the coordinator included, saw what a single "
    "node sent. Each node added its own share of the noise.",
    "trusted_server": "Trusted server: the coordinator saw what every node sent, and added the "
    "noise. This report rests on its honesty.",
}
#: A longer table is folded away.
_MOST_ROWS: Final = 20
_STYLE: Final = """
:root { color-scheme: light; --ink: #1f2a37; --faint: #d5dde6; --accent: #1d5f8a; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 50rem; color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; background: #fff; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid var(--faint); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
.question { font-size: 1.15rem; margin: .2rem 0 1.4rem; }
.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem;
  margin: 1.2rem 0; padding: 0; }
.key div { border: 1px solid var(--faint); border-radius: .5rem; padding: .6rem .8rem; }
.key dt { font-size: .8rem; color: #55616f; }
.key dd { margin: 0; font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere; }
table { width: 100%; border-collapse: collapse; font-size: .94rem; margin: .6rem 0 1rem; }
th, td { text-align: left; padding: .35rem .6rem .35rem 0; border-bottom: 1px solid var(--faint);
  vertical-align: top; }
td.number, th.number { text-align: right; padding-right: 1.4rem; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; display: block; margin: .8rem 0; }
.caution, .failed { border-left: 4px solid #b7791f; background: #fdf6e7; padding: .6rem .9rem;
  margin: .6rem 0; }
.failed { border-color: #a33; background: #fbeeee; }
code { font: .82em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.small { font-size: .88rem; color: #45505c; }
details { margin: .6rem 0; }
@media print { body { padding: 0; } details { display: none; } }
"""


def make_report(document: Mapping[str, Any], *, answer_hash: str, released: int | None) -> str:
    """The page. `released` is the index of the log's entry, once there is one."""
    study = document["study"]
    body = "\n".join(
        (
            f"<h1>{escape(study['title'])}</h1>",
            f'<p class="question">{escape(study["question"])}</p>',
            _key_figures(document),
            "<h2>Answers</h2>",
            *(_answer(one) for one in document["answers"]),
            *(_failure(name, why) for name, why in document["failures"].items()),
            "<h2>What it cost each person</h2>",
            _privacy(document),
            "<h2>Whom one has to trust</h2>",
            _trust(document["trust"]),
            "<h2>Who approved it</h2>",
            _approvals(document["approvals"]),
            "<h2>How to check this report</h2>",
            _evidence(document, answer_hash, released),
        )
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(study['title'])}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _figure(term: str, value: str) -> str:
    return f"<div><dt>{escape(term)}</dt><dd>{escape(value)}</dd></div>"


def _key_figures(document: Mapping[str, Any]) -> str:
    privacy, answers = document["privacy"], document["answers"]
    people = sorted({one["people"] for one in answers})
    cohort = "none" if not people else f"{people[0]:,}"
    if len(people) > 1:
        cohort = f"{people[0]:,} to {people[-1]:,}"
    shown = (
        ("People in the answers", cohort),
        ("Privacy spent", f"ε = {number(privacy['epsilon'])}"),
        ("at δ", _small(privacy["delta"])),
        ("Unit of privacy", privacy["unit"]),
        ("Adjacency", privacy["adjacency"]),
        ("Trust model", document["trust"]["model"].replace("_", " ")),
    )
    return f'<dl class="key">{"".join(_figure(*one) for one in shown)}</dl>'


def _row(estimate: Mapping[str, Any]) -> str:
    value, low, high = figures(estimate["value"], estimate["low"], estimate["high"])
    return (
        f"<tr><td>{escape(estimate['name'])}</td>"
        f'<td class="number">{value}</td><td class="number">{low} to {high}</td>'
        f"<td>{escape(estimate['unit'])}</td></tr>"
    )


def _answer(one: Mapping[str, Any]) -> str:
    estimates = one["estimates"]
    rows = "".join(_row(estimate) for estimate in estimates)
    level = f"{100 * estimates[0]['level']:g} %" if estimates else ""
    cost = one["cost"]
    label = escape(f"{one['query']}: each estimate with its {level} interval", quote=True)
    plot = plot_estimates(estimates, label=label) if estimates else ""
    table = (
        '<table><thead><tr><th>estimate</th><th class="number">value</th>'
        f'<th class="number">{level} interval</th><th>unit</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )
    if len(estimates) > _MOST_ROWS:
        table = f"<details><summary>All {len(estimates)} estimates</summary>{table}</details>"
    cautions = "".join(f'<p class="caution">{escape(text)}</p>' for text in one["cautions"])
    return (
        f"<section><h3>{escape(one['query'])}</h3>{plot}"
        f"{table}{cautions}"
        f'<p class="small">{one["people"]:,} people at {one["nodes"]} nodes'
        f"{_dropped(one['dropped'])}. {_MECHANISMS.get(cost['mechanism'], cost['mechanism'])} of "
        f"scale {number(cost['scale'])} on integers that one person moves by at most "
        f"{number(cost['l1'])} (L1) or {number(cost['l2'])} (L2). The interval holds the noise "
        "and the sampling error.</p></section>"
    )


def _dropped(count: int) -> str:
    return "" if not count else f"; {count} more began and did not come to the end"


def _failure(name: str, why: str) -> str:
    return f'<p class="failed"><b>{escape(name)}</b> has no answer: {escape(why)}</p>'


def _privacy(document: Mapping[str, Any]) -> str:
    privacy = document["privacy"]
    rows = "".join(
        f'<tr><td>{escape(one["query"])}</td><td class="number">{number(one["cost"]["epsilon"])}'
        f'</td><td class="number">{_small(one["cost"]["delta"])}</td>'
        f"<td>{escape(_MECHANISMS.get(one['cost']['mechanism'], ''))}</td></tr>"
        for one in document["answers"]
    )
    return (
        "<p>All that was ever asked in this study cost each person at most "
        f"ε = {number(privacy['epsilon'])} at δ = {_small(privacy['delta'])}; "
        f"approved were ε = {number(privacy['approved_epsilon'])} "
        f"at δ = {_small(privacy['approved_delta'])}. The unit is the {escape(privacy['unit'])}: "
        "whatever one person's data say, and however many days they hold, nobody who reads this "
        "can tell it from nothing by more than that. Who took part is not hidden "
        f"({escape(privacy['adjacency'])} adjacency).</p>"
        '<table><thead><tr><th>query</th><th class="number">ε</th><th class="number">δ</th>'
        f"<th>mechanism</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _trust(trust: Mapping[str, Any]) -> str:
    text = _TRUST.get(trust["model"], trust["model"])
    if trust["model"] == "secure_aggregation":
        text += (
            " The promise holds as long as the nodes that are in league with the coordinator, or "
            "read this answer knowing the noise that they added themselves, are at most "
            f"{trust['colluding']} in number; {trust['threshold']} nodes had to agree before a sum "
            "was unmasked."
        )
    return f"<p>{escape(text)}</p>"


def _approvals(approvals: Iterable[Mapping[str, Any]]) -> str:
    words = {"propose": "proposed", "approve": "approved", "publish": "published"}
    rows = "".join(
        f"<tr><td>{escape(words.get(one['step'], one['step']))}</td>"
        f"<td>{escape(one['role'] + (' ' + one['site'] if one['site'] else ''))}</td>"
        f"<td>{_time(one['at'])}</td>"
        f'<td class="number">{one["log_index"]}</td>'
        f"<td><code>{escape(one['key'][:16])}{'…' if one['key'] else ''}</code></td></tr>"
        for one in approvals
    )
    return (
        '<table><thead><tr><th>step</th><th>as</th><th>when</th><th class="number">log entry</th>'
        f"<th>key</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _evidence(document: Mapping[str, Any], answer_hash: str, released: int | None) -> str:
    study, evidence = document["study"], document["evidence"]
    entry = "not yet" if released is None else f"entry {released}"
    proof = base64.b64decode(evidence["log_proof"]).decode("utf-8", errors="replace")
    return (
        "<table><tbody>"
        f"<tr><td>study</td><td><code>{escape(study['id'])}</code></td></tr>"
        f"<tr><td>hash of the study</td><td><code>{escape(study['hash'])}</code></td></tr>"
        f"<tr><td>hash of the code</td><td><code>{escape(study['code_hash'])}</code></td></tr>"
        f"<tr><td>hash of this answer</td><td><code>{escape(answer_hash)}</code></td></tr>"
        f"<tr><td>study log</td><td><code>{escape(evidence['log_origin'])}</code></td></tr>"
        f"<tr><td>released</td><td>{escape(entry)}</td></tr>"
        f"<tr><td>run</td><td>{escape(document['run']['id'])}, {_time(document['run']['at'])}</td>"
        "</tr></tbody></table>"
        '<p class="small">The answer as JSON beside this page holds the study with all signatures '
        "and the proof of its publication (C2SP tlog-proof); both can be checked with the public "
        "keys alone.</p>"
        f"<details><summary>Proof of publication</summary><pre><code>{escape(proof)}</code></pre>"
        "</details>"
    )


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-").replace("-", "\N{MINUS SIGN}")


def _time(unix_s: int) -> str:
    return dt.datetime.fromtimestamp(unix_s, tz=dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
