"""The table of all rules in `docs/policies.md`, made from the annotations."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from policies.bundle import Bundle, Rule
from policies.model import REMEDIES
from policies.obligations import in_words

_INTRODUCTION = """\
# The rules

Made from the annotations in `policies/packs/` by `havengate policy check --table`; a test keeps it
current. What no rule allows is denied. *Permit* allows unless a *forbid* denies; *adds* allows
nothing and only adds to what others allow. The paragraphs say what a rule implements; they are no
legal advice.
"""


def rule_table(bundle: Bundle) -> str:
    """All rules as Markdown, one table for each file."""
    parts = [_INTRODUCTION]
    for file, rules in groupby(bundle.rules, key=lambda rule: Path(rule.where).name.split(":")[0]):
        parts.append(f"## {file}\n\n" + "\n".join(_rows(rules)) + "\n")
    remedies = "\n".join(f"- `{kind}`: {text}" for kind, text in REMEDIES.items())
    parts.append(f"## Remedies\n\n{remedies}\n")
    return "\n".join(parts)


def _rows(rules: Iterable[Rule]) -> Iterable[str]:
    yield "| rule | effect | says | obligations or remedy | implements |"
    yield "|---|---|---|---|---|"
    for rule in rules:
        effect = "adds" if rule.effect == "permit" and not rule.grants else rule.effect
        obligations = "; ".join(map(in_words, rule.obligations))
        more = f"`{rule.remedy}`" if rule.effect == "forbid" else obligations
        yield f"| `{rule.id}` | {effect} | {rule.title} | {more} | {rule.cites} |"
