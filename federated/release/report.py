"""The report for people: one HTML page made from the release's document, that needs nothing else.

It holds no script and loads nothing: styles and plots stand in it, and a content security policy
says so to the browser. Everything that comes from a study is escaped.
"""

from __future__ import annotations

import base64
import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final

from federated.release.alarms import alarm_words
from federated.release.card import judges, model_card
from federated.release.figures import number
from federated.release.markup import (
    MECHANISMS,
    answer_notes,
    estimates_plot,
    estimates_table,
    small,
)
from federated.release.model_files import ModelFile

_TRUST: Final = {
    "secure_aggregation": "Secure aggregation: nobody, the coordinator included, saw what a single "
    "node sent. Each node added its own share of the noise.",
    "trusted_server": "Trusted server: the coordinator saw what every node sent, and added the "
    "noise. This report rests on its honesty.",
}
_STYLE: Final = """
:root { color-scheme: light; --ink: #1f2a37; --faint: #d5dde6; --accent: #1d5f8a; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 50rem; color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; background: #fff; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid var(--faint); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
h4 { font-size: .94rem; margin: 1.4rem 0 .3rem; }
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
table.pairs th { width: 8.5rem; font-weight: 600; padding-right: 1rem; }
table.pairs ul { margin: 0; padding-left: 1.1rem; }
svg { max-width: 100%; height: auto; display: block; margin: .8rem 0; }
.caution, .failed { border-left: 4px solid #b7791f; background: #fdf6e7; padding: .6rem .9rem;
  margin: .6rem 0; }
ul.caution { padding-left: 1.9rem; }
.failed { border-color: #a33; background: #fbeeee; }
code { font: .82em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.small { font-size: .88rem; color: #45505c; }
details { margin: .6rem 0; }
@media print { body { padding: 0; } details { display: none; } }
"""


def make_report(
    document: Mapping[str, Any],
    *,
    answer_hash: str,
    released: int | None,
    files: Sequence[ModelFile] = (),
) -> str:
    """The page. `released` is the index of the log's entry, once there is one.

    `files` are those of the models that are written beside it, or say why they are not.
    """
    study = document["study"]
    body = "\n".join(
        (
            f"<h1>{escape(study['title'])}</h1>",
            f'<p class="question">{escape(study["question"])}</p>',
            *(_alarm(words) for words in alarm_words(document)),
            _key_figures(document),
            _models(document, files),
            _answers(document),
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


def _alarm(words: str) -> str:
    return f'<p class="failed"><b>Warning.</b> {escape(words)}</p>'


def _figure(term: str, value: str) -> str:
    return f"<div><dt>{escape(term)}</dt><dd>{escape(value)}</dd></div>"


def _key_figures(document: Mapping[str, Any]) -> str:
    privacy, parts = document["privacy"], [*document["models"], *document["answers"]]
    people = sorted({one["people"] for one in parts})
    cohort = "none" if not people else f"{people[0]:,}"
    if len(people) > 1:
        cohort = f"{people[0]:,} to {people[-1]:,}"
    shown = (
        ("People in the answers", cohort),
        ("Privacy spent", f"ε = {number(privacy['epsilon'])}"),
        ("at δ", small(privacy["delta"])),
        ("Unit of privacy", privacy["unit"]),
        ("Adjacency", privacy["adjacency"]),
        ("Trust model", document["trust"]["model"].replace("_", " ")),
    )
    return f'<dl class="key">{"".join(_figure(*one) for one in shown)}</dl>'


def _models(document: Mapping[str, Any], files: Sequence[ModelFile]) -> str:
    cards = "".join(model_card(document, one, files) for one in document["models"])
    return f"<h2>Models</h2>{cards}" if cards else ""


def _answers(document: Mapping[str, Any]) -> str:
    """All answers that stand in no model's card, and what has none."""
    names = [one["query"] for one in document["models"]]
    shown = [
        _answer(one) for one in document["answers"] if not any(judges(one, name) for name in names)
    ]
    shown += [_failure(name, why) for name, why in document["failures"].items()]
    return f"<h2>Answers</h2>{''.join(shown)}" if shown else ""


def _answer(one: Mapping[str, Any]) -> str:
    plot = estimates_plot(one["query"], one["estimates"])
    return (
        f"<section><h3>{escape(one['query'])}</h3>{plot}"
        f"{estimates_table(one['estimates'])}{answer_notes(one)}</section>"
    )


def _failure(name: str, why: str) -> str:
    return f'<p class="failed"><b>{escape(name)}</b> has no answer: {escape(why)}</p>'


def _privacy(document: Mapping[str, Any]) -> str:
    privacy = document["privacy"]
    rows = "".join(
        f'<tr><td>{escape(one["query"])}</td><td class="number">{number(one["cost"]["epsilon"])}'
        f'</td><td class="number">{small(one["cost"]["delta"])}</td>'
        f"<td>{escape(MECHANISMS.get(one['cost']['mechanism'], ''))}</td></tr>"
        for one in (*document["models"], *document["answers"])
    )
    return (
        "<p>All that was ever asked in this study cost each person at most "
        f"ε = {number(privacy['epsilon'])} at δ = {small(privacy['delta'])}; "
        f"approved were ε = {number(privacy['approved_epsilon'])} "
        f"at δ = {small(privacy['approved_delta'])}. The unit is the {escape(privacy['unit'])}: "
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


def _time(unix_s: int) -> str:
    return dt.datetime.fromtimestamp(unix_s, tz=dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
