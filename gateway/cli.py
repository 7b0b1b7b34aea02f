"""`havengate init`, `havengate up`, `havengate check`: from nothing to a gateway that runs.

What they do is elsewhere: `gateway.first_configuration` writes, `gateway.checks` looks, and what
`up` runs is wired by whoever mounts these commands.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from gateway.checks import Finding
from gateway.errors import GatewayConfigurationError
from gateway.first_configuration import (
    KINDS,
    FirstApp,
    check_content,
    check_kind,
    check_upstream,
    suggested_content,
    suggested_role,
    write_first,
)

#: One more is kept for health and metrics.
_LAST_PORT = 65_535


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayCommands:
    """What the commands need. `checks` gives findings as they are made; `up` returns at the end."""

    file: Callable[[], Path]
    checks: Callable[[], Iterator[Finding]]
    up: Callable[[], None]


def add_to(app: typer.Typer, commands: GatewayCommands) -> None:
    """Mount the commands beside the sub-commands."""
    app.command("init")(_init(commands))
    app.command("up")(_up(commands))
    app.command("check")(_check(commands))


def _init(commands: GatewayCommands) -> Callable[..., None]:
    def init(
        *,
        upstream: Annotated[str, typer.Option(help="Address of the app.")] = "",
        kind: Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}.")] = "",
        content: Annotated[str, typer.Option(help="fhir, or opaque for anything else.")] = "",
        port: Annotated[
            int, typer.Option(help="For people to come in by.", show_default=False)
        ] = 0,
        force: Annotated[bool, typer.Option("--force", help="Replace a file.")] = False,
    ) -> None:
        """Write a first configuration: four questions, or their answers as options."""
        path = commands.file()
        if path.exists() and not force:
            raise GatewayConfigurationError(
                f"{path} is there already and stays as it is. Edit it, or say --force."
            )
        address = _answered(
            upstream,
            "--upstream",
            "Address of your app",
            "http://127.0.0.1:8080/fhir",
            check_upstream,
        )
        chosen = _answered(kind, "--kind", f"What is it? ({', '.join(KINDS)})", "ehr", check_kind)
        speaks = _answered(
            content,
            "--content",
            "Does it speak FHIR? (fhir, opaque)",
            suggested_content(chosen),
            check_content,
        )
        number = _answered(
            str(port or ""), "--port", "Port for people to come in by", "8443", _port
        )
        first = FirstApp(upstream=address, kind=chosen, content=speaks, port=number)
        path.write_text(write_first(first), encoding="utf-8")
        typer.echo(f"Wrote {path}. Next:")
        name = _as_typed(sys.argv[0])
        steps = {
            f"{name} check": "says what is wrong, if anything is",
            f"{name} users add NAME --role {suggested_role(chosen)}": "makes the first account",
            f"{name} up": "starts the gateway",
        }
        width = max(map(len, steps))
        for command, does in steps.items():
            typer.echo(f"  {command:<{width}}    {does}")

    return init


def _as_typed(program: str) -> str:
    """The command as it can be typed again: with its folder, if it is not found without."""
    if Path(program).name != "havengate" or shutil.which("havengate") == program:
        return "havengate"
    return program


def _port(text: str) -> int:
    if text.isdecimal() and 0 < int(text) < _LAST_PORT:
        return int(text)
    raise GatewayConfigurationError(f"A port is a number from 1 to {_LAST_PORT - 1}, not “{text}”.")


def _answered[T](
    given: str, option: str, question: str, default: str, check: Callable[[str], T]
) -> T:
    """The option's value, or what somebody at the terminal answers.

    He is asked the same again until `check` takes it; what stood on the command line is not asked
    about, and raises `GatewayConfigurationError`.
    """
    if given:
        return check(given)
    if not sys.stdin.isatty():
        raise GatewayConfigurationError(
            f"Nobody is here to answer “{question}”. Give {option} on the command line."
        )
    while True:
        try:
            return check(str(typer.prompt(question, default=default)))
        except GatewayConfigurationError as error:
            typer.echo(str(error), err=True)


def _up(commands: GatewayCommands) -> Callable[..., None]:
    def up() -> None:
        """Run the gateway until Ctrl-C."""
        commands.up()

    return up


def _check(commands: GatewayCommands) -> Callable[..., None]:
    def check(
        *, as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False
    ) -> None:
        """Look at configuration, rules, keys, log, certificate and apps; one line each."""
        findings: list[Finding] = []
        for finding in commands.checks():
            findings.append(finding)
            if not as_json:
                _print(finding)
        if as_json:
            typer.echo(json.dumps([finding.as_dict() for finding in findings]))
        if any(not finding.good for finding in findings):
            raise typer.Exit(1)

    return check


def _print(finding: Finding) -> None:
    mark, colour = ("ok   ", typer.colors.GREEN) if finding.good else ("wrong", typer.colors.RED)
    typer.secho(mark, fg=colour, nl=False)
    typer.echo(f"  {finding.what:<22} {finding.says}")
