"""`havengate policy`: check, test, explain and replay.

The commands only ask and print. The program root calls `build` with a `PolicyCommands` and mounts
the result under `policy`:

- `settings()` returns the `[policies]` section of the configuration file;
- `records(since)` opens the audit trail for the length of one command and gives its decisions as
  `RecordedDecision`s, oldest first, from index `since` on. It raises `RecordsUnavailableError` when
  the trail cannot be read.

Exit codes: 0 all right; 1 a problem was found (a case that fails, decisions that would change);
2 usage or configuration (the root gives it for a `PoliciesError`); 3 unavailable (the root gives it
for a `RecordsUnavailableError`). Errors pass through: the root prints them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from policies import cases
from policies.bundle import Bundle, load
from policies.engine import Engine
from policies.errors import MalformedRequestError
from policies.explain import Explanation, explain
from policies.model import Allowed, Decision
from policies.obligations import in_words
from policies.replay import Changed, RecordedDecision, Replay, Tally
from policies.settings import PoliciesSettings
from policies.store import load_in_force
from policies.table import rule_table

PROBLEM_FOUND = 1

JSONOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Folder = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="Folder with the changed rules.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyCommands:
    """How the commands get what they work with; the module docstring says what each must do."""

    settings: Callable[[], PoliciesSettings]
    records: Callable[[int], AbstractContextManager[Iterable[RecordedDecision]]]


def build(commands: PolicyCommands) -> typer.Typer:
    """Return the sub-commands, ready to be mounted under `policy`."""
    app = typer.Typer(no_args_is_help=True, help="Rules: check, test, explain and replay them.")
    _add_check(app, commands)
    _add_test(app, commands)
    _add_explain(app, commands)
    _add_replay(app, commands)
    return app


def _add_check(app: typer.Typer, commands: PolicyCommands) -> None:
    @app.command()
    def check(
        *,
        table: Annotated[bool, typer.Option(help="Print the table of all rules instead.")] = False,
        as_json: JSONOption = False,
    ) -> None:
        """Read all rules and code tables and check them, as a start or a reload would."""
        in_force = load_in_force(commands.settings())
        bundle = in_force.engine.bundle
        if as_json:
            _print_json(
                {
                    "hash": in_force.hash,
                    "tables_hash": in_force.tables_hash,
                    "rules": [
                        {"id": rule.id, "effect": rule.effect, "where": rule.where}
                        for rule in bundle.rules
                    ],
                }
            )
        elif table:
            typer.echo(rule_table(bundle), nl=False)
        else:
            typer.echo(f"{len(bundle.rules)} rules are in order. Bundle {in_force.hash[:16]}.")


def _add_test(app: typer.Typer, commands: PolicyCommands) -> None:
    @app.command()
    def test(
        folders: Annotated[
            list[Path] | None,
            typer.Argument(help="Folders with cases; else policies.cases_directory."),
        ] = None,
        *,
        as_json: JSONOption = False,
    ) -> None:
        """Run the built-in test cases and the clinic's own against the rules."""
        settings = commands.settings()
        own = [Path(settings.cases_directory)] if settings.cases_directory else []
        found = cases.load_cases([cases.BUILT_IN, *(folders or own)])
        results = cases.run_cases(Engine(_bundle(settings)), found)
        failed = [result for result in results if result.problem]
        if as_json:
            _print_json(
                {
                    "cases": len(results),
                    "failed": [
                        {
                            "name": one.case.name,
                            "where": one.case.where,
                            "problem": one.problem,
                        }
                        for one in failed
                    ],
                }
            )
        else:
            for one in failed:
                typer.echo(f"FAILED {one.case.name}\n  {one.problem}\n  {one.case.where}")
            typer.echo(f"{len(results) - len(failed)} of {len(results)} cases hold.")
        if failed:
            raise typer.Exit(PROBLEM_FOUND)


def _add_explain(app: typer.Typer, commands: PolicyCommands) -> None:
    @app.command("explain")
    def explain_(
        request: Annotated[
            Path, typer.Argument(help="TOML file with action, [principal], [resource], [context].")
        ],
        *,
        as_json: JSONOption = False,
    ) -> None:
        """Say why a request is allowed or denied, and what would change the answer."""
        try:
            text = request.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MalformedRequestError(f"Cannot read {request} as UTF-8 text.") from error
        explanation = explain(_bundle(commands.settings()), cases.parse_request(text))
        if as_json:
            _print_json(_explanation_object(explanation))
        else:
            _print_explanation(explanation)


def _add_replay(app: typer.Typer, commands: PolicyCommands) -> None:
    @app.command()
    def replay(
        folder: Folder,
        *,
        since: Annotated[int, typer.Option(min=0, help="First index of the log to look at.")] = 0,
        most: Annotated[int, typer.Option(min=1, help="Stop after so many changes.")] = 1000,
        as_json: JSONOption = False,
    ) -> None:
        """Run changed rules over the recorded audit trail and list what would be decided anew.

        The folder stands in for `policies.directory`; the built-in rules are the same.
        """
        settings = commands.settings()
        run = Replay(
            current=Engine(_bundle(settings)),
            changed=Engine(load([folder], roles=settings.roles)),
        )
        with commands.records(since) as records:
            changes = list(islice(run.run(records), most))
        if as_json:
            _print_json(
                {
                    "tally": _tally_object(run.tally),
                    "changes": [_changed_object(one) for one in changes],
                }
            )
        else:
            _print_replay(changes, run.tally)
        if changes:
            raise typer.Exit(PROBLEM_FOUND)


def _bundle(settings: PoliciesSettings) -> Bundle:
    own = [Path(settings.directory)] if settings.directory else []
    return load(own, roles=settings.roles)


def _decision_object(decision: Decision) -> dict[str, Any]:
    if isinstance(decision, Allowed):
        return {
            "allowed": True,
            "rules": decision.rules,
            "obligations": [in_words(one) for one in decision.obligations],
        }
    return {
        "allowed": False,
        "rules": decision.rules,
        "reason": decision.reason,
        "remedy": decision.remedy.kind,
        "failure": decision.failure,
    }


def _explanation_object(explanation: Explanation) -> dict[str, Any]:
    return {
        **_decision_object(explanation.decision),
        "because": explanation.because,
        "changes": [{"kinds": one.kinds, "text": one.text} for one in explanation.changes],
    }


def _print_explanation(explanation: Explanation) -> None:
    typer.echo("Allowed." if isinstance(explanation.decision, Allowed) else "Denied.")
    for line in explanation.because:
        typer.echo(f"  {line}")
    if explanation.changes:
        typer.echo("What would change it:")
    for change in explanation.changes:
        typer.echo(f"  {change.text}")


def _changed_object(changed: Changed) -> dict[str, Any]:
    return {
        "index": changed.index,
        "kind": changed.kind,
        "before": _decision_object(changed.before),
        "after": _decision_object(changed.after),
    }


def _tally_object(tally: Tally) -> dict[str, int]:
    return {
        "seen": tally.seen,
        "same": tally.same,
        "changed": tally.changed,
        "incomplete": tally.incomplete,
        "not_reproduced": tally.not_reproduced,
    }


def _print_replay(changes: Sequence[Changed], tally: Tally) -> None:
    for one in changes:
        rules = ", ".join(one.after.rules) or "no rule"
        typer.echo(f"{one.index}: {one.kind.replace('_', ' ')} ({rules})")
    typer.echo(
        f"{tally.seen} decisions seen: {tally.same} the same, {tally.changed} changed, "
        f"{tally.incomplete} recorded too little, {tally.not_reproduced} could not be reproduced."
    )


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))
