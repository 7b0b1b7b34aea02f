"""How `havengate audit` shows things: objects for scripts, lines for people. Decides nothing."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import msgspec
import typer

from audit.export.csv import rfc3339

if TYPE_CHECKING:
    from collections.abc import Sequence

    from audit.checkpoint import SignedCheckpoint
    from audit.pairing import Dangling
    from audit.search import Exchange, Names, Page
    from audit.verify import Report

#: Findings that people are shown; JSON has all that were listed.
_SHOWN = 20


def report_object(report: Report, retained_from: int) -> dict[str, Any]:
    """`verify --json`."""
    story = report.story
    return {
        "sound": report.problem_count == 0,
        "origin": report.origin,
        "size": report.size,
        "sequenced": report.sequenced,
        "checked": report.checked,
        "retained_from": retained_from,
        "cosigned_by": list(report.cosigned_by),
        "consistent_with": report.consistent_with,
        "problem_count": report.problem_count,
        "problems": [{"where": one.where, "what": one.what} for one in report.problems],
        "dangling_count": story.dangling_count,
        "dangling": [_dangling(one) for one in story.dangling],
        "orphan_count": story.orphan_count,
        "orphans": [_dangling(one) for one in story.orphans],
        "untracked": story.untracked,
        "regression_count": story.regression_count,
        "regressions": [{"index": one.index, "back_us": one.back_us} for one in story.regressions],
    }


def _dangling(one: Dangling) -> dict[str, Any]:
    return {"index": one.index, "request": one.request, "stage": one.stage}


def print_report(report: Report, retained_from: int) -> None:
    """`verify` for people."""
    typer.echo(f"Log          {report.origin or 'unknown'}")
    typer.echo(f"Entries      {report.sequenced}, of which {report.size} are published")
    typer.echo(f"Checked      {report.checked}, pruned below {retained_from}")
    typer.echo(f"Cosigned by  {', '.join(report.cosigned_by) or 'nobody that was asked for'}")
    if report.consistent_with is not None:
        typer.echo(f"Continues    the older checkpoint of {report.consistent_with} entries")
    story = report.story
    for one in story.dangling[:_SHOWN]:
        typer.echo(f"No outcome   entry {one.index}, request {one.request}")
    for one in story.orphans[:_SHOWN]:
        typer.echo(f"No intent    entry {one.index}, request {one.request}")
    if story.untracked:
        typer.echo(f"Not followed {story.untracked} exchanges: too many were open at a time")
    for step in story.regressions[:_SHOWN]:
        typer.echo(f"Clock        entry {step.index} is {step.back_us / 1e6:.1f} s back")
    for problem in report.problems[:_SHOWN]:
        typer.echo(f"PROBLEM      {problem.where}: {problem.what}")
    if report.problem_count:
        typer.echo(f"NOT SOUND    {report.problem_count} problems")
    else:
        typer.echo("Sound        every byte is what the checkpoint says")


def proof_object(index: int, entry: bytes, signed: SignedCheckpoint) -> dict[str, Any]:
    """`verify-proof --json`. An entry that is no JSON is another log's, and not shown."""
    return {
        "index": index,
        "origin": signed.checkpoint.origin,
        "size": signed.checkpoint.size,
        "entry": _read(entry),
    }


def print_proof(index: int, entry: bytes, signed: SignedCheckpoint) -> None:
    """`verify-proof` for people."""
    typer.echo(
        f"Proven: entry {index} is in {signed.checkpoint.origin} of {signed.checkpoint.size}"
    )
    found = _read(entry)
    if found is None:
        typer.echo(f"It is {len(entry)} bytes that are no JSON, so not an entry of Havengate's.")
    else:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=True))


def _read(entry: bytes) -> Any:
    try:
        return json.loads(entry)
    except ValueError:
        return None


def print_headings(shown: Sequence[Exchange]) -> None:
    """What the columns of `exchange_line` are, on a terminal: scripts count lines, or take JSON."""
    if not shown or not sys.stdout.isatty():
        return
    time_width = len(rfc3339(shown[0].newest.time))
    heads = (
        f"{'entry':>9}",
        f"{'time (UTC)':<{time_width}}",
        f"{'outcome':<10}",
        f"{'action':<8}",
        "app",
        "who (role)",
        "records",
        "[patients]",
        "rules",
    )
    typer.secho("  ".join(heads), bold=True)


def page_object(page: Page, names: Sequence[Names | None], *, verified: bool) -> dict[str, Any]:
    """`search --json`."""
    pairs = zip(page.exchanges, names, strict=True)
    return {
        "exchanges": [exchange_object(exchange, opened) for exchange, opened in pairs],
        "before": page.before,
        "verified": verified,
    }


def exchange_object(exchange: Exchange, names: Names | None) -> dict[str, Any]:
    """One exchange: the entries as the log has them, and the names if they were opened."""
    found: dict[str, Any] = {
        "log_index": exchange.log_index,
        "request": exchange.newest.request,
        "ended": exchange.ended,
        "entries": [
            {"log_index": index} | msgspec.to_builtins(entry) for index, entry in exchange.entries
        ],
    }
    if names is not None:
        found["names"] = {
            "actor": names.actor,
            "client": names.client,
            "patients": list(names.patients),
        }
    return found


def exchange_line(exchange: Exchange, names: Names | None) -> str:
    """One exchange for people."""
    entry = exchange.newest
    actor = names.actor if names else entry.actor.name or entry.actor.kind
    patients = " ".join(names.patients) if names else f"{len(entry.patients)} patients"
    resources = " ".join(f"{one.type}/{one.id}" if one.id else one.type for one in entry.resources)
    result = entry.outcome or (entry.decision if exchange.ended else "no outcome")
    parts = (
        f"{exchange.log_index:>9}",
        rfc3339(entry.time),
        f"{result or entry.stage:<10}",
        f"{entry.action:<8}",
        entry.service or "-",
        f"{actor} ({entry.actor.role or entry.actor.kind})",
        resources or "-",
        f"[{patients}]",
        " ".join(entry.rules),
    )
    return "  ".join(parts).rstrip()
