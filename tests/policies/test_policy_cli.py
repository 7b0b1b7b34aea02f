"""The commands: what they print and how they end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from policies.cases import BUILT_IN, load_cases
from policies.cli import PolicyCommands, build
from policies.errors import BundleError, RecordsUnavailableError
from policies.model import Request
from policies.replay import RecordedDecision
from policies.settings import PoliciesSettings

READ = next(
    case.request for case in load_cases([BUILT_IN]) if case.decides == "role.clinician.read"
)
CLOSED = (
    '@id("own.closed") @title("t") @cites("c") @reason("closed") @remedy("administrator")\n'
    "forbid(principal, action, resource);"
)


@dataclass(frozen=True, slots=True)
class Record:
    index: int
    allowed: bool = True
    request: Request | None = field(default=READ)


def run(*arguments: str, settings: PoliciesSettings | None = None) -> Result:
    @contextmanager
    def records(since: int) -> Iterator[Iterable[RecordedDecision]]:
        yield [Record(index) for index in range(since, 5)]

    commands = PolicyCommands(settings=lambda: settings or PoliciesSettings(), records=records)
    return CliRunner().invoke(build(commands), list(arguments))


def test_check_says_that_all_is_in_order() -> None:
    result = run("check")
    assert result.exit_code == 0
    assert "rules are in order" in result.stdout
    found = json.loads(run("check", "--json").stdout)
    assert len(found["hash"]) == 64
    assert {"id", "effect", "where"} == set(found["rules"][0])


def test_check_prints_the_table() -> None:
    assert "| `part2.consent` | forbid |" in run("check", "--table").stdout


def test_check_passes_the_mistake_on(tmp_path: Path) -> None:
    (tmp_path / "own.cedar").write_text("permit(")
    result = run("check", settings=PoliciesSettings(directory=str(tmp_path)))
    assert isinstance(result.exception, BundleError)


def test_test_runs_built_in_and_own_cases(tmp_path: Path) -> None:
    count = json.loads(run("test", "--json").stdout)["cases"]
    (tmp_path / "own.toml").write_text(
        '[[case]]\nname="nobody"\nexpect="allow"\naction="read"\n'
        'principal={id="x"}\nresource={type="Observation"}\n'
    )
    for result in (
        run("test", str(tmp_path), "--json"),
        run("test", "--json", settings=PoliciesSettings(cases_directory=str(tmp_path))),
    ):
        assert result.exit_code == 1
        found = json.loads(result.stdout)
        assert found["cases"] == count + 1
        assert [one["name"] for one in found["failed"]] == ["nobody"]
    assert "FAILED nobody" in run("test", str(tmp_path)).stdout


def test_test_notices_a_rule_that_takes_a_protection_away(tmp_path: Path) -> None:
    (tmp_path / "own.cedar").write_text(
        '@id("own.open") @title("t") @cites("c") permit(principal, action, resource);'
    )
    result = run("test", settings=PoliciesSettings(directory=str(tmp_path)))
    assert result.exit_code == 1
    assert "FAILED" in result.stdout


def test_explain_says_why_and_what_would_change_it(tmp_path: Path) -> None:
    request = tmp_path / "request.toml"
    request.write_text(
        'action="read"\n[principal]\nroles=["clinician"]\nsecond_factor_age_s=5\n'
        '[resource]\ntype="Observation"\npatient="p1"\n'
    )
    text = run("explain", str(request))
    assert text.exit_code == 0
    assert "Denied." in text.stdout
    assert "necessary.care-team" in text.stdout
    assert "on this patient's care team" in text.stdout
    found = json.loads(run("explain", str(request), "--json").stdout)
    assert (found["allowed"], found["remedy"]) == (False, "break_glass")


def test_replay_lists_what_would_change(tmp_path: Path) -> None:
    assert run("replay", str(tmp_path)).exit_code == 0
    (tmp_path / "own.cedar").write_text(CLOSED)
    result = run("replay", str(tmp_path), "--since", "2", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert [(one["index"], one["kind"]) for one in found["changes"]] == [
        (2, "now_denied"),
        (3, "now_denied"),
        (4, "now_denied"),
    ]
    assert "2: now denied (own.closed)" in run("replay", str(tmp_path)).stdout


def test_replay_passes_an_unreadable_trail_on(tmp_path: Path) -> None:
    @contextmanager
    def broken(since: int) -> Iterator[Iterable[RecordedDecision]]:
        raise RecordsUnavailableError("The log cannot be read.")
        yield []

    commands = PolicyCommands(settings=PoliciesSettings, records=broken)
    result = CliRunner().invoke(build(commands), ["replay", str(tmp_path)])
    assert isinstance(result.exception, RecordsUnavailableError)


@pytest.mark.parametrize("command", ["check", "test", "explain", "replay"])
def test_every_command_has_help(command: str) -> None:
    assert run(command, "--help").exit_code == 0
